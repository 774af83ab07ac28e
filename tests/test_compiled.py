"""Training and sampling with blocks compiled by kind: same numbers, few graphs, clear failures; CUDA graphs."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SHARDED, inputs, perturbed, small_model, with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import LeftOutWarning, UserError
from dit_in_dit.config.files import config_hash, from_yaml, override, to_yaml
from dit_in_dit.config.run import RunConfig, TrainConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.inspection.hooks import watch_attention, watch_blocks
from dit_in_dit.model import compiled, nested
from dit_in_dit.model.compiled import compile_blocks, is_compiled
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runtime.device import resolve_auto
from dit_in_dit.training import graphs
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.distributed import join_group
from dit_in_dit.training.loop import train
from dit_in_dit.training.trainer import Trainer
from processes import run_together

CPU = torch.device("cpu")


class Counting:
    """A backend of torch.compile that counts the graphs that it gets."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, examples, **how):
        self.graphs += 1
        return aot_eager(module, examples, **how)


@pytest.fixture
def backend(monkeypatch):
    torch._dynamo.reset()
    counting = Counting()
    monkeypatch.setattr(compiled, "BACKEND", counting)
    return counting


def losses(config, *, steps=3, world=None, counting=None):
    """The loss of each step, and the number of graphs after it."""
    source = open_source(config.data, config.model)
    trainer = Trainer(config, source, CPU, world)
    rank, size = (world.rank, world.size) if world else (0, 1)
    examples, found = Examples(source, config, rank, size), []
    for step in range(steps):
        first = step * examples.per_step
        values = trainer.update([examples[first + number] for number in range(examples.per_step)])
        found.append((float(values["loss"]), counting.graphs if counting else 0))
    if trainer.held_out is not None:
        trainer.evaluate()
    return found


def deep(config, **keys):
    """Three inner and five outer blocks: two kinds."""
    return with_train(replace(config, model=small_model("inner*2 outer*4 inner outer", image_size=(8, 8), num_classes=3)), **keys)


@pytest.mark.parametrize(
    "keys",
    [{"recompute": "both", "batch_size": 3}, {"accumulate": 2, "precision": "bfloat16"}, {"batch_size": 1}],
    ids=str,
)
def test_training_compiles_each_kind_of_block_once_and_never_again(run_config, backend, keys):
    config = deep(run_config, **keys)
    found = losses(with_train(config, compile=True), counting=backend)
    assert [graphs for _, graphs in found] == [2, 2, 2]  # inner and outer
    expected = [loss for loss, _ in losses(with_train(config, compile=False))]
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-5 if "precision" not in keys else 1e-3)


def two_processes(config):
    torch._dynamo.reset()
    counting = compiled.BACKEND = Counting()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftOutWarning)
        return losses(config, world=join_group(CPU, 60), counting=counting)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", SHARDED])
def test_two_processes_compile_each_kind_of_block_once(run_config, parallel):
    config = deep(run_config, parallel=parallel)
    found = run_together(2, two_processes, with_train(config, compile=True))
    expected = [loss for loss, _ in losses(with_train(config, compile=False))]
    for each in found:
        assert [graphs for _, graphs in each] == [2, 2, 2]
        assert [loss for loss, _ in each] == pytest.approx(expected, rel=1e-5)
