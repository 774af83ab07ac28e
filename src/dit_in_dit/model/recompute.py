"""Selective recomputation: the backward pass repeats all of a block but its products and attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dit_in_dit.model.tiny import packed_tiny_attention, tiny_attention

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
_ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
_NAMES = (*_PRODUCTS, *(f"_scaled_dot_product_{name}" for name in _ATTENTION))
# Operations whose results stay: matrix products, convolutions, and attention by PyTorch and by this package.
KEPT: list[Any] = [getattr(torch.ops.aten, name).default for name in _NAMES if hasattr(torch.ops.aten, name)]
KEPT += [operation._opoverload for operation in (tiny_attention, packed_tiny_attention)]


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(KEPT)  # type: ignore[no-untyped-call]


def recomputes_selectively(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a block's `forward(x, c, ...)`: if `block.selective`, the backward pass recomputes all but products
    and attention (Korthikanti et al. 2022, section 5). It is inside the block, so that a compiled block contains it."""

    @wraps(forward)
    def run(block: Any, *arguments: Tensor, **keywords: Tensor) -> Tensor:
        if not (block.selective and torch.is_grad_enabled()):
            return forward(block, *arguments, **keywords)
        again = partial(forward, block, **keywords)
        return checkpoint(again, *arguments, use_reentrant=False, context_fn=_contexts)

    return run
