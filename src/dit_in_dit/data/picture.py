"""Decode image files to pixels of a given size; a damaged or oversized file is an error."""

from __future__ import annotations

import io
import lzma
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from tokenize import TokenError
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

Seen = TypeVar("Seen")
Array = NDArray[np.float32]
Stored = NDArray[Any]  # an image (C, H, W) as it is stored: uint8 pixels, float16 or float32
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", *(("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()))
ONE_FRAME = ("TIFF", "GIF", "AVIF")  # refused with several frames; of PNG and WebP the first is used
IN_MEMORY = 2**30  # bytes of decoded pixels up to which a source is decoded once, at opening
MOST_PIXELS = 2**26  # of an image: 8192x8192, at most 0.8 GB while it is composited on white
MOST_BYTES = 2**28  # of an image file: four per pixel
UNREADABLE = (  # errors of Pillow, zipfile and NumPy on damaged, encrypted or oversized files
    *(OSError, ValueError, SyntaxError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, struct.error),
    *(LookupError, TypeError, OverflowError, MemoryError, zipfile.BadZipFile, Image.DecompressionBombError, TokenError),
)


def apply_to_image(content: bytes, look: Callable[[Image.Image], Seen]) -> Seen:
    """The result of `look` on the image in a file; raises one of UNREADABLE if it cannot be decoded or is too large.

    If the header states more than MOST_PIXELS pixels, the image is refused. Pillow's own limit is higher, warns before
    it refuses, and can be switched off.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"{len(content)} bytes, more than {MOST_BYTES}")
    with warnings.catch_warnings(action="ignore"):  # Pillow's warnings about odd metadata and about its limit
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} is more than {MOST_PIXELS} pixels")
                if image.format in ONE_FRAME and getattr(image, "is_animated", False):
                    raise ValueError("several frames: store each frame as an image")
                return look(image)
        except UnidentifiedImageError:
            if content[4:12] == b"ftypavif":
                raise ValueError("AVIF, which this Pillow does not read: upgrade Pillow") from None
            raise ValueError("not a PNG, JPEG, WebP, BMP, TIFF, GIF or AVIF image") from None
        except Image.DecompressionBombError:  # raised above twice Pillow's limit, before the header can be read
            raise ValueError(f"more than {MOST_PIXELS} pixels") from None


def resize_and_crop(image: Image.Image, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """Pixels (H, W, C) at `size`, as ADM resizes (Dhariwal & Nichol 2021): halve with a box filter while the image is
    at least twice too large, resize with a bicubic filter to cover the target, and crop the centre.

    Before that, an image is converted to 8 bits as a viewer shows it. It is rotated by its EXIF orientation, which ADM
    ignores. The first frame of a PNG or WebP is used; `apply_to_image` refuses several frames in other formats.
    Transparent images (RGBA, LA, PA, a transparent colour) are composited on white. Modes 1, P, CMYK and YCbCr are
    converted by Pillow. 16-bit grey v (mode I;16, or I in some versions of Pillow) becomes v // 257.

    Raises:
        ValueError: the mode is F, or I with values beyond 16 bits: white is undefined there.
    """
    image = _eight_bits(apply_orientation(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    across, down = min(image.width, width / scale), min(image.height, height / scale)  # the crop
    left, top = (image.width - across) / 2, (image.height - down) / 2
    if (across, down) == size[::-1]:
        left, top = int(left), int(top)  # no resize: whole pixels
    box = (left, top, left + across, top + down)
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).reshape(height, width, channels)


def as_float(image: Stored) -> Array:
    """A stored image in float32; pixels are scaled to [-1, 1]."""
    scaled = np.ascontiguousarray(image, np.float32)
    return scaled / 127.5 - 1 if image.dtype == np.uint8 else scaled


def image_shape(image: Image.Image) -> tuple[int, int, int]:
    """Channels (1: grey, 3: colour), height and width as `resize_and_crop` sees them."""
    width, height = apply_orientation(image).size
    return 1 if image.mode in ("1", "L", "LA", "I") or image.mode.startswith("I;16") else 3, height, width


def apply_orientation(image: Image.Image) -> Image.Image:
    """The image rotated by its EXIF orientation; unreadable metadata is ignored."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except UNREADABLE:
        turn = None
    return image if turn is None else image.transpose(turn)


_TURNS = {  # EXIF orientation -> its inverse
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of more than 8 bits reduced to 8; others unchanged."""
    if image.mode == "F":
        raise ValueError("floats, for which white is undefined: convert it to 8 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, np.int32)
    if not 0 <= values.min() <= values.max() < 2**16:
        raise ValueError("grey values beyond 16 bits: convert it to 8 bits")
    grey = (values // 257).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255  # on white, as all transparency
    return Image.fromarray(grey)
