"""Conditioning of adaLN: embeddings of time and label, and the conditioning rows of the inner level."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import AUTO, ModelConfig
from dit_in_dit.model.layers import layer_norm

TIME_FREQUENCIES = 256  # sinusoidal features of time, as in DiT


def _steps(t: Tensor) -> Tensor:
    return 1000 * t


def _towards_image(t: Tensor) -> Tensor:
    return 1 - t


TIME_SCALES: dict[str, Callable[[Tensor], Tensor]] = {"dit": _steps, "diffusers": _steps, "sit": _towards_image}


class TimeEmbed(nn.Module):
    """Sinusoids of time in float32, then an MLP in `dtype`; t (N,) -> (N, D). t is in [0, 1], and 1 is pure noise.

    Trained weights need the time scale of their training (`kind`). dit: 1000 t. sit: 1 - t, with noise at 0 and the
    image at 1. diffusers: 1000 t, with frequencies that end at 1/10000; the frequencies of dit end just above 1/10000.
    """

    def __init__(self, width: int, kind: str = "dit") -> None:
        super().__init__()
        self.clock = TIME_SCALES[kind]
        self.last = TIME_FREQUENCIES // 2 - (kind == "diffusers")  # index at which frequencies reach 1/10000
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def initialise(self) -> None:
        """Initialise weights as DiT does."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        """MACs per image."""
        return TIME_FREQUENCIES * model.outer.width + model.outer.width**2

    def forward(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        steps = torch.arange(TIME_FREQUENCIES // 2, dtype=torch.float32, device=t.device)
        angle = self.clock(t.float())[:, None] * torch.exp(-math.log(10000) * steps / self.last)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype))


class LabelEmbed(nn.Module):
    """One vector per class, the null class last; y (N,) int64 -> (N, D). If y is None, the null class: (D,)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        if num_classes == AUTO:
            raise UserError("model.num_classes=auto is counted when a run starts: set a number to build a model alone")
        self.table = nn.Embedding(num_classes + 1, width)

    def initialise(self) -> None:
        """Initialise the vectors as DiT does."""
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, y: Tensor | None) -> Tensor:
        return self.table.weight[-1] if y is None else self.table(y)


class Condition(nn.Module, ABC):
    """Conditioning rows of inner adaLN: c (N, D) and outer tokens (N, T, D) -> (N, 1|T, 1|S, width); constructed by
    `cls(model)`."""

    reads_outer: ClassVar[bool] = True  # whether the rows depend on the outer tokens; if false, only on c

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def width(model: ModelConfig) -> int:
        """Width of a conditioning row."""

    @staticmethod
    @abstractmethod
    def rows(model: ModelConfig) -> int:
        """Conditioning rows per image."""

    @staticmethod
    @abstractmethod
    def macs(model: ModelConfig) -> int:
        """MACs per image and inner stage."""


class ImageCondition(Condition):
    """c as one row per image, (N, 1, 1, D)."""

    reads_outer = False

    @staticmethod
    def width(model: ModelConfig) -> int:
        return model.outer.width

    @staticmethod
    def rows(model: ModelConfig) -> int:
        return 1

    @staticmethod
    def macs(model: ModelConfig) -> int:
        return 0

    def forward(self, c: Tensor, outer: Tensor) -> Tensor:
        return c[:, None, None]


class PatchCondition(ImageCondition):
    """c plus the normalised outer token as one row per patch, (N, T, 1, D).

    The token is normalised because outer tokens grow with depth, whereas c does not.
    """

    reads_outer = True

    @staticmethod
    def rows(model: ModelConfig) -> int:
        return model.patches

    def forward(self, c: Tensor, outer: Tensor) -> Tensor:
        return (c[:, None] + layer_norm(outer))[:, :, None]


class SubPatchCondition(Condition):
    """c plus the normalised outer token, projected to a row per sub-patch; -> (N, T, S, E).

    Rows have the inner width, as in PixelDiT: with a row of width D for each sub-patch, adaLN's layers (D -> 6 E) would
    cost more than the inner blocks.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.sub_patches = model.sub_patches
        self.proj = nn.Linear(model.outer.width, model.sub_patches * model.inner.width)

    @staticmethod
    def width(model: ModelConfig) -> int:
        return model.inner.width

    @staticmethod
    def rows(model: ModelConfig) -> int:
        return model.patches * model.sub_patches

    @staticmethod
    def macs(model: ModelConfig) -> int:
        return model.patches * model.outer.width * model.sub_patches * model.inner.width

    def forward(self, c: Tensor, outer: Tensor) -> Tensor:
        return self.proj(c[:, None] + layer_norm(outer)).unflatten(-1, (self.sub_patches, -1))


CONDITIONS: dict[str, type[Condition]] = {
    "image": ImageCondition,
    "patch": PatchCondition,
    "sub_patch": SubPatchCondition,
}
