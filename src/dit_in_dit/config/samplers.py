"""Table of the samplers: the scheduler of each path that one serves, and its rules; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dit_in_dit.config.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """A sampler.

    Attributes:
        schedulers: by path, the name of a scheduler class of diffusers, or a class of the user's own
            (`dit_in_dit.diffusion.schedulers.Scheduler`), made anew for each batch.
        stochastic: each step takes noise.
        least_steps: fewest steps that work.
        spacing: of the steps of path ddpm where `sample.spacing` is null.
        spacings: values of `sample.spacing` that fit.
    """

    schedulers: Mapping[str, str | Callable[[], Any]]
    stochastic: bool = False
    least_steps: int = 1
    spacing: str = "trailing"  # begins at pure noise (Lin et al. 2024)
    spacings: tuple[str, ...] = ("trailing", "leading", "linspace")


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler({"flow": "FlowMatchEulerDiscreteScheduler"}),
    "heun": Sampler({"flow": "FlowMatchHeunDiscreteScheduler"}),
    "ddim": Sampler(
        {"flow": "FlowMatchEulerDiscreteScheduler", "ddpm": "DDIMScheduler"},  # its step on a straight path is Euler's
        spacings=("trailing", "leading"),  # its step goes back by 1000 // steps
    ),
    "dpm++": Sampler({"flow": "DPMSolverMultistepScheduler", "ddpm": "DPMSolverMultistepScheduler"}),
    "unipc": Sampler({"flow": "UniPCMultistepScheduler", "ddpm": "UniPCMultistepScheduler"}),
    # Ancestral. DiT is sampled with linspace, which begins at pure noise too.
    "ddpm": Sampler({"ddpm": "DDPMScheduler"}, stochastic=True, least_steps=2, spacing="linspace"),
}


def check_sampler(path: str, sampler: str, steps: int) -> None:
    """UserError when a sampler does not serve this path or number of steps."""
    if path == "ddpm" and 1000 % steps:  # diffusers' steps and times drift apart otherwise
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
