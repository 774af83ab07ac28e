"""The nested diffusion transformer: a program of outer and inner stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, reduce
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.aggregate import AGGREGATORS, FUSIONS, SPREADS, Aggregator, Fusion, Spread
from dit_in_dit.model.condition import CONDITIONS, Condition, LabelEmbed, TimeEmbed
from dit_in_dit.model.embed import InnerEmbed, InnerUnpatch, NoEmbed, OuterEmbed, OuterPosition, OuterUnpatch
from dit_in_dit.model.layers import Attention, Block, FinalLayer, MlpBlock
from dit_in_dit.model.mixers import MIXERS
from dit_in_dit.model.norms import NORMS
from dit_in_dit.model.split import SplitOutput

AnyBlock = Block | MlpBlock
Run = Callable[[AnyBlock, Tensor, Tensor], Tensor]


def run_block(block: AnyBlock, x: Tensor, c: Tensor) -> Tensor:
    """The block's output; activations are kept for the backward pass."""
    return block(x, c)


_recomputed: Run = partial(checkpoint, use_reentrant=False)


class OuterStage(nn.Module):
    """Outer blocks, with attention among all patches; outer (N, T, D), c (N, D)."""

    def __init__(self, blocks: Iterable[nn.Module], run: Run) -> None:
        super().__init__()
        self.blocks, self.run = nn.ModuleList(blocks), run
        self.name = f"outer*{len(self.blocks)}"

    def forward(self, outer: Tensor, inner: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        rows = c[:, None]  # N 1 D
        for block in self.blocks:
            outer = self.run(block, outer, rows)  # type: ignore[arg-type]
        return outer, inner


class InnerStage(nn.Module):
    """Inner blocks, with adaLN driven by the condition's rows; inner (N, T, S, E), c (N, D)."""

    def __init__(self, blocks: Iterable[nn.Module], condition: Condition, run: Run) -> None:
        super().__init__()
        self.blocks, self.condition, self.run = nn.ModuleList(blocks), condition, run
        self.name = f"inner*{len(self.blocks)}"

    def forward(self, outer: Tensor, inner: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.condition(c, outer)  # N 1|T 1|S K
        for block in self.blocks:
            inner = self.run(block, inner, rows)  # type: ignore[arg-type]
        return outer, inner


class AggregateStage(nn.Module):
    """Inner to outer: one vector per patch, fused with the outer token."""

    name = "aggregate"

    def __init__(self, aggregate: Aggregator, fuse: Fusion) -> None:
        super().__init__()
        self.aggregate, self.fuse = aggregate, fuse

    def forward(self, outer: Tensor, inner: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.fuse(outer, self.aggregate(inner)), inner


class SpreadStage(nn.Module):
    """Outer to inner: each sub-patch token receives a message from its patch."""

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
        width, out = model.outer.width, model.patch_size**2 * model.out_channels
        self.final = FinalLayer(width, width, out, NORMS[model.outer.norm])
        self.unpatch = OuterUnpatch(model)

    def forward(self, outer: Tensor, inner: Tensor, c: Tensor) -> Tensor:
        return self.unpatch(self.final(outer, c[:, None]))


class InnerHead(nn.Module):
    """Inner tokens to the image, with adaLN driven by c; (N, T, S, E) -> (N, out_channels, H, W)."""

    name = "inner head"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        out = model.inner.sub_patch**2 * model.out_channels
        self.final = FinalLayer(model.inner.width, model.outer.width, out, NORMS[model.inner.norm])
        self.unpatch = InnerUnpatch(model)

    def forward(self, outer: Tensor, inner: Tensor, c: Tensor) -> Tensor:
        return self.unpatch(self.final(inner, c[:, None, None]))


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
        self.time_embed = TimeEmbed(model.outer.width, model.time_embed)
        self.label_embed = LabelEmbed(model.num_classes, model.outer.width)
        self.outer_blocks = nn.ModuleList(_outer_block(model) for _ in range(model.blocks("outer")))
        self.inner_blocks = nn.ModuleList(_inner_block(model) for _ in range(model.blocks("inner")))
        self.aggregates, self.fuses, self.spreads, self.conditions = (nn.ModuleList() for _ in range(4))
        mixer = MIXERS[model.inner.mixer]
        crosses = mixer is not None and mixer.crosses_patches
        self.inner_embed = InnerEmbed(model, global_position=crosses) if self.inner_blocks else NoEmbed()
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
        previous = None
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
                stages.append(OuterStage(islice(outer, count), outer_run))
            else:
                condition = CONDITIONS[model.inner.condition](model)
                self.conditions.append(condition)
                stages.append(InnerStage(islice(inner, count), condition, inner_run))
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
        noisy, time = x, t
        if self.split is not None:
            x, t = self.split.scaled(x, t)
        outer = self.outer_embed(x)  # N T D
        inner = self.inner_embed(x)  # N T S E
        c = self.time_embed(t, x.dtype) + self.label_embed(y)  # N D
        for stage in self.stages:  # the program, one arrow per stage
            outer, inner = stage(outer, inner, c)
        out = reduce(torch.add, [head(outer, inner, c) for head in self.heads])  # N C H W
        return out if self.split is None else self.split(out, noisy, time)


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


def _outer_block(model: ModelConfig) -> Block:
    outer = model.outer
    attention = Attention(outer.width, outer.num_heads, qk_norm=model.qk_norm)
    norm, eps = NORMS[outer.norm], model.mlp_norm_eps
    return Block(outer.width, outer.width, attention, outer.mlp_ratio, norm=norm, mlp_norm_eps=eps)


def _inner_block(model: ModelConfig) -> AnyBlock:
    inner, mixer = model.inner, MIXERS[model.inner.mixer]
    rows, norm, eps = CONDITIONS[inner.condition].width(model), NORMS[inner.norm], model.mlp_norm_eps
    if mixer is None:
        return MlpBlock(inner.width, rows, inner.mlp_ratio, norm=norm, mlp_norm_eps=eps)
    return Block(inner.width, rows, mixer(model), inner.mlp_ratio, norm=norm, mlp_norm_eps=eps)


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
