"""Image files as a source: a folder or a .zip."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import DataConfig, ModelConfig
from dit_in_dit.data.digest import digest_files
from dit_in_dit.data.files import ImageFiles
from dit_in_dit.data.groups import split_families
from dit_in_dit.data.picture import IN_MEMORY, Stored, apply_orientation, image_shape, resize_and_crop
from dit_in_dit.data.source import SplitSource


class ImageSource(SplitSource):
    """A folder or .zip of image files (names.SUFFIXES) with a folder per class. Without class folders, all images are
    one class.

    Subclasses list other files (`list_files`).

    The held-out split keeps a family of files together. The family is the file's name up to the first `~`:
    `waving-hand~light-skin-tone.webp` belongs to `waving-hand`.
    """

    name = "image files"
    by_path = fallback = True

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        self.path, self.size, self.channels = Path(data.source), model.image_size, model.channels
        if model.channels not in (1, 3):
            raise UserError(f"image files have 1 or 3 channels: got model.channels={model.channels}")
        self.files = self.list_files(data, model.num_classes)
        self.names, self.notes = self.files.names, self.files.notes
        self.skipped: list[str] = []
        in_memory = len(self.names) * model.channels * model.image_size[0] * model.image_size[1] <= IN_MEMORY
        self._pixels: list[NDArray[np.uint8]] | None = None
        self.classes, self._labels, self.families = self.files.about(self.names)
        if in_memory or data.corrupt == "skip":
            self._check(data.corrupt, in_memory)
        self._set_split(*split_families(self.families, data.held_out, str(self.path)), self._labels)

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether `source` is an existing file or folder."""
        return Path(source).exists()

    @classmethod
    def size_of(cls, path: Path) -> tuple[int, int, int]:
        """Height and width of all images, and 3 channels; UserError when sizes differ."""
        files = ImageFiles(path)
        sizes = {name: files.open(name, lambda image: apply_orientation(image).size[::-1]) for name in files.names}
        first = files.names[0]
        for name, size in sizes.items():
            if size != sizes[first]:
                raise UserError(
                    f"images in {path} must be of one size: {first} is {sizes[first][0]}x{sizes[first][1]}, "
                    f"{name} is {size[0]}x{size[1]}"
                )
        return *sizes[first], 3

    @classmethod
    def stored_shapes(cls, data: DataConfig, most: int) -> list[tuple[int, int, int]]:
        """Channels, height and width of evenly spaced images, from their headers; unreadable files have none."""
        listed, shapes = cls.list_files(data, cls.count_classes(data)), []
        for name in listed.names[:: -(-len(listed.names) // most)]:
            with suppress(UserError):
                shapes.append(listed.open(name, image_shape))
        return shapes

    @classmethod
    def list_files(cls, data: DataConfig, num_classes: int) -> ImageFiles:
        """The source's image files."""
        return ImageFiles(Path(data.source), num_classes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files' contents (data/digest.py), skipped files included."""
        return digest_files(self.files)

    def _check(self, corrupt: str, in_memory: bool) -> None:
        """Read every file once. Drop unreadable files; keep the pixels if they fit in memory."""
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
                f"class {truncate(self.classes[min(lost)], 40)} of {truncate(self.path, 60)}: none of its images "
                "can be read; fix one image, or remove the class (skipping it would shift later labels)"
            )
        self.names = [self.names[position] for position in good]
        self._labels = [self._labels[position] for position in good]
        self.families = [self.families[position] for position in good]
        self._pixels = pixels if in_memory else None

    def read(self, name: str) -> NDArray[np.uint8]:
        """Pixels (H, W, C) of one file; UserError with its name when it cannot be decoded."""
        return self.files.open(name, lambda image: resize_and_crop(image, self.size, self.channels))

    def title(self, index: int, *, held_out: bool = False) -> str:
        """Name of the image's file."""
        return self.names[int((self._held if held_out else self._train)[index])]

    def _stored(self, position: int) -> tuple[Stored, int]:
        pixels = self._pixels[position] if self._pixels is not None else self.read(self.names[position])
        return pixels.transpose(2, 0, 1), self._labels[position]
