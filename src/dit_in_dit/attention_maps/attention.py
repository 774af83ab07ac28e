"""Measures of attention weights: entropy, weight of a query on itself, distance to the keys, and weight received.

Letters: N images, K times, T patches, S sub-patches per patch, L tokens per group (see `Tokens`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import log
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from dit_in_dit.attention_maps.plan import LevelPlan, MapsPlan
from dit_in_dit.attention_maps.tokens import Tokens, inner_tokens, outer_tokens
from dit_in_dit.data.picture import Array
from dit_in_dit.inspection.hooks import attentions
from dit_in_dit.model.layers import attention_weights
from dit_in_dit.model.mixers import PatchMixer
from dit_in_dit.model.nested import NestedDiT

MOST_WEIGHTS = 2**22  # most attention weights in memory at a time; more exceed the processor's cache and are slower
MOST_ROWS = 256  # most queries at a time whose weights on tokens of time and class are summed
NOTHING = np.zeros(0, np.float32)


@dataclass(frozen=True)
class AttentionMeasures:
    """The measures of `LevelAttention` for one block and one image.

    `entropy`, `own` and `distance` are (heads, T), `received` is (heads, tokens of the image), `average` is
    (heads, S, S), `squares` is (heads,), `inside` is (heads, T, S, S) and `reach` is (heads, T, L).
    """

    entropy: Array
    own: Array
    distance: Array
    received: Array
    average: Array
    squares: Array
    inside: Array
    reach: Array


@dataclass(frozen=True)
class LevelAttention(AttentionMeasures):
    """The attention of one level.

    Attributes:
        entropy: entropy of a query's weights / log(L), mean over the queries of a patch, (N, K, layers, heads, T).
            1 is uniform attention, 0 is all weight on one token.
        own: weight of a query on itself; mean and shape as for entropy.
        distance: weighted mean distance from a query to its keys, in tokens; mean and shape as for entropy.
        received: sum of the weights that a token receives from all queries, (..., tokens of the image). The mean over
            tokens is 1.
        average: weights among the tokens of one patch, mean over images and patches, (K, layers, heads, S, S).
        squares: mean square of the weights among the tokens of one patch, over images, patches and times,
            (layers, heads).
        inside: weights among the tokens of each patch, (..., T, S, S); empty if S is 1.
        reach: weights from a patch to the tokens of its group, mean over the patch's queries, (..., T, L); empty if
            L equals S.
        blocks: names of the level's blocks.
        beside: share of attention that patches give to tokens of time and class. All else is renormalised without it.
        plan: layers and heads for which `received`, `inside` and `reach` are kept. Their shape is
            (images, times, layers, heads or 1, ...), with the images and times of `MapsPlan`.
    """

    blocks: tuple[str, ...]
    tokens: Tokens
    plan: LevelPlan
    beside: float = 0.0

    def variance(self) -> dict[str, float]:
        """Decomposition of the variance of the weights inside a patch, over all layers and heads.

        Shares sum to 1, or are zero if all weights are equal. position: variance between pairs of sub-patches. time:
        between times, for the same pair. content: between patches and images, for the same pair and time.
        """
        mean = self.average.mean(0)  # layers heads S S
        total = (self.squares - mean.mean((-2, -1)) ** 2).sum()
        position, time = mean.var((-2, -1)).sum(), self.average.var(0).mean((-2, -1)).sum()
        parts = {"position": position, "time": time, "content": total - position - time}
        return {name: float(part / max(total, 1e-12)) for name, part in parts.items()}


def measure_attention(q: Tensor, k: Tensor, tokens: Tokens, *, matrices: bool = True) -> AttentionMeasures:
    """Measure the attention of queries and keys (groups, heads, L, d), `MOST_WEIGHTS` weights at a time; without
    `matrices`, `inside` and `reach` are empty."""
    groups, heads, length, _ = q.shape
    s, patches = tokens.per_patch, tokens.patches.size

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=q.device)

    entropy, own, distance = (zeros(groups, heads, length // s) for _ in range(3))
    received, average, squares = zeros(groups, heads, length), zeros(heads, s, s), zeros(heads)
    inside, reach = (zeros(groups, heads, length // s, *rest) if matrices else zeros(0) for rest in ((s, s), (length,)))
    for at, rows in _chunks(groups, heads, length, s):
        weights = attention_weights(q[at, :, rows].float(), k[at].float())  # groups heads rows L
        received[at] += weights.sum(-2)
        here = at, slice(None), slice(rows.start // s, rows.stop // s)
        of_patch = rearrange(weights, "g h (b s) l -> g h b s l", s=s)
        entropy[here] = torch.special.entr(of_patch).sum(-1).mean(-1) / log(max(length, 2))
        own[here] = rearrange(weights.diagonal(rows.start, 2, 3), "g h (b s) -> g h b s", s=s).mean(-1)
        away = tokens.distances(rows).to(weights)
        distance[here] = torch.einsum("ghbsl,bsl->ghb", of_patch, away.view(-1, s, length)) / s
        keys = rearrange(of_patch, "g h b s (c u) -> g h b s c u", u=s)
        blocks = keys.diagonal(rows.start // s, 2, 4)  # groups heads S S patches: weights within each patch
        average += blocks.sum((0, -1)) / patches
        squares += blocks.square().sum((0, 2, 3, 4)) / (patches * s * s)
        if matrices:
            inside[here], reach[here] = blocks.movedim(-1, 2), of_patch.mean(3)

    def in_order(values: Tensor, numbers: NDArray[np.int64]) -> Array:
        """Reorder (groups, heads, L or L / S, ...) to (heads, tokens or patches of the image, ...)."""
        return values.transpose(0, 1).flatten(1, 2)[:, np.argsort(numbers.ravel())].cpu().numpy()

    return AttentionMeasures(
        entropy=in_order(entropy, tokens.patches),
        own=in_order(own, tokens.patches),
        distance=in_order(distance, tokens.patches),
        received=in_order(received, tokens.places),
        average=average.cpu().numpy(),
        squares=squares.cpu().numpy(),
        inside=in_order(inside, tokens.patches) if matrices else NOTHING,
        reach=in_order(reach, tokens.patches) if matrices else NOTHING,
    )


def _chunks(groups: int, heads: int, length: int, per_patch: int) -> Iterator[tuple[slice, slice]]:
    """Slices of groups and of queries with at most `MOST_WEIGHTS` weights, but with at least one whole patch."""
    fit = max(1, MOST_WEIGHTS // (heads * length**2))
    rows = length
    if heads * length**2 > MOST_WEIGHTS:
        rows = max(1, MOST_WEIGHTS // (heads * length * per_patch)) * per_patch
    for group in range(0, groups, fit):
        for row in range(0, length, rows):
            yield slice(group, min(group + fit, groups)), slice(row, min(row + rows, length))


class LevelRecorder:
    """Accumulator of the measures of one level, filled block by block for each image and time.

    It keeps `received`, `inside` and `reach` for the plan's recordings, and sums of `average` and `squares`.
    """

    def __init__(
        self, blocks: tuple[str, ...], tokens: Tokens, level: LevelPlan, plan: MapsPlan, shape: tuple[int, int]
    ) -> None:
        self.blocks, self.tokens, self.level, self.shape = blocks, tokens, level, shape
        self.kept = plan.images, plan.times, level.layers
        self.measures: dict[tuple[int, ...], AttentionMeasures] = {}  # by image, time and layer
        self.average: dict[tuple[int, ...], Any] = defaultdict(int)  # by time and layer, (heads, S, S)
        self.squares: dict[int, Any] = defaultdict(int)  # by layer, (heads,)
        self.beside: list[float] = []  # shares of tokens of time and class

    def add(self, block: str, q: Tensor, k: Tensor, image: int, time: int) -> None:
        """Measure a block's queries and keys (1, groups, heads, L, d), L the patches after tokens of time and class."""
        if lead := q.shape[-2] - self.tokens.length:
            rows = torch.split(q[0, :, :, lead:].float(), MOST_ROWS, dim=-2)
            shares = [attention_weights(part, k[0].float())[..., :lead].sum(-1) for part in rows]
            self.beside.append(torch.cat(shares, dim=-1).mean().item())
            q, k = q[..., lead:, :], k[..., lead:, :]
        layer = self.blocks.index(block)
        is_kept = all(number in kept for number, kept in zip((image, time, layer), self.kept, strict=True))
        measures = measure_attention(q[0], k[0], self.tokens, matrices=is_kept and self.level.matrices)
        self.average[time, layer] += measures.average / self.shape[0]
        self.squares[layer] += measures.squares / (self.shape[0] * self.shape[1])
        arrays = {}
        for name in ("received", "inside", "reach"):
            values = getattr(measures, name) if is_kept else NOTHING
            arrays[name] = values if self.level.heads or not values.size else values.mean(0, keepdims=True)
        self.measures[image, time, layer] = replace(measures, average=NOTHING, squares=NOTHING, **arrays)

    def result(self) -> LevelAttention:
        """All measures, stacked."""
        layers, s = range(len(self.blocks)), self.tokens.per_patch
        every = range(self.shape[0]), range(self.shape[1]), layers

        def stack(name: str, axes: Sequence[Sequence[int]]) -> Array:
            arrays = np.stack([getattr(self.measures[at], name) for at in product(*axes)])
            return arrays.reshape(*map(len, axes), *arrays.shape[1:])

        return LevelAttention(
            blocks=self.blocks,
            tokens=self.tokens,
            entropy=stack("entropy", every),
            own=stack("own", every),
            distance=stack("distance", every),
            average=np.stack([np.stack([self.average[k, layer] for layer in layers]) for k in every[1]]),
            squares=np.stack([self.squares[layer] for layer in layers]),
            plan=self.level,
            beside=float(np.mean(self.beside)) if self.beside else 0.0,
            received=stack("received", self.kept),
            inside=stack("inside", self.kept) if self.level.matrices and s > 1 else NOTHING,
            reach=stack("reach", self.kept) if self.level.matrices and self.tokens.length > s else NOTHING,
        )


def level_recorders(model: NestedDiT, plan: MapsPlan, shape: tuple[int, int]) -> dict[str, LevelRecorder]:
    """A recorder for each level that has attention, by level name; `shape` is (N, K)."""
    modules, recorders = attentions(model), {}
    for name, level in (("inner", plan.inner), ("outer", plan.outer)):
        blocks = tuple(block for block in modules if block.startswith(name))
        if blocks and level.layers:  # none where the mixer says why its attention is not shown
            mixer = modules[blocks[0]]
            tokens = inner_tokens(model.config, mixer) if isinstance(mixer, PatchMixer) else outer_tokens(model.config)
            recorders[name] = LevelRecorder(blocks, tokens, level, plan, shape)
    return recorders
