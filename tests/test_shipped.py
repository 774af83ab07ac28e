"""Releases (averaged weights in float16), and the pretrained models of the package."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from conftest import with_train
from dit_in_dit.cli import main, parser
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash
from dit_in_dit.data.sources import open_source
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.interop.release import export_release, write_card
from dit_in_dit.metrics.evaluate import Evaluation, evaluate
from dit_in_dit.metrics.report import draw_metrics
from dit_in_dit.metrics.subject import reference, run_subject
from dit_in_dit.runs import atomic, checkpoint, pretrained
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training.loop import train
from test_cli import lines_of

MODELS = Path(__file__).parents[1] / "models"
PAIRS = (("emoji", "emoji-dit"), ("emoji-64", "emoji-64-dit"))  # nested, and its plain twin
SHIPPED = tuple(name for pair in PAIRS for name in pair)
MOST_BYTES = 20e6


@pytest.fixture
def run(run_config, tmp_path):
    """A trained run of a few steps."""
    out = tmp_path / "run"
    for _ in train(run_config, out, device="cpu"):
        pass
    return out


def drawn(name: Path | str, out: Path, *words: str) -> np.ndarray:
    main(["sample", str(name), "--num", "4", "--device", "cpu", "--out", str(out), *words])
    return np.stack([np.asarray(Image.open(out / f"{i:06d}.png")) for i in range(4)]).astype(int)


@pytest.mark.parametrize(("precision", "error"), [("float32", 0.0), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_a_release_holds_the_averaged_weights_and_gives_the_samples_of_the_run(run, tmp_path, precision, error):
    main(["export", str(run), "--format", "run", "--precision", precision, "--out", str(tmp_path / "slim")])
    folder = checkpoint.newest(tmp_path / "slim").folder
    kept, own = (
        load_file(folder / "ema.safetensors"),
        load_tensors(checkpoint.newest(run).folder / "ema.safetensors"),
    )
    assert kept.keys() == own.keys()
    assert {tensor.dtype for tensor in kept.values()} == {getattr(torch, precision)}
    for name, tensor in own.items():
        assert (kept[name].float() - tensor).abs().max() <= error * max(1, tensor.abs().max()), name
    assert load_file(folder / "state.safetensors") == {}
    a, b = drawn(run, tmp_path / "a"), drawn(tmp_path / "slim", tmp_path / "b")
    assert np.abs(a - b).max() <= (0 if precision == "float32" else 12)
    assert {path.name for path in (tmp_path / "slim").iterdir()} == {"config.yaml", "checkpoints", "README.md"}


def test_a_release_has_one_average(run_config, tmp_path):
    config = with_train(run_config, ema_lengths=(0.1,), ema_snapshot_every=run_config.train.checkpoint_every)
    for _ in train(config, tmp_path / "run", device="cpu"):
        pass
    assert (tmp_path / "run/averages").is_dir()
    export_release(tmp_path / "run", tmp_path / "slim")
    assert {path.name for path in (tmp_path / "slim").iterdir()} == {"config.yaml", "checkpoints", "README.md"}
    assert drawn(tmp_path / "slim", tmp_path / "out").shape[0] == 4


def test_cards_name_the_library_that_loads_the_folder(run, tmp_path):
    export_release(run, tmp_path / "slim")
    for folder in (tmp_path / "slim", *(MODELS / name for name in SHIPPED)):
        front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
        assert front["library_name"] == "dit-in-dit", folder  # diffusers' classes load a pipeline's folder alone


def test_a_release_cannot_be_resumed_but_can_be_used_for_a_warm_start(run, run_config, tmp_path):
    export_release(run, tmp_path / "slim")
    with pytest.raises(UserError, match="holds only averaged weights"):
        next(train(run_config, tmp_path / "slim", device="cpu", resume=True))
    with pytest.raises(UserError, match="holds only averaged weights"):
        Checkpoint.open(tmp_path / "slim").model(torch.device("cpu"), averaged=False)
    begun, *_ = train(with_train(run_config, init=str(tmp_path / "slim")), tmp_path / "next", device="cpu")
    assert begun.values["begun"].new == 0
    export_release(tmp_path / "next", tmp_path / "last")
    line = "| initial weights | the averaged weights of slim |"
    assert line in (tmp_path / "last/README.md").read_text()
    assert "initial weights" not in (tmp_path / "slim/README.md").read_text()


def test_a_failed_export_gives_a_one_line_error_and_leaves_no_files(run, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        export_release(run, tmp_path / "taken")
    state = load_tensors(checkpoint.newest(run).folder / checkpoint.STATE)
    average = load_tensors(checkpoint.newest(run).folder / "ema.safetensors")
    average["label_embed.table.weight"][0, 0] = 1e6
    config = read_config(run)
    checkpoint.save(run, config, 99, state, average, tuple(checkpoint.newest(run).manifest["classes"]))
    with pytest.raises(UserError, match=r"label_embed.table.weight .* too large for float16: use --precision bfloat16"):
        export_release(run, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()
    export_release(run, tmp_path / "slim", precision="bfloat16")


def test_the_card_has_the_evaluation_of_the_exported_weights(run, run_config, tmp_path):
    export_release(run, tmp_path / "slim", licence="apache-2.0")
    assert "have not been evaluated" in (tmp_path / "slim/README.md").read_text()
    subject = run_subject(
        tmp_path / "slim", torch.device("cpu"), lambda config, names: (config, []), seed=0, averaged=True
    )
    out = tmp_path / "slim" / "evaluation" / "0000006"
    found = [fact for fact in evaluate(subject, reference(None, subject, 8), out, 4) if isinstance(fact, Evaluation)]
    draw_metrics(found[0], out / "metrics.png")
    write_card(tmp_path / "slim", "mine", licence="apache-2.0")
    text = (tmp_path / "slim/README.md").read_text()
    assert "dit-in-dit sample mine" in text
    assert f"{found[0].result['scores']['swd.8']['value']:.4g}" in text
    assert config_hash(run_config) in text
    assert "](evaluation/0000006/metrics.png)" in text
    export_release(tmp_path / "slim", tmp_path / "again")
    assert (tmp_path / "again/scores.png").read_bytes() == (out / "metrics.png").read_bytes()
    assert "](scores.png)" in (tmp_path / "again/README.md").read_text()


def test_a_pretrained_run_is_found_by_name_unless_a_file_has_that_path(run, tmp_path, monkeypatch):
    export_release(run, tmp_path / "models" / "small")
    monkeypatch.setattr(pretrained, "PLACES", (tmp_path / "nowhere", tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(drawn("small", tmp_path / "a"), drawn(tmp_path / "models/small", tmp_path / "b"))
    main(["sample", "small", "--num", "1", "--device", "cpu"])
    assert (tmp_path / "samples/small/000000.png").exists()
    shutil.copytree(run, tmp_path / "small")
    assert pretrained.find_run("small") == Path("small")
    with pytest.raises(SystemExit):
        main(["sample", "smal", "--num", "1"])


# ------------------------------------------------------------------------------ read-only, by every command

# What each command that takes a run is given with the shipped run `small`, where it writes, and how it ends.
WITH_A_SHIPPED_RUN = {
    "train": (["--config", "RUN.yaml", "--init", "small", "--until", "2", "--out", "begun"], "begun/log.jsonl"),
    "export": (["small", "--format", "run", "--out", "again"], "again/config.yaml"),
    "sample": (["small", "-n", "2"], "samples/small/grid.png"),
    "evaluate": (["small", "-n", "4"], "evaluation/small/0000006/metrics.json"),
    "compare": (["small", "small", "--out", "compared"], "compared/compare.png"),
    "maps": (["small", "--num", "1", "--times", "0.5"], "maps/small/maps.html"),
    "doctor": (["small", "--out", "examined"], "examined/doctor.json"),
    "draw": (["small", "--out", "figures/small.svg"], "figures/small.svg"),
    "match": (["--config", "RUN.yaml", "--like", "models/small", "--out", "twin.yaml"], "twin.yaml"),
    "verify-resume": (["small", "--steps", "2", "--keep", "kept"], "kept/stopped/log.jsonl"),
    "curves": (["small"], None),  # it has no log: refused, in one line
}


def listing(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file in a folder, and the names of its subfolders."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that keeps the release that all tests of this file copy: evaluations take seconds."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def small(run, shelf, tmp_path, monkeypatch):
    """The folder of a pretrained run `small` with its evaluation, seen from an empty working folder."""
    out = tmp_path / "package" / "models" / "small"
    if not (shelf / "small").exists():
        export_release(run, shelf / "small")
        main(["evaluate", str(shelf / "small"), "-n", "5", "--device", "cpu"])
    shutil.copytree(shelf / "small", out)
    monkeypatch.setattr(pretrained, "PLACES", (tmp_path / "nowhere", out.parent))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("RUN.yaml").write_text((run / "config.yaml").read_text())
    return out


def test_every_command_that_takes_a_run_is_tested_with_a_pretrained_one():
    commands = next(iter(parser()._subparsers._group_actions)).choices
    words = {name: [str(a.metavar) + str(a.help) for a in one._actions] for name, one in commands.items()}
    takes = {name for name, found in words.items() if any("RUN" in word or "a run" in word for word in found)}
    makes = {"demo", "import", "average"}  # their RUN is one that they write, or write into
    makes.add("app")  # serves until it is interrupted: test_app_page
    assert takes - makes == WITH_A_SHIPPED_RUN.keys()


@pytest.mark.slow
@pytest.mark.parametrize("command", WITH_A_SHIPPED_RUN)
def test_commands_on_a_pretrained_run_write_into_the_working_folder_only(command, small, capsys):
    words, written = WITH_A_SHIPPED_RUN[command]
    before = listing(small.parent)
    device = [] if command in ("export", "compare", "curves", "draw") else ["--device", "cpu"]
    if written:
        main([command, *words, *device])
        assert Path(written).exists()
    else:
        assert "no step is logged yet" in lines_of([command, *words, *device], capsys)
    assert listing(small.parent) == before


def test_results_name_a_pretrained_run_not_the_folder_that_it_is_installed_in(small, run, tmp_path):
    main(["evaluate", "small", "-n", "4", "--device", "cpu", "--out", "results"])
    assert json.loads(Path("results/metrics.json").read_text())["subject"]["name"] == "models/small"
    assert pretrained.shown_name(run) == str(run)


def test_pretrained_runs_are_listed_beside_presets_of_the_same_name(small, capsys, monkeypatch):
    assert pretrained.find_run("models/small") == pretrained.find_run("small") == small
    monkeypatch.setattr(pretrained, "PLACES", (MODELS,))
    main(["presets"])
    listed, trained = capsys.readouterr().out.split("\n\n")
    assert {line.split()[0] for line in trained.splitlines()[1:]} == {f"models/{name}" for name in SHIPPED}
    assert set(PAIRS[0]) <= {line.split()[0] for line in listed.splitlines()}


def test_doctor_skips_training_checks_for_a_run_that_has_only_weights(small, run):
    report = examine(read_config(small), torch.device("cpu"), small)
    whole = examine(read_config(run), torch.device("cpu"), run)
    assert report.step == whole.step
    assert {section.title for section in whole.sections} == {section.title for section in report.sections}
    training = report.sections[-1]
    assert (training.title, training.rows) == ("training", {})
    assert [finding.severity for finding in training.findings] == ["note"]


# ------------------------------------------------------------------------------ what is shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_pretrained_models_are_complete_small_and_documented(name):
    run = MODELS / name
    assert pretrained.pretrained_models()[name].samefile(run)
    assert sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) < MOST_BYTES
    saved = checkpoint.newest(run)
    folder, manifest, passed_over = saved.folder, saved.manifest, saved.passed_over
    assert not passed_over
    config = read_config(run)
    assert manifest["config"] == config_hash(config)
    assert manifest["classes"] == list(open_source(config.data, config.model).classes)
    card = (run / "README.md").read_text()
    assert manifest["config"] in card
    metrics = json.loads((run / "evaluation" / folder.name / "metrics.json").read_text())
    assert metrics["subject"]["checkpoint"] == manifest["sha256"]["ema.safetensors"]
    memorised = metrics["scores"]["memorised"]["value"]
    assert memorised < 0.15  # near copies of training images; whatever it is, the card says it, and the warning
    assert f"| memorised | {memorised:.4g} |" in card
    assert all(warning in card for warning in metrics["warnings"])


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pretrained_pair_has_equal_cost_and_training_examples(pair):
    from dit_in_dit.inspection import cost

    a, b = (read_config(MODELS / name) for name in pair)
    assert (a.train.init is None) == (b.train.init is None)  # each starts from its own first run, or neither
    b = replace(b, train=replace(b.train, lr_scale=a.train.lr_scale, init=a.train.init))  # plain: no inner weights
    assert cost.macs(a.model)["total"] == pytest.approx(cost.macs(b.model)["total"], rel=0.02)
    assert a.model.blocks("inner")
    assert not b.model.blocks("inner")
    assert (a.data, a.train, a.diffusion, a.sample, a.seed) == (b.data, b.train, b.diffusion, b.sample, b.seed)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pretrained_pair_is_compared_in_one_table(capsys, pair):
    main(["compare", *pair])
    table = capsys.readouterr().out
    assert re.search(rf"{pair[0]}@\d+ +{pair[1]}@\d+", table)
    assert "swd.32" in table


def test_the_larger_pair_draws_classes_by_their_group(tmp_path):
    words = ["--num", "2", "--steps", "4", "--classes", "animal-mammal,food-fruit", "--device", "cpu"]
    main(["sample", "emoji-64", *words, "--out", str(tmp_path / "out")])
    names = json.loads((tmp_path / "out/samples.json").read_text())
    assert "animal-mammal" in json.dumps(names)
    assert np.asarray(Image.open(tmp_path / "out/000001.png")).shape == (64, 64, 3)


def test_pretrained_models_generate_emoji_on_a_white_background(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no folder of that name lies here
    images = drawn("emoji", tmp_path / "out", "--classes", "face")
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 200
    assert images.std(axis=(1, 2, 3)).min() > 20  # and something on it


# ------------------------------------------------------------------------------------- whole or not there


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    with atomic.file(path) as opened:
        opened.write(b"new")
        assert not path.exists()
    with pytest.raises(TypeError), atomic.file(path) as opened:
        opened.writelines([b"half", None])
    assert path.read_bytes() == b"new"
    atomic.write_atomic(path, "newer")
    atomic.write_atomic(path, "not this", once=True)
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "in" / "folder"
    with pytest.raises(FileExistsError), atomic.folder(out) as beside:
        [(beside / "half").mkdir() for _ in range(2)]
    assert not out.exists()
    out.mkdir()  # an empty one is no obstacle
    with atomic.folder(out) as beside:
        (beside / "file").touch()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(UserError, match="choose another --out"), atomic.folder(out):
        pass
