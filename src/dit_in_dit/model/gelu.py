"""The tanh GELU of DiT, with the fastest formula for each device."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SLOPE = 2 * math.sqrt(2 / math.pi)  # (1 + tanh(z)) / 2 = sigmoid(2 z): gelu(x) = x sigmoid(SLOPE x + CUBE x^3)
CUBE = 0.044715 * SLOPE


def in_transform() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp ...) calls the model."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class Gelu(nn.Module):
    """gelu(x), (...) -> (...).

    On a GPU, PyTorch's kernel is fastest. In a compiled graph, all formulas are equally fast. On a CPU, the kernel's
    tanh takes four times as long as a sigmoid, in the forward pass and again in the backward pass. Under `torch.func`,
    PyTorch's kernel is used: it has derivatives of every order and kind.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or in_transform():
            return F.gelu(x, approximate="tanh")
        if torch.is_grad_enabled() and x.requires_grad:
            return _WithSlope.apply(x)  # type: ignore[no-untyped-call]
        return _sigmoid(x, x * x) * x


def _sigmoid(x: Tensor, square: Tensor) -> Tensor:
    return torch.rsub(square, SLOPE, alpha=-CUBE).mul_(x).sigmoid_()  # rsub: SLOPE + CUBE x^2 in one pass


class _WithSlope(torch.autograd.Function):
    """GELU that saves its derivative, not x, for the backward pass: the value and the derivative share most terms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        square = x * x
        sigmoid = _sigmoid(x, square)
        y = sigmoid * x
        slope = torch.rsub(square, SLOPE, alpha=-3 * CUBE).mul_(y)
        ctx.save_for_backward(slope.addcmul_(slope, sigmoid, value=-1).add_(sigmoid))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope
