"""The nested diffusion transformer: a program of outer and inner stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, reduce
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_in_dit.config.model import ModelConfig, OuterConfig
from dit_in_dit.model.aggregate import AGGREGATORS, FUSIONS, SPREADS, Aggregator, Fusion, Refine, Spread
from dit_in_dit.model.condition import (
    CONDITIONS,
    TIME_EMBEDS,
    Condition,
    Conditioning,
    ConditionTokens,
    LabelEmbed,
)
from dit_in_dit.model.embed import InnerEmbed, InnerUnpatch, NoEmbed, OuterEmbed, OuterPosition, OuterUnpatch
from dit_in_dit.model.layers import Attention, Block, FinalLayer, MlpBlock
from dit_in_dit.model.mixers import MIXERS
from dit_in_dit.model.mlps import MLPS, Mlp
from dit_in_dit.model.modulation import MODULATIONS, BlockModulation, Modulation, SharedHead
from dit_in_dit.model.norms import NORMS, Norm
from dit_in_dit.model.rope import ROPES, places
from dit_in_dit.model.split import SplitOutput

AnyBlock = Block | MlpBlock
Run = Callable[[AnyBlock, Tensor, Tensor], Tensor]


def run_block(block: AnyBlock, x: Tensor, c: Tensor) -> Tensor:
    """The block's output; activations are kept for the backward pass."""
    return block(x, c)


_recomputed: Run = partial(checkpoint, use_reentrant=False)


class State(NamedTuple):
    """What the stages change: outer tokens (N, T, D), inner tokens (N, T, S, E), the tokens of time and class (N, K, D)
    once they have joined, and the conditioning rows of the last inner stage."""

    outer: Tensor
    inner: Tensor
    tokens: Tensor | None = None
    rows: Tensor | None = None


class OuterStage(nn.Module):
    """Outer blocks, with attention among all patches, and with the tokens of time and class from block `start` on."""

    def __init__(self, blocks: Iterable[nn.Module], run: Run, *, shared: bool, start: int | None) -> None:
        super().__init__()
        self.blocks, self.run, self.shared, self.start = nn.ModuleList(blocks), run, shared, start
        self.name = f"outer*{len(self.blocks)}"

    def forward(self, state: State, condition: Conditioning) -> State:
        tokens, patches = state.tokens, state.outer.shape[1]
        row = condition.row(self.shared)[:, None]  # N 1 K
        x = state.outer if tokens is None else torch.cat([tokens, state.outer], dim=1)
        for number, block in enumerate(self.blocks):
            if number == self.start:
                x = torch.cat([condition.tokens, x], dim=1)  # type: ignore[list-item]
            x = self.run(block, x, row)  # type: ignore[arg-type]
        if tokens is None and self.start is None:
            return state._replace(outer=x)
        tokens, outer = x[:, :-patches], x[:, -patches:]
        return state._replace(outer=outer, tokens=tokens)


class InnerStage(nn.Module):
    """Inner blocks, with adaLN driven by the condition's rows; `carries`: tokens of time and class go along."""

    def __init__(
        self, blocks: Iterable[nn.Module], condition: Condition | None, run: Run, *, shared: bool, carries: bool
    ) -> None:
        super().__init__()
        self.blocks, self.condition, self.run = nn.ModuleList(blocks), condition, run
        self.shared, self.carries = shared, carries
        self.name = f"inner*{len(self.blocks)}"

    def forward(self, state: State, condition: Conditioning) -> State:
        rows = condition.row(self.shared)[:, None, None]  # N 1 1 K
        if self.condition is not None:
            rows = self.condition(condition.time if self.condition.reads_time else condition.c, state.outer)
        x, tokens = state.inner, state.tokens  # N T S E
        if self.carries:
            x, rows = torch.cat([tokens, x.flatten(1, 2)], dim=1), rows.flatten(1, 2)  # type: ignore[list-item]
        for block in self.blocks:
            x = self.run(block, x, rows)  # type: ignore[arg-type]
        if self.carries:
            places = state.inner.shape[1] * state.inner.shape[2]
            tokens, x = x[:, :-places], x[:, -places:].view(state.inner.shape)
        return state._replace(inner=x, tokens=tokens, rows=rows)


class AggregateStage(nn.Module):
    """Inner to outer: one vector per patch, fused with the outer token."""

    name = "aggregate"

    def __init__(self, aggregate: Aggregator, fuse: Fusion) -> None:
        super().__init__()
        self.aggregate, self.fuse = aggregate, fuse

    def forward(self, state: State, condition: Conditioning) -> State:
        return state._replace(outer=self.fuse(state.outer, self.aggregate(state.inner)))


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
        return state._replace(inner=self.spread(state.inner, state.outer, condition.c), tokens=tokens)


def _head_modulation(level: OuterConfig, condition: int) -> nn.Module | None:
    """The modulation of a level's head, driven by rows of width `condition`."""
    if level.modulation == "shared":
        return SharedHead()
    return None if level.head_condition == "none" else Modulation(condition, level.width, 2)


class OuterHead(nn.Module):
    """Outer tokens to the image; (N, T, D) -> (N, out_channels, H, W)."""

    name = "outer head"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        outer, out = model.outer, model.patch_size**2 * model.out_channels
        norm = NORMS[outer.head_norm or outer.norm](outer.width)
        self.shared = outer.modulation == "shared"
        self.final = FinalLayer(outer.width, out, norm, _head_modulation(outer, outer.width))
        self.unpatch = OuterUnpatch(model)

    def forward(self, state: State, condition: Conditioning) -> Tensor:
        return self.unpatch(self.final(state.outer, condition.row(self.shared)[:, None]))


class InnerHead(nn.Module):
    """Inner tokens to the image; (N, T, S, E) -> (N, out_channels, H, W)."""

    name = "inner head"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        inner, out = model.inner, model.inner.sub_patch**2 * model.out_channels
        self.shared = inner.modulation == "shared"
        self.reads_rows = inner.head_condition == "rows" and not self.shared
        width = CONDITIONS[inner.condition].width(model) if self.reads_rows else model.outer.width
        norm = NORMS[inner.head_norm or inner.norm](inner.width)
        self.final = FinalLayer(inner.width, out, norm, _head_modulation(inner, width))
        self.unpatch = InnerUnpatch(model)

    def forward(self, state: State, condition: Conditioning) -> Tensor:
        rows = state.rows if self.reads_rows else condition.row(self.shared)[:, None, None]
        return self.unpatch(self.final(state.inner, rows))


class NestedDiT(nn.Module):
    """A DiT (Peebles & Xie 2023) with an inner transformer over the sub-patches of each patch.

    `model.program` gives the order of the blocks. From an inner to an outer stage, the inner tokens are aggregated
    and fused with the outer tokens. From an outer to an inner stage, the outer tokens are spread over their
    sub-patches. If the program ends in inner blocks, an inner head is added to the outer head; if also fuse=replace,
    there is no outer head. The program `outer*N` is DiT, with DiT's parameters.

    Every program names its blocks by level and number (`outer_blocks.3`). The weights of a plain DiT therefore load
    into any nested model with the same outer blocks, with `load_state_dict(..., strict=False)`.

    Args:
        model: the architecture.
        recompute: levels (none, inner, outer, both) whose blocks recompute activations in the backward pass.

    >>> net = dd.NestedDiT(dd.preset("emoji").model)
    >>> net(torch.zeros(2, 3, 32, 32), t=0.5, y=torch.tensor([0, 8])).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, model: ModelConfig, *, recompute: str = "none") -> None:
        super().__init__()
        self.config = model
        self.outer_embed = OuterEmbed(model) if model.reads_patches else OuterPosition(model)
        self.time_embed = TIME_EMBEDS[model.time_embed](model.outer.width)
        embeds_label = model.tokens.adaln or model.tokens.rows == "offset"
        self.label_embed = LabelEmbed(model.num_classes, model.outer.width) if embeds_label else NoLabel()
        self.tokens = ConditionTokens(model) if model.tokens.count else None
        self.shared_modulation = (
            Modulation(model.outer.width, model.outer.width, 6) if shares_modulation(model) else None
        )
        self.outer_blocks = nn.ModuleList(_outer_block(model, number) for number in range(model.blocks("outer")))
        self.inner_blocks = nn.ModuleList(_inner_block(model) for _ in range(model.blocks("inner")))
        self.aggregates, self.fuses, self.spreads, self.conditions = (nn.ModuleList() for _ in range(4))
        self.inner_embed = InnerEmbed(model) if self.inner_blocks else NoEmbed()
        # Tuples, not module lists: every block is already registered above, under a name that no order changes.
        self.stages = tuple(self._assemble(model, recompute))
        self.heads = self._finish(model)
        self.split = SplitOutput(*model.split, model.channels, model.patch_size) if model.split else None
        initialise(self)

    def _assemble(self, model: ModelConfig, recompute: str) -> list[nn.Module]:
        """The program's stages, with aggregate and spread between levels."""
        outer_run = _recomputed if recompute in ("outer", "both") else run_block
        inner_run = _recomputed if recompute in ("inner", "both") else run_block
        outer, inner = iter(self.outer_blocks), iter(self.inner_blocks)
        stages: list[nn.Module] = []
        previous, done = None, 0
        for level, count in model.program:
            if (previous, level) == ("outer", "inner"):
                spread = SPREADS[model.inner.spread](model)
                self.spreads.append(spread)
                stages.append(SpreadStage(spread))
            if (previous, level) == ("inner", "outer"):
                aggregate, fuse = AGGREGATORS[model.inner.aggregate](model), FUSIONS[model.inner.fuse](model)
                self.aggregates.append(aggregate)
                self.fuses.append(fuse)
                stages.append(AggregateStage(aggregate, fuse))
            if level == "outer":
                first = model.tokens.start - done
                start = first if model.tokens.count and 0 <= first < count else None
                shared = model.outer.modulation == "shared"
                stages.append(OuterStage(islice(outer, count), outer_run, shared=shared, start=start))
                done += count
            else:
                condition = CONDITIONS[model.inner.condition](model) if model.inner.reads_rows else None
                self.conditions.extend([condition] if condition else [])
                carries, shared = model.carries_tokens and done > model.tokens.start, model.inner.modulation == "shared"
                stages.append(InnerStage(islice(inner, count), condition, inner_run, shared=shared, carries=carries))
            previous = level
        return stages

    def _finish(self, model: ModelConfig) -> tuple[OuterHead | InnerHead, ...]:
        """The head of the last level. The outer head stays beside an inner head, unless outer tokens are replaced."""
        heads: list[OuterHead | InnerHead] = []
        ends_inner = model.program[-1][0] == "inner"
        if not ends_inner or FUSIONS[model.inner.fuse].keeps_outer:
            self.outer_head = OuterHead(model)
            heads.append(self.outer_head)
        if ends_inner:
            self.inner_head = InnerHead(model)
            heads.append(self.inner_head)
        return tuple(heads)

    def forward(self, x: Tensor, t: Tensor | float, y: Tensor | None = None) -> Tensor:
        """Predict from noisy images.

        Args:
            x: noisy images (N, C, H, W), in the dtype of the weights.
            t: times (N,) in [0, 1], or one time for all; always in float32, whatever the dtype of the weights. 1 is
                pure noise.
            y: classes (N,), int64 in [0, num_classes]; num_classes is the null class. None: the null class for all.

        Returns:
            The prediction (N, C, H, W) of the quantity `diffusion.predict` (of `split`, the image). With
            `learn_variance`, (N, 2C, H, W): the prediction, then the variance fraction.

        Raises:
            ValueError: a shape is wrong, or (of tensors on the CPU) a time or a class is out of range.
        """
        if not isinstance(t, Tensor) or t.ndim == 0:
            t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        _check_inputs(self.config, x, t, y)
        noisy, at = x, t
        if self.split is not None:
            x, t = self.split.scaled(x, t)
        state = State(self.outer_embed(x), self.inner_embed(x))  # N T D, N T S E
        condition = self._condition(self.time_embed(t, x.dtype), self.label_embed(y), y)
        for stage in self.stages:  # the program, one arrow per stage
            state = stage(state, condition)
        out = reduce(torch.add, [head(state, condition) for head in self.heads])  # N C H W
        return out if self.split is None else self.split(out, noisy, at)

    def _condition(self, time: Tensor, label: Tensor | None, y: Tensor | None) -> Conditioning:
        """What conditions the stages, from the embeddings of time and label."""
        c = time + label if self.config.tokens.adaln else time  # type: ignore[operator]
        if self.config.silu_twice:
            c = F.silu(c)
        tokens = self.tokens(time, label, y) if self.tokens else None
        shared = torch.cat(self.shared_modulation(c), dim=-1) if self.shared_modulation else None
        return Conditioning(c, time, tokens, shared)


def _check_inputs(model: ModelConfig, x: Tensor, t: Tensor, y: Tensor | None) -> None:
    """Raise ValueError for a wrong shape, or for a value out of range. Values are read on the CPU only (the host would
    wait for a GPU), and not while the model is traced, transformed or run on fake tensors."""
    shape = (model.channels, *model.image_size)
    if x.shape[1:] != shape:
        raise ValueError(f"x must be (N, {', '.join(map(str, shape))}): got {tuple(x.shape)}")
    for name, value, most in (("t", t, 1), ("y", y, model.num_classes)):
        if value is None:
            continue
        if value.shape != x.shape[:1]:
            raise ValueError(f"{name} must be one number per image, ({len(x)},): got {tuple(value.shape)}")
        if torch.compiler.is_compiling() or type(value) is not Tensor or value.device.type != "cpu" or not len(x):
            continue
        if torch._C._are_functorch_transforms_active():
            continue
        low, high = (number.item() for number in value.aminmax())
        if not 0 <= low <= high <= most:  # also NaN
            raise ValueError(f"{name} must be from 0 to {most}: got {low:g} to {high:g}")


def part_of(name: str) -> str:
    """Part of the model to which the parameter `name` belongs: outer_blocks, inner_blocks, aggregate, spread ..."""
    part = name.split(".", maxsplit=1)[0]
    return part if part.endswith("_blocks") else part.removesuffix("s")  # spreads.0 -> spread


class NoLabel(nn.Module):
    """No embedding of the label, for models whose class comes only through tokens of its own."""

    def forward(self, y: Tensor | None) -> None:
        return None


def shares_modulation(model: ModelConfig) -> bool:
    """Whether a level that has blocks takes the vectors of one adaLN for all blocks."""
    return any(model.blocks(name) and getattr(model, name).modulation == "shared" for name in ("outer", "inner"))


def _outer_block(model: ModelConfig, number: int) -> Block:
    outer = model.outer
    make, rope = ROPES[outer.rope], None
    if make:
        lead = model.tokens.count if number >= model.tokens.start else 0
        rope = make(outer.width // outer.num_heads, places(*model.grid).flatten(0, 1), model.grid, lead)
    attention = Attention(outer.width, outer.num_heads, qk_norm=model.qk_norm, bias=outer.bias == "all", rope=rope)
    norms, mlp, modulation = _parts(model, outer, outer.width, branches=2)
    return Block(attention, mlp, norms, modulation)


def _inner_block(model: ModelConfig) -> AnyBlock:
    inner, mixer, condition = model.inner, MIXERS[model.inner.mixer], CONDITIONS[model.inner.condition]
    places = model.sub_patches if condition.per_block else 1
    width = condition.width(model) if inner.reads_rows else model.outer.width
    if mixer is None:
        norms, mlp, modulation = _parts(model, inner, width, branches=1, places=places)
        return MlpBlock(mlp, norms[1], modulation)
    mix = mixer(model)
    norms, mlp, modulation = _parts(model, inner, width, branches=2, places=places)
    return Block(mix, mlp, norms, modulation)


def _parts(
    model: ModelConfig, level: OuterConfig, rows: int, *, branches: int, places: int = 1
) -> tuple[tuple[Norm, Norm], Mlp, BlockModulation]:
    """Norms, MLP and modulation of a block of a level, whose conditioning rows have the width `rows`."""
    norm, width = NORMS[level.norm], level.width
    mlp = MLPS[level.mlp](width, int(width * level.mlp_ratio), bias=level.bias != "none", condition=rows)
    modulation = MODULATIONS[level.modulation](rows, width, branches, places)
    return (norm(width), norm(width, model.mlp_norm_eps)), mlp, modulation


@torch.no_grad()
def initialise(model: NestedDiT) -> None:
    """Initialise both levels as DiT does. Then call each module's own `initialise`, if there is one."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # the fused qkv as one matrix, and so a convolution
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if own := getattr(module, "initialise", None):
            own()
