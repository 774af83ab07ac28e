"""The config of a model: the keys of both levels, with the rules between them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dit_in_dit.config.choices import crosses_patches, keeps_outer, reads_outer
from dit_in_dit.config.errors import UserError, did_you_mean
from dit_in_dit.config.program import MOST_BLOCKS, ORDERS, Program, merge_runs, parse_stages
from dit_in_dit.config.rules import check_internal_head, check_levels, check_reading
from dit_in_dit.config.schema import PluginKeys, Section, key

AUTO = -1  # model.num_classes=auto; data.summary.count_auto_classes replaces it by a number


@dataclass(frozen=True)
class OuterConfig(Section):
    """Keys that both transformers have."""

    prefix: ClassVar[str] = "model.outer"
    width: int = key(384, "token width: D of the outer level, E of the inner", low=1, high=65536)
    num_heads: int = key(6, "attention heads; must divide width", low=1, high=1024)
    mlp_ratio: float = key(4.0, "hidden width of the MLP / width", low=0.01, high=64)
    norm: Literal["layer", "layer_affine", "rms"] = key(
        "layer",
        "norm of blocks and head: layer (no parameters), layer_affine (weight and bias), rms (a weight per channel)",
        added=2,
    )
    mlp: Literal["gelu", "gelu_erf", "silu", "swiglu", "hyper"] = key(
        "gelu", "MLP: gelu (tanh), gelu_erf, silu, swiglu (2/3 as wide), hyper (weights made from the row)", added=3
    )
    bias: Literal["all", "mlp", "none"] = key(
        "all", "biases of blocks: all, mlp (none for q, k, v), none (also none in the MLP)", added=3
    )
    rope: Literal["none", "grid", "extent"] = key(
        "none", "rotary positions of attention: none, grid (0, 1, 2 ...), extent (0 to 16 over the image)", added=3
    )
    modulation: Literal["block", "post", "shared", "none"] = key(
        "block",
        "adaLN: block (adaLN-Zero), post (scale and shift after the branch), shared (one adaLN for all blocks), none",
        added=3,
    )
    position: Literal["sincos", "none"] = key("sincos", "position that is added to tokens: sincos, none", added=3)
    head_condition: Literal["image", "none"] = key("image", "input of the head's adaLN: image (c), none", added=3)
    head_norm: Literal["layer", "layer_affine", "rms"] | None = key(
        None, "norm of the head; null: the norm of the blocks", added=3
    )

    def check(self) -> None:
        if self.width % self.num_heads:
            raise UserError(f"{self.prefix}.num_heads must divide width: got {self.num_heads} for {self.width}")
        if self.mlp == "hyper" and self.modulation == "shared":
            raise UserError(f"{self.prefix}.mlp=hyper reads rows, and modulation=shared has none: set modulation=none")
        if self.bias != "all" and self.mlp == "hyper":
            raise UserError(
                f"{self.prefix}.bias={self.bias}: mlp=hyper has a bias only where it makes weights: set all"
            )

    def check_rope(self, width: int, heads: int) -> None:
        """Check that rotary positions fit the width of an attention head. Raises UserError."""
        if self.rope != "none" and width // heads % 4:
            raise UserError(
                f"{self.prefix}.rope needs a head width that is a multiple of 4: got {width // heads}; change num_heads"
            )

    @property
    def reads_rows(self) -> bool:
        """Whether blocks read conditioning rows."""
        return self.modulation not in ("shared", "none") or self.mlp == "hyper"


@dataclass(frozen=True)
class InnerConfig(OuterConfig):
    prefix: ClassVar[str] = "model.inner"
    depth_ratio: float = key(0.25, "named orders: inner blocks = max(1, int(depth * depth_ratio))", low=0, high=100)
    sub_patch: int = key(1, "sub-patch size s in pixels; must divide patch_size", low=1, high=4096)
    embed: Literal["linear", "conv", "dct"] = key(
        "linear",
        "sub-patch embedding: linear, conv (crosses patch borders), dct (linear, with DCT features of the place)",
    )
    embed_layers: int = key(1, "linear layers of the embedding; 2: one more, E -> E", low=1, high=2, added=3)
    kernel: int = key(3, "kernel size of embed=conv, in sub-patches; odd", low=1, high=31)
    aggregate: Literal["mean", "weighted", "attention", "concat"] = key(
        "mean", "inner -> outer: mean, weighted (learned per position), attention (learned query), concat"
    )
    mixer: Literal["patch", "window", "image", "conv", "compact", "none"] = key(
        "patch",
        "inner tokens see: own patch, window of patches, image, conv (3x3 depthwise), compact (attention among patches "
        "that are compacted to one token each), none (MLP only)",
    )
    window: int = key(2, "side of mixer=window, in patches; must divide the patch grid", low=1, high=1024)
    condition: Literal["image", "patch", "sub_patch", "outer", "outer_sub_patch", "outer_per_block"] = key(
        "image",
        "input of inner adaLN: image (c), patch (c + outer token), sub_patch (a vector per sub-patch), outer (time + "
        "outer token), outer_sub_patch (a vector of these per sub-patch), outer_per_block (projected in each block)",
    )
    spread: Literal["add", "interpolate", "none", "refine"] = key(
        "add",
        "outer -> inner: add, interpolate (a weight per channel, predicted from time and label), none, refine (GELU, "
        "norm and a linear layer before the sum)",
    )
    fuse: Literal["add", "gate", "replace"] = key(
        "add", "aggregated into outer: add, gate (starts at zero), replace (no residual, no outer head if inner ends)"
    )
    position: Literal["learned", "sincos", "none"] = key(  # type: ignore[assignment]  # more than the outer level has
        "learned",
        "position of inner tokens: learned (per place in the patch, with sincos if the mixer crosses patches), sincos "
        "(in the image), none",
        added=3,
    )
    head_condition: Literal["image", "rows", "none"] = key(  # type: ignore[assignment]
        "image", "input of the head's adaLN: image (c), rows (the inner blocks' conditioning rows), none", added=3
    )

    def check(self) -> None:
        super().check()
        if self.kernel % 2 == 0:
            raise UserError(f"model.inner.kernel must be odd, so that it has a centre: got {self.kernel}")


@dataclass(frozen=True)
class TokensConfig(Section):
    prefix: ClassVar[str] = "model.tokens"
    label: int = key(0, "class tokens, which outer blocks see beside the patches (JiT)", low=0, high=1024)
    time: int = key(0, "time tokens beside the patches (RAEv2)", low=0, high=1024)
    start: int = key(0, "outer block before which the tokens join the patches", low=0, high=MOST_BLOCKS)
    rows: Literal["offset", "own"] = key(
        "offset", "class tokens: offset (the class embedding plus a learned offset per token), own (a row per class)"
    )
    adaln: bool = key(True, "false: adaLN gets the time only, and the class comes through its tokens")

    def check(self) -> None:
        if not self.adaln and not self.label:
            raise UserError("model.tokens.adaln=false needs class tokens, or the model sees no class: set tokens.label")

    @property
    def count(self) -> int:
        """Tokens beside the patches."""
        return self.label + self.time


@dataclass(frozen=True)
class ModelConfig(Section):
    prefix: ClassVar[str] = "model"
    plugins: PluginKeys = field(default=PluginKeys(), repr=False, kw_only=True)  # set by RunConfig
    split: tuple[int, float, float] | None = field(default=None, repr=False, kw_only=True)  # set by RunConfig
    image_size: tuple[int, int] = key((32, 32), "height and width in pixels, or one number for both", low=1, high=65536)
    channels: int = key(3, "channels of the image or latent", low=1, high=4096)
    patch_size: int = key(8, "patch size p in pixels; must divide height and width", low=1, high=4096)
    num_classes: int = key(0, "number of classes; 0: no labels; auto: as many as the data has", low=AUTO, high=10**7)
    depth: int | None = key(None, "outer blocks of a named order; null with a program", low=1, high=MOST_BLOCKS)
    stages: str = key("outer*12", "named order (first, interleaved, last, both) or a program: 'inner*2 outer*6'")
    use_inner: bool = key(True, "false: outer blocks only, whatever stages says")
    learn_variance: bool = key(
        False, "double the output channels: the prediction, then the variance fraction (used on path ddpm)"
    )
    time_embed: Literal["dit", "diffusers", "sit", "ddt", "gauss", "repa"] = key(
        "dit",
        "sinusoids of 1000 t (dit), of 1000 t at the frequencies of diffusers' DiT (diffusers), of 1 - t (sit), of "
        "1 - t with periods up to 20 pi (ddt), of t (repa), of t at random frequencies (gauss)",
    )
    qk_norm: bool = key(False, "RMS norm of queries and keys with a learned scale, at both levels")
    mlp_norm_eps: float = key(1e-6, "epsilon of the norm before each MLP; diffusers' DiT has 1e-5", low=1e-12, high=1)
    bottleneck: int = key(
        0, "width of a first matrix of the patch embedding; 0: none (JiT: 128)", low=0, high=65536, added=3
    )
    silu_twice: bool = key(False, "SiLU of c before the SiLU of each adaLN (RAE)", added=3)
    internal_head: int = key(
        0, "outer blocks before a head of its own, whose weak predictions guide; 0: none", low=0, high=999, added=4
    )
    augment_labels: int = key(0, "augmentation labels it reads; 0: those of data.augment", low=0, high=64, added=4)
    tokens: TokensConfig = key(TokensConfig, "tokens of time and class beside the patches", added=3)
    outer: OuterConfig = key(OuterConfig, "the transformer over patches")
    inner: InnerConfig = key(InnerConfig, "the transformer over the sub-patches of each patch")

    def __post_init__(self) -> None:
        if self.num_classes == "auto":  # type: ignore[comparison-overlap]  # from YAML
            object.__setattr__(self, "num_classes", AUTO)
        super().__post_init__()

    def check(self) -> None:
        height, width = self.image_size
        if height % self.patch_size or width % self.patch_size:
            raise UserError(f"model.patch_size must divide image_size: got {self.patch_size} for {height}x{width}")
        if self.outer.width % 4 and self.outer.position == "sincos":
            raise UserError(f"model.outer.width must be a multiple of 4 (sin-cos position): got {self.outer.width}")
        self.outer.check_rope(self.outer.width, self.outer.num_heads)
        if self.patch_size % self.inner.sub_patch:
            raise UserError(
                f"model.inner.sub_patch must divide patch_size: got {self.inner.sub_patch} for {self.patch_size}"
            )
        if self.stages in ORDERS and self.depth is None:
            raise UserError(f"model.depth is needed by the named order {self.stages!r}: set model.depth=N")
        if self.stages not in ORDERS and self.depth is not None:
            if re.fullmatch(r"\w+", self.stages) and self.stages not in ("inner", "outer"):
                raise UserError(f"unknown stages {self.stages!r}{did_you_mean(self.stages, ORDERS)}")
            raise UserError(f"model.depth={self.depth} clashes with the program {self.stages!r}: set model.depth=null")
        for level in ("outer", "inner"):
            if self.blocks(level) > MOST_BLOCKS:
                raise UserError(f"at most {MOST_BLOCKS} {level} blocks: got {self.blocks(level)}")
        if not self.blocks("outer"):
            raise UserError(f"model.stages needs at least one outer block: got {self.stages!r}")
        if self.tokens.count and self.tokens.start >= self.blocks("outer"):
            raise UserError(
                f"model.tokens.start must be below the {self.blocks('outer')} outer blocks: got {self.tokens.start}"
            )
        if self.outer.mlp == "hyper":
            raise UserError("model.outer.mlp=hyper is for inner blocks: outer tokens share one row")
        if self.inner_stages:
            check_levels(self)
        check_reading(self)
        check_internal_head(self)

    @property
    def unwritten(self) -> tuple[str, ...]:
        """YAML of a model without an internal head and augmentation stays as it was."""
        return tuple(name for name in ("internal_head", "augment_labels") if not getattr(self, name))

    @property
    def program(self) -> Program:
        """The stages as (level, number of blocks) runs, with `use_inner` applied."""
        if self.depth is None:
            program = parse_stages(self.stages)
            return program if self.use_inner else merge_runs(run for run in program if run[0] == "outer")
        if not self.use_inner:
            return (("outer", self.depth),)
        return ORDERS[self.stages](self.depth, max(1, int(self.depth * self.inner.depth_ratio)))

    def blocks(self, level: str) -> int:
        """Number of blocks of one level."""
        return sum(count for name, count in self.program if name == level)

    @property
    def inner_stages(self) -> int:
        """Number of inner stages: runs of inner blocks."""
        return sum(level == "inner" for level, _ in self.program)

    @property
    def heads(self) -> tuple[str, ...]:
        """Levels that have a head: the last one, and the outer level unless its tokens are replaced."""
        if self.program[-1][0] == "outer":
            return ("outer",)
        return ("outer", "inner") if keeps_outer(self.inner.fuse) else ("inner",)

    @property
    def row_stages(self) -> int:
        """Number of inner stages that read conditioning rows: all, the last one (its head reads them), or none."""
        if self.inner.reads_rows:
            return self.inner_stages
        return int("inner" in self.heads and self.inner.head_condition == "rows" and self.inner.modulation != "shared")

    @property
    def reads_patches(self) -> bool:
        """Whether any stage reads the embedded patches; false if fusion replaces them all before a stage reads them."""
        replaced = self.program[0][0] == "inner" and not keeps_outer(self.inner.fuse)
        return not replaced or (reads_outer(self.inner.condition) and self.row_stages == self.inner_stages)

    @property
    def has_inner_sincos(self) -> bool:
        """Whether inner tokens get a fixed position in the image."""
        learned = self.inner.position == "learned"
        return self.inner.position == "sincos" or (learned and crosses_patches(self.inner.mixer))

    @property
    def carries_tokens(self) -> bool:
        """Whether the tokens of time and class go along to the inner level."""
        return bool(self.tokens.count) and self.inner.spread == "refine"

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.channels * (2 if self.learn_variance else 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image or a latent."""
        return self.channels, *self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """T, patches per image."""
        return self.grid[0] * self.grid[1]

    @property
    def sub_grid(self) -> int:
        """Sub-patches along one side of a patch."""
        return self.patch_size // self.inner.sub_patch

    @property
    def sub_patches(self) -> int:
        """S, sub-patches per patch."""
        return self.sub_grid**2
