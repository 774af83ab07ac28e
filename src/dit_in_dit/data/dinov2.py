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
from torch import nn
from torch.nn import functional as F

from dit_in_dit.config.errors import UserError

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
