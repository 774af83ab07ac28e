"""Attention within tiny groups, against what moving its numbers alone would take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_in_dit.benchmark.timing import Times, in_turns, stopwatch
from dit_in_dit.model.layers import attend


@dataclass(frozen=True)
class GroupTimes:
    """Seconds for all groups; `copy` moves as many bytes as reading q, k, v and writing the result does.

    Attributes:
        ours, sdpa: forward; `both` of them: forward and backward.
    """

    copy: Times
    ours: Times
    sdpa: Times
    ours_both: Times
    sdpa_both: Times


def group_times(
    length: int, tokens: int, width: int, heads: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> GroupTimes:
    """Time attention of `tokens` tokens in groups of `length`, queries, keys and values lying as a model makes them."""
    draw = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(tokens // length, length, 3, heads, width // heads, device=device, dtype=dtype, generator=draw)
    source = torch.empty(2 * tokens * width, device=device, dtype=dtype)  # read once, written once: four in all
    target = torch.empty_like(source)

    gradient = torch.ones_like(qkv[:, :, 0]).transpose(1, 2)  # as the next linear layer gives it

    def apart(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.transpose(1, 2) for part in x.unbind(2))

    def forward(attention: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: attention(*apart(qkv)))

    def both(attention: Callable[..., Tensor]) -> Callable[[], object]:
        leaf = qkv.clone().requires_grad_()

        def step() -> None:
            leaf.grad = None
            attention(*apart(leaf)).backward(gradient)  # type: ignore[no-untyped-call]

        return step

    work: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "ours": forward(attend),
        "sdpa": forward(F.scaled_dot_product_attention),
        "ours_both": both(attend),
        "sdpa_both": both(F.scaled_dot_product_attention),
    }
    found = in_turns({name: stopwatch(each, device) for name, each in work.items()}, seconds)
    return GroupTimes(**{name: Times(tuple(rounds)) for name, rounds in found.items()})
