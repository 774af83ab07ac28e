"""Conversion of images in [-1, 1] to pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import suppress

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


def to_floats(images: Pixels) -> NDArray[np.float32]:
    """uint8 (N, H, W, C) as (N, C, H, W) in [-1, 1]."""
    return images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1


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
    """A grid of images (N, H, W, C) on white, about square by default, with the names under the images, in at most two
    lines. Images are enlarged by the whole factor `scale`; None: small images to about 64 pixels."""
    count, height, width, _ = pixels.shape
    columns = columns or max(1, round(count**0.5 + 0.49))
    scale, gap = scale or max(1, 64 // max(height, width)), 2
    cell_w, font = width * scale + gap, _font("".join(names), NAME_PIXELS - 3)
    lines = {name: _lines(name, lambda text: font.getlength(text) < cell_w) for name in names}
    cell_h = height * scale + gap + max(map(len, lines.values()), default=0) * NAME_PIXELS
    sheet = Image.new("RGB", (columns * cell_w + gap, -(-count // columns) * cell_h + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(pixels):
        left, top = gap + number % columns * cell_w, gap + number // columns * cell_h
        tile = to_image(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (left, top))
        for row, text in enumerate(lines[names[number]] if names else ()):
            draw.text((left, top + height * scale + row * NAME_PIXELS), text, "black", font)
    return sheet


def _lines(name: str, fits: Callable[[str], bool]) -> list[str]:
    """The name in one line, or in two if it has a hyphen, an underscore or a space where the first can end. What does
    not fit is cut off."""
    ends = [0, *(end for end in range(1, len(name)) if name[end - 1] in "-_ ")]
    end = 0 if fits(name) else max(end for end in ends if not end or fits(name[:end]))
    rest = name[end:]
    fitting = next((rest[:to] for to in range(len(rest), 0, -1) if fits(rest[:to])), "")
    return [name[:end], fitting] if end else [fitting]


def side_by_side(pictures: dict[str, Image.Image], columns: int = 1000) -> Image.Image:
    """Pictures side by side, at most `columns` of them in a row, each under its caption."""
    top, gap, cells = 28, 16, list(pictures.items())
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(image.height for _, image in row) + top + gap for row in rows]
    width = max(sum(image.width + gap for _, image in row) for row in rows) + gap
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    draw, above = ImageDraw.Draw(sheet), 0
    for row, height in zip(rows, heights, strict=True):
        left = gap
        for caption, image in row:
            draw.text((left + 2, above + 7), caption, fill="black", font=_font(caption, 14))
            sheet.paste(image, (left, above + top))
            left += image.width + gap
        above += height
    return sheet


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's font, which has ASCII only; for other text Matplotlib's, if it is installed."""
    if not text.isascii():
        with suppress(ImportError):
            from matplotlib import get_data_path

            return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    return ImageFont.load_default(size)


def image_png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    image.save(content := io.BytesIO(), "PNG")
    return content.getvalue()
