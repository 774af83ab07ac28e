"""Warm start of a model from the weights of a trained one, such as a nested model around a trained DiT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.interop.resolve import resolve_run
from dit_in_dit.model.aggregate import FUSIONS
from dit_in_dit.model.nested import NestedDiT, part_of
from dit_in_dit.runs.checkpoint import newest
from dit_in_dit.runs.tensors import check_weights

LABELS = "label_embed.table.weight"
INNER = ("inner_embed", "inner_blocks", "inner_head", "aggregate", "fuse", "spread", "condition")  # parts of a model
OWN = ("internal_head", "augment_embed")  # other parts that a trained model may lack: they leave its output as it is
BLOCKS = "outer_blocks."


@dataclass(frozen=True)
class WarmStart:
    """Origin of a model's initial weights."""

    run: str
    step: int
    taken: int  # tensors copied
    new: int  # tensors that keep their random initialisation
    notes: tuple[str, ...]  # sentences on classes and images that differ
    exact: bool  # whether the output equals that of the trained model
    other_data: bool  # whether that model was trained on other data; false if unknown

    def __str__(self) -> str:
        of = f"{self.taken} tensors of {self.run}, step {self.step}"
        changes = "; ".join((f"{self.new} are new", *self.notes))
        return f"starts from {of}; {changes}: its output is {'still' if self.exact else 'no longer'} that model's"


def is_inner(name: str) -> bool:
    """Whether a parameter belongs to the inner level or joins the levels."""
    return part_of(name) in INNER


@torch.no_grad()
def warm_start(
    model: NestedDiT, run: Path, blocks: Sequence[int] | None, classes: Sequence[str], digest: str | None = None
) -> WarmStart:
    """Copy the averaged weights of a run into a model, by parameter name, and label rows by class name; other weights
    keep their initialisation. Positions are fixed functions of the image size.

    While gates and heads are zero, the output is that of the outer blocks, bit for bit: a trained DiT becomes a nested
    model without any loss.

    Args:
        model: a new model of any arrangement, with outer blocks of the run's width.
        run: any trained model (see `resolve_run`).
        blocks: numbers of the run's outer blocks to copy, in order; None: all, or evenly spaced if too many.
        classes: class names of the new model.
        digest: digest of the images that the new model will be trained on.

    Raises:
        UserError: the run does not exist, or the shapes of its tensors do not fit.
    """
    with TemporaryDirectory() as scratch:
        trained = newest(resolve_run(str(run), Path(scratch), heads=model.config.outer.num_heads))
        old, weights = trained.config.model, trained.weights()
    check_weights(weights, str(run))
    chosen = _chosen(old, model.config, blocks, run)
    fixed = {name: b for name, b in model.named_buffers() if name in weights and weights[name].shape == b.shape}
    own, taken = {**dict(model.named_parameters()), **fixed}, set()  # `fixed`: the subspace of a split prediction
    rows = _label_rows(trained.classes[: old.num_classes], classes[: model.config.num_classes])
    if LABELS in own and own[LABELS].shape[1] == weights[LABELS].shape[1]:
        table, weights[LABELS] = weights[LABELS], own[LABELS].clone()
        weights[LABELS][[*rows]] = table[[*rows.values()]].to(weights[LABELS].dtype)
    for name, weight in own.items():
        if (source := _source(name, chosen)) not in weights:
            continue
        if weights[source].shape != weight.shape:
            raise UserError(
                f"train.init: {name} is {_shape(weights[source])} in {truncate(run)}, {_shape(weight)} in the model: "
                "give both models the same outer width, patch and channels"
            )
        weight.copy_(weights[source])
        taken.add(name)
    if lost := [name for name in own if name not in taken and not (is_inner(name) or part_of(name) in OWN)]:
        raise UserError(f"train.init: {truncate(run)} has no {lost[0]}, which this model needs")
    kept, count = len(rows) - 1, model.config.num_classes
    notes = [f"{kept} of {count} classes keep their label row"] if kept < count else []
    notes += ["positions are those of the new image size"] if old.image_size != model.config.image_size else []
    exact = not notes and _keeps_output(old, model.config, chosen, len(own) == len(taken))
    noted = trained.manifest.get("data", {}).get("digest")
    other_data = None not in (noted, digest) and noted != digest
    return WarmStart(str(run), trained.step, len(taken), len(own) - len(taken), tuple(notes), exact, other_data)


def _keeps_output(old: ModelConfig, new: ModelConfig, chosen: Sequence[int], complete: bool) -> bool:
    """Whether the new model's output is that of the trained one, with these blocks of it, and all weights or not."""
    nested_anew = not old.blocks("inner") and starts_as_outer_blocks(new)
    return list(chosen) == list(range(old.blocks("outer"))) and (nested_anew or (old == new and complete))


def _label_rows(old: Sequence[str], new: Sequence[str]) -> dict[int, int]:
    """The trained row of each label row that is copied: of classes of the same name, and of the null class, the last.

    If no name is shared, or the names are only numbers, equally many classes keep their rows by number.
    """
    named = [*old] != [*map(str, range(len(old)))]
    shared = {new.index(name): old.index(name) for name in old if named and name in new}
    if len(old) == len(new) and not shared:
        shared = {row: row for row in range(len(new))}
    return {**shared, len(new): len(old)}


def starts_as_outer_blocks(model: ModelConfig) -> bool:
    """Whether the output of a new model of this arrangement is that of its outer blocks without the inner level."""
    aggregates = model.program[0][0] == "inner" or len(model.program) > 2
    fuse = FUSIONS[model.inner.fuse]
    return not model.blocks("inner") or (fuse.keeps_outer and (not aggregates or fuse.starts_closed))


def _chosen(old: ModelConfig, new: ModelConfig, blocks: Sequence[int] | None, run: Path) -> list[int]:
    """Number of the run's outer block to copy into each new outer block."""
    available, needed = old.blocks("outer"), new.blocks("outer")
    if blocks is None:
        if needed > available:
            raise UserError(
                f"train.init: {truncate(run)} has {available} outer blocks, fewer than the {needed} needed: use fewer"
            )
        # The first and the last are always copied: they are next to the embedding and the head.
        return [round(number * (available - 1) / max(1, needed - 1)) for number in range(needed)]
    if len(blocks) != needed or max(blocks) >= available:
        raise UserError(
            f"train.init_blocks must name {needed} of the {available} outer blocks (from 0) of {truncate(run)}: "
            f"got {truncate(list(blocks))}"
        )
    return list(blocks)


def _source(name: str, chosen: list[int]) -> str:
    """Name that a parameter of the new model has in the trained model."""
    if not name.startswith(BLOCKS):
        return name
    number, _, rest = name.removeprefix(BLOCKS).partition(".")
    return f"{BLOCKS}{chosen[int(number)]}.{rest}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
