"""An inference-only copy of a run: config, averaged weights in half the bytes, and a model card."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from dit_in_dit.config.averages import weights_name
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.inspection import cost
from dit_in_dit.interop.card import card, evaluation_of
from dit_in_dit.reporting.templates import code, code_block
from dit_in_dit.runs import atomic
from dit_in_dit.runs.checkpoint import Checkpoint, newest, save
from dit_in_dit.runs.folder import create_run
from dit_in_dit.runs.tensors import check_weights

Precision = Literal["float32", "bfloat16", "float16"]
PICTURE, SCORES = "samples.png", "scores.png"


def export_release(
    run: Path,
    out: Path,
    precision: Precision = "float16",
    *,
    averaged: bool | str = True,
    licence: str = "unknown",
    name: str | None = None,
) -> None:
    """Write the run `out`, complete or not at all: the newest checkpoint's averaged weights, or another average, and a
    card with `name`.

    The copy can be sampled, evaluated, plotted and exported like any run, and can initialise a new run (`train.init`).
    float16 has three more mantissa bits than bfloat16, and weights are far below its largest value.

    Raises:
        UserError: there is no such run, `out` exists, or a weight is too large for the precision.
    """
    atomic.check_free(out)
    saved, dtype = Checkpoint.open(run), getattr(torch, precision)
    weights = saved.weights(averaged=averaged)
    check_weights(weights, str(run))
    rounded = {name: tensor.to(dtype) for name, tensor in weights.items()}
    for part, tensor in rounded.items():
        if not tensor.isfinite().all():
            raise UserError(f"{part} of {run} has a value too large for {precision}: use --precision bfloat16")
    with atomic.folder(out) as beside:
        create_run(beside, saved.config)
        save(beside, saved.config, saved.step, {}, rounded, saved.classes)
        results, figure = evaluation_of(run, saved.sha256(averaged=averaged))
        if figure:
            shutil.copyfile(figure, beside / SCORES)
        if results and precision != "float32":
            note = f"The results are of the weights before they were rounded to {precision}."
            results["warnings"] = [*results.get("warnings", ()), note]
        words = weights_name(averaged)
        write_card(beside, name or out.resolve().name, weights=words, licence=licence, results=results)


def write_card(
    run: Path,
    name: str,
    *,
    weights: str = "averaged",
    licence: str = "unknown",
    results: dict[str, Any] | None = None,
) -> None:
    """Write README.md of a run, with its evaluation's results, or else `results`, and its picture."""
    saved = newest(run)
    config = saved.config
    own, figure = evaluation_of(run, saved.sha256())
    figure = figure or next(run.glob(SCORES), None)
    text = card(
        name,
        config,
        saved.step,
        list(saved.classes),
        cost.parameters(config.model)["total"],
        own or results,
        weights=weights,
        licence=licence,
        picture=PICTURE if (run / PICTURE).exists() else None,
        scores=figure.relative_to(run).as_posix() if figure else None,
        use=sampling_instructions(name, config, [plugin["name"] for plugin in saved.manifest.get("plugins", ())]),
    )
    atomic.write_atomic(run / "README.md", text)


def sampling_instructions(name: str, config: RunConfig, plugins: Sequence[str] = ()) -> str:
    """Markdown for a card: how to sample a run of the package, with the plug-ins that it needs."""
    classes = " --classes 0,1" if config.model.num_classes else ""
    loads = "".join(f" --plugin {shlex.quote(plugin)}" for plugin in plugins)
    command: str = code_block(f"dit-in-dit sample {shlex.quote(name)}{classes} --num 64{loads}")
    if plugins:
        command = f"{command}\n\nThe run needs {' and '.join(map(code, plugins))}, which is not in this folder."
    return (
        f"{command}\n\nThe folder is a run of the package `dit-in-dit` with the averaged weights alone: every command "
        f"that takes a run takes it, by its path or, where it came with the package, as {code(name)}."
    )
