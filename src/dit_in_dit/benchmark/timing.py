"""Seconds and bytes, measured in turns so that a busy machine slows all that are compared alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import ModelConfig, RunConfig
from dit_in_dit.data.source import Source
from dit_in_dit.inspection import cost
from dit_in_dit.runtime.device import resolve_precision
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.trainer import Trainer

TURN_SECONDS = 0.02  # a turn repeats its work for about so long: a single short one is lost in the clock's noise
WARM_UP = 2  # calls before any is timed: the first makes the optimizer's state and compiles
SHARE = 0.25  # of the speed of large matrix products that a training step reaches, roughly
SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # sides of the products whose best is the device's speed

V = TypeVar("V")


@dataclass(frozen=True)
class Times:
    """Seconds of the same work, one number for each round."""

    rounds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median."""
        return median(self.rounds)

    def over(self, other: Times) -> float:
        """The median of the ratios to `other`, round by round: what slowed a whole round cancels."""
        return median(self.ratios(other))

    def ratios(self, other: Times) -> tuple[float, ...]:
        """The ratio to `other` in each round."""
        return tuple(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def step_seconds(
    configs: Mapping[str, RunConfig],
    device: torch.device,
    *,
    threads: int | None = None,
    seconds: float = 5.0,
    rounds: int = 200,
) -> dict[str, Times]:
    """Time a training step (all its micro-batches, optimizer and average) of each config on white noise.

    Each round gives every config a turn, in opposite order every other round. All models are held at once. On one CPU
    thread these are seconds of that thread, so that other processes do not count.

    Args:
        threads: CPU threads while measuring; None: as they are.
        seconds: rounds end when so much time has passed, after at least one; building and warming up not counted.
        rounds: most rounds.

    Raises:
        UserError: the models do not fit into the device's memory.
    """
    if any(config.train.compile for config in configs.values()):
        torch.compiler.reset()  # what was compiled before counts against a limit
    with on_threads(threads), enough_memory(configs, device):
        turns = {name: stopwatch(trainer_step(config, device), device) for name, config in configs.items()}
        return {name: Times(tuple(found)) for name, found in in_turns(turns, seconds, rounds, least=1).items()}


@contextmanager
def on_threads(threads: int | None) -> Iterator[None]:
    """So many CPU threads inside; None: as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def enough_memory(subjects: Iterable[object], device: torch.device) -> Iterator[None]:
    """UserError where the subjects do not fit into the device's memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"{len(list(subjects))} models at once do not fit into the memory of {device}: lower train.batch_size"
        ) from None


def in_turns(
    turns: Mapping[str, Callable[[], V]], seconds: float, rounds: int = 200, least: int = 3
) -> dict[str, list[V]]:
    """What each turn gives, round by round; in opposite order every other round.

    Args:
        seconds: rounds end when so much time has passed.
        rounds, least: most and fewest rounds.
    """
    found: dict[str, list[V]] = {name: [] for name in turns}
    began, order = time.perf_counter(), list(turns)
    for number in range(1, rounds + 1):
        for name in order:
            found[name].append(turns[name]())
        order.reverse()
        if number >= least and (time.perf_counter() - began) * (number + 1) / number > seconds:  # no time for another
            break
    return found


def stopwatch(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """A function that gives the seconds of one call of `work`, which is warmed up and repeated until a turn is long."""
    now = clock(device)

    def timed(count: int) -> float:
        wait(device)
        began = now()
        for _ in range(count):
            work()
        wait(device)
        return (now() - began) / count

    timed(WARM_UP)
    repeats = max(1, round(TURN_SECONDS / max(timed(1), 1e-9)))
    return lambda: timed(repeats)


def clock(device: torch.device) -> Callable[[], float]:
    """The clock for work on the device; on one CPU thread that thread's, so that other processes do not count."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def estimate_seconds(configs: Mapping[str, RunConfig], device: torch.device, *, threads: int | None = None) -> float:
    """Roughly the seconds that warming up and one round of `step_seconds` take, without building the models."""
    macs = sum(cost.training_macs(c.model)["total"] * c.global_batch for c in configs.values())
    with on_threads(threads):
        return (WARM_UP + 2) * macs / (SHARE * product_speed(device))


def product_speed(device: torch.device) -> float:
    """MACs per second of a product of two square float32 matrices, large enough for the device."""
    return _product(512 if device.type == "cpu" else 4096, torch.float32, device)


def best_product(device: torch.device, dtype: torch.dtype) -> float:
    """MACs per second of the fastest of some square matrix products."""
    return max(_product(size, dtype, device) for size in SIZES.get(device.type, SIZES["cpu"]))


def _product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    draw = torch.Generator(device).manual_seed(0)  # its own: measuring must not draw from the global one
    a = torch.randn(size, size, dtype=dtype, device=device, generator=draw)
    times, now = [], clock(device)
    for _ in range(5):
        wait(device)
        began = now()
        torch.mm(a, a)
        wait(device)
        times.append(now() - began)
    return float(size**3 / min(times))


def kept_bytes(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass after `forward`, less the tensors that are there anyway."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in own}
    before = len(storages)

    def keep(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # held, or what it keeps would be freed
    found = sum(storage.nbytes() for storage in list(storages.values())[before:])
    del result
    return found


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Most memory of a CUDA device in use during `work`; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    wait(device)
    return torch.cuda.max_memory_allocated(device)


class _Noise(Source):
    """A source of white noise, for steps that teach nothing."""

    train_size = None

    def __init__(self, model: ModelConfig) -> None:
        self.classes = tuple(map(str, range(model.num_classes)))
        self.shape = model.image_shape

    def train(self, index: int) -> tuple[NDArray[np.float32], int]:
        """An image by number, and its label."""
        image = np.random.default_rng(index).standard_normal(self.shape, np.float32)
        return image, index % max(1, len(self.classes))


def trainer_step(config: RunConfig, device: torch.device) -> Callable[[], object]:
    """A training step of the config, on the same batch each time."""
    config = resolve_precision(config, device)
    config = replace(config, train=replace(config.train, evaluate_every=0))
    source = _Noise(config.model)
    trainer = Trainer(config, source, device)
    batch = Examples(source, config)[0]
    batches = [type(batch)(*(part.to(device) for part in batch))] * config.train.accumulate
    return lambda: trainer.update(batches)
