"""A run that is given away: its config and averaged weights, in half the bytes, without what training goes on from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

import torch

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.inspection import cost
from dit_in_dit.interop.card import card, evaluation_of
from dit_in_dit.reporting.templates import code, code_block
from dit_in_dit.runs import atomic, checkpoint

Precision = Literal["float32", "bfloat16", "float16"]
PICTURE = "samples.png"


def export_slim(run: Path, out: Path, *, precision: Precision = "float16", licence: str = "unknown") -> None:
    """Write `out`, a run of the newest checkpoint's averaged weights alone, and its card; whole or not there.

    It is sampled, evaluated, drawn and exported like any run, and a new run may begin with it (`train.init`).
    float16 has three more bits for a weight than bfloat16, and weights are far from its limits.

    Raises:
        UserError: there is no such run, `out` is taken, or a weight is too large for the precision.
    """
    atomic.check_free(out)
    config = checkpoint.read_config(run)
    folder, manifest, passed_over = checkpoint.newest(run)
    checkpoint.warn(passed_over)
    dtype = getattr(torch, precision)
    stored = checkpoint.load_state(folder, checkpoint.AVERAGED)
    checkpoint.check_weights(stored, str(run))
    averaged = {name: tensor.to(dtype) for name, tensor in stored.items()}
    for name, tensor in averaged.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} of {run} has a value too large for {precision}: use --precision bfloat16")
    with atomic.folder(out) as beside:
        checkpoint.create(beside, config)
        checkpoint.save(beside, config, manifest["step"], {}, averaged, tuple(manifest["classes"]))
        write_card(beside, out.resolve().name, licence=licence)


def write_card(run: Path, name: str, *, licence: str = "unknown") -> None:
    """README.md of a run, with what its own evaluation found and the picture beside it."""
    config = checkpoint.read_config(run)
    _, manifest, _ = checkpoint.newest(run)
    text = card(
        name,
        config,
        manifest["step"],
        list(manifest["classes"]),
        cost.parameters(config.model)["total"],
        evaluation_of(run, manifest["sha256"][checkpoint.AVERAGED]),
        licence=licence,
        picture=PICTURE if (run / PICTURE).exists() else None,
        use=usage(name, config),
    )
    (run / "README.md").write_text(text)


def usage(name: str, config: RunConfig) -> str:
    """A card's Markdown of how a run of the package is sampled."""
    classes = " --classes 0,1" if config.model.num_classes else ""
    command = code_block(f"dit-in-dit sample {shlex.quote(name)}{classes} --num 64")
    return (
        f"{command}\n\nThe folder is a run of the package `dit-in-dit` with the averaged weights alone: every command "
        f"that takes a run takes it, by its path or, where it came with the package, as {code(name)}."
    )
