"""Training loss, and the held-out denoising error."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_in_dit.config.run import DiffusionConfig
from dit_in_dit.diffusion.frequency import frequency_error
from dit_in_dit.diffusion.path import (
    QUANTITIES,
    Ddpm,
    Flow,
    convert,
    determinant,
    make_path,
    prediction_coefficients,
    shift_time,
)
from dit_in_dit.diffusion.variance import split_prediction, vlb_term

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Weight = Callable[[Flow, str, Tensor], Tensor]  # path, prediction, t (N,) -> factor (N,) on the squared error
LOSS_FLOOR = 0.05  # lower bound of a determinant in a weight (JiT, Li & He 2025, section 4)
MIN_SNR = 5.0  # gamma of Hang et al. 2023
EVALUATION_TIMES = (0.2, 0.5, 0.8)


def logit_normal(uniform: Tensor, config: DiffusionConfig) -> Tensor:
    """Logit-normal times from uniform numbers (Esser et al. 2024, section 3.1)."""
    inside = uniform.double().clamp(1e-12, 1 - 1e-12)
    return torch.sigmoid(config.time_mean + config.time_std * torch.special.ndtri(inside))


# Inverse cumulative distribution functions of t.
TIME_DISTRIBUTIONS: dict[str, Callable[[Tensor, DiffusionConfig], Tensor]] = {
    "uniform": lambda uniform, config: uniform,
    "logit_normal": logit_normal,
}


def draw_time(path: Flow, uniform: Tensor, config: DiffusionConfig) -> Tensor:
    """Training times in [0, 1] from uniform numbers in [0, 1), by the configured distribution and shift."""
    t = TIME_DISTRIBUTIONS[config.time](uniform, config)
    return path.snap(t if config.shift == 1 else shift_time(t, config.shift)).float()


def loss_on(quantity: str) -> Weight:
    """A weight that turns the squared error of the prediction into the squared error of `quantity`.

    At a fixed x_t, the errors in two quantities differ by a factor, the ratio of the two determinants; the weight is
    the square of this ratio. A loss on the velocity therefore needs no conversion of the prediction.
    """

    def weight(path: Flow, predict: str, t: Tensor) -> Tensor:
        if QUANTITIES[predict] is QUANTITIES[quantity]:
            return torch.ones_like(t)
        a, b = path.coefficients(t)
        return (determinant(path, quantity, a, b, 0.0) / determinant(path, predict, a, b, LOSS_FLOOR)) ** 2

    return weight


def min_snr(path: Flow, predict: str, t: Tensor) -> Tensor:
    """Weight min(SNR, gamma) of the image's squared error, SNR = (a/b)^2; finite at both ends of the path."""
    a, b = path.coefficients(t)
    match predict:
        case "image" | "split":
            return (a / b.clamp(min=1e-6)).square().clamp(max=MIN_SNR)
        case "noise":
            return (MIN_SNR * (b / a.clamp(min=1e-6)).square()).clamp(max=1)
        case "velocity":
            return torch.minimum(a**2, MIN_SNR * b**2)
        case _:
            return torch.minimum(a**2, MIN_SNR * b**2) / determinant(path, predict, a, b, 1e-6) ** 2


LOSS_WEIGHTS: dict[str, Weight] = {
    "prediction": lambda path, predict, t: torch.ones_like(t),
    "velocity": loss_on("velocity"),
    "image": loss_on("image"),
    "noise": loss_on("noise"),
    "min_snr": min_snr,
}


class Objective:
    """The configured loss: squared error of the prediction, times a weight for the quantity `diffusion.weight`."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config, self.path = config, make_path(config)

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (N, C, H, W) from images, noise and times (N,)."""
        a, b = self.path.coefficients(_as_column(t))
        return a * x + b * noise

    def weight(self, t: Tensor) -> Tensor:
        """Factor (N,) on the squared error of the prediction."""
        return LOSS_WEIGHTS[self.config.weight](self.path, self.config.predict, t)

    def loss(self, predict: Predict, x: Tensor, noise: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Weighted squared error per example (N,), in float32.

        With `frequency_weight`, DeCo's loss on the velocity is added (see `frequency_error`).
        With a learned variance on the ddpm path, the term of the variational bound is added: the expected loss is
        L_simple + L_vlb / 1000 (Nichol & Dhariwal 2021, section 3.4).
        """
        x_t = self.noisy(x, noise, t)
        prediction, fraction = split_prediction(predict(x_t, t, y).float(), x)
        u, w = prediction_coefficients(self.path, self.config.predict, *self.path.coefficients(_as_column(t)))
        error = prediction - (u * x + w * noise)
        loss = self.weight(t) * error.square().flatten(1).mean(1)
        if self.config.frequency_weight:
            to_velocity = LOSS_WEIGHTS["velocity"](self.path, self.config.predict, t)
            loss = loss + self.config.frequency_weight * to_velocity * frequency_error(error)
        if fraction is None or not isinstance(self.path, Ddpm):
            return loss
        return loss + vlb_term(self.image(prediction, x_t, t), fraction, x, x_t, self.path.step(t))

    def image(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The image estimate (N, C, H, W) from a model's output."""
        return convert(self.path, split_prediction(output, x_t)[0], x_t, t, given=self.config.predict, wanted="image")

    def estimate(
        self, predict: Predict, x: Tensor, noise: Tensor, t: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x_t of images, noise and times (N,), and the model's image estimate at this x_t; both (N, C, H, W)."""
        x_t = self.noisy(x, noise, t)
        return x_t, self.image(predict(x_t, t, y).float(), x_t, t)

    def denoising_error(
        self, predict: Predict, x: Tensor, noise: Tensor, t: float, y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Squared error of the image estimate per example (N,): over all frequencies, and over high frequencies only.

        The high frequencies are those that 2x2 averaging removes: the finest level of a Haar pyramid.
        """
        times = self.path.snap(torch.full((len(x),), t, device=x.device))
        error = self.estimate(predict, x, noise, times, y)[1] - x
        return error.square().flatten(1).mean(1), high_frequencies(error).square().flatten(1).mean(1)


def high_frequencies(x: Tensor) -> Tensor:
    """x (N, C, H, W) minus its 2x2 block means; if a size is odd, the blocks at the far border are smaller."""
    low = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    low = low.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return x - low[..., : x.shape[-2], : x.shape[-1]]


def _as_column(t: Tensor) -> Tensor:
    return t[:, None, None, None]
