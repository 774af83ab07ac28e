"""Token dropping in training (TREAD, Krause et al. 2025): how many patches which outer blocks see."""

from __future__ import annotations

from dataclasses import dataclass

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.model import ModelConfig
from dit_in_dit.config.training import TrainConfig

LEAST_PATCHES = 256  # with fewer, the blocks are a small part of a step, and nothing published drops tokens
ENDS = 2  # dense outer blocks at each end by default, as in SPRINT's XL (Park et al. 2025)


@dataclass(frozen=True)
class TokenDrop:
    """Outer blocks `first` to `last`, both included, see `kept` patches of each image in training."""

    kept: int
    first: int
    last: int

    def __contains__(self, number: int) -> bool:
        return self.first <= number <= self.last


def find_token_drop(train: TrainConfig, model: ModelConfig) -> TokenDrop | None:
    """Token dropping of a config; None if train.token_drop is 0. Raises UserError."""
    if not train.token_drop:
        return None
    if model.patches < LEAST_PATCHES:
        raise UserError(
            f"train.token_drop needs at least {LEAST_PATCHES} patches: got {model.patches}; "
            "set a smaller model.patch_size, or train.token_drop=0"
        )
    blocks = model.blocks("outer")
    first, last = train.token_drop_blocks or (ENDS, blocks - 1 - ENDS)
    if train.token_drop_blocks and not first <= last < blocks:
        raise UserError(
            f"train.token_drop_blocks must be first <= last < {blocks}, the number of outer blocks: got {[first, last]}"
        )
    if first > last:
        raise UserError(
            f"train.token_drop leaves the first {ENDS} and last {ENDS} outer blocks dense, "
            f"and the model has {blocks}: set train.token_drop_blocks"
        )
    return TokenDrop(max(1, round((1 - train.token_drop) * model.patches)), first, last)
