"""Schedulers for a path: a user's own, and those of the `diffusers` library, whose times are equal in all versions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, partial
from importlib import import_module
from inspect import signature
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.config.run import DiffusionConfig
from dit_in_dit.config.samplers import SAMPLERS
from dit_in_dit.config.time_shift import check_shift
from dit_in_dit.diffusion.flow_solvers import SOLVERS, Levels, even_levels, multistep_levels
from dit_in_dit.diffusion.path import DDPM_STEPS, QUANTITIES

TIMES = "of diffusers 0.42"  # times of a sampler's steps, in every installed version
PREDICTIONS = {"sample": "image", "epsilon": "noise", "v_prediction": "velocity", "flow_prediction": "velocity"}
STRAIGHT = (  # classes of diffusers for straight paths; their `step` takes the velocity
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"),
)
RESHAPING = (  # options that change the noise levels of a scheduler
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "invert_sigmas"),
    *("use_dynamic_shifting", "shift_terminal", "trained_betas", "rescale_betas_zero_snr"),
)
FULL = (None, -math.inf, "-inf")  # values of `lambda_min_clipped` that clip no step
Steps = tuple[NDArray[Any], NDArray[Any] | None]  # timesteps, and noise levels if the class has any


class Scheduler(Protocol):
    """A user's own scheduler; a `config.samplers.Sampler` holds the class, which is called without arguments.

    Attributes:
        prediction: the prediction that `step` takes: velocity, image or noise.
        timesteps: after `set_timesteps`, 1000 t of each network call, from noise to image. If the scheduler
            has `sigmas`, then on path flow the sigmas are t itself, without rounding.
    """

    prediction: str
    timesteps: Tensor

    def set_timesteps(self, steps: int) -> None:
        """Start a new trajectory with this number of steps."""

    def step(self, prediction: Tensor, timestep: Tensor, x: Tensor) -> Any:
        """An object whose `prev_sample` is the next x (N, C, H, W). The step of a stochastic sampler also takes the
        keyword `noise`, with the shape of x."""


def make_scheduler(diffusion: DiffusionConfig, sampler: str, spacing: str | None = None, shift: float = 1.0) -> Any:
    """A new scheduler for a path, a sampler, the spacing of its steps (`sample.spacing`) and the shift of its times.

    Raises:
        UserError: a user's scheduler cannot be created or lacks something that `Scheduler` asks for, or the scheduler
            takes no shift.
    """
    rules = SAMPLERS[sampler]
    scheduler = rules.schedulers[diffusion.path]
    if isinstance(scheduler, str):
        return deepcopy(_from_diffusers(scheduler, diffusion, spacing or rules.spacing, rules.stochastic, shift))
    check_shift("sample.time_shift", shift, diffusion.path, sampler)
    return _own_scheduler(scheduler, sampler, rules.stochastic)


def start_sampler(diffusion: DiffusionConfig, sampler: str, steps: int, spacing: str | None, shift: float) -> Any:
    """A new scheduler at the first of its steps: a solver of this package where it has one, without `diffusers`.

    Raises:
        UserError: as `make_scheduler`, or a user's scheduler sets no timesteps.
    """
    named = SAMPLERS[sampler].schedulers[diffusion.path]
    if diffusion.path == "flow" and isinstance(named, str) and named in SOLVERS:
        scheduler: Any = SOLVERS[named](shift)
        scheduler.set_timesteps(steps)
        return scheduler
    scheduler = make_scheduler(diffusion, sampler, spacing, shift)
    set_steps(scheduler, steps)
    check_timesteps(scheduler, sampler)
    return scheduler


def _own_scheduler(create: Callable[[], Any], sampler: str, stochastic: bool) -> Any:
    """Create a user's own scheduler and check it."""
    name = f"sampler {sampler}: {getattr(create, '__name__', 'its scheduler')}"
    try:
        scheduler = create()
    except Exception as error:
        problem = f"{type(error).__name__}: {truncate(error, 80)}"
        raise UserError(f"{name}() fails with {problem}; a scheduler class must take no arguments") from error
    noise = ["noise"] if stochastic and not is_ddpm(scheduler) else []
    for method, arguments, keywords in (
        ("set_timesteps", ["steps"], []),
        ("step", ["prediction", "timestep", "x"], noise),
    ):
        wanted = ", ".join([*arguments, *(f"{keyword}=" for keyword in keywords)])
        if not callable(bound := getattr(scheduler, method, None)):
            raise UserError(f"{name} lacks {method}: write {method}({wanted})")
        takes = signature(bound)
        try:
            takes.bind(*arguments, **dict.fromkeys(keywords))
        except TypeError:
            got = truncate(takes, 60)
            raise UserError(f"{name}.{method} must take ({wanted}): got {got}; change its arguments") from None
    try:
        prediction = prediction_type(scheduler)
    except (AttributeError, KeyError):  # it has no `prediction`, nor a known `prediction_type` of diffusers
        prediction = ""
    if prediction not in QUANTITIES:
        hint = did_you_mean(prediction, QUANTITIES)
        raise UserError(f"{name}.prediction must name a quantity: got {truncate(prediction or 'none', 40)}{hint}")
    return scheduler


def check_timesteps(scheduler: Any, sampler: str) -> None:
    """UserError if `set_timesteps` has not set finite timesteps (K,)."""
    times = getattr(scheduler, "timesteps", None)
    if isinstance(times, Tensor) and times.ndim == 1 and len(times) and bool(times.isfinite().all()):
        return
    got = f"a tensor {list(times.shape)}: {times.tolist()}" if isinstance(times, Tensor) else type(times).__name__
    raise UserError(
        f"sampler {sampler}: set_timesteps must set timesteps, a tensor (K,) of 1000 t for each network call: "
        f"got {truncate(got, 60)}; correct them"
    )


def next_sample(step: Any, x: Tensor, sampler: str) -> Tensor:
    """The next x (N, C, H, W) that a scheduler's `step` has returned; UserError if it has returned something else."""
    after = getattr(step, "prev_sample", None)
    if isinstance(after, Tensor) and after.shape == x.shape:
        return after
    got = f"prev_sample {list(after.shape)}" if isinstance(after, Tensor) else type(step).__name__
    raise UserError(
        f"sampler {sampler}: step must return an object whose prev_sample is a tensor {list(x.shape)}: got {got}; "
        "correct what it returns"
    )


@cache  # diffusers reads the signatures of 16 classes each time: 2 ms
def _from_diffusers(name: str, diffusion: DiffusionConfig, spacing: str, stochastic: bool, shift: float) -> Any:
    diffusers: Any = import_module("diffusers")  # here: it takes seconds
    if name in STRAIGHT:
        options: dict[str, Any] = {}
    elif diffusion.path == "flow":
        options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    else:
        kinds = {"image": "sample", "noise": "epsilon", "velocity": "v_prediction"}
        options = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": DDPM_STEPS}
        # A class created from this config does not clip images either.
        options |= {"prediction_type": kinds[diffusion.predict], "timestep_spacing": spacing, "clip_sample": False}
        options |= {"variance_type": "fixed_large"} if stochastic else {}  # used if the variance is not learned
    if not hasattr(diffusers, name):
        known = [known for known in dir(diffusers) if known.endswith("Scheduler")]
        raise UserError(
            f"a sampler must name a scheduler class of diffusers: got {truncate(name, 40)}{did_you_mean(name, known)}"
        )
    kind, option = getattr(diffusers, name), "shift" if name in STRAIGHT else "flow_shift"
    if shift != 1 and option not in signature(kind.__init__).parameters:
        raise UserError(f"{name} takes no shift: set sample.time_shift=1")
    return kind.from_config(options if shift == 1 else options | {option: shift})


def matches_flow(scheduler: Any) -> bool:
    """Whether a scheduler has, or inherits from, a class of the `diffusers` library for straight paths."""
    return any(kind.__name__ in STRAIGHT for kind in type(scheduler).__mro__)


def is_ddpm(scheduler: Any) -> bool:
    """Whether `variance.ancestral` replaces the step, since `DDPMScheduler.step` adds noise to the final image."""
    return type(scheduler).__name__ == "DDPMScheduler"


def scheduler_option(scheduler: Any, name: str) -> Any:
    """The value of an option of the scheduler's class; None if the class has no such option.

    `scheduler.config` is not enough: `from_config` also keeps options of an earlier class that this class lacks.
    """
    return scheduler.config.get(name) if name in signature(type(scheduler).__init__).parameters else None


def shift_of(scheduler: Any) -> float:
    """The factor by which a scheduler of diffusers shifts the times of path flow."""
    shift = vars(scheduler).get("_shift")  # `set_shift` leaves the config as it was
    return float(shift or scheduler_option(scheduler, "shift") or scheduler_option(scheduler, "flow_shift") or 1)


def set_steps(scheduler: Any, steps: int, sigmas: Sequence[float] | None = None) -> None:
    """Start a new trajectory with this number of steps.

    `sigmas` replaces the scheduler's noise levels on path flow: t of each step, falling in (0, 1]. As in diffusers, the
    scheduler's `shift` applies to them. UserError if they do not fall, or the scheduler does not take them.
    """
    levels = None if sigmas is None else np.asarray(sigmas, dtype=np.float64)
    if levels is not None and not (levels.shape == (steps,) and levels[0] <= 1 and (np.diff([*levels, 0]) < 0).all()):
        raise UserError(f"sigmas must fall from at most 1 to above 0, one a step: got {truncate(levels.tolist(), 60)}")
    if matches_flow(scheduler):
        # Even steps of 1/steps down to zero. Otherwise the last step but one would end at 1/1000, where the velocity,
        # and so Heun's correction, has 1000 times the error of the image.
        scheduler.sigma_min = 1 / steps
    scheduler.set_timesteps(steps)
    own = _own_steps(scheduler, steps, levels)
    if levels is not None and not (own and (matches_flow(scheduler) or scheduler_option(scheduler, "use_flow_sigmas"))):
        raise UserError(f"{type(scheduler).__name__} with these options takes no sigmas: give num_inference_steps")
    if own is not None:
        times, noise = own
        scheduler.timesteps = torch.from_numpy(times)
        if noise is not None:
            scheduler.sigmas = torch.from_numpy(np.append(noise, 0).astype(np.float32))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # otherwise it finds its step by the time, and rounded times may be equal


def _own_steps(scheduler: Any, steps: int, given: Levels) -> Steps | None:
    """Timesteps of a scheduler in `SPACED`, and the noise levels if the scheduler has any, as in diffusers 0.42.

    Versions differ: the second of UniPC's 25 flow steps is 960 in 0.42, 959 in 0.35. If an option of the scheduler
    asks for other steps, the result is None.
    """
    spaced = SPACED.get(type(scheduler).__name__)
    if spaced is None or any(scheduler_option(scheduler, key) for key in RESHAPING):
        return None
    cut = (
        scheduler_option(scheduler, "final_sigmas_type") == "sigma_min"
        or scheduler_option(scheduler, "lambda_min_clipped") not in FULL
    )
    return None if cut else spaced(scheduler, steps, given)


def _flow_steps(scheduler: Any, steps: int, given: Levels) -> Steps:
    total = scheduler.config.num_train_timesteps
    levels = even_levels(steps, shift_of(scheduler), given, total)
    return levels * np.float32(total), levels


def _heun_steps(scheduler: Any, steps: int, given: Levels) -> Steps:
    """Each Heun step ends with a network call at the next time."""
    times, levels = (each.repeat(2)[1:] for each in _flow_steps(scheduler, steps, given) if each is not None)
    return times, levels


def _multistep(scheduler: Any, steps: int, given: Levels, *, ends_late: bool) -> Steps:
    config = scheduler.config
    total = config.num_train_timesteps
    if scheduler_option(scheduler, "use_flow_sigmas"):
        sigmas = multistep_levels(steps, config.flow_shift, given, total, ends_late=ends_late)
        return (sigmas * total).astype(np.int64), sigmas
    times = _spaced(config.timestep_spacing, total, steps, config.steps_offset, last=False)
    left = scheduler.alphas_cumprod.cpu()
    return times, np.interp(times, np.arange(total), (((1 - left) / left) ** 0.5).numpy())


def _ddpm_steps(scheduler: Any, steps: int, given: Levels) -> Steps:
    config = scheduler.config
    return _spaced(config.timestep_spacing, config.num_train_timesteps, steps, config.steps_offset, last=True), None


SPACED: dict[str, Callable[[Any, int, Levels], Steps]] = {
    "FlowMatchEulerDiscreteScheduler": _flow_steps,
    "FlowMatchHeunDiscreteScheduler": _heun_steps,
    "DPMSolverMultistepScheduler": partial(_multistep, ends_late=False),
    "UniPCMultistepScheduler": partial(_multistep, ends_late=True),
    "DDIMScheduler": _ddpm_steps,
    "DDPMScheduler": _ddpm_steps,
}


def _spaced(spacing: str, total: int, steps: int, offset: int, *, last: bool) -> NDArray[np.int64]:
    """Times of the ddpm path from the noisy end; `last`: include the last of the evenly spaced times."""
    if spacing == "trailing":
        return np.arange(total, 0, -total / steps).round().astype(np.int64) - 1
    points = steps + (not last)
    if spacing == "linspace":
        return np.linspace(0, total - 1, points).round()[::-1][:steps].astype(np.int64)
    return (np.arange(points) * (total // points))[::-1][:steps].astype(np.int64) + offset


def time_of(scheduler: Any, path: str, number: int) -> float:
    """t of a step. Multi-step flow schedulers round the timesteps, but the sigmas are t without rounding."""
    exact = path == "flow" and hasattr(scheduler, "sigmas")
    return float(scheduler.sigmas[number] if exact else scheduler.timesteps[number] / DDPM_STEPS)


def prediction_type(scheduler: Any) -> str:
    """The quantity that a scheduler's step takes."""
    if own := "image" if is_ddpm(scheduler) else getattr(scheduler, "prediction", None):
        return str(own)
    return "velocity" if matches_flow(scheduler) else PREDICTIONS[scheduler.config.prediction_type]
