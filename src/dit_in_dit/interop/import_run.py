"""Weights of others as an ordinary run folder, and a plain run's weights as files of theirs.

    config.yaml, checkpoints/    a run; its step is the optimizer's, where the file says it
    origin.json                  where the weights came from: file, SHA-256, format, and diffusers' config

The weights keep their type and every bit; a model that is made of them computes in float32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import assigned, override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.interop import diffusers_dit, official
from dit_in_dit.interop.official import LABEL_TABLE, POSITION, OfficialKind, OfficialWeights
from dit_in_dit.interop.official_checkpoint import read_checkpoint
from dit_in_dit.runs import atomic
from dit_in_dit.runs.checkpoint import Checkpoint, save
from dit_in_dit.runs.folder import create, read_config
from dit_in_dit.runs.integrity import file_sha256
from dit_in_dit.runs.tensors import check_weights

ORIGIN = "origin.json"
KEPT = f"official.{POSITION}"  # in the checkpoint's state, where it is not bit for bit what is computed here


def import_run(
    source: Path,
    out: Path,
    *,
    kind: OfficialKind | None = None,
    heads: int | None = None,
    classes: int | None = None,
    settings: Sequence[str] = (),
) -> RunConfig:
    """Make `out` the run of a file of the official DiT or SiT, or of a folder of diffusers' DiT; whole or not at all.

    Args:
        kind: DiT or SiT, which look the same; None: as the file says, see `read_checkpoint`.
        heads: attention heads, where neither the file nor the published sizes say them.
        classes: their number, where the file does not say it or is wrong: of a table with as many rows, none is that
            of no class.
        settings: `KEY=VALUE` of the run's config.

    Raises:
        UserError: the source cannot be read or is not exactly a DiT, or `out` is taken.
    """
    atomic.check_free(out)
    if (source / "config.yaml").exists():
        raise UserError(f"{source} is a run already: import takes weights of others")
    what, found = source.name, OfficialWeights({}, {})
    origin: dict[str, Any] = {}
    if source.is_dir():
        found, theirs = diffusers_dit.read_folder(source)
        origin = {"format": "diffusers", "name": what, "config": theirs}
    else:
        found = read_checkpoint(source, kind)
        origin = {"format": "official", "name": what, "sha256": file_sha256(source)}
    found = replace(found, heads=heads or found.heads, classes=classes or found.classes)
    found = official.with_null_class(found, what)
    model = official.model_of(found, what)
    official.check_official(found.trained, model, what)
    config = _settled(official.run_of(found, model), settings, null_class=found.null_class)
    if not found.null_class:
        origin["null_class"] = False
    turn = official.turns(model, config.diffusion)
    averaged, trained = (official.to_ours(part, model, turn=turn) for part in (found.averaged, found.trained))
    state = {f"model.{name}": tensor for name, tensor in trained.items()}
    position = found.averaged[POSITION]
    if not _same_bits(position, official.position(model, averaged["outer_embed.proj.weight"].dtype)):
        state[KEPT] = position
    for part in (averaged, trained):
        check_weights(part, what)
    names = tuple(str(number) for number in range(model.num_classes))
    with atomic.folder(out) as beside:
        create(beside, config)
        save(beside, config, found.step, state, averaged, names)
        (beside / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")
    return config


def _settled(config: RunConfig, settings: Sequence[str], *, null_class: bool) -> RunConfig:
    """The config with settings that do not say what the weights are."""
    for name, _ in map(assigned, settings):
        if name in ("model", "diffusion") or name.startswith(("model.", "diffusion.path", "diffusion.predict")):
            raise UserError(f"--set {name[:60]}: the weights say that; what is sampled, trained and read may be set")
        if name == "train.label_drop" and not null_class:
            raise UserError(f"--set {name}: the weights have no null class, and guidance=1 is all that they allow")
    return override(config, settings)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ------------------------------------------------------------------------------------------ export


def is_theirs(run: Path) -> bool:
    """Whether diffusers' own DiT computes what the run does."""
    config = read_config(run)
    return _fits_theirs(config) and config.model.time_embed == "diffusers" and config.diffusion.predict == "noise"


def _fits_theirs(config: RunConfig) -> bool:
    plain = (
        not config.model.blocks("inner")
        and not config.model.qk_norm
        and config.model.outer.norm == "layer"
        and config.model.image_size[0] == config.model.image_size[1]
    )
    return plain and config.diffusion.path == "ddpm" and config.model.num_classes > 0


def export_official(run: Path, out: Path, *, averaged: bool = True) -> list[str]:
    """Write the run's weights as the official code loads them, a `.pt` of tensors by name; what there is to know.

    Raises:
        UserError: the run is no plain DiT of square images, or `out` is there.
    """
    config, weights = _official_weights(run, averaged=averaged)
    atomic.check_free(out)
    if _origin(run).get("null_class") is False:
        weights[LABEL_TABLE] = weights[LABEL_TABLE][:-1].clone()  # as it was read
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(out) as file:
        torch.save(weights, file)
    if config.model.time_embed == "diffusers":
        return [_DIFFUSERS_CLOCK]
    return [] if config.model.time_embed == "sit" or config.diffusion.path == "ddpm" else [_FLOW]


def export_diffusers(run: Path, out: Path, *, averaged: bool = True) -> list[str]:
    """Write the run as a folder of diffusers' `DiTTransformer2DModel`; what there is to know.

    Raises:
        UserError: the run is no plain DiT on the ddpm path with square images and classes, or `out` is there.
    """
    if not _fits_theirs(read_config(run)):
        raise UserError(f"{run} is none of diffusers' DiT (plain, ddpm, square, classes): use --format pipeline")
    config, weights = _official_weights(run, averaged=averaged)
    theirs = _origin(run).get("config") or diffusers_dit.config_of(config.model)
    tensors = diffusers_dit.to_diffusers(weights, config.model.blocks("outer"))

    with atomic.folder(out) as beside:
        diffusers_dit.write_folder(beside, theirs, tensors)
    notes = [] if config.model.time_embed == "diffusers" else [_DIT_CLOCK]
    if config.diffusion.predict != "noise":
        notes.append(f"its scheduler's prediction_type must be that of {config.diffusion.predict}")
    return notes


_DIFFUSERS_CLOCK = "the official code has other time frequencies than diffusers: its outputs differ"
_DIT_CLOCK = "diffusers' DiT has other time frequencies than this run: its outputs differ"
_FLOW = "the official code samples along the ddpm path: it loads these weights of path flow, and cannot sample them"


def _official_weights(run: Path, *, averaged: bool) -> tuple[RunConfig, dict[str, Tensor]]:
    """A plain run's weights under official names, the position first."""
    config = read_config(run)
    model = config.model
    if model.blocks("inner"):
        raise UserError(f"{run} has inner blocks, which no official DiT has: use --format pipeline")
    if model.image_size[0] != model.image_size[1]:
        raise UserError(
            f"{run} has images of {model.image_size}, an official DiT has square ones: use --format pipeline"
        )
    if model.qk_norm:
        raise UserError(f"{run} norms queries and keys, which no official DiT does: use --format pipeline")
    if model.outer.norm != "layer":
        raise UserError(f"{run} has model.outer.norm={model.outer.norm}, an official DiT layer: use --format pipeline")
    saved = Checkpoint.open(run)
    ours, kept = saved.weights(averaged=averaged), saved.state().get(KEPT)
    check_weights(ours, str(run))
    try:
        weights = official.to_official(ours, model, turn=official.turns(model, config.diffusion))
    except (KeyError, RuntimeError):
        raise saved.misfit() from None
    first = official.position(model, weights[official.PATCHES].dtype) if kept is None else kept
    return config, {POSITION: first, **weights}


def _origin(run: Path) -> dict[str, Any]:
    """origin.json of an imported run; empty where there is none."""
    path = run / ORIGIN
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"cannot read {path}: import the weights again") from None
