"""Seconds and bytes, measured alternately, so that other load on the machine slows all compared models equally."""

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
from dit_in_dit.runtime.device import resolve_auto
from dit_in_dit.runtime.threads import use_threads
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.trainer import Trainer

TURN_SECONDS = 0.02  # a turn repeats its work for about this long, far above the clock's resolution
WARM_UP = 2  # untimed calls: the first creates the optimizer's state and compiles
SHARE = 0.25  # rough speed of a training step, as a share of the speed of large matrix products
SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # sides of the matrix products that are tried

V = TypeVar("V")


@dataclass(frozen=True)
class Times:
    """Seconds of the same work, one number for each round."""

    rounds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median of the measured seconds."""
        return median(self.rounds)

    def over(self, other: Times) -> float:
        """The median over rounds of the ratio to `other`. A slow-down of a whole round cancels in the ratio."""
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
    """Time a training step (all its micro-batches, optimizer and average) of each config on white noise. With
    train.token_drop_steps it is a step of the first phase, in which patches bypass blocks.

    Each round times every config once; every other round runs in reverse order. All models are in memory together. On
    one CPU thread, seconds are the thread's CPU time, which other processes do not affect.

    Args:
        threads: CPU threads while measuring; None: unchanged.
        seconds: time limit for the rounds, of which at least one runs. Building and warming up do not count.
        rounds: largest number of rounds.

    Raises:
        UserError: the models do not fit into the device's memory.
    """
    if any(resolve_auto(config, device).train.compile for config in configs.values()):
        torch.compiler.reset()  # earlier compilations count towards a limit
    with use_threads(threads), check_memory(configs, device):
        steps = {name: trainer_step(config, device) for name, config in configs.items()}
        return time_alternately(steps, device, seconds, rounds, least=1)


@contextmanager
def check_memory(subjects: Iterable[object], device: torch.device) -> Iterator[None]:
    """Within a `with` block, running out of the device's memory raises a UserError with the number of subjects."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"{len(list(subjects))} models at once do not fit into the memory of {device}: lower train.batch_size"
        ) from None


def interleave(
    turns: Mapping[str, Callable[[], V]], seconds: float, rounds: int = 200, least: int = 3
) -> dict[str, list[V]]:
    """Call every function of `turns` once in each round; returns each function's results by round.

    Every other round runs in reverse order. There are `least` to `rounds` rounds, within `seconds` if possible.
    """
    results: dict[str, list[V]] = {name: [] for name in turns}
    began, order = time.perf_counter(), list(turns)
    for number in range(1, rounds + 1):
        for name in order:
            results[name].append(turns[name]())
        order.reverse()
        if number >= least and (time.perf_counter() - began) * (number + 1) / number > seconds:  # no time for another
            break
    return results


def stopwatch(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Warm up `work`; returns a function that measures the mean seconds of a call over about `TURN_SECONDS`."""
    now = clock(device)

    def timed(count: int) -> float:
        synchronize(device)
        began = now()
        for _ in range(count):
            work()
        synchronize(device)
        return (now() - began) / count

    timed(WARM_UP)
    repeats = max(1, round(TURN_SECONDS / max(timed(1), 1e-9)))
    return lambda: timed(repeats)


def time_alternately(
    work: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, rounds: int = 200, least: int = 3
) -> dict[str, Times]:
    """Seconds of each work in each round of `interleave`."""
    turns = {name: stopwatch(each, device) for name, each in work.items()}
    return {name: Times(tuple(times)) for name, times in interleave(turns, seconds, rounds, least).items()}


def clock(device: torch.device) -> Callable[[], float]:
    """The clock for work on the device: CPU time on one CPU thread, otherwise wall time."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def estimate_seconds(configs: Mapping[str, RunConfig], device: torch.device, *, threads: int | None = None) -> float:
    """Estimate how many seconds the warm-up and one round of `step_seconds` take, without building the models."""
    macs = sum(cost.training_macs(c.model, c.token_drop)["total"] * c.global_batch for c in configs.values())
    with use_threads(threads):
        return (WARM_UP + 2) * macs / (SHARE * product_speed(device))


def product_speed(device: torch.device) -> float:
    """MACs per second of a product of square float32 matrices that are large enough to load the device."""
    return _product(512 if device.type == "cpu" else 4096, torch.float32, device)


def best_product(device: torch.device, dtype: torch.dtype) -> float:
    """MACs per second of the fastest square matrix product of `SIZES`."""
    return max(_product(size, dtype, device) for size in SIZES.get(device.type, SIZES["cpu"]))


def _product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    draw = torch.Generator(device).manual_seed(0)  # measuring must leave the global generator unchanged
    a = torch.randn(size, size, dtype=dtype, device=device, generator=draw)
    times, now = [], clock(device)
    for _ in range(5):
        synchronize(device)
        began = now()
        torch.mm(a, a)
        synchronize(device)
        times.append(now() - began)
    return float(size**3 / min(times))


def kept_bytes(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps after `forward` for the backward pass, not counting the tensors of `own`."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in own}
    before = len(storages)

    def keep(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # without this reference, the graph would be freed
    kept = sum(storage.nbytes() for storage in list(storages.values())[before:])
    del result
    return kept


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes of a CUDA device during `work`; None on other devices."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device)


class _Noise(Source):
    """A source of white noise, for timing."""

    train_size = None

    def __init__(self, model: ModelConfig) -> None:
        self.classes = tuple(map(str, range(model.num_classes)))
        self.shape = model.image_shape

    def train(self, index: int) -> tuple[NDArray[np.float32], int]:
        """The image with this number, and its label."""
        image = np.random.default_rng(index).standard_normal(self.shape, np.float32)
        return image, index % max(1, len(self.classes))


def trainer_step(config: RunConfig, device: torch.device) -> Callable[[], object]:
    """A function that takes a training step of the config, always on the same batch; with train.token_drop_steps, a
    step of the first phase."""
    config = resolve_auto(config, device)
    # The number of timed steps depends on the machine: it must not end the first phase.
    config = replace(config, train=replace(config.train, evaluate_every=0, token_drop_steps=None))
    source = _Noise(config.model)
    trainer = Trainer(config, source, device)
    batch = Examples(source, config)[0]
    batches = [type(batch)(*(part.to(device) for part in batch))] * config.train.accumulate
    return lambda: trainer.update(batches)
