"""From a model to images: schedulers of diffusers behind one function, and samples that are numbered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_in_dit.config.run import RunConfig
from dit_in_dit.diffusion.objective import Predict
from dit_in_dit.diffusion.samplers import Noise, denoise, guided
from dit_in_dit.diffusion.schedulers import TIMES
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runtime.memory import keep_freed_memory
from dit_in_dit.runtime.precision import use_full_float32
from dit_in_dit.runtime.seeding import generator


def numbered_noise(seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device) -> Noise:
    """The noise of samples `indices`, each (*shape) and from its own stream of (seed, number): a function that gives
    (N, *shape), anew at each call."""
    streams = [generator(seed, "sample", i) for i in indices]

    def draw() -> Tensor:
        return torch.from_numpy(np.stack([s.standard_normal(shape, np.float32) for s in streams])).to(device)

    return draw


def in_its_type(model: NestedDiT) -> Predict:
    """The model's prediction in the type of x, computed in that of the weights."""
    dtype = next(model.parameters()).dtype
    return lambda x, t, y: model(x.to(dtype), t, y).to(x.dtype)


def class_of(index: int, classes: Sequence[int]) -> int:
    """The class of sample `index`: the wanted classes take turns."""
    return classes[index % len(classes)]


@torch.inference_mode()
def sample_batches(
    model: NestedDiT,
    config: RunConfig,
    indices: Sequence[int],
    *,
    seed: int = 0,
    classes: Sequence[int] = (),
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbered samples (indices, images on the CPU), micro-batch by micro-batch.

    Sample i has its noise from (seed, i) and its class from i. It is always drawn together with the same others, in
    its place of micro-batch i // `sample.micro_batch`, whichever of them are wanted: sums in a batch of another size,
    or in another of its rows, may end in other bits.

    Args:
        model: computes where its weights are and in their type; steps are taken, and images given, in float32.
        config: whose `diffusion` and `sample` are used.
        indices: numbers of the samples; in order, no micro-batch is drawn twice.
        classes: class numbers that take turns; empty: all classes.
    """
    keep_freed_memory()
    use_full_float32()
    device, shape = next(model.parameters()).device, model.config.image_shape
    chosen = classes or range(model.config.num_classes or 1)
    predict = guided(in_its_type(model), model.config.num_classes, config.sample)
    size = config.sample.micro_batch
    for number, wanted in groupby(indices, lambda i: i // size):
        whole, part = range(number * size, (number + 1) * size), list(wanted)
        noise = numbered_noise(seed, whole, shape, device)
        y = torch.tensor([class_of(i, chosen) for i in whole], device=device) if model.config.num_classes else None
        x = denoise(predict, config.diffusion, config.sample, noise, y)
        yield part, x.cpu()[[i - whole.start for i in part]]


def sample(
    model: NestedDiT,
    config: RunConfig,
    num: int,
    *,
    seed: int = 0,
    classes: Sequence[int] = (),
) -> Tensor:
    """Samples 0 to num - 1, (num, C, H, W), about in [-1, 1]; see `sample_batches`."""
    return torch.cat([images for _, images in sample_batches(model, config, range(num), seed=seed, classes=classes)])


def sampling_protocol(config: RunConfig, *, labels: str | Sequence[str], averaged: bool, seed: int) -> dict[str, Any]:
    """How samples are drawn, as JSON holds it; `labels` are names of classes, or words for them."""
    how = config.sample
    special: dict[str, Any] = {name: getattr(how, name) for name in ("spacing", "guidance_channels")}
    # Before times were ours, they were those of whichever diffusers was installed, and these differed here alone.
    special["times"] = TIMES if (config.diffusion.path, how.sampler) == ("flow", "unipc") else None
    return {
        "made by": "sampling",
        "labels": labels,
        "sampler": how.sampler,
        "steps": how.steps,
        "guidance": how.guidance,
        "interval": list(how.interval),
        "weights": "averaged" if averaged else "trained",
        "precision": "float32",
        "seed": seed,
        **{name: value for name, value in special.items() if value is not None},
    }
