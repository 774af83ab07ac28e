"""Sums of gradients in a fixed order: train.reduction=fixed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dit_in_dit.training.distributed import Process


class PairwiseSum:
    """Sum of the gradients of micro-batches in a binary tree: pairs, then pairs of pairs. The order does not depend on
    the number of processes. One partial sum is held for each power of two."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self.weights = [weight for weight in weights if weight.requires_grad]
        self.sums: list[tuple[int, list[Tensor]]] = []

    def take(self) -> None:
        """Move the gradients from the weights into the tree, and add partial sums of equal counts."""
        count, gradients = 1, [torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights]
        while self.sums and self.sums[-1][0] == count:
            before = self.sums.pop()[1]
            torch._foreach_add_(before, gradients)
            count, gradients = 2 * count, before
        self.sums.append((count, gradients))
        for weight in self.weights:
            weight.grad = None

    def finish(self, world: Process) -> None:
        """Set the weights' gradients to the sum over all processes."""
        ((_, gradients),) = self.sums
        self.sums.clear()
        world.add(gradients)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
