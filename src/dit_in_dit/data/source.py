"""Sources of images: `open_source(data, model)` gives train and held-out images by number."""

from __future__ import annotations

import math
import warnings
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import LeftOutWarning, UserError, shortened
from dit_in_dit.config.run import DataConfig, ModelConfig
from dit_in_dit.data import hub, latents, tars
from dit_in_dit.data.arrays import ArraySource, load_arrays
from dit_in_dit.data.digest import digest_files, digest_values
from dit_in_dit.data.files import ImageFiles
from dit_in_dit.data.groups import split
from dit_in_dit.data.mosaic import CLASSES, TEXTURES, Mosaic
from dit_in_dit.data.names import left_out
from dit_in_dit.data.picture import IN_MEMORY, Array, fit, upright

MOSAIC_HELD_OUT = 512
BUILT_IN = ("emoji", "mosaic")


class Source(Protocol):
    """Images (C, H, W), float32 in [-1, 1] (or latents as stored), with labels."""

    skipped: list[str]  # files left out because they cannot be read

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in label order."""
        ...

    @property
    def train_size(self) -> int | None:
        """Number of training images; None: endless."""
        ...

    @property
    def held_out_size(self) -> int:
        """Number of held-out images."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels of the training images, or one of each class where all are equally common and there is no end."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of what the source lists, wherever it lies (data/digest.py); computed when first asked."""
        ...

    def train(self, index: int) -> tuple[Array, int]:
        """Training image `index`."""
        ...

    def held_out(self, index: int) -> tuple[Array, int]:
        """Held-out image `index`."""
        ...


def open_source(data: DataConfig, model: ModelConfig) -> Source:
    """The configured source at the model's size; UserError when it is missing, empty or does not fit.

    What lies there and is not read is said by one LeftOutWarning.
    """
    source = _open(data, model)
    if model.num_classes and len(source.classes) != model.num_classes:
        raise UserError(
            f"model.num_classes must be what the data has: got {model.num_classes}, "
            f"{data.source} has {len(source.classes)}"
        )
    notes = list(source.notes)
    if source.skipped:
        notes.append(left_out(len(source.skipped), source.skipped, "unreadable files"))
    if notes:
        warnings.warn(f"{shortened(data.source, 50)}: {'; '.join(notes)}", LeftOutWarning, stacklevel=2)
    return source


def _open(data: DataConfig, model: ModelConfig) -> MosaicSource | ImageSource | ArraySource | latents.LatentSource:
    if data.source == "mosaic":
        if model.channels != 3:
            raise UserError(f"mosaic has 3 channels: set model.channels=3, got {model.channels}")
        return MosaicSource(model.image_size)
    if data.source == "emoji":
        return _emoji(model.image_size, model.channels, data.held_out)
    path = Path(data.source)
    if data.source.startswith(hub.PREFIX):
        return ImageSource(path, data, model, hub.Rows(data, model.num_classes))
    if latents.is_index(data.source):
        return latents.LatentSource(data, model)
    shards, beside = tars.find(data.source)
    if shards:
        return ImageSource(path, data, model, tars.TarFiles(data.source, shards, model.num_classes, beside))
    if not path.exists():
        raise UserError(f"data.source: no such file or folder: {data.source}")
    arrays = path.suffix in (".npz", ".npy")
    return ArraySource(path, data, model) if arrays else ImageSource(path, data, model)


def count_classes(data: DataConfig) -> int:
    """How many classes the labels of arrays or of a dataset speak of; 0 where there are no labels, and for sources
    whose folders or files say it when they are opened."""
    if data.source.startswith(hub.PREFIX):
        return hub.count_classes(data)
    if not data.source.endswith((".npz", ".npy")):
        return 0
    labels = load_arrays(Path(data.source))[1]
    if labels is None or not labels.size:
        return 0
    if labels.dtype.kind not in "biu":
        raise UserError(f"labels of {data.source} must be whole numbers: got {labels.dtype}")
    return int(labels.max()) + 1


@lru_cache(maxsize=2)
def _emoji(size: tuple[int, int], channels: int, held_out: float) -> ImageSource:
    """The embedded images, decoded once for all who ask: they never change, and it takes seconds."""
    path = Path(str(files("dit_in_dit.data") / "emoji.zip"))
    model = ModelConfig(image_size=size, channels=channels, patch_size=1)
    return ImageSource(path, DataConfig(held_out=held_out), model)


class MosaicSource:
    """The procedural source; its held-out images are the first ones, which no training index reaches."""

    classes = CLASSES
    train_size = None
    held_out_size = MOSAIC_HELD_OUT
    labels = np.arange(len(CLASSES))
    digest = digest_values("mosaic", CLASSES, TEXTURES)

    def __init__(self, size: tuple[int, int]) -> None:
        self.mosaic = Mosaic(size)
        self.skipped: list[str] = []
        self.notes: list[str] = []

    def train(self, index: int) -> tuple[Array, int]:
        """Training image `index`."""
        return self.mosaic.image(MOSAIC_HELD_OUT + index)

    def held_out(self, index: int) -> tuple[Array, int]:
        """Held-out image `index`."""
        return self.mosaic.image(index)


def size_of(path: Path) -> tuple[int, int, int]:
    """Height, width and channels (1 or 3) that all images of a folder, .zip, .npz or .npy have.

    Raises:
        UserError: they differ, or the arrays are not pixels.
    """
    if path.suffix in (".npz", ".npy"):
        images, _ = load_arrays(path)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
            raise UserError(f"images in {path} must be uint8 (N, H, W, 1 or 3): got {images.dtype} {images.shape}")
        height, width, channels = images.shape[1:]
        return height, width, channels
    files = ImageFiles(path)
    sizes = {name: files.open(name, lambda image: upright(image).size[::-1]) for name in files.names}
    first = files.names[0]
    for name, size in sizes.items():
        if size != sizes[first]:
            raise UserError(
                f"images in {path} must be of one size: {first} is {sizes[first][0]}x{sizes[first][1]}, "
                f"{name} is {size[0]}x{size[1]}"
            )
    return *sizes[first], 3


class ImageSource:
    """A folder or .zip of image files (names.SUFFIXES), one folder per class (none: one class), or other ImageFiles.

    The family of a file, which the split keeps together, is its name up to the first `~`:
    `waving-hand~light-skin-tone.webp` is of the family `waving-hand`.
    """

    def __init__(self, path: Path, data: DataConfig, model: ModelConfig, images: ImageFiles | None = None) -> None:
        self.path, self.size, self.channels = path, model.image_size, model.channels
        if model.channels not in (1, 3):
            raise UserError(f"image files have 1 or 3 channels: got model.channels={model.channels}")
        self.files = images or ImageFiles(path, model.num_classes)
        self.names, self.notes = self.files.names, self.files.notes
        self.skipped: list[str] = []
        in_memory = len(self.names) * math.prod(model.image_shape) <= IN_MEMORY
        self._pixels: list[NDArray[np.uint8]] | None = None
        self.classes, self._labels, self.families = self.files.about(self.names)
        if in_memory or data.corrupt == "skip":
            self._check(data.corrupt, in_memory)
        self._train, self._held = split(self.families, data.held_out, str(path))
        self.train_size, self.held_out_size = len(self._train), len(self._held)
        self.labels = np.asarray(self._labels, np.int64)[self._train]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the files hold; those that are skipped count too."""
        return digest_files(self.files)

    def _check(self, corrupt: str, in_memory: bool) -> None:
        """Read every file once: leave out those that cannot be read, keep the pixels when they fit."""
        good, pixels = [], []
        for position, name in enumerate(self.names):
            try:
                image = self.read(name)
            except UserError:
                if corrupt == "error":
                    raise
                self.skipped.append(name)
                continue
            good.append(position)
            if in_memory:
                pixels.append(image)
        if not good:
            raise UserError(f"data.source: none of the {len(self.names)} images in {self.path} can be read")
        if lost := set(self._labels) - {self._labels[position] for position in good}:
            raise UserError(
                f"class {shortened(self.classes[min(lost)], 40)} of {shortened(self.path, 60)}: "
                "none of its images can be read; mend one, or remove the class (later classes would move up)"
            )
        self.names = [self.names[position] for position in good]
        self._labels = [self._labels[position] for position in good]
        self.families = [self.families[position] for position in good]
        self._pixels = pixels if in_memory else None

    def read(self, name: str) -> NDArray[np.uint8]:
        """One file's pixels (H, W, C); UserError with its name when it cannot be decoded."""
        return self.files.open(name, lambda image: fit(image, self.size, self.channels))

    def _image(self, position: int) -> tuple[Array, int]:
        pixels = self._pixels[position] if self._pixels is not None else self.read(self.names[position])
        return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32) / 127.5 - 1, self._labels[position]

    def train(self, index: int) -> tuple[Array, int]:
        """Training image `index`."""
        return self._image(self._train[index])

    def held_out(self, index: int) -> tuple[Array, int]:
        """Held-out image `index`."""
        return self._image(self._held[index])
