"""In place of `model.tiny`: no kernel is exported, attention is PyTorch's own."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as packed_tiny_attention  # never called: nothing fits
from torch.nn.functional import scaled_dot_product_attention as tiny_attention

__all__ = ["packed_tiny_attention", "tiny_attention", "tiny_fits", "unpack"]


def tiny_fits(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel fits: never, there is none."""
    return False


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, heads, L, d), as views of one tensor (B, L, 3, heads, d)."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return q, k, v
