"""MLPs of the blocks. Each is a class in a table, with its MACs beside its forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from dit_in_dit.model.gelu import Gelu


class Mlp(nn.Module, ABC):
    """MLP on each token, (..., D) -> (..., D); constructed by `cls(width, hidden, bias=, condition=)`.

    `hidden` is width * mlp_ratio, `bias` whether linear layers have one, `condition` the width of a conditioning row.
    With `reads_rows`, the forward pass gets the rows as a second argument.
    """

    reads_rows: ClassVar[bool] = False
    stacked: ClassVar[Mapping[str, int]] = {}  # matrices in the weight of a layer, if not 1; 0: no matrix of tokens

    @staticmethod
    @abstractmethod
    def macs(width: int, hidden: int) -> int:
        """MACs per token."""

    @staticmethod
    def row_macs(width: int, hidden: int, condition: int) -> int:
        """MACs per conditioning row."""
        return 0


class GeluMlp(nn.Sequential, Mlp):
    """Two linear layers around a tanh GELU (DiT)."""

    activation: ClassVar[type[nn.Module]] = Gelu

    def __init__(self, width: int, hidden: int, *, bias: bool = True, condition: int = 0) -> None:
        super().__init__(nn.Linear(width, hidden, bias), self.activation(), nn.Linear(hidden, width, bias))

    @staticmethod
    def macs(width: int, hidden: int) -> int:
        return 2 * width * hidden


class ErfGeluMlp(GeluMlp):
    """Two linear layers around an exact GELU (PixelDiT's pixel blocks)."""

    activation = nn.GELU


class SiluMlp(GeluMlp):
    """Two linear layers around a SiLU (DeCo's pixel blocks)."""

    activation = nn.SiLU


class SwiGlu(Mlp):
    """SiLU-gated linear unit (Shazeer 2020), 2/3 as wide, so that it costs as much as two layers around a GELU."""

    stacked: ClassVar[Mapping[str, int]] = {"up": 2}

    def __init__(self, width: int, hidden: int, *, bias: bool = True, condition: int = 0) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * (2 * hidden // 3), bias)
        self.down = nn.Linear(2 * hidden // 3, width, bias)

    @staticmethod
    def macs(width: int, hidden: int) -> int:
        return 3 * width * (2 * hidden // 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class HyperMlp(Mlp):
    """Two layers around a SiLU, whose matrices a linear layer makes from each conditioning row (PixNerd).

    The matrices have columns of unit length. x (N, T, S, E), rows (N, T, 1, K) -> (N, T, S, E).
    """

    reads_rows = True
    stacked: ClassVar[Mapping[str, int]] = {
        "weights": 0
    }  # makes matrices from a conditioning row, as modulation makes vectors
    macs = staticmethod(GeluMlp.macs)

    def __init__(self, width: int, hidden: int, *, bias: bool = True, condition: int = 0) -> None:
        super().__init__()
        self.sizes = (width, hidden), (hidden, width)
        self.weights = nn.Linear(condition, 2 * width * hidden)

    @staticmethod
    def row_macs(width: int, hidden: int, condition: int) -> int:
        return 2 * width * hidden * condition

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        halves = self.weights(F.silu(rows)).squeeze(-2).chunk(2, dim=-1)
        first, second = (
            F.normalize(half.unflatten(-1, size), dim=-2) for half, size in zip(halves, self.sizes, strict=True)
        )
        return F.silu(x @ first) @ second


MLPS: dict[str, type[Mlp]] = {
    "gelu": GeluMlp,
    "gelu_erf": ErfGeluMlp,
    "silu": SiluMlp,
    "swiglu": SwiGlu,
    "hyper": HyperMlp,
}
