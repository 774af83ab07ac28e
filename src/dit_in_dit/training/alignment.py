"""Loss terms that align tokens of the trained model with a representation: SRA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.inspection.cost import FORWARDS_PER_STEP, macs_through
from dit_in_dit.runtime.philox import uniform
from dit_in_dit.training.term import Pass, Term, at_least_float32, module_output

SMOOTH_L1 = 0.05  # beta of the smooth L1 distance in the official code of SRA


class Sra(Term):
    """Self-alignment: tokens of an outer block of the trained model, through an MLP, take after those of a deeper outer
    block of the averaged model at less noise (Jiang et al. 2025, arXiv 2505.02831, section 3).

    The averaged model sees the same image, noise and class at the time t - k, with k uniform in [0, sra_gap].
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.seed, self.gap, self.patches = config.seed, config.train.terms.sra_gap, config.model.patches
        self.distance = config.train.terms.sra_distance
        self.student, self.teacher = (f"outer_blocks.{number}" for number in sra_blocks(config))
        width = config.model.outer.width
        self.projector = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def reads(self) -> tuple[str, ...]:
        return self.student, self.teacher

    def forward(self, given: Pass) -> Tensor:
        with torch.no_grad():
            drawn = uniform(self.seed, "terms", given.example).to(given.t.dtype)
            t = given.objective.path.snap((given.t - self.gap * drawn).clamp(0, 1))
            x_t = given.objective.noisy(given.x, given.noise, t)
            # A sharded model must not be left in the middle of its forward pass.
            target = module_output(given.averaged, self.teacher, x_t, t, given.y, stop=not given.sharded)
        tokens = self.projector(given.outputs[self.student][:, -self.patches :])  # without tokens of time and class
        return distance(self.distance, tokens, target[:, -self.patches :])

    @classmethod
    def macs(cls, config: RunConfig) -> int:
        model = config.model
        return FORWARDS_PER_STEP * 4 * model.patches * model.outer.width**2 + macs_through(model, sra_blocks(config)[1])


def sra_blocks(config: RunConfig) -> tuple[int, int]:
    """Numbers of the outer blocks of the trained and of the averaged model that are compared; by default at 2/7 and 5/7
    of the depth, blocks 8 and 20 of 28 in the official code. UserError if a block does not exist."""
    depth, given = config.model.blocks("outer"), config.train.terms.sra_blocks
    if not depth:
        raise UserError("train.terms.sra aligns outer blocks, and the model has none: set train.terms.sra=0")
    if given is None:
        return -(-2 * depth // 7) - 1, -(-5 * depth // 7) - 1
    if max(given) >= depth:
        raise UserError(f"train.terms.sra_blocks must be at most {depth - 1}, the last outer block: got {list(given)}")
    return given


def distance(kind: str, tokens: Tensor, target: Tensor) -> Tensor:
    """Distance of tokens (N, T, D) per example (N,): `smooth_l1`, mean over all numbers, or `cosine`, 1 - cosine of
    two tokens."""
    tokens, target = at_least_float32(tokens), at_least_float32(target)
    if kind == "cosine":
        return 1 - F.cosine_similarity(tokens, target, dim=-1).mean(1)
    return F.smooth_l1_loss(tokens, target, beta=SMOOTH_L1, reduction="none").flatten(1).mean(1)
