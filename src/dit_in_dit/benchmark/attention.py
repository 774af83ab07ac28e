"""Time several implementations of attention within small groups, and compare them with a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_in_dit.benchmark.timing import Times, time_alternately
from dit_in_dit.model.layers import attend, sdpa
from dit_in_dit.model.tiny import TRITON, tiny_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
BROADCAST_UP_TO = 8  # tokens in a group; larger groups are faster as matrix products


def broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention as elementwise operations, which a compiler fuses into one pass over memory."""
    weights = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) * q.shape[-1] ** -0.5
    return (weights.softmax(-1)[..., None] * v[..., None, :, :]).sum(-2)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention as matrix products."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def attention_kernels(length: int, device: torch.device) -> dict[str, Attend]:
    """Implementations by name: the model's choice, SDPA, and on CUDA the compiled and Triton kernels."""
    by_name: dict[str, Attend] = {"the model's": attend, "SDPA": sdpa}
    if device.type == "cuda":
        by_name["compiled"] = torch.compile(broadcast if length <= BROADCAST_UP_TO else matmul_attention)
        if TRITON:
            by_name["Triton"] = tiny_attention
    return by_name


def group_times(
    length: int, tokens: int, width: int, heads: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> tuple[Times, dict[str, Times], dict[str, Times]]:
    """Seconds for `tokens` tokens in groups of `length`, with queries, keys and values in the model's memory layout.

    Returns:
        copy: seconds to copy as many bytes as attention reads (queries, keys, values) and writes (the result).
        forward: seconds of a forward pass without gradients, by implementation.
        trained: seconds of a forward and backward pass, by implementation.
    """
    draw = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(tokens // length, length, 3, heads, width // heads, device=device, dtype=dtype, generator=draw)
    # Half of the bytes of q, k, v and the result: the copy reads and writes these.
    source = torch.empty(2 * tokens * width, device=device, dtype=dtype)
    target = torch.empty_like(source)
    gradient = torch.ones_like(qkv[:, :, 0]).transpose(1, 2)  # in the memory layout of the next linear layer

    def apart(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
        return q, k, v

    def forward(attention: Attend) -> Callable[[], object]:
        return torch.no_grad()(lambda: attention(*apart(qkv)))

    def trained(attention: Attend) -> Callable[[], object]:
        leaf = qkv.clone().requires_grad_()

        def step() -> None:
            leaf.grad = None
            attention(*apart(leaf)).backward(gradient)  # type: ignore[no-untyped-call]

        return step

    known = attention_kernels(length, device)
    work: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    work |= {f"{name} forward": forward(attention) for name, attention in known.items()}
    work |= {f"{name} trained": trained(attention) for name, attention in known.items()}
    times = time_alternately(work, device, seconds)
    forwards, steps = ({name: times[f"{name} {kind}"] for name in known} for kind in ("forward", "trained"))
    return times["copy"], forwards, steps
