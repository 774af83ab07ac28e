"""Samples of the same noise with the inner path on and off, and the trajectories of some samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.picture import Array
from dit_in_dit.diffusion.guidance import away_from_weak
from dit_in_dit.diffusion.samplers import guided, trajectory
from dit_in_dit.inspection.hooks import can_run_without_inner, without_inner
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.sampling.numbered import class_of, numbered_noise

STRIPS = 4  # samples whose trajectory is kept


@dataclass(frozen=True)
class OnOffSamples:
    """Samples with the inner path on and off, and trajectories with the inner path on.

    Attributes:
        labels: class numbers, (M,).
        on, off: samples (M, C, H, W) of the same noise. `off` is None if the model cannot run without the inner
            path.
        times: t of each call of the network, (calls,).
        noisy, estimate: x_t and the image estimate at each call, (calls, STRIPS, C, H, W).
    """

    labels: tuple[int, ...]
    on: Array
    off: Array | None
    times: tuple[float, ...]
    noisy: Array
    estimate: Array


@torch.inference_mode()
def draw_on_and_off(
    model: NestedDiT,
    config: RunConfig,
    num: int,
    *,
    seed: int = 0,
    classes: Sequence[int] = (),
    advance: Callable[[], None] = lambda: None,
) -> OnOffSamples:
    """Generate samples 0 to num - 1 with the inner path on, then off. Noise and labels are as in `sample_batches`.

    `classes` are numbers that alternate (empty: all classes); `advance` is called after each sampler step.
    """
    device, classified = next(model.parameters()).device, config.model.num_classes
    labels = tuple(class_of(i, classes or range(classified or 1)) for i in range(num))
    y = torch.tensor(labels, device=device) if classified else None
    how = config.sample
    weakly = away_from_weak(model, partial(model, weak=True), how.internal_guidance, how.guide_interval)
    predict = guided(weakly, classified, how)
    calls, samples = [], []
    for inner_is_on in (True, False) if can_run_without_inner(model) else (True,):
        with nullcontext() if inner_is_on else without_inner(model):
            noise = numbered_noise(seed, range(num), config.model.image_shape, device)
            for step in trajectory(predict, config.diffusion, config.sample, noise, y):
                if inner_is_on:
                    t, x_t, estimate, _ = step
                    calls.append((t, x_t[:STRIPS].cpu().numpy(), estimate[:STRIPS].cpu().numpy()))
                advance()
        samples.append(step[-1].cpu().numpy())
    times, noisy, estimates = zip(*calls, strict=True)
    off = samples[1] if len(samples) > 1 else None
    return OnOffSamples(labels, samples[0], off, times, np.stack(noisy), np.stack(estimates))
