"""Corruptions of real images, by strength from 0 (none), to which metrics must respond: used by `metric_response.py`
and tests."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from dit_in_dit.reporting.images import Pixels
from dit_in_dit.runtime.seeding import generator


def blur(images: Pixels, strength: float) -> Pixels:
    """Gaussian blur; strength is its standard deviation in pixels."""
    return _each(images, lambda image: image.filter(ImageFilter.GaussianBlur(strength))) if strength else images


def noise(images: Pixels, strength: float) -> Pixels:
    """White noise of standard deviation `strength`; pixels have range 1."""
    draws = [generator(0, "noise", i).standard_normal(image.shape) for i, image in enumerate(images)]
    return _pixels(images + 255 * strength * np.stack(draws))


def jpeg(images: Pixels, strength: float) -> Pixels:
    """JPEG of quality 100 (1 - strength), with chroma subsampling."""

    def compress(image: Image.Image) -> Image.Image:
        image.save(buffer := io.BytesIO(), "JPEG", quality=max(1, round(100 * (1 - strength))))
        return Image.open(buffer)

    return _each(images, compress) if strength else images


def patch_grid(images: Pixels, strength: float, period: int = 8) -> Pixels:
    """Darken the last row and column of every patch of `period` pixels by `strength`; pixels have range 1."""
    lines = np.zeros(images.shape[1:3])
    lines[period - 1 :: period], lines[:, period - 1 :: period] = 1, 1
    return _pixels(images - 255 * strength * lines[..., None])


def colour(images: Pixels, strength: float) -> Pixels:
    """Lighten the first channel and darken the last by `strength`; pixels have range 1."""
    shift = np.zeros(images.shape[-1])
    shift[0], shift[-1] = 255 * strength, -255 * strength
    return _pixels(images + shift)


CORRUPTIONS: dict[str, Callable[[Pixels, float], Pixels]] = {
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
    "grid": patch_grid,
    "colour": colour,
}


def _pixels(values: NDArray[np.float64]) -> Pixels:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def _each(images: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])
