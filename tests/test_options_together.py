"""A run with every option of docs/recipes.md on at once ends with the bits of a run that was never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compiling import NoHostWait, losses, recorded
from conftest import only_full
from dit_in_dit.config import presets
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.model import nested
from dit_in_dit.runs import checkpoint
from dit_in_dit.training import graphs
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.trainer import Trainer
from processes import run_together, trained

EVERY = (
    *("data.source=emoji:styles", "model.num_classes=99"),
    *("model.patch_size=2", "model.outer.width=32", "model.stages=outer*6 inner*1"),  # 256 patches
    *("train.token_drop=0.5", "train.token_drop_blocks=[1,4]", "train.optimizer=muon", "train.beta2=0.95"),
    *("train.ema=[0.99,0.9]", "train.ema_lengths=[0.05,0.1]", "train.ema_snapshot_every=2", "train.save=async"),
    *("train.terms.internal=0.1", "train.terms.sra=0.1", "train.dropout=0.1", "train.recompute=selective"),
    *("data.balance=class", "data.augment=0.3", "diffusion.time_shift=1.3", "train.precision=bfloat16"),
    *("train.batch_size=2", "train.accumulate=2", "train.steps=4", "train.warmup=2", "train.checkpoint_every=2"),
    *("train.sample_every=0", "train.evaluate_every=0", "train.compile=false"),
)


def config(*keys: str) -> RunConfig:
    return override(presets.get("emoji"), [*EVERY, *keys])


def bits(run: Path) -> tuple[bytes, dict[str, bytes]]:
    """The log, and the files of weights of the newest checkpoint and of all snapshots."""
    folders = (checkpoint.newest(run).folder, run / "averages")
    files = {str(path.relative_to(run)): path.read_bytes() for of in folders for path in of.rglob("*.safetensors")}
    return (run / "log.jsonl").read_bytes(), files


def test_a_stopped_run_with_every_option_ends_with_the_same_bits(tmp_path):
    run = config()
    trained(run, tmp_path / "whole", False)
    trained(run, tmp_path / "stopped", False, 1)
    trained(run, tmp_path / "stopped", True)
    log, files = bits(tmp_path / "whole")
    assert all(name in log for name in (b"loss.internal", b"loss.sra"))
    assert len(files) == 4  # state, first average, two snapshots
    assert bits(tmp_path / "stopped") == (log, files)


@pytest.mark.parametrize("precision", ["float32", only_full("bfloat16")])
def test_every_option_compiles_once_and_trains_as_without_compilation(backend, precision):
    run = config("train.recompute=none", f"train.precision={precision}")
    found = losses(override(run, ["train.compile=true"]), steps=3, counting=backend)
    assert len({graphs for _, graphs in found}) == 1
    assert found[0][1] > 0
    expected = [loss for loss, _ in losses(run, steps=3)]
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-5 if precision == "float32" else 1e-2)


@pytest.mark.full
def test_replayed_steps_with_every_option_train_as_compiled_ones(backend, monkeypatch):
    monkeypatch.setattr(graphs, "capture", recorded)
    run = config("train.recompute=none", "train.precision=float32")
    replayed = losses(override(run, ["train.compile=graphs"]), steps=3)
    assert replayed == losses(override(run, ["train.compile=true"]), steps=3)


def test_no_step_with_every_option_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(nested, "_check_inputs", lambda *inputs: None)  # not read on a GPU
    run = config()
    source = open_source(run.data, run.model)
    trainer, examples = Trainer(run, source, torch.device("cpu")), Examples(source, run)
    with NoHostWait():
        for step in range(2):
            first = step * examples.per_step
            trainer.update([examples[first + number] for number in range(examples.per_step)])


@pytest.mark.slow
def test_with_every_option_1_2_1_processes_give_the_same_bits(tmp_path):
    torch.set_num_threads(1)
    run = config("train.reduction=fixed", "train.precision=float32")
    trained(run, tmp_path / "whole", False)
    trained(run, tmp_path / "moved", False, 1)
    run_together(2, trained, run, tmp_path / "moved", True, 3)
    trained(run, tmp_path / "moved", True)
    assert bits(tmp_path / "moved") == bits(tmp_path / "whole")
