"""The nested diffusion transformer: a program of outer and inner stages, written as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.aggregate import AGGREGATORS, FUSIONS, SPREADS, AttentionPool, Spread
from dit_in_dit.model.condition import CONDITIONS, LabelEmbed, TimeEmbed
from dit_in_dit.model.embed import InnerEmbed, InnerUnpatch, NoEmbed, OuterEmbed, OuterPosition, OuterUnpatch
from dit_in_dit.model.layers import Attention, Block, FinalLayer, Modulation
from dit_in_dit.model.mixers import MIXERS, ConvMixer

Run = Callable[[Block, Tensor, Tensor], Tensor]


def _plainly(block: Block, x: Tensor, c: Tensor) -> Tensor:
    return block(x, c)


_recomputed: Run = partial(checkpoint, use_reentrant=False)


class OuterStage(nn.Module):
    """Outer blocks, each token seeing every other; outer (N, T, D), c (N, D)."""

    def __init__(self, blocks: list[Block], run: Run) -> None:
        super().__init__()
        self.blocks, self.run = nn.ModuleList(blocks), run
        self.name = f"outer*{len(blocks)}"

    def forward(self, outer: Tensor, inner: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        rows = c[:, None]  # N 1 D
        for block in self.blocks:
            outer = self.run(block, outer, rows)  # type: ignore[arg-type]
        return outer, inner


class InnerStage(nn.Module):
    """Inner blocks, driven by the condition's rows; inner (N, T, S, E), c (N, D)."""

    def __init__(self, blocks: list[Block], condition: nn.Module, run: Run) -> None:
        super().__init__()
        self.blocks, self.condition, self.run = nn.ModuleList(blocks), condition, run
        self.name = f"inner*{len(blocks)}"

    def forward(self, outer: Tensor, inner: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.condition(c, outer)  # N 1|T 1|S K
        for block in self.blocks:
            inner = self.run(block, inner, rows)  # type: ignore[arg-type]
        return outer, inner


class AggregateStage(nn.Module):
    """Inner to outer: one vector per patch, fused with the outer token."""

    name = "aggregate"

    def __init__(self, aggregate: nn.Module, fuse: nn.Module) -> None:
        super().__init__()
        self.aggregate, self.fuse = aggregate, fuse

    def forward(self, outer: Tensor, inner: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.fuse(outer, self.aggregate(inner)), inner


class SpreadStage(nn.Module):
    """Outer to inner: each sub-patch is told by its patch."""

    name = "spread"

    def __init__(self, spread: Spread) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, outer: Tensor, inner: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return outer, self.spread(inner, outer, c)


class OuterHead(nn.Module):
    """Outer tokens to the image; (N, T, D) -> (N, out_channels, H, W)."""

    name = "outer head"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width = model.outer.width
        self.final = FinalLayer(width, width, model.patch_size**2 * model.out_channels)
        self.unpatch = OuterUnpatch(model)

    def forward(self, outer: Tensor, inner: Tensor, c: Tensor) -> Tensor:
        return self.unpatch(self.final(outer, c[:, None]))


class InnerHead(nn.Module):
    """Inner tokens to the image, driven by c once per image; (N, T, S, E) -> (N, out_channels, H, W)."""

    name = "inner head"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.final = FinalLayer(model.inner.width, model.outer.width, model.inner.sub_patch**2 * model.out_channels)
        self.unpatch = InnerUnpatch(model)

    def forward(self, outer: Tensor, inner: Tensor, c: Tensor) -> Tensor:
        return self.unpatch(self.final(inner, c[:, None, None]))


class NestedDiT(nn.Module):
    """A DiT (Peebles & Xie 2023) whose patches hold an inner transformer over their sub-patches.

    `model.program` says which blocks run in which order. Between an inner and an outer stage the inner
    tokens are aggregated and fused with the outer ones; between an outer and an inner stage the outer
    tokens are spread over their sub-patches. A program that ends in inner blocks adds an inner head to
    the outer one (with fuse=replace it stands in its place). `outer*N` alone is DiT, with its parameters.

    Blocks are named by level and order (`outer_blocks.3`), whatever the program: the weights of a plain
    DiT load into any nested model around it with `load_state_dict(..., strict=False)`.

    Args:
        model: the architecture.
        recompute: levels (none, inner, outer, both) whose blocks recompute activations in the backward pass.
    """

    def __init__(self, model: ModelConfig, *, recompute: str = "none") -> None:
        super().__init__()
        self.config = model
        self.outer_embed = OuterEmbed(model) if model.reads_patches else OuterPosition(model)
        self.time_embed = TimeEmbed(model.outer.width, model.time_embed)
        self.label_embed = LabelEmbed(model.num_classes, model.outer.width)
        self.outer_blocks = nn.ModuleList(_outer_block(model) for _ in range(model.blocks("outer")))
        self.inner_blocks = nn.ModuleList(_inner_block(model) for _ in range(model.blocks("inner")))
        self.aggregates, self.fuses, self.spreads, self.conditions = (nn.ModuleList() for _ in range(4))
        mixer = MIXERS[model.inner.mixer]
        wide = mixer is not None and mixer.wide
        self.inner_embed = InnerEmbed(model, wide=wide) if self.inner_blocks else NoEmbed()
        # Tuples, not module lists: every block is registered once, above, under a name that no order changes.
        self.stages = tuple(self._assemble(model, recompute))
        self.heads: tuple[OuterHead | InnerHead, ...] = tuple(self._finish(model))
        initialise(self)

    def _assemble(self, model: ModelConfig, recompute: str) -> Iterator[nn.Module]:
        """The program's stages, with aggregate and spread between levels."""
        outer_run = _recomputed if recompute in ("outer", "both") else _plainly
        inner_run = _recomputed if recompute in ("inner", "both") else _plainly
        outer, inner = iter(self.outer_blocks), iter(self.inner_blocks)
        previous = None
        for level, count in model.program:
            if level == "inner":
                if previous == "outer":
                    self.spreads.append(spread := SPREADS[model.inner.spread](model))
                    yield SpreadStage(spread)
                self.conditions.append(condition := CONDITIONS[model.inner.condition](model))
                yield InnerStage(_take(inner, count), condition, inner_run)
            else:
                if previous == "inner":
                    self.aggregates.append(aggregate := AGGREGATORS[model.inner.aggregate](model))
                    self.fuses.append(fuse := FUSIONS[model.inner.fuse](model))
                    yield AggregateStage(aggregate, fuse)
                yield OuterStage(_take(outer, count), outer_run)
            previous = level

    def _finish(self, model: ModelConfig) -> Iterator[OuterHead | InnerHead]:
        ends_inner = model.program[-1][0] == "inner"
        if not (ends_inner and model.inner.fuse == "replace"):
            self.outer_head = OuterHead(model)
            yield self.outer_head
        if ends_inner:
            self.inner_head = InnerHead(model)
            yield self.inner_head

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from noisy images.

        Args:
            x: noisy images (N, C, H, W), in the type of the weights.
            t: times (N,) in [0, 1], in float32 for any weights; 1 is pure noise.
            y: classes (N,), int64 in [0, num_classes]; num_classes, or None for all, means no class.

        Returns:
            The prediction (N, C, H, W); what it stands for is the training's choice. With `learn_variance`
            (N, 2C, H, W): the prediction, then the fraction that says the variance.

        Raises:
            ValueError: x is not of the configured channels and size.
        """
        if x.shape[1:] != (self.config.channels, *self.config.image_size):
            raise ValueError(
                f"x must be (N, {self.config.channels}, {self.config.image_size[0]}, "
                f"{self.config.image_size[1]}): got {tuple(x.shape)}"
            )
        outer = self.outer_embed(x)  # N T D
        inner = self.inner_embed(x)  # N T S E
        c = self.time_embed(t, x.dtype) + self.label_embed(y)  # N D
        for stage in self.stages:  # the program, one arrow per stage
            outer, inner = stage(outer, inner, c)
        return reduce(torch.add, [head(outer, inner, c) for head in self.heads])  # N C H W


def part_of(name: str) -> str:
    """The part of the model that a parameter's name lies in: outer_blocks, inner_blocks, aggregate, spread ..."""
    part = name.split(".", maxsplit=1)[0]
    return part if part.endswith("_blocks") else part.removesuffix("s")  # spreads.0: the part "spread"


def _outer_block(model: ModelConfig) -> Block:
    outer = model.outer
    attention = Attention(outer.width, outer.num_heads, qk_norm=model.qk_norm)
    return Block(outer.width, outer.width, attention, outer.mlp_ratio, model.mlp_norm_eps)


def _inner_block(model: ModelConfig) -> Block:
    inner, mixer = model.inner, MIXERS[model.inner.mixer]
    rows = CONDITIONS[inner.condition].width(model)
    return Block(inner.width, rows, mixer(model) if mixer else None, inner.mlp_ratio, model.mlp_norm_eps)


def _take(blocks: Iterator[nn.Module], count: int) -> list[Block]:
    return [next(blocks) for _ in range(count)]  # type: ignore[misc]


@torch.no_grad()
def initialise(model: NestedDiT) -> None:
    """DiT's initialisation, and its like for the inner level."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # the fused qkv, and a convolution, as one matrix
            nn.init.zeros_(cast(Tensor, module.bias))
    for module in model.modules():
        match module:
            case TimeEmbed():
                nn.init.normal_(cast(nn.Linear, module.mlp[0]).weight, std=0.02)
                nn.init.normal_(cast(nn.Linear, module.mlp[2]).weight, std=0.02)
            case LabelEmbed():
                nn.init.normal_(module.table.weight, std=0.02)
            case InnerEmbed():
                nn.init.normal_(module.position, std=0.02)  # like any learned position
            case AttentionPool():
                nn.init.normal_(module.query, std=0.02)  # nearly even weights: it starts near the mean
            case ConvMixer():
                nn.init.normal_(module.conv.weight, std=1 / 3)  # nine taps: keeps the variance of what it mixes
            case Modulation():
                nn.init.zeros_(module.linear.weight)  # adaLN-Zero: every block starts as the identity
            case FinalLayer():
                nn.init.zeros_(module.linear.weight)  # the prediction starts at zero, with one head or two
