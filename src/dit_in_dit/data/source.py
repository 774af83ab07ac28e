"""Sources of images: `open_source(data, model)` gives train and held-out images by number."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dit_in_dit.config import DataConfig, ModelConfig, UserError
from dit_in_dit.data.mosaic import CLASSES, Mosaic
from dit_in_dit.data.picture import MOST_BYTES, UNREADABLE, Seen, fit, look_at, upright
from dit_in_dit.mistakes import shortened

Array = NDArray[np.float32]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
IN_MEMORY = 2**30  # sources whose decoded pixels fit in this many bytes are decoded once, when opened
MOSAIC_HELD_OUT = 512
MOST_GROWTH = 50  # of compressed arrays; pixels grow three times, zeros a thousand times


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

    def train(self, index: int) -> tuple[Array, int]:
        """Training image `index`."""
        ...

    def held_out(self, index: int) -> tuple[Array, int]:
        """Held-out image `index`."""
        ...


def open_source(data: DataConfig, model: ModelConfig) -> Source:
    """The configured source at the model's size; UserError when it is missing, empty or does not fit."""
    from dit_in_dit.data import hub, latents, tars  # here: they are made of what is in this module

    if data.source == "mosaic":
        if model.channels != 3:
            raise UserError(f"mosaic has 3 channels: set model.channels=3, got {model.channels}")
        source: Source = MosaicSource(model.image_size)
    elif data.source == "emoji":
        source = _emoji(model.image_size, model.channels, data.held_out)
    elif data.source.startswith(hub.PREFIX):
        source = ImageSource(Path(data.source), data, model, hub.Rows(data, model.num_classes))
    elif latents.is_index(data.source):
        source = latents.LatentSource(data, model)
    elif shards := tars.find(data.source):
        source = ImageSource(Path(data.source), data, model, tars.TarFiles(data.source, shards, model.num_classes))
    else:
        path = Path(data.source)
        if not path.exists():
            raise UserError(f"data.source: no such file or folder: {data.source}")
        arrays = path.suffix in (".npz", ".npy")
        source = ArraySource(path, data, model) if arrays else ImageSource(path, data, model)
    if model.num_classes and len(source.classes) != model.num_classes:
        raise UserError(
            f"model.num_classes must be what the data has: got {model.num_classes}, "
            f"{data.source} has {len(source.classes)}"
        )
    return source


def count_classes(data: DataConfig) -> int:
    """How many classes the labels of arrays or of a dataset speak of; 0 where there are no labels, and for sources
    whose folders or files say it when they are opened."""
    from dit_in_dit.data import hub

    if data.source.startswith(hub.PREFIX):
        return hub.count_classes(data)
    if not data.source.endswith((".npz", ".npy")):
        return 0
    labels = _load_arrays(Path(data.source))[1]
    return 0 if labels is None or not labels.size else int(labels.max()) + 1


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

    def __init__(self, size: tuple[int, int]) -> None:
        self.mosaic = Mosaic(size)
        self.skipped: list[str] = []

    def train(self, index: int) -> tuple[Array, int]:
        """Training image `index`."""
        return self.mosaic.image(MOSAIC_HELD_OUT + index)

    def held_out(self, index: int) -> tuple[Array, int]:
        """Held-out image `index`."""
        return self.mosaic.image(index)


def is_held_out(family: str, share: float) -> bool:
    """Whether a family of images is kept out of training; depends on its name and the share alone."""
    return family_number(family) < share * 2**64


def family_number(family: str) -> int:
    """Where a family stands in [0, 2^64): the lowest are held out."""
    name = os.fsencode(family)  # names of files need not be Unicode
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big")


def family(name: str) -> str:
    """The family of a file: its name up to the first `~`."""
    return PurePosixPath(name).stem.split("~")[0]


def split(families: list[str], share: float, what: str) -> tuple[list[int], list[int]]:
    """Positions of the training and the held-out images; UserError when either is missing."""
    held = [i for i, family in enumerate(families) if is_held_out(family, share)]
    kept = sorted(set(range(len(families))) - set(held))
    if not kept or (share and not held):
        raise UserError(
            f"data.held_out={share} leaves {len(kept)} training and {len(held)} held-out images of "
            f"{what}: change it (0: none held out)"
        )
    return kept, held


class ImageFiles:
    """The image files of a folder or .zip, by name.

    Raises:
        UserError: it is neither, has no image, a name in it points out of it, or a class folder is empty (the next
            class would take its number) or has a name that cannot be printed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        shown = shortened(path, 60)
        try:
            if path.is_dir():
                found = list(_names(path))
            elif path.is_file():
                found = self._open().namelist()
            else:  # a pipe would be waited for
                raise UserError(f"data.source: {shown} is neither a folder nor a .zip: name one")
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            if isinstance(error, UserError):
                raise
            problem = shortened(getattr(error, "strerror", None) or error, 60)
            raise UserError(f"data.source: {shown} is neither a folder nor a .zip: {problem}; name one") from None
        for name in found:
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                out = shortened(name, 40)
                raise UserError(f"data.source: {shown} holds {out!r}, which points out of it: rename it")
        names = sorted(name for name in found if not HIDDEN.search(name))
        self.names = [name for name in names if name.lower().endswith(SUFFIXES)]
        if not self.names:
            raise UserError(f"data.source: no {', '.join(SUFFIXES)} files in {shown}: name another place")
        self._check_classes(names)

    def _check_classes(self, names: list[str]) -> None:
        """UserError when a folder beside those of the classes is empty, or a class has no name to print."""
        wrapper, classes = _wrapper(self.names), set(class_folders(self.names))
        depth, folders = len(wrapper) + 1, {name for name in names if name.endswith("/")}
        inside = [parts for name in names if (parts := PurePosixPath(name).parts)[: len(wrapper)] == wrapper]
        filled = classes | {parts[depth - 1] for parts in inside if len(parts) > depth}
        for parts in inside:
            if len(parts) == depth and parts[-1] not in filled and "/".join(parts) + "/" in folders:
                folder = shortened(self.path / PurePosixPath(*parts))
                raise UserError(f"class folder {folder} is empty: fill it, or remove it (later classes would move up)")
        for name in classes:
            if not name.isprintable():
                raise UserError(
                    f"class folder {shortened(repr(name))} of {shortened(self.path, 50)} cannot be printed: rename it"
                )

    def _open(self) -> zipfile.ZipFile:
        """The archive, opened once per process: a file position must not be shared by workers."""
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        return self._archive[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None}

    def content(self, name: str) -> bytes:
        """One file as it is stored; ValueError when it is too long, or none (a pipe or device has no end)."""
        if self.path.is_dir():
            path = self.path / name
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("not a file")
            size, read = found.st_size, path.read_bytes
        else:
            archive = self._open()
            size, read = archive.getinfo(name).file_size, lambda: archive.read(name)  # never more than it says
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes, more than {MOST_BYTES}")
        return read()

    def about(self, names: list[str]) -> tuple[tuple[str, ...], list[int], list[str]]:
        """The classes, and the label and family of each of `names`."""
        folders = class_folders(names)
        classes = tuple(sorted(set(folders)))
        numbers = {name: number for number, name in enumerate(classes)}
        return classes, [numbers[folder] for folder in folders], [family(name) for name in names]

    def open(self, name: str, look: Callable[[Image.Image], Seen]) -> Seen:
        """What `look` makes of one image; UserError with its name when it cannot be decoded."""
        try:
            return look_at(self.content(name), look)
        except UNREADABLE as error:
            problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        place = shortened(self.path / name, 60)
        raise UserError(f"cannot read {place}: {shortened(problem, 60)}; mend or remove it, or set data.corrupt=skip")


def size_of(path: Path) -> tuple[int, int, int]:
    """Height, width and channels (1 or 3) that all images of a folder, .zip, .npz or .npy have.

    Raises:
        UserError: they differ, or the arrays are not pixels.
    """
    if path.suffix in (".npz", ".npy"):
        images, _ = _load_arrays(path)
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
    """A folder or .zip of PNG, JPEG and WebP files, one folder per class (none: one class).

    The family of a file, which the split keeps together, is its name up to the first `~`:
    `waving-hand~light-skin-tone.webp` is of the family `waving-hand`.
    """

    def __init__(self, path: Path, data: DataConfig, model: ModelConfig, images: ImageFiles | None = None) -> None:
        self.path, self.size, self.channels = path, model.image_size, model.channels
        if model.channels not in (1, 3):
            raise UserError(f"image files have 1 or 3 channels: got model.channels={model.channels}")
        self.files = images or ImageFiles(path)
        self.names = self.files.names
        self.skipped: list[str] = []
        in_memory = len(self.names) * model.channels * model.image_size[0] * model.image_size[1] <= IN_MEMORY
        self._pixels: list[NDArray[np.uint8]] | None = None
        if in_memory or data.corrupt == "skip":
            self._check(data.corrupt, in_memory)
        self.classes, self._labels, self.families = self.files.about(self.names)
        self._train, self._held = split(self.families, data.held_out, str(path))
        self.train_size, self.held_out_size = len(self._train), len(self._held)
        self.labels = np.asarray(self._labels, np.int64)[self._train]

    def _check(self, corrupt: str, in_memory: bool) -> None:
        """Read every file once: leave out those that cannot be read, keep the pixels when they fit."""
        good, pixels = [], []
        for name in self.names:
            try:
                image = self.read(name)
            except UserError:
                if corrupt == "error":
                    raise
                self.skipped.append(name)
                continue
            good.append(name)
            if in_memory:
                pixels.append(image)
        if not good:
            raise UserError(f"data.source: none of the {len(self.names)} images in {self.path} can be read")
        self.names, self._pixels = good, pixels if in_memory else None

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


HIDDEN = re.compile(r"(^|/)(\.|__MACOSX/)")  # what file managers leave behind


def _names(root: Path) -> Iterator[str]:
    """Names of all files below a folder, and of folders with a `/` at the end; through links too, each folder once."""
    seen = {os.path.realpath(root)}

    def refuse(error: OSError) -> None:
        raise error  # a folder that cannot be listed would be a class less

    for folder, below, plain in os.walk(root, onerror=refuse, followlinks=True):
        place = Path(folder).relative_to(root)
        yield from ((place / name).as_posix() for name in plain)
        yield from (f"{(place / name).as_posix()}/" for name in below)
        below[:] = [name for name in sorted(below) if os.path.realpath(Path(folder, name)) not in seen]
        seen |= {os.path.realpath(Path(folder, name)) for name in below}


def _wrapper(names: list[str]) -> tuple[str, ...]:
    """The folders that wrap all class folders."""
    paths = [PurePosixPath(name).parts[:-1] for name in names]
    depth = 0
    while all(len(path) > depth + 1 and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    return paths[0][:depth]


def label_names(labels: list[int], count: int, what: str, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of classes given by number, `count` of them (0: as many as there are); UserError where one has none."""
    count = count or max(labels) + 1
    if min(labels) < 0 or max(labels) >= count:
        raise UserError(f"labels of {what} must be from 0 to {count - 1}: got {min(labels)} to {max(labels)}")
    return tuple(known) or tuple(map(str, range(count)))


def class_folders(names: list[str]) -> list[str]:
    """The class folder of each image: its first, below a folder that wraps everything; `images` for none."""
    depth = len(_wrapper(names))
    paths = [PurePosixPath(name).parts[depth:-1] for name in names]
    return [path[0] if path else "images" for path in paths]


class ArraySource:
    """Arrays: a `.npz` with `images` and, if labelled, `labels`; or `NAME.npy` and `NAME.labels.npy`.

    uint8 (N, H, W, C) are pixels; floats (N, C, H, W) are taken as they are (latents). A family is a row.
    ADM's names `arr_0` and `arr_1` are understood too.
    """

    def __init__(self, path: Path, data: DataConfig, model: ModelConfig) -> None:
        self.skipped: list[str] = []
        images, labels = _load_arrays(path)
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise UserError(f"images in {path} must be uint8 (pixels) or floats (latents): got {images.dtype}")
        self._pixels = images.dtype == np.uint8
        image_shape = (*model.image_size, model.channels) if self._pixels else (model.channels, *model.image_size)
        if images.shape[1:] != image_shape:
            raise UserError(f"images in {path} must be (N, {_commas(image_shape)}): got ({_commas(images.shape)})")
        if labels is None and model.num_classes:
            raise UserError(f"{path} has no labels: give them, or set model.num_classes=0")
        count = model.num_classes or 1
        self._labels = np.zeros(len(images), np.int64) if labels is None or not model.num_classes else labels
        if self._labels.shape != (len(images),) or self._labels.dtype.kind not in "iu":
            raise UserError(f"labels of {path} must be {len(images)} whole numbers")
        if len(images) and not 0 <= self._labels.min() <= self._labels.max() < count:
            raise UserError(
                f"labels of {path} must be from 0 to {count - 1} (model.num_classes): "
                f"got {self._labels.min()} to {self._labels.max()}"
            )
        self._path, self._images, self.classes = path, images, tuple(map(str, range(count)))
        if not self._pixels and images.nbytes <= IN_MEMORY:  # of larger ones, each when it is read
            for position in range(len(images)):
                self._image(position)
        self._train, self._held = split([str(i) for i in range(len(images))], data.held_out, str(path))
        self.train_size, self.held_out_size = len(self._train), len(self._held)
        self.labels = np.asarray(self._labels, np.int64)[self._train]

    def _image(self, position: int) -> tuple[Array, int]:
        image = np.asarray(self._images[position], np.float32)
        if not np.isfinite(image).all():
            raise UserError(
                f"image {position} of {shortened(self._path)} holds NaN or infinite values: mend or remove it"
            )
        if self._pixels:
            image = np.ascontiguousarray(image.transpose(2, 0, 1)) / 127.5 - 1
        return image, int(self._labels[position])

    def train(self, index: int) -> tuple[Array, int]:
        """Training image `index`."""
        return self._image(self._train[index])

    def held_out(self, index: int) -> tuple[Array, int]:
        """Held-out image `index`."""
        return self._image(self._held[index])


def _commas(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _check_growth(archive: zipfile.ZipFile) -> None:
    """ValueError when an archive is far larger than its file: it would fill the memory before it could be checked."""
    members = archive.infolist()
    packed, whole = (sum(sizes) for sizes in zip(*((m.compress_size, m.file_size) for m in members), strict=True))
    if whole > max(MOST_BYTES, MOST_GROWTH * packed):
        raise ValueError(f"{packed} bytes hold {whole} (a zip bomb?)")


def _load_arrays(path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """Images and labels as they are stored; never runs code from the file."""
    images: object
    labels: object
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                found = [pair for pair in (("images", "labels"), ("arr_0", "arr_1")) if pair[0] in archive]
                if not found:
                    raise UserError(f"{path} must hold an array 'images' (and 'labels'): got {list(archive)}")
                _check_growth(archive.zip)
                images, labels = archive[found[0][0]], archive.get(found[0][1])
        else:
            beside = path.with_suffix(".labels.npy")
            images = np.load(path, mmap_mode="r", allow_pickle=False)
            labels = np.load(beside, allow_pickle=False) if beside.exists() else None
    except UserError:
        raise
    except (*UNREADABLE, AttributeError) as error:
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if "pickle" in problem:  # NumPy's advice is to trust the file
            problem = "it holds Python objects, or is no file of arrays"
        raise UserError(
            f"cannot read arrays from {shortened(path, 60)}: {shortened(problem, 70)}; write it with numpy again"
        ) from None
    if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray | None):
        raise UserError(f"{path} does not hold arrays of the kind its name says (.npz: several, .npy: one)")
    return images, labels
