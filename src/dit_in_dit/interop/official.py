"""Official weights (facebookresearch/DiT, willisma/SiT, and the models of `config.field`) as models of ours.

`field_names` renames the weights. The kind of model follows from their names, its sizes from their shapes, or from the
published sizes and options where shapes do not show them (docs/field.md). For some models, time runs from noise at 0 to
the image at 1. A velocity is then image - noise, the opposite of ours: the sign of the last layer is changed, which is
exact and reversible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal

import torch

from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.field import FAMILIES
from dit_in_dit.config.run import DiffusionConfig, ModelConfig, RunConfig, SampleConfig
from dit_in_dit.interop import field_names
from dit_in_dit.interop.field_names import TABLES, OfficialKind, Weights, computed_tables, official_names
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.tensors import DTYPES

Clock = Literal["dit", "diffusers", "sit"]
Predicted = Literal["velocity", "image", "noise"]
ALIKE: tuple[OfficialKind, ...] = ("dit", "sit", "repa")  # their weights have the same names and shapes
UNSEEN = ("model.tokens.start", "model.stages", "model.patch_size")  # keys that weights may not show
SIZE_KEYS = {
    *("image_size", "channels", "patch_size", "num_classes", "stages", "depth", "use_inner", "bottleneck", "outer"),
    *("width", "num_heads", "mlp_ratio", "depth_ratio", "sub_patch", "label", "time", "inner", "tokens"),
}
PATCHES = "x_embedder.proj.weight"


@dataclass(frozen=True)
class OfficialWeights:
    """Imported weights under official names, and facts that they do not show. A file with only averaged or only trained
    weights gives them as both."""

    averaged: Weights
    trained: Weights  # of the last step
    step: int = 0  # optimizer steps taken; 0 if unknown
    kind: OfficialKind = "dit"
    predict: Predicted = "noise"  # of DiT and SiT
    heads: int | None = None  # None: as published
    clock: Clock = "dit"  # `model.time_embed` of a DiT
    eps: float = 1e-6  # `model.mlp_norm_eps` of a DiT
    classes: int | None = None  # None: unknown
    null_class: bool = True  # whether the last row of the table of labels is the null class
    size: tuple[int, int] | None = None  # height and width of images; None: as published
    unseen: Mapping[str, Any] = field(default_factory=dict)  # values of the keys `UNSEEN`


def title(kind: OfficialKind) -> str:
    """The name of a kind of model."""
    return "DiT" if kind == "dit" else FAMILIES[kind].title


def literal(kind: OfficialKind) -> ModelConfig:
    """The model of a kind, at one of its sizes."""
    return ModelConfig() if kind == "dit" else FAMILIES[kind].build().model


def label_table(kind: OfficialKind) -> str:
    """Official name of the table of labels."""
    return (official_names(kind, "label_embed.table.weight") or official_names(kind, "tokens.own.table.weight"))[0]


def add_null_class(official: OfficialWeights, what: str) -> OfficialWeights:
    """The weights with a null class. A model that was trained without label drop has no row for it, and gets a row of
    zeros, which is never used. UserError when there are neither as many rows as classes, nor one more."""
    table = label_table(official.kind)
    rows = {shape_of(weights, table, (2,), what, official.kind)[0] for weights in (official.averaged, official.trained)}
    if official.classes is None and rows == {1}:
        raise UserError(f"{what} has one row for its classes: give --num-classes 1, or 0 if it is the null class")
    if official.classes is None or rows == {official.classes + 1}:
        return official
    if rows != {official.classes}:
        raise UserError(f"{what} has {official.classes} classes, and {max(rows)} rows for them: give --num-classes")
    averaged, trained = (
        {**weights, table: torch.cat([weights[table], torch.zeros_like(weights[table][:1])])}
        for weights in (official.averaged, official.trained)
    )
    return replace(official, averaged=averaged, trained=trained, null_class=False)


def shape_of(weights: Weights, name: str, sizes: tuple[int, ...], what: str, kind: OfficialKind) -> tuple[int, ...]:
    """Shape of a weight, whose number of dimensions must be one of `sizes`. Raises UserError."""
    if name not in weights:
        raise UserError(f"{what} holds no weights of a {title(kind)}: there is no {name}")
    shape = tuple(weights[name].shape)
    if len(shape) not in sizes or 0 in shape:
        raise UserError(f"{what}: {name} must have {' or '.join(map(str, sizes))} dimensions: got {shape}")
    return shape


def official_shapes(kind: OfficialKind, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape, for all weights and computed tables of a model."""
    with torch.device("meta"):
        state = NestedDiT(model).state_dict()
    return {name: tuple(value.shape) for name, value in field_names.to_official(state, kind, model, turn=False).items()}


def check_official(weights: Weights, kind: OfficialKind, model: ModelConfig, what: str) -> None:
    """UserError when official weights are not exactly those of the model, or are not floating-point."""
    wanted, beside = official_shapes(kind, model), field_names.UNUSED.get(kind, "/")
    for name in [*wanted, *weights]:
        if name not in weights:
            raise UserError(f"{what} holds no weights of a {title(kind)}: there is no {name}")
        if name not in wanted and not name.startswith(beside):
            raise UserError(f"{what}: a {title(kind)} has no {name[:60]!r}; give the weights of one model")
        if tuple(weights[name].shape) != wanted.get(name, weights[name].shape):
            raise UserError(f"{what}: {name} must be {wanted[name]}: got {tuple(weights[name].shape)}")
        if not weights[name].is_floating_point() or weights[name].dtype not in DTYPES:
            raise UserError(f"{what}: {name} is of {weights[name].dtype}: convert it to torch.float32")
    for name, fixed in computed_tables(kind, model).items():
        table = weights[name]
        off = (table.float() - fixed).abs().max().item()
        if not off <= max(1e-5, 2 * torch.finfo(table.dtype).eps):
            raise UserError(f"{what}: {name} is not the fixed sin-cos table (off by {off:.2g}): it is never learned")


def flips_sign(model: ModelConfig, diffusion: DiffusionConfig) -> bool:
    """Whether the official output is a velocity of the opposite sign: official time runs from noise to the image."""
    return model.time_embed in ("sit", "ddt") and diffusion.predict == "velocity"


def kind_of(model: ModelConfig) -> OfficialKind | None:
    """The kind of official model that a model is, at any size; None if it is none."""
    return next((kind for kind in TABLES if _is_kind(model, kind)), None)


def _is_kind(model: ModelConfig, kind: OfficialKind) -> bool:
    """Whether a model and a kind's literal have the same options, whatever their sizes."""
    like, nested = literal(kind), bool(official_names(kind, "inner_head.final.linear.weight"))
    whole = like.inner.sub_patch == like.patch_size  # the inner level is over whole patches
    square = model.image_size[0] == model.image_size[1] or not computed_tables(kind, like)
    free = {*SIZE_KEYS, *(["learn_variance"] if kind in ALIKE else []), *(["mlp_norm_eps"] if kind == "dit" else [])}
    free |= {"qk_norm"} if like.outer.norm == "rms" and not like.qk_norm else set()
    free |= {"start"} if like.tokens.start else set()
    free |= {"time_embed"} if kind == "dit" and model.time_embed == "diffusers" else set()

    def options(of: ModelConfig) -> list[Any]:
        counts = [bool(count) for count in (of.bottleneck, of.tokens.label, of.tokens.time)]
        names = [name.removeprefix("model.") for name in ModelConfig.names() if name.rpartition(".")[2] not in free]
        names = [name for name in names if nested or not name.startswith("inner.")]
        sub_patch = of.inner.sub_patch == of.patch_size if whole else of.inner.sub_patch
        return [counts, nested and sub_patch, *(attrgetter(name)(of) for name in names)]

    size = attrgetter("width", "num_heads")
    follows = not nested or size(like.inner) != size(like.outer) or size(model.inner) == size(model.outer)
    ordered = [level for level, _ in model.program] == ["outer", "inner"][: 1 + nested] and model.split is None
    return square and follows and ordered and options(model) == options(like)


def run_of(official: OfficialWeights, model: ModelConfig) -> RunConfig:
    """The config of a run with imported weights: the published recipe; of DiT and SiT, their `sample.py`."""
    if official.kind in ("dit", "sit"):
        diffusion = DiffusionConfig(path="ddpm" if official.kind == "dit" else "flow", predict=official.predict)
        sampler, steps = ("ddpm", 250) if official.kind == "dit" else ("heun", 50)
        sample = SampleConfig(sampler=sampler, steps=steps, guidance=4.0)
        config = presets.PIXELS if model.channels in (1, 3) else presets.LATENTS
        config = replace(config, diffusion=diffusion, sample=sample)
    else:
        config = FAMILIES[official.kind].build()
    train = config.train if official.null_class else replace(config.train, label_drop=0.0)
    guidance = config.sample.guidance if model.num_classes and official.null_class else 1.0
    return replace(config, model=model, train=train, sample=replace(config.sample, guidance=guidance))
