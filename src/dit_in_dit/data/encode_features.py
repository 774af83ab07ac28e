"""Features of images by a local DINOv2, stored beside their latents for REPA (data/features.py).

As for latents, files are complete or absent, files that exist are kept, and the batch of an image depends only on its
number, so interruptions and the number of processes change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.strict_json import json_difference
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
    """Load the encoder, then write features of `grid` x `grid` patches into `out`, which `encode` has by then filled
    with latents of the same images; yields (images done, all images).

    Raises:
        UserError: the encoder or the images cannot be used, or the folder holds other features or a damaged file.
    """
    if how.size[0] != how.size[1]:
        raise UserError(f"--features needs images as high as wide: --size is {how.size[0]}x{how.size[1]}")
    about = about_dinov2(encoder)
    side = grid * about["patch_size"]
    network = read_dinov2(encoder, side).to(device).eval().requires_grad_(False)
    made = {
        **{"encoder_sha256": dinov2_sha256(encoder), "shape": [about["hidden_size"], grid, grid]},
        **{"size": list(how.size), "flips": how.flips, "batch": how.batch, "shard": how.shard},
    }

    def features(images: Tensor, numbers: range) -> Tensor:
        half = patch_features(network, images.to(device), side).half().cpu()
        if not (finite := half.isfinite().flatten(1).all(1)).all():
            number = numbers[int((~finite).nonzero()[0])]
            raise UserError(f"features of image {number} (counted from 0) do not fit float16: use another encoder")
        return half

    return _write(how, out, made, features)


def _write(
    how: Encoding, out: Path, made: dict[str, Any], features: Callable[[Tensor, range], Tensor]
) -> Iterator[tuple[int, int]]:
    source, families = all_images(how)
    made |= {"images": load_index(out)["made"].get(DATA), "count": len(families)}
    path, index = out / FEATURES_INDEX, {"format": FEATURES_FORMAT, "made": made, "shards": []}
    atomic.write_atomic(path, json.dumps(index, indent=1), once=True)
    stored = load_features_index(out)
    if difference := json_difference(stored["made"], made):
        raise UserError(f"{path} is of other features ({difference}): choose another --out, or remove its features*")

    def make(parts: list[range]) -> Iterator[dict[str, Tensor]]:
        for tensors in encode_parts(source, how, parts, features):
            yield {{"moments": "features"}.get(name, name): each for name, each in tensors.items() if name != "label"}

    paths = part_paths(out, len(families), how.shard, "features-")
    yield from write_parts(paths, make)
    if process.rank() == 0:
        entries: list[dict[str, Any]] = [
            {"file": p.name, "count": len(part), "sha256": file_sha256(p)} for part, p in paths.items()
        ]
        if stored["shards"] and (other := next((each for each in entries if each not in stored["shards"]), None)):
            raise UserError(f"{out / other['file']} is not the file of {FEATURES_INDEX}: remove it and run again")
        atomic.clear_temporary(out, {FEATURES_INDEX, *(p.name for p in paths.values())})
        atomic.write_atomic(path, json.dumps({**index, "shards": entries}, indent=1))
