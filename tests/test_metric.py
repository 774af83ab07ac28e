"""A user's metrics are checked, and are computed, compared and ranked like built-in metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.registration import register
from dit_in_dit.metrics import metric, report
from dit_in_dit.metrics.evaluate import Evaluation, evaluate
from dit_in_dit.metrics.metric import METRICS, Metric, Score
from dit_in_dit.metrics.subject import files_subject, reference
from dit_in_dit.study.plan import StudyConfig
from dit_in_dit.study.results import read_study
from dit_in_dit.study.summary import summarise_study
from dit_in_dit.study.tables import differences, means_table
from studies import plan_of, write_study


def contrast(samples: Any, real: Any) -> float:
    """Standard deviation of the samples minus the standard deviation of the real images."""
    assert samples.shape == real.shape
    assert samples.dtype == real.dtype == np.uint8
    return float(samples.std() - real.std())


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "contrast", Metric("contrast", "Mine", "zero", contrast))


def evaluated(out: Path, seed: int = 0) -> tuple[dict[str, Any], Evaluation]:
    """metrics.json of ten noise images, compared with noise images of twice the contrast."""
    draw = np.random.default_rng(0)
    for name, low, high in (("real", 0, 256), (f"samples{seed}", 64, 192)):
        if not (out / f"{name}.npy").exists():
            np.save(out / f"{name}.npy", draw.integers(low, high, (24 if name == "real" else 10, 8, 8, 3), np.uint8))
    subject = files_subject(out / f"samples{seed}.npy")
    *_, evaluation = evaluate(subject, reference(str(out / "real.npy"), subject, 20), out / f"out{seed}", 10)
    assert isinstance(evaluation, Evaluation)
    return json.loads((out / f"out{seed}/metrics.json").read_text()), evaluation


@pytest.mark.usefixtures("own")
def test_a_metric_of_the_user_is_computed_drawn_and_compared(tmp_path: Path):
    found, evaluation = evaluated(tmp_path)
    evaluated(tmp_path, seed=1)
    score = found["scores"]["contrast"]
    assert score["value"] == pytest.approx(-37, abs=3)
    assert score["low"] is score["high"] is None
    assert 0 < score["floor"] < 5
    assert found["protocol"]["metrics"]["contrast"] == {"images": 10}
    report.draw_evaluation(evaluation, tmp_path)
    labels, scores = report.compare_evaluations([tmp_path / "out0", tmp_path / "out1"])
    assert len(scores["contrast"]) == 2
    report.draw_compared(labels, scores, tmp_path / "compare.png")


def test_a_metric_of_the_user_changes_no_other_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without = evaluated(tmp_path)[0]["scores"]
    monkeypatch.setitem(METRICS, "contrast", Metric("contrast", "Mine", "zero", contrast))
    scores = evaluated(tmp_path)[0]["scores"]
    assert list(scores) == [*without, "contrast"]
    assert without.items() <= scores.items()


def compute_with(monkeypatch: pytest.MonkeyPatch, compute: Any) -> None:
    """Register metric `mine`."""
    monkeypatch.setitem(METRICS, "mine", Metric("mine", "pixels", "higher", compute))


def test_a_score_with_an_interval_is_written_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compute_with(monkeypatch, lambda samples, real: Score(np.float32(1), 0.5, 1.5))
    assert evaluated(tmp_path)[0]["scores"]["mine"] == {"value": 1.0, "low": 0.5, "high": 1.5, "floor": None}


@pytest.mark.parametrize("bad", [None, "a lot", [1.0, 2.0], 10**400, Score("high"), Score(1.0, low=[2])])
def test_a_metric_result_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: Any):
    compute_with(monkeypatch, lambda samples, real: bad)
    with pytest.raises(UserError, match=r"metric mine must return a number or a Score: got .*; fix its compute"):
        evaluated(tmp_path)
    assert not (tmp_path / "out0/metrics.json").exists()


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (float("nan"), "got nan"),
        (np.float32("-inf"), "got -inf"),
        (Score(1.0, 0.5, float("inf")), r"got Score\(.*inf"),
        (Score(1.0, floor=float("nan")), r"got Score\(.*nan"),
    ],
)
def test_a_metric_result_that_is_not_finite_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: Any, named: str
):
    compute_with(monkeypatch, lambda samples, real: bad)
    with pytest.raises(UserError, match=f"metric mine must return finite numbers: {named}.*; fix its compute"):
        evaluated(tmp_path)
    assert not (tmp_path / "out0/metrics.json").exists()


def test_a_floor_that_is_not_finite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compute_with(monkeypatch, lambda samples, real: 1.0 if samples.min() >= 64 else float("nan"))
    with pytest.raises(UserError, match="metric mine must return finite numbers: got nan"):
        evaluated(tmp_path)


def test_an_interval_with_only_one_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compute_with(monkeypatch, lambda samples, real: Score(1.0, low=0.5))
    with pytest.raises(UserError, match="metric mine must return an interval with low <= high, or none: got Score"):
        evaluated(tmp_path)


def test_an_interval_upside_down_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compute_with(monkeypatch, lambda samples, real: Score(1.0, low=2.0, high=0.5))
    with pytest.raises(UserError, match="an interval with low <= high, or none: got Score"):
        evaluated(tmp_path)


def test_a_metric_cannot_change_the_images_of_the_next_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def zero(samples: Any, real: Any) -> float:
        samples[:] = 0
        return 0.0

    compute_with(monkeypatch, zero)
    with pytest.raises(UserError, match="metric mine failed with ValueError: assignment destination is read-only"):
        evaluated(tmp_path)


@pytest.mark.parametrize("error", [ZeroDivisionError("division\nby zero"), UserError("no such file"), SystemExit(3)])
def test_an_exception_in_a_metric_gives_a_one_line_error_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    def fails(samples: Any, real: Any) -> float:
        raise error

    compute_with(monkeypatch, fails)
    with pytest.raises(
        UserError, match=rf"metric mine failed with {type(error).__name__}: .*; fix its compute"
    ) as refusal:
        evaluated(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (3.0, "must be a function of samples and real images: got 3.0; give a function"),
        (lambda samples: 0.0, r"must take two arguments, samples and real images: got \(samples\); change"),
        (lambda samples, real, scale: 0.0, r"must take two arguments, .*: got \(samples, real, scale\)"),
        (lambda *, samples, real: 0.0, r"must take two arguments, .*: got \(\*, samples, real\)"),
    ],
)
def test_a_compute_that_cannot_be_called_is_refused_when_it_is_registered(compute: Any, message: str):
    with pytest.raises(UserError, match=f"metric mine: compute {message}"):
        register("metric", "mine", Metric("mine", "pixels", "higher", compute))
    assert "mine" not in METRICS


@pytest.mark.parametrize("compute", [max, contrast, lambda *images: 0.0, lambda samples, real, scale=1: 0.0])
def test_a_compute_that_takes_two_arguments_is_accepted(compute: Any):
    assert Metric("mine", "pixels", "higher", compute).compute is compute


def test_the_name_of_a_built_in_score_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METRICS, "swd.8", Metric("swd.8", "pixels", "lower", contrast))
    with pytest.raises(UserError, match=r"metric swd\.8 has the name of a built-in score"):
        evaluated(tmp_path)


def test_an_unknown_direction_is_refused():
    with pytest.raises(UserError, match="metric mine: unknown direction 'highest'; did you mean 'higher'"):
        Metric("mine", "pixels", "highest")  # type: ignore[arg-type]


@pytest.mark.usefixtures("own")
def test_a_study_ranks_a_users_metric_by_its_direction(tmp_path: Path):
    study = StudyConfig.from_dict(
        {
            "question": "?",
            "arms": {"a": {}, "b": {}},
            "primary": "contrast",
            "metrics": ["Mine"],
            "budget": {"steps": 40},
        }
    )
    draw = np.random.default_rng(0)
    levels = {"a": -3.0, "b": 1.0}
    out = write_study(tmp_path / "out", plan_of(study), lambda arm, _: {"contrast": levels[arm] + draw.normal(0, 0.01)})
    found = read_study(out)
    assert found.metrics == {"Mine": ["contrast"]}
    assert "'b' is better than 'a': -2, 95% interval" in "\n".join(summarise_study(found))
    assert [table.title for table in (*differences(found), *means_table(found))] == ["Mine: differences", "Mine"]


def test_a_study_of_an_unregistered_metric_lists_it(tmp_path: Path):
    study = StudyConfig(question="?", arms={"a": {}, "b": {}}, primary="contrast", metrics=("pixels",))
    out = write_study(tmp_path / "out", plan_of(study), lambda arm, seed: {"contrast": 1.0 + seed})
    assert "it is listed, not ranked" in "\n".join(summarise_study(read_study(out)))
    assert metric.metric_of("contrast").direction == "listed"
    with pytest.raises(UserError, match="unknown metrics 'Mine'"):
        StudyConfig(question="?", arms={"a": {}}, metrics=("Mine",))
