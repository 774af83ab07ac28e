"""Sums of gradients in a fixed order: train.reduction=fixed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dit_in_dit.training.distributed import Process


class Tree:
    """Gradients of micro-batches, summed in pairs, pairs of pairs and so on: an order that no number of processes
    changes. Holds one sum for each power of two on its way."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self.weights = list(weights)
        self.sums: list[tuple[int, list[Tensor]]] = []

    def take(self) -> None:
        """Take the gradients off the weights, and add them to those of as many micro-batches."""
        count, gradients = 1, [torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights]
        while self.sums and self.sums[-1][0] == count:
            before = self.sums.pop()[1]
            torch._foreach_add_(before, gradients)
            count, gradients = 2 * count, before
        self.sums.append((count, gradients))
        for weight in self.weights:
            weight.grad = None

    def finish(self, world: Process) -> None:
        """Put the sum over all processes back on the weights."""
        ((_, gradients),) = self.sums
        self.sums.clear()
        world.add(gradients)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
