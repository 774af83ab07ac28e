"""Norm with modulation, and gate with residual: one function each, with derivatives of their own.

Autograd's derivative of `addcmul` multiplies by one, saves both factors in float32 and reads each of them again; under
autocast every operand is first copied to float32. These functions keep the stream of tokens x in its own dtype and all
that belongs to a branch in the dtype of the branch: bfloat16 under autocast. In between nothing is copied, because a
CUDA kernel converts as it reads and writes. Instead of x and the normalised x in float32, the branch's normalised x is
saved.

For eager mode only. A compiler fuses the plain formulas, and transforms of `torch.func` differentiate them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from dit_in_dit.model.gelu import in_transform
from dit_in_dit.model.kernels import kernels_of
from dit_in_dit.model.norms import AffineLayerNorm, LayerNorm, RmsNorm

CENTRED: dict[type[nn.Module], bool] = {LayerNorm: True, AffineLayerNorm: True, RmsNorm: False}
# Widths up to this: means over the channels are products with a vector. PyTorch's kernels take a thread block for each
# token, which leaves most of its threads idle.
NARROW = 128


def fuses(x: Tensor, norm: nn.Module, *rows: Tensor) -> bool:
    """Whether `norm_modulate` and `gate_residual` apply to tokens x (..., D), a norm and vectors (..., D) for groups of
    tokens, and the device's row in `KERNELS` wants them."""
    if torch.compiler.is_compiling() or not kernels_of(x.device).fused or in_transform():
        return False
    return type(norm) in CENTRED and not _is_hooked(norm) and all(_in_groups(x, row) for row in rows)


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward pass."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or hooks_of_all._has_any_global_hook()  # type: ignore[no-untyped-call]


def _in_groups(x: Tensor, row: Tensor) -> bool:
    """Whether each vector of `row` belongs to consecutive tokens of x: (N, T, 1, D) for (N, T, S, D), for instance."""
    lead = next((axis for axis, size in enumerate(row.shape[:-1]) if size == 1), row.ndim - 1)
    ones = row.ndim - 1 - lead
    return row.shape == (*x.shape[:lead], *[1] * ones, x.shape[-1]) and row.ndim == x.ndim


def norm_modulate(x: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x as it is, and norm(x) * (1 + scale) + shift in the dtype of `scale`.

    Use the returned x in the residual sum. The gradients of both results are then added in one pass over memory.
    """
    factor, dtype = 1 + scale, scale.dtype
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if bias is not None:
        shift = shift + factor * bias
    if weight is not None:
        factor = factor * weight
    tokens = _grouped(x, factor)
    same, y = _NormModulate.apply(  # type: ignore[no-untyped-call]
        tokens, _rows(factor), _rows(shift), CENTRED[type(norm)], norm.eps, dtype
    )
    return same.view(x.shape), y.view(x.shape)


def gate_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, in the dtype of x."""
    out = _GateResidual.apply(_grouped(x, gate), _rows(gate), _grouped(branch, gate))  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def _rows(row: Tensor) -> Tensor:
    """(..., D) -> (rows, 1, D)."""
    return row.reshape(-1, 1, row.shape[-1])


def _grouped(x: Tensor, row: Tensor) -> Tensor:
    """Tokens (..., D) by the row that modulates them, (rows, tokens of a row, D)."""
    return x.reshape(row.numel() // x.shape[-1], -1, x.shape[-1])


def _into(dtype: torch.dtype, function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """An elementwise function with a result in `dtype`. Autocast leaves calls with `out` alone."""
    shape = torch.broadcast_shapes(*(x.shape for x in operands))  # type: ignore[no-untyped-call]
    return function(*operands, out=operands[0].new_empty(shape, dtype=dtype))


def _over_tokens(x: Tensor, like: Tensor) -> Tensor:
    """Sum over the tokens of a row, (rows, tokens, D) -> (rows, 1, D), in the dtype of `like`."""
    return x.sum(1, keepdim=True, dtype=like.dtype)


def _normalised(x: Tensor, centred: bool, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The normalised tokens in `dtype`, and the reciprocal deviations (..., 1)."""
    if not centred:
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()
        deviation = (square / x.shape[-1] + eps).rsqrt()
        return _into(dtype, torch.mul, x, deviation), deviation
    if x.dtype in (torch.float32, torch.float64):
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        deviation = (variance + eps).rsqrt()
        return _into(dtype, torch.addcmul, mean * -deviation, x, deviation), deviation
    normal, _, deviation = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    return normal.to(dtype), deviation


def _refuse_second() -> None:
    """RuntimeError when a backward pass is itself differentiated: without it, the derivative would be wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError("model.fused has no second derivative: use torch.func, or KERNELS.clear() of model.kernels")


class _NormModulate(torch.autograd.Function):
    """x (R, G, D) and x_hat * factor + shift, with factor and shift (R, 1, D)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor, shift: Tensor, centred: bool, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        normal, deviation = _normalised(x, centred, eps, dtype)
        ctx.save_for_backward(normal, deviation, factor)
        ctx.centred, ctx.shift, ctx.dtype = centred, shift.dtype, x.dtype
        return x, _into(dtype, torch.addcmul, shift, normal, factor)

    @staticmethod
    def backward(ctx: Any, stream: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second()
        if grad is None:
            return stream, None, None, None, None, None
        normal, deviation, factor = ctx.saved_tensors
        wants_x, wants_factor, wants_shift = ctx.needs_input_grad[:3]
        product = grad * normal
        inner = _through_norm(grad, normal, product, factor, ctx.centred) if wants_x else None
        if inner is not None:
            to_stream = (torch.mul, inner, deviation) if stream is None else (torch.addcmul, stream, inner, deviation)
            inner = _into(ctx.dtype, *to_stream)
        to_factor = _over_tokens(product, factor) if wants_factor else None
        return inner, to_factor, grad.sum(1, keepdim=True, dtype=ctx.shift) if wants_shift else None, None, None, None


def _through_norm(grad: Tensor, normal: Tensor, product: Tensor, factor: Tensor, centred: bool) -> Tensor:
    """Gradient of the tokens times their deviation, with g = grad * factor: g - mean(g) - x_hat mean(g x_hat); without
    the first mean if the norm does not centre. `product` is grad * x_hat."""
    width = normal.shape[-1]
    if centred and width > NARROW:
        scaled = _into(grad.dtype, torch.mul, grad, factor)
        # Of the type that the kernel expects of a norm's mean: on CUDA never half precision.
        dtype = grad.dtype if grad.device.type == "cpu" else torch.promote_types(grad.dtype, torch.float32)
        zero, one = (normal.new_full((*normal.shape[:-1], 1), number, dtype=dtype) for number in (0, 1))
        # The norm's own kernel, of tokens that are normalised already.
        return torch.ops.aten.native_layer_norm_backward(
            scaled, normal, [width], zero, one, None, None, [True, False, False]
        )[0]
    column = (factor / -width).to(grad.dtype).transpose(1, 2)  # R D 1
    along = torch.bmm(product, column)
    result = torch.addcmul(torch.bmm(grad, column), normal, along) if centred else normal * along
    return result.addcmul_(grad, factor.to(grad.dtype))


class _GateResidual(torch.autograd.Function):
    """x + gate * branch, with tokens (R, G, D) and a gate (R, 1, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        ctx.save_for_backward(gate, branch)
        return _into(x.dtype, torch.addcmul, x, gate, branch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second()
        gate, branch = ctx.saved_tensors
        wants_gate, wants_branch = ctx.needs_input_grad[1:]
        to_gate = _over_tokens(_into(branch.dtype, torch.mul, grad, branch), gate) if wants_gate else None
        return grad, to_gate, _into(branch.dtype, torch.mul, grad, gate) if wants_branch else None
