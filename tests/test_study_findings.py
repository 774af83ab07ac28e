"""A study detects planted differences with the right sign, and detects no other differences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit_in_dit.config import presets
from dit_in_dit.config.files import replace_keys, to_yaml
from dit_in_dit.study.plan import StudyConfig
from dit_in_dit.study.planning import open_plan, plan_study
from dit_in_dit.study.queue import Queue
from dit_in_dit.study.results import StudyResults, read_study
from dit_in_dit.study.summary import summarise_study
from dit_in_dit.study.worker import run_trials
from dit_in_dit.training.batches import Batch, Examples, Packed

CPU = torch.device("cpu")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MARK = 1e-9  # a weight decay that changes nothing, by which the planted arm is known


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no step times, because these studies do not need step times."""
    monkeypatch.setattr("dit_in_dit.study.arms._times", lambda *_: {})


@pytest.fixture
def base(tmp_path: Path) -> str:
    """The emoji at half resolution, so that a run takes seconds."""
    config = replace_keys(
        presets.get("emoji"),
        {
            "model.image_size": 16,
            "model.outer": {"width": 64, "num_heads": 2},
            "model.inner.width": 16,
            "model.stages": "outer*2 inner",
            "train.batch_size": 16,
        },
    )
    (tmp_path / "base.yaml").write_text(to_yaml(config))
    return str(tmp_path / "base.yaml")


def steps(count: int) -> dict:
    """Config keys for a number of steps, with a held-out evaluation and a checkpoint only at the end."""
    return {"train.steps": count, "train.evaluate_every": 1000, "train.checkpoint_every": 1000, "sample.steps": 4}


def ran(base: str, out: Path, arms: dict, **keys) -> StudyResults:
    """Run the study with three seeds; returns its results."""
    study = StudyConfig.from_dict({"base": base, "arms": arms, "match": "none", "samples": 16, **keys})
    out.mkdir()
    plan = open_plan(out, lambda: plan_study("study", study, CPU))
    list(run_trials(plan, out, Queue(plan, out), CPU))
    return read_study(out)


def test_two_arms_with_the_same_config_show_no_difference(base, tmp_path):
    study = ran(base, tmp_path / "aa", {"a": {}, "b": {}}, metrics=["held_out", "pixels"], set=steps(60))
    assert len(study.done) == 6
    arm = next(arm for arm in study.plan.arms if arm.name == "b")
    assert study.ranked
    for metric in study.ranked:
        assert study.values("a", metric) == study.values("b", metric)
        assert not study.difference(arm, metric).marked
    said = " ".join(summarise_study(study))
    assert "better" not in said.replace("lower is better", "")
    assert "worse" not in said


class Swapped(Examples):
    """Every fifth example of the marked arm has another example's image as its target."""

    def packed(self, number: int) -> Packed:
        packed = super().packed(number)
        if self.config.train.weight_decay != MARK:
            return packed
        batch = packed.unpack(self.config.seed, torch.device("cpu"))
        x = batch.x.clone()
        x[::5] = batch.x.roll(1, 0)[::5]
        return packed._replace(x=x, noise=_same_input(batch, x))


def _same_input(batch: Batch, x: torch.Tensor) -> torch.Tensor:
    """The noise with which the other image gives the same x_t = (1 - t) x + t e."""
    t = batch.t[:, None, None, None].clamp(min=0.05)
    return batch.noise + (1 - t) / t * (batch.x - x)


def test_an_arm_with_wrong_targets_is_worse(base, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_in_dit.training.session.Examples", Swapped)
    arms = {"right": {}, "wrong": {"train.weight_decay": MARK}}
    study = ran(base, tmp_path / "planted", arms, metrics=["held_out"], primary="held_out.0.5.whole", set=steps(150))
    arm = next(arm for arm in study.plan.arms if arm.name == "wrong")
    found = study.difference(arm, study.primary)
    assert found.marked
    assert found.mean > 0
    assert any("'wrong' is worse than 'right'" in sentence for sentence in summarise_study(study))


@pytest.mark.full
def test_more_steps_are_better(base, tmp_path):
    arms = {"short": {}, "long": {"train.steps": 200}}
    study = ran(base, tmp_path / "longer", arms, metrics=["held_out"], set=steps(60))
    assert any("'long' is better than 'short'" in sentence for sentence in summarise_study(study))
