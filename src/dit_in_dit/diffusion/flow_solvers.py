"""Solvers of path flow, x_t = (1 - t) x + t e: Euler's and Heun's methods, DPM-Solver++ and UniPC.

Each has the steps and the results of a class of the `diffusers` library, whose import takes seconds. A solver is a
`Scheduler` (`diffusion/schedulers.py`) that takes the velocity.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_in_dit.diffusion.path import DDPM_STEPS, shift_time

Levels = NDArray[np.float64] | None  # noise levels that a caller gives


def even_levels(steps: int, shift: float = 1.0, given: Levels = None, total: int = DDPM_STEPS) -> NDArray[np.float32]:
    """Noise levels t (steps,) from 1 to 1/steps, evenly spaced before the shift; `given` replaces those."""
    even = np.linspace(total, total / steps, steps) / total
    return shift_time(even if given is None else given, shift).astype(np.float32)


def multistep_levels(
    steps: int, shift: float = 1.0, given: Levels = None, total: int = DDPM_STEPS, *, ends_late: bool
) -> NDArray[np.float64]:
    """Noise levels t (steps,) of a multi-step solver: `steps` of steps + 1 evenly spaced ones before the shift.

    `ends_late` leaves out the lowest (UniPC); otherwise they are counted from t = 1 (DPM-Solver++).
    """
    even = np.linspace(1, 1 / total, steps + 1)
    levels = (even[:-1] if ends_late else (1 - even)[:0:-1]) if given is None else given
    levels = shift_time(levels, shift)
    levels[0] = min(levels[0], 1 - 1e-6)  # at 1 the logarithm of the signal is infinite
    return levels


class Euler:
    """Euler's method."""

    prediction = "velocity"
    start: Tensor  # x where the current step began, of a solver that comes back to it

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift
        self.set_timesteps(1)

    def set_timesteps(self, steps: int) -> None:
        """Start a new trajectory with this number of steps."""
        levels = even_levels(steps, self.shift)
        self._start(levels, levels * np.float32(DDPM_STEPS))

    def _start(self, levels: NDArray[np.floating], times: NDArray[np.generic]) -> None:
        self.timesteps = torch.from_numpy(times)
        self.sigmas = torch.from_numpy(np.append(levels, 0).astype(np.float32))
        self.call = 0  # number of the network call

    def step(self, prediction: Tensor, timestep: Tensor, x: Tensor) -> SimpleNamespace:
        """The next x (N, C, H, W) as `prev_sample`, for the velocity at x."""
        after = self._next(prediction, x)
        self.call += 1
        return SimpleNamespace(prev_sample=after)

    def _next(self, velocity: Tensor, x: Tensor) -> Tensor:
        return x + (self.sigmas[self.call + 1] - self.sigmas[self.call]) * velocity


class Heun(Euler):
    """Heun's method: an Euler step, then the same step with the mean of the velocities at both ends."""

    velocity: Tensor  # at the start of the step

    def set_timesteps(self, steps: int) -> None:
        """Start a new trajectory with this number of steps, of two network calls each but the last."""
        levels = even_levels(steps, self.shift).repeat(2)[1:]
        self._start(levels, levels * np.float32(DDPM_STEPS))

    def _next(self, velocity: Tensor, x: Tensor) -> Tensor:
        now = self.sigmas[self.call]
        velocity = (x - (x - velocity * now)) / now  # rounded as in diffusers
        if self.call % 2:
            return self.start + 0.5 * (self.velocity + velocity) * (now - self.sigmas[self.call - 1])
        self.start, self.velocity = x, velocity
        return super()._next(velocity, x)


class DpmSolver(Euler):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), of first order in the first and the last step."""

    ends_late = False

    def set_timesteps(self, steps: int) -> None:
        """Start a new trajectory with this number of steps."""
        levels = multistep_levels(steps, self.shift, ends_late=self.ends_late)
        self._start(levels, (levels * DDPM_STEPS).astype(np.int64))
        self.half_log_snr = torch.log(1 - self.sigmas) - torch.log(self.sigmas)  # lambda; infinite at the end
        self.images: list[Tensor] = []  # the last two estimates

    def _next(self, velocity: Tensor, x: Tensor) -> Tensor:
        call, sigmas, lambdas = self.call, self.sigmas, self.half_log_snr
        self.images = [*self.images[-1:], x - sigmas[call] * velocity]
        h = lambdas[call + 1] - lambdas[call]
        weight = (1 - sigmas[call + 1]) * (torch.exp(-h) - 1)
        after = sigmas[call + 1] / sigmas[call] * x - weight * self.images[-1]
        if call in (0, len(self.timesteps) - 1):
            return after
        ratio = (lambdas[call] - lambdas[call - 1]) / h
        return after - 0.5 * weight * (1 / ratio * (self.images[-1] - self.images[-2]))


class UniPC(DpmSolver):
    """UniPC of order 2 with B(h) = exp(h) - 1 (Zhao et al. 2023): each estimate corrects the step that led to it."""

    ends_late = True

    def _next(self, velocity: Tensor, x: Tensor) -> Tensor:
        image = x - self.sigmas[self.call] * velocity
        if self.call:
            x = self._advance(self.call - 1, self.start, found=image)
        self.images = [*self.images[-1:], image]
        self.order = min(len(self.images), len(self.timesteps) - self.call)
        self.start = x
        return self._advance(self.call, x)

    def _advance(self, call: int, x: Tensor, found: Tensor | None = None) -> Tensor:
        """x at the level after `call`: predicted (equation 3), or corrected by the estimate found there (7)."""
        sigmas, lambdas, image = self.sigmas, self.half_log_snr, self.images[-1]
        h, alpha = lambdas[call + 1] - lambdas[call], 1 - sigmas[call + 1]
        decay = torch.expm1(-h)
        after = sigmas[call + 1] / sigmas[call] * x - alpha * decay * image
        if self.order == 1:
            return after if found is None else after - alpha * decay * (0.5 * (found - image))
        ratio = (lambdas[call - 1] - lambdas[call]) / h
        slope = (self.images[-2] - image) / ratio
        if found is None:
            return after - alpha * decay * (0.5 * slope)
        before, there = _corrector_weights(h, ratio)
        return after - alpha * decay * (before * slope + there * (found - image))


def _corrector_weights(h: Tensor, ratio: Tensor) -> Tensor:
    """Weights (2,) of the slope from the level before and of that to the new level: R rho = b (UniPC, equation 5)."""
    decay = torch.expm1(-h)
    first = decay / -h - 1
    second = first / -h - 1 / 2
    one = torch.ones_like(h)
    matrix = torch.stack([torch.stack([one, one]), torch.stack([ratio, one])])
    return torch.linalg.solve(matrix, torch.stack([first / decay, second * 2 / decay]))


SOLVERS: dict[str, type[Euler]] = {  # by the class of diffusers that has the same steps
    "FlowMatchEulerDiscreteScheduler": Euler,
    "FlowMatchHeunDiscreteScheduler": Heun,
    "DPMSolverMultistepScheduler": DpmSolver,
    "UniPCMultistepScheduler": UniPC,
}
