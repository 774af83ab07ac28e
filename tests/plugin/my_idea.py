"""Parts of a user's, outside the package: what CONTRIBUTING.md shows, and tests train with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

import dit_in_dit
from dit_in_dit.config.run import DataConfig, ModelConfig
from dit_in_dit.config.samplers import Sampler
from dit_in_dit.config.schema import Section, key
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.data.picture import Array
from dit_in_dit.data.source import Source
from dit_in_dit.metrics.metric import Images, Metric
from dit_in_dit.model.aggregate import Aggregator, Fusion, Spread
from dit_in_dit.model.condition import Condition, TimeEmbed
from dit_in_dit.model.embed import Embed
from dit_in_dit.model.mixers import Mixer
from dit_in_dit.model.mlps import Mlp
from dit_in_dit.model.modulation import BlockModulation
from dit_in_dit.model.norms import Norm
from dit_in_dit.model.rope import Rope
from dit_in_dit.training.optimizer import Groups


@dataclass(frozen=True)
class SoftmaxKeys(Section):
    """How Softmax weighs."""

    temperature: float = key(1.0, "divides the scores", low=0.01, high=100)


class Softmax(Aggregator):
    """Sub-patches weighed by a softmax over a learned score of each; (N, T, S, E) -> (N, T, D)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.temperature = model.plugins["softmax"].temperature
        self.score = nn.Linear(model.inner.width, 1)
        self.proj = nn.Linear(model.inner.width, model.outer.width)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        """Scores, the weighted sum and the projection, per image."""
        inner, outer = model.inner.width, model.outer.width
        return model.patches * (2 * model.sub_patches * inner + inner * outer)

    def weights(self, inner: Tensor) -> Tensor:
        """(N, T, 1, S), rows sum to one."""
        return (self.score(inner).transpose(-1, -2) / self.temperature).softmax(-1)

    def forward(self, inner: Tensor) -> Tensor:
        return self.proj((self.weights(inner) @ inner).squeeze(2))


class Shift(Mixer):
    """Every token takes a share of its patch's mean, per channel."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(model.inner.width))

    @classmethod
    def macs(cls, model: ModelConfig) -> int:
        """None: sums and products of single numbers are not counted."""
        return 0

    def initialise(self) -> None:
        """Begin with half of the mean."""
        nn.init.constant_(self.share, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, x.mean(2, keepdim=True).expand_as(x), self.share.to(x.dtype))


class Doubled(Fusion):
    """outer + 2 * aggregated."""

    def forward(self, outer: Tensor, aggregated: Tensor) -> Tensor:
        return outer + 2 * aggregated


class Flat(Embed):
    """The mean colour of each sub-patch, widened."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.sub_patch, self.sub_grid = model.inner.sub_patch, model.sub_grid
        self.proj = nn.Linear(model.channels, model.inner.width)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        """Per image."""
        return model.patches * model.sub_patches * model.channels * model.inner.width

    def forward(self, x: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(x, self.sub_patch).permute(0, 2, 3, 1)  # N H/s W/s C
        n, i = len(x), self.sub_grid
        grouped = means.reshape(n, means.shape[1] // i, i, means.shape[2] // i, i, -1).transpose(2, 3)
        return self.proj(grouped.reshape(n, -1, i * i, grouped.shape[-1]))


class Same(Spread):
    """One message for all sub-patches of a patch."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(model.outer.width, model.inner.width)

    @staticmethod
    def macs(model: ModelConfig) -> int:
        """Per image."""
        return model.patches * model.outer.width * model.inner.width

    def forward(self, inner: Tensor, outer: Tensor, c: Tensor) -> Tensor:
        return inner + self.proj(outer)[:, :, None]


class Halved(Condition):
    """c / 2, one row per image."""

    reads_outer = False

    @staticmethod
    def width(model: ModelConfig) -> int:
        """Width of a conditioning row."""
        return model.outer.width

    @staticmethod
    def rows(model: ModelConfig) -> int:
        """Conditioning rows per image."""
        return 1

    @staticmethod
    def macs(model: ModelConfig) -> int:
        """Per image and inner stage."""
        return 0

    def forward(self, c: Tensor, outer: Tensor) -> Tensor:
        return c[:, None, None] / 2


class Peak(Norm):
    """Each token divided by the largest absolute value of its channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().amax(-1, keepdim=True) + self.eps)


class Cubic(Mlp):
    """One linear layer, then the cube of a linear layer: a third-degree polynomial of each token."""

    def __init__(self, width: int, hidden: int, *, bias: bool = True, condition: int = 0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias), nn.Linear(hidden, width, bias)

    @staticmethod
    def macs(width: int, hidden: int) -> int:
        """Per token."""
        return 2 * width * hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) ** 3 / 10)


class RowRope(Rope):
    """Rows alone turn the channels, all at the same speeds."""

    @staticmethod
    def angles(places: Tensor, sides: tuple[int, int], frequencies: Tensor) -> Tensor:
        """(T, d/2)."""
        return (places[:, :1] * frequencies).repeat(1, 2)


class GateOnly(BlockModulation):
    """x + gate * branch(norm(x)), with one gate per branch that starts at zero."""

    per_branch = 1

    def __init__(self, condition: int, width: int, branches: int, places: int = 1) -> None:
        super().__init__()
        self.branches, self.places = branches, places
        self.linear = nn.Linear(condition, places * branches * width)

    def initialise(self) -> None:
        """Begin as the identity."""
        nn.init.zeros_(self.linear.weight)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        vectors = self.linear(c)
        if self.places > 1:
            vectors = vectors.unflatten(-1, (self.places, -1)).squeeze(2)
        return vectors.chunk(self.branches, dim=-1)

    @staticmethod
    def branch(x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor], *vectors: Tensor) -> Tensor:
        """Shapes as in adaLN-Zero."""
        return x + vectors[0] * branch(norm(x))


class PolynomialTime(TimeEmbed):
    """Powers of t, from the first to the eighth."""

    features_width = 8

    def features(self, t: Tensor) -> Tensor:
        """(N, 8)."""
        return t[:, None] ** torch.arange(1, 9, device=t.device)


class EvenSteps:
    """x + dt velocity, in even steps of t from 1 to 0: Euler's method."""

    prediction = "velocity"

    def set_timesteps(self, steps: int) -> None:
        """Begin again, with this number of steps."""
        self.sigmas = torch.linspace(1, 1 / steps, steps)
        self.timesteps = 1000 * self.sigmas
        self.following = [*self.sigmas[1:].tolist(), 0.0]

    def step(self, prediction: Tensor, timestep: Tensor, x: Tensor) -> SimpleNamespace:
        """The next x."""
        return SimpleNamespace(prev_sample=x + (self.following.pop(0) - timestep / 1000) * prediction)


def contrast(samples: Images, real: Images) -> float:
    """Deviation of the samples' pixels over that of real ones, in decibels."""
    return float(20 * np.log10((samples.std() + 1e-6) / (real.std() + 1e-6)))


class Dots(Source):
    """A bright square at a place that the number decides, in as many classes as the model has."""

    train_size, held_out_size, digest = 96, 8, "dots 1"

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        self.shape = model.image_shape
        self.classes = tuple(f"dots {number}" for number in range(max(1, model.num_classes)))

    def train(self, index: int) -> tuple[Array, int]:
        """Training image `index`."""
        _, height, width = self.shape
        image = np.full(self.shape, -1, np.float32)
        image[:, index % (height - 1) :, index // 7 % (width - 1) :] = 1
        return image, index % len(self.classes)

    def held_out(self, index: int) -> tuple[Array, int]:
        """Held-out image `index`."""
        return self.train(self.train_size + index)


def momentum(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    """Gradient descent with momentum."""
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=train.weight_decay)


dit_in_dit.register("source", "dots", Dots)
dit_in_dit.register("optimizer", "momentum", momentum)
dit_in_dit.register("sampler", "even", Sampler({"flow": EvenSteps}, spacings=()))
dit_in_dit.register("metric", "contrast", Metric("contrast", "Mine", "zero", contrast))
dit_in_dit.register("aggregate", "softmax", Softmax, keys=SoftmaxKeys)
dit_in_dit.register("mixer", "shift", Shift)
dit_in_dit.register("fuse", "doubled", Doubled)
dit_in_dit.register("embed", "flat", Flat)
dit_in_dit.register("spread", "same", Same)
dit_in_dit.register("condition", "halved", Halved)
dit_in_dit.register("norm", "peak", Peak)
dit_in_dit.register("mlp", "cubic", Cubic)
dit_in_dit.register("rope", "rows", RowRope)
dit_in_dit.register("modulation", "gate_only", GateOnly)
dit_in_dit.register("time_embed", "polynomial", PolynomialTime)
