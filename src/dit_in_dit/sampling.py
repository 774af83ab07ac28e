"""From a model to images: schedulers of diffusers behind one function, and samples that are numbered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from importlib import import_module
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from dit_in_dit.config import DiffusionConfig, RunConfig, SampleConfig, check_sampler
from dit_in_dit.diffusion.objective import Predict
from dit_in_dit.diffusion.path import DDPM_STEPS, convert, make_path
from dit_in_dit.diffusion.variance import ancestral, halves
from dit_in_dit.memory import keep_freed_memory
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.precision import use_full_float32
from dit_in_dit.randomness import generator

Pixels = NDArray[np.uint8]
Noise = Callable[[], Tensor]  # the next noise (N, C, H, W) of a batch

SCHEDULERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ddpm": "DDPMScheduler",
}
PREDICTIONS = {"sample": "image", "epsilon": "noise", "v_prediction": "velocity", "flow_prediction": "velocity"}


def make_scheduler(diffusion: DiffusionConfig, sampler: str, spacing: str | None = None) -> Any:
    """The scheduler of diffusers for a path, a sampler and the spacing of its steps (`sample.spacing`)."""
    diffusers: Any = import_module("diffusers")  # here: it takes seconds
    if diffusion.path == "flow":
        options: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    else:
        kinds = {"image": "sample", "noise": "epsilon", "velocity": "v_prediction"}
        options = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": DDPM_STEPS}
        # Trailing steps start at pure noise (Lin et al. 2024); so do those of linspace, which DiT is sampled with.
        spacing = spacing or ("linspace" if sampler == "ddpm" else "trailing")
        # Images are not clipped, whatever class takes this over.
        options |= {"prediction_type": kinds[diffusion.predict], "timestep_spacing": spacing, "clip_sample": False}
        options |= {"variance_type": "fixed_large"} if sampler == "ddpm" else {}  # where it is not learned
    # DDIM's step on a straight path is Euler's.
    name = SCHEDULERS["euler" if (diffusion.path, sampler) == ("flow", "ddim") else sampler]
    return getattr(diffusers, name).from_config({} if name.startswith("FlowMatch") else options)


_made = cache(make_scheduler)  # diffusers looks through the signatures of 16 classes each time: 2 ms


def matches_flow(scheduler: Any) -> bool:
    """Whether it is one of those made for straight paths."""
    return "FlowMatch" in type(scheduler).__name__


def set_steps(scheduler: Any, steps: int) -> None:
    """Begin again, with this number of steps."""
    if matches_flow(scheduler):
        # Even steps of 1/steps down to zero. The default's last but one ends at 1/1000, where an image's
        # velocity is 1000 times its error, and Heun's correction with it.
        scheduler.sigma_min = 1 / steps
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it looks for its place by a time that rounding may repeat


def time_of(scheduler: Any, path: str, number: int) -> float:
    """t of a step. Multi-step flow schedulers round their timesteps; their sigmas are exact, and are t itself."""
    return float(scheduler.sigmas[number] if path == "flow" else scheduler.timesteps[number] / DDPM_STEPS)


def wanted_by(scheduler: Any) -> str:
    """The prediction that its step takes."""
    return "velocity" if matches_flow(scheduler) else PREDICTIONS[scheduler.config.prediction_type]


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


def protocol(how: SampleConfig, *, labels: str | Sequence[str], averaged: bool, seed: int) -> dict[str, Any]:
    """How samples are drawn, as JSON holds it; `labels` are names of classes, or words for them."""
    special = {name: getattr(how, name) for name in ("spacing", "guidance_channels")}
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
    """uint8 (N, H, W, 1 or 3) from images (N, C, H, W) in [-1, 1]; of more channels, the first three."""
    shown = images if images.shape[1] in (1, 3) else images[:, :3]
    return (shown.float().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()


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
