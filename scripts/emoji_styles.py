"""Emoji in further styles, from icon sets in Iconify's JSON: Twemoji and Fluent Emoji Flat. build_emoji.py calls it.

`npm install @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji-flat@1.2.6` fetches the sets, `pip install
resvg_py==0.5.0` the renderer. Other versions may draw other pixels.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = 64  # side of an image in pixels
OVERSAMPLING = 8
BLANK = 0.005  # share of the most ink that an image can have; below it nothing is seen on white
NEAR = 0.15  # below it (see near_pairs) two images look alike; chosen by looking at the pairs on both sides
CORNER = 5  # most ink of 255 in a corner: every image has a white background
TONE = re.compile("[\U0001f3fb-\U0001f3ff]")


class Style(NamedTuple):
    """An icon set: the folder of its npm package, and the side of an image in units of the drawings' grid.

    The sides give the median drawing of both sets the extent of Noto's: 58 of 64 pixels (Fluent: 56, as a
    larger one would cut drawings off).
    """

    package: str
    side: float


STYLES = {"fluent": Style("@iconify-json/fluent-emoji-flat", 1.0), "twemoji": Style("@iconify-json/twemoji", 64 / 58)}


def sequence_key(text: str) -> str:
    """Code points as in `chars.json`: hexadecimal, joined by hyphens, without the emoji presentation selector."""
    return "-".join(f"{ord(character):04x}" for character in text if character != "\ufe0f")


def read_icons(folder: Path) -> dict[str, str]:
    """SVG bodies by `sequence_key`, and the grid's size under the key `size`."""
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    bodies = {code: icons["icons"][name]["body"] for code, name in names.items() if name in icons["icons"]}
    plain = {"-".join(part for part in code.split("-") if part != "fe0f"): body for code, body in bodies.items()}
    return {"size": str(icons["height"]), **plain}


def render_svg(body: str, grid: float, side: float) -> Image.Image:
    """A drawing on a square `grid`, in the middle of a white square of `side` grids, at 64x64."""
    import resvg_py

    width, corner = grid * side, grid * (1 - side) / 2
    box = f"{corner} {corner} {width} {width}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'
    large = OVERSAMPLING * SIZE
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", width=large, height=large, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)  # as the glyphs of Noto


def render_style(style: Style, modules: Path, texts: dict[str, str]) -> tuple[dict[str, Image.Image], list[str]]:
    """Images of `texts` (stem -> sequence) without skin tones, and lines on what is left out: sequences that the set
    does not have, images that are blank or have ink in a corner, and images equal to an earlier one."""
    icons = read_icons(modules / style.package)
    grid, images, missing, unfit, same = float(icons.pop("size")), dict[str, Image.Image](), [], [], []
    seen: set[bytes] = set()
    for stem, text in texts.items():
        if TONE.search(text):
            continue
        if (body := icons.get(sequence_key(text))) is None:
            missing.append(stem)
            continue
        image = render_svg(body, grid, style.side)
        ink = 255 - np.asarray(image, np.float32)
        if ink.mean() < 255 * BLANK or ink[[0, 0, -1, -1], [0, -1, 0, -1]].max() > CORNER:  # drawn past the border
            unfit.append(stem)
        elif image.tobytes() in seen:
            same.append(stem)
        else:
            seen.add(image.tobytes())
            images[stem] = image
    left_out = {"not in the set": missing, "blank or ink in a corner": unfit, "equal to an earlier image": same}
    return images, [f"{style.package}, {what}: {len(stems)} {stems}" for what, stems in left_out.items() if stems]


def near_pairs(images: list[Image.Image]) -> list[tuple[float, int, int]]:
    """(distance, i, j) of pairs that are nearly identical, or are when one is mirrored, nearest first.

    The distance is the Euclidean one between the images' ink (255 - pixel) over the norm of the lighter
    image, so that pale drawings on white do not all look alike.
    """
    ink = 255 - np.stack([np.asarray(image, np.float32) for image in images])
    flat = ink.reshape(len(ink), -1)
    norms = np.square(flat).sum(1)
    pairs = []
    for other in (flat, ink[:, :, ::-1].reshape(flat.shape)):
        squares = (norms[:, None] + norms - 2 * (flat @ other.T)) / np.minimum(norms[:, None], norms)
        rows, columns = np.nonzero(np.triu(squares < NEAR**2, 1))
        distances = np.sqrt(np.maximum(squares[rows, columns], 0))
        pairs += zip(distances.tolist(), rows.tolist(), columns.tolist(), strict=True)
    return sorted(pairs)


def render_styles(modules: Path, noto: dict[str, Image.Image], texts: dict[str, str]) -> dict[str, Image.Image]:
    """Images of all STYLES by STYLE/STEM. An image that looks like one of another family is left out: it could be on
    the other side of the split."""
    images = {f"noto/{stem}": image for stem, image in noto.items() if not TONE.search(texts[stem])}
    for name, style in STYLES.items():
        drawn, notes = render_style(style, modules, texts)
        print(*notes, sep="\n")
        images |= {f"{name}/{stem}": image for stem, image in drawn.items()}
    names, dropped = list(images), set()
    for distance, *pair in near_pairs(list(images.values())):
        one, other = (names[i] for i in pair)
        families = {name.split("/")[1].split("~")[0] for name in (one, other)}
        if len(families) > 1 and not {one, other} & dropped:
            print(f"left out, near {distance:.3f}: {other} = {one}")
            dropped.add(other)
    return {name: image for name, image in images.items() if not name.startswith("noto/") and name not in dropped}
