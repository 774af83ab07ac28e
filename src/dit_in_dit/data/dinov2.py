"""DINOv2 (Oquab et al. 2023) from local files, through the `transformers` library. Nothing is downloaded."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.strict_json import read_json
from dit_in_dit.data.digest import digest_values
from dit_in_dit.runs.integrity import file_sha256

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def about_dinov2(folder: Path) -> dict[str, Any]:
    """The encoder's config.json, which must be that of a DINOv2. Raises UserError."""
    about: dict[str, Any] = read_json(folder / "config.json", advice="get the files again")
    numbers = ("hidden_size", "num_hidden_layers", "patch_size")
    if about.get("model_type") != "dinov2" or any(type(about.get(name)) is not int for name in numbers):
        raise UserError(f"{folder} must hold a model of type dinov2: got {truncate(about.get('model_type'), 40)!r}")
    return about


def dinov2_sha256(folder: Path) -> str:
    """SHA-256 of the encoder's file of weights, or of the hashes of several files; UserError if one is unreadable."""
    try:
        hashes = [file_sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    except OSError as error:
        raise UserError(f"cannot read {truncate(folder)}: {error.strerror or error}; get the files again") from None
    return hashes[0] if len(hashes) == 1 else digest_values(hashes)


@torch.no_grad()
def patch_features(encoder: Any, x: Tensor, side: int) -> Tensor:
    """Features (N, F, g, g) of the encoder's patches, after the last norm, for images (N, 1 or 3, H, W) in [-1, 1],
    which are resized to `side` x `side` pixels."""
    mean, deviation = (_column(numbers, x) for numbers in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    image = F.interpolate((x.expand(-1, 3, -1, -1) + 1) / 2, (side, side), mode="bicubic")
    patches: Tensor = encoder((image - mean) / deviation).last_hidden_state[:, 1:]  # without the class token
    return patches.mT.unflatten(2, (math.isqrt(patches.shape[1]), -1))  # type: ignore[no-untyped-call]


def _column(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.stack([like.new_full((1, 1), number) for number in numbers])  # filled on the device: no copy to it


def read_dinov2(folder: Path, side: int) -> Any:
    """The model in a folder, for images of `side` x `side` pixels; UserError if the folder holds no such model."""
    try:
        from transformers import Dinov2Model
        from transformers.utils import logging as transformers_logging
    except (ImportError, RuntimeError) as error:
        raise not_importable("transformers", "transformers", error) from None
    # transformers prints a table of every weight that does not fit; one line below says what is wrong.
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    with _reading(folder):
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind != "dinov2":
        raise UserError(f"{folder} must hold a model of type dinov2: got {kind!r}")
    with _reading(folder):
        model, report = Dinov2Model.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation="sdpa",  # else a config could name a repository of kernels to download and run
            ignore_mismatched_sizes=True,  # they are in the report
        )
    wrong = {*report["missing_keys"], *report["unexpected_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if differing := sorted(name for name in wrong if not name.startswith("classifier")):
        raise UserError(
            f"{folder} must hold one model: model.safetensors and config.json differ in {len(differing)} weights, "
            f"{differing[0]} first; get both again"
        )
    with _reading(folder):
        _fix_positions(model, side // model.config.patch_size)
    return model


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn any error in the body into a UserError: the `transformers` library raises many kinds of errors."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise UserError(f"cannot read DINOv2 from {folder}: {reason}; get the files again") from None


def _fix_positions(model: Any, grid: int) -> None:
    """Resize the position table to grid x grid patches, as DINOv2's own code does: by a scale of (grid + 0.1) / side.
    Versions of transformers use different formulas."""
    embeddings = model.embeddings
    table = embeddings.position_embeddings.detach()  # (1, 1 + side^2, D), the class token's first
    side = math.isqrt(table.shape[1] - 1)
    if side == grid:
        return
    patches = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")  # (1, D, grid, grid)
    embeddings.position_embeddings = nn.Parameter(torch.cat([table[:, :1], patches.flatten(2).mT], 1))


def not_importable(package: str, module: str, error: Exception) -> UserError:
    if isinstance(error, ImportError) and error.name == module:
        return UserError(f"{package} is missing: pip install 'dit-in-dit[eval]'")
    reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
    return UserError(f"{package} cannot be imported: {reason}; install a torchvision that was made for this torch")
