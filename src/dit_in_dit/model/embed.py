"""Images to tokens and tokens to images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.layers import sincos
from dit_in_dit.model.rope import by_patch


class OuterPosition(nn.Module):
    """Only the fixed position, for models in which no stage reads the patches; (N, C, H, W) -> (N, T, D)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, added = model.outer.width, model.outer.position == "sincos"
        fixed = sincos(width, *model.grid) if added else torch.zeros(model.patches, width)
        self.register_buffer("position", fixed, persistent=False)
        self.position: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.position.expand(len(x), -1, -1)


class OuterEmbed(OuterPosition):
    """Patch embedding by one linear layer, or two with a bottleneck (JiT), plus the fixed position;
    (N, C, H, W) -> (N, T, D).

    The linear layer on a flattened patch (channel, row, column) equals DiT's strided convolution; its weight is the
    flattened weight of that convolution.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.patch = model.patch_size
        size = model.channels * self.patch**2
        self.bottleneck = nn.Linear(size, model.bottleneck, bias=False) if model.bottleneck else None
        self.proj = nn.Linear(model.bottleneck or size, model.outer.width)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        """MACs per image."""
        size = model.channels * model.patch_size**2
        narrow = model.bottleneck * (size + model.outer.width)
        return model.patches * (narrow or size * model.outer.width)

    def forward(self, x: Tensor) -> Tensor:
        patches = rearrange(x, "n c (h p) (w q) -> n (h w) (c p q)", p=self.patch, q=self.patch)
        return self.proj(self.bottleneck(patches) if self.bottleneck else patches) + self.position


class SplitSubPatches(nn.Module):
    """Sub-patches grouped by patch, (N, C, H, W) -> (N, T, S, C*s*s)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        s = model.inner.sub_patch
        self.sizes = {"p": s, "q": s, "i": model.sub_grid, "j": model.sub_grid}

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "n c (h i p) (w j q) -> n (h w) (i j) (c p q)", **self.sizes)


class Embed(nn.Module, ABC):
    """Sub-patch embedding, (N, C, H, W) -> (N, T, S, E); constructed by `cls(model)`."""

    crosses_patches: ClassVar[bool] = False  # whether a token sees past its patch

    @staticmethod
    @abstractmethod
    def macs(model: ModelConfig) -> int:
        """MACs per image."""


class LinearEmbed(nn.Sequential, Embed):
    """One linear layer, shared by all sub-patches; (N, C, H, W) -> (N, T, S, E)."""

    def __init__(self, model: ModelConfig) -> None:
        size = model.channels * model.inner.sub_patch**2
        super().__init__(SplitSubPatches(model), nn.Linear(size, model.inner.width))

    @staticmethod
    def macs(model: ModelConfig) -> int:
        inner = model.inner
        return model.patches * model.sub_patches * model.channels * inner.sub_patch**2 * inner.width


class ConvEmbed(Embed):
    """A padded convolution over `kernel` x `kernel` sub-patches, so that a token sees its neighbours, also across
    patch borders; (N, C, H, W) -> (N, T, S, E)."""

    crosses_patches = True

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        s, kernel = model.inner.sub_patch, model.inner.kernel
        self.sub_grid = model.sub_grid
        self.conv = nn.Conv2d(model.channels, model.inner.width, kernel * s, stride=s, padding=(kernel - 1) // 2 * s)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        return LinearEmbed.macs(model) * model.inner.kernel**2

    def forward(self, x: Tensor) -> Tensor:
        # Channels last, so that the convolution writes contiguous tokens. Permuted: vmap knows no memory format.
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        tokens = self.conv(x).permute(0, 2, 3, 1)  # N H/s W/s E
        return rearrange(tokens, "n (h i) (w j) e -> n (h w) (i j) e", i=self.sub_grid, j=self.sub_grid)


class DctEmbed(Embed):
    """One linear layer on a sub-patch's pixels and 64 features of its place in the patch (PixNerd, DeCo).

    Feature (i, j) is cos(pi f_i x) cos(pi f_j y) / (1 + f_i f_j); x and y run from 0 to 1, frequencies f from 0 to 8.
    """

    frequencies: ClassVar[int] = 8

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.split = SplitSubPatches(model)
        count, side = self.frequencies, model.sub_grid
        f, place = torch.linspace(0, count, count), torch.linspace(0, 1, side)
        wave = torch.cos(torch.pi * place[:, None] * f)  # side f
        features = wave[None, :, :, None] * wave[:, None, None, :] / (1 + f[:, None] * f)  # row column f f
        self.register_buffer("features", features.reshape(side**2, count**2), persistent=False)
        self.features: Tensor
        self.proj = nn.Linear(model.channels * model.inner.sub_patch**2 + count**2, model.inner.width)

    @classmethod
    def macs(cls, model: ModelConfig) -> int:
        size = model.channels * model.inner.sub_patch**2 + cls.frequencies**2
        return model.patches * model.sub_patches * size * model.inner.width

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.split(x)
        return self.proj(torch.cat([pixels, self.features.to(pixels.dtype).expand(*pixels.shape[:2], -1, -1)], dim=-1))


EMBEDS: dict[str, type[Embed]] = {"linear": LinearEmbed, "conv": ConvEmbed, "dct": DctEmbed}


class InnerEmbed(nn.Module):
    """Embedded sub-patches of the noisy image plus their position; (N, C, H, W) -> (N, T, S, E).

    A learned position encodes the place in the patch, a fixed position the place in the image.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width = model.inner.width
        self.embed = EMBEDS[model.inner.embed](model)
        self.second = nn.Linear(width, width) if model.inner.embed_layers == 2 else None
        learned = model.inner.position == "learned"
        self.position = nn.Parameter(torch.zeros(model.sub_patches, width)) if learned else None
        fixed = torch.zeros(())
        if model.has_inner_sincos:
            sides = [side * model.sub_grid for side in model.grid]
            fixed = by_patch(sincos(width, *sides).view(*sides, -1), model.grid, model.sub_grid)
        self.register_buffer("global_position", fixed, persistent=False)
        self.global_position: Tensor

    def initialise(self) -> None:
        """Initialise the learned position."""
        if self.position is not None:
            nn.init.normal_(self.position, std=0.02)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        """MACs per image."""
        second = model.patches * model.sub_patches * model.inner.width**2 if model.inner.embed_layers == 2 else 0
        return EMBEDS[model.inner.embed].macs(model) + second

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        tokens = self.second(tokens) if self.second else tokens
        return tokens + (self.global_position if self.position is None else self.position + self.global_position)


class Unpatch(nn.Module):
    """Tokens to the image, values in DiT's order (row, column, channel): patches (N, T, p*p*C), or sub-patches
    (N, T, S, s*s*C) if `is_inner`, -> (N, C, H, W)."""

    def __init__(self, model: ModelConfig, *, is_inner: bool) -> None:
        super().__init__()
        side, i = (model.inner.sub_patch, model.sub_grid) if is_inner else (model.patch_size, 1)
        self.sizes = {"h": model.grid[0], "i": i, "j": i, "p": side, "q": side}

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x.flatten(1, -2), "n (h w i j) (p q c) -> n c (h i p) (w j q)", **self.sizes)


class AugmentEmbed(nn.Module):
    """A linear layer without bias from augmentation labels, zero at first as in EDM's ADM; (N, L) -> (N, D)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(model.outer.width, model.augment_labels))

    def forward(self, labels: Tensor) -> Tensor:
        return F.linear(labels, self.weight)
