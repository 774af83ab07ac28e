"""Checks that protect users: edited configs, non-finite numbers, pretrained models, an output folder used twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import with_train
from dit_in_dit.cli import main
from dit_in_dit.cli.options import class_numbers
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash, to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import key, to_dict
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.interop.release import export_release
from dit_in_dit.reporting.images import to_pixels
from dit_in_dit.runs import atomic, checkpoint, integrity, pretrained
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training.loop import train


@pytest.fixture
def trained(run_config, tmp_path):
    list(train(run_config, tmp_path / "run", device="cpu"))
    return tmp_path / "run"


def refused(capsys, *arguments: object) -> str:
    """The line that a refused command prints."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit-in-dit: ")]
    return line


# ------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize("command", ["sample", "evaluate", "export", "pipeline", "maps", "doctor", "init", "resume"])
def test_loading_weights_with_an_edited_config_is_refused(trained, run_config, tmp_path, capsys, command):
    path = trained / "config.yaml"
    path.write_text(path.read_text().replace("guidance: 2.0", "guidance: 3.0"))
    assert "guidance: 3.0" in path.read_text()
    out = tmp_path / "out"
    (tmp_path / "new.yaml").write_text(to_yaml(run_config))
    arguments = {
        "sample": ["sample", trained, "-n", "1", "--out", out],
        "evaluate": ["evaluate", trained, "-n", "4", "--out", out],
        "export": ["export", trained, "--format", "run", "--out", out],
        "pipeline": ["export", trained, "--format", "pipeline", "--out", out],
        "doctor": ["doctor", trained],
        "maps": ["maps", trained, "--out", out],
        "init": ["train", "--config", tmp_path / "new.yaml", "--init", trained, "--out", out],
        "resume": ["train", "--resume", "--out", trained],
    }[command]
    assert "was changed since 0000006 was written: put it back" in refused(capsys, *arguments)


def test_a_config_in_another_yaml_style_is_accepted(trained):
    path = trained / "config.yaml"
    path.write_text("# mine\n" + to_yaml(read_config(trained)))
    Checkpoint.open(trained).model(torch.device("cpu"))


def test_a_config_hash_of_a_later_version_does_not_count_as_an_edited_config(trained, run_config, monkeypatch):
    monkeypatch.setattr(checkpoint, "HASH_VERSION", 9)
    monkeypatch.setattr(checkpoint, "config_hash", lambda config: "another")
    tensors = {"weight": torch.zeros(1)}
    checkpoint.save(trained, run_config, 9, tensors, tensors, ("a",))
    monkeypatch.undo()
    with pytest.raises(UserError, match="by a later version"):
        checkpoint.newest(trained)


def test_commands_that_need_label_frequencies_refuse_changed_data(trained, run_config, tmp_path, capsys):
    shutil.copytree(run_config.data.source, tmp_path / "images")
    moved = replace(run_config, data=replace(run_config.data, source=str(tmp_path / "images")))
    list(train(moved, tmp_path / "moved", device="cpu"))
    arguments = ["evaluate", tmp_path / "moved", "-n", "4", "--device", "cpu"]
    main([str(argument) for argument in arguments])
    next((tmp_path / "images/red").iterdir()).unlink()
    for command in (arguments, ["doctor", tmp_path / "moved"], ["maps", tmp_path / "moved", "--num", "1"]):
        assert "changed since" in refused(capsys, *command)


@dataclass(frozen=True)
class Later(TrainConfig):
    novelty: int = key(0, "of a later version", low=0, high=9, added=2)


@dataclass(frozen=True)
class LaterRun(RunConfig):
    train: Later = key(Later, "training")


def test_a_later_key_is_hashed_only_if_it_is_set():
    now = RunConfig()
    then = LaterRun(train=Later(**to_dict(now.train)))
    assert config_hash(then) == config_hash(now)
    assert config_hash(replace(then, train=replace(then.train, novelty=1))) != config_hash(now)


def test_config_hashes_equal_the_recorded_ones():
    assert config_hash(RunConfig()) == "baeaf33b0f8a7be0e35cb22089e4720a7ff3bcfc09b75a74e53588fe52cc12f7"
    for run in pretrained.pretrained_models().values():
        manifest = checkpoint.newest(run).manifest
        assert manifest["config"] == config_hash(read_config(run))


# ------------------------------------------------------------------------------------------ numbers


@pytest.fixture
def broken(trained):
    """A run whose averaged weights hold one NaN."""
    found = checkpoint.newest(trained)
    state, ema = (load_tensors(found.folder / name) for name in (checkpoint.STATE, checkpoint.AVERAGED))
    ema["outer_head.final.linear.bias"][0] = torch.nan
    checkpoint.save(trained, read_config(trained), 6, state, ema, tuple(found.manifest["classes"]))
    return trained


@pytest.mark.parametrize("command", ["sample", "evaluate", "export", "pipeline", "init", "demo"])
def test_nan_never_becomes_pixels_or_a_file(broken, run_config, tmp_path, capsys, command):
    out = tmp_path / "out"
    (tmp_path / "new.yaml").write_text(to_yaml(run_config))
    arguments = {
        "sample": ["sample", broken, "-n", "1", "--out", out],
        "evaluate": ["evaluate", broken, "-n", "4", "--out", out],
        "export": ["export", broken, "--format", "run", "--out", out],
        "pipeline": ["export", broken, "--format", "pipeline", "--out", out],
        "init": ["train", "--config", tmp_path / "new.yaml", "--init", broken, "--out", out],
        "demo": ["demo", "--out", broken],
    }[command]
    line = refused(capsys, *arguments)
    assert "NaN or infinity" in line
    assert "an earlier checkpoint" in line
    assert not [*out.rglob("*.png"), *broken.glob("*.png")]
    assert not list(out.rglob("*.safetensors"))


def test_non_finite_images_do_not_become_pixels():
    images = torch.zeros(3, 3, 4, 4)
    assert to_pixels(images).shape == (3, 4, 4, 3)
    images[1, 0, 0, 0] = torch.inf
    with pytest.raises(UserError, match="1 of 3 images hold NaN or infinity, the first is number 1"):
        to_pixels(images)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_a_pipeline_refuses_non_finite_images(broken, output_type):
    from dit_in_dit.interop.export_pipeline import pipeline_of

    saved = Checkpoint.open(broken)
    model, config, manifest = saved.model(torch.device("cpu")), saved.config, saved.manifest
    with pytest.raises(UserError, match="NaN or infinity"):
        pipeline_of(model, config, manifest["classes"])(0, output_type=output_type)


def test_a_failed_sample_grid_does_not_end_a_run(run_config, tmp_path, capsys, monkeypatch):
    from dit_in_dit.sampling import numbered

    monkeypatch.setattr(numbered, "sample", lambda model, config, count: torch.full((count, 3, 8, 8), torch.nan))
    (tmp_path / "run.yaml").write_text(to_yaml(with_train(run_config, sample_every=3)))
    main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert capsys.readouterr().err.count("no grid of step") == 2
    assert checkpoint.newest(tmp_path / "run").manifest["step"] == 6


def test_features_are_not_reused_for_other_images_with_the_same_names(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for name in ("subject", "real"):
        (tmp_path / name).mkdir()
        for number in range(16):
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    arguments = ["evaluate", tmp_path / "subject", "--against", tmp_path / "real", "-n", "8", "--out", tmp_path / "out"]
    main([str(argument) for argument in arguments])
    main([str(argument) for argument in arguments])  # the same images: nothing is in the way
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "subject/3.png")
    assert "sha256" in refused(capsys, *arguments)


# ------------------------------------------------------------------------------------------ damaged JSON


DEEP = '{"a":' * 100_000
BAD_JSON = [DEEP, "[]", "null", "{", '{"a": "\\ud800"}']


@pytest.mark.parametrize("content", BAD_JSON)
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_damaged_identity_file_gives_a_one_line_error(trained, tmp_path, capsys, command, content):
    file = {"sample": "samples.json", "evaluate": "identity.json"}[command]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text(content)
    line = refused(capsys, command, trained, "-n", "4", "--out", tmp_path / "out")
    assert "another --out" in line


NO_EVALUATIONS = (
    *BAD_JSON,
    json.dumps({"subject": {"name": "a"}, "protocol": [], "scores": {}}),
    json.dumps({"subject": {"name": 3}, "protocol": {}, "scores": {}}),
    json.dumps({"subject": {"name": "a"}, "protocol": {}, "scores": ["fid"]}),
    json.dumps({"subject": {"name": "a"}, "protocol": {}, "scores": {"fid": {"value": "small"}}}),
    json.dumps({"subject": {"name": "a"}, "protocol": {}, "scores": {"fid": 3}, "made with": []}),
)


def test_a_file_that_is_no_evaluation_is_neither_compared_nor_put_on_a_card(trained, tmp_path, capsys):
    good, bad = tmp_path / "good", trained / "evaluation/0000006"
    main(["evaluate", str(trained), "-n", "4", "--out", str(good)])
    bad.mkdir(parents=True)
    for number, content in enumerate(NO_EVALUATIONS):
        (bad / "metrics.json").write_text(content)
        assert "metrics.json" in refused(capsys, "compare", good, bad), content
        export_release(trained, tmp_path / f"given{number}")
        assert "have not been evaluated" in (tmp_path / f"given{number}/README.md").read_text(), content


def test_deeply_nested_evaluations_are_compared(tmp_path, capsys):
    for number, name in enumerate("ab"):
        protocol = '{"a":' * 900 + str(number) + "}" * 900
        (tmp_path / name).mkdir()
        text = f'{{"subject": {{"name": "a"}}, "scores": {{}}, "protocol": {protocol}}}'
        (tmp_path / name / "metrics.json").write_text(text)
    assert "their protocols differ in" in refused(capsys, "compare", tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "change", [{"classes": 3}, {"classes": [None]}, {"bytes": []}, {"bytes": {}}, {"sha256": {"a": 1}}, {"step": "6"}]
)
def test_a_manifest_with_wrong_types_counts_as_damaged(trained, change):
    folder = checkpoint.newest(trained).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["seal"]
    (folder / "manifest.json").write_bytes(integrity.seal({**manifest, **change}))
    with pytest.raises(checkpoint.DamagedError, match=r"manifest\.json is not what was written"):
        checkpoint.verify(folder)
    assert checkpoint.newest(trained).manifest["step"] == 3


# ------------------------------------------------------------------------------------------ shipped models, samples


def test_commands_do_not_change_a_pretrained_model(tmp_path, monkeypatch, trained, run_config):
    place = tmp_path / "package"
    shutil.copytree(trained, place / "tiny")
    monkeypatch.setattr(pretrained, "PLACES", (place,))
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    main(["sample", "tiny", "-n", "2"])
    main(["evaluate", "tiny", "-n", "8"])
    main(["maps", "tiny", "--num", "1", "--times", "0.5", "--steps", "2"])
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    assert (tmp_path / "evaluation/tiny/0000006/metrics.json").exists()
    assert (tmp_path / "maps/tiny/maps.html").exists()
    (tmp_path / "new.yaml").write_text(to_yaml(with_train(run_config, steps=1)))
    main(["train", "--config", "new.yaml", "--init", "tiny", "--out", "new", "--device", "cpu"])
    main(["match", "--config", "new.yaml", "--like", "tiny"])


def test_samples_of_another_protocol_go_to_their_own_folder_and_can_be_evaluated(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["sample", "run", "-n", "20"])
    many = Image.open("samples/run/grid.png").size
    main(["sample", "run", "-n", "5"])
    assert Image.open("samples/run/grid.png").size == many
    main(["sample", "run", "-n", "2", "--seed", "5", "--classes", "red, blue"])
    assert len(list(Path("samples/run-seed5-classesred_blue").glob("0*.png"))) == 2
    main(["evaluate", "samples/run", "--against", "samples/run", "-n", "8", "--out", "evaluated"])
    assert json.loads(Path("evaluated/metrics.json").read_text())["subject"]["name"] == "samples/run"


def test_class_names_match_despite_spaces_and_unicode_forms():
    known = ["caf\u00e9", "salt, pepper", "salt", "b"]
    assert class_numbers("cafe\u0301", known) == [0]
    assert class_numbers("salt, pepper, b", known) == [1, 3]
    assert class_numbers("salt,b , 2", known) == [2, 3, 2]
    with pytest.raises(UserError, match="unknown class 'pepper'"):
        class_numbers("pepper", known)


def test_a_recipe_keeps_the_given_settings_and_its_defaults_fit(capsys):
    main(["recipe", "emoji"])
    main(["recipe", "dit-in-dit-s2", "--gpus", "8", "--set", "train.steps=5"])
    assert "--set train.steps=5" in capsys.readouterr().out


def test_a_users_folder_named_like_a_temporary_folder_is_kept(trained, tmp_path):
    (tmp_path / "keep.part").mkdir()
    (tmp_path / "keep.part/mine.txt").write_text("mine")
    export_release(trained, tmp_path / "keep")
    assert (tmp_path / "keep.part/mine.txt").read_text() == "mine"
    with pytest.raises(UserError), atomic.folder(Path()):
        pass
