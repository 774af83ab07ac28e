"""`mosaic`: endless procedural images with exactly known layout and fine texture.

Each image is a background and one to three large shapes of one kind (the global layout), each region
filled with a sinusoidal texture of known period, direction, contrast and colours (the local detail).
A sinusoid of period above 2 pixels is band-limited: it is sampled without aliasing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig, ModelConfig
from dit_in_dit.data.digest import digest_values
from dit_in_dit.data.picture import Array
from dit_in_dit.data.source import Source
from dit_in_dit.runtime.seeding import generator

LAYOUTS = ("disc", "square", "band")
TEXTURES = {"fine": (2.6, 3.6), "medium": (3.6, 5.2), "coarse": (5.2, 8.0)}  # range of periods in pixels
CLASSES = tuple(f"{layout}-{texture}" for layout in LAYOUTS for texture in TEXTURES)
HELD_OUT = 512


@dataclass(frozen=True)
class Region:
    """Parameters of one region; lengths in pixels, angles in radians, colours in [-1, 1]."""

    centre: tuple[float, float]  # y, x
    radius: float  # half the extent; the background's is infinite
    tilt: float  # of squares and bands
    period: float
    direction: float  # of the wave: the stripes are perpendicular to it
    phase: float
    contrast: float  # amplitude, from 0 to 1, of the mix of the two colours
    colours: tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Truth:
    """Parameters of image number `index`; region 0 is the background, and later regions cover earlier regions."""

    index: int
    label: int
    layout: str
    texture: str
    regions: tuple[Region, ...]


class Mosaic:
    """Image i of a given size (H, W) is a pure function of (seed, i)."""

    def __init__(self, size: tuple[int, int], seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.y, self.x = np.mgrid[: size[0], : size[1]].astype(np.float32) + 0.5

    def truth(self, index: int) -> Truth:
        """The layout and textures of image `index` (0 <= index < 2^63)."""
        draw = generator(self.seed, "mosaic", index)
        label = int(draw.integers(len(CLASSES)))
        layout, texture = CLASSES[label].split("-")
        height, width = self.size
        side = min(height, width)
        low, high = TEXTURES[texture]
        regions = []
        for number in range(1 + int(draw.integers(1, 4))):
            background = number == 0
            dark, light = draw.uniform(-1, 0, 3), draw.uniform(0, 1, 3)
            regions.append(
                Region(
                    centre=(float(draw.uniform(0, height)), float(draw.uniform(0, width))),
                    radius=float("inf") if background else float(draw.uniform(0.12, 0.3) * side),
                    tilt=float(draw.uniform(0, np.pi)),
                    period=float(draw.uniform(low, high)),
                    direction=float(draw.uniform(0, np.pi)),
                    phase=float(draw.uniform(0, 2 * np.pi)),
                    contrast=float(draw.uniform(0.5, 1)),
                    colours=(tuple(map(float, dark)), tuple(map(float, light))),
                )
            )
        return Truth(index, label, layout, texture, tuple(regions))

    def mask(self, truth: Truth, region: Region) -> Array:
        """Coverage (H, W) in [0, 1] of one region, before later regions cover it; edges are one pixel wide."""
        dy, dx = self.y - region.centre[0], self.x - region.centre[1]
        along = dx * np.cos(region.tilt) + dy * np.sin(region.tilt)
        across = dy * np.cos(region.tilt) - dx * np.sin(region.tilt)
        if truth.layout == "disc":
            distance = np.hypot(dx, dy)
        elif truth.layout == "square":
            distance = np.maximum(np.abs(along), np.abs(across))
        else:
            distance = np.abs(across) * 2  # bands are half as thick as discs are wide
        return np.clip(region.radius - distance + 0.5, 0, 1).astype(np.float32)

    def image(self, index: int) -> tuple[Array, int]:
        """Image (3, H, W) in [-1, 1] and its label."""
        truth = self.truth(index)
        canvas = np.zeros((3, *self.size), np.float32)
        for region in truth.regions:
            wave = self.x * np.cos(region.direction) + self.y * np.sin(region.direction)
            mix = 0.5 + 0.5 * region.contrast * np.sin(2 * np.pi * wave / region.period + region.phase)
            dark, light = (np.asarray(c, np.float32)[:, None, None] for c in region.colours)
            cover = self.mask(truth, region)
            canvas += cover * (dark + (light - dark) * mix.astype(np.float32) - canvas)
        return canvas, truth.label


class MosaicSource(Source):
    """Mosaic images as a source: the first HELD_OUT images are held out, and training images follow."""

    name = "mosaic"

    classes = CLASSES
    train_size = None
    held_out_size = HELD_OUT
    digest = digest_values("mosaic", CLASSES, TEXTURES)

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        if model.channels != 3:
            raise UserError(f"mosaic has 3 channels: set model.channels=3, got {model.channels}")
        self.mosaic = Mosaic(model.image_size)

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether `source` is the kind's name."""
        return source == name

    def train(self, index: int) -> tuple[Array, int]:
        return self.mosaic.image(HELD_OUT + index)

    def held_out(self, index: int) -> tuple[Array, int]:
        return self.mosaic.image(index)
