"""The Triton kernels of `tiny`, imported only where they run: Triton need not be installed.

A program's tile has PER groups of L rows, one row per token; L is the length of a group, rounded up to a power of two.
The channels of a head are in two tiles of powers of two, so that a head of 72 takes 64 + 8 and not 128: WIDE channels,
and NARROW more of which WIDTH - WIDE are real. Without a second tile, NARROW is 0. Sizes and the alignment ALIGN of all
rows, in elements, are known to the compiler, which then loads 16 bytes at once.

Scores between rows of different groups are masked. The masked products cost no time: a tensor core multiplies whole
tiles, and memory bandwidth is the bottleneck.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from math import gcd
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # fewest rows of a tile; a tensor core multiplies 16 rows at once
LEAST = 16  # fewest channels of a tile, for the same reason
WARPS = 2  # with more, a thread has less than 16 bytes of a tile of 32 rows and 16 channels in half precision


@triton.jit
def _rows(group, token, heads, stride_b, stride_h, stride_l, ALIGN: tl.constexpr):
    """Offsets of rows in a tensor (B, heads, length, width) whose last axis is contiguous."""
    row = (group // heads).to(tl.int64) * stride_b + (group % heads) * stride_h + token * stride_l
    return tl.multiple_of(row, ALIGN)


@triton.jit
def _load(at, row, real, FROM: tl.constexpr, TO: tl.constexpr, SIZE: tl.constexpr):
    """Channels FROM to TO of each row, in a tile of SIZE channels; zeros beyond them and in rows that are not real."""
    channel = tl.arange(0, SIZE)
    mask = real[:, None] if FROM + SIZE == TO else real[:, None] & (channel < TO - FROM)[None, :]
    return tl.load(at + row[:, None] + (FROM + channel)[None, :], mask, 0.0)


@triton.jit
def _store(at, row, real, value, FROM: tl.constexpr, TO: tl.constexpr, SIZE: tl.constexpr):
    """The reverse of `_load`."""
    channel = tl.arange(0, SIZE)
    mask = real[:, None] if FROM + SIZE == TO else real[:, None] & (channel < TO - FROM)[None, :]
    tl.store(at + row[:, None] + (FROM + channel)[None, :], value.to(at.dtype.element_ty), mask)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _softmax(scores, group, token, length):
    """Softmax over the tokens of each row's group, in float32."""
    seen = (group[:, None] == group[None, :]) & (token < length)[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def forward(
    q_at, k_at, v_at, stride_b, stride_h, stride_l,  # B heads length width
    out_at, out_b, out_h, out_l,
    groups, heads, length, scale, PER: tl.constexpr, L: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Attention of PER groups."""
    FIRST: tl.constexpr = WIDE if NARROW else WIDTH
    group, token = tl.program_id(0) * PER + tl.arange(0, PER * L) // L, tl.arange(0, PER * L) % L
    real = (group < groups) & (token < length)
    row = _rows(group, token, heads, stride_b, stride_h, stride_l, ALIGN)
    to = _rows(group, token, heads, out_b, out_h, out_l, ALIGN)
    q, k = _load(q_at, row, real, 0, FIRST, WIDE), _load(k_at, row, real, 0, FIRST, WIDE)
    v = _load(v_at, row, real, 0, FIRST, WIDE)
    scores = _dot(q, tl.trans(k))
    if NARROW:
        q, k = _load(q_at, row, real, WIDE, WIDTH, NARROW), _load(k_at, row, real, WIDE, WIDTH, NARROW)
        scores += _dot(q, tl.trans(k))
    weights = _softmax(scores * scale, group, token, length).to(v.dtype)
    _store(out_at, to, real, _dot(weights, v), 0, FIRST, WIDE)
    if NARROW:
        v = _load(v_at, row, real, WIDE, WIDTH, NARROW)
        _store(out_at, to, real, _dot(weights, v), WIDE, WIDTH, NARROW)


@triton.jit
def backward(
    q_at, k_at, v_at, stride_b, stride_h, stride_l,  # B heads length width
    grad_at, grad_b, grad_h, grad_l,
    dq_at, dk_at, dv_at, out_b, out_h, out_l,
    groups, heads, length, scale, PER: tl.constexpr, L: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradients of `forward`. The weights of a group fit into one tile, so they are recomputed."""
    FIRST: tl.constexpr = WIDE if NARROW else WIDTH
    group, token = tl.program_id(0) * PER + tl.arange(0, PER * L) // L, tl.arange(0, PER * L) % L
    real = (group < groups) & (token < length)
    row = _rows(group, token, heads, stride_b, stride_h, stride_l, ALIGN)
    come = _rows(group, token, heads, grad_b, grad_h, grad_l, ALIGN)
    to = _rows(group, token, heads, out_b, out_h, out_l, ALIGN)
    q, k = _load(q_at, row, real, 0, FIRST, WIDE), _load(k_at, row, real, 0, FIRST, WIDE)
    v = _load(v_at, row, real, 0, FIRST, WIDE)
    grad = _load(grad_at, come, real, 0, FIRST, WIDE)
    scores, dweights = _dot(q, tl.trans(k)), _dot(grad, tl.trans(v))
    if NARROW:
        q2, k2 = _load(q_at, row, real, WIDE, WIDTH, NARROW), _load(k_at, row, real, WIDE, WIDTH, NARROW)
        v2, grad2 = _load(v_at, row, real, WIDE, WIDTH, NARROW), _load(grad_at, come, real, WIDE, WIDTH, NARROW)
        scores += _dot(q2, tl.trans(k2))
        dweights += _dot(grad2, tl.trans(v2))
    weights = _softmax(scores * scale, group, token, length)
    dscores = (weights * (dweights - tl.sum(weights * dweights, 1)[:, None]) * scale).to(q.dtype)
    across, dacross = tl.trans(weights.to(q.dtype)), tl.trans(dscores)
    _store(dq_at, to, real, _dot(dscores, k), 0, FIRST, WIDE)
    _store(dk_at, to, real, _dot(dacross, q), 0, FIRST, WIDE)
    _store(dv_at, to, real, _dot(across, grad), 0, FIRST, WIDE)
    if NARROW:
        _store(dq_at, to, real, _dot(dscores, k2), WIDE, WIDTH, NARROW)
        _store(dk_at, to, real, _dot(dacross, q2), WIDE, WIDTH, NARROW)
        _store(dv_at, to, real, _dot(across, grad2), WIDE, WIDTH, NARROW)


def tiles(length: int, width: int) -> dict[str, int]:
    """Sizes of a program's tiles for groups of `length` tokens and heads of `width` channels."""
    rows = triton.next_power_of_2(length)
    wide = max(LEAST, 1 << (width.bit_length() - 1))
    narrow = max(LEAST, triton.next_power_of_2(width - wide)) if width > wide else 0
    if wide + narrow == 2 * wide:  # one tile is as large, with half the products
        wide, narrow = 2 * wide, 0
    return {"PER": max(1, ROWS // rows), "L": rows, "WIDTH": width, "WIDE": wide, "NARROW": narrow}


def launch(kernel: Any, *layouts: tuple[Tensor, ...]) -> None:
    """Run a kernel on tensors (B, heads, L, d). The tensors of each tuple have one memory layout."""
    batch, heads, length, width = layouts[0][0].shape
    sizes = tiles(length, width)
    strides = [tensors[0].stride()[:3] for tensors in layouts]
    align = gcd(width, 16 // layouts[0][0].element_size(), *(step for steps in strides for step in steps))
    groups = batch * heads
    arguments = [part for tensors, steps in zip(layouts, strides, strict=True) for part in (*tensors, *steps)]
    kernel[(triton.cdiv(groups, sizes["PER"]),)](
        *arguments, groups, heads, length, width**-0.5, **sizes, ALIGN=align, num_warps=WARPS
    )
