"""Numbers that are not finite: the step is skipped, and weights, average and disk never hold such a number."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import with_train
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig
from dit_in_dit.curves.logs import read_run
from dit_in_dit.data.sources import open_source
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.loop import train
from dit_in_dit.training.trainer import Trainer

BAD = 7  # an image


@pytest.fixture
def config(run_config, tmp_path):
    """Forty grey images; ten steps of four see all of them."""
    return with_images(with_train(run_config, steps=10, checkpoint_every=1, evaluate_every=0), tmp_path)


def with_images(config, folder, bad=3e38):
    images = np.zeros((40, 3, 8, 8), np.float32)
    images[BAD] = bad
    np.savez(folder / "set.npz", images=images, labels=np.zeros(40, int))
    return replace(config, data=DataConfig(source=str(folder / "set.npz"), held_out=0))


def run(config, out, **keys):
    return list(train(config, out, device="cpu", **keys))


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def finite(out) -> bool:
    folder = checkpoint.newest(out).folder
    files = (load_tensors(folder / name) for name in ("state.safetensors", "ema.safetensors"))
    return all(tensor.isfinite().all() for state in files for tensor in state.values())


def reached(config) -> tuple[int, int]:
    """The step (counted from 1) and the example in which the bad image occurs."""
    examples = Examples(open_source(config.data, config.model), config)
    for step in range(10):
        if BAD in examples[step].image:
            return step + 1, step * 4 + examples[step].image.tolist().index(BAD)
    raise AssertionError


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_step_with_a_bad_example_is_skipped_and_the_example_is_named(config, tmp_path, loss, monkeypatch):
    if loss == "inf":  # an image of 3e38 gives NaN; infinity needs a changed loss
        config, plain = with_images(config, tmp_path, 5.0), Objective.loss
        monkeypatch.setattr(Objective, "loss", lambda self, net, x, *more: _infinite(plain(self, net, x, *more), x))
    facts = run(config, tmp_path / "run")
    step, example = reached(config)
    [skipped] = [fact for fact in facts if fact.kind == "skipped"]
    assert skipped.step == step
    assert skipped.values["loss"] == loss
    assert skipped.values["not_finite"] == [example]
    assert skipped.values["images"] == [BAD]
    assert skipped.values["examples"] == [4 * step - 4, 4 * step - 1]
    assert [fact.step for fact in facts if fact.kind == "step"] == [n for n in range(1, 11) if n != step]
    assert finite(tmp_path / "run")
    written = {line["step"]: line for line in lines(tmp_path / "run")}
    assert written[step]["skipped"] is True
    assert written[step]["why"]["images"] == [BAD]
    assert "NaN" not in (tmp_path / "run/log.jsonl").read_text()


def _infinite(each, x):
    return each + torch.where(x.flatten(1).amax(1) > 4, torch.inf, 0.0)  # the gradient is finite


def test_a_skipped_step_leaves_weights_and_moments_as_they_are(config):
    source = open_source(config.data, config.model)
    trainer, examples, (step, _) = (
        Trainer(config, source, torch.device("cpu")),
        Examples(source, config),
        reached(config),
    )
    for number in range(step - 1):
        trainer.update([examples[number]])
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    trainer.update([examples[step - 1]])
    after = trainer.state()
    assert trainer.step == step
    assert all(torch.equal(before[name], after[name]) for name in before)
    trainer.update([examples[step]])
    assert any(not torch.equal(before[name], value) for name, value in trainer.state().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_gradient_skips_the_step(config, bad):
    config = replace(config, data=DataConfig(source="mosaic"), model=replace(config.model, num_classes=9))
    source = open_source(config.data, config.model)
    trainer, examples = Trainer(config, source, torch.device("cpu")), Examples(source, config)
    trainer.update([examples[2]])
    weight = trainer.model.inner_blocks[0].modulation.linear.weight
    handle = weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), bad))
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    values = trainer.update([examples[0]])
    assert values["loss"].isfinite()
    assert not values["grad_norm"].isfinite()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state().items())
    handle.remove()
    trainer.update([examples[1]])
    assert all(tensor.isfinite().all() for tensor in trainer.state().values())


def test_a_resumed_run_skips_the_same_steps(config, tmp_path):
    run(config, tmp_path / "unbroken")
    step, _ = reached(config)
    for until in (step - 1, step, step + 1):
        out = tmp_path / f"stopped{until}"
        run(config, out, until=until)
        run(config, out, resume=True)
        assert (out / "log.jsonl").read_bytes() == (tmp_path / "unbroken/log.jsonl").read_bytes()
        assert checkpoint.newest(out).manifest["sha256"] == checkpoint.newest(tmp_path / "unbroken").manifest["sha256"]


@pytest.fixture
def diverging(config, monkeypatch):
    """A run whose gradient is not finite in steps that see examples 12 to 31: after three such steps, the run rolls
    back.
    """
    config = with_train(config, steps=9, skip_most=2, on_divergence="roll_back", checkpoint_every=2)
    config = replace(config, data=DataConfig(source="mosaic"), model=replace(config.model, num_classes=9))
    plain = Examples.packed

    def poisoned(self, number):
        batch = plain(self, number)
        hit = torch.tensor([12 <= index < 32 for index in self.indices(number)])
        return batch._replace(x=torch.where(hit[:, None, None, None], torch.nan, batch.x))

    monkeypatch.setattr(Examples, "packed", poisoned)
    return config


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_one_line(diverging, tmp_path):
    config = with_train(diverging, on_divergence="stop")
    with pytest.raises(UserError, match=r"training diverged, 3 steps in a row; lower train\.learning_rate") as error:
        run(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert checkpoint.newest(tmp_path / "run").manifest["step"] == 2
    assert finite(tmp_path / "run")


def test_a_diverged_run_rolls_back_and_skips_the_bad_examples(diverging, tmp_path):
    facts = run(diverging, tmp_path / "run")
    # Steps 4, 5 and 6 are bad; step 4 has no checkpoint for that. Back to step 2, and on with examples 24 and later, of
    # which steps 3 and 4 see bad ones: two, which is not too many.
    assert [(fact.step, fact.values["to"]) for fact in facts if fact.kind == "rolled_back"] == [(6, 2)]
    assert [fact.step for fact in facts if fact.kind == "skipped"] == [4, 5, 6, 3, 4]
    assert facts[-1].kind == "checkpoint"
    assert facts[-1].step == 9
    assert finite(tmp_path / "run")
    curve = read_run(tmp_path / "run")  # what was taken again counts once, as it was taken the second time
    assert curve.step.tolist() == list(range(1, 10))
    assert curve.skipped.tolist() == [step in (3, 4) for step in range(1, 10)]
    assert np.isnan(curve.loss).tolist() == curve.skipped.tolist()
    [back] = [line for line in lines(tmp_path / "run") if "rollback" in line]
    assert back == {"step": 6, "rollback": {"to": 2, "shift": 4}}


def test_a_stopped_run_that_rolled_back_ends_like_an_uninterrupted_run(diverging, tmp_path):
    run(diverging, tmp_path / "unbroken")
    for until in (4, 5, 6, 7):
        out = tmp_path / f"stopped{until}"
        run(diverging, out, until=until)
        run(diverging, out, resume=True)
        assert (out / "log.jsonl").read_bytes() == (tmp_path / "unbroken/log.jsonl").read_bytes(), until
        assert checkpoint.newest(out).manifest["sha256"] == checkpoint.newest(tmp_path / "unbroken").manifest["sha256"]
    for killed in range(3, 12):  # facts that a killed process saw
        out = tmp_path / f"killed{killed}"
        facts = train(diverging, out, device="cpu")
        for _ in range(killed):
            next(facts)
        facts.close()
        run(diverging, out, resume=True)
        assert (out / "log.jsonl").read_bytes() == (tmp_path / "unbroken/log.jsonl").read_bytes(), killed


def test_a_run_that_diverges_repeatedly_stops(diverging, tmp_path, monkeypatch):
    monkeypatch.setattr(Examples, "packed", _all_bad(Examples.packed))
    with pytest.raises(UserError, match="even after 3 roll-backs"):
        run(diverging, tmp_path / "run")


def _all_bad(plain):
    def poisoned(self, number):
        batch = plain(self, number)
        return batch._replace(x=batch.x.fill_(torch.nan)) if self.indices(number)[0] >= 8 else batch

    return poisoned
