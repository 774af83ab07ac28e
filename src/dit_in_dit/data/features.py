"""Features of images, stored beside their latents: what REPA aligns a model on latents with.

    features.json                   the encoder, its patch grid, SHA-256 of each file
    features-000000.safetensors     features, flipped (n, F, g, g) float16: of the images of 000000.safetensors

`features` are of the image, and `flipped` are of its mirror image, as for latents: the mirror image of features is not
the features of the mirror image.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.strict_json import has_form, read_json
from dit_in_dit.data.digest import digest_values
from dit_in_dit.data.formats.latents import LATENTS_INDEX, LatentSource, open_shard, read_latents_index
from dit_in_dit.data.source import Source

FEATURES_INDEX, FEATURES_FORMAT = "features.json", "dit-in-dit features 1"
FEATURES_FORM = {
    "made": {"shape": [int], "flips": bool, "encoder_sha256": str, "images": (str, type(None)), "count": int},
    "shards": [{"file": str, "count": int, "sha256": str}],
}
AGAIN = "run `dit-in-dit encode --features` again"


def load_features_index(folder: Path) -> dict[str, Any]:
    """The index of features, finished or not; UserError when it has another format."""
    path = folder / FEATURES_INDEX
    index = read_json(path, advice=f"remove it and {AGAIN}")
    shape = index.get("made", {}).get("shape") if has_form(index, FEATURES_FORM) else None
    if index.get("format") != FEATURES_FORMAT or not shape or len(shape) != 3 or shape[1] != shape[2] or min(shape) < 1:
        raise UserError(f"{truncate(path)} is not of the format {FEATURES_FORMAT!r}: remove it and {AGAIN}")
    return index


def has_features(config: RunConfig) -> bool:
    """Whether features lie beside the latents that data.source names."""
    folder = Path(config.data.source)
    return (folder / LATENTS_INDEX).is_file() and (folder / FEATURES_INDEX).is_file()


def at_source(config: RunConfig, source: Source | None) -> RunConfig:
    """The config with the place of the opened latents, which may have moved, as its data.source."""
    if not isinstance(source, LatentSource):
        return config
    return replace(config, data=replace(config.data, source=str(source.folder)))


def read_features_index(folder: Path) -> dict[str, Any]:
    """The index of finished features of the latents in a folder; UserError when they are unfinished, or are of other
    images."""
    index, latents = load_features_index(folder), read_latents_index(folder)
    if not index["shards"]:
        raise UserError(f"the features in {truncate(folder)} are not complete: run the same `dit-in-dit encode` again")
    counts = [[shard["count"] for shard in each["shards"]] for each in (index, latents)]
    if index["made"]["images"] != latents["made"].get("data_sha256") or counts[0] != counts[1]:
        raise UserError(
            f"{truncate(folder / FEATURES_INDEX)} is of other images than the latents: remove it and {AGAIN}"
        )
    return index


def features_sha256(folder: Path) -> str:
    """SHA-256 that identifies the features in a folder: of the hashes of their files."""
    return digest_values("features", read_features_index(folder)["shards"])


class StoredFeatures:
    """Features of training images by number, memory-mapped."""

    def __init__(self, source: LatentSource) -> None:
        """Raises UserError if the features are damaged, or mirror images are needed and have no features."""
        self.source, folder = source, source.folder
        index = read_features_index(folder)
        made = index["made"]
        if source.data.flip and not made["flips"]:
            raise UserError(f"data.flip=true: {folder} has no features of mirror images; set data.flip=false")
        self.shards = [open_shard(folder / Path(shard["file"]).name) for shard in index["shards"]]  # none outside it
        for shard, arrays in zip(index["shards"], self.shards, strict=True):
            form = (np.dtype("<f2"), (shard["count"], *made["shape"]))
            for name in ("features", "flipped")[: 1 + made["flips"]]:
                if name not in arrays or (arrays[name].dtype, arrays[name].shape) != form:
                    path = truncate(folder / shard["file"])
                    raise UserError(f"{path} does not hold the {name!r} that {FEATURES_INDEX} describes: {AGAIN}")

    def __reduce__(self) -> Any:
        return type(self), (self.source,)  # a worker maps the files itself

    def __call__(self, index: int, *, flip: bool) -> NDArray[np.float16]:
        """Features (F, g, g) of training image `index` or of its mirror image."""
        return self.source.beside(self.shards, index, "flipped" if flip else "features")


def open_features(config: RunConfig, source: Source) -> StoredFeatures | None:
    """The features that the run's loss needs, if the source is latents with features."""
    if (
        not config.train.terms.repa
        or not isinstance(source, LatentSource)
        or not has_features(at_source(config, source))
    ):
        return None
    return StoredFeatures(source)
