"""Damaged or wrong JSON files give a one-line error, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import with_train
from dit_in_dit.config.errors import UserError
from dit_in_dit.curves.logs import read_run
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.interop import diffusers_files
from dit_in_dit.interop.card import evaluation_of
from dit_in_dit.metrics import report
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.jsonl import Lines
from dit_in_dit.runs.shards import claim_folder
from dit_in_dit.study.plan import StudyConfig, read_plan
from dit_in_dit.study.result import read_result
from dit_in_dit.study.results import read_search, read_study
from dit_in_dit.training import trackers
from dit_in_dit.training.loop import train
from studies import plan_of, write_study

DEEP = "[" * 100_000
TEXTS = ("", "{", "[]", "3", "null", '"text"', DEEP, '{"a":' * 100_000, "9" * 5000, "\ufeff{}", '{"a": NaN}')
STUDY = StudyConfig(
    base="emoji", arms={"one": {}, "two": {"model.use_inner": False}}, budget={"steps": 20}, seeds=(0, 1)
)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A finished study."""
    return write_study(tmp_path / "study", plan_of(STUDY), lambda arm, seed: {"held_out.0.2.high": 0.1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A run of four steps."""
    from conftest import small_model
    from dit_in_dit.config.run import DataConfig, RunConfig

    config = RunConfig(
        model=small_model("outer*1 inner*1", image_size=(8, 8), num_classes=3),
        data=DataConfig(source=str(folder), held_out=0.2),
    )
    run = tmp_path_factory.mktemp("trained") / "run"
    list(train(with_train(config, steps=4, batch_size=8, precision="float32"), run, device="cpu"))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refused(action: Callable[[], Any]) -> None:
    """Check that the action raises a UserError of one line."""
    with pytest.raises(UserError) as found:
        action()
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 400


def with_value(whole: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A JSON value with one part replaced, or removed if the new value is `...`."""
    copy = json.loads(json.dumps(whole))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


@pytest.mark.parametrize("text", [*TEXTS, b"\xff\xfe{"], ids=lambda text: repr(text)[:12])
def test_a_file_without_a_json_object_gives_a_one_line_error(text, study, run):
    content = text if isinstance(text, bytes) else text.encode()
    result = next(iter(study.glob("runs/*/result.json")))
    places: list[tuple[Path, Callable[[], Any]]] = [
        (result, lambda: read_result(result.parent)),
        (result, lambda: read_study(study)),
        (study / "plan.json", lambda: read_plan(study)),
        (run / "metrics.json", lambda: report.read_evaluation(run / "metrics.json")),
        (run / "identity.json", lambda: claim_folder(run / "identity.json", {"a": 1})),
    ]
    for path, action in places:
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        refused(action)
        if before:
            path.write_bytes(before)


@pytest.mark.parametrize(
    "text", [text for text in TEXTS if text not in ("", '{"a": NaN}')], ids=lambda text: repr(text)[:12]
)
def test_a_log_with_a_line_that_is_no_object_gives_a_one_line_error(text, run):
    for name in ("log.jsonl", "timing.jsonl"):
        path = run / name
        before = path.read_bytes()
        path.write_bytes(before + text.encode() + b"\n")
        refused(lambda: read_run(run))
        refused(lambda path=path: Lines(path, bool))
        if name == "log.jsonl":
            refused(lambda: examine(read_config(run), torch.device("cpu"), run))
        path.write_bytes(before)


def test_a_damaged_trackers_file_gives_a_one_line_error_and_a_damaged_evaluation_is_ignored(run):
    for text in TEXTS[:8]:
        (run / trackers.KEPT).write_text(text)
        refused(lambda: trackers.chosen_trackers(None, run))
        (run / "evaluation" / "0000004").mkdir(parents=True, exist_ok=True)
        (run / "evaluation" / "0000004" / "metrics.json").write_text(text)
        assert evaluation_of(run, "0") == (None, None)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *[((key,), value) for key in ("name", "study", "arms", "made") for value in (..., None, 3, [3], [[]])],
        *[
            (("arms", 0, key), value)
            for key in ("name", "changes", "against", "config", "matched", "cost", "gap")
            for value in (..., None, 3, [])
        ],
        (("arms", 0, "cost", "macs"), "many"),
        (("arms", 0, "cost", "macs"), True),
        (("arms", 0, "gap", "time"), []),
        (("arms", 0, "matched", "model.depth"), 3),
        (("arms", 0, "config", "model"), 3),
        (("arms", 1, "against"), "nobody"),
        (("arms", 1, "name"), "one"),
        (("arms", 0, "against"), "two"),
        (("study", "seeds"), "all"),
        (("study", "arms"), 3),
    ],
)
def test_a_plan_with_a_wrong_part_gives_a_one_line_error(path, value, study):
    whole = json.loads((study / "plan.json").read_text())
    (study / "plan.json").write_text(json.dumps(with_value(whole, path, value)))
    refused(lambda: read_study(study))


@pytest.mark.parametrize("key", ["arm", "seed", "state", "step", "metrics", "floors", "protocol", "reason", "another"])
def test_a_result_with_a_wrong_part_gives_a_one_line_error(key, study):
    path = next(iter(study.glob("runs/*/result.json")))
    whole = json.loads(path.read_text())
    for value in (None, True, [3], {"a": "x"}, {"a": [1]}):
        if key == "protocol" and isinstance(value, dict):
            continue
        path.write_text(json.dumps(with_value(whole, (key,), value)))
        refused(lambda: read_study(study))


@pytest.mark.parametrize("text", [*TEXTS, '{"number": "3", "changes": {}}', '{"number": 3, "changes": []}'])
def test_unreadable_changes_of_a_search_trial_give_a_one_line_error(text, tmp_path):
    search = StudyConfig(base="emoji", search={"train.learning_rate": [1e-3, 1e-4]}, trials=2, budget={"steps": 20})
    out = tmp_path / "search"
    (out / "runs" / "t0000").mkdir(parents=True)
    (out / "plan.json").write_text(plan_of(search).to_json())
    (out / "runs" / "t0000" / "changes.json").write_text(text)
    refused(lambda: read_search(out))


@pytest.mark.parametrize(
    "line",
    [
        {"step": None, "loss": 1.0, "grad_norm": 1.0},
        {"step": 5, "loss": "x", "grad_norm": 1.0},
        {"step": 5, "loss": [1.0], "grad_norm": 1.0},
        {"step": 5, "loss": 1.0, "grad_norm": {}},
        {"loss": 1.0, "grad_norm": 1.0},
    ],
)
def test_a_log_step_with_missing_numbers_gives_a_one_line_error(line, run):
    path = run / "log.jsonl"
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    refused(lambda: read_run(run))
    refused(lambda: examine(read_config(run), torch.device("cpu"), run))
    refused(lambda: list(train(read_config(run), run, resume=True, device="cpu")))


@pytest.mark.parametrize("seconds", ["x", None, [1.0], 1e999])
def test_resuming_with_wrong_times_gives_a_one_line_error(seconds, run):
    path = run / "timing.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 4, "seconds": seconds}) + "\n")
    with pytest.raises(UserError, match=r"timing.jsonl holds a line that no run writes|not a JSON object"):
        list(train(read_config(run), run, resume=True, device="cpu"))


def test_a_wrong_line_of_a_log_is_shown(run):
    path = run / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 99999999999999999999999, "loss": 1}\n')
    with pytest.raises(
        UserError,
        match=r'log.jsonl holds a line that no run writes, \{"step": 9999.*: fix the file, or leave the run out',
    ):
        read_run(run)


@pytest.mark.parametrize(
    "line", [{"step": 4, "held_out": 3}, {"step": None, "held_out": {}}, {"step": 5, "rollback": 3}]
)
def test_a_wrong_evaluation_or_rollback_gives_a_one_line_error(line, run):
    path = run / "log.jsonl"
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    refused(lambda: read_run(run))


@pytest.mark.parametrize("scores", [3, {"a": 3}, {"a": {"value": "x", "low": None, "high": None, "floor": None}}])
def test_wrong_score_types_give_a_one_line_error(scores, tmp_path):
    whole = {"subject": {"name": "run"}, "protocol": {}, "scores": scores}
    (tmp_path / "metrics.json").write_text(json.dumps(whole))
    refused(lambda: report.read_evaluation(tmp_path / "metrics.json"))


@pytest.mark.parametrize("content", [*(text.encode() for text in TEXTS[:9]), b"\xff\xfe{", b'{"a": 1}' + b" " * 100])
def test_a_wrong_or_endless_diffusers_config_gives_a_one_line_error(content, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_in_dit.config.strict_json.MOST_BYTES", 100)
    (tmp_path / "config.json").write_bytes(content)
    refused(lambda: diffusers_files.read_diffusers_json(tmp_path / "config.json"))
