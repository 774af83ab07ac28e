"""Sizes of a model from the shapes of official weights."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import torch

from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError, check_whole
from dit_in_dit.config.field import PUBLISHED
from dit_in_dit.config.model import InnerConfig, ModelConfig, OuterConfig, TokensConfig
from dit_in_dit.config.program import MOST_BLOCKS, parse_stages
from dit_in_dit.interop.field_names import TABLES, official_names
from dit_in_dit.interop.official import ALIKE, OfficialWeights, check_official, label_table, literal, shape_of, title


class _Reader:
    """Sizes of a model from the shapes of official weights; the methods raise UserError."""

    def __init__(self, official: OfficialWeights, what: str) -> None:
        self.official, self.what, self.kind, self.weights = official, what, official.kind, official.averaged
        self.literal, self.unseen, self.depth = literal(official.kind), dict(official.unseen), 0
        self.width = self.shape("time_embed.mlp.2.weight", 2)[0]
        self.published = [size for size in PUBLISHED.values() if size[0] == self.kind and size[1][1] == self.width]
        self.depth, self.inner_depth = self.depths()

    def shape(self, ours: str, *dimensions: int) -> tuple[int, ...]:
        """Shape of the (first) official tensor for a parameter of ours, of so many dimensions."""
        return shape_of(self.weights, official_names(self.kind, ours, self.depth)[0], dimensions, self.what, self.kind)

    def has(self, ours: str) -> bool:
        """Whether the weights have a parameter of ours, or a table."""
        return not self.weights.keys().isdisjoint(official_names(self.kind, ours, self.depth))

    def depths(self) -> tuple[int, int]:
        """Numbers of outer and inner blocks."""
        counts, names = [], [""]
        for level in ("outer", "inner"):
            names = [entry.official[0] for entry in TABLES[self.kind] if entry.ours.startswith(f"{level}_blocks.")]
            prefix = re.escape(re.split(r"[*+]", names[0])[0]) if names else "(?!)"
            numbers = [int(match[1]) for name in self.weights if (match := re.match(rf"{prefix}(\d{{1,4}})\.", name))]
            counts.append(max(numbers, default=-1) + 1)
        total = max(counts)
        if not 1 <= total <= MOST_BLOCKS:
            raise UserError(f"{self.what} has {total} blocks: from 1 to {MOST_BLOCKS} are known")
        if not names or "+" not in names[0]:
            return counts[0], counts[1]
        norms = (self.weights.get(f"blocks.{number}.norm1.weight", torch.empty(0)) for number in range(total))
        outer = sum(norm.shape == (self.width,) for norm in norms)  # inner blocks of another width, or without the norm
        if 0 < outer < total:
            return outer, total - outer
        known = [f"outer*{size[1][0]} inner*{size[2]}" for size in self.published if size[1][0] + size[2] == total]
        stages = str(self.ask("model.stages", known))
        (level, outer), *others = parse_stages(stages)
        if level != "outer" or [level for level, _ in others] != ["inner"]:
            raise UserError(f"--set model.stages={stages[:40]!r}: a {title(self.kind)} has outer, then inner blocks")
        return outer, others[0][1]

    def ask(self, key: str, known: list[Any]) -> Any:
        """A value that the weights do not show: of the published size, else of --set."""
        if not known and key not in self.unseen:
            raise UserError(f"{self.what} has no published size, and its weights do not show it: give --set {key}=...")
        return known[0] if known else self.unseen.pop(key)

    def heads(self, level: str, width: int) -> int:
        """Number of attention heads: by norms of queries or by rotary tables, else of published sizes."""
        for name in (f"{level}_blocks.*.branches.mix.qk_norm.query", f"={level}.cos"):
            if self.has(name):
                seen = max(1, width // self.shape(name, 1, 2)[-1])
                if level == "outer" and self.official.heads not in (None, seen):
                    raise UserError(f"--num-heads: {self.what} is for {seen} heads: leave out this option")
                return seen
        if level == "inner" and width != self.width:
            return self.literal.inner.num_heads
        sizes = [*(size[1] for size in self.published), *presets.SIZES.values()]
        known = {(depth, wide): number for depth, wide, number in sizes}
        heads = self.official.heads or known.get((self.depth, width))
        if heads is None:
            raise UserError(f"{self.what}: {self.depth} blocks of width {width}, no published size: give --num-heads")
        return heads

    def ratio(self, level: OuterConfig, name: str, width: int) -> float:
        """`mlp_ratio` of a level; that of the literal if it gives the same MLP."""
        first = {"swiglu": "up", "hyper": "weights"}.get(level.mlp, "0")
        ours = f"{name}_blocks.*.branches.mlp.{first}.weight"
        rows, literal = self.shape(ours, 2)[0] * len(official_names(self.kind, ours)), int(width * level.mlp_ratio)
        if {"swiglu": 2 * (2 * literal // 3), "hyper": 2 * width * literal}.get(level.mlp, literal) == rows:
            return level.mlp_ratio
        hidden = {"swiglu": -(-3 * (rows // 2) // 2), "hyper": rows // (2 * width)}.get(level.mlp, rows)
        return (hidden if int(width * (hidden / width)) == hidden else hidden + 0.5) / width

    def image(self) -> tuple[int, int, tuple[int, int]]:
        """Channels, patch size, and height and width of images."""
        model = self.literal
        shape = self.shape(f"outer_embed.{'bottleneck' if model.bottleneck else 'proj'}.weight", 2, 4)
        if len(shape) == 4:
            channels, patch = shape[1:3]
        elif model.inner.sub_patch == 1:  # the last layer gives a pixel
            channels = self.shape("inner_head.final.linear.weight", 2)[0]
            patch = max(1, math.isqrt(shape[1] // channels))
        else:
            known = [model.patch_size] if shape[1] == model.channels * model.patch_size**2 else []
            patch = check_whole(self.ask("model.patch_size", known), "model.patch_size", 1, 4096)
            channels = max(1, shape[1] // patch**2)
        tables = [name for name in ("=outer.position", "=inner.cos") if official_names(self.kind, name)]
        if not tables:
            return channels, patch, self.official.size or model.image_size
        length, name = self.shape(tables[0], 2, 3)[-2], official_names(self.kind, tables[0])[0]
        side = math.isqrt(length)
        if side**2 != length:
            raise UserError(f"{self.what}: {name} has {length} places, which is no square: images must be square")
        size = (side * patch, side * patch)
        if self.official.size not in (None, size):
            raise UserError(f"--image-size: {self.what} is for images of {size[0]}x{size[1]}: leave out this option")
        return channels, patch, size

    def tokens(self) -> TokensConfig:
        """Tokens of time and class."""
        tokens = self.literal.tokens
        if tokens.rows == "own":
            return replace(tokens, label=self.shape("tokens.own.table.weight", 2)[1] // self.width)
        label = self.shape("tokens.label_offsets", 2, 3)[-2] if tokens.label else 0
        time = self.shape("tokens.time_offsets", 2)[0] if tokens.time else 0
        known = [size[3].get("tokens", tokens).start for size in self.published if size[1][0] == self.depth]
        start = self.ask("model.tokens.start", known) if tokens.start else 0
        return replace(tokens, label=label, time=time, start=start)

    def inner(self, patch: int) -> InnerConfig:
        """The inner level."""
        inner = self.literal.inner
        width, _, *kernel = self.shape(f"inner_embed.embed.{'proj' if inner.embed == 'dct' else '1'}.weight", 2, 4)
        whole = patch if inner.sub_patch == self.literal.patch_size else inner.sub_patch
        heads = self.heads("inner", width) if inner.mixer == "image" else inner.num_heads
        sub_patch, ratio = kernel[0] if kernel else whole, self.ratio(inner, "inner", width)
        return replace(inner, width=width, num_heads=heads, sub_patch=sub_patch, mlp_ratio=ratio)


def model_of(official: OfficialWeights, what: str) -> ModelConfig:
    """The architecture of weights, which errors call `what`; sizes that shapes do not show are the published ones.
    UserError when a weight is missing, unknown or of another shape, a computed table differs, or a size is unknown."""
    read, kind = _Reader(official, what), official.kind
    model, nested = read.literal, bool(read.inner_depth)
    channels, patch, image_size = read.image()
    heads, ratio = read.heads("outer", read.width), read.ratio(model.outer, "outer", read.width)
    out = read.shape(f"{'inner' if nested else 'outer'}_head.final.linear.weight", 2)[0]
    model = replace(
        model,
        image_size=image_size,
        channels=channels,
        patch_size=patch,
        num_classes=shape_of(official.averaged, label_table(kind), (2,), what, kind)[0] - 1,
        stages=f"outer*{read.depth}" + (f" inner*{read.inner_depth}" if nested else ""),
        learn_variance=kind in ALIKE and out == 2 * channels * patch**2,
        time_embed=official.clock if kind == "dit" else model.time_embed,
        qk_norm=model.qk_norm or read.has("outer_blocks.*.branches.mix.qk_norm.query"),
        mlp_norm_eps=official.eps,
        bottleneck=read.shape("outer_embed.bottleneck.weight", 4)[0] if model.bottleneck else 0,
        tokens=read.tokens(),
        outer=replace(model.outer, width=read.width, num_heads=heads, mlp_ratio=ratio),
        inner=read.inner(patch) if nested else model.inner,
    )
    if read.unseen:
        raise UserError(f"--set {next(iter(read.unseen))}: the weights determine this key: leave it out")
    check_official(official.averaged, kind, model, what)
    return model
