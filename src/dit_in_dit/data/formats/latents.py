"""Encoded images: a folder of safetensors files, memory-mapped and read by number.

    latents.json            settings of the encoding, classes, mean and deviation, SHA-256 of each file
    000000.safetensors      moments, flipped (n, 2C, h, w): mean and log variance; label, family (n,)

`moments` encode the image, and `flipped` encodes its mirror image: the mirror image of an encoding is not the encoding
of the mirror image. `family` is the family's number (groups.family_number), which decides the held-out split as for
images. `encode --features` adds the files of data/features.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import DataConfig, ModelConfig
from dit_in_dit.config.strict_json import has_form, parse_json, read_json
from dit_in_dit.data.digest import digest_values
from dit_in_dit.data.groups import check_split
from dit_in_dit.data.names import HIDDEN, left_out_clause
from dit_in_dit.data.picture import Array
from dit_in_dit.data.source import SplitSource, Stream

LATENTS_INDEX = "latents.json"
FORMAT = "dit-in-dit latents 1"
FEATURE_FILES = re.compile(r"features\.json|features-\d+\.safetensors")  # of data/features.py
KINDS: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {"F16": "<f2", "F32": "<f4", "BF16": "<u2", "I64": "<i8", "U64": "<u8"}.items()
}
STORED = {"float16": KINDS["F16"], "float32": KINDS["F32"], "bfloat16": KINDS["BF16"]}
FORM = {  # of those parts of the index that are read
    "classes": [str],
    "made": {"shape": [int], "flips": bool, "shard": int, "dtype": str},
    "vae": {"name": str, "mean": [(int, float)], "scale": [(int, float)]},
    "shards": [{"file": str, "count": int}],
}
MOST_HEADER = 10**8  # bytes, the limit of safetensors
LOG_VARIANCE = (-30.0, 20.0)  # AutoencoderKL clamps to these
SD_SCALE = 0.18215  # of Stable Diffusion (Rombach et al. 2022), for a VAE without its own


def load_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of latents, finished or not; UserError when there is none or it has another format."""
    path = folder / LATENTS_INDEX
    index = read_json(path, advice="encode again")
    if index.get("format") != FORMAT:
        raise UserError(f"{truncate(path)} is not of the format {FORMAT!r}: encode again")
    if wrong := next((key for key, form in FORM.items() if not has_form(index.get(key), form)), None):
        raise UserError(f"{truncate(path)} is damaged: its {wrong!r} has the wrong form; encode again")
    return index


def read_latents_index(folder: Path) -> dict[str, Any]:
    """The index of finished latents; UserError when they are unfinished or of another format."""
    index = load_index(folder)
    if not index["shards"]:
        raise UserError(f"{truncate(folder)} is not encoded completely: run the same `dit-in-dit encode` again")
    size, counts = index["made"]["shard"], [shard["count"] for shard in index["shards"]]
    damaged = f"{truncate(folder / LATENTS_INDEX)} is damaged"
    if not all(count == size for count in counts[:-1]) or not 0 < counts[-1] <= size:
        raise UserError(f"{damaged}: files must have {size} images each; encode again")
    if any(Path(shard["file"]).name != shard["file"] for shard in index["shards"]):
        raise UserError(f"{damaged}: it names files outside its folder; encode again")
    return index


def open_shard(path: Path) -> dict[str, NDArray[Any]]:
    """The memory-mapped arrays of a safetensors file, bfloat16 as uint16; UserError when it is damaged."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start = 8 + length
            if not 2 <= length < min(path.stat().st_size, MOST_HEADER):
                raise ValueError("no header")
            header = parse_json(file.read(length), "its header")
        arrays = {}
        for name, about in header.items():
            if name != "__metadata__":
                (first, last), kind = about["data_offsets"], KINDS[about["dtype"]]
                if last - first != kind.itemsize * math.prod(about["shape"]):
                    raise ValueError("sizes differ from its header")
                arrays[name] = np.memmap(path, kind, "r", start + first, tuple(about["shape"])).view(np.ndarray)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{truncate(path)} is damaged ({truncate(error, 60)}): remove it and encode again") from None
    return arrays


class LatentSource(SplitSource):
    """Latents (C, h, w), float32, normalised: (z - data.latent_mean) * data.latent_scale.

    `train` and `held_out` give the posterior's mean. `example` gives the mean or a random sample, as `data.posterior`
    says. A subclass may store latents without log variances, which are samples already.
    """

    name = "latents folder"
    by_path = fixed_size = True
    pattern: ClassVar[str] = LATENTS_INDEX  # of a file in the folder
    stored_scale: ClassVar[float] = 1.0  # by which the stored latents have been multiplied

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        self.folder, self.data, self.model = Path(data.source), data, model
        index = read_latents_index(self.folder)
        self.classes: tuple[str, ...] = tuple(index["classes"])
        self.digest = digest_values("latents", index["classes"], index["shards"])  # shards have their SHA-256
        made = index["made"]
        if made["dtype"] not in STORED:
            raise UserError(
                f"{truncate(self.folder / LATENTS_INDEX)}: the dtype must be one of {', '.join(STORED)}; encode again"
            )
        shape = model.image_shape
        if list(shape) != made["shape"]:
            raise UserError(
                f"{self.folder} holds latents of shape {made['shape']}: set model.channels and model.image_size to "
                f"this shape, got {list(shape)}"
            )
        if data.flip and not made["flips"]:
            raise UserError(f"data.flip=true: {self.folder} was encoded without mirror images; set data.flip=false")
        shards = [self._open(shard, made) for shard in index["shards"]]
        listed = {LATENTS_INDEX, *(shard["file"] for shard in index["shards"])}
        names = {path.name for path in self.folder.iterdir() if not HIDDEN.search(path.name)}
        listed |= {name for name in names if FEATURE_FILES.fullmatch(name)}
        self.notes = left_out_clause(sorted(names - listed), "files that are not in the index")
        self._split(shards, made["dtype"])

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether a folder holds latents of this kind."""
        return Path(source).is_dir() and any(Path(source).glob(cls.pattern))

    @classmethod
    def latent_keys(cls, data: DataConfig) -> dict[str, Any]:
        """The VAE of the index, with its mean and scale."""
        vae = read_latents_index(Path(data.source))["vae"]
        return {"vae": vae["name"], "latent_mean": vae["mean"], "latent_scale": vae["scale"]}

    @classmethod
    def stored_shapes(cls, data: DataConfig, most: int) -> list[tuple[int, int, int]]:
        """The shape of every latent."""
        channels, height, width = read_latents_index(Path(data.source))["made"]["shape"]
        return [(channels, height, width)]

    def _open(self, shard: dict[str, Any], made: dict[str, Any]) -> dict[str, NDArray[Any]]:
        """The arrays of one file; UserError when they do not match the index."""
        path, count = self.folder / shard["file"], shard["count"]
        arrays = open_shard(path)
        channels, height, width = made["shape"]
        moments = (STORED[made["dtype"]], (count, 2 * channels, height, width))
        wanted: list[tuple[str, Any]] = [("label", (KINDS["I64"], (count,))), ("family", (KINDS["U64"], (count,)))]
        for name, form in [*wanted, ("moments", moments), ("flipped", moments)][: 3 + made["flips"]]:
            if name not in arrays or (arrays[name].dtype, arrays[name].shape) != form:
                raise UserError(
                    f"{truncate(path)} does not hold the {name!r} that {LATENTS_INDEX} describes: encode again"
                )
        return arrays

    def __reduce__(self) -> Any:
        return type(self), (self.data, self.model)  # a worker maps the files itself

    def _tables(self, dtype: str) -> None:
        """Tables of normalised means and deviations for all 65,536 16-bit numbers: a common table, or a table per
        channel.
        """
        constants = []
        for name in ("latent_mean", "latent_scale"):
            numbers = getattr(self.data, name)
            if len(numbers) not in (1, self.model.channels):
                raise UserError(
                    f"data.{name} must have 1 or {self.model.channels} numbers for {self.folder}: got {len(numbers)}"
                )
            constants.append(np.asarray(numbers, np.float32).reshape(-1, 1, 1))
        self._mean, self._scale = constants[0] * self.stored_scale, constants[1] / self.stored_scale
        self._means: NDArray[np.float32] | None = None
        if dtype != "float32":
            every = np.arange(2**16, dtype=np.uint32)
            with np.errstate(invalid="ignore", over="ignore"):
                half = every.astype(np.uint16).view(np.float16).astype(np.float32)
                values = half if dtype == "float16" else (every << 16).astype(np.uint32).view(np.float32)
                self._means = self._normalised(values[None, None]).reshape(-1, 2**16)
                self._deviations = self._deviation(values[None, None]).reshape(-1, 2**16)

    def _normalised(self, mean: Array) -> Array:
        return (mean - self._mean) * self._scale

    def _deviation(self, log_variance: Array) -> Array:
        return np.exp(0.5 * np.clip(log_variance, *LOG_VARIANCE)) * self._scale

    def _split(self, shards: list[dict[str, NDArray[Any]]], dtype: str) -> None:
        self._tables(dtype)
        self.shards, self._ends = shards, np.cumsum([len(shard["label"]) for shard in shards])
        families = np.concatenate([shard["family"] for shard in shards if "family" in shard])
        labels = np.concatenate([shard["label"] for shard in shards])
        # The exact integer, so that an image and its latent are on the same side of the split.
        held = families < np.uint64(math.ceil(self.data.held_out * 2**64))
        check_split(int((~held).sum()), int(held.sum()), self.data.held_out, str(self.folder))
        if not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise UserError(
                f"labels of {truncate(self.folder)} must be from 0 to {len(self.classes) - 1}: "
                f"got {labels.min()} to {labels.max()}; encode again"
            )
        self._labels = labels if self.model.num_classes else np.zeros_like(labels)
        self._set_split(np.flatnonzero(~held), np.flatnonzero(held), self._labels)

    def _find(self, position: int, which: str) -> NDArray[Any]:
        return self._row(self.shards, position, which)

    def _row(self, shards: list[dict[str, NDArray[Any]]], position: int, which: str) -> NDArray[Any]:
        shard = int(np.searchsorted(self._ends, position, "right"))
        return shards[shard][which][position - self._ends[shard]]  # counted from the end: below 0

    def beside(self, shards: list[dict[str, NDArray[Any]]], index: int, which: str) -> NDArray[Any]:
        """The row of training image `index` in other arrays, divided into files as the latents are."""
        return self._row(shards, int(self._train[index]), which)

    def _mean_of(self, moments: NDArray[Any]) -> Array:
        return _look_up(self._means, moments) if self._means is not None else self._normalised(moments)

    def _stored(self, position: int) -> tuple[Array, int]:
        mean = self._find(position, "moments")[: self.model.channels]
        return self._mean_of(mean), int(self._labels[position])

    def example(self, index: int, stream: Stream, *, flip: bool) -> tuple[Array, int]:
        """Training image `index` or its mirror image: the mean of its posterior, or a random sample."""
        position, channels = int(self._train[index]), self.model.channels
        moments = self._find(position, "flipped" if flip else "moments")
        latent = self._mean_of(moments[:channels])
        if self.data.posterior == "sample" and len(spread := moments[channels:]):
            deviation = _look_up(self._deviations, spread) if self._means is not None else self._deviation(spread)
            latent += deviation * stream().standard_normal(latent.shape, np.float32)
        return latent, int(self._labels[position])


def _look_up(tables: NDArray[np.float32], numbers: NDArray[Any]) -> Array:
    bits = numbers.view(np.uint16)
    if len(tables) == 1:
        return tables[0].take(bits)
    return np.stack([table.take(channel) for table, channel in zip(tables, bits, strict=True)])
