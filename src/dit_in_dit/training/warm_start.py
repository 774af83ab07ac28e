"""From a trained model to another: a nested model that begins as the DiT that it is built around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.aggregate import FUSIONS
from dit_in_dit.model.nested import NestedDiT, part_of
from dit_in_dit.runs.checkpoint import newest
from dit_in_dit.runs.pretrained import find_run
from dit_in_dit.runs.tensors import check_weights

INNER = ("inner_embed", "inner_blocks", "inner_head", "aggregate", "fuse", "spread", "condition")  # parts of a model
BLOCKS = "outer_blocks."


@dataclass(frozen=True)
class WarmStart:
    """What a model began with: the run and its step, how many of its tensors are new, whether its output is still
    the other's, and whether it was trained on other data (unknown: false)."""

    run: str
    step: int
    taken: int
    new: int
    exact: bool
    other_data: bool


def is_inner(name: str) -> bool:
    """Whether a parameter belongs to the inner level or joins the levels."""
    return part_of(name) in INNER


@torch.no_grad()
def warm_start(
    model: NestedDiT, run: Path, blocks: Sequence[int] | None = None, *, digest: str | None = None
) -> WarmStart:
    """Give the model the averaged weights of a run, wherever names agree; the rest stays as it was drawn.

    Zero gates and zero heads at first leave the output that of the outer blocks, bit for bit: so a DiT becomes a nested
    model without losing a digit.

    Args:
        model: a new model, any arrangement around outer blocks of the run's width.
        run: a run, or an imported model.
        blocks: which of its outer blocks become ours, in order; None: all, or ours evenly spaced among more.
        digest: of the images that the new model is trained on.

    Raises:
        UserError: there is no such run, or the tensors of both do not fit.
    """
    run = find_run(str(run))
    found = newest(run)
    theirs, given = found.config.model, found.weights()
    check_weights(given, str(run))
    chosen = _chosen(theirs, model.config, blocks, run)
    own, taken = dict(model.named_parameters()), set()
    for name, weight in own.items():
        source = _source(name, chosen)
        if source not in given:
            continue
        if given[source].shape != weight.shape:
            raise UserError(
                f"train.init: {name} is {_shape(given[source])} in {truncate(run)} and {_shape(weight)} here: "
                "give both models the same outer width, patch, channels and classes"
            )
        weight.copy_(given[source])
        taken.add(name)
    if lost := [name for name in own if not is_inner(name) and name not in taken]:
        raise UserError(f"train.init: {truncate(run)} has no {lost[0]}, which this model needs")
    whole = chosen == list(range(theirs.blocks("outer"))) and not theirs.blocks("inner")
    exact = whole and begins_as_its_outer_blocks(model.config)
    noted = found.manifest.get("data", {}).get("digest")
    other_data = None not in (noted, digest) and noted != digest
    return WarmStart(str(run), found.step, len(taken), len(own) - len(taken), exact, other_data)


def begins_as_its_outer_blocks(model: ModelConfig) -> bool:
    """Whether a new model of this arrangement gives what its outer blocks alone give."""
    aggregates = model.program[0][0] == "inner" or len(model.program) > 2
    fuse = FUSIONS[model.inner.fuse]
    return not model.blocks("inner") or (fuse.keeps_outer and (not aggregates or fuse.starts_closed))


def _chosen(theirs: ModelConfig, ours: ModelConfig, blocks: Sequence[int] | None, run: Path) -> list[int]:
    """Numbers of the outer blocks that are taken, in our order."""
    there, here = theirs.blocks("outer"), ours.blocks("outer")
    if blocks is None:
        if here > there:
            raise UserError(
                f"train.init: {truncate(run)} has {there} outer blocks, fewer than the {here} here: use fewer"
            )
        # The first and the last always stay: they are next to what is read and drawn.
        return [round(number * (there - 1) / max(1, here - 1)) for number in range(here)]
    if len(blocks) != here or max(blocks) >= there:
        raise UserError(
            f"train.init_blocks must name {here} of the {there} outer blocks (from 0) of {truncate(run)}: "
            f"got {truncate(list(blocks))}"
        )
    return list(blocks)


def _source(name: str, chosen: list[int]) -> str:
    """The name in the other model of what is ours."""
    if not name.startswith(BLOCKS):
        return name
    number, _, rest = name.removeprefix(BLOCKS).partition(".")
    return f"{BLOCKS}{chosen[int(number)]}.{rest}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
