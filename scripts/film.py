"""Draw docs/film.webp: from noise to images by the plain and the nested model in the package, from the same noise.

`python scripts/film.py` writes the same bytes again on the same machine and versions.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from dit_in_dit.reporting.images import side_by_side
from dit_in_dit.runs import atomic
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.sampling.folder import SampleFolder, film

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"plain DiT": "emoji-dit", "nested, equal MACs": "emoji"}
CLASSES = ("country-flag", "face-smiling", "heart", "food-fruit", "cat-face", "person", "place-map", "keycap", "time")
NUM, SCALE, QUALITY = 9, 3, 60  # of the WebP: most of the bytes are noise


def frames(name: str, place: Path) -> list:
    """The frames of one model."""
    saved = Checkpoint.open(ROOT / "models" / name)
    config = replace(saved.config, sample=replace(saved.config.sample, precision="float32"))
    classes = [saved.classes.index(each) for each in CLASSES]
    model = saved.model(torch.device("cpu"))
    return SampleFolder(place, saved, model, config, classes, scale=SCALE).frames(NUM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "film.webp")
    out: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory() as place:
        both = [frames(name, Path(place)) for name in MODELS.values()]
    pages = [side_by_side(dict(zip(MODELS, pair, strict=True)), columns=1) for pair in zip(*both, strict=True)]
    atomic.write_atomic(out, film(pages, "webp", quality=QUALITY, method=6))


if __name__ == "__main__":
    main()
