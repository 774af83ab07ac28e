"""Data given as Python objects: datasets with `__len__` and `__getitem__`, and arrays."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import ModelConfig, RunConfig
from dit_in_dit.data.groups import split_families
from dit_in_dit.data.labels import label_names
from dit_in_dit.data.picture import Array, Stored, as_float, resize_and_crop
from dit_in_dit.data.source import Source, SplitSource

WHAT = "the dataset"  # in messages


def as_source(data: Any, config: RunConfig) -> Source | str:
    """The images of `data` as a source for a run. A folder or a name stays a text.

    Args:
        data: a `Source`; a folder or name as for `data.source`; an object with `__len__` and `__getitem__`, whose items
            are images or pairs (image, class number); or a pair of arrays, images (N, ...) and labels (N,).

    Raises:
        UserError: the object is none of these, or an item does not fit the model.
    """
    if isinstance(data, Source | str | Path):
        return data if isinstance(data, Source) else str(data)
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        if len(data[0]) != len(data[1]):
            raise UserError(f"arrays must have as many images as labels: got {len(data[0])} and {len(data[1])}")
        data = list(zip(*data, strict=True))
    if isinstance(data, Mapping) or not all(hasattr(data, name) for name in ("__len__", "__getitem__")):
        got = truncate(type(data).__name__, 40)
        raise UserError(f"data must be a folder, name, Source, arrays, or have __len__ and __getitem__: got {got}")
    return DatasetSource(data, config)


class DatasetSource(SplitSource):
    """A user's dataset. Opening reads every item once, for labels and digest: items must not change between reads.

    PIL images are resized and cropped as files are. Arrays and tensors must have the model's size: uint8 (H, W, C) or
    (C, H, W) are pixels; floats (C, H, W) are in [-1, 1] already, or are latents of other than 1 or 3 channels. Each
    item is its own family of the held-out split.
    """

    def __init__(self, dataset: Any, config: RunConfig) -> None:
        self._dataset, self._model = dataset, config.model
        if config.data.workers:
            try:
                pickle.dumps(dataset, 5, buffer_callback=lambda buffer: None)  # large arrays are not copied
            except Exception as error:  # a class may raise anything
                raise UserError(
                    f"data.workers={config.data.workers} needs a dataset that can be pickled ({truncate(error, 60)}): "
                    "define its class in a module, or set data.workers=0"
                ) from None
        digest, labels = hashlib.sha256(), []
        for position in range(len(dataset)):
            image, label = self._image(position)
            digest.update(image.tobytes() + str(label).encode())
            labels.append(label)
        if not labels:
            raise UserError(f"{WHAT} is empty: give one with images")
        self.digest, known = digest.hexdigest(), tuple(map(str, getattr(dataset, "classes", ())))
        self.classes = label_names(labels, len(known), WHAT, known)
        self._set_split(*split_families(list(map(str, range(len(labels)))), config.data.held_out, WHAT), labels)

    def _stored(self, position: int) -> tuple[Stored, int]:
        what = f"item {position} of {WHAT}"
        try:
            item = self._dataset[position]
        except IndexError:
            raise UserError(f"{what} is missing, although __len__ gives {len(self._dataset)}") from None
        image, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        if not isinstance(image, Image.Image) and not hasattr(image, "__array__"):
            raise UserError(f"{what} must be an image or a pair (image, class number): got {truncate(image, 60)}")
        if label is None and self._model.num_classes:
            raise UserError(f"{what} has no label: give pairs (image, label), or set model.num_classes=0")
        try:
            return _as_stored(image, self._model, what), 0 if label is None else index(label)
        except TypeError:
            raise UserError(f"{what} must be an image with a whole number: got {truncate(item, 60)}") from None


def as_image(image: Any, model: ModelConfig, what: str = "the image") -> Array:
    """An image of a user, see `DatasetSource`, as float32 (C, H, W) of the model's shape. Raises UserError."""
    return as_float(_as_stored(image, model, what))


def _as_stored(image: Any, model: ModelConfig, what: str) -> Stored:
    """An image of a user as uint8 pixels or float32 (C, H, W). Raises UserError."""
    channels, *size = model.image_shape
    if isinstance(image, Image.Image):
        try:
            image = resize_and_crop(image, model.image_size, channels)
        except ValueError as error:
            raise UserError(f"{what}: {error}") from None
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if array.dtype == np.uint8:
        array = array[..., None] if array.shape == tuple(size) else array
        array = array.transpose(2, 0, 1) if array.shape == (*size, channels) else array
    elif array.dtype.kind != "f" or (channels in (1, 3) and not np.abs(array).max(initial=0) <= 1):  # also NaN
        got = f"values to {np.abs(array).max():.4g}" if array.dtype.kind == "f" else array.dtype
        raise UserError(f"{what} must be uint8, or floats that are scaled to [-1, 1] already: got {got}")
    if array.shape != model.image_shape:
        raise UserError(f"{what} must be {model.image_shape}, the model's shape, or a PIL image: got {array.shape}")
    return array if array.dtype == np.uint8 else np.ascontiguousarray(array, np.float32)
