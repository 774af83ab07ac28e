"""Mixers: which inner tokens see each other. Every mixer maps (N, T, S, E) to the same shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.layers import Attention
from dit_in_dit.model.rope import ROPES, by_patch, patch_rope, places


class Mixer(nn.Module, ABC):
    """Mixing of inner tokens, (N, T, S, E) -> (N, T, S, E); constructed by `cls(model)`."""

    crosses_patches: ClassVar[bool] = False  # whether a token sees past its patch; if so, it gets its image position
    why_no_attention: ClassVar[str] = "inner tokens are mixed without attention"  # shown in place of attention maps

    @classmethod
    @abstractmethod
    def macs(cls, model: ModelConfig) -> int:
        """MACs per inner token."""

    @classmethod
    def image_macs(cls, model: ModelConfig) -> int:
        """MACs per image."""
        return cls.macs(model) * model.patches * model.sub_patches

    @staticmethod
    def length(model: ModelConfig) -> int:
        """Tokens that one token attends to; 0 without attention."""
        return 0

    def initialise(self) -> None:
        """Initialise parameters that the default (`xavier_uniform_` of linear and convolution layers) does not suit."""


class PatchMixer(Attention, Mixer):
    """Attention among the S sub-patches of a patch, in one call for all N*T patches."""

    def __init__(self, model: ModelConfig) -> None:
        inner = model.inner
        super().__init__(inner.width, inner.num_heads, qk_norm=model.qk_norm, bias=inner.bias == "all")
        if make := ROPES[inner.rope]:
            sides, (rows, columns), i = [side * model.sub_grid for side in model.grid], self.span(model), model.sub_grid
            where = by_patch(places(rows * i, columns * i), (rows, columns), i).flatten(0, 1)  # as `group` orders them
            self.rope = make(
                inner.width // inner.num_heads, where, (sides[0], sides[1]), model.carries_tokens * model.tokens.count
            )

    @staticmethod
    def span(model: ModelConfig) -> tuple[int, int]:
        """Patches down and across whose tokens attend to each other."""
        return 1, 1

    @staticmethod
    def length(model: ModelConfig) -> int:
        return model.sub_patches

    @classmethod
    def macs(cls, model: ModelConfig) -> int:
        return 4 * model.inner.width**2 + 2 * cls.length(model) * model.inner.width

    def group(self, x: Tensor) -> Tensor:
        """(N, T, S, E) -> (groups, length, E)."""
        return x.flatten(0, 1)

    def ungroup(self, x: Tensor, shape: torch.Size) -> Tensor:
        """(groups, length, E) -> (N, T, S, E)."""
        return x.view(shape)

    def packed(self, x: Tensor) -> Tensor:
        """Queries, keys and values in one tensor, (groups, length, 3, heads, d)."""
        return super().packed(self.group(x))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # inner tokens all take part
        return self.ungroup(super().forward(x), x.shape)


class WindowMixer(PatchMixer):
    """Attention within fixed windows of `window` x `window` patches."""

    crosses_patches = True

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        side = model.inner.window
        self.sizes = {"h": model.grid[0] // side, "w": model.grid[1] // side, "a": side, "b": side}

    @staticmethod
    def span(model: ModelConfig) -> tuple[int, int]:
        return model.inner.window, model.inner.window

    @staticmethod
    def length(model: ModelConfig) -> int:
        return model.inner.window**2 * model.sub_patches

    def group(self, x: Tensor) -> Tensor:
        """(N, T, S, E) -> (windows, length, E)."""
        return rearrange(x, "n (h a w b) s e -> (n h w) (a b s) e", **self.sizes)

    def ungroup(self, x: Tensor, shape: torch.Size) -> Tensor:
        """(windows, length, E) -> (N, T, S, E)."""
        return rearrange(x, "(n h w) (a b s) e -> n (h a w b) s e", **self.sizes)


class ImageMixer(PatchMixer):
    """Attention among all T*S sub-patches of the image."""

    crosses_patches = True

    @staticmethod
    def span(model: ModelConfig) -> tuple[int, int]:
        return model.grid

    @staticmethod
    def length(model: ModelConfig) -> int:
        return model.patches * model.sub_patches

    @classmethod
    def image_macs(cls, model: ModelConfig) -> int:
        tokens = cls.length(model) + model.carries_tokens * model.tokens.count
        return tokens * (4 * model.inner.width**2 + 2 * tokens * model.inner.width)

    def group(self, x: Tensor) -> Tensor:
        """(N, T, S, E) -> (N, T*S, E); with tokens of time and class in front, (N, L, E) as it is."""
        return x if x.ndim == 3 else x.flatten(1, 2)


class ConvMixer(Mixer):
    """A 3x3 depthwise convolution over the sub-patch grid of the image, zero-padded at its border.

    The block's MLP mixes the channels, as in ConvNeXt (Liu et al. 2022).
    """

    crosses_patches = True
    why_no_attention = "inner tokens see their neighbours through a fixed 3x3 kernel, not by attention"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.sizes = {"h": model.grid[0], "i": model.sub_grid, "j": model.sub_grid}
        self.conv = nn.Conv2d(model.inner.width, model.inner.width, 3, padding=1, groups=model.inner.width)

    def initialise(self) -> None:
        """Keep the variance of the tokens: the nine weights of a kernel have standard deviation 1/3."""
        nn.init.normal_(self.conv.weight, std=1 / 3)

    @classmethod
    def macs(cls, model: ModelConfig) -> int:
        return 9 * model.inner.width

    def forward(self, x: Tensor) -> Tensor:
        # Rearranging moves whole tokens; the convolution then reads their channels last, as they lie in memory.
        grid = rearrange(x, "n (h w) (i j) e -> n (h i) (w j) e", **self.sizes)
        mixed = self.conv(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # N rows columns E
        return rearrange(mixed, "n (h i) (w j) e -> n (h w) (i j) e", **self.sizes)


class CompactMixer(Mixer):
    """Attention among patches: a linear layer compacts the sub-patches of a patch to one token of the outer width, and
    another expands it again (PixelDiT's token compaction). Heads are those of the outer level."""

    crosses_patches = True
    why_no_attention = "each patch is compacted to one token, and these tokens attend to each other"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        outer, size = model.outer, model.sub_patches * model.inner.width
        self.compress, self.expand = nn.Linear(size, outer.width), nn.Linear(outer.width, size)
        bias, rope = model.inner.bias == "all", patch_rope(model.inner.rope, model)
        self.attention = Attention(outer.width, outer.num_heads, qk_norm=model.qk_norm, bias=bias, rope=rope)

    @classmethod
    def macs(cls, model: ModelConfig) -> int:
        return cls.image_macs(model) // (model.patches * model.sub_patches)

    @classmethod
    def image_macs(cls, model: ModelConfig) -> int:
        width, size = model.outer.width, model.sub_patches * model.inner.width
        return model.patches * (2 * size * width + 4 * width**2 + 2 * model.patches * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.attention(self.compress(x.flatten(2)))).view(x.shape)


MIXERS: dict[str, type[Mixer] | None] = {
    "patch": PatchMixer,
    "window": WindowMixer,
    "image": ImageMixer,
    "conv": ConvMixer,
    "compact": CompactMixer,
    "none": None,  # tokens do not see each other: the inner block is only an MLP
}
