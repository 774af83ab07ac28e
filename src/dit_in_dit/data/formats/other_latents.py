"""Latents as other projects write them. A size (C, h, w) is that of one latent.

EDM2, REPA      dataset.json                            {"labels": [["00000/img-mean-std-00000000.npy", 3], ...]}
                00000/img-mean-std-00000000.npy         (2C, h, w): mean and standard deviation, not normalised
fast-DiT        imagenet256_features/0.npy              (1, C, h, w): a sample, multiplied by 0.18215
                imagenet256_labels/0.npy                (1,)
LightningDiT    latents_rank00_shard000.safetensors     latents, latents_flip (n, C, h, w): samples; labels (n,)
                latents_stats.pt                        mean, std (1, C, 1, 1)
"""

from __future__ import annotations

import copyreg
import io
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import DataConfig, ModelConfig
from dit_in_dit.data.digest import MOST_CONTENT, digest_arrays, digest_files
from dit_in_dit.data.files import ImageFiles
from dit_in_dit.data.formats.latents import SD_SCALE, STORED, LatentSource, open_shard
from dit_in_dit.data.groups import family_number
from dit_in_dit.data.labels import label_names
from dit_in_dit.data.picture import UNREADABLE, Array
from dit_in_dit.runs.safe_load import read_pt

SHARDS = "latents_rank*_shard*.safetensors"


class MomentFiles(ImageFiles):
    """EDM2's `.npy` files in a folder or .zip, with the labels of its `dataset.json`."""

    kind, suffixes = "latents", (".npy",)

    def _read_table(self, others: list[str]) -> dict[str, int] | None:
        if (labels := super()._read_table(others)) is None:
            raise UserError(f"{truncate(self.path, 60)} has no dataset.json: copy it beside the folders of latents")
        return labels

    def array(self, name: str, kinds: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The array of one file; UserError unless it holds finite numbers of NumPy's `kinds` in this shape."""
        try:
            array = np.lib.format.read_array(io.BytesIO(self.content(name)), allow_pickle=False)
            if array.dtype.kind not in kinds or array.shape != shape:
                raise ValueError(f"{array.dtype} {list(array.shape)} instead of {list(shape)}")
            if not np.isfinite(array).all():
                raise ValueError("NaN or infinite values")
        except UNREADABLE as error:
            problem = truncate(getattr(error, "strerror", None) or error, 90)
            raise UserError(
                f"cannot use {truncate(self.path / name, 60)}: {problem}; write it again, or set model.channels and "
                "model.image_size to the latents'"
            ) from None
        return np.asarray(array)


class FeatureFiles(MomentFiles):
    """fast-DiT's `.npy` files of features. The label of a file is in a file of the same name."""

    def _is_read(self, name: str) -> bool:
        return super()._is_read(name) and name.rpartition("/")[0].endswith("features")

    def _read_table(self, others: list[str]) -> dict[str, int]:
        places = {name: "labels/".join(name.rsplit("features/", 1)) for name in self.names}
        others[:] = sorted({*others} - {*places.values()})
        return {name: int(self.array(place, "iu", (1,))[0]) for name, place in places.items()}


class Edm2Source(LatentSource):
    """Latents of EDM2 or REPA. If they have at most MOST_CONTENT bytes, each file is checked at opening."""

    name = "edm2 latents"
    files_class = MomentFiles

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        self.folder, self.data, self.model = Path(data.source), data, model
        if data.flip:
            raise UserError(f"data.flip=true: {self.folder} was encoded without mirror images; set data.flip=false")
        self.files = self.files_class(self.folder, model.num_classes)
        self.notes = self.files.notes
        self.classes, labels, families = self.files.about(self.files.names)
        images = [family.replace("-mean-std-", "") for family in families]  # img00000000 is the image of a latent
        self._take(
            [{"label": np.array(labels), "family": np.array([*map(family_number, images)], np.uint64)}], "float32"
        )
        if sum(self.files.sizes()) <= MOST_CONTENT:
            for position in range(len(labels)):
                self._find(position, "moments")

    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (type(self),), self.__dict__  # type: ignore[attr-defined]  # reads no label again

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether such files are in the folder `00000`, or last in a .zip."""
        path = Path(source)
        if path.suffix == ".zip" and path.is_file():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 2**16))  # the names of the last members
                return b"/img-mean-std-" in file.read()
        return path.is_dir() and any((path / "00000").glob("img-mean-std-*.npy"))

    @classmethod
    def latent_keys(cls, data: DataConfig) -> dict[str, Any]:
        """Stable Diffusion's mean and scale, as in REPA and fast-DiT. The VAE is unknown."""
        return {"latent_mean": (0.0,), "latent_scale": (SD_SCALE,)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files' contents (data/digest.py)."""
        return digest_files(self.files)

    def _shape(self) -> tuple[int, ...]:
        return 2 * self.model.channels, *self.model.image_size

    def _find(self, position: int, which: str) -> NDArray[Any]:
        array = self.files.array(self.files.names[position], "f", self._shape())
        return array.astype(np.float32).reshape(-1, *self.model.image_size)

    def _deviation(self, log_variance: Array) -> Array:
        return log_variance * self._scale  # deviations are stored


class FastDitSource(Edm2Source):
    """Features of fast-DiT, which have no deviations."""

    name, files_class, stored_scale = "fast-dit features", FeatureFiles, SD_SCALE

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether a folder has a folder of features with a `.npy` file in it."""
        return Path(source).is_dir() and any(Path(source).glob("*features/*.npy"))

    def _shape(self) -> tuple[int, ...]:
        return 1, *self.model.image_shape


class LightningDitSource(LatentSource):
    """Latents of LightningDiT, normalised by their statistics: (z - mean) / std."""

    name = "lightningdit latents"

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        self.folder, self.data, self.model = Path(data.source), data, model
        shards = [self._shard(path) for path in sorted(self.folder.glob(SHARDS))]
        dtypes = {shard[name].dtype for shard in shards for name in ("moments", "flipped")}
        if (dtype := next((name for name, kind in STORED.items() if {kind} == dtypes), None)) is None:
            raise UserError(f"{truncate(self.folder, 60)}: all latents must have one type of {', '.join(STORED)}")
        labels = np.concatenate([shard["label"] for shard in shards])
        self.classes = label_names(labels.tolist(), model.num_classes, truncate(self.folder, 60))
        step = max(1, sum(shard["moments"].nbytes for shard in shards) // MOST_CONTENT)  # above 1: evenly spaced rows
        self.digest = digest_arrays(labels, *(s[name][::step] for s in shards for name in ("moments", "flipped")))
        shards[0]["family"] = np.array([family_number(str(row)) for row in range(len(labels))], np.uint64)
        self._take(shards, dtype)

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether a folder has such files."""
        return Path(source).is_dir() and any(Path(source).glob(SHARDS))

    @classmethod
    def latent_keys(cls, data: DataConfig) -> dict[str, Any]:
        """The mean and 1 / std of the statistics, which are read if they are needed."""
        if None not in (data.latent_mean, data.latent_scale):
            return {}
        content = read_pt(path := Path(data.source) / "latents_stats.pt")
        try:
            mean, std = (content[name].double().flatten().tolist() for name in ("mean", "std"))
            return {"latent_mean": mean, "latent_scale": [1 / number for number in std]}
        except (KeyError, AttributeError, TypeError, ZeroDivisionError):
            raise UserError(f"{truncate(path, 60)} must hold the tensors mean and std, without 0: copy it") from None

    def _shard(self, path: Path) -> dict[str, NDArray[Any]]:
        arrays = open_shard(path)
        latents, flipped, labels = (arrays.get(name, np.zeros(0)) for name in ("latents", "latents_flip", "labels"))
        shape = (len(labels), *self.model.image_shape)
        if latents.shape != shape or flipped.shape != shape or labels.dtype.kind != "i" or not len(labels):
            raise UserError(
                f"{truncate(path, 60)} must hold labels, and latents and latents_flip {list(shape)}: got "
                f"{list(latents.shape)}, {list(flipped.shape)}; set model.channels and model.image_size to theirs"
            )
        return {"moments": latents, "flipped": flipped, "label": labels}
