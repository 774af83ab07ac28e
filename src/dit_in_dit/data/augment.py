"""Augmentation of training images, with labels for the network (Karras et al. 2022, arXiv 2206.00364, appendix F.2).

The parameters of example i are a function of (seed, i). So the loader transforms the image, and the trainer makes the
labels that the network reads on its own device: nothing else has to cross to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.formats.latents import LatentSource
from dit_in_dit.data.picture import Array, Stored
from dit_in_dit.data.source import Source
from dit_in_dit.runtime.philox import MASK, WORD, box_muller, philox
from dit_in_dit.runtime.seeding import PURPOSES

SCALE = 0.2  # standard deviation of log2 of both scales
SHIFT = 0.125  # standard deviation (edm) or range (exact) of the translation, relative to the image


def draw_augmentation(config: RunConfig, examples: Tensor) -> Tensor:
    """Parameters of the example numbers (N,), int64: a row of float32 for each.

    Of data.augment_kind=edm (N, 8): x-flip and y-flip (0 or 1), scale, rotation in radians, anisotropic scale, its axis
    in radians, translation right and down. Of exact (N, 5): both flips, quarter turns, translation right and down.
    Scales are in units of 2^SCALE, translations in units of SHIFT. 0: none.
    """
    probability = config.data.augment
    block, example = torch.arange(4, device=examples.device), examples.unsqueeze(1)
    use = torch.full((), PURPOSES["augment"], device=examples.device)
    key = config.seed & MASK, config.seed >> WORD
    words = torch.stack(philox((block, use, example & MASK, example >> WORD), key), -1).flatten(1).unbind(1)
    uniform = [(word >> 8).float() * 2.0**-24 for word in words]
    first, second, third, fourth, fifth = (number < probability for number in uniform[:5])
    flips = [uniform[5] < 0.5, first & (uniform[6] < 0.5)]  # the official recipe mirrors half of all images
    if config.data.augment_kind == "exact":
        sides = zip(uniform[7:9], config.model.image_size[::-1], strict=True)
        moves = [third * ((2 * u - 1) * most).round() / most for u, side in sides if (most := _longest(side))]
        return torch.stack([*flips, second * (4 * uniform[9]).floor(), *moves], 1).float()
    scale, stretch = box_muller(words[8], words[9])
    right, down = box_muller(words[10], words[11])
    angle, axis = ((2 * number - 1) * math.pi for number in uniform[12:14])
    along = fourth * (uniform[14] < 0.5) * axis  # else along the image's own axes
    return torch.stack(
        [*flips, second * scale, third * angle, fourth * stretch, along, fifth * right, fifth * down], 1
    ).float()


def styles_of(source: Source, images: Tensor) -> Tensor:
    """Style numbers (N,) of training images (N,), on their device; zeros if the source has no styles."""
    if source.styles is None:
        return torch.zeros_like(images)
    return torch.from_numpy(source.styles).to(images.device)[images]


def training_labels(config: RunConfig, examples: Tensor, style: Tensor) -> Tensor | None:
    """The labels (N, model.augment_labels) of example numbers (N,): those of the augmentation, then one for each style
    but the first, by the images' style numbers `style` (N,). None if the model reads none."""
    labels, count = augmentation_labels(config, examples), config.data.style_labels
    if not count:
        return labels
    one_hot = (style.unsqueeze(1) == torch.arange(1, count + 1, device=style.device)).float()
    return one_hot if labels is None else torch.cat([labels, one_hot], 1)


def augmentation_labels(config: RunConfig, examples: Tensor) -> Tensor | None:
    """The labels of the augmentation of example numbers (N,), as EDM's; zero without augmentation, None if the model
    reads none of them."""
    if not config.data.augment:
        count = config.model.augment_labels - config.data.style_labels
        return torch.zeros(len(examples), count, device=examples.device) if count else None
    drawn = draw_augmentation(config, examples)
    if config.data.augment_kind == "exact":
        turns = drawn[:, 2:3]
        return torch.cat([drawn[:, :2], turns % 3 != 0, turns >= 2, drawn[:, 3:]], 1)
    flips, scale, angle, stretch, axis, move = drawn.split([2, 1, 1, 1, 1, 2], 1)  # type: ignore[no-untyped-call]
    return torch.cat([flips, scale, angle.cos() - 1, angle.sin(), stretch * axis.cos(), stretch * axis.sin(), move], 1)


def check_augmentation(config: RunConfig, source: Source) -> bool:
    """Whether a run augments its images. UserError if they are latents (a mirrored latent is no mirrored image), or not
    of the styles that the config names."""
    if (count := config.data.style_labels) and source.styles is None:
        raise UserError(
            f"data.source={config.data.source} has {count + 1} styles, and the images given to train() have no "
            "`styles`: set data.source=emoji"
        )
    if config.data.augment and isinstance(source, LatentSource):
        raise UserError(
            f"data.augment={config.data.augment:g} needs images, and {config.data.source} has latents: set 0"
        )
    return config.data.augment > 0


def check_reads_labels(config: RunConfig, model: nn.Module) -> None:
    """Check that a model given to train() reads the labels of the run's augmentation. Raises UserError."""
    labels = getattr(getattr(model, "config", None), "augment_labels", 0)
    if config.data.augment_labels and labels != config.model.augment_labels:
        raise UserError(
            f"data.augment={config.data.augment:g} needs a model with augment_labels={config.model.augment_labels}: "
            f"got {labels}; set data.augment=0{' and a data.source of one style' * bool(config.data.style_labels)}"
        )


def augment(image: Stored, kind: str, parameters: Sequence[float]) -> Stored:
    """The image (C, H, W) transformed by parameters of `draw_augmentation`; its border is mirrored beyond the image.

    Flips, quarter turns and translations of `exact` move whole pixels. The other transforms of `edm` are one
    interpolation, which rounds to uint8 if the image has that type.
    """
    mirrored, upside_down, *rest = parameters
    image = image[..., ::-1] if mirrored else image
    image = image[:, ::-1] if upside_down else image
    height, width = image.shape[1:]
    if kind == "exact":
        turns, right, down = rest
        image = np.rot90(image, int(turns), (1, 2))
        rows, columns = (
            _reflect(np.arange(side) - round(move * _longest(side)), side)
            for side, move in ((height, down), (width, right))
        )
        return image[:, rows[:, None], columns]
    return _resample(image, *_inverse(rest, width, height)) if any(rest) else image


def _longest(side: int) -> float:
    """Longest translation in whole pixels, before rounding."""
    return max(1.0, side * SHIFT)


def _inverse(parameters: Sequence[float], width: int, height: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The matrix (2, 2) and the shift (2,) from places (x, y) in the new image to those in the old, from the centre."""
    scale, angle, stretch, axis, right, down = parameters

    def rotation(radians: float) -> NDArray[np.float64]:
        cos, sin = math.cos(radians), math.sin(radians)
        return np.array([[cos, -sin], [sin, cos]])

    stretched = rotation(-axis) @ np.diag([2 ** (-SCALE * stretch), 2 ** (SCALE * stretch)]) @ rotation(axis)
    matrix = 2 ** (-SCALE * scale) * rotation(angle) @ stretched
    return matrix, matrix @ [-right * width * SHIFT, -down * height * SHIFT]


def _reflect(places: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Places on an axis of `size` pixels, those outside reflected at the centres of the first and the last pixel."""
    return size - 1 - abs(size - 1 - places % max(1, 2 * size - 2))


def _resample(image: Stored, matrix: NDArray[np.float64], shift: NDArray[np.float64]) -> Stored:
    """The image at matrix @ place + shift for each place, by cubic convolution (Keys 1981, a = -1/2), which is exact
    for quadratic functions."""
    channels, height, width = image.shape
    down, across = (np.arange(side) - (side - 1) / 2 for side in (height, width))
    x, y = (row[0] * across + row[1] * down[:, None] + move for row, move in zip(matrix, shift, strict=True))
    pixels = np.ascontiguousarray(image, np.float32).reshape(channels, -1)
    out: Array = np.zeros(pixels.shape, np.float32)
    columns = list(_taps(x.ravel() + (width - 1) / 2, width))
    for row, by_row in _taps(y.ravel() + (height - 1) / 2, height):
        for column, by_column in columns:
            out += pixels.take(row * width + column, axis=1) * (by_row * by_column)
    out = out.reshape(image.shape)
    return np.rint(out).clip(0, 255).astype(np.uint8) if image.dtype == np.uint8 else out


def _taps(places: NDArray[np.float64], size: int) -> Iterator[tuple[NDArray[np.int64], Array]]:
    """The four pixels around each place on an axis, with their weights."""
    first = np.floor(places)
    part = (places - first).astype(np.float32)
    for tap in range(-1, 3):
        far: Array = np.abs(part - tap, dtype=np.float32)
        weight = (1.5 * far - 2.5) * far * far + 1 if tap in (0, 1) else ((2.5 - 0.5 * far) * far - 4) * far + 2
        yield _reflect(first.astype(np.int64) + tap, size), weight
