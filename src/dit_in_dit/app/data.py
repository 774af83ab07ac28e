"""Data: what a source holds, and the training images nearest to samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from dit_in_dit.api.model import Model
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import parse_assignment
from dit_in_dit.data.encode import open_decoder
from dit_in_dit.data.run_data import open_source_of
from dit_in_dit.data.summary import (
    SURVEYED,
    NearPairs,
    Summary,
    draw_classes,
    summarise_source,
    thumbnails,
)
from dit_in_dit.reporting.images import Pixels, to_pixels
from dit_in_dit.runtime.device import pick_device

MOST_CLASSES = 24  # most classes in the table
SEARCHED = 50_000  # most training images that are compared; SURVEYED of an endless source
BATCH = 256  # of them between two looks at the Stop button


def summary_of(place: str, sets: str) -> Summary:
    """The summary of a source, as `dit-in-dit data` makes it. Raises UserError."""
    if not place.strip():
        raise UserError("source is empty: name a folder, a .zip, hf:NAME, emoji or mosaic")
    return summarise_source(place.strip(), dict(map(parse_assignment, sets.split())))


def class_counts(summary: Summary) -> list[tuple[str, int]]:
    """Training images of each class, the largest class first."""
    if summary.source.train_size is None:
        return []
    counts = Counter(map(int, summary.source.labels))
    return [(summary.source.classes[number], count) for number, count in counts.most_common(MOST_CLASSES)]


def pictures_of(summary: Summary) -> Image.Image:
    """Training images of each class."""
    return draw_classes(summary.source, _decoder(summary.config))


def pairs_picture(summary: Summary, found: NearPairs) -> Image.Image | None:
    """Held-out images above their nearest training images; None without a held-out part."""
    return found.draw(summary.source, _decoder(summary.config)) if found.pairs else None


def nearest_training(
    model: Model, samples: Pixels, most: int = 3
) -> Iterator[tuple[int, int] | list[tuple[Pixels, list[str]]]]:
    """Numbers of compared and of all searched images, at last for each sample (N, H, W, C) its `most` nearest training
    images, and their numbers and distances (rms over pixels of range 2, at 32x32)."""
    source = open_source_of(model.folder, model.config)
    size = min(source.train_size or SURVEYED, SEARCHED)
    decode = _decoder(model.config)
    queries = thumbnails(samples).flatten(1)
    if model.config.data.flip:
        queries = torch.cat([queries, thumbnails(np.ascontiguousarray(samples[:, :, ::-1])).flatten(1)])
    best: list[list[tuple[float, int]]] = [[] for _ in samples]
    for start in range(0, size, BATCH):
        yield start, size
        numbers = range(start, min(size, start + BATCH))
        base = _small(source, numbers, decode)
        apart = torch.cdist(queries.double(), base.double()).reshape(-1, len(samples), len(base)).amin(0)
        for own, row in zip(best, (apart / base.shape[1] ** 0.5).tolist(), strict=True):
            own[:] = sorted([*own, *zip(row, numbers, strict=True)])[:most]
    found = []
    for own in best:
        images = decode(torch.from_numpy(np.stack([source.train(number)[0] for _, number in own])))
        found.append((to_pixels(images), [f"{source.title(number)}: {far:.3f}" for far, number in own]))
    yield found


def _small(source: Any, numbers: range, decode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    images = decode(torch.from_numpy(np.stack([source.train(number)[0] for number in numbers])))
    return thumbnails(to_pixels(images)).flatten(1)


def _decoder(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return open_decoder(config.data, pick_device("cpu")) or (lambda images: images)
