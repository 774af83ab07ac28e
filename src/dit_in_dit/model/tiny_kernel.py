"""The Triton kernels of `tiny`, imported only where they run: Triton need not be installed.

A program's tile has PER groups of L rows, one row per token, and D channels. L is the length and D the width of a head,
each rounded up to a power of two. Scores between rows of different groups are masked. The masked products cost no time:
a tensor core multiplies whole tiles, and memory bandwidth is the bottleneck.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # fewest rows of a tile; a tensor core multiplies 16 rows at once


@triton.jit
def _tile(group, token, heads, stride_b, stride_h, stride_l, D: tl.constexpr):
    """Offsets (rows, D) in a tensor (B, heads, length, width) whose last axis is contiguous."""
    row = (group // heads).to(tl.int64) * stride_b + (group % heads) * stride_h + token * stride_l
    return row[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def _weights(q, k, group, token, length, scale):
    """Softmax over the tokens of each row's group, in float32."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    seen = (group[:, None] == group[None, :]) & (token < length)[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def forward(
    q_at, k_at, v_at, stride_b, stride_h, stride_l,  # B heads length width
    out_at, out_b, out_h, out_l,
    groups, heads, length, width, scale, PER: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Attention of PER groups."""
    group, token = tl.program_id(0) * PER + tl.arange(0, PER * L) // L, tl.arange(0, PER * L) % L
    real = ((group < groups) & (token < length))[:, None] & (tl.arange(0, D) < width)[None, :]
    at = _tile(group, token, heads, stride_b, stride_h, stride_l, D)
    q, k, v = tl.load(q_at + at, real, 0.0), tl.load(k_at + at, real, 0.0), tl.load(v_at + at, real, 0.0)
    weights = _weights(q, k, group, token, length, scale)
    out = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    tl.store(out_at + _tile(group, token, heads, out_b, out_h, out_l, D), out.to(v.dtype), real)


@triton.jit
def backward(
    q_at, k_at, v_at, stride_b, stride_h, stride_l,  # B heads length width
    grad_at, dq_at, dk_at, dv_at, out_b, out_h, out_l,
    groups, heads, length, width, scale, PER: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of `forward`. The weights of a group fit into one tile, so they are recomputed."""
    group, token = tl.program_id(0) * PER + tl.arange(0, PER * L) // L, tl.arange(0, PER * L) % L
    real = ((group < groups) & (token < length))[:, None] & (tl.arange(0, D) < width)[None, :]
    at = _tile(group, token, heads, stride_b, stride_h, stride_l, D)
    q, k, v = tl.load(q_at + at, real, 0.0), tl.load(k_at + at, real, 0.0), tl.load(v_at + at, real, 0.0)
    at = _tile(group, token, heads, out_b, out_h, out_l, D)
    grad = tl.load(grad_at + at, real, 0.0)
    weights = _weights(q, k, group, token, length, scale)
    dv = tl.dot(tl.trans(weights.to(v.dtype)), grad, input_precision="ieee")
    dweights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    dscores = weights * (dweights - tl.sum(weights * dweights, 1)[:, None]) * scale
    dq = tl.dot(dscores.to(k.dtype), k, input_precision="ieee")
    dk = tl.dot(tl.trans(dscores.to(q.dtype)), q, input_precision="ieee")
    tl.store(dq_at + at, dq.to(q.dtype), real)
    tl.store(dk_at + at, dk.to(k.dtype), real)
    tl.store(dv_at + at, dv.to(v.dtype), real)


def launch(kernel: Any, read: tuple[Tensor, Tensor, Tensor], others: tuple[Tensor, ...]) -> None:
    """Run a kernel on tensors (B, heads, L, d). Queries, keys and values have one memory layout; the other tensors have
    a second layout."""
    batch, heads, length, width = read[0].shape
    rows = triton.next_power_of_2(length)
    channels = max(16, triton.next_power_of_2(width))
    per = max(1, ROWS // rows)
    groups = batch * heads
    kernel[(triton.cdiv(groups, per),)](
        *read, *read[0].stride()[:3], *others, *others[0].stride()[:3],
        groups, heads, length, width, width**-0.5, PER=per, L=rows, D=channels,
    )  # fmt: skip
