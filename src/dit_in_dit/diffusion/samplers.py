"""Sampling, from noise to images, with the schedulers of the `diffusers` library or a user's own scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DiffusionConfig, SampleConfig
from dit_in_dit.config.samplers import SAMPLERS, check_sampler
from dit_in_dit.diffusion.guidance import is_inside
from dit_in_dit.diffusion.objective import Predict
from dit_in_dit.diffusion.path import Ddpm, convert, make_path
from dit_in_dit.diffusion.schedulers import (
    PREDICTIONS,
    is_ddpm,
    matches_flow,
    next_sample,
    prediction_type,
    scheduler_option,
    start_sampler,
    time_of,
)
from dit_in_dit.diffusion.variance import ancestral, split_prediction

Noise = Callable[[], Tensor]  # returns the next noise (N, C, H, W) of a batch
Watch = Callable[[float, Tensor, Tensor], None]


def denoise(
    predict: Predict,
    diffusion: DiffusionConfig,
    how: SampleConfig,
    noise: Noise | Tensor,
    y: Tensor | None,
    watch: Watch | None = None,
) -> Tensor:
    """Images (N, C, H, W) from noise along the configured path; arguments and errors as for `trajectory`. At each
    network call, `watch` gets the time t, x_t and the image estimate."""
    if watch is None:
        return deque(_calls(predict, diffusion, how, noise, y), maxlen=1)[0][-1]
    for call in trajectory(predict, diffusion, how, noise, y):
        watch(*call[:3])
    return call[-1]


def trajectory(
    predict: Predict, diffusion: DiffusionConfig, how: SampleConfig, noise: Noise | Tensor, y: Tensor | None
) -> Iterator[tuple[float, Tensor, Tensor, Tensor]]:
    """Each network call from noise to images: its time t, x_t, the image estimate, and the next x, all (N, C, H, W).

    The last x is the sample. `noise` is (N, C, H, W), or a function: its first call returns the initial noise, each
    later call the noise of one step of a stochastic sampler. UserError if the sampler does not support the path or the
    number of steps, or a user's scheduler does not fit.
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
    path = make_path(diffusion)
    scheduler = start_sampler(diffusion, how.sampler, how.steps, how.spacing, how.shift(diffusion))
    wanted = prediction_type(scheduler)
    stochastic, draw = SAMPLERS[how.sampler].stochastic, noise if callable(noise) else _one(noise)
    x = draw()
    following = [*scheduler.timesteps[1:].tolist(), -1]
    for number, timestep in enumerate(scheduler.timesteps):
        times = torch.full((len(x),), time_of(scheduler, diffusion.path, number), device=x.device)
        prediction, fraction = split_prediction(predict(x, times, y), x)
        step = convert(path, prediction, x, times, given=diffusion.predict, wanted=wanted)
        if is_ddpm(scheduler):
            after = ancestral(step, fraction, x, int(timestep), following[number], draw())
        else:
            options = {"noise": draw()} if stochastic else {}
            after = next_sample(scheduler.step(step, timestep, x, **options), x, how.sampler)
        yield times, x, prediction, after
        x = after


def _one(noise: Tensor) -> Noise:
    """A function that returns the noise, and raises ValueError at its second call."""
    unused = [noise]

    def draw() -> Tensor:
        if not unused:
            raise ValueError("this sampler needs noise at every step: pass a function, such as numbered_noise(...)")
        return unused.pop()

    return draw


def guided(predict: Predict, null: int, how: SampleConfig) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022) in one batch, within an interval of t (Kynkaanniemi et al. 2024).

    `null` is the number of the null class. Variance channels are not guided: they are those of the given class.
    """
    if how.guidance == 1 or null == 0:
        return predict

    def with_guidance(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if y is None or not is_inside(how.interval, t):
            return predict(x, t, y)
        both = torch.cat([y, torch.full_like(y, null)])
        given, none = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        guided = none + how.guidance * (given - none)
        channels = how.guidance_channels or x.shape[1]
        guided[:, channels:] = given[:, channels:]
        return guided

    return with_guidance


def fit_scheduler(scheduler: Any, path: str, steps: int) -> Any:
    """The scheduler, with straight paths if it is a multi-step scheduler and the model needs them; UserError for a
    scheduler of another path.
    """
    name = type(scheduler).__name__
    straight = scheduler_option(scheduler, "use_flow_sigmas")
    if path == "flow":
        if straight is False:
            options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            return type(scheduler).from_config(scheduler.config, **options)
        if straight is None and not matches_flow(scheduler):
            raise UserError(f"{name} has no straight paths: use FlowMatch, DPM-Solver++ or UniPC")
        return scheduler
    if matches_flow(scheduler) or straight:
        raise UserError(f"{name} steps along straight paths, but the model's path is {path}: use DDIMScheduler")
    expected = Ddpm().table(torch.device("cpu"))[0] ** 2
    levels = getattr(scheduler, "alphas_cumprod", torch.zeros(0)).cpu().float()
    if levels.shape != expected.shape or not torch.allclose(levels, expected, atol=1e-4):
        raise UserError(f"{name} has other noise levels than the model: set beta_schedule='linear', 0.0001 to 0.02")
    if (kind := scheduler_option(scheduler, "prediction_type")) not in PREDICTIONS:
        raise UserError(f"{name} takes prediction_type {str(kind)[:40]!r}: known are {', '.join(PREDICTIONS)}")
    spacing = scheduler_option(scheduler, "timestep_spacing")
    if spacing == "trailing":
        check_sampler(path, "ddim", steps)
    if spacing == "linspace" and name == "DDIMScheduler":
        raise UserError("DDIMScheduler with timestep_spacing='linspace' steps past its times: give 'trailing'")
    return scheduler
