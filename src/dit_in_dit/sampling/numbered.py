"""From a model to images: schedulers of diffusers behind one function, and samples that are numbered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DiffusionConfig, RunConfig, SampleConfig, check_sampler
from dit_in_dit.diffusion.objective import Predict
from dit_in_dit.diffusion.path import convert, make_path
from dit_in_dit.diffusion.schedulers import TIMES, make_scheduler, set_steps, time_of, wanted_by
from dit_in_dit.diffusion.variance import ancestral, halves
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runtime.memory import keep_freed_memory
from dit_in_dit.runtime.precision import use_full_float32
from dit_in_dit.runtime.seeding import generator

Pixels = NDArray[np.uint8]
Noise = Callable[[], Tensor]  # the next noise (N, C, H, W) of a batch

_made = cache(make_scheduler)  # diffusers looks through the signatures of 16 classes each time: 2 ms


def denoise(
    predict: Predict, diffusion: DiffusionConfig, how: SampleConfig, noise: Noise | Tensor, y: Tensor | None
) -> Tensor:
    """Images (N, C, H, W) from noise, as `trajectory` takes it, along the configured path."""
    last = deque(_calls(predict, diffusion, how, noise, y), maxlen=1)
    return last[0][-1]


def trajectory(
    predict: Predict, diffusion: DiffusionConfig, how: SampleConfig, noise: Noise | Tensor, y: Tensor | None
) -> Iterator[tuple[float, Tensor, Tensor, Tensor]]:
    """Each network call on the way from noise to images: its time t, x_t, the image that the prediction amounts
    to, and the next x, the last of which is the sample; tensors (N, C, H, W).

    Args:
        noise: (N, C, H, W), or a function that gives it first, and then that of each step of sampler ddpm.
    """
    path = make_path(diffusion)
    for times, x, prediction, after in _calls(predict, diffusion, how, noise, y):
        image = convert(path, prediction, x, times, given=diffusion.predict, wanted="image")
        yield float(times[0]), x, image, after


def _calls(
    predict: Predict, diffusion: DiffusionConfig, how: SampleConfig, noise: Noise | Tensor, y: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Each network call: times (N,), x_t, the prediction and the next x."""
    check_sampler(diffusion.path, how.sampler, how.steps)
    path, scheduler = make_path(diffusion), deepcopy(_made(diffusion, how.sampler, how.spacing))  # it counts its steps
    set_steps(scheduler, how.steps)
    wanted = wanted_by(scheduler)
    random, draw = how.sampler == "ddpm", noise if callable(noise) else _one(noise)
    x = draw()
    following = [*scheduler.timesteps[1:].tolist(), -1]
    for number, timestep in enumerate(scheduler.timesteps):
        times = torch.full((len(x),), time_of(scheduler, diffusion.path, number), device=x.device)
        prediction, fraction = halves(predict(x, times, y), x)
        if random:
            image = convert(path, prediction, x, times, given=diffusion.predict, wanted="image")
            after = ancestral(image, fraction, x, int(timestep), following[number], draw())
        else:
            step = convert(path, prediction, x, times, given=diffusion.predict, wanted=wanted)
            after = scheduler.step(step, timestep, x).prev_sample
        yield times, x, prediction, after
        x = after


def _one(noise: Tensor) -> Noise:
    """The noise at the start, and no other."""
    left = [noise]

    def draw() -> Tensor:
        if not left:
            raise ValueError("sampler ddpm draws noise at every step: give a function, such as numbered_noise(...)")
        return left.pop()

    return draw


def numbered_noise(seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device) -> Noise:
    """The noise of samples `indices`, each (*shape) and from its own stream of (seed, number): a function that gives
    (N, *shape), anew at each call."""
    streams = [generator(seed, "sample", i) for i in indices]

    def draw() -> Tensor:
        return torch.from_numpy(np.stack([s.standard_normal(shape, np.float32) for s in streams])).to(device)

    return draw


def guided(predict: Predict, null: int, how: SampleConfig) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022) in one batch, within an interval of t
    (Kynkaanniemi et al. 2024); class `null` is no class. What tells the variance is the given class's."""
    if how.guidance == 1 or null == 0:
        return predict
    low, high = how.interval
    everywhere = (low, high) == (0, 1)  # then no time is read, and nothing waits for the device

    def with_guidance(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if y is None or not (everywhere or low <= float(t[0]) <= high):
            return predict(x, t, y)
        both = torch.cat([y, torch.full_like(y, null)])
        given, none = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        guided = none + how.guidance * (given - none)
        channels = how.guidance_channels or x.shape[1]
        guided[:, channels:] = given[:, channels:]
        return guided

    return with_guidance


def in_its_type(model: NestedDiT) -> Predict:
    """The model's prediction in the type of x, computed in that of the weights."""
    dtype = next(model.parameters()).dtype
    return lambda x, t, y: model(x.to(dtype), t, y).to(x.dtype)


def label(index: int, classes: Sequence[int]) -> int:
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
    device, shape = next(model.parameters()).device, (model.config.channels, *model.config.image_size)
    chosen = classes or range(model.config.num_classes or 1)
    predict = guided(in_its_type(model), model.config.num_classes, config.sample)
    size = config.sample.micro_batch
    for number, wanted in groupby(indices, lambda i: i // size):
        whole, part = range(number * size, (number + 1) * size), list(wanted)
        noise = numbered_noise(seed, whole, shape, device)
        y = torch.tensor([label(i, chosen) for i in whole], device=device) if model.config.num_classes else None
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


def protocol(config: RunConfig, *, labels: str | Sequence[str], averaged: bool, seed: int) -> dict[str, Any]:
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


# ---------------------------------------------------------------------------------------- pictures


def to_pixels(images: Tensor) -> Pixels:
    """uint8 (N, H, W, 1 or 3) from images (N, C, H, W) in [-1, 1]; of more channels, the first three.

    Raises:
        UserError: an image is not finite, which would become black pixels.
    """
    check_finite(images)
    shown = images if images.shape[1] in (1, 3) else images[:, :3]
    return (shown.float().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def check_finite(images: Tensor) -> None:
    """UserError when images or latents (N, ...) hold NaN or infinity, as those of a diverged model or a VAE do."""
    bad = (~images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{len(bad)} of {len(images)} images hold NaN or infinity, the first is number {bad[0]} of its batch: "
            "use an earlier checkpoint, or float32; a model that diverged draws nothing"
        )


def picture(pixels: Pixels) -> Image.Image:
    """One image from uint8 (H, W, 1 or 3)."""
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def grid(pixels: Pixels, columns: int | None = None) -> Image.Image:
    """Images (N, H, W, C) in rows on white, about square by default; small ones enlarged as they are."""
    count, height, width, _ = pixels.shape
    columns = columns or round(count**0.5 + 0.49)
    scale, gap = max(1, 64 // max(height, width)), 2
    cell_w, cell_h = width * scale + gap, height * scale + gap
    sheet = Image.new("RGB", (columns * cell_w + gap, -(-count // columns) * cell_h + gap), "white")
    for number, image in enumerate(pixels):
        tile = picture(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + number % columns * cell_w, gap + number // columns * cell_h))
    return sheet


def beside(pictures: dict[str, Image.Image]) -> Image.Image:
    """Pictures side by side, each under its caption."""
    top, gap = 28, 16
    width = sum(p.width for p in pictures.values()) + gap * (len(pictures) + 1)
    sheet = Image.new("RGB", (width, max(p.height for p in pictures.values()) + top + gap), "white")
    draw, left = ImageDraw.Draw(sheet), gap
    for caption, image in pictures.items():
        draw.text((left + 2, 7), caption, fill="black", font_size=14)
        sheet.paste(image, (left, top))
        left += image.width + gap
    return sheet
