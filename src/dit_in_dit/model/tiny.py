"""A Triton kernel for attention within groups of a few tokens, as differentiable operators.

A kernel for long sequences runs one program per group and leaves most of its tile empty. Here a program takes many
groups; it reads all their queries, keys and values once and writes the result once.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None
LONGEST, WIDEST = 64, 128  # limits of the kernel: tokens per group, channels per head


def tiny_fits(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel applies: self-attention, with groups and heads within the limits, and Triton is installed."""
    sizes = q.shape == k.shape and q.shape[-2] <= LONGEST and q.shape[-1] <= WIDEST
    return TRITON and sizes and q.dtype in (torch.float32, torch.bfloat16, torch.float16)


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, heads, L, d), as views of one tensor (B, L, 3, heads, d)."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return q, k, v


def _in_rows(x: Tensor) -> Tensor:
    """(B, heads, L, d) in the memory layout (B, L, heads, d), which the next linear layer reads."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(like: Tensor) -> Tensor:
    batch, heads, length, width = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


def _empty_packed(like: Tensor) -> Tensor:
    batch, heads, length, width = like.shape
    return like.new_empty(batch, length, 3, heads, width)


def _alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in one memory layout; nothing is copied if one linear layer computed all three."""
    if q.stride() == k.stride() == v.stride() and q.stride(-1) == 1:
        return q, k, v
    return _in_rows(q), _in_rows(k), _in_rows(v)


@torch.library.custom_op("dit_in_dit::tiny_attention", mutates_args=())
def tiny_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, each tensor (B, heads, L, d), within the limits of `tiny_fits`."""
    from dit_in_dit.model.tiny_kernel import forward, launch

    out = _empty(q)
    launch(forward, _alike(q, k, v), (out,))
    return out


@torch.library.custom_op("dit_in_dit::packed_tiny_attention", mutates_args=())
def packed_tiny_attention(qkv: Tensor) -> Tensor:
    """`tiny_attention` of one tensor (B, L, 3, heads, d), so that its gradient is one tensor too and nothing joins the
    three; -> (B, heads, L, d)."""
    from dit_in_dit.model.tiny_kernel import forward, launch

    q, k, v = unpack(qkv)
    out = _empty(q)
    launch(forward, _alike(q, k, v), (out,))
    return out


@torch.library.custom_op("dit_in_dit::tiny_attention_backward", mutates_args=())
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The three gradients in one tensor (B, L, 3, heads, d)."""
    from dit_in_dit.model.tiny_kernel import backward, launch

    out = _empty_packed(q)
    launch(backward, _alike(q, k, v), (_in_rows(grad),), unpack(out))
    return out


tiny_attention.register_fake(lambda q, k, v: _empty(q))
packed_tiny_attention.register_fake(lambda qkv: _empty(unpack(qkv)[0]))
_backward.register_fake(lambda grad, q, k, v: _empty_packed(q))
tiny_attention.register_autograd(
    lambda ctx, grad: unpack(_backward(grad, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
packed_tiny_attention.register_autograd(
    lambda ctx, grad: _backward(grad, *unpack(*ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
