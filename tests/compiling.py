"""Shared pieces of tests of compilation: counted graphs, a stand-in for CUDA graphs, host waits, losses."""

from __future__ import annotations

import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from dit_in_dit.data.sources import open_source
from dit_in_dit.training import graphs
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.trainer import Trainer


class Counting:
    """A backend of torch.compile that counts the graphs that it gets."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, examples, **how):
        self.graphs += 1
        return aot_eager(module, examples, **how)


class NoHostWait(TorchDispatchMode):
    """Fails when the host reads a value of a tensor."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.READS:
            raise AssertionError(f"the host waits: {function}")
        return function(*args, **(kwargs or {}))


def recorded(call):
    """`graphs.capture` without CUDA: the replay calls again, on the same tensors."""
    for _ in range(graphs.WARM_UP - 1):
        call()
    result = call().clone()
    return lambda: result.copy_(call()), result


def losses(config, *, steps=3, world=None, counting=None):
    """The loss of each step, and the number of graphs after it."""
    source = open_source(config.data, config.model)
    ours = Trainer(config, source, torch.device("cpu"), world)
    rank, size = (world.rank, world.size) if world else (0, 1)
    examples, found = Examples(source, config, rank, size), []
    for step in range(steps):
        first = step * examples.per_step
        values = ours.update([examples[first + number] for number in range(examples.per_step)])
        found.append((float(values["loss"]), counting.graphs if counting else 0))
    if ours.held_out is not None:
        ours.evaluate()
    return found
