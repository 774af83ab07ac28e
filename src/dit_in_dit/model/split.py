"""Split prediction of AsymFlow: velocity inside a subspace of patches, minus the image outside it."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn


class SplitOutput(nn.Module):
    """Turn a network's split prediction on path flow into the image estimate (AsymFlow, with its scale s and clamp).

    P projects each patch onto the subspace, and k = 1 / (s + (1 - s) t). The network sees k x_t at time k t. Its output
    u stands for the velocity s k P u + (1 - s k) P x_t / t + (x_t - P x_t + s (u - P u)) / t. The image, x_t minus t
    times this velocity, needs no division in training. In evaluation mode, the divisors are at least `clamp`.

    `basis` has orthonormal rows (rank, C*p*p) of patches (channel, row, column); training replaces its zeros.
    """

    def __init__(self, rank: int, scale: float, clamp: float, channels: int, patch: int) -> None:
        super().__init__()
        self.scale, self.clamp, self.patch = scale, clamp, patch
        self.register_buffer("basis", torch.zeros(rank, channels * patch**2))
        self.basis: Tensor

    def scaled(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The input (N, C, H, W) and the time (N,) of the network."""
        k = 1 / (self.scale + (1 - self.scale) * t)
        return x * k[:, None, None, None].to(x.dtype), t * k

    def forward(self, u: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The image estimate (N, C, H, W), in the type of x, from the network's output u, x_t and t (N,)."""
        wide, p = torch.promote_types(x.dtype, torch.float32), self.patch
        u, noisy, t, basis = u.to(wide), x.to(wide), t.to(wide)[:, None, None, None], self.basis.to(wide)
        sk = self.scale / (self.scale + (1 - self.scale) * t)
        share = torch.ones_like(t) if self.training else t / t.clamp(min=self.clamp)
        mixed = share * sk * noisy + (share * self.scale - t * sk) * u
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            patches = rearrange(mixed, "n c (h p) (w q) -> n h w (c p q)", p=p, q=p) @ basis.T @ basis
        inside = rearrange(patches, "n h w (c p q) -> n c (h p) (w q)", p=p, q=p)
        return ((1 - share) * noisy - share * self.scale * u + inside).to(x.dtype)
