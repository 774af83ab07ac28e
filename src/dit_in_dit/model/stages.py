"""Stages of the nested model: runs of outer or inner blocks, what passes between the levels, and the heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_in_dit.config.model import InnerConfig, ModelConfig, OuterConfig
from dit_in_dit.model.aggregate import Aggregator, Fusion, Refine, Spread
from dit_in_dit.model.condition import CONDITIONS, Condition, Conditioning
from dit_in_dit.model.embed import Unpatch
from dit_in_dit.model.layers import FinalLayer
from dit_in_dit.model.modulation import Modulation, SharedHead
from dit_in_dit.model.norms import NORMS

Run = Callable[..., Tensor]  # of a block and its arguments


def run_block(block: nn.Module, *arguments: Tensor, **keywords: Tensor) -> Tensor:
    """The block's output; activations are kept for the backward pass."""
    output: Tensor = block(*arguments, **keywords)
    return output


def _keys(condition: Conditioning, number: int) -> tuple[Tensor, ...]:
    """Dropout keys (N, 4) of a block; empty without dropout."""
    return () if condition.dropout is None else (condition.dropout[:, number],)


_recomputed: Run = partial(checkpoint, use_reentrant=False)


class State(NamedTuple):
    """What the stages change: outer tokens (N, T, D), inner tokens (N, T, S, E), the tokens of time and class (N, K, D)
    once they have joined, and the conditioning rows of the last inner stage."""

    outer: Tensor
    inner: Tensor
    tokens: Tensor | None = None
    rows: Tensor | None = None


class OuterStage(nn.Module):
    """Outer blocks, with attention among all patches, and with the tokens of time and class from block `start` on.

    `first`: number of the first block among all of the model, which chooses its dropout keys. In training, some patches
    may bypass blocks (see `Route`).
    """

    def __init__(
        self, blocks: Iterable[nn.Module], level: OuterConfig, *, recompute: bool, start: int | None, first: int
    ) -> None:
        super().__init__()
        self.run = _recomputed if recompute else run_block
        self.blocks, self.shared, self.start = nn.ModuleList(blocks), level.modulation == "shared", start
        self.first, self.has_places = first, level.rope != "none"
        self.name = f"outer*{len(self.blocks)}"

    def forward(self, state: State, condition: Conditioning) -> State:
        tokens, patches = state.tokens, state.outer.shape[1]
        row = condition.row(self.shared)[:, None]  # N 1 K
        x = state.outer if tokens is None else torch.cat([tokens, state.outer], dim=1)
        route = condition.route
        short = route.within(self.first, len(self.blocks)) if route else range(0)
        for number, block in enumerate(self.blocks):
            if number == self.start:
                x = torch.cat([condition.tokens, x], dim=1)  # type: ignore[list-item]
            keys = _keys(condition, self.first + number)
            if route is None or number not in short:
                x = self.run(block, x, row, *keys)
                continue
            if number == short[0]:
                x, before = route.enter(x, patches), x
            where = {"places": route.places(x.shape[1])} if self.has_places else {}
            x = self.run(block, x, row, *keys, **where)
            if number == short[-1]:
                x = route.leave(x, before, patches)
        if tokens is None and self.start is None:
            return State(x, state.inner, None, state.rows)
        tokens, outer = x[:, :-patches], x[:, -patches:]
        return State(outer, state.inner, tokens, state.rows)


class InnerStage(nn.Module):
    """Inner blocks, with adaLN driven by the condition's rows; `carries`: tokens of time and class go along."""

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        level: InnerConfig,
        condition: Condition | None,
        recompute: bool,
        carries: bool,
        first: int,
    ) -> None:
        super().__init__()
        self.run = _recomputed if recompute else run_block
        self.blocks, self.shared = nn.ModuleList(blocks), level.modulation == "shared"
        self.condition, self.carries, self.first = condition, carries, first
        self.name = f"inner*{len(self.blocks)}"

    def forward(self, state: State, condition: Conditioning) -> State:
        rows = condition.row(self.shared)[:, None, None]  # N 1 1 K
        if self.condition is not None:
            rows = self.condition(condition.time if self.condition.reads_time else condition.c, state.outer)
        x, tokens = state.inner, state.tokens  # N T S E
        if self.carries:
            x = torch.cat([tokens, x.flatten(1, 2)], dim=1)  # type: ignore[list-item]
        rows_of_blocks = rows.flatten(1, 2) if self.carries else rows
        for number, block in enumerate(self.blocks, self.first):
            x = self.run(block, x, rows_of_blocks, *_keys(condition, number))
        if self.carries:
            places = state.inner.shape[1] * state.inner.shape[2]
            tokens, x = x[:, :-places], x[:, -places:].view(state.inner.shape)
        return State(state.outer, x, tokens, rows)


class AggregateStage(nn.Module):
    """Inner to outer: one vector per patch, fused with the outer token."""

    name = "aggregate"

    def __init__(self, aggregate: Aggregator, fuse: Fusion) -> None:
        super().__init__()
        self.aggregate, self.fuse = aggregate, fuse

    def forward(self, state: State, condition: Conditioning) -> State:
        outer = self.fuse(state.outer, self.aggregate(state.inner))
        return State(outer, state.inner, state.tokens, state.rows)


class SpreadStage(nn.Module):
    """Outer to inner: each sub-patch token receives a message from its patch."""

    name = "spread"

    def __init__(self, spread: Spread) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, state: State, condition: Conditioning) -> State:
        tokens = state.tokens
        if tokens is not None and isinstance(self.spread, Refine):
            tokens = self.spread.carry(tokens)
        inner = self.spread(state.inner, state.outer, condition.c)
        return State(state.outer, inner, tokens, state.rows)


class Head(nn.Module):
    """Tokens of a level to the image: outer (N, T, D) or inner (N, T, S, E) -> (N, out_channels, H, W)."""

    def __init__(self, model: ModelConfig, name: str, title: str = "") -> None:
        super().__init__()
        level: OuterConfig | InnerConfig = getattr(model, name)
        self.name, self.is_inner, self.shared = title or f"{name} head", name == "inner", level.modulation == "shared"
        self.reads_rows = level.head_condition == "rows" and not self.shared
        rows = CONDITIONS[model.inner.condition].width(model) if self.reads_rows else model.outer.width
        modulation: nn.Module | None = SharedHead() if self.shared else None
        if not self.shared and level.head_condition != "none":
            modulation = Modulation(rows, level.width, 2)
        norm = NORMS[level.head_norm or level.norm](level.width)
        side = model.inner.sub_patch if self.is_inner else model.patch_size
        self.final = FinalLayer(level.width, side**2 * model.out_channels, norm, modulation)
        self.unpatch = Unpatch(model, is_inner=self.is_inner)

    def forward(self, state: State, condition: Conditioning) -> Tensor:
        row = condition.row(self.shared)[:, None]  # N 1 K
        if not self.is_inner:
            return self.unpatch(self.final(state.outer, row))
        return self.unpatch(self.final(state.inner, state.rows if self.reads_rows else row[:, None]))
