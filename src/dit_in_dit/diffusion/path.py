"""The path from image x to noise e, x_t = a(t) x + b(t) e, and the quantities that a model may predict on it.

Every quantity (velocity, image or noise) is u x + w e, each with its own coefficients (u, w). A prediction and x_t give
two equations in x and e, so that one 2x2 solve converts a prediction of any quantity into any other quantity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_in_dit.config.run import DiffusionConfig

DDPM_STEPS = 1000
SMALLEST_DETERMINANT = 1e-3  # keeps conversions finite at the ends of the path, where the system is singular


def alpha_bar() -> Tensor:
    """Share of the image's variance that is left after each step of DiT's linear schedule, (1000,) float64."""
    betas = torch.linspace(1e-4, 0.02, DDPM_STEPS, dtype=torch.float64)
    return (1 - betas).cumprod(0)


def shift_time(t: Any, shift: float) -> Any:
    """Times t (an array, a tensor or a number in [0, 1]) moved to the noisy end if `shift` is above 1.

    The shift s multiplies the odds t / (1 - t) by s (Esser et al. 2024, equation 23; RAE, Zheng et al. 2025).
    """
    return shift * t / (1 + (shift - 1) * t)


def on_device(make: Callable[[], Tensor]) -> Callable[[torch.device], Tensor]:
    """Cache a table of constants on each device: a copy in every step would make the host wait for the device."""

    @lru_cache(maxsize=8)
    def table(device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # training may use a table that sampling computed
            return make().to(device)

    return table


class Flow:
    """Rectified flow (Liu et al. 2022; SiT): a = 1 - t, b = t, velocity = e - x."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a(t), b(t), with the shape of t."""
        return 1 - t, t

    def velocity(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity's coefficients of x and e."""
        return -torch.ones_like(a), torch.ones_like(b)

    def snap(self, t: Tensor) -> Tensor:
        """t unchanged, because every time is on the path."""
        return t


class Ddpm(Flow):
    """DiT's variance-preserving path (Ho et al. 2020): linear betas 1e-4 to 0.02, step k at t = k/1000.

    Its velocity is a e - b x (Salimans & Ho 2022).
    """

    def __init__(self) -> None:
        left = alpha_bar()
        table = torch.stack([left.sqrt(), (1 - left).sqrt()]).float()
        self.table = on_device(lambda: table)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a(t), b(t), with the shape of t."""
        a, b = self.table(t.device).to(t.dtype)[:, self.step(t)]
        return a, b

    def step(self, t: Tensor) -> Tensor:
        """The number of the step at t, int64."""
        return (t * DDPM_STEPS).round().long().clamp(0, DDPM_STEPS - 1)

    def velocity(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity's coefficients of x and e."""
        return -b, a

    def snap(self, t: Tensor) -> Tensor:
        """The time of the last step at or before t."""
        return (t * DDPM_STEPS).floor().clamp(max=DDPM_STEPS - 1) / DDPM_STEPS


PATHS: dict[str, Callable[[], Flow]] = {"flow": Flow, "ddpm": Ddpm}


def make_path(config: DiffusionConfig) -> Flow:
    """The configured path."""
    return PATHS[config.path]()


Quantity = Callable[[Flow, Tensor, Tensor], tuple[Tensor, Tensor]]  # path, a(t), b(t) -> u, w, shaped as a
QUANTITIES: dict[str, Quantity] = {
    "velocity": lambda path, a, b: path.velocity(a, b),
    "image": lambda path, a, b: (torch.ones_like(a), torch.zeros_like(a)),
    "noise": lambda path, a, b: (torch.zeros_like(a), torch.ones_like(a)),
}
QUANTITIES["split"] = QUANTITIES["image"]  # the model turns its network's output into an image (model.split)


def prediction_coefficients(path: Flow, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (u, w) of the named prediction, u x + w e."""
    return QUANTITIES[name](path, a, b)


def determinant(path: Flow, name: str, a: Tensor, b: Tensor, floor: float) -> Tensor:
    """Determinant a w - b u of the 2x2 system; an absolute value below `floor` becomes `floor`, the sign stays."""
    u, w = prediction_coefficients(path, name, a, b)
    det = a * w - b * u
    return torch.where(det < 0, -1.0, 1.0) * det.abs().clamp(min=floor)


def convert(path: Flow, prediction: Tensor, x_t: Tensor, t: Tensor, *, given: str, wanted: str) -> Tensor:
    """Convert a prediction (N, ...) of quantity `given`, at x_t (N, ...) and t (N,), to quantity `wanted`."""
    if QUANTITIES[given] is QUANTITIES[wanted]:
        return prediction
    t = t.view(-1, *[1] * (x_t.ndim - 1))
    a, b = path.coefficients(t)
    u, w = prediction_coefficients(path, given, a, b)
    det = determinant(path, given, a, b, SMALLEST_DETERMINANT)
    v, z = prediction_coefficients(path, wanted, a, b)
    # image = (w x_t - b prediction) / det, noise = (a prediction - u x_t) / det; as a factor on each.
    return (a * z - b * v) / det * prediction + (w * v - u * z) / det * x_t
