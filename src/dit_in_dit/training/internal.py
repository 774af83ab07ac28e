"""The loss term of internal guidance."""

from __future__ import annotations

from torch import Tensor

from dit_in_dit.config.rules import weak_head
from dit_in_dit.config.run import RunConfig
from dit_in_dit.training.term import Pass, Term


class Internal(Term):
    """The objective's loss of the weak prediction: of `internal_head`, or of the outer head without the inner head
    (Zhou et al. 2025, arXiv 2512.24176; the official code has weight 0.5 and a head after block 8 of 28).
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.head, self.channels = weak_head(config.model), config.model.channels

    def reads(self) -> tuple[str, ...]:
        return (self.head,)

    def forward(self, given: Pass) -> Tensor:
        weak = given.outputs[self.head][:, : self.channels]  # without a learned variance
        return given.objective.loss(lambda x, t, y: weak, given.x, given.noise, given.t, given.y)

    @classmethod
    def macs(cls, config: RunConfig) -> int:
        return 0  # the head is a part of the model
