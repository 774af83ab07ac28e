"""Exports are pushed to the Hugging Face Hub and come back from it: a small server on this machine has its API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard

import dit_in_dit
import fake_hub
from conftest import perturbed, small_model
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig, DiffusionConfig, RunConfig, SampleConfig
from dit_in_dit.interop.hub import fetch_repo, is_repo_id, push_folder
from dit_in_dit.interop.import_run import export_diffusers, import_run
from dit_in_dit.interop.pipeline import DiTInDiTPipeline
from dit_in_dit.interop.release import export_release
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.folder import create_run

CLASSES = ["cat", "dog", "fox", "owl", "yak"]
CONFIG = RunConfig(
    model=small_model("outer*1 inner*1"),
    data=DataConfig(source="hf:someone/animals:small@v2"),
    sample=SampleConfig(steps=2),
)


def make_run(folder: Path, config: RunConfig = CONFIG, *, evaluated: bool = True) -> Path:
    """A run with one checkpoint, with an evaluation as `evaluate` writes it."""
    create_run(folder, config)
    torch.manual_seed(0)
    weights = perturbed(NestedDiT(config.model)).state_dict()
    checkpoint.save(folder, config, 1200, {f"model.{k}": v for k, v in weights.items()}, weights, tuple(CLASSES))
    result = {
        "subject": {"checkpoint": Checkpoint.open(folder).sha256()},
        "protocol": {"images": 512, "samples": {"seed": 7}, "reference": {"data": "hf:someone/animals"}},
        "scores": {"swd.16": {"value": 0.125, "low": 0.1, "high": 0.2, "floor": 0.05}, "fid": {"value": None}},
        "warnings": [],
    }
    if evaluated:
        (folder / "evaluation" / "0001200").mkdir(parents=True)
        (folder / "evaluation" / "0001200" / "metrics.json").write_text(json.dumps(result))
    return folder


# One process, as a user starts it, so that the Hub's client reads its address and token from the environment.
COMMANDS = """
import sys
from pathlib import Path
from dit_in_dit.cli import main
from dit_in_dit.interop.hub import fetch_repo

def command(*words):
    print("$", *words, file=sys.stderr, flush=True)
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        assert stop.code == 2

run, place, dit = map(Path, sys.argv[1:])
command("export", run, "--format", "run", "--push", "me/small", "--private", "--precision", "float32")
command("export", run, "--format", "run", "--push", "me/small", "--out", place / "kept", "--precision", "float32")
command("export", run, "--format", "pipeline", "--push", "me/pipe", "--licence", "mit")
command("export", dit, "--format", "diffusers-dit", "--push", "me/dit")
command("import", "me/small", "--out", place / "small")
command("import", "me/dit@main", "--out", place / "dit")
command("import", "me/official", "--out", place / "official", "--num-classes", 5, "--num-heads", 4)
command("sample", "me/small", "-n", 2, "--out", place / "samples", "--device", "cpu")
(place / "fetched").symlink_to(fetch_repo("me/pipe"))
for name in ("someone/gated", "someone/never-made", "me/small@other"):
    command("import", name, "--out", place / "refused")
command("sample", "someone/never-made")
command("export", run, "--format", "run", "--push", "someone else/small")
command("export", run, "--format", "run", "--push", "someone/theirs")
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory):
    """The server after all commands, their folder and their messages by command."""
    place = tmp_path_factory.mktemp("push")
    run = make_run(place / "run")
    plain = replace(
        CONFIG,
        model=small_model("outer*2", image_size=(8, 8)),
        diffusion=DiffusionConfig(path="ddpm", predict="noise"),
        sample=SampleConfig(sampler="ddim", steps=2),
    )
    dit = make_run(place / "plain", plain)
    main(["export", str(dit), "--format", "official", "--out", str(place / "DiT.pt")])
    with fake_hub.hub() as server:
        official = {"README.md": b"# DiT", "DiT.pt": (place / "DiT.pt").read_bytes(), "run.py": b"raise SystemExit"}
        server.repositories["me/official"] = fake_hub.Repository(files=official)
        stale = {"checkpoints/0000100/ema.safetensors": b"older", "notes.md": b"my own"}
        server.repositories["me/small"] = fake_hub.Repository(files=stale, private=True)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "PYTHONPATH": str(Path(dit_in_dit.__file__).parents[1]),
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": fake_hub.TOKEN,
            "HF_HOME": str(place / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, run, place, dit],
            capture_output=True, text=True, env=environment, cwd=place, timeout=200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = {part.partition("\n")[0]: part.partition("\n")[2] for part in done.stderr.split("$ ")[1:]}
    return server, place, errors, done.stdout


def test_a_pushed_run_has_its_files_and_replaces_an_earlier_checkpoint(pushed):
    server, place, _, printed = pushed
    repository = server.repositories["me/small"]
    kept = {str(path.relative_to(place / "kept")) for path in (place / "kept").rglob("*") if path.is_file()}
    assert kept == {"README.md", "config.yaml", *(f"checkpoints/0001200/{name}" for name in
                    ("ema.safetensors", "state.safetensors", "manifest.json"))}  # fmt: skip
    assert repository.files.keys() == kept | {"notes.md"}  # a user's own files stay
    for name in kept:
        assert repository.files[name] == (place / "kept" / name).read_bytes(), name
    assert repository.private
    assert "dit-in-dit sample me/small" in repository.files["README.md"].decode()
    assert f"{place / 'run'} as {server.url}/me/small" in printed


def test_a_pushed_pipeline_has_a_card_that_the_hub_reads(pushed):
    server, *_ = pushed
    repository = server.repositories["me/pipe"]
    assert not repository.private
    assert {"model_index.json", "README.md", "transformer/diffusion_pytorch_model.safetensors"} <= set(repository.files)
    card = ModelCard(repository.files["README.md"].decode())  # raises for a model-index that is none
    assert card.data.datasets == ["someone/animals"]
    assert card.data.metrics == ["swd.16"]
    assert (card.data.license, card.data.model_name) == ("mit", "pipe")
    (result,) = card.data.eval_results
    assert isinstance(result, EvalResult)
    assert (result.metric_type, result.metric_value) == ("swd.16", 0.125)
    assert (result.task_type, result.dataset_name) == ("unconditional-image-generation", "hf-someone/animals")


def test_what_was_pushed_comes_back_with_equal_weights(pushed):
    _, place, *_ = pushed
    own = Checkpoint.open(place / "run").weights()
    assert_equal(Checkpoint.open(place / "small").weights(), own)
    assert not any(path.is_symlink() for path in (place / "small").rglob("*"))  # the cache may be emptied
    pipe = DiTInDiTPipeline.from_pretrained(place / "fetched")
    assert_equal(pipe.transformer.nested.state_dict(), own)
    assert len(list((place / "samples").glob("0*.png"))) == 2
    plain = Checkpoint.open(place / "plain").weights()
    for name in ("dit", "official"):
        assert_equal(Checkpoint.open(place / name).weights(), plain)


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_code_is_downloaded_and_pickles_only_without_safetensors(pushed):
    server, place, *_ = pushed
    downloads = [line for line in server.requests if "/resolve/" in line]
    assert not any(line.endswith(".py") for line in downloads)
    assert {path.suffix for path in (place / "cache").rglob("*.p*")} == {".pt"}
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("import someone/gated --out {place}/refused", "someone/gated: it is gated: ask for access on its page"),
        ("import someone/never-made --out {place}/refused", "no such path, and no repository that you may use"),
        ("sample someone/never-made", "no such path, and no repository that you may use"),
        ("import me/small@other --out {place}/refused", "me/small@other: it has no such revision"),
        ("export {place}/run --format run --push someone else/small", "cannot push someone else/small: "),
        ("export {place}/run --format run --push someone/theirs", "cannot push someone/theirs: "),
    ],
)
def test_errors_of_the_hub_are_one_line(pushed, command, says):
    _, place, errors, _ = pushed
    error = errors[command.format(place=place)]
    assert error.startswith("dit-in-dit: cannot ")
    assert says in error
    assert error.count("\n") == 1


# ------------------------------------------------------------------------------- without a server


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("user/name", True), ("user/name-v1.0@main", True), ("user/name@refs/pr/1", True)),
        *(("name", False), ("a/b/c", False), ("./a", False), ("/a/b", False), ("user/name@", False)),
        *(("models/emoji", False), ("here/folder", False), ("", False), ("a b/c", False), ("a/b\n", False)),
    ],
)
def test_a_name_of_the_hub_is_told_from_a_path(text, expected, tmp_path, monkeypatch):
    (tmp_path / "here" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_repo_id(text) == expected


def test_without_network_token_or_package_an_error_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot fetch someone/model: .* the Hub cannot be reached: check"):
        fetch_repo("someone/model")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="cannot push me/model: no token of the Hub; run `hf auth login`, or set"):
        push_folder(tmp_path, "me/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"is missing: pip install 'dit-in-dit\[hub\]'"):
        fetch_repo("someone/model")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--format", "run"], "name what to write: --out PATH, --push USER/NAME, or both"),
        (["--format", "official", "--push", "me/x"], "leave out --format official"),
        (["--format", "onnx", "--push", "me/x"], "leave out --format onnx"),
    ],
)
def test_options_that_do_not_fit_are_refused(words, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", "emoji", *words])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_the_card_of_a_run_names_its_plugins_and_the_rounding_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("dit_in_dit.config.plugins.loaded_plugins", lambda: [{"name": "my idea.py", "sha256": "0"}])
    run = make_run(tmp_path / "run")
    export_release(run, tmp_path / "given")
    text = (tmp_path / "given" / "README.md").read_text()
    assert "dit-in-dit sample given --classes 0,1 --num 64 --plugin 'my idea.py'\n" in text
    assert "The run needs `my idea.py`, which is not in this folder." in text
    assert "**The results are of the weights before they were rounded to float16.**" in text
    assert ModelCard(text).data.eval_results[0].metric_value == 0.125


@pytest.mark.parametrize("source", ["hf:/home/me/animals", "/home/me/animals", "emoji"])
def test_a_card_names_no_dataset_that_is_not_on_the_hub_and_no_results_without_an_evaluation(source, tmp_path):
    config = replace(CONFIG, data=replace(CONFIG.data, source=source))
    export_release(make_run(tmp_path / "run", config, evaluated=False), tmp_path / "given")
    text = (tmp_path / "given" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert not {"datasets", "metrics", "model-index"} & front.keys()
    assert "/home/me" not in text.split("---")[1]


def test_settings_do_not_change_a_run_of_the_hub(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    shutil.copytree(run, tmp_path / "snapshot")
    monkeypatch.setattr("dit_in_dit.interop.import_run.fetch_repo", lambda name: tmp_path / "snapshot")
    with pytest.raises(UserError, match="is a run already"):
        import_run(Path("me/small"), tmp_path / "out", settings=["sample.steps=3"])
    assert import_run(Path("me/small"), tmp_path / "out") == CONFIG


def test_a_dit_that_is_pushed_as_the_class_of_diffusers_has_no_card_of_ours(pushed):
    server, place, *_ = pushed
    export_diffusers(place / "plain", place / "beside")
    written = {str(path.relative_to(place / "beside")) for path in (place / "beside").rglob("*") if path.is_file()}
    assert server.repositories["me/dit"].files.keys() == written
