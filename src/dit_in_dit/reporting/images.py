"""Conversion of images in [-1, 1] to pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit_in_dit.config.errors import UserError

Pixels = NDArray[np.uint8]
NAME_PIXELS = 15  # height of a name under an image of a grid


def to_pixels(images: Tensor) -> Pixels:
    """uint8 (N, H, W, 1 or 3) from images (N, C, H, W) in [-1, 1]; with other numbers of channels, the first three are
    used.

    Raises:
        UserError: an image is not finite.
    """
    check_finite(images)
    shown = images if images.shape[1] in (1, 3) else images[:, :3]
    return (shown.float().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def check_finite(images: Tensor) -> None:
    """UserError when images or latents (N, ...) hold NaN or infinity, as from a diverged model or a VAE."""
    bad = (~images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{len(bad)} of {len(images)} images hold NaN or infinity, the first is number {bad[0]} of its batch: "
            "use an earlier checkpoint, or float32; a model that diverged generates nothing"
        )


def to_image(pixels: Pixels) -> Image.Image:
    """A picture from uint8 (H, W, 1 or 3)."""
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def image_grid(
    pixels: Pixels, columns: int | None = None, *, scale: int | None = None, names: Sequence[str] = ()
) -> Image.Image:
    """A grid of images (N, H, W, C) on white, about square by default, with the names under the images. Images are
    enlarged by the whole factor `scale`; None: small images to about 64 pixels."""
    count, height, width, _ = pixels.shape
    columns = columns or round(count**0.5 + 0.49)
    scale, gap = scale or max(1, 64 // max(height, width)), 2
    cell_w, cell_h = width * scale + gap, height * scale + gap + bool(names) * NAME_PIXELS
    sheet = Image.new("RGB", (columns * cell_w + gap, -(-count // columns) * cell_h + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(NAME_PIXELS - 3)
    short = {name: _fitting(name, lambda text: draw.textlength(text, font) < cell_w) for name in names}
    for number, image in enumerate(pixels):
        left, top = gap + number % columns * cell_w, gap + number // columns * cell_h
        tile = to_image(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (left, top))
        if names:
            draw.text((left, top + height * scale), short[names[number]], "black", font)
    return sheet


def _fitting(name: str, fits: Callable[[str], bool]) -> str:
    """The name, or as much of its beginning as fits."""
    return next((name[:end] for end in range(len(name), 0, -1) if fits(name[:end])), "")


def side_by_side(pictures: dict[str, Image.Image]) -> Image.Image:
    """Pictures side by side, each under its caption."""
    top, gap = 28, 16
    width = sum(p.width for p in pictures.values()) + gap * (len(pictures) + 1)
    sheet = Image.new("RGB", (width, max(p.height for p in pictures.values()) + top + gap), "white")
    draw, left = ImageDraw.Draw(sheet), gap
    for caption, image in pictures.items():
        draw.text((left + 2, 7), caption, fill="black", font_size=14)
        sheet.paste(image, (left, top))
        left += image.width + gap
    return sheet


def image_png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    image.save(content := io.BytesIO(), "PNG")
    return content.getvalue()
