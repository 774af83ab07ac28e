"""A metric of the user's own: computed, compared and ranked as the built-in ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_in_dit.config.errors import UserError
from dit_in_dit.metrics import metric, report
from dit_in_dit.metrics.evaluate import Evaluation, evaluate
from dit_in_dit.metrics.metric import METRICS, Metric, Score
from dit_in_dit.metrics.subject import files_subject, reference
from dit_in_dit.study.plan import StudyConfig
from dit_in_dit.study.results import read_study
from dit_in_dit.study.summary import summarise_study
from dit_in_dit.study.tables import differences, means
from studies import plan_of, write_study


def contrast(samples: Any, real: Any) -> float:
    """How far the samples' deviation is from that of the real images, signed."""
    assert samples.shape == real.shape
    assert samples.dtype == real.dtype == np.uint8
    return float(samples.std() - real.std())


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "contrast", Metric("contrast", "Mine", "zero", contrast))


def evaluated(out: Path, seed: int = 0) -> tuple[dict[str, Any], Evaluation]:
    """metrics.json of ten images of noise against others of twice the contrast."""
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
    labels, scores = report.compare([tmp_path / "out0", tmp_path / "out1"])
    assert len(scores["contrast"]) == 2
    report.draw_compared(labels, scores, tmp_path / "compare.png")


def test_other_scores_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without = evaluated(tmp_path)[0]["scores"]
    monkeypatch.setitem(METRICS, "contrast", Metric("contrast", "Mine", "zero", contrast))
    scores = evaluated(tmp_path)[0]["scores"]
    assert list(scores) == [*without, "contrast"]
    assert without.items() <= scores.items()


def test_a_score_with_an_interval_stands_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = Score(1.0, 0.5, 1.5)
    monkeypatch.setitem(METRICS, "mine", Metric("mine", "pixels", "higher", lambda samples, real: given))
    found = evaluated(tmp_path)[0]["scores"]["mine"]
    assert found == {"value": 1.0, "low": 0.5, "high": 1.5, "floor": None}


@pytest.mark.parametrize("bad", [None, "a lot", [1.0, 2.0]])
def test_anything_but_a_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: Any):
    monkeypatch.setitem(METRICS, "mine", Metric("mine", "pixels", "higher", lambda samples, real: bad))
    with pytest.raises(UserError, match="metric mine must give a number or a Score: got"):
        evaluated(tmp_path)


def test_a_name_that_a_built_in_score_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METRICS, "swd.8", Metric("swd.8", "pixels", "lower", contrast))
    with pytest.raises(UserError, match=r"metric swd\.8 has the name of a built-in score"):
        evaluated(tmp_path)


def test_an_unknown_direction_is_refused():
    with pytest.raises(UserError, match="metric mine: unknown direction 'highest'; did you mean 'higher'"):
        Metric("mine", "pixels", "highest")  # type: ignore[arg-type]


@pytest.mark.usefixtures("own")
def test_a_study_ranks_it_by_its_own_direction(tmp_path: Path):
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
    assert [table.title for table in (*differences(found), *means(found))] == ["Mine: differences", "Mine"]


def test_a_study_of_an_unregistered_metric_lists_it(tmp_path: Path):
    study = StudyConfig(question="?", arms={"a": {}, "b": {}}, primary="contrast", metrics=("pixels",))
    out = write_study(tmp_path / "out", plan_of(study), lambda arm, seed: {"contrast": 1.0 + seed})
    assert "it is listed, not ranked" in "\n".join(summarise_study(read_study(out)))
    assert metric.metric_of("contrast").direction == "listed"
    with pytest.raises(UserError, match="unknown metrics 'Mine'"):
        StudyConfig(question="?", arms={"a": {}}, metrics=("Mine",))
