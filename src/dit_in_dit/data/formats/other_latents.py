"""Latents as other projects write them.

EDM2, REPA      dataset.json                            {"labels": [["00000/img-mean-std-00000000.npy", 3], ...]}
                00000/img-mean-std-00000000.npy         (2C, h, w): mean and standard deviation, not normalised
fast-DiT        imagenet256_features/0.npy              (1, C, h, w): a sample, multiplied by 0.18215
                imagenet256_labels/0.npy                (1,)
LightningDiT    latents_rank00_shard000.safetensors     latents, latents_flip (n, C, h, w): samples; labels (n,)
                latents_stats.pt                        mean, std (1, C, 1, 1)
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

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


class NpyFiles(ImageFiles):
    """EDM2's `.npy` files in a folder or .zip, with the labels of its `dataset.json`."""

    kind, suffixes = "latents", (".npy",)

    def array(self, name: str, kinds: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The array of one file; UserError unless it holds finite numbers of NumPy's `kinds` in this shape."""
        try:
            array = np.lib.format.read_array(io.BytesIO(self.content(name)), allow_pickle=False)
            if array.dtype.kind not in kinds or array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"{array.dtype} {list(array.shape)} instead of finite numbers {list(shape)}")
        except UNREADABLE as error:
            problem = truncate(getattr(error, "strerror", None) or error, 90)
            way = "write it again, or set model.channels and model.image_size to the shape of the latents"
            raise UserError(f"cannot use {truncate(self.path / name, 60)}: {problem}; {way}") from None
        return np.asarray(array)


class FeatureFiles(NpyFiles):
    """fast-DiT's `.npy` files of features. The label of a file is in a file of the same name."""

    def _is_read(self, name: str) -> bool:
        return super()._is_read(name) and name.rpartition("/")[0].endswith("features")

    def _read_table(self, others: list[str]) -> dict[str, int]:
        places = {name: "labels/".join(name.rsplit("features/", 1)) for name in self.names}
        others[:] = sorted({*others} - {*places.values()})
        return {name: int(self.array(place, "iu", (1,))[0]) for name, place in places.items()}


class FastDitSource(LatentSource):
    """Features of fast-DiT. If they have at most MOST_CONTENT bytes, each file is checked at opening."""

    name, pattern = "fast-dit features", "*features/*.npy"
    stored_scale, moments = SD_SCALE, False
    files_class: ClassVar[type[NpyFiles]] = FeatureFiles
    __reduce__ = object.__reduce__  # a worker reads no labels

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        self.folder, self.data, self.model = Path(data.source), data, model
        if data.flip:
            raise UserError(f"data.flip=true: {self.folder} was encoded without mirror images; set data.flip=false")
        self.files = self.files_class(self.folder, model.num_classes)
        self.notes, self.digest = self.files.notes, digest_files(self.files)
        self.classes, labels, families = self.files.about(self.files.names)
        numbers = np.array([family_number(name.replace("-mean-std-", "")) for name in families], np.uint64)
        self._split([{"label": np.array(labels), "family": numbers}], "float32")
        for position in range(len(labels) if sum(self.files.sizes()) <= MOST_CONTENT else 0):
            self._find(position, "moments")

    @classmethod
    def stored_shapes(cls, data: DataConfig, most: int) -> list[tuple[int, int, int]]:
        """The shape of the first latent."""
        files = cls.files_class(Path(data.source))
        name = files.names[0]
        try:
            *_, channels, height, width = np.load(io.BytesIO(files.content(name)), allow_pickle=False).shape
        except UNREADABLE as error:
            raise UserError(f"cannot use {truncate(name, 60)}: {truncate(error, 90)}; write it again") from None
        return [(channels // (1 + cls.moments), height, width)]

    @classmethod
    def latent_keys(cls, data: DataConfig) -> dict[str, Any]:
        """Stable Diffusion's mean and scale, as in fast-DiT and REPA. The VAE is unknown."""
        return {"latent_mean": (0.0,), "latent_scale": (SD_SCALE,)}

    def _find(self, position: int, which: str) -> NDArray[Any]:
        channels, *size = self.model.image_shape
        shape = (2 * channels, *size) if self.moments else (1, channels, *size)
        return self.files.array(self.files.names[position], "f", shape).astype(np.float32).reshape(-1, *size)


class Edm2Source(FastDitSource):
    """Means and deviations of EDM2 or REPA. `img-mean-std-00000000` is of the family of its image, `img00000000`."""

    name, pattern, files_class = "edm2 latents", "00000/img-mean-std-*.npy", NpyFiles
    stored_scale, moments = 1.0, True

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether such files are in the folder `00000`, or last in a .zip."""
        path = Path(source)
        if path.suffix == ".zip" and path.is_file():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 2**16))  # the names of the last members
                return b"/img-mean-std-" in file.read()
        return super().recognises(source, name)

    def _deviation(self, log_variance: Array) -> Array:
        return log_variance * self._scale  # deviations are stored


class LightningDitSource(LatentSource):
    """Latents of LightningDiT, normalised by their statistics: (z - mean) / std."""

    name, pattern = "lightningdit latents", "latents_rank*_shard*.safetensors"

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        self.folder, self.data, self.model = Path(data.source), data, model
        shards = [self._shard(path) for path in sorted(self.folder.glob(self.pattern))]
        dtypes = {shard[name].dtype for shard in shards for name in ("moments", "flipped")}
        if (dtype := next((name for name, kind in STORED.items() if {kind} == dtypes), None)) is None:
            raise UserError(f"{truncate(self.folder, 60)}: all latents must have one type of {', '.join(STORED)}")
        labels = np.concatenate([shard["label"] for shard in shards])
        self.classes = label_names(labels.tolist(), model.num_classes, truncate(self.folder, 60))
        step = max(1, sum(shard["moments"].nbytes for shard in shards) // MOST_CONTENT)  # above 1: evenly spaced rows
        self.digest = digest_arrays(labels, *(s[name][::step] for s in shards for name in ("moments", "flipped")))
        shards[0]["family"] = np.array([family_number(str(row)) for row in range(len(labels))], np.uint64)
        self._split(shards, dtype)

    @classmethod
    def stored_shapes(cls, data: DataConfig, most: int) -> list[tuple[int, int, int]]:
        """The shape of every latent."""
        return [open_shard(next(Path(data.source).glob(cls.pattern)))["latents"].shape[1:]]

    @classmethod
    def latent_keys(cls, data: DataConfig) -> dict[str, Any]:
        """The mean and 1 / std of the statistics."""
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
