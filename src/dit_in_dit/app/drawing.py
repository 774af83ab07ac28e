"""Draw: samples of one seed by several models, with the whole way from noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_in_dit.api.model import Model
from dit_in_dit.config.errors import UserError, check_whole
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.encode import open_decoder
from dit_in_dit.data.labels import class_numbers
from dit_in_dit.diffusion.samplers import trajectory
from dit_in_dit.inspection.hooks import can_run_without_inner, without_inner
from dit_in_dit.metrics.wasserstein import laplacian_pyramid
from dit_in_dit.reporting.images import Pixels, to_floats, to_pixels
from dit_in_dit.runtime.precision import use_full_float32
from dit_in_dit.sampling.fit import fit_to_device
from dit_in_dit.sampling.numbered import class_of, guided_predict, micro_batch

ALL = "all in turn"  # the entry of the class menu that draws every class
MOST_BYTES = 2**26  # of a way's pictures; steps are left out above it


@dataclass(frozen=True)
class Settings:
    """What to draw: values of the fields, by the names of the command `sample`."""

    classes: str = ALL
    seed: int = 0
    guidance: float = 1.0
    steps: int = 25
    sampler: str = "unipc"
    num: int = 4

    def config(self, model: Model) -> RunConfig:
        """The run's config with these settings. Raises UserError for a value out of range."""
        check_whole(self.seed, "seed", 0, 2**63 - 1)
        steps = check_whole(self.steps, "steps", 1, 1000)
        how = replace(model.config.sample, guidance=self.guidance, steps=steps, sampler=self.sampler)
        check_whole(self.num, "images", 1, how.micro_batch)
        return replace(model.config, sample=how)

    def labels(self, model: Model) -> list[int]:
        """Class numbers that are drawn in turn; empty for all. Raises UserError for an unknown class."""
        if self.classes == ALL or not model.config.model.num_classes:
            return []
        return class_numbers(self.classes, model.classes)


@dataclass(frozen=True)
class Way:
    """The way of some samples from noise: S + 1 moments, the last of them the samples.

    Attributes:
        title: the model, and what was switched off.
        times: t of each moment; the last is 0.
        noisy, estimate: x_t, and the model's image estimate there, (S + 1, N, H, W, C).
        labels: class name of each image; empty without classes.
        inner: false: the inner path was switched off.
    """

    title: str
    times: tuple[float, ...]
    noisy: Pixels
    estimate: Pixels
    labels: tuple[str, ...] = ()
    inner: bool = True


@dataclass(frozen=True)
class DrawnWays:
    """Ways of the same noise, the first by the chosen model."""

    ways: tuple[Way, ...] = field(default=())

    @property
    def moments(self) -> int:
        """Number of moments that can be shown."""
        return min(len(way.times) for way in self.ways)


@torch.inference_mode()
def draw_way(model: Model, settings: Settings, *, inner: bool = True) -> Iterator[tuple[float, Pixels] | Way]:
    """Draw samples 0 to num - 1 of the command `sample`: after each call of the network its t and the image estimate,
    at last the way.

    Args:
        inner: false: the inner path adds nothing.

    Raises:
        UserError: a setting does not fit the model, or the model cannot run without its inner path.
    """
    use_full_float32()
    config, num = settings.config(model), settings.num
    if not inner and not can_run_without_inner(model.net):
        raise UserError(f"{model.folder.name} cannot run without its inner path: outer tokens come from inner ones")
    decode = open_decoder(model.config.data, next(model.net.parameters()).device)
    config = fit_to_device(model.net, config, num=num, compiled=False)
    noise, y = micro_batch(model.net, config, 0, settings.seed, settings.labels(model))
    times, noisy, estimates = list[float](), list[Tensor](), list[Tensor]()
    calls = trajectory(guided_predict(model.net, config), config.diffusion, config.sample, noise, y)
    while True:
        with nullcontext() if inner else without_inner(model.net):  # not across a yield: other sessions use the model
            call = next(calls, None)
        if call is None:
            break
        t, x, estimate, after = call
        times.append(t)
        noisy.append(x[:num].cpu())
        estimates.append(estimate[:num].cpu())
        yield t, to_pixels(estimates[-1])
    last = decode.numbered(range(num), after[:num].cpu(), config.sample.micro_batch) if decode else after[:num].cpu()
    kept = _kept(len(times), last)
    labels = [class_of(i, settings.labels(model) or range(config.model.num_classes or 1)) for i in range(num)]
    samples = to_pixels(last)
    yield Way(
        model.folder.resolve().name + ("" if inner else ", inner path off"),
        (*(times[k] for k in kept), 0.0),
        _moments([noisy[k] for k in kept], samples),
        _moments([estimates[k] for k in kept], samples),
        tuple(model.classes[label] for label in labels) if config.model.num_classes else (),
        inner,
    )


def _kept(steps: int, images: Tensor) -> range:
    """Steps that are kept: all, or evenly spaced ones that need at most MOST_BYTES."""
    most = max(2, MOST_BYTES // (2 * images.numel()))
    return range(0, steps, -(-steps // most))


def _moments(steps: list[Tensor], last: Pixels) -> Pixels:
    """uint8 (S + 1, N, H, W, C): latents are shown by three channels, enlarged to the size of the samples."""
    factor = last.shape[1] // steps[0].shape[2]
    pixels = [to_pixels(step).repeat(factor, 1).repeat(factor, 2) for step in steps]
    return np.stack([*(np.broadcast_to(each[..., : last.shape[-1]], last.shape) for each in pixels), last])


def difference(one: Pixels, other: Pixels, *, fine: bool = False) -> tuple[Pixels, float]:
    """(N, H, W, C): the difference of two sets of images around grey, scaled so that its largest value is white or
    black, and that scale.

    Args:
        fine: only the finest level of the Laplacian pyramid (Burt & Adelson 1983).
    """
    values: NDArray[np.float32] = to_floats(one) - to_floats(other)
    if fine:
        values = laplacian_pyramid(values)[0]
    most = float(np.abs(values).max())
    return to_pixels(torch.from_numpy(values / most if most else values)), 1 / most if most else 1.0
