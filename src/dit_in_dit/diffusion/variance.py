"""Learned variance of the reverse process, between its two bounds (Nichol & Dhariwal 2021, sections 3.1 and 3.4).

A model with `learn_variance` has twice the channels: the prediction, and v in about [-1, 1]. From step k to step
j < k of the ddpm path, log(variance) is linear in v: at v = -1 the variance is that of the posterior,
beta' (1 - alpha_bar_j) / (1 - alpha_bar_k), and at v = 1 the variance is beta' = 1 - alpha_bar_k / alpha_bar_j.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dit_in_dit.diffusion.path import DDPM_STEPS, alpha_bar, on_device

BIN = 1 / 255  # half of one of 256 grey values in [-1, 1]


def split_prediction(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The prediction in a model's output for x (N, C, H, W), and the fraction v if the output has 2C channels."""
    channels = x.shape[1]
    return output[:, :channels], output[:, channels:] if output.shape[1] > channels else None


class Posterior(NamedTuple):
    """q(x_j | x_k, x): its mean is image * x + noisy * x_k; logarithms of the smallest and largest variance."""

    image: Tensor
    noisy: Tensor
    log_small: Tensor
    log_large: Tensor

    def mean(self, image: Tensor, noisy: Tensor) -> Tensor:
        """The mean for an image and x_k (Ho et al. 2020, equation 7)."""
        return self.image * image + self.noisy * noisy

    def log_variance(self, fraction: Tensor) -> Tensor:
        """The log variance for v in [-1, 1], as in DiT's code (Nichol & Dhariwal 2021, equation 15, has [0, 1])."""
        return torch.lerp(self.log_small, self.log_large, (fraction + 1) / 2)


def posterior(step: Tensor, before: Tensor) -> Posterior:
    """The posterior from step k to step j < k; k and j are int64 tensors on the CPU, of one shape.

    j = -1 is the image itself. Its posterior variance is zero, which has no logarithm: the posterior
    variance from step 1 to step 0 is used.
    """
    left = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar()])  # left[k + 1] is alpha_bar_k
    now, then = left[step + 1], left[before + 1]
    beta = 1 - now / then
    lowest = (1 - left[2] / left[1]) * (1 - left[1]) / (1 - left[2])
    small = torch.where(before < 0, lowest, beta * (1 - then) / (1 - now))
    values = (beta * then.sqrt() / (1 - now), (1 - then) * (now / then).sqrt() / (1 - now), small.log(), beta.log())
    return Posterior(*(value.float() for value in values))


@on_device
def _by_step() -> Tensor:
    """The posterior from each step k to step k - 1, (4, 1000)."""
    steps = torch.arange(DDPM_STEPS)
    return torch.stack(posterior(steps, steps - 1))


@lru_cache(maxsize=4096)
def _between(step: int, before: int, device: torch.device) -> Posterior:
    """The posterior from one step to another, on a device."""
    with torch.inference_mode(False):
        return Posterior(*torch.stack(posterior(torch.tensor(step), torch.tensor(before))).to(device))


def ancestral(image: Tensor, fraction: Tensor | None, noisy: Tensor, step: int, before: int, noise: Tensor) -> Tensor:
    """One step, of any length, of DDPM's sampler: x_j from x_k, the image estimate and noise, all (N, C, H, W).

    Without a learned fraction, the variance is the larger bound. The last step (j = -1) adds no noise.
    """
    if before < 0:
        return image
    at = _between(step, before, noisy.device)
    largest = torch.ones_like(noisy) if fraction is None else fraction
    return at.mean(image, noisy) + (0.5 * at.log_variance(largest)).exp() * noise


def vlb_term(image: Tensor, fraction: Tensor, x: Tensor, noisy: Tensor, step: Tensor) -> Tensor:
    """The term of the variational bound at `step` (N,), per example (N,), in bits per dimension.

    No gradient passes through the image estimate (Nichol & Dhariwal 2021, section 3.3). At step 0 the term is the
    likelihood of x as one of 256 grey values in [-1, 1]. Latents are treated in the same way, as in DiT.
    """
    at = Posterior(*_by_step(step.device)[:, step, None, None, None])
    log_variance = at.log_variance(fraction)
    error = x - image.detach()
    apart = (at.image * error).square() * (-log_variance).exp()  # the means differ only by the error of the image
    divergence = 0.5 * (log_variance - at.log_small + (at.log_small - log_variance).exp() - 1 + apart)
    likelihood = _grey_log_likelihood(x, error, log_variance)
    nats = torch.where(step[:, None, None, None] == 0, -likelihood, divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def _grey_log_likelihood(x: Tensor, error: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability of the grey value of x under a normal distribution of mean x - error; the first and the last
    value include the tails."""
    deviation = (-0.5 * log_variance).exp()
    above, below = ((error + side) * deviation for side in (BIN, -BIN))
    inside = (torch.special.ndtr(above) - torch.special.ndtr(below)).clamp(min=1e-12).log()
    ends = torch.where(x < 0, torch.special.log_ndtr(above), torch.special.log_ndtr(-below))
    return torch.where(x.abs() > 0.999, ends, inside)
