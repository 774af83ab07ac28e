"""Images and labels as NumPy arrays, and in MNIST's idx files."""

from __future__ import annotations

import gzip
import math
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import DataConfig, ModelConfig
from dit_in_dit.data.digest import digest_arrays
from dit_in_dit.data.groups import split_families
from dit_in_dit.data.names import HIDDEN, left_out_clause
from dit_in_dit.data.picture import IN_MEMORY, MOST_BYTES, UNREADABLE, Stored
from dit_in_dit.data.source import SplitSource

MOST_GROWTH = 50  # limit for compressed arrays: when unpacked, pixels grow threefold, zeros a thousandfold
IDX = ("images-idx3-ubyte", "labels-idx1-ubyte")
NAMES = (("images", "labels"), ("arr_0", "arr_1"))  # of arrays in a .npz: ours, and ADM's


class ArraySource(SplitSource):
    """Arrays: a `.npz` with `images` and, if labelled, `labels`; or `NAME.npy` and `NAME.labels.npy`; or a folder of
    MNIST's files, packed (.gz) or not, of which `train-*` is read, or `t10k-*` with data.split=test.

    uint8 arrays (N, H, W, C) are pixels. Float arrays (N, C, H, W) are latents, used unchanged. Each row is its own
    family.
    ADM's names `arr_0` and `arr_1` are accepted too. Labels are whole numbers, or false and true for 0 and 1.
    `notes` lists the arrays that are not read.
    """

    name = "arrays"
    by_path = fixed_size = True

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        path = Path(data.source)
        self.notes: list[str] = []
        images, labels = load_arrays(path, self.notes, data.split)
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise UserError(f"images in {path} must be uint8 (pixels) or floats (latents): got {images.dtype}")
        self._pixels = images.dtype == np.uint8
        image_shape = (*model.image_size, model.channels) if self._pixels else model.image_shape
        if images.shape[1:] != image_shape:
            raise UserError(f"images in {path} must be (N, {_commas(image_shape)}): got ({_commas(images.shape)})")
        if labels is None and model.num_classes:
            raise UserError(f"{path} has no labels: add them, or set model.num_classes=0")
        count = model.num_classes or 1
        self._labels = np.zeros(len(images), np.int64) if labels is None or not model.num_classes else labels
        if self._labels.dtype.kind == "b":
            self._labels = self._labels.astype(np.int64)
        if self._labels.shape != (len(images),) or self._labels.dtype.kind not in "iu":
            raise UserError(f"labels of {path} must be {len(images)} whole numbers")
        if len(images) and not 0 <= self._labels.min() <= self._labels.max() < count:
            raise UserError(
                f"labels of {path} must be from 0 to {count - 1} (model.num_classes): "
                f"got {self._labels.min()} to {self._labels.max()}"
            )
        self._path, self._images, self.classes = path, images, tuple(map(str, range(count)))
        self._stored_labels = labels
        if not self._pixels and images.nbytes <= IN_MEMORY:  # larger arrays are checked image by image, when read
            for position in range(len(images)):
                self._stored(position)
        self._set_split(*split_families([str(i) for i in range(len(images))], data.held_out, str(path)), self._labels)

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether `source` is an existing .npz or .npy file, or a folder of idx files."""
        if Path(source).is_dir():
            return any(Path(source).glob(f"*-{IDX[0]}*"))
        return Path(source).suffix in (".npz", ".npy") and Path(source).exists()

    @classmethod
    def count_classes(cls, data: DataConfig) -> int:
        """The largest label plus one; 0 without labels."""
        labels = load_arrays(Path(data.source), split=data.split)[1]
        if labels is None or not labels.size:
            return 0
        if labels.dtype.kind not in "biu":
            raise UserError(f"labels of {data.source} must be whole numbers: got {labels.dtype}")
        return int(labels.max()) + 1

    @classmethod
    def stored_shapes(cls, data: DataConfig, most: int) -> list[tuple[int, int, int]]:
        """The shape of every image."""
        images, _ = load_arrays(Path(data.source), split=data.split)
        if images.ndim != 4:
            raise UserError(f"images in {data.source} must have four axes: got ({_commas(images.shape)})")
        first, second, third = images.shape[1:]
        return [(third, first, second) if images.dtype == np.uint8 else (first, second, third)]

    @classmethod
    def size_of(cls, path: Path) -> tuple[int, int, int]:
        """Height, width and channels of the pixels; UserError when the arrays hold no pixels."""
        images, _ = load_arrays(path)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
            raise UserError(f"images in {path} must be uint8 (N, H, W, 1 or 3): got {images.dtype} {images.shape}")
        height, width, channels = images.shape[1:]
        return height, width, channels

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the stored images and labels."""
        return digest_arrays(self._images, self._stored_labels)

    def _stored(self, position: int) -> tuple[Stored, int]:
        image = self._images[position]
        if self._pixels:
            return image.transpose(2, 0, 1), int(self._labels[position])
        image = image if image.dtype == np.float16 else np.asarray(image, np.float32)
        if not np.isfinite(image).all():
            raise UserError(
                f"image {position} of {truncate(self._path)} holds NaN or infinite values: fix or remove it"
            )
        return image, int(self._labels[position])


def _commas(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _check_growth(archive: zipfile.ZipFile) -> None:
    """ValueError when an archive unpacks to far more bytes than its file has: they would fill the memory."""
    members = archive.infolist()
    packed, whole = (sum(sizes) for sizes in zip(*((m.compress_size, m.file_size) for m in members), strict=True))
    if whole > max(MOST_BYTES, MOST_GROWTH * packed):
        raise ValueError(f"{packed} bytes hold {whole} (a zip bomb?)")


def _read_npz(path: Path) -> tuple[list[Any], list[str]]:
    """Images, labels and the names of the other arrays; without an array of images, labels are not read either."""
    with np.load(path, allow_pickle=False) as archive:
        names: tuple[str, ...] = next((pair for pair in NAMES if pair[0] in archive), ())
        if names:
            _check_growth(archive.zip)
        return [archive.get(name) for name in names], [name for name in archive if name not in names]


def _read_npy(path: Path) -> tuple[list[Any], list[str]]:
    labels = path.with_suffix(".labels.npy")
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    return [images, np.load(labels, allow_pickle=False) if labels.exists() else None], []


def _read_idx(folder: Path, split: str) -> tuple[list[Any], list[str]]:
    """The images (N, H, W, 1) and labels of a split, and the names of other files."""
    names = sorted(path.name for path in folder.iterdir() if not HIDDEN.search(path.name))
    stems = [f"{'t10k' if split == 'test' else split}-{end}" for end in IDX]
    pair = [next((name for name in names if name.removesuffix(".gz") == stem), stem) for stem in stems]
    arrays: list[NDArray[np.uint8]] = []
    for name, dimensions in zip(pair, (3, 1), strict=True):
        with gzip.open(folder / name) if name.endswith(".gz") else (folder / name).open("rb") as file:
            magic, *shape = np.frombuffer(file.read(4 * dimensions + 4), ">u4").tolist()
            size = math.prod(shape)
            if magic != 0x800 + dimensions or size > IN_MEMORY or len(content := file.read(size + 1)) != size:
                raise ValueError(f"{name} is damaged, or not of bytes in {dimensions} dimensions")
        arrays.append(np.frombuffer(content, np.uint8).reshape(shape))
    return [arrays[0][..., None], arrays[1]], [name for name in names if name not in pair]


def load_arrays(path: Path, notes: list[str] | None = None, split: str = "train") -> tuple[NDArray[Any], Any]:
    """The stored images and labels; no code of the file is run. A clause on what is not read is added to `notes`."""
    try:
        read = _read_npz if path.suffix == ".npz" else _read_npy
        arrays, others = _read_idx(path, split) if path.is_dir() else read(path)
    except (*UNREADABLE, AttributeError) as error:
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if "pickle" in problem:  # NumPy advises to trust the file
            problem = "it holds Python objects, or is no file of arrays"
        raise UserError(
            f"cannot read arrays from {truncate(path, 60)}: {truncate(problem, 70)}; write it with numpy again"
        ) from None
    if not arrays:
        raise UserError(f"{path} must hold an array 'images' (and 'labels'): got {others}")
    if notes is not None:
        notes += left_out_clause(others, "files outside data.split" if path.is_dir() else "arrays")
    images, labels = arrays
    if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray | None):
        raise UserError(f"{path} has the wrong suffix: .npz is for several arrays, .npy for one")
    return images, labels
