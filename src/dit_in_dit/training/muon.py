"""Muon (Jordan et al. 2024): the matrices of blocks take orthogonalised steps, and all other weights AdamW's.

The step of a matrix W with gradient G, learning rate r and weight decay w is that of torch.optim.Muon:

    M <- M + 0.05 (G - M)                           momentum
    U  = G + 0.95 (M - G)                           Nesterov's momentum
    O  = Newton-Schulz(U)                           U with singular values near 1
    W <- (1 - r w) W - r f O                        f: see `rate_factor`
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.inspection.optimizer_cost import NEWTON_SCHULZ_STEPS
from dit_in_dit.model.matrices import block_matrices
from dit_in_dit.runtime.device import bfloat16_is_native
from dit_in_dit.training.sharding import gather_like, local_part, part_like

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration in Jordan et al. 2024
MOST_NUMBERS = 2**26  # numbers that are orthogonalised together: 128 MiB in bfloat16, and as much again for products


def matrix_groups(groups: Iterable[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Divide parameter groups by the number of matrices that their weights stack, which a group gets as `parts`; 0 for
    weights that are not matrices of blocks, and for those of loss terms, which the model lacks.

    Raises:
        UserError: the model has no matrices in blocks.
    """
    counts = block_matrices(model)
    parts = {id(weight): counts.get(name, 0) for name, weight in model.named_parameters()}
    if not any(parts.values()):
        raise UserError("train.optimizer=muon needs a model with matrices in blocks: got none; set adamw")
    divided = []
    for group in groups:
        for count in sorted({parts.get(id(weight), 0) for weight in group["params"]}):
            own = [weight for weight in group["params"] if parts.get(id(weight), 0) == count]
            divided.append({**group, "params": own, "parts": count})
    return divided


def orthogonalised(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration: matrices (N, a, b) with singular values moved to about 0.7 to 1.2; in bfloat16
    on devices that compute in it, else in float32."""
    x = matrices.to(torch.bfloat16 if bfloat16_is_native(matrices.device) else torch.float32)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def rate_factor(rows: int, columns: int, adjust: str) -> float:
    """Factor on the learning rate of a matrix: with match_rms_adamw, steps have the usual root mean square of AdamW's,
    0.2 (Liu et al. 2025, Moonlight); with original, that of Jordan et al."""
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class MuonAdamW(torch.optim.AdamW):
    """Muon for groups with `parts` above 0, the number of matrices stacked in each weight; AdamW for other groups.

    If `found_inf` is set, a step does nothing where it is 1, like the fused AdamW: the host does not wait. Sharded
    matrices are gathered, and every process orthogonalises all of them, so that all get the same bits.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, adjust: str, scale: float, **adam: Any) -> None:
        """
        Args:
            adjust: see `rate_factor`.
            scale: factor on the learning rate of matrices.
            adam: arguments of AdamW.
        """
        super().__init__(groups, **adam)
        self.adjust, self.scale = adjust, scale

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("parts")]
            super().step()
        finally:
            self.param_groups = groups
        found = getattr(self, "found_inf", None)
        skip = None if found is None else local_part(found).bool()
        for group in groups:
            if group.get("parts"):
                trained = [weight for weight in group["params"] if weight.grad is not None]
                for weights in _of_one_shape(trained):
                    self._step_matrices(weights, group, skip)

    def _step_matrices(self, weights: Sequence[Tensor], group: Mapping[str, Any], skip: Tensor | None) -> None:
        """Take the step of weights of one shape, unless `skip` is true."""
        rate, decay = group["lr"] * self.scale, group["weight_decay"]
        rows, columns = len(weights[0]) // group["parts"], weights[0].shape[1]
        updates = [gather_like(self._update(weight, skip), weight) for weight in weights]
        directions = orthogonalised(torch.cat(updates).view(-1, rows, columns)).reshape(len(weights), -1, columns)
        if skip is not None:
            directions = directions * ~skip
        for weight, direction in zip(weights, directions, strict=True):
            held = local_part(weight)
            if decay:
                kept = held * (1 - rate * decay)
                held.copy_(kept if skip is None else torch.where(skip, held, kept))
            held.add_(part_like(direction, weight), alpha=-rate * rate_factor(rows, columns, self.adjust))

    def _update(self, weight: Tensor, skip: Tensor | None) -> Tensor:
        """Advance the momentum of a weight; returns Nesterov's update, of this process's part of the weight."""
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum, gradient = local_part(state["momentum_buffer"]), local_part(weight.grad)  # type: ignore[arg-type]
        if skip is not None:
            gradient = torch.where(skip, momentum, gradient)  # leaves the momentum as it is
        momentum.lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)

    @torch.no_grad()
    def direction(self, weight: Tensor) -> Tensor | None:
        """Step of a matrix divided by train.learning_rate, without weight decay, from its momentum; None for a weight
        without a momentum."""
        momentum = self.state.get(weight, {}).get("momentum_buffer")
        if momentum is None:
            return None
        group = next(group for group in self.param_groups if any(weight is own for own in group["params"]))
        matrices = momentum.view(group["parts"], -1, momentum.shape[1])
        factor = self.scale * rate_factor(matrices.shape[1], matrices.shape[2], self.adjust)
        return orthogonalised(matrices).reshape(momentum.shape).float() * factor


def _of_one_shape(weights: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Weights of equal shape, at most MOST_NUMBERS numbers together: one product for many small matrices."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        by_shape.setdefault(weight.shape, []).append(weight)
    for shape, same in by_shape.items():
        rest = iter(same)
        while some := list(islice(rest, max(1, MOST_NUMBERS // shape.numel()))):
            yield some
