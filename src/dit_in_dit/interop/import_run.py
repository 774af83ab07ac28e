"""Import of published weights as a run folder, and export of a run's weights to the formats of their authors.

    config.yaml, checkpoints/    a run; its step is the optimizer's, if the file has an optimizer's state
    origin.json                  origin of the weights: file, SHA-256, format, and diffusers' config

The weights keep their type and every bit; a model with these weights computes in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override, parse_assignment
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.strict_json import read_json
from dit_in_dit.interop import diffusers_dit, official
from dit_in_dit.interop.field_names import POSITION, UNUSED, OfficialKind, computed_tables, to_official, to_ours
from dit_in_dit.interop.hub import fetch_repo, is_repo_id
from dit_in_dit.interop.official import ALIKE, UNSEEN, OfficialWeights
from dit_in_dit.interop.official_checkpoint import read_checkpoint
from dit_in_dit.interop.official_sizes import model_of
from dit_in_dit.runs import atomic
from dit_in_dit.runs.checkpoint import Checkpoint, save
from dit_in_dit.runs.folder import create_run, read_config
from dit_in_dit.runs.integrity import file_sha256
from dit_in_dit.runs.tensors import check_weights

Tensors = dict[str, Tensor]
ORIGIN = "origin.json"
# Prefixes in the checkpoint's state of official tensors that our model does not have: computed tables, if they are not
# bit for bit ours, and those of `UNUSED`. The second has those of the trained weights, where they differ.
BESIDE_AVERAGED, BESIDE_TRAINED = "official.", "official.raw."
IMPORTED_POSITION = f"{BESIDE_AVERAGED}{POSITION}"


def import_run(
    source: Path,
    out: Path,
    *,
    kind: OfficialKind | None = None,
    heads: int | None = None,
    classes: int | None = None,
    size: tuple[int, int] | None = None,
    average: str | None = None,
    settings: Sequence[str] = (),
) -> RunConfig:
    """Write the run folder `out`, complete or not at all, from a file of an official model, from a folder of diffusers'
    DiT, or from a repository USER/NAME of the Hub that holds one of them or a run.

    `read_checkpoint` explains `kind` and `average`, `OfficialWeights` the numbers of heads and classes and the size. A
    table of labels with exactly `classes` rows has no null class. `settings` are `KEY=VALUE` of the run's config.
    UserError when the source cannot be read or is not exactly an official model, or `out` exists.
    """
    atomic.check_free(out)
    what = source.name
    if from_hub := is_repo_id(str(source)):
        source = fetch_repo(str(source))
    if len(files := list(source.glob("*.pt*"))) == 1:
        source = files[0]
    if (source / "config.yaml").exists():
        if not from_hub or settings:
            raise UserError(f"{source} is a run already: import takes weights of other projects")
        with atomic.folder(out) as beside:
            shutil.copytree(source, beside, dirs_exist_ok=True)
        return read_config(out)
    weights, origin = _read(source, kind, average)
    unseen = {name: value for name, value in map(parse_assignment, settings) if name in UNSEEN}
    weights = replace(weights, heads=heads or weights.heads, classes=weights.classes if classes is None else classes)
    weights = official.add_null_class(replace(weights, size=size, unseen=unseen), what)
    if not weights.null_class:
        origin["null_class"] = False
    model = model_of(weights, what)
    official.check_official(weights.trained, weights.kind, model, what)
    config = _apply_settings(official.run_of(weights, model), settings, null_class=weights.null_class)
    state, averaged = _checkpoint_tensors(weights, config, what)
    names = tuple(str(number) for number in range(model.num_classes))
    with atomic.folder(out) as beside:
        create_run(beside, config)
        save(beside, config, weights.step, state, averaged, names)
        (beside / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")
    return config


def _read(source: Path, kind: OfficialKind | None, average: str | None) -> tuple[OfficialWeights, dict[str, Any]]:
    """The weights of a file or folder under official names, and the content of origin.json."""
    if source.is_dir():
        weights, config = diffusers_dit.read_folder(source)
        return weights, {"format": "diffusers", "name": source.name, "config": config}
    weights = read_checkpoint(source, kind, average)
    return weights, {"format": "official", "name": source.name, "sha256": file_sha256(source)}


def _checkpoint_tensors(weights: OfficialWeights, config: RunConfig, what: str) -> tuple[Tensors, Tensors]:
    """State and averaged weights of the run's checkpoint; UserError when a weight is not finite."""
    model, kind, turn = config.model, weights.kind, official.flips_sign(config.model, config.diffusion)
    averaged, trained = (to_ours(part, kind, model, turn=turn) for part in (weights.averaged, weights.trained))
    for part in (averaged, trained):
        check_weights(part, what)
    state = {f"model.{name}": tensor for name, tensor in trained.items()}
    known, dtype = computed_tables(kind, model), averaged["outer_embed.proj.weight"].dtype
    for name, tensor in weights.averaged.items():
        if name in known or name.startswith(UNUSED.get(kind, "/")):
            if name not in known or not _same_bits(tensor, known[name].to(dtype)):
                state[BESIDE_AVERAGED + name] = tensor
            if not _same_bits(tensor, raw := weights.trained.get(name, tensor)):
                state[BESIDE_TRAINED + name] = raw
    return state, averaged


def _apply_settings(config: RunConfig, settings: Sequence[str], *, null_class: bool) -> RunConfig:
    """The config with `settings`; UserError for keys that the weights determine."""
    for name in {name for name, _ in map(parse_assignment, settings)}.difference(UNSEEN):
        if name in ("model", "diffusion") or name.startswith(("model.", "diffusion.path", "diffusion.predict")):
            raise UserError(f"--set {name[:60]}: the weights determine this key; set keys of sample, train or data")
        if name == "train.label_drop" and not null_class:
            raise UserError(f"--set {name}: the weights have no null class, so guidance must be 1")
    return override(config, settings)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    same = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def fits_diffusers(run: Path, *, exactly: bool) -> bool:
    """Whether diffusers' DiT can hold the run's weights (a plain DiT with classes and square images, on the ddpm path);
    `exactly`: and whether it computes the same outputs."""
    model, diffusion = read_config(run).model, read_config(run).diffusion
    fits = official.kind_of(model) in ALIKE and diffusion.path == "ddpm" and model.num_classes > 0
    return fits and (not exactly or (model.time_embed == "diffusers" and diffusion.predict == "noise"))


def export_official(run: Path, out: Path, *, averaged: bool | str = True) -> list[str]:
    """Write the run's weights as the official code loads them: a `.pt` of tensors by name. Returns notes for the user.
    UserError when the run is no official model, or `out` exists."""
    config, kind, weights = _official_weights(run, averaged=averaged)
    atomic.check_free(out)
    if _origin(run).get("null_class") is False:
        table = official.label_table(kind)
        weights[table] = weights[table][:-1].clone()  # the imported table had no row for it
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(out) as file:
        torch.save(weights, file)
    if config.model.time_embed == "diffusers":
        return ["the official code has other time frequencies than diffusers: its outputs differ"]
    flow = "the official code samples along the ddpm path: it can load these weights of path flow, but cannot sample"
    return [f"{flow} from them"] if kind == "dit" and config.diffusion.path != "ddpm" else []


def export_diffusers(run: Path, out: Path, *, averaged: bool | str = True) -> list[str]:
    """Write the run as a folder of diffusers' `DiTTransformer2DModel`. Returns notes for the user. UserError when the
    run is no plain DiT on the ddpm path with square images and classes, or `out` exists."""
    if not fits_diffusers(run, exactly=False):
        raise UserError(f"{run} does not fit diffusers' DiT (plain, ddpm, square, classes): use --format pipeline")
    config, _, weights = _official_weights(run, averaged=averaged)
    diffusers_config = _origin(run).get("config") or diffusers_dit.config_of(config.model)
    tensors = diffusers_dit.to_diffusers(weights, config.model.blocks("outer"))
    with atomic.folder(out) as beside:
        diffusers_dit.write_folder(beside, diffusers_config, tensors)
    other_times = "diffusers' DiT has other time frequencies than this run: its outputs differ"
    notes = [] if config.model.time_embed == "diffusers" else [other_times]
    if config.diffusion.predict != "noise":
        notes.append(f"its scheduler's prediction_type must be that of {config.diffusion.predict}")
    return notes


def _official_weights(run: Path, *, averaged: bool | str) -> tuple[RunConfig, OfficialKind, dict[str, Tensor]]:
    """Config, kind and weights of an official model, under official names and in their order, with computed tables."""
    config = read_config(run)
    kind = official.kind_of(config.model)
    if kind is None:
        raise UserError(f"{run} is no official model at any size (docs/field.md has them): use --format pipeline")
    saved = Checkpoint.open(run)
    ours, state = saved.weights(averaged=averaged), saved.state()
    check_weights(ours, str(run))
    try:
        weights = to_official(ours, kind, config.model, turn=official.flips_sign(config.model, config.diffusion))
    except (KeyError, RuntimeError):
        raise saved.misfit() from None
    for prefix in (BESIDE_AVERAGED,) if averaged else (BESIDE_AVERAGED, BESIDE_TRAINED):
        beside = {name.removeprefix(prefix): name for name in state if name.startswith(prefix)}
        weights |= {name: state[key] for name, key in beside.items() if not name.startswith("raw.")}
    return config, kind, weights


def _origin(run: Path) -> dict[str, Any]:
    """The content of origin.json of an imported run; empty for other runs."""
    path = run / ORIGIN
    return read_json(path, advice="import the weights again") if path.exists() else {}
