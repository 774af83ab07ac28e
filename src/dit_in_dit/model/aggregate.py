"""Connections between the levels: aggregate (inner -> outer), fuse (with the outer tokens), spread (outer -> inner).

Each choice is a class in a table; its base class states what a choice must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.layers import attend, attention_weights, layer_norm, sincos
from dit_in_dit.model.modulation import Modulation


class Aggregator(nn.Module, ABC):
    """Pooling of each patch's sub-patches, (N, T, S, E) -> (N, T, D); constructed by `cls(model)`."""

    # nothing: equal weights; position: weights learned per position in the patch; tokens: computed from the tokens.
    weights_depend_on: ClassVar[Literal["nothing", "position", "tokens"]] = "tokens"

    @staticmethod
    @abstractmethod
    def macs(model: ModelConfig) -> int:
        """MACs per image."""

    @abstractmethod
    def weights(self, inner: Tensor) -> Tensor:
        """Weight of each sub-patch, (N, T, heads, S)."""

    def initialise(self) -> None:
        """Initialise parameters that the default (`xavier_uniform_` of linear and convolution layers) does not suit."""


class Mean(Aggregator):
    """Mean over the sub-patches, then a linear layer if the widths of the levels differ; (N, T, S, E) -> (N, T, D)."""

    weights_depend_on: ClassVar[Literal["nothing", "position"]] = "nothing"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        widths = model.inner.width, model.outer.width
        self.proj = nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        same = model.inner.width == model.outer.width
        return 0 if same else model.patches * model.inner.width * model.outer.width

    def weights(self, inner: Tensor) -> Tensor:
        """The same weight, 1/S, for every sub-patch; (N, T, 1, S)."""
        return torch.full_like(inner[..., 0], 1 / inner.shape[2])[:, :, None]

    def forward(self, inner: Tensor) -> Tensor:
        return self.proj(inner.mean(dim=2))


class Weighted(Mean):
    """Weighted sum; one learned weight per sub-patch position, initially 1/S (the mean); (N, T, S, E) -> (N, T, D)."""

    weights_depend_on = "position"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.weight = nn.Parameter(torch.full((model.sub_patches,), 1 / model.sub_patches))

    @staticmethod
    def macs(model: ModelConfig) -> int:
        return model.patches * model.sub_patches * model.inner.width + Mean.macs(model)

    def weights(self, inner: Tensor) -> Tensor:
        """Learned weight of each sub-patch, (N, T, 1, S); the weights need not sum to one."""
        return self.weight.expand(*inner.shape[:2], 1, -1)

    def forward(self, inner: Tensor) -> Tensor:
        return self.proj(torch.einsum("ntse,s->nte", inner, self.weight))


class AttentionPool(Aggregator):
    """Attention pooling with one learned query per head; (N, T, S, E) -> (N, T, D)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, heads = model.inner.width, model.inner.num_heads
        self.query = nn.Parameter(torch.zeros(heads, 1, width // heads))
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, model.outer.width)

    def initialise(self) -> None:
        """Start near the mean: small queries give nearly equal weights."""
        nn.init.normal_(self.query, std=0.02)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        width = model.inner.width
        per_patch = model.sub_patches * (2 * width**2 + 2 * width) + width * model.outer.width
        return model.patches * per_patch

    def heads(self, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N*T, heads, 1, d), keys and values (N*T, heads, S, d)."""
        kv = self.kv(layer_norm(inner)).flatten(0, 1).unflatten(-1, (2, self.query.shape[0], -1))  # NT S 2 heads d
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))
        return self.query.to(k.dtype).expand(k.shape[0], -1, -1, -1), k, v

    def weights(self, inner: Tensor) -> Tensor:
        """Attention weight of each sub-patch, (N, T, heads, S)."""
        q, k, _ = self.heads(inner)
        return attention_weights(q, k).view(*inner.shape[:2], -1, inner.shape[2])

    def forward(self, inner: Tensor) -> Tensor:
        pooled = attend(*self.heads(inner))  # NT heads 1 d
        return self.proj(pooled.view(*inner.shape[:2], -1))  # N T D


class Concat(Aggregator):
    """Concatenation of the sub-patches, then one linear layer, as in TNT; (N, T, S, E) -> (N, T, D)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(model.sub_patches * model.inner.width, model.outer.width)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        return model.patches * model.sub_patches * model.inner.width * model.outer.width

    def weights(self, inner: Tensor) -> Tensor:
        """In place of weights, (N, T, 1, S): the norm of each sub-patch's contribution over the sum of these norms."""
        parts = self.proj.weight.view(-1, *inner.shape[2:])  # D S E
        shares = torch.einsum("ntse,dse->ntsd", inner, parts).norm(dim=-1)
        return (shares / shares.sum(-1, keepdim=True).clamp(min=1e-12))[:, :, None]

    def forward(self, inner: Tensor) -> Tensor:
        return self.proj(inner.flatten(2))


AGGREGATORS: dict[str, type[Aggregator]] = {
    "mean": Mean,
    "weighted": Weighted,
    "attention": AttentionPool,
    "concat": Concat,
}


class Fusion(nn.Module):
    """Fusion of outer and aggregated tokens, both (N, T, D) -> (N, T, D); constructed by `cls(model)`."""

    keeps_outer: ClassVar[bool] = True  # whether the outer tokens are kept; false is the "no residual" ablation
    starts_closed: ClassVar[bool] = False  # whether a new model's output is that of its outer blocks

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()


class Add(Fusion):
    """outer + aggregated."""

    def forward(self, outer: Tensor, aggregated: Tensor) -> Tensor:
        return outer + aggregated


class Gate(Fusion):
    """outer + gate * aggregated. The gate, learned per channel, starts at zero: the inner level then adds nothing."""

    starts_closed = True

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.gate = nn.Parameter(torch.zeros(model.outer.width))

    def forward(self, outer: Tensor, aggregated: Tensor) -> Tensor:
        return torch.addcmul(outer, self.gate, aggregated)


class Replace(Fusion):
    """aggregated + position, the "no residual" ablation: the content of the outer tokens is lost. The positions of
    the patches stay, because no arrangement works without positions."""

    keeps_outer = False

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        fixed = sincos(model.outer.width, *model.grid) if model.outer.position == "sincos" else torch.zeros(())
        self.register_buffer("position", fixed, persistent=False)
        self.position: Tensor

    def forward(self, outer: Tensor, aggregated: Tensor) -> Tensor:
        return aggregated + self.position


FUSIONS: dict[str, type[Fusion]] = {"add": Add, "gate": Gate, "replace": Replace}


class Spread(nn.Module, ABC):
    """Broadcast of patch tokens to their sub-patches: inner (N, T, S, E), outer (N, T, D) and c (N, D) -> (N, T, S, E);
    constructed by `cls(model)`."""

    @staticmethod
    @abstractmethod
    def macs(model: ModelConfig) -> int:
        """MACs per image."""

    @abstractmethod
    def forward(self, inner: Tensor, outer: Tensor, c: Tensor) -> Tensor:
        """Sub-patch tokens combined with the message from their patch, (N, T, S, E)."""


class AddSpread(Spread):
    """Sum of each sub-patch token and the message from its patch."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.sub_patches = model.sub_patches
        self.proj = nn.Linear(model.outer.width, model.sub_patches * model.inner.width)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        return model.patches * model.outer.width * model.sub_patches * model.inner.width

    def message(self, outer: Tensor) -> Tensor:
        """Messages to the sub-patches, (N, T, D) -> (N, T, S, E)."""
        return self.proj(layer_norm(outer)).unflatten(-1, (self.sub_patches, -1))

    def forward(self, inner: Tensor, outer: Tensor, c: Tensor) -> Tensor:
        return inner + self.message(outer)


class Interpolate(AddSpread):
    """Per-channel interpolation between the sub-patch token and the message from its patch; the weight is predicted
    from c and starts at 1/2.

    Sub-patch tokens come from noisy pixels: at low noise they hold the detail, at high noise they hide the message.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.share = Modulation(model.outer.width, model.inner.width, 1)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        return AddSpread.macs(model) + model.outer.width * model.inner.width

    def forward(self, inner: Tensor, outer: Tensor, c: Tensor) -> Tensor:
        (share,) = self.share(c)
        # One dtype: under autocast a linear layer's output is narrower than the tokens, and lerp does not promote.
        message, share = (part.to(inner.dtype) for part in (self.message(outer), share.sigmoid()[:, None, None]))
        return torch.lerp(inner, message, share)


class NoSpread(Spread):
    """The sub-patch tokens as they are: the outer tokens reach them only as conditioning rows (DDT, DeCo, PixelDiT)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()

    @staticmethod
    def macs(model: ModelConfig) -> int:
        return 0

    def forward(self, inner: Tensor, outer: Tensor, c: Tensor) -> Tensor:
        return inner


class Refine(AddSpread):
    """Sum of each sub-patch token and a message from two linear layers with a GELU and a norm between them (MPDiT)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.refine = nn.Linear(model.inner.width, model.inner.width)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        tokens = model.patches * model.sub_patches + model.carries_tokens * model.tokens.count
        return AddSpread.macs(model) + tokens * model.inner.width**2

    def carry(self, tokens: Tensor) -> Tensor:
        """Tokens of time and class for the inner level, (N, K, E) -> (N, K, E)."""
        return self.refine(layer_norm(tokens))

    def message(self, outer: Tensor) -> Tensor:
        message = F.gelu(self.proj(outer), approximate="tanh")
        return self.carry(message.view(*message.shape[:2], self.sub_patches, -1))


SPREADS: dict[str, type[Spread]] = {"add": AddSpread, "interpolate": Interpolate, "none": NoSpread, "refine": Refine}
