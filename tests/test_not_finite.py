"""Non-finite held-out errors, from divergence or data: every reader reports them and continues."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import only_full, small_model, with_train
from dit_in_dit.cli import main
from dit_in_dit.config.files import to_yaml
from dit_in_dit.config.run import DataConfig, RunConfig
from dit_in_dit.curves.arms import arms, notes
from dit_in_dit.curves.convergence import convergence_tables, errors_by_seed, steps_to_reach
from dit_in_dit.curves.logs import read_run
from dit_in_dit.curves.plots import draw_curves
from dit_in_dit.doctor.doctor import draw_report as draw_doctor
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.runs.folder import read_config
from dit_in_dit.study.queue import Queue
from dit_in_dit.study.relative_error import relative
from dit_in_dit.study.report import write_report
from dit_in_dit.study.result import Result, read_result
from dit_in_dit.study.worker import run_trials
from dit_in_dit.training.loop import train
from dit_in_dit.training.trackers import TRACKERS
from dit_in_dit.training.trainer import Trainer
from studies import plan_of, write_study
from test_curves import evaluations, steps, write
from test_study import planned, results, small
from test_track import follow

CPU = torch.device("cpu")
BEFORE = {40: 0.4, 80: 0.3, 120: 0.25, 160: 0.2}
DIVERGED: dict[int, Any] = {**BEFORE, 200: "inf", 240: "nan", 280: "nan"}
HEALTHY = {step: 0.5 / (1 + step / 100) for step in range(40, 281, 40)}


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """Turn NumPy's and matplotlib's warnings about non-finite numbers into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # older libraries warn about each other
        yield


def errors(values: dict[int, Any]) -> list[dict[str, Any]]:
    """Log lines of held-out errors; non-finite errors are written by name."""
    return [{"step": step, "held_out": {"0.5": {"whole": e, "high": e}}} for step, e in values.items()]


def huge(self: Trainer) -> dict[str, dict[str, float]]:
    """Evaluation of a diverged model."""
    return {str(t): {"whole": math.inf, "high": math.nan} for t in (0.2, 0.5, 0.8)}


# ----------------------------------------------------------------------------------------------- curves


def test_a_non_finite_error_gives_a_gap_in_the_curve_and_a_note(tmp_path, capsys):
    bad = write(tmp_path / "bad", steps(280) + errors(DIVERGED))
    good = write(tmp_path / "good", steps(280) + evaluations(HEALTHY), "model.inner.mixer=none")
    curves = [read_run(bad), read_run(good)]
    at, rows = errors_by_seed(arms(curves)[0], 0.5, "whole")
    assert at.tolist() == list(DIVERGED)
    assert np.isfinite(rows[0]).tolist() == [True] * 4 + [False] * 3
    start = f"{bad}: the held-out error is not finite at 3 of 7 evaluations, first at step 200"
    [note] = [note for note in notes(curves) if note.startswith(start)]
    (ends, _), others = (
        convergence_tables(arms(curves))["held_out"][:2],
        convergence_tables(arms(curves))["held_out"][2:],
    )
    assert (ends["step"], ends["mean"], ends["low"], ends["high"]) == (280, None, None, None)
    assert all(row["mean"] > 0 for row in others)
    main(["curves", str(bad), str(good), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert re.search(r"not finite\s+not finite", printed)
    assert f"note: {note}" in printed
    json.loads((tmp_path / "out" / "curves.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("after", ["before", "never finite", "no loss"])
def test_non_finite_runs_are_drawn_with_and_without_finite_steps(after, tmp_path):
    values: dict[int, Any] = {40: "nan", 80: "inf"} if after != "before" else DIVERGED
    logged = [{"step": n, "skipped": True, "why": {"loss": "nan"}} for n in range(1, 281)]
    rows = (steps(280) if after != "no loss" else logged) + errors(values)
    found = arms([read_run(write(tmp_path / "run", rows, *([] if after == "before" else ["seed=3"])))])
    (tmp_path / "out").mkdir()
    assert "held-out.png" in {path.name for path in draw_curves(found, tmp_path / "out")}
    assert len(steps_to_reach(found)) == (1 if after == "before" else 0)
    json.dumps(convergence_tables(found), allow_nan=False)


def test_relative_errors_skip_the_diverged_part(tmp_path):
    bad = read_run(write(tmp_path / "bad", steps(280) + errors(DIVERGED)))
    good = read_run(write(tmp_path / "good", steps(280) + evaluations(HEALTHY)))
    for first, second in ((good, bad), (bad, good)):
        macs, change = relative(first, second, (0.5, "whole"))
        assert macs.tolist() == first.macs(np.array([40.0, 80, 120, 160])).tolist()
        assert (np.abs(change) < 99).all()


# ----------------------------------------------------------------------------------------------- doctor


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A run of twelve steps."""
    config = RunConfig(
        model=small_model("outer*1 inner*1", image_size=(8, 8), num_classes=3),
        data=DataConfig(source=str(folder), held_out=0.2),
    )
    run = tmp_path_factory.mktemp("trained") / "run"
    list(train(with_train(config, steps=12, batch_size=8, precision="float32", checkpoint_every=12), run, device="cpu"))
    return run


@pytest.mark.parametrize("trains", [True, False])
def test_doctor_reports_non_finite_evaluations(trains, trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    if not trains:
        shutil.rmtree(run / "checkpoints")
    log = (run / "log.jsonl").read_text() + json.dumps(errors({12: "inf"})[0]) + "\n"
    (run / "log.jsonl").write_text(log + json.dumps({"step": 13, "skipped": True, "why": {"loss": "nan"}}) + "\n")
    found = examine(read_config(run), CPU, run)
    draw_doctor(found, tmp_path / "doctor.png")
    findings = [f for f in found.findings if f.check == "held-out error"]
    assert len(findings) == 1
    assert findings[0].severity == "fault"
    assert "first at step 12" in findings[0].seen
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(run), "--device", "cpu"])
    assert ended.value.code == 1  # a finding, not a traceback
    assert "held-out error: the held-out error is not finite" in capsys.readouterr().out
    json.loads(found.to_json(), parse_constant=pytest.fail)


def test_doctor_does_not_report_finite_evaluations(trained):
    found = examine(read_config(trained), CPU, trained)
    assert not [f for f in found.findings if f.check == "held-out error"]


@pytest.mark.parametrize("value", [1e20, 3e38, math.inf])
def test_doctor_examines_a_run_with_one_huge_held_out_image(value, trained, tmp_path, monkeypatch):
    from dit_in_dit.data import run_data
    from dit_in_dit.data.sources import open_source

    def opened(*arguments: Any, **options: Any) -> Any:
        source = open_source(*arguments, **options)
        real = source.held_out
        source.held_out = lambda i: (np.full_like(real(i)[0], value), real(i)[1]) if i == 1 else real(i)
        return source

    monkeypatch.setattr(run_data, "open_source", opened)
    found = examine(read_config(trained), CPU, trained)
    assert found.sections
    draw_doctor(found, tmp_path / "doctor.png")


# ------------------------------------------------------------------------------------------------ study


@pytest.fixture
def base(run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config file. Runs of this config diverge if the learning rate is 1e-4."""
    monkeypatch.setattr("dit_in_dit.study.arms._times", lambda *_: {})
    evaluate = Trainer.evaluate

    def diverging(self: Trainer) -> dict[str, dict[str, float]]:
        if self.config.train.learning_rate == 1e-4 and self.step > 4:
            return huge(self)
        return evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", diverging)
    path = tmp_path / "base.yaml"
    path.write_text(to_yaml(with_train(run_config, steps=8, evaluate_every=2)))
    return str(path)


@pytest.mark.parametrize("prune", [only_full(False), True])
def test_a_diverged_trial_is_reported_as_diverged(prune, base, tmp_path):
    out = tmp_path / "study"
    plan = planned(small(base, seeds=[0, 1], prune=prune), out)
    board = Queue(plan, out)
    kinds = [event.kind for event in run_trials(plan, out, board, CPU)]
    assert kinds.count("failed") == 2
    assert board.counts()["failed"] == 2
    found = results(out)["two-s0"]
    assert (found.state, found.step) == ("failed", 8)
    assert found.reason == "diverged: held_out.0.2.high is not finite at step 8"
    written = write_report(out)
    page = (out / "report.md").read_text().replace("\\_", "_")
    assert page.count("diverged: held_out.0.2.high is not finite at step 8") == 2
    assert any("failed" in sentence for sentence in written.summary)
    assert "two,0,failed,8" in (out / "results.csv").read_text()


def test_a_search_continues_after_a_diverged_trial(base, tmp_path):
    out = tmp_path / "search"
    study = small(base, search={"train.learning_rate": [1e-4, 1e-3]}, trials=4)
    plan = planned(study, out)
    list(run_trials(plan, out, Queue(plan, out), CPU))
    states = [result.state for result in results(out).values()]
    assert len(states) == 4
    assert "failed" in states
    written = write_report(out)
    assert any("1 failed" in sentence for sentence in written.summary)


def test_a_non_finite_secondary_metric_is_kept_and_shown(tmp_path):
    from dit_in_dit.study.plan import StudyConfig

    study = StudyConfig(
        base="emoji", arms={"one": {}, "two": {"model.use_inner": False}}, budget={"steps": 20}, seeds=(0, 1)
    )

    def metrics(arm: str, seed: int) -> dict[str, float]:
        bad = arm == "two" and seed == 1
        return {
            "held_out.0.2.high": 0.1 + seed / 100,
            "held_out.0.5.high": math.inf if bad else 0.2,
            "swd.16": math.nan,
        }

    out = write_study(tmp_path / "study", plan_of(study), metrics)
    kept = read_result(out / "runs" / "two-s1")
    assert kept.metrics["held_out.0.5.high"] == math.inf
    assert math.isnan(kept.metrics["swd.16"])
    path = out / "runs" / "two-s1" / "result.json"
    json.loads(path.read_text(), parse_constant=pytest.fail)
    found = write_report(out)
    assert "'two': held_out.0.5.high is not finite in 1 seed." in found.summary
    assert "not finite" in (out / "report.md").read_text()
    assert "held_out.0.5.high,inf," in (out / "results.csv").read_text()


def test_an_older_result_with_nan_still_loads():
    result = Result("one", 0, "done", 8, {"a": math.nan, "b": math.inf, "c": 1.0}, {}, {})
    old = json.dumps({**json.loads(result.to_json()), "metrics": {"a": math.nan, "b": math.inf, "c": 1.0}})
    for text in (result.to_json(), old):
        read = Result.from_json(text).metrics
        assert math.isnan(read["a"])
        assert (read["b"], read["c"]) == (math.inf, 1.0)


def test_a_study_with_diverged_runs_is_reported(tmp_path):
    from dit_in_dit.study.plan import StudyConfig

    arms_ = {"one": {}, "two": {"model.use_inner": False}, "three": {"model.inner.mixer": "none"}}
    study = StudyConfig(base="emoji", arms=arms_, budget={"steps": 40}, seeds=(0, 1))
    out = write_study(tmp_path / "study", plan_of(study), lambda arm, seed: {"held_out.0.2.high": 0.1 + seed / 100})
    for key in ("two-s0", "two-s1", "three-s1"):
        path = out / "runs" / key / "log.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if "held_out" in line and line["step"] > (0 if key == "two-s0" else 20):
                line["held_out"] = {t: dict.fromkeys(kinds, "nan") for t, kinds in line["held_out"].items()}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(out)
    assert "two,0,20,held_out.0.2.high,nan" in (out / "curves.csv").read_text()


# ---------------------------------------------------------------------------------------------- trackers


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_accepts_a_non_finite_error(name, run_config, tmp_path, monkeypatch):
    pytest.importorskip(name)
    for variable in ("TRACKIO_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(variable, str(tmp_path / "there") if "DIR" in variable else f"sqlite:///{tmp_path}/ml.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(Trainer, "evaluate", huge)
    warnings.simplefilter("default")
    assert follow(run_config, tmp_path / "run", [name]) == []


def test_training_continues_and_prints_a_non_finite_error(run_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "evaluate", huge)
    (tmp_path / "config.yaml").write_text(to_yaml(run_config))
    main(["train", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert "held-out error  t=0.2: inf (high nan)" in capsys.readouterr().err
