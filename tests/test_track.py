"""A resumed run stays one tracked run, with scalars, sample grids and curves. JSON lines are always written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.training.loop import train
from dit_in_dit.training.session import Event
from dit_in_dit.training.trackers import TRACKERS, chosen_trackers, log_to
from test_cli import TINY, lines_of

STEPS = 6


def follow(config, run: Path, names, *, resume: bool = False, stop: int = STEPS + 1) -> list[str]:
    """Train and write sample grids as the command does, and stop as if killed after `stop` steps; returns warnings."""
    warnings: list[str] = []
    facts = log_to(train(config, run, resume=resume, device="cpu"), names, run, warnings.append)
    for fact in facts:
        if fact.kind == "samples":
            path = run / "samples" / f"{fact.step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (fact.step, 0, 0)).save(path)
        if fact.kind == "step" and fact.step == stop:
            break
    facts.close()
    return warnings


@pytest.fixture
def config(run_config):
    return with_train(run_config, sample_every=3)


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "a run"


@pytest.fixture
def no_curves(monkeypatch):
    """Plot no curves, because plotting takes seconds and only one test needs the plots."""
    monkeypatch.setattr("dit_in_dit.training.trackers._curves", lambda run: [])


def twice(config, run: Path, names) -> dict[int, float]:
    """Train until a kill after step 5, two steps past the checkpoint; then resume. Returns the losses of the log."""
    assert not follow(config, run, names, stop=5)
    assert not follow(config, run, chosen_trackers(None, run), resume=True)
    lines = [json.loads(line) for line in (run / "log.jsonl").open()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    return losses


def test_tensorboard_holds_the_pictures_and_each_step_once_after_a_resume(config, run):
    losses = twice(config, run, ["tensorboard"])
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(losses)
    assert [event.step for event in events.Scalars("train/loss")] == list(losses)
    assert [event.step for event in events.Scalars("held_out/0.5/high")] == [3, 6]
    assert {"train/learning_rate", "train/images_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("samples")] == [3, 6]
    assert [event.step for event in events.Images("curves/loss")] == [STEPS]
    assert "seed: 3" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads((run / "trackers.json").read_text()) == {"tensorboard": "tensorboard"}


def test_a_custom_tracker_needs_no_package_with_the_same_name(no_curves, config, run, monkeypatch):
    class Mine:
        def __init__(self, run: Path, config: Any, identity: str, step: int) -> None:
            self.identity = identity or "one"
            made.append((identity, step))

        def scalars(self, step: int, values: dict[str, float]) -> None:
            losses.update({step: values["train/loss"]} if "train/loss" in values else {})

        def image(self, *about: Any) -> None:
            pass

        def flush(self) -> None:
            pass

        def close(self) -> None:
            made.append("closed")

    made: list[Any] = []
    losses: dict[int, float] = {}
    monkeypatch.setitem(TRACKERS, "mine", Mine)
    assert chosen_trackers("mine", run) == ["mine"]
    assert twice(config, run, ["mine"]) == pytest.approx(losses)
    assert made == [("", 0), "closed", ("one", 3), "closed"]


# ----------------------------------------------------------- the others, where they are installed


def records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: protocol buffers in the format of LevelDB's log, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for a header: the block's rest is empty
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_wandb_offline_holds_one_run_after_a_resume(no_curves, config, run, monkeypatch):
    pytest.importorskip("wandb", reason="make test-track installs it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    losses = twice(config, run, ["wandb"])
    files, identities, found, pictures = sorted(run.glob("wandb/offline-run-*/*.wandb")), set(), {}, set()
    for path in files:
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                identities.add(record.run.run_id)
            values = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
            if "train/loss" in values:
                found[json.loads(values["_step"])] = json.loads(values["train/loss"])
            pictures |= {json.loads(values["_step"]) for name in values if name.startswith("samples")}
    assert len(files) == 2  # two processes
    assert identities == {json.loads((run / "trackers.json").read_text())["wandb"]}  # of one run
    assert found == pytest.approx(losses)
    assert pictures == {3, 6}
    assert len(list(run.glob("wandb/offline-run-*/files/media/images/samples_*.png"))) >= 2


def test_trackio_holds_one_run_after_a_resume(no_curves, config, run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="make test-track installs it")
    from trackio import sqlite_storage

    losses = twice(config, run, ["trackio"])
    storage = sqlite_storage.SQLiteStorage
    assert storage.get_runs("dit-in-dit") == [json.loads((run / "trackers.json").read_text())["trackio"]]
    logs = storage.get_logs("dit-in-dit", storage.get_runs("dit-in-dit")[0])
    assert {log["step"]: log["train/loss"] for log in logs if "train/loss" in log} == pytest.approx(losses)
    assert [log["step"] for log in logs if "samples" in log] == [3, 6]
    assert len(list((tmp_path / "trackio").rglob("*.png"))) >= 2


def test_mlflow_holds_one_run_after_a_resume(no_curves, config, run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="make test-track installs it")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)  # where it puts pictures
    losses = twice(config, run, ["mlflow"])
    client = mlflow.MlflowClient()
    (only,) = client.search_runs([client.get_experiment_by_name("dit-in-dit").experiment_id])
    assert only.info.run_id == json.loads((run / "trackers.json").read_text())["mlflow"]
    assert only.info.status == "FINISHED"
    assert only.data.params["model.outer.width"] == "32"
    history = client.get_metric_history(only.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == pytest.approx(losses)
    assert [file.path for file in client.list_artifacts(only.info.run_id, "samples")] == [
        "samples/0000003.png", "samples/0000006.png",
    ]  # fmt: skip


# --------------------------------------------------------------- and a stand-in that takes notes


class Notes:
    """A stand-in for wandb or trackio that records its calls."""

    __spec__ = ModuleSpec("stand-in", None)

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    Settings = staticmethod(lambda **options: options)
    Image = staticmethod(lambda picture: ("image", picture.getpixel((0, 0))))

    def init(self, **options: Any) -> None:
        self.begun.append(options)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_keeps_its_run_id_at_the_tracker(no_curves, config, run, monkeypatch, name):
    notes = Notes()
    monkeypatch.setitem(sys.modules, name, notes)
    losses = twice(config, run, [name])
    assert len(notes.begun) == notes.finished == 2
    key = "id" if name == "wandb" else "name"
    assert notes.begun[0][key] == notes.begun[1][key] == json.loads((run / "trackers.json").read_text())[name]
    assert notes.begun[0]["resume"] == "allow"
    assert notes.begun[0]["config"]["train"]["steps"] == STEPS
    assert {step: values["train/loss"] for step, values in notes.logged if "train/loss" in values} == losses
    assert [(s, v["samples"]) for s, v in notes.logged if "samples" in v] == [
        (3, ("image", (3, 0, 0))), (6, ("image", (6, 0, 0))),
    ]  # fmt: skip


def test_a_failing_tracker_is_dropped_with_one_warning(no_curves, config, run, monkeypatch):
    notes = Notes()
    notes.log = lambda values, step: (_ for _ in ()).throw(ConnectionError("the network\nis down"))
    monkeypatch.setitem(sys.modules, "wandb", notes)
    warnings = follow(config, run, ["wandb", "tensorboard"])
    assert warnings == ["wandb failed and is dropped: ConnectionError: the network is down"]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert len(events.Scalars("train/loss")) == STEPS


def test_a_tracker_that_cannot_start_gives_a_one_line_error(config, run, monkeypatch):
    notes = Notes()
    notes.init = lambda **options: (_ for _ in ()).throw(PermissionError("no key"))
    monkeypatch.setitem(sys.modules, "wandb", notes)
    with pytest.raises(UserError, match="--track wandb failed: PermissionError: no key"):
        follow(config, run, ["wandb"])


def test_trackers_leave_the_events_of_a_run_unchanged(no_curves, config, tmp_path):
    def facts(run: Path, names: list[str]) -> Iterator[tuple[str, int]]:
        for fact in log_to(train(config, run, device="cpu"), names, run, print):
            assert isinstance(fact, Event)
            yield fact.kind, fact.step

    assert list(facts(tmp_path / "a", ["tensorboard"])) == list(facts(tmp_path / "b", []))
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in "ab"]
    assert logs[0] == logs[1]


def test_the_track_option_is_remembered_on_resume(no_curves, folder, run, capsys, monkeypatch):
    words = ["train", *TINY, "--set", f"data.source={folder}", "--out", str(run), "--device", "cpu"]
    assert "did you mean 'tensorboard'" in lines_of([*words, "--track", "tensorbord"], capsys)
    with monkeypatch.context() as patch:
        patch.setattr("dit_in_dit.training.trackers.find_spec", lambda name: None)
        assert "pip install wandb" in lines_of([*words, "--track", "wandb"], capsys)
    assert not run.exists()
    main([*words, "--track", "tensorboard"])
    main(["train", "--resume", "--out", str(run)])
    assert chosen_trackers(None, run) == ["tensorboard"]
    assert chosen_trackers("none", run) == []
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert len(events.Scalars("train/loss")) == 4
    assert [event.step for event in events.Images("samples")] == [4]
    assert len(list((run / "tensorboard").iterdir())) == 2


def test_the_help_names_every_tracker(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in TRACKERS)
