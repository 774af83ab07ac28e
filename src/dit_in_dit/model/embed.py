"""Images to tokens and tokens to images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.layers import sincos


class OuterPosition(nn.Module):
    """Only the fixed position, for models in which no stage reads the patches; (N, C, H, W) -> (N, T, D)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("position", sincos(model.outer.width, *model.grid), persistent=False)
        self.position: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.position.expand(len(x), -1, -1)


class OuterEmbed(OuterPosition):
    """Patch embedding by one linear layer, plus the fixed position; (N, C, H, W) -> (N, T, D).

    The linear layer on a flattened patch (channel, row, column) equals DiT's strided convolution; its weight is the
    flattened weight of that convolution.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.patch = model.patch_size
        self.proj = nn.Linear(model.channels * self.patch**2, model.outer.width)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        """MACs per image."""
        return model.patches * model.channels * model.patch_size**2 * model.outer.width

    def forward(self, x: Tensor) -> Tensor:
        patches = rearrange(x, "n c (h p) (w q) -> n (h w) (c p q)", p=self.patch, q=self.patch)
        return self.proj(patches) + self.position


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


EMBEDS: dict[str, type[Embed]] = {"linear": LinearEmbed, "conv": ConvEmbed}


class InnerEmbed(nn.Module):
    """Embedded sub-patches of the noisy image plus their position; (N, C, H, W) -> (N, T, S, E).

    A learned position encodes the place in the patch. With `global_position`, for mixers that cross patches, a fixed
    position encodes the place in the image.
    """

    def __init__(self, model: ModelConfig, *, global_position: bool) -> None:
        super().__init__()
        self.embed = EMBEDS[model.inner.embed](model)
        self.position = nn.Parameter(torch.zeros(model.sub_patches, model.inner.width))
        fixed = torch.zeros(())
        if global_position:
            (h, w), i = model.grid, model.sub_grid
            fixed = sincos(model.inner.width, h * i, w * i).view(h, i, w, i, -1)
            # Not einops: its first use imports torch._dynamo, which fails in PyTorch 2.6 while a model is on meta.
            fixed = fixed.transpose(1, 2).reshape(h * w, i * i, -1)
        self.register_buffer("global_position", fixed, persistent=False)
        self.global_position: Tensor

    def initialise(self) -> None:
        """Initialise the learned position."""
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) + (self.position + self.global_position)


class NoEmbed(nn.Module):
    """No inner tokens, for a plain DiT; (N, C, H, W) -> an empty tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :0]


class OuterUnpatch(nn.Module):
    """Patches to the image, values in DiT's order (row, column, channel); (N, T, p*p*C) -> (N, C, H, W)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.sizes = {"h": model.grid[0], "p": model.patch_size, "q": model.patch_size}

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "n (h w) (p q c) -> n c (h p) (w q)", **self.sizes)


class InnerUnpatch(nn.Module):
    """Sub-patches to the image, values in the order (row, column, channel); (N, T, S, s*s*C) -> (N, C, H, W)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        s = model.inner.sub_patch
        self.sizes = {"h": model.grid[0], "i": model.sub_grid, "j": model.sub_grid, "p": s, "q": s}

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "n (h w) (i j) (p q c) -> n c (h i p) (w j q)", **self.sizes)
