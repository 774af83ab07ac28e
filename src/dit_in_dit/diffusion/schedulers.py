"""Schedulers of diffusers for a path, with times that no version of diffusers changes."""

from __future__ import annotations

import math
from importlib import import_module
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_in_dit.config.run import DiffusionConfig
from dit_in_dit.diffusion.path import DDPM_STEPS

TIMES = "of diffusers 0.42"  # those of a sampler's steps, whatever version is installed
SCHEDULERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ddpm": "DDPMScheduler",
}
PREDICTIONS = {"sample": "image", "epsilon": "noise", "v_prediction": "velocity", "flow_prediction": "velocity"}
RESHAPING = (  # options that give a scheduler other noise levels
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "invert_sigmas"),
    *("use_dynamic_shifting", "shift_terminal", "trained_betas", "rescale_betas_zero_snr"),
)
FULL = (None, -math.inf, "-inf")  # `lambda_min_clipped` where no step is clipped


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


def matches_flow(scheduler: Any) -> bool:
    """Whether it is one of those made for straight paths."""
    return "FlowMatch" in type(scheduler).__name__


def setting(scheduler: Any, name: str) -> Any:
    """The value of an option of the scheduler's class, else None. Its config alone does not say: `from_config` keeps
    the unused options of the class that it is swapped for."""
    return scheduler.config.get(name) if name in signature(type(scheduler).__init__).parameters else None


def set_steps(scheduler: Any, steps: int) -> None:
    """Begin again, with this number of steps."""
    if matches_flow(scheduler):
        # Even steps of 1/steps down to zero. The default's last but one ends at 1/1000, where an image's
        # velocity is 1000 times its error, and Heun's correction with it.
        scheduler.sigma_min = 1 / steps
    scheduler.set_timesteps(steps)
    if (own := _own_steps(scheduler, steps)) is not None:
        times, sigmas = own
        scheduler.timesteps = torch.from_numpy(times)
        if sigmas is not None:
            scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it looks for its place by a time that rounding may repeat


def _own_steps(scheduler: Any, steps: int) -> tuple[NDArray[Any], NDArray[Any] | None] | None:
    """Timesteps of a scheduler of `SCHEDULERS`, and its noise levels where it has some, as diffusers 0.42 spaces them.

    Versions differ (UniPC's second of 25 flow steps is 960 in 0.42, 959 in 0.35), and samples must not. None where an
    option asks for other steps than these.
    """
    name, config = type(scheduler).__name__, scheduler.config
    cut = setting(scheduler, "final_sigmas_type") == "sigma_min" or setting(scheduler, "lambda_min_clipped") not in FULL
    if name not in SCHEDULERS.values() or cut or any(setting(scheduler, key) for key in RESHAPING):
        return None
    total = config.num_train_timesteps
    if matches_flow(scheduler):
        shift = vars(scheduler).get("_shift", config.shift)  # `set_shift` leaves the config as it was
        levels = _shifted(np.linspace(total, total / steps, steps) / total, shift).astype(np.float32)
        levels = levels.repeat(2)[1:] if "Heun" in name else levels  # a Heun step ends with a call at the next time
        return levels * np.float32(total), levels
    if setting(scheduler, "use_flow_sigmas"):
        even = np.linspace(1, 1 / total, steps + 1)
        sigmas = _shifted(even[:-1] if "UniPC" in name else (1 - even)[:0:-1], config.flow_shift)
        sigmas[0] = min(sigmas[0], 1 - 1e-6)  # at 1 UniPC takes the logarithm of zero
        return (sigmas * total).astype(np.int64), sigmas
    multistep = hasattr(scheduler, "sigmas")
    times = _spaced(config.timestep_spacing, total, steps, config.steps_offset, last=not multistep)
    if not multistep:
        return times, None
    left = scheduler.alphas_cumprod.cpu()
    return times, np.interp(times, np.arange(total), (((1 - left) / left) ** 0.5).numpy())


def _shifted(sigmas: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Noise levels with more steps at the noisy end (Esser et al. 2024, equation 23); shift 1 changes none."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _spaced(spacing: str, total: int, steps: int, offset: int, *, last: bool) -> NDArray[np.int64]:
    """Times of the ddpm path from the noisy end; `last`: the first time of all is one of them, else the one before."""
    if spacing == "trailing":
        return np.arange(total, 0, -total / steps).round().astype(np.int64) - 1
    points = steps + (not last)
    if spacing == "linspace":
        return np.linspace(0, total - 1, points).round()[::-1][:steps].astype(np.int64)
    return (np.arange(points) * (total // points))[::-1][:steps].astype(np.int64) + offset


def time_of(scheduler: Any, path: str, number: int) -> float:
    """t of a step. Multi-step flow schedulers round their timesteps; their sigmas are exact, and are t itself."""
    return float(scheduler.sigmas[number] if path == "flow" else scheduler.timesteps[number] / DDPM_STEPS)


def wanted_by(scheduler: Any) -> str:
    """The prediction that its step takes."""
    return "velocity" if matches_flow(scheduler) else PREDICTIONS[scheduler.config.prediction_type]
