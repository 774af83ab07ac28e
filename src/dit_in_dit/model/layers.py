"""Layers of both levels: attention, block and head, fixed position."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_in_dit.model.dropout import with_dropout
from dit_in_dit.model.fused import fuses, norm_modulate
from dit_in_dit.model.gelu import in_transform
from dit_in_dit.model.kernels import kernels_of
from dit_in_dit.model.mlps import Mlp
from dit_in_dit.model.modulation import BlockModulation, modulate
from dit_in_dit.model.norms import EPS, Norm
from dit_in_dit.model.recompute import recomputes_selectively
from dit_in_dit.model.rope import Rope
from dit_in_dit.model.tiny import packed_tiny_attention, tiny_attention, tiny_fits, unpack

# Limits of PyTorch's attention kernels, and the devices that have them. A launch takes at most 65,535 sequences, the
# limit of CUDA's grid (PyTorch issues 146704 and 142228) and of cuDNN's attention (PyTorch 181235). FlashAttention's
# backward pass sums gradients of queries in a buffer with 32-bit indices, padded to tiles of 128 tokens.
LIMITED = frozenset({"cuda"})
MOST_SEQUENCES, MOST_NUMBERS, ROWS = 65_535, 2**31, 128


def most_sequences(heads: int, length: int, width: int) -> int:
    """Largest number of sequences that every kernel takes in one call, for `length` queries and heads of `width`."""
    rows = -(-length // ROWS) * ROWS
    channels = -(-width // 32) * 32 if width <= 192 else 256  # FlashAttention rounds widths up in this way
    return max(1, min(MOST_SEQUENCES, MOST_NUMBERS // (heads * rows * channels)))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's softmax attention, in the fewest chunks of equal size that respect the kernels' limits."""
    if q.device.type not in LIMITED or len(q) <= (most := most_sequences(*q.shape[1:])):
        return F.scaled_dot_product_attention(q, k, v)
    size = -(-len(q) // -(-len(q) // most))
    chunks = zip(*(torch.split(part, size) for part in (q, k, v)), strict=True)
    # Joined in the memory layout (B, L, heads, d), which the next linear layer reads.
    return torch.cat([F.scaled_dot_product_attention(*chunk).transpose(1, 2) for chunk in chunks]).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, q (B, heads, L, d), k and v (B, heads, L', d) -> (B, heads, L, d).

    The kernel is the fastest that was measured (docs/decisions/benchmark.md).
    """
    if in_transform():  # most kernels have no forward-mode derivative, and vmap calls some once per example
        return attention_weights(q, k) @ v
    if is_tiny(q, k):
        return tiny_attention(q, k, v)
    return sdpa(q, k, v)


def is_tiny(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel for groups of a few tokens computes their attention."""
    return k.shape[-2] <= kernels_of(q.device).tiny_up_to and tiny_fits(q, k)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights of `attend`, (B, heads, L, L'); rows sum to one. Slower than the kernels."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)


class QkNorm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019) over a head's channels, with one learned scale per channel for queries and
    another for keys. Larger inputs then do not sharpen the attention (Dehghani et al. 2023, ViT-22B)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        parts = ((q, self.query), (k, self.key))
        # In the dtype of the values: CUDA's autocast computes norms in float32 and does not cast attention's inputs.
        q, k = (F.rms_norm(x, x.shape[-1:], scale.to(x.dtype), EPS).to(x.dtype) for x, scale in parts)
        return q, k


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, D) -> (B, L, D); `rope` turns queries and keys by their positions, those of
    the tokens' `places` (B, L) if given."""

    stacked: ClassVar[Mapping[str, int]] = {"qkv": 3}  # matrices in the weight of a layer

    def __init__(
        self, width: int, num_heads: int, *, qk_norm: bool = False, bias: bool = True, rope: Rope | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.qk_norm = QkNorm(width // num_heads) if qk_norm else None
        self.rope = rope
        self.proj = nn.Linear(width, width)

    def packed(self, x: Tensor) -> Tensor:
        """Queries, keys and values in one tensor, (B, L, 3, heads, d), without norm and rotation."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1))

    def heads(self, x: Tensor, *places: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (B, heads, L, d)."""
        return self._apart(self.packed(x), *places)

    def _apart(self, qkv: Tensor, *places: Tensor) -> tuple[Tensor, ...]:
        q, k, v = unpack(qkv)  # in this order of axes, which saves a copy in the backward pass
        if self.qk_norm:
            q, k = self.qk_norm(q, k)
        if self.rope:
            q, k = self.rope(q, k, *places)
        return q, k, v

    def forward(self, x: Tensor, *places: Tensor) -> Tensor:
        qkv = self.packed(x)
        if self._is_packed_tiny(qkv):
            return self.proj(packed_tiny_attention(qkv).transpose(1, 2).flatten(2))
        return self.proj(attend(*self._apart(qkv, *places)).transpose(1, 2).flatten(2))  # B L D

    def _is_packed_tiny(self, qkv: Tensor) -> bool:
        if self.qk_norm or self.rope or qkv.shape[1] > kernels_of(qkv.device).tiny_up_to or in_transform():
            return False
        return is_tiny(*unpack(qkv)[:2])


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the width without parameters, for tokens that pass between the levels."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class Block(nn.Module):
    """Transformer block: `mix` mixes the tokens, then `mlp` the channels, each modulated by the condition (with
    adaLN-Zero in DiT, Peebles & Xie 2023, figure 3).

    The condition is broadcast over the tokens, so that one row modulates all tokens of its group. Outer tokens
    (N, T, D) take conditions (N, 1, K); inner tokens (N, T, S, E) take (N, 1, 1, K), (N, T, 1, K) or (N, T, S, K).
    `places` goes to `mix`: rows of its rotary positions.
    """

    selective = False  # train.recompute=selective
    dropout = 0.0  # rate, in training only

    def __init__(self, mix: nn.Module, mlp: Mlp, norms: tuple[Norm, Norm], modulation: BlockModulation) -> None:
        super().__init__()
        self.norm_mix, self.norm_mlp = norms
        self.branches = nn.ModuleDict({"mix": mix, "mlp": mlp})
        self.modulation = modulation

    @recomputes_selectively
    def forward(self, x: Tensor, c: Tensor, keys: Tensor | None = None, *, places: Tensor | None = None) -> Tensor:
        """The block's output; `keys` (N, 4): the branches have dropout, from `training.dropout`."""
        vectors, count = self.modulation(c), self.modulation.per_branch
        mix: Callable[[Tensor], Tensor] = self.branches["mix"]
        mlp = _with_rows(self.branches["mlp"], c)
        if places is not None:
            mix = lambda x: self.branches["mix"](x, places)  # noqa: E731  # positional: hooks do not see keywords
        if keys is not None:
            mix, mlp = with_dropout(mix, keys[:, :2], self.dropout), with_dropout(mlp, keys[:, 2:], self.dropout)
        x = self.modulation.branch(x, self.norm_mix, mix, *vectors[:count])
        return self.modulation.branch(x, self.norm_mlp, mlp, *vectors[count:])


class MlpBlock(nn.Module):
    """Block without mixing: tokens do not see each other. Shapes as for `Block`."""

    selective = False  # train.recompute=selective
    dropout = 0.0

    def __init__(self, mlp: Mlp, norm: Norm, modulation: BlockModulation) -> None:
        super().__init__()
        self.norm_mlp = norm
        self.branches = nn.ModuleDict({"mlp": mlp})
        self.modulation = modulation

    @recomputes_selectively
    def forward(self, x: Tensor, c: Tensor, keys: Tensor | None = None) -> Tensor:
        mlp = _with_rows(self.branches["mlp"], c)
        if keys is not None:
            mlp = with_dropout(mlp, keys[:, 2:], self.dropout)
        return self.modulation.branch(x, self.norm_mlp, mlp, *self.modulation(c))


def _with_rows(mlp: nn.Module, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """The MLP as a function of the tokens alone."""
    return partial(mlp, rows=rows) if mlp.reads_rows else mlp


class FinalLayer(nn.Module):
    """Norm, modulation if there is any, and a linear layer to pixels; x (..., D), c (..., K) -> (..., out)."""

    def __init__(self, width: int, out: int, norm: Norm, modulation: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm
        self.modulation = modulation
        self.linear = nn.Linear(width, out)

    def initialise(self) -> None:
        """Set all weights to zero, so that the prediction of a model with one or two heads starts at zero."""
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.modulation is None or not fuses(x, self.norm):
            x = self.norm(x)
            return self.linear(modulate(x, *self.modulation(c)) if self.modulation else x)
        shift, scale = self.modulation(c)
        if fuses(x, self.norm, shift, scale):
            return self.linear(norm_modulate(x, self.norm, shift, scale)[1])
        return self.linear(modulate(self.norm(x), shift, scale))


def sincos(width: int, rows: int, columns: int) -> Tensor:
    """Fixed 2-D sin-cos positions (rows * columns, width), as in MAE and DiT.

    The first half of the channels encodes the column, the second half the row. In each half sines precede cosines, at
    frequencies 10000^(-i / (width/4)).
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    column = torch.outer(torch.arange(columns, dtype=torch.float64), frequency)
    row = torch.outer(torch.arange(rows, dtype=torch.float64), frequency)
    column = torch.cat([column.sin(), column.cos()], dim=1).expand(rows, columns, -1)
    row = torch.cat([row.sin(), row.cos()], dim=1)[:, None].expand(rows, columns, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()
