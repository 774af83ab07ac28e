"""A sampler as a table of coefficients, so that other languages can run it without its code."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DiffusionConfig, SampleConfig
from dit_in_dit.config.samplers import SAMPLERS
from dit_in_dit.diffusion.samplers import denoise

CLOSE = 1e-4  # largest error of the table on random numbers of size 1


class SamplerTable(NamedTuple):
    """A deterministic sampler as linear combinations.

    The input of network call k is row k of `rows`, applied to the noise and the k predictions before it; the last row
    gives the sample.
    """

    times: list[float]  # t of each network call, (K,)
    rows: list[list[float]]  # row k has 1 + k coefficients, k = 0 to K


def sampler_table(diffusion: DiffusionConfig, how: SampleConfig, steps: int) -> SamplerTable:
    """The sampler of `how` with this number of steps as a table.

    Samplers of `diffusers` combine the noise and the predictions with weights that depend on the time only. The weights
    are read off by predictions that are unit vectors: each x then holds its own coefficients.

    Raises:
        UserError: the sampler adds noise at its steps, does not support the steps, or is not linear.
    """
    how = replace(how, steps=steps)
    if SAMPLERS[how.sampler].stochastic:
        known = [
            name for name, rules in SAMPLERS.items() if diffusion.path in rules.schedulers and not rules.stochastic
        ]
        raise UserError(
            f"sample.sampler={how.sampler} adds noise at every step, which has no table: "
            f"set sample.sampler to {', '.join(known)} (train --resume --set)"
        )
    units = torch.eye(2 * steps + 2, dtype=torch.float64)  # Heun's method has 2 network calls a step
    inputs, times = _inputs(diffusion, how, units[:1], units[1:])
    table = SamplerTable(times, [x[: 1 + call].tolist() for call, x in enumerate(inputs)])
    _check_linear(table, diffusion, how)
    return table


def _inputs(
    diffusion: DiffusionConfig, how: SampleConfig, noise: Tensor, predictions: Tensor
) -> tuple[list[Tensor], list[float]]:
    """x (L,) of each network call and of the sample, and t of each call, for noise (1, L) and predictions (K, L)."""
    inputs: list[Tensor] = []
    times: list[float] = []

    def predict(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        inputs.append(x.flatten().double())
        times.append(float(t[0]))
        return predictions[len(times) - 1].reshape(x.shape).to(x.dtype)

    sample = denoise(predict, diffusion, how, noise.reshape(1, 1, 1, -1), None)
    return [*inputs, sample.flatten().double()], times


def _check_linear(table: SamplerTable, diffusion: DiffusionConfig, how: SampleConfig) -> None:
    """UserError if a user's scheduler does something else with random numbers than the table does."""
    drawn = torch.randn(len(table.rows), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs, _ = _inputs(diffusion, how, drawn[:1], drawn[1:])
    for x, row in zip(inputs, table.rows, strict=True):
        expected = torch.tensor(row, dtype=torch.float64) @ drawn[: len(row)]
        if not torch.allclose(x, expected, rtol=CLOSE, atol=CLOSE):
            raise UserError(
                f"sample.sampler={how.sampler} is no linear combination of its predictions, which a table needs: "
                "choose a built-in sampler"
            )
