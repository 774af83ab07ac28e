"""Conversion of weights of the official DiT and SiT (facebookresearch/DiT, willisma/SiT) to ours and back, bit for bit.

The official models have the parameters of our plain DiT, under other names. Two facts do not follow from the shapes of
the weights:

- The number of heads. For the published sizes it follows from depth and width.
- The time. SiT's time runs from noise at 0 to the image at 1, and its sinusoids take this time, not 1000 times
  this time: `model.time_embed=sit`. Its velocity is image - noise, the opposite of ours: the sign of the last layer is
  changed, which is exact and reversible.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.program import MOST_BLOCKS
from dit_in_dit.config.run import DiffusionConfig, ModelConfig, OuterConfig, RunConfig, SampleConfig
from dit_in_dit.model.layers import sincos
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.tensors import DTYPES

Weights = Mapping[str, Tensor]
OfficialKind = Literal["dit", "sit"]
Clock = Literal["dit", "diffusers", "sit"]
Predicted = Literal["velocity", "image", "noise"]

BEFORE = {
    "x_embedder.proj": "outer_embed.proj",
    "t_embedder.mlp.0": "time_embed.mlp.0",
    "t_embedder.mlp.2": "time_embed.mlp.2",
    "y_embedder.embedding_table": "label_embed.table",
}
BLOCK = {
    "attn.qkv": "branches.mix.qkv",
    "attn.proj": "branches.mix.proj",
    "mlp.fc1": "branches.mlp.0",
    "mlp.fc2": "branches.mlp.2",
    "adaLN_modulation.1": "modulation.linear",
}
AFTER = {
    "final_layer.linear": "outer_head.final.linear",
    "final_layer.adaLN_modulation.1": "outer_head.final.modulation.linear",
}
LABEL_TABLE = "y_embedder.embedding_table.weight"
PATCHES = "x_embedder.proj.weight"
POSITION = "pos_embed"


@dataclass(frozen=True)
class OfficialWeights:
    """Imported weights under official names.

    averaged, trained: EMA weights, and weights of the last step; both are the same if the file has only one of them.
    step: optimizer steps taken; 0 if unknown.
    kind, predict: DiT or SiT, and the prediction type.
    heads, classes: numbers of attention heads and of classes; None if unknown.
    clock: `model.time_embed`.
    eps: `model.mlp_norm_eps`.
    null_class: whether the last row of the table of labels is the null class.
    """

    averaged: Weights
    trained: Weights
    step: int = 0
    kind: OfficialKind = "dit"
    predict: Predicted = "noise"
    heads: int | None = None
    clock: Clock = "dit"
    eps: float = 1e-6
    classes: int | None = None
    null_class: bool = True


# ------------------------------------------------------------------------------------------- names


def official_names(depth: int) -> dict[str, str]:
    """Official name -> our name, for all parameters of a DiT, in the official order."""
    blocks = {f"blocks.{i}.{a}": f"outer_blocks.{i}.{b}" for i in range(depth) for a, b in BLOCK.items()}
    both = {f"{a}.{part}": f"{b}.{part}" for a, b in (BEFORE | blocks | AFTER).items() for part in ("weight", "bias")}
    del both["y_embedder.embedding_table.bias"]
    return both


def to_ours(weights: Weights, model: ModelConfig, *, turn: bool) -> dict[str, Tensor]:
    """Official weights under our names, as views; `turn` changes the sign of the output."""
    ours = {b: weights[a] for a, b in official_names(model.blocks("outer")).items()}
    ours["outer_embed.proj.weight"] = ours["outer_embed.proj.weight"].flatten(1)  # a strided convolution is linear
    return _turned(ours, "outer_head.final.linear") if turn else ours


def to_official(weights: Weights, model: ModelConfig, *, turn: bool) -> dict[str, Tensor]:
    """The inverse of `to_ours`, in the official order, without the position table."""
    official = {a: weights[b] for a, b in official_names(model.blocks("outer")).items()}
    official[PATCHES] = official[PATCHES].view(-1, model.channels, model.patch_size, model.patch_size)
    return _turned(official, "final_layer.linear") if turn else official


def _turned(weights: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    return weights | {f"{layer}.{part}": -weights[f"{layer}.{part}"] for part in ("weight", "bias")}


# ------------------------------------------------------------------------- architecture from shapes


def model_of(official: OfficialWeights, what: str) -> ModelConfig:
    """The architecture of weights; an unknown number of heads is taken from the published size with the same depth and
    width.

    Args:
        what: name of the weights in errors.

    Raises:
        UserError: a weight is missing, unknown or of another shape, the position table is not the fixed one, or the
            number of heads is unknown.
    """
    weights = official.averaged
    width, channels, patch, _ = _shape(weights, PATCHES, 4, what)
    _, length, _ = _shape(weights, POSITION, 3, what)
    side = math.isqrt(length)
    if side**2 != length:
        raise UserError(
            f"{what}: {POSITION} has {length} places, which is no square number: only square images are supported"
        )
    numbers = [int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d{1,4})\.", name))]
    depth = max(numbers, default=-1) + 1
    if not 1 <= depth <= MOST_BLOCKS:
        raise UserError(f"{what} has {depth} blocks: from 1 to {MOST_BLOCKS} are known")
    published = {(blocks, wide): number for blocks, wide, number in presets.SIZES.values()}
    heads = official.heads or published.get((depth, width))
    if heads is None:
        raise UserError(f"{what}: {depth} blocks of width {width} are no published size: give --num-heads")
    out = _shape(weights, "final_layer.linear.weight", 2, what)[0]
    hidden = _shape(weights, "blocks.0.mlp.fc1.weight", 2, what)[0]
    exact = int(width * (hidden / width)) == hidden
    model = ModelConfig(
        image_size=(side * patch, side * patch),
        channels=channels,
        patch_size=patch,
        num_classes=_shape(weights, LABEL_TABLE, 2, what)[0] - 1,
        stages=f"outer*{depth}",
        learn_variance=out == 2 * channels * patch**2,
        time_embed=official.clock,
        mlp_norm_eps=official.eps,
        outer=OuterConfig(width=width, num_heads=heads, mlp_ratio=(hidden if exact else hidden + 0.5) / width),
    )
    check_official(weights, model, what)
    return model


def add_null_class(official: OfficialWeights, what: str) -> OfficialWeights:
    """The weights with a null class. A model that was trained without label drop has a table with rows only for its
    classes. This table gets a row of zeros, which is never used.

    Raises:
        UserError: the number of rows of the table is neither the number of classes nor one more.
    """
    rows = {_shape(weights, LABEL_TABLE, 2, what)[0] for weights in (official.averaged, official.trained)}
    if official.classes is None and rows == {1}:
        raise UserError(f"{what} has one row for its classes: give --num-classes 1 if it belongs to a class")
    if official.classes is None or rows == {official.classes + 1}:
        return official
    if rows != {official.classes}:
        raise UserError(f"{what} has {official.classes} classes, and {max(rows)} rows for them: give --num-classes")
    averaged, trained = (
        {**weights, LABEL_TABLE: torch.cat([weights[LABEL_TABLE], torch.zeros_like(weights[LABEL_TABLE][:1])])}
        for weights in (official.averaged, official.trained)
    )
    return replace(official, averaged=averaged, trained=trained, null_class=False)


def _shape(weights: Weights, name: str, dimensions: int, what: str) -> tuple[int, ...]:
    if name not in weights:
        raise UserError(f"{what} holds no weights of a DiT: there is no {name}")
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise UserError(f"{what}: {name} must have {dimensions} dimensions: got {shape}")
    return shape


def official_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape, for all parameters of a plain model."""
    with torch.device("meta"):
        shapes = NestedDiT(model).state_dict()
    return {name: tuple(value.shape) for name, value in to_official(shapes, model, turn=False).items()}


def check_official(weights: Weights, model: ModelConfig, what: str) -> None:
    """UserError when official weights are not exactly those of the model, or are not floating-point."""
    wanted = {POSITION: (1, model.patches, model.outer.width), **official_shapes(model)}
    for name in [*wanted, *weights]:
        if name not in weights:
            raise UserError(f"{what} holds no weights of a DiT: there is no {name}")
        if name not in wanted:
            raise UserError(f"{what}: a DiT has no {name[:60]!r}; give the weights of a plain DiT or SiT")
        if tuple(weights[name].shape) != wanted[name]:
            raise UserError(f"{what}: {name} must be {wanted[name]}: got {tuple(weights[name].shape)}")
        if not weights[name].is_floating_point() or weights[name].dtype not in DTYPES:
            raise UserError(f"{what}: {name} is of {weights[name].dtype}: convert it to torch.float32")
    table, fixed = weights[POSITION], official_position(model, weights[POSITION].dtype)
    off = (table.float() - fixed.float()).abs().max().item()
    if not off <= max(1e-5, 2 * torch.finfo(table.dtype).eps):
        raise UserError(
            f"{what}: {POSITION} is not the fixed sin-cos table (off by {off:.2g}): positions are not learned"
        )


def official_position(model: ModelConfig, dtype: torch.dtype) -> Tensor:
    """The official `pos_embed`, (1, T, D)."""
    return sincos(model.outer.width, *model.grid)[None].to(dtype)


# ------------------------------------------------------------------------------------------- a run


def flips_sign(model: ModelConfig, diffusion: DiffusionConfig) -> bool:
    """Whether the official output has the opposite sign of ours: this holds for SiT's velocity, because SiT's time runs
    from noise to the image.
    """
    return model.time_embed == "sit" and diffusion.predict == "velocity"


def run_of(official: OfficialWeights, model: ModelConfig) -> RunConfig:
    """The config of a run with imported weights, with the guidance of the authors' `sample.py`."""
    base = presets.PIXELS if model.channels in (1, 3) else presets.LATENTS
    guidance = 4.0 if model.num_classes and official.null_class else 1.0
    if official.kind == "sit":
        diffusion = DiffusionConfig(path="flow", predict=official.predict)
        how = SampleConfig(sampler="heun", steps=50, guidance=guidance)
    else:
        diffusion = DiffusionConfig(path="ddpm", predict=official.predict)
        how = SampleConfig(sampler="ddpm", steps=250, guidance=guidance)
    train = base.train if official.null_class else replace(base.train, label_drop=0.0)
    return replace(base, model=model, diffusion=diffusion, sample=how, train=train)
