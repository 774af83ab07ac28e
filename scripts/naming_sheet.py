"""Sheets of numbered pictures without labels, for people who name them: samples of a model among unseen real images.

    python scripts/naming_sheet.py RUN --out DIR [--num 64] [--real 16] [--seed 0] [--guide RUN --guide-scale W]

Writes sheet-1.png ... with at most 40 pictures each, and key.csv: number, `sample` or `real`, and class. Classes of
samples are as frequent as those of the training images; the order is random.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dit_in_dit.api.model import load
from dit_in_dit.data.run_data import find_source
from dit_in_dit.data.source import Source
from dit_in_dit.reporting.images import to_image, to_pixels
from dit_in_dit.runs import atomic

ACROSS, DOWN, SIDE, MARGIN = 8, 5, 160, 24  # pictures, and pixels of one


def real_images(source: Source, numbers: list[int]) -> list[tuple[Image.Image, str]]:
    """Held-out images with the names of their classes."""
    images, labels = zip(*(source.held_out(number) for number in numbers), strict=True)
    pixels = to_pixels(torch.from_numpy(np.stack(images)))
    return [(to_image(each), source.classes[y]) for each, y in zip(pixels, labels, strict=True)]


def draw_sheet(pictures: list[Image.Image], first: int) -> bytes:
    """A PNG of the pictures, enlarged, with their numbers."""
    rows = -(-len(pictures) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * (SIDE + MARGIN), rows * (SIDE + MARGIN)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, picture in enumerate(pictures):
        left, top = (place % ACROSS) * (SIDE + MARGIN), (place // ACROSS) * (SIDE + MARGIN)
        sheet.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left + 12, top + 18))
        pen.text((left + 12, top + 1), str(first + place), fill="black", font_size=14)
    file = io.BytesIO()
    sheet.save(file, "png", optimize=True)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=64, help="samples")
    parser.add_argument("--real", type=int, default=16, help="held-out images among them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guide", help="weak model of autoguidance, as for `sample`")
    parser.add_argument("--guide-scale", type=float, help="its scale (default: the run's)")
    options = parser.parse_args()
    model, random = load(options.run), np.random.default_rng(options.seed)
    source, _ = find_source(model.config, None, None)
    first_style = source.labels if source.styles is None else source.labels[np.asarray(source.styles) == 0]
    wanted = [source.classes[y] for y in random.choice(first_style, options.num)]
    drawn = model.sample(wanted, seed=options.seed, guide=options.guide, guide_scale=options.guide_scale)
    shown = [(picture, "sample", name) for picture, name in zip(drawn, wanted, strict=True)]
    held_out = random.choice(source.held_out_size, options.real, replace=False).tolist()
    shown += [(picture, "real", name) for picture, name in real_images(source, held_out)]
    shown = [shown[place] for place in random.permutation(len(shown))]
    options.out.mkdir(parents=True, exist_ok=True)
    page = ACROSS * DOWN
    for number, start in enumerate(range(0, len(shown), page), 1):
        pictures = [picture for picture, *_ in shown[start : start + page]]
        atomic.write_atomic(options.out / f"sheet-{number}.png", draw_sheet(pictures, start + 1))
    key = io.StringIO()
    csv.writer(key).writerows([("number", "kind", "class"), *((n, *rest) for n, (_, *rest) in enumerate(shown, 1))])
    atomic.write_atomic(options.out / "key.csv", key.getvalue())


if __name__ == "__main__":
    main()
