"""Table of the samplers: the schedulers of each sampler, by path, and the sampler's rules; no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dit_in_dit.config.choices import choice_names
from dit_in_dit.config.errors import UserError, did_you_mean, truncate

BUILT_IN_PATHS = ("flow", "ddpm")
SCHEDULER_METHODS = ("set_timesteps", "step")


@dataclass(frozen=True)
class Sampler:
    """A sampler: its schedulers and rules.

    Attributes:
        schedulers: scheduler by path: the name of a class in the `diffusers` library, or a user's own class
            (`dit_in_dit.diffusion.schedulers.Scheduler`). Every batch is sampled with a new object of that class.
        stochastic: whether each step adds noise.
        least_steps: smallest number of steps that works.
        spacing: spacing of the steps on path ddpm if `sample.spacing` is null.
        spacings: values of `sample.spacing` that fit.

    Raises:
        UserError: a path is unknown, or a scheduler is neither a name nor a class with the methods of `Scheduler`.
    """

    schedulers: Mapping[str, str | Callable[[], Any]]
    stochastic: bool = False
    least_steps: int = 1
    spacing: str = "trailing"  # begins at pure noise (Lin et al. 2024)
    spacings: tuple[str, ...] = ("trailing", "leading", "linspace")

    def __post_init__(self) -> None:
        if not isinstance(self.schedulers, Mapping) or not self.schedulers:
            got = truncate(repr(self.schedulers), 40)
            raise UserError(f"a sampler needs a scheduler for each path, such as {{'flow': MyScheduler}}: got {got}")
        for path, scheduler in self.schedulers.items():
            if path not in BUILT_IN_PATHS and path not in (known := choice_names("diffusion.path", BUILT_IN_PATHS)):
                hint = did_you_mean(str(path), known)
                raise UserError(f"a sampler must use registered paths: got {truncate(repr(path), 40)}{hint}")
            if not isinstance(scheduler, str):
                _check_class(path, scheduler)


def _check_class(path: str, scheduler: object) -> None:
    """UserError if a scheduler cannot be created, or its class lacks a method."""
    if not callable(scheduler):
        raise UserError(
            f"a sampler's scheduler for path {path} must be a class, or the name of a diffusers class: "
            f"got {truncate(repr(scheduler), 40)}"
        )
    forwards = hasattr(scheduler, "__getattr__")  # to an object that may have the methods
    lacks = [name for name in SCHEDULER_METHODS if not callable(getattr(scheduler, name, None))]
    if inspect.isclass(scheduler) and lacks and not forwards:
        raise UserError(f"a sampler's scheduler needs {' and '.join(lacks)}: write them in {scheduler.__name__}")


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler({"flow": "FlowMatchEulerDiscreteScheduler"}),
    "heun": Sampler({"flow": "FlowMatchHeunDiscreteScheduler"}),
    "ddim": Sampler(  # on a straight path, DDIM is Euler's method
        {"flow": "FlowMatchEulerDiscreteScheduler", "ddpm": "DDIMScheduler"},
        spacings=("trailing", "leading"),  # diffusers goes back by 1000 // steps, which linspace does not
    ),
    "dpm++": Sampler({"flow": "DPMSolverMultistepScheduler", "ddpm": "DPMSolverMultistepScheduler"}),
    "unipc": Sampler({"flow": "UniPCMultistepScheduler", "ddpm": "UniPCMultistepScheduler"}),
    # Ancestral sampling. DiT uses linspace, which begins at pure noise too.
    "ddpm": Sampler({"ddpm": "DDPMScheduler"}, stochastic=True, least_steps=2, spacing="linspace"),
}


def check_sampler(path: str, sampler: str, steps: int) -> None:
    """UserError if a sampler does not support this path or number of steps."""
    if path == "ddpm" and 1000 % steps:  # else the steps of diffusers no longer match its times
        raise UserError(f"sample.steps must divide 1000 with diffusion.path=ddpm: got {steps}; use 50, 100 or 250")
    rules = SAMPLERS[sampler]
    if path not in rules.schedulers:
        *some, last = [name for name, other in SAMPLERS.items() if path in other.schedulers] or ["another"]
        served = f"{', '.join(some)} or {last}" if some else last
        raise UserError(
            f"sample.sampler={sampler} needs diffusion.path={' or '.join(rules.schedulers)}: "
            f"use {served} with path {path}"
        )
    if steps < rules.least_steps:
        raise UserError(f"sample.sampler={sampler} needs at least {rules.least_steps} steps: set sample.steps=250")
