"""Patches that bypass outer blocks in training: which of them stay is a function of (seed, example)."""

from __future__ import annotations

from inspect import signature

import torch
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.token_drop import find_token_drop
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.rope import Rope
from dit_in_dit.model.route import Route
from dit_in_dit.runtime.philox import words


def kept_patches(seed: int, examples: Tensor, patches: int, kept: int) -> Tensor:
    """Patches that stay (N, kept), ascending, for examples (N,), int64: a random subset for each, the same on every
    device."""
    draw = words(seed, "token_drop", examples, patches)
    order = draw * patches + torch.arange(patches, device=draw.device)  # no ties: devices break them differently
    return order.argsort(dim=1)[:, :kept].sort(dim=1).values


class Routing:
    """Routes of a run's examples; `drop` is None if no patch ever bypasses a block.

    Raises:
        UserError: the model was given to train() and takes no route, or its rotary positions are a plug-in's own.
    """

    def __init__(self, config: RunConfig, model: nn.Module) -> None:
        self.seed, self.steps = config.seed, config.train.token_drop_steps
        own = getattr(model, "config", config.model)
        self.drop = find_token_drop(config.train, own)
        if self.drop is None:
            return
        if not isinstance(model, NestedDiT) or "route" not in signature(type(model).forward).parameters:
            name = type(model).__name__
            raise UserError(f"train.token_drop needs a NestedDiT whose forward takes a route: got {name}; set it to 0")
        self.patches = own.patches
        for module in model.outer_blocks.modules():
            if isinstance(module, Rope) and "rows" not in signature(type(module).forward).parameters:
                name = f"{type(module).__name__}.forward"
                raise UserError(f"train.token_drop: {name} must take `rows` of the tokens, as Rope.forward does")

    def __call__(self, step: int, examples: Tensor) -> Route | None:
        """The route of examples (N,), int64, in a step; None if all patches go through all blocks."""
        if self.drop is None or (self.steps is not None and step >= self.steps):
            return None
        keep = kept_patches(self.seed, examples, self.patches, self.drop.kept)
        return Route(keep, self.drop.first, self.drop.last)
