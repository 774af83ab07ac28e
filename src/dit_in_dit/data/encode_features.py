"""Features of images by a local DINOv2, stored beside their latents for REPA (data/features.py).

As for latents, files are complete or absent, files that exist are kept, and the batch of an image depends only on its
number, so interruptions and the number of processes change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError
from dit_in_dit.data.dinov2 import about_dinov2, dinov2_sha256, patch_features, read_dinov2
from dit_in_dit.data.encode import DATA, Encoding, all_images, encode_parts, part_paths, write_parts
from dit_in_dit.data.features import FEATURES_FORMAT, FEATURES_INDEX, load_features_index
from dit_in_dit.data.formats.latents import load_index
from dit_in_dit.runs import atomic
from dit_in_dit.runs.integrity import file_sha256
from dit_in_dit.runtime import process


def encode_features(
    how: Encoding, encoder: Path, grid: int, out: Path, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Write features of `grid` x `grid` patches into `out`, a folder that `encode` has filled with latents of the same
    images; yields (images done, all images).

    Raises:
        UserError: the encoder or the images cannot be used, or the folder holds other features or a damaged file.
    """
    check_features(how, encoder)
    about = about_dinov2(encoder)
    side = grid * about["patch_size"]
    network = read_dinov2(encoder, side).to(device).eval().requires_grad_(False)
    source, families = all_images(how)
    made = {
        "images": load_index(out)["made"].get(DATA),
        "count": len(families),
        "encoder_sha256": dinov2_sha256(encoder),
        "shape": [about["hidden_size"], grid, grid],
        **{"size": list(how.size), "flips": how.flips, "batch": how.batch, "shard": how.shard},
    }
    index = {"format": FEATURES_FORMAT, "encoder": str(encoder), "made": made, "shards": []}
    done = _begin(out, index)

    def features(images: Tensor, numbers: range) -> Tensor:
        half = patch_features(network, images.to(device), side).half().cpu()
        if not (finite := half.isfinite().flatten(1).all(1)).all():
            number = numbers[int((~finite).nonzero()[0])]
            raise UserError(f"features of image {number} (counted from 0) do not fit float16: use another encoder")
        return half

    def make(parts: list[range]) -> Iterator[dict[str, Tensor]]:
        for tensors in encode_parts(source, how, parts, features):
            yield {{"moments": "features"}.get(name, name): each for name, each in tensors.items() if name != "label"}

    paths = part_paths(out, len(families), how.shard, "features-")
    yield from write_parts(paths, make)
    if process.rank() == 0:
        _finish(out, index, paths, done)


def check_features(how: Encoding, encoder: Path) -> None:
    """UserError if features of images of this size cannot be stored, or the folder holds no DINOv2."""
    if how.size[0] != how.size[1]:
        raise UserError(f"--features needs images as high as wide: --size is {how.size[0]}x{how.size[1]}")
    about_dinov2(encoder)


def _begin(out: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    """Write an unfinished index unless an index exists; return the files that a finished index lists."""
    atomic.write_atomic(out / FEATURES_INDEX, json.dumps(index, indent=1), once=True)
    stored = load_features_index(out)
    for name, value in index["made"].items():
        if (before := stored["made"].get(name)) != value:
            raise UserError(
                f"{out} holds other features: {name} is {before}, not {value}; choose another --out, or remove its "
                "features*"
            )
    return list(stored["shards"])


def _finish(out: Path, index: dict[str, Any], paths: dict[range, Path], done: list[dict[str, Any]]) -> None:
    """Complete the index; UserError if a file differs from its entry in `done`, the files of a complete index."""
    entries = [{"file": p.name, "count": len(part), "sha256": file_sha256(p)} for part, p in paths.items()]
    for was, entry in zip(done, entries, strict=False):
        if was != entry:
            path = out / str(entry["file"])
            raise UserError(f"{path} is damaged: its SHA-256 differs from the index; remove the file and run again")
    atomic.clear_temporary(out, {FEATURES_INDEX, *(path.name for path in paths.values())})
    atomic.write_atomic(out / FEATURES_INDEX, json.dumps({**index, "shards": entries}, indent=1))
