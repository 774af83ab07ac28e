"""Seconds of a training step, measured in turns so that a busy machine slows all that are compared alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from dit_in_dit.config import ModelConfig, RunConfig, UserError
from dit_in_dit.model import cost
from dit_in_dit.training.example import Examples
from dit_in_dit.training.loop import Trainer, settled

TURN_SECONDS = 0.02  # a turn repeats its step for about so long: a single short one is lost in the clock's noise
WARM_UP = 2  # steps before any is timed: the first makes the optimizer's state and compiles
SHARE = 0.25  # of the speed of large matrix products that a training step reaches, roughly


@dataclass(frozen=True)
class Times:
    """Seconds of a training step, one number for each round."""

    rounds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median."""
        return median(self.rounds)

    def over(self, other: Times) -> float:
        """The median of the ratios to `other`, round by round: what slowed a whole round cancels."""
        return median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


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
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    if any(config.train.compile for config in configs.values()):
        torch.compiler.reset()  # what was compiled before counts against a limit
    try:
        return _take_turns({name: _Steps(config, device) for name, config in configs.items()}, seconds, rounds)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{len(configs)} models at once do not fit into the memory of {device}: lower train.batch_size"
        ) from None
    finally:
        torch.set_num_threads(before)


def _take_turns(subjects: Mapping[str, _Steps], seconds: float, rounds: int) -> dict[str, Times]:
    repeats = {name: max(1, round(TURN_SECONDS / steps.timed(1))) for name, steps in subjects.items()}
    found: dict[str, list[float]] = {name: [] for name in subjects}
    began, order = time.perf_counter(), list(subjects)
    for number in range(1, rounds + 1):
        for name in order:
            found[name].append(subjects[name].timed(repeats[name]))
        order.reverse()
        if (time.perf_counter() - began) * (number + 1) / number > seconds:  # no time for another
            break
    return {name: Times(tuple(times)) for name, times in found.items()}


def estimate(configs: Mapping[str, RunConfig], device: torch.device, *, threads: int | None = None) -> float:
    """Roughly the seconds that warming up and one round of `step_seconds` take, without building the models."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    macs = sum(3 * cost.macs(c.model)["total"] * c.global_batch for c in configs.values())  # backward costs two
    try:
        return (WARM_UP + 2) * macs / (SHARE * product_speed(device))
    finally:
        torch.set_num_threads(before)


def product_speed(device: torch.device) -> float:
    """MACs per second of a product of two square float32 matrices, large enough for the device."""
    size = 512 if device.type == "cpu" else 4096
    a = torch.ones(size, size, device=device)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the device
        times.append(time.perf_counter() - began)
    return float(size**3 / min(times))


class _Noise:
    """A source of white noise, for steps that teach nothing."""

    train_size, held_out_size = None, 0

    def __init__(self, model: ModelConfig) -> None:
        self.skipped: list[str] = []
        self.classes = tuple(map(str, range(model.num_classes)))
        self.labels: NDArray[np.int64] = np.arange(model.num_classes)
        self.shape = model.channels, *model.image_size

    def train(self, index: int) -> tuple[NDArray[np.float32], int]:
        """An image by number, and its label."""
        image = np.random.default_rng(index).standard_normal(self.shape, np.float32)
        return image, index % max(1, len(self.classes))

    held_out = train


class _Steps:
    """A model in training, warmed up."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        config = settled(config, device)
        config = replace(config, train=replace(config.train, evaluate_every=0))
        source = _Noise(config.model)
        self.trainer = Trainer(config, source, device)
        batch = Examples(source, config)[0]
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if alone else time.perf_counter  # not what other processes take of the core
        self.batches = [type(batch)(*(part.to(device) for part in batch))] * config.train.accumulate
        self.timed(WARM_UP)

    def timed(self, count: int) -> float:
        """Seconds of a step, over `count` of them."""
        began = self.clock()
        for _ in range(count):
            self.trainer.update(self.batches)
        if self.trainer.device.type != "cpu":
            torch.accelerator.synchronize(self.trainer.device)
        return (self.clock() - began) / count
