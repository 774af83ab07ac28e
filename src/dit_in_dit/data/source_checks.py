"""Checks of what a user's `Source` gives: its attributes and first image when it is opened, and every example."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import numpy as np

from dit_in_dit.config.choices import PACKAGE
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.data.picture import Stored
from dit_in_dit.data.source import Source


def check_opened(source: Source, model: ModelConfig) -> None:
    """Check the attributes and the first image of a user's source; the package's own sources check their files.

    Raises:
        UserError: an attribute or the image breaks the contract of `Source`.
    """
    if type(source).__module__.split(".")[0] == PACKAGE:
        return
    classes, size = getattr(source, "classes", None), getattr(source, "train_size", 0)
    if not isinstance(classes, tuple | list) or not all(isinstance(name, str) for name in classes):
        raise _wrong(source, "classes must be a tuple of texts", classes)
    if size is not None and not (isinstance(size, int | np.integer) and size >= 1):
        raise _wrong(source, "train_size must be at least 1, or None for an endless source", size)
    held_out = source.held_out_size
    if not isinstance(held_out, int | np.integer) or held_out < 0:
        raise _wrong(source, "held_out_size must be a whole number of at least 0", held_out)
    if not isinstance(source.digest, str):
        raise _wrong(source, "digest must be a text", source.digest)
    if any("labels" in vars(owner) for owner in (source, *type(source).__mro__) if owner is not Source):
        _check_labels(source, None if size is None else int(size), len(classes))
    image, _ = check_example(source, source.train(0), model, len(classes))
    if not np.isfinite(image).all():
        raise _wrong(source, "images must be finite", "NaN or infinity in training image 0")


def _check_labels(source: Source, size: int | None, classes: int) -> None:
    """Check the `labels` that a source itself defines; the default `labels` are read from the examples."""
    labels = np.asarray(source.labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or (size is not None and len(labels) != size):
        raise _wrong(
            source, "labels must be one whole number per training image", f"{labels.dtype} {list(labels.shape)}"
        )
    if len(labels) and classes and not 0 <= labels.min() <= labels.max() < classes:
        raise _wrong(source, f"labels must be from 0 to {classes - 1}", f"{labels.min()} to {labels.max()}")


def check_example(
    source: Source, example: object, model: ModelConfig, classes: int | None = None, *, stored: bool = False
) -> tuple[Stored, int]:
    """Check an example of a source, except for NaN, and return it as (image, label).

    Args:
        classes: number of classes; None: the model's.
        stored: accept an image as it is stored, uint8 or float16 too.

    Raises:
        UserError: the image is not float32 (C, H, W) of the model's shape, or the label is not from 0 to classes - 1.
    """
    if not isinstance(example, Sequence) or len(example) != 2:
        raise _wrong(source, "an example must be a pair (image, label)", type(example).__name__)
    image, label = example
    dtypes = (np.float32, np.float16, np.uint8) if stored else (np.float32,)
    if not isinstance(image, np.ndarray) or image.dtype not in dtypes or image.shape != model.image_shape:
        shape = f"{getattr(image, 'dtype', type(image).__name__)} {list(getattr(image, 'shape', ()))}"
        raise _wrong(source, f"images must be float32 of shape {list(model.image_shape)}", shape)
    classes = model.num_classes if classes is None else classes
    try:
        number = index(label)
    except TypeError:
        raise _wrong(source, "labels must be whole numbers", repr(label)) from None
    if model.num_classes and not 0 <= number < classes:
        raise _wrong(source, f"labels must be from 0 to {classes - 1}", number)
    return image, number


def _wrong(source: Source, rule: str, value: object) -> UserError:
    return UserError(f"source {type(source).__qualname__}: {rule}: got {truncate(value, 60)}; fix the class")
