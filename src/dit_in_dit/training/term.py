"""A loss term beside the objective's loss: what it is given, and what it must offer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_in_dit.config.run import RunConfig
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.inspection.hooks import forward_hooks
from dit_in_dit.model.route import Route


@dataclass(frozen=True)
class Pass:
    """A forward pass of the trained model on a micro-batch of N examples, and what a term may compare it with.

    outputs: of the modules that the term `reads`, by module name; those of outer blocks on the `route` are shorter.
    features: of the images (N, F, g, g), stored beside their latents; (N, 0) without any.
    averaged: the averaged model; on several processes with train.parallel=fsdp it is `sharded`.
    route: of patches around outer blocks, with train.token_drop; the averaged model has none.
    labels: that the network reads (N, model.augment_labels), of augmentation and style; None: it reads none.
    """

    x: Tensor  # N C H W
    noise: Tensor  # N C H W
    t: Tensor  # N
    y: Tensor  # N, after label dropping
    example: Tensor  # N, numbers of the examples
    outputs: Mapping[str, Tensor]
    objective: Objective
    averaged: nn.Module
    sharded: bool
    features: Tensor | None = None
    route: Route | None = None
    labels: Tensor | None = None

    def seen(self, block: int, targets: Tensor) -> Tensor:
        """Of targets for all patches (N, T, F), those for the patches that outer block `block` sees (N, K, F)."""
        if self.route is None or not self.route.first <= block <= self.route.last:
            return targets
        return self.route.enter(targets, targets.shape[1])


class Term(nn.Module):
    """A loss term, made by `cls(config)`. Its parameters are trained and saved with the model's, but are no part of
    it: they are not averaged and not exported."""

    def reads(self) -> tuple[str, ...]:
        """Names of the model's modules whose outputs the term reads, such as `outer_blocks.3` or `outer_head`."""
        return ()

    def forward(self, given: Pass) -> Tensor:
        """The term of each example (N,), in float32, without its weight. It must not wait for the device."""
        raise NotImplementedError

    def reference_sha256(self) -> str | None:
        """SHA-256 of files, beside the images, that decide what the term compares with; a run keeps it."""
        return None

    @classmethod
    def macs(cls, config: RunConfig) -> int:
        """MACs per image that the term adds to a training step."""
        raise NotImplementedError


class _Enough(Exception):  # no error: it ends a forward pass
    """The module has given its output."""


def module_output(model: nn.Module, name: str, *inputs: Any, stop: bool, **options: Any) -> Tensor:
    """Output of the module `name` in a forward pass of the model, which ends there if `stop`."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        seen.append(output)
        if stop:
            raise _Enough

    with forward_hooks([(model.get_submodule(name), keep)], compiled=True), suppress(_Enough):
        model(*inputs, **options)
    return seen[-1]


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it has that type."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
