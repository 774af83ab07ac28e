"""The nested diffusion transformer: a program of outer and inner stages."""

from __future__ import annotations

from functools import reduce
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_in_dit.config.model import ModelConfig, OuterConfig
from dit_in_dit.config.program import split_run
from dit_in_dit.config.rules import weak_head
from dit_in_dit.model.aggregate import AGGREGATORS, FUSIONS, SPREADS
from dit_in_dit.model.condition import CONDITIONS, TIME_EMBEDS, Conditioning, ConditionTokens, LabelEmbed
from dit_in_dit.model.embed import InnerEmbed, OuterEmbed, OuterPosition
from dit_in_dit.model.layers import Attention, Block, MlpBlock
from dit_in_dit.model.mixers import MIXERS
from dit_in_dit.model.mlps import MLPS
from dit_in_dit.model.modulation import MODULATIONS, Modulation
from dit_in_dit.model.norms import NORMS
from dit_in_dit.model.rope import patch_rope
from dit_in_dit.model.route import Route
from dit_in_dit.model.split import SplitOutput
from dit_in_dit.model.stages import AggregateStage, Head, InnerStage, OuterStage, SpreadStage, State


class NestedDiT(nn.Module):
    """A DiT (Peebles & Xie 2023) with an inner transformer over the sub-patches of each patch.

    `model.program` gives the order of the blocks. From an inner to an outer stage, the inner tokens are aggregated
    and fused with the outer tokens. From an outer to an inner stage, the outer tokens are spread over their
    sub-patches. If the program ends in inner blocks, an inner head is added to the outer head; if also fuse=replace,
    there is no outer head. The program `outer*N` is DiT, with DiT's parameters. `model.internal_head` adds a head after
    some outer blocks, whose weak predictions guide.

    Every program names its blocks by level and number (`outer_blocks.3`). The weights of a plain DiT therefore load
    into any nested model with the same outer blocks, with `load_state_dict(..., strict=False)`.

    Args:
        model: the architecture.
        recompute: levels (none, inner, outer, both) whose blocks recompute activations in the backward pass;
            selective: both levels recompute all but products and attention.
        dropout: rate of dropout in passes that get keys.

    >>> net = dd.NestedDiT(dd.preset("emoji").model)
    >>> net(torch.zeros(2, 3, 32, 32), t=0.5, y=torch.tensor([0, 8])).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, model: ModelConfig, *, recompute: str = "none", dropout: float = 0.0) -> None:
        super().__init__()
        self.config = model
        self.outer_embed = OuterEmbed(model) if model.reads_patches else OuterPosition(model)
        width = model.outer.width
        self.time_embed = TIME_EMBEDS[model.time_embed](width)
        embeds_label = model.tokens.adaln or model.tokens.rows == "offset"
        # Without an embedding the class comes through tokens of its own.
        self.label_embed = LabelEmbed(model.num_classes, width) if embeds_label else nn.Identity()
        self.tokens = ConditionTokens(model) if model.tokens.count else None
        self.shared_modulation = Modulation(width, width, 6) if shares_modulation(model) else None
        self.outer_blocks = nn.ModuleList(_outer_block(model, number) for number in range(model.blocks("outer")))
        self.inner_blocks = nn.ModuleList(_inner_block(model) for _ in range(model.blocks("inner")))
        for block in [*self.outer_blocks, *self.inner_blocks] if dropout else []:
            block.dropout = dropout
        self.aggregates, self.fuses, self.spreads, self.conditions = (nn.ModuleList() for _ in range(4))
        self.inner_embed = InnerEmbed(model) if self.inner_blocks else nn.Identity()  # then no stage reads it
        self.before_internal_head = 0  # stages before it
        # Tuples, not module lists: every block is already registered above, under a name that no order changes.
        self.stages = tuple(self._assemble(model, recompute))
        for level in model.heads:
            setattr(self, f"{level}_head", Head(model, level))
        self.heads: tuple[Head, ...] = tuple(getattr(self, f"{level}_head") for level in model.heads)
        self.internal_head = Head(model, "outer", "internal head") if model.internal_head else None
        self.split = SplitOutput(*model.split, model.channels, model.patch_size) if model.split else None
        for block in (*self.outer_blocks, *self.inner_blocks):
            block.selective = recompute == "selective"
        initialise(self)

    def _assemble(self, model: ModelConfig, recompute: str) -> list[nn.Module]:
        """The program's stages, with aggregate and spread between levels."""
        redo = {level: recompute in (level, "both") for level in ("outer", "inner")}
        outer, inner = iter(self.outer_blocks), iter(self.inner_blocks)
        stages: list[nn.Module] = []
        previous, done, left = None, 0, model.inner_stages
        first_inner = model.blocks("outer")  # number of the next inner block among all blocks
        for level, count in split_run(model.program, model.internal_head):
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
                where: dict[str, Any] = {"start": start, "first": done}
                stages.append(OuterStage(islice(outer, count), model.outer, recompute=redo["outer"], **where))
                done += count
                if done == model.internal_head:
                    self.before_internal_head = len(stages)
            else:
                condition = CONDITIONS[model.inner.condition](model) if left <= model.row_stages else None
                self.conditions.extend([condition] if condition else [])
                how = {"recompute": redo["inner"], "carries": model.carries_tokens and done > model.tokens.start}
                stages.append(InnerStage(islice(inner, count), model.inner, condition, **how, first=first_inner))
                left -= 1
                first_inner += count
            previous = level
        return stages

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        y: Tensor | None = None,
        *,
        weak: bool = False,
        keys: Tensor | None = None,
        route: Route | None = None,
    ) -> Tensor:
        """Predict from noisy images.

        Args:
            x: noisy images (N, C, H, W), in the dtype of the weights.
            t: times (N,) in [0, 1], or one time for all; always in float32, whatever the dtype of the weights. 1 is
                pure noise.
            y: classes (N,), int64 in [0, num_classes]; num_classes is the null class. None: the null class for all.
            weak: return a pair: the prediction, and the weak one, of the internal head or of the outer head alone.
            keys: dropout keys (N, blocks, 4) of the examples, in training (`training.dropout`).
            route: patches that bypass outer blocks, in training; None: all patches go through all blocks.

        Returns:
            The prediction (N, C, H, W) of the quantity `diffusion.predict` (of `split`, the image). With
            `learn_variance`, (N, 2C, H, W): the prediction, then the variance fraction.

        Raises:
            ValueError: a shape is wrong, (of tensors on the CPU) a time or a class is out of range, or the model has no
                weak prediction.
        """
        if not isinstance(t, Tensor) or t.ndim == 0:
            t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        _check_inputs(self.config, x, t, y)
        if weak and not weak_head(self.config):
            raise ValueError("this model has no weak prediction: set model.internal_head")
        noisy, at = x, t
        if self.split is not None:
            x, t = self.split.scaled(x, t)
        state = State(self.outer_embed(x), self.inner_embed(x))  # N T D, N T S E
        condition = self._condition(self.time_embed(t, x.dtype), self.label_embed(y), y)
        condition = condition._replace(dropout=keys, route=route)
        early = state
        for number, stage in enumerate(self.stages, 1):  # the program, one arrow per stage
            state = stage(state, condition)
            early = state if number == self.before_internal_head else early
        outputs = [head(state, condition) for head in self.heads]  # N C H W
        first = self.internal_head(early, condition) if self.internal_head else outputs[0]
        out = self._prediction(reduce(torch.add, outputs), noisy, at)
        return (out, self._prediction(first, noisy, at)) if weak else out  # type: ignore[return-value]

    def _prediction(self, out: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The prediction from the sum of heads, which is the prediction itself unless it is split."""
        return out if self.split is None else self.split(out, noisy, t)

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
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if traced or type(value) is not Tensor or value.device.type != "cpu" or not len(x):
            continue
        low, high = (number.item() for number in value.aminmax())
        if not 0 <= low <= high <= most:  # also NaN
            raise ValueError(f"{name} must be from 0 to {most}: got {low:g} to {high:g}")


def part_of(name: str) -> str:
    """Part of the model to which the parameter `name` belongs: outer_blocks, inner_blocks, aggregate, spread ..."""
    part = name.split(".", maxsplit=1)[0]
    return part if part.endswith("_blocks") else part.removesuffix("s")  # spreads.0 -> spread


def shares_modulation(model: ModelConfig) -> bool:
    """Whether a level that has blocks takes the vectors of one adaLN for all blocks."""
    return any(model.blocks(name) and getattr(model, name).modulation == "shared" for name in ("outer", "inner"))


def _outer_block(model: ModelConfig, number: int) -> nn.Module:
    outer = model.outer
    rope = patch_rope(outer.rope, model, model.tokens.count if number >= model.tokens.start else 0)
    attention = Attention(outer.width, outer.num_heads, qk_norm=model.qk_norm, bias=outer.bias == "all", rope=rope)
    return _block(model, outer, attention, outer.width)


def _inner_block(model: ModelConfig) -> nn.Module:
    mixer, condition = MIXERS[model.inner.mixer], CONDITIONS[model.inner.condition]
    places = model.sub_patches if condition.per_block else 1
    return _block(model, model.inner, mixer(model) if mixer else None, condition.width(model), places)


def _block(model: ModelConfig, level: OuterConfig, mix: nn.Module | None, rows: int, places: int = 1) -> nn.Module:
    """A block of a level, whose conditioning rows have the width `rows`; without mixing if `mix` is None."""
    norm, width = NORMS[level.norm], level.width
    mlp = MLPS[level.mlp](width, int(width * level.mlp_ratio), bias=level.bias != "none", condition=rows)
    modulation = MODULATIONS[level.modulation](rows, width, 1 if mix is None else 2, places)
    norm_mlp = norm(width, model.mlp_norm_eps)
    return MlpBlock(mlp, norm_mlp, modulation) if mix is None else Block(mix, mlp, (norm(width), norm_mlp), modulation)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Initialise both levels as DiT does. Then call each module's own `initialise`, if there is one."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # the fused qkv as one matrix, and so a convolution
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if own := getattr(module, "initialise", None):
            own()
