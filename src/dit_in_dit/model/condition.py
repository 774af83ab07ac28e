"""Conditioning of adaLN: embeddings of time and label, and the conditioning rows of the inner level."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import AUTO, ModelConfig
from dit_in_dit.model.layers import layer_norm
from dit_in_dit.model.route import Route

TIME_FREQUENCIES = 256  # sinusoidal features of time, as in DiT


class TimeEmbed(nn.Module, ABC):
    """Features of time in float32, then an MLP in `dtype`; t (N,) -> (N, D). t is in [0, 1], and 1 is pure noise."""

    features_width: ClassVar[int] = TIME_FREQUENCIES

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.features_width, width), nn.SiLU(), nn.Linear(width, width))

    def initialise(self) -> None:
        """Initialise weights as DiT does."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    @classmethod
    def macs(cls, model: ModelConfig) -> int:
        """MACs per image."""
        return cls.features_width * model.outer.width + model.outer.width**2

    @abstractmethod
    def features(self, t: Tensor) -> Tensor:
        """Features of times in float32, (N,) -> (N, features_width)."""

    def forward(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.mlp(self.features(t.float()).to(dtype))


class DitTime(TimeEmbed):
    """Cosines and sines of 1000 t, at frequencies from 1 down to just above 1/10000 (DiT)."""

    last: ClassVar[int] = TIME_FREQUENCIES // 2  # index at which frequencies would reach 1 / longest
    longest: ClassVar[float] = 10000

    @staticmethod
    def clock(t: Tensor) -> Tensor:
        """The number of which cosines and sines are taken."""
        return 1000 * t

    def features(self, t: Tensor) -> Tensor:
        steps = torch.arange(TIME_FREQUENCIES // 2, dtype=torch.float32, device=t.device)
        angle = self.clock(t)[:, None] * torch.exp(-math.log(self.longest) * steps / self.last)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class DiffusersTime(DitTime):
    """As DiT, at frequencies that end at 1/10000 (diffusers' DiT)."""

    last = TIME_FREQUENCIES // 2 - 1


class SitTime(DitTime):
    """Of 1 - t, with noise at 0 and the image at 1 (SiT, LightningDiT, JiT)."""

    clock = staticmethod(lambda t: 1 - t)


class DdtTime(SitTime):
    """Of 1 - t, at frequencies from 1 down to just above 1/10 (DDT, DeCo, PixNerd, PixelDiT)."""

    longest = 10


class RepaTime(DitTime):
    """Of t as it is, with noise at 1 (REPA)."""

    clock = staticmethod(lambda t: t)


class GaussTime(TimeEmbed):
    """Sines and cosines of 2 pi t at 256 random frequencies, kept with the weights (Tancik et al. 2020; RAE)."""

    features_width = 2 * TIME_FREQUENCIES

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.frequencies = nn.Parameter(torch.empty(TIME_FREQUENCIES), requires_grad=False)

    def initialise(self) -> None:
        """Draw the frequencies, and initialise weights as DiT does."""
        super().initialise()
        nn.init.normal_(self.frequencies)

    def features(self, t: Tensor) -> Tensor:
        angle = 2 * math.pi * t[:, None] * self.frequencies.float()
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


TIME_EMBEDS: dict[str, type[TimeEmbed]] = {
    "dit": DitTime,
    "diffusers": DiffusersTime,
    "sit": SitTime,
    "ddt": DdtTime,
    "gauss": GaussTime,
    "repa": RepaTime,
}


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


class ConditionTokens(nn.Module):
    """Tokens of time and class, which outer blocks see beside the patches; time and label (N, D) -> (N, K, D)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        tokens, width = model.tokens, model.outer.width
        self.time_offsets = nn.Parameter(torch.zeros(tokens.time, width)) if tokens.time else None
        own, offsets = (tokens.label if tokens.rows == rows else 0 for rows in ("own", "offset"))
        self.own = LabelEmbed(model.num_classes, own * width) if own else None
        self.label_offsets = nn.Parameter(torch.zeros(offsets, width)) if offsets else None

    def initialise(self) -> None:
        """Initialise the offsets, which distinguish the tokens."""
        for offsets in (self.time_offsets, self.label_offsets):
            if offsets is not None:
                nn.init.normal_(offsets, std=0.02)

    def forward(self, time: Tensor, label: Tensor | None, y: Tensor | None) -> Tensor:
        tokens = []
        if self.time_offsets is not None:
            tokens.append(time[:, None] + self.time_offsets)
        if self.label_offsets is not None and label is not None:
            tokens.append(label.expand_as(time)[:, None] + self.label_offsets)
        if self.own is not None:
            own = self.own(y).unflatten(-1, (-1, time.shape[-1]))
            tokens.append(own if y is not None else own.expand(len(time), -1, -1))  # expanding y would fix N in ONNX
        return torch.cat(tokens, dim=1)


class Conditioning(NamedTuple):
    """What conditions the stages: c (N, D), the time alone (N, D), tokens beside the patches (N, K, D) and the vectors
    that blocks share (N, 6D), if there are any; in training dropout keys (N, blocks, 4) and the route of patches."""

    c: Tensor
    time: Tensor
    tokens: Tensor | None
    shared: Tensor | None
    dropout: Tensor | None = None
    route: Route | None = None

    def row(self, shared: bool) -> Tensor:
        """What adaLN of a level reads: c, or the shared vectors."""
        return self.shared if shared and self.shared is not None else self.c


class Condition(nn.Module, ABC):
    """Conditioning rows of inner adaLN: c (N, D) and outer tokens (N, T, D) -> (N, 1|T, 1|S, width); `cls(model)`."""

    reads_outer: ClassVar[bool] = True  # whether the rows depend on the outer tokens; if false, only on c
    reads_time: ClassVar[bool] = False  # whether `c` is the embedding of the time alone, without the class
    per_block: ClassVar[bool] = False  # whether each block projects a patch's row to its sub-patches

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
    """c plus the outer token, normalised because it grows with depth, as one row per patch, (N, T, 1, D)."""

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


class OuterCondition(PatchCondition):
    """The time plus the outer token as one row per patch, (N, T, 1, D) (DDT)."""

    reads_time = True

    def forward(self, c: Tensor, outer: Tensor) -> Tensor:
        return (c[:, None] + outer)[:, :, None]


class OuterSubPatchCondition(SubPatchCondition):
    """The SiLU of time plus outer token, projected to a row per sub-patch; -> (N, T, S, E) (DeCo; RAE at S = 1)."""

    reads_time = True

    def forward(self, c: Tensor, outer: Tensor) -> Tensor:
        return self.proj(F.silu(c[:, None] + outer)).unflatten(-1, (self.sub_patches, -1))


class OuterPerBlockCondition(OuterCondition):
    """The time plus the outer token, which each block projects to its own vectors per sub-patch (PixelDiT)."""

    per_block = True


CONDITIONS: dict[str, type[Condition]] = {
    "image": ImageCondition,
    "patch": PatchCondition,
    "sub_patch": SubPatchCondition,
    "outer": OuterCondition,
    "outer_sub_patch": OuterSubPatchCondition,
    "outer_per_block": OuterPerBlockCondition,
}
