"""Files in a folder of `diffusers`: JSON, and weights in one or several files, with or without a variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dit_in_dit.config import strict_json
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.data.vae import WEIGHTS, variant_of
from dit_in_dit.runs.safe_load import read_pt, read_safetensors

PIPELINE_INDEX = "model_index.json"  # of a pipeline


def read_diffusers_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; UserError when it is no object."""
    return strict_json.read_json(path, advice="give a folder of diffusers' DiTTransformer2DModel")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder; `.safetensors` is preferred to `.bin`, and several files with an index are preferred to
    one file.

    Raises:
        UserError: the weights cannot be read, or are no tensors.
    """
    variant = variant_of(folder)
    dotted = f".{variant}" if variant else ""
    for kind in ("safetensors", "bin"):
        index, whole = folder / f"{WEIGHTS}.{kind}.index{dotted}.json", folder / f"{WEIGHTS}{dotted}.{kind}"
        if index.exists():
            return _read_shards(index, kind)
        if whole.exists():
            return _read(whole)
    return read_safetensors(folder / f"{WEIGHTS}.safetensors")  # raises: it is missing


def _read_shards(index: Path, kind: str) -> dict[str, Tensor]:
    files = read_diffusers_json(index).get("weight_map")
    listed = {str(name) for name in files.values()} if isinstance(files, dict) else set()
    if not listed or any(Path(name).name != name or not name.endswith(f".{kind}") for name in listed):
        raise UserError(f"{index} must name .{kind} files beside it: get the folder again")
    return {name: value for file in sorted(listed) for name, value in _read(index.with_name(file)).items()}


def _read(file: Path) -> dict[str, Tensor]:
    weights = read_pt(file)
    if wrong := [name for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{truncate(str(file), 80)} holds no weights of a DiT: {wrong[0][:40]!r} is no tensor")
    return weights
