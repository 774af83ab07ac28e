"""Numbered samples of a model: sample i depends on the seed and i, not on the other samples of its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dit_in_dit.config.run import RunConfig
from dit_in_dit.diffusion.guidance import Pair, away_from_weak, beside
from dit_in_dit.diffusion.objective import Predict
from dit_in_dit.diffusion.path import make_path
from dit_in_dit.diffusion.samplers import Noise, Watch, denoise, guided
from dit_in_dit.diffusion.schedulers import TIMES
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runtime.device import resolve_sample_precision
from dit_in_dit.runtime.memory import keep_freed_memory
from dit_in_dit.runtime.precision import use_full_float32
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.sampling.guide import Guide

T = TypeVar("T")


def numbered_noise(seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device) -> Noise:
    """A function whose calls return the next noise (N, *shape) of samples `indices`; sample i has stream (seed, i)."""
    streams = [generator(seed, "sample", i) for i in indices]

    def draw() -> Tensor:
        return torch.from_numpy(np.stack([s.standard_normal(shape, np.float32) for s in streams])).to(device)

    return draw


def cast_to_weights(model: NestedDiT, precision: str = "float32") -> Predict:
    """The model as a function that returns the type of x, and computes in the type of the weights; with
    precision=bfloat16 under autocast to it."""
    weight = next(model.parameters())

    def predict(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return model(x.to(weight.dtype), t, y).to(x.dtype)

    return predict


def cast_pair(model: NestedDiT, precision: str) -> Pair:
    """As `cast_to_weights`, with the weak prediction of the same forward pass."""

    def pair(x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        weight = next(model.parameters())
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            strong, weak = model(x.to(weight.dtype), t, y, weak=True)
        return strong.to(x.dtype), weak.to(x.dtype)

    return pair


def guided_predict(model: NestedDiT, config: RunConfig, guide: Guide | None = None) -> Predict:
    """The model as a function with all guidance of `config.sample`: internal, then by `guide`, then classifier-free."""
    how = config.sample
    precision = resolve_sample_precision(config, next(model.parameters()).device).sample.precision
    predict = cast_to_weights(model, precision)
    if how.internal_guidance != 1:
        predict = away_from_weak(predict, cast_pair(model, precision), how.internal_guidance, how.guide_interval)
    if guide is not None:
        weak, own = cast_to_weights(guide.net, precision), guide.config
        quantities = {"given": own.diffusion.predict, "wanted": config.diffusion.predict}
        path, classes = make_path(config.diffusion), own.model.num_classes > 0
        pair = beside(predict, weak, path, classes=classes, **quantities)
        predict = away_from_weak(predict, pair, how.guide_scale, how.guide_interval)
    return guided(predict, model.config.num_classes, how)


def class_of(index: int, classes: Sequence[T]) -> T:
    """The class of sample `index` (its number or name): the classes are used cyclically."""
    return classes[index % len(classes)]


@torch.inference_mode()
def sample_batches(
    model: NestedDiT,
    config: RunConfig,
    indices: Sequence[int],
    *,
    seed: int = 0,
    classes: Sequence[int] = (),
    watch: Watch | None = None,
    guide: Guide | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbered samples (indices, images on the CPU), micro-batch by micro-batch.

    Sample i has its noise from (seed, i) and its class from i. The sample is always generated in the same row of
    micro-batch i // `sample.micro_batch`, and the whole micro-batch is generated: in a batch of another size, or in
    another row, the last bits of sums may differ.

    Args:
        model: computes on the device of its weights, in their type or `sample.precision`; steps and images are in
            float32.
        config: its `diffusion` and `sample` are used.
        indices: numbers of the samples; sorted, so that no micro-batch is generated twice.
        classes: class numbers, used cyclically; empty: all classes.
        watch: called with t, x_t and the image estimate of the whole micro-batch before each step; sample i is row
            i % `sample.micro_batch`.
        guide: weak model of autoguidance, with weight `sample.guide_scale`.
    """
    keep_freed_memory()
    use_full_float32()
    predict = guided_predict(model, config, guide)
    size = config.sample.micro_batch
    for number, wanted in groupby(indices, lambda i: i // size):
        part, (noise, y) = list(wanted), micro_batch(model, config, number, seed, classes)
        x = denoise(predict, config.diffusion, config.sample, noise, y, watch)
        yield part, x.cpu()[[i - number * size for i in part]]


def micro_batch(
    model: NestedDiT, config: RunConfig, number: int, seed: int, classes: Sequence[int] = ()
) -> tuple[Noise, Tensor | None]:
    """Noise and labels (N,) of micro-batch `number`; without labels None. Arguments are those of `sample_batches`."""
    device, size = next(model.parameters()).device, config.sample.micro_batch
    batch, turns = range(number * size, (number + 1) * size), classes or range(config.model.num_classes or 1)
    y = torch.tensor([class_of(i, turns) for i in batch], device=device) if config.model.num_classes else None
    return numbered_noise(seed, batch, model.config.image_shape, device), y


def sample(
    model: NestedDiT,
    config: RunConfig,
    num: int,
    *,
    seed: int = 0,
    classes: Sequence[int] = (),
) -> Tensor:
    """Samples 0 to num - 1, (num, C, H, W), about in [-1, 1]; see `sample_batches`.

    >>> model = dd.load("emoji")
    >>> dd.sample(model.net, model.config, num=2).shape
    torch.Size([2, 3, 32, 32])
    """
    return torch.cat([images for _, images in sample_batches(model, config, range(num), seed=seed, classes=classes)])


def sampling_protocol(
    config: RunConfig, *, labels: str | Sequence[str], averaged: bool | str, seed: int, guide: Guide | None = None
) -> dict[str, Any]:
    """The settings that samples depend on, as JSON holds them; `labels` are class names, or a phrase instead. `config`
    has been through `resolve_sample_precision`."""
    how = config.sample
    special: dict[str, Any] = {name: getattr(how, name) for name in ("spacing", "guidance_channels")}
    # Older versions took the times from the installed diffusers. Only the times of this pair have changed since.
    special["time_shift"] = None if (shift := how.shift(config.diffusion)) == 1 else shift
    special["average"] = averaged if isinstance(averaged, str) else None
    special["times"] = TIMES if (config.diffusion.path, how.sampler) == ("flow", "unipc") else None
    if guide is not None:
        special |= {"guide": guide.sha256, "guide_scale": how.guide_scale}
    if how.internal_guidance != 1:
        special["internal_guidance"] = how.internal_guidance
    if (guide is not None or how.internal_guidance != 1) and how.guide_interval != (0, 1):
        special["guide_interval"] = list(how.guide_interval)
    return {
        "made by": "sampling",
        "labels": labels,
        "sampler": how.sampler,
        "steps": how.steps,
        "guidance": how.guidance,
        "interval": list(how.interval),
        "weights": "averaged" if averaged else "trained",
        "precision": "float32" if how.precision == "auto" else how.precision,
        "seed": seed,
        **{name: value for name, value in special.items() if value is not None},
    }
