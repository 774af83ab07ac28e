"""`Source`: training and held-out images by number, the contract of every kind of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import DataConfig, ModelConfig
from dit_in_dit.data.picture import Array, Stored, as_float

METHODS = ("_stored", "_image", "train", "example")  # of a `SplitSource`; by default each calls the one before it
Stream = Callable[[], np.random.Generator]  # makes the generator of a training example's random numbers


class Source(ABC):
    """Numbered images (C, H, W), float32 in [-1, 1] (or latents as stored), with labels.

    A user's source has a constructor `(data, model)`, `classes`, `train_size`, `digest` and `train`:

        class Dots(Source):
            classes, train_size, digest = ("few", "many"), 1000, "dots 1"

            def __init__(self, data: DataConfig, model: ModelConfig) -> None:
                self.place = data.source.removeprefix("dots").removeprefix(":")
                self.shape = (model.channels, *model.image_size)

            def train(self, index: int) -> tuple[Array, int]:
                return np.full(self.shape, index / 1000, np.float32), index % 2

    `dit_in_dit.register("source", "dots", Dots)` makes `data.source` take `dots` and `dots:REST`; `train(data=...)`
    takes an instance. Both are checked (source_checks).

    Attributes:
        classes: names of the classes, in label order.
        train_size: number of training images, at least 1; None for an endless source, which takes any index below 2^62.
        held_out_size: number of held-out images.
        skipped: unreadable files that were left out.
        notes: clauses of one line about other things that are not read.
        styles: number of the style of each training image, if the images have several styles (data.style_labels).
        fixed_size: whether the model must have the stored images' shape; else images are resized.
        name: name in SOURCES of a kind that a file of `data/formats` adds.
        rest_is_path: whether REST in `NAME:REST` may be a path.
        by_path: whether the kind is recognised by the file or folder at a path; kinds with a name are tried first.
        fallback: true for the single kind that takes every path that no other kind recognises.
    """

    classes: tuple[str, ...]
    train_size: int | None
    held_out_size: int = 0
    skipped: Sequence[str] = ()
    notes: Sequence[str] = ()
    styles: NDArray[np.int64] | None = None
    name: ClassVar[str] = ""
    rest_is_path: ClassVar[bool] = True
    by_path: ClassVar[bool] = False
    fallback: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = False

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether `data.source` is of this kind, whose name in SOURCES is `name`."""
        return source == name or source.startswith(f"{name}:")

    @classmethod
    def open(cls, data: DataConfig, model: ModelConfig) -> Source:
        """The source at the model's size; UserError if it is missing, empty or does not fit the model."""
        return cls(data, model)  # type: ignore[call-arg]  # the constructor of a subclass

    @classmethod
    def count_classes(cls, data: DataConfig) -> int:
        """Number of classes, read from the labels; 0 without labels, or if it is known only once the source is open."""
        return 0

    @classmethod
    def stored_shapes(cls, data: DataConfig, most: int) -> list[tuple[int, int, int]]:
        """(C, H, W) of at most `most` stored images, evenly spaced; a single shape if all images must have it, and none
        if the source makes images of any size."""
        return []

    @classmethod
    def latent_keys(cls, data: DataConfig) -> dict[str, Any]:
        """Defaults of data.vae, data.latent_mean and data.latent_scale for the latents at a place; none for pixels."""
        return {}

    @classmethod
    def size_of(cls, path: Path) -> tuple[int, int, int]:
        """Height, width and channels (1 or 3) of the stored images; UserError when they differ."""
        raise UserError(f"{truncate(path, 60)} has no fixed image size: give a folder, .zip, .npz or .npy of images")

    @cached_property
    def digest(self) -> str:
        """Text that identifies the images, preferably the SHA-256 of their content. A run resumes only with the same
        digest.
        """
        raise UserError(f"{type(self).__name__} has no digest: give the class a text that identifies its images")

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Labels of the training images; for an endless source, one label of each class."""
        if self.train_size is None:
            return np.arange(len(self.classes))
        return np.array([self.train(index)[1] for index in range(self.train_size)], np.int64)

    @abstractmethod
    def train(self, index: int) -> tuple[Array, int]:
        """Training image `index` and its label."""

    def held_out(self, index: int) -> tuple[Array, int]:
        """Held-out image `index` and its label."""
        raise IndexError(f"no held-out image {index}: held_out_size is {self.held_out_size}")

    def title(self, index: int, *, held_out: bool = False) -> str:
        """Name of a training or held-out image."""
        return f"image {index}"

    def example(self, index: int, stream: Stream, *, flip: bool) -> tuple[Array, int]:
        """Training image `index`, or its mirror image, as used in one training example, and its label.

        Take all random numbers (for a crop or a posterior) from `stream`, which depends only on the run's seed and the
        example's number. A resumed run then sees the same bits.
        """
        image, label = self.train(index)
        return image[..., ::-1] if flip else image, label

    def stored_example(self, index: int, stream: Stream, *, flip: bool) -> tuple[Stored, int]:
        """`example` with the image as it is stored: uint8 pixels or float16 if `as_float` makes the same bits of them.
        Training moves the stored image to the device."""
        return self.example(index, stream, flip=flip)


class SplitSource(Source):
    """A source of images by position, split into training and held-out ones."""

    def _set_split(self, train: ArrayLike, held_out: ArrayLike, labels: ArrayLike) -> None:
        """Set the attributes of `Source`, from the positions of both parts and the label of every position."""
        self._train, self._held = np.asarray(train, np.int64), np.asarray(held_out, np.int64)
        self.train_size, self.held_out_size = len(self._train), len(self._held)
        self.labels = np.asarray(labels, np.int64)[self._train]

    @abstractmethod
    def _stored(self, position: int) -> tuple[Stored, int]:
        """The image at a position as it is stored, and its label."""

    def _image(self, position: int) -> tuple[Array, int]:
        """The image at a position and its label."""
        image, label = self._stored(position)
        return as_float(image), label

    def train(self, index: int) -> tuple[Array, int]:
        return self._image(int(self._train[index]))

    def held_out(self, index: int) -> tuple[Array, int]:
        return self._image(int(self._held[index]))

    def stored_example(self, index: int, stream: Stream, *, flip: bool) -> tuple[Stored, int]:
        if not _shows_stored(type(self)):
            return self.example(index, stream, flip=flip)
        image, label = self._stored(int(self._train[index]))
        return image[..., ::-1] if flip else image, label


@cache
def _shows_stored(kind: type[SplitSource]) -> bool:
    """Whether the examples of a class are its stored images: it overrides no other method of METHODS."""
    stored, *others = (next(n for n, owner in enumerate(kind.__mro__) if name in vars(owner)) for name in METHODS)
    return stored < min(others)
