"""A look at images before a run: their sizes, classes, copies and near pairs, and the config that fits them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dit_in_dit.config import presets
from dit_in_dit.config.errors import LeftOutWarning, UserError
from dit_in_dit.config.files import replace_keys
from dit_in_dit.config.run import DataConfig, ModelConfig, RunConfig
from dit_in_dit.data.formats.latents import LatentSource
from dit_in_dit.data.run_data import absolute_place
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import count_classes, open_source, source_kind
from dit_in_dit.reporting.images import Pixels, image_grid, side_by_side, to_pixels

OWN = {32: "emoji", 64: "pixels-64", 128: "pixels-128"}  # side in pixels -> preset
FEW = 1000  # training images below which `small` is chosen (docs/presets.md)
SURVEYED = 4096  # most images whose size is read, and most of each part that are searched for near pairs
BETWEEN = 256  # images between two reports of the search for near pairs
SIDE = 32  # longest side of an image that is compared, in pixels; larger ones are averaged down
BLOCK = 2**26  # most distances in memory
Decode = Callable[[Tensor], Tensor]
Choice = tuple[str, Any, str, str]  # key, value, reason, and the option that changes it


class Summary(NamedTuple):
    """An opened source, (C, H, W) of its stored images, the config that fits, and the choices that led to it."""

    source: Source
    shapes: list[tuple[int, int, int]]
    config: RunConfig
    choices: list[Choice]


def summarise_source(place: str, settings: Mapping[str, Any], base: RunConfig | None = None) -> Summary:
    """Look at a `data.source`, and choose the keys of a config that depend on it. Raises UserError.

    Args:
        settings: values by dotted key that the user has set; they replace the chosen ones.
        base: the config whose data and number of classes are set; None: a preset is chosen too.
    """
    given = {**settings, "data.source": absolute_place(place)}
    start = replace_keys(base or RunConfig(), {key: value for key, value in given.items() if key.startswith("data.")})
    kind = source_kind(start.data.source)
    shapes = kind.stored_shapes(start.data, SURVEYED)
    shape = {"model.image_size": start.model.image_size, "model.channels": start.model.channels}
    choices = [] if base else _choose_shape(shapes, fixed=kind.fixed_size)
    size, channels = ({**shape, **{key: value for key, value, *_ in choices}, **given}[key] for key in shape)
    model = ModelConfig(image_size=size, channels=channels, patch_size=1, num_classes=count_classes(start.data))
    flip = start.data.flip or (base is None and issubclass(kind, LatentSource) and "data.flip" not in given)
    source, data = _open(replace(start.data, flip=flip), model, given)
    if kind.fixed_size and not model.num_classes and len(source.classes) > 1:  # else all labels are 0
        source, data = _open(data, replace(model, num_classes=len(source.classes)), given)
    count, names = len(source.classes), ", ".join(source.classes[:4])
    names = f"{names}{', ...' * (count > 4)}" if count > 1 else "one class: no labels"
    choices.append(("model.num_classes", count if count > 1 else 0, names, "--set model.num_classes=0"))
    if data.held_out != start.data.held_out:
        choices.append(("data.held_out", data.held_out, "so few images", "--set data.held_out=0.5"))
    if data.corrupt != start.data.corrupt:
        bad = f"{len(source.skipped)} files cannot be read, such as {source.skipped[0]}"
        choices.append(("data.corrupt", data.corrupt, bad, "--set data.corrupt=error"))
    if base is None:
        named, *more = _choose_preset(source, model, flip=data.flip)
        base, choices = presets.get(named[1]), [named, *choices, *more]
    choices = [choice for choice in choices if choice[0] not in given]
    chosen = {key: value for key, value, *_ in choices if key != "preset"}
    return Summary(source, shapes, replace_keys(base, {**chosen, **given}), choices)


def _choose_shape(shapes: Sequence[tuple[int, int, int]], *, fixed: bool) -> list[Choice]:
    """Size and channels: as stored, or the largest side of OWN that at least half of the images reach."""
    if fixed:
        channels, *size = shapes[0]
        return [("model.image_size", size, "as stored", ""), ("model.channels", channels, "as stored", "")]
    sides = [min(shape[1:]) for shape in shapes]
    reached = [side for side in OWN if 2 * sum(have >= side for have in sides) >= len(sides)]
    side = max(reached, default=32) if sides else 64
    small, cropped = sum(have < side for have in sides), sum(h != w for _, h, w in shapes)
    why = f"of {len(sides)} images {small} are enlarged, {cropped} cropped to a square"
    grey = bool(shapes) and all(shape[0] == 1 for shape in shapes)
    return [
        ("model.image_size", [side, side], why, f"--set model.image_size={32 if side == 64 else 64}"),
        ("model.channels", 1 if grey else 3, "grey" if grey else "colour", f"--set model.channels={3 if grey else 1}"),
    ]


def _choose_preset(source: Source, model: ModelConfig, *, flip: bool) -> list[Choice]:
    """The preset, and keys in which it is changed."""
    if model.channels not in (1, 3):
        choices: list[Choice] = [("preset", "dit-in-dit-s2", "latents", "--preset dit-in-dit-b2")]
        choices.append(("data.flip", flip, f"{'' if flip else 'no '}mirror images are stored", ""))
    else:
        size, count = max(model.image_size), source.train_size
        fits = OWN[min(OWN, key=lambda side: abs(math.log2(size / side)))]
        choices = [("preset", fits, f"{size} pixels, {count or 'endless'} training images", "--preset small")]
        if count is not None and count < FEW:
            choices = [("preset", "small", f"{count} training images, fewer than {FEW}", f"--preset {fits}")]
    usual = min(presets.get(choices[0][1]).model.patch_size, max(1, min(model.image_size) // 4))
    patch = next(p for p in range(usual, 0, -1) if not any(side % p for side in model.image_size))
    change = f"--set model.patch_size={max(1, patch // 2)}"
    return [*choices, ("model.patch_size", patch, "divides the size", change)]


def _open(data: DataConfig, model: ModelConfig, given: Mapping[str, Any]) -> tuple[Source, DataConfig]:
    """The source and its config. Unless they are given, data.corrupt and data.held_out change if it does not open."""
    while True:
        try:
            with warnings.catch_warnings(action="ignore", category=LeftOutWarning):  # the caller shows them
                return open_source(data, model), data
        except UserError as error:  # its way out is taken
            if "set data.corrupt=skip" in str(error) and "data.corrupt" not in given:
                data = replace(data, corrupt="skip")
            elif "set data.flip=false" in str(error) and "data.flip" not in given:
                data = replace(data, flip=False)
            elif "(0 holds none out)" in str(error) and data.held_out and "data.held_out" not in given:
                data = replace(data, held_out=0.3 if 0 < data.held_out < 0.3 else 0.0)
            else:
                raise


def _spaced(count: int | None, most: int = SURVEYED) -> range:
    """At most `most` numbers below `count`, evenly spaced; None: the first `most`."""
    return range(most) if count is None else range(0, count, -(-count // most) or 1)


def _images(source: Source, numbers: Iterable[int], *, held_out: bool = False) -> Tensor:
    take = source.held_out if held_out else source.train
    return torch.from_numpy(np.stack([take(int(number))[0] for number in numbers]))


def draw_classes(source: Source, decode: Decode, *, classes: int = 16) -> Image.Image:
    """Eight training images of each class, at most `classes` of them, under the class names."""
    labels = source.labels if source.train_size is not None else np.array([source.train(n)[1] for n in range(256)])
    present, pictures = np.unique(labels), {}
    each, columns = (8, 4) if len(present) > 1 else (32, 8)
    for number in present[_spaced(len(present), classes)]:
        own = np.flatnonzero(labels == number)
        images = decode(_images(source, own[_spaced(len(own), each)]))
        pictures[source.classes[number][:36]] = image_grid(to_pixels(images), columns)
    return side_by_side(pictures, 4)


class NearPairs(NamedTuple):
    """The held-out images that are nearest to a training image, nearest first, and copies among all images."""

    searched: tuple[int, int]  # training and held-out images, evenly spaced
    copies: tuple[int, int]  # training and held-out images that equal an earlier one in every value
    pairs: list[tuple[float, int, int]]  # distance (rms over pixels of range 2), held-out and training number

    def draw(self, source: Source, decode: Decode) -> Image.Image:
        """Held-out images, each above its nearest training image, under rank and distance."""
        pictures = {}
        for rank, (distance, held, trained) in enumerate(self.pairs, 1):
            pair = torch.cat([_images(source, [held], held_out=True), _images(source, [trained])])
            pictures[f"{rank}: {distance:.3f}"] = image_grid(to_pixels(decode(pair)), 1)
        return side_by_side(pictures)


def near_pairs(source: Source, most: int = 8) -> NearPairs:
    """Search evenly spaced images of both parts; of an endless source, the first ones."""
    *_, found = search_pairs(source, most)
    assert isinstance(found, NearPairs)
    return found


def search_pairs(source: Source, most: int = 8) -> Iterator[tuple[int, int] | NearPairs]:
    """As `near_pairs`: numbers of read and of all searched images, now and then, at last the pairs."""
    numbers = _spaced(source.train_size), _spaced(source.held_out_size)
    seen, copies, small = set[bytes](), [0, 0], list[Tensor]()
    for part, chosen in enumerate(numbers):
        for number in chosen:
            if len(small) % BETWEEN == 0:
                yield len(small), sum(map(len, numbers))
            image = _images(source, [number], held_out=part == 1)
            copies[part] += (content := image.numpy().tobytes()) in seen
            seen.add(content)
            small.append(shrink(image).flatten(1))
    first, pairs = len(numbers[0]), list[tuple[float, int, int]]()
    if numbers[1]:
        distance, found = nearest(torch.cat(small[first:]), torch.cat(small[:first]))
        order = np.argsort(distance)[:most].tolist()
        pairs = [(float(distance[i]), numbers[1][i], numbers[0][found[i]]) for i in order]
    yield NearPairs((first, len(numbers[1])), (copies[0], copies[1]), pairs)


def shrink(images: Tensor) -> Tensor:
    """Images or latents (N, C, H, W), averaged down to at most SIDE pixels a side."""
    factor = max(1, max(images.shape[2:]) / SIDE)
    height, width = (max(1, round(side / factor)) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images, (height, width))


def thumbnails(images: Pixels) -> Tensor:
    """uint8 (N, H, W, C) as images (N, C, h, w) in [-1, 1], of at most SIDE pixels a side."""
    return shrink(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)


def nearest(queries: Tensor, base: Tensor, *, itself: bool = False) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Distance (N,) and number (N,) of the row of `base` nearest to each query; with `itself`, query i is row i and
    only other rows count."""
    norms = base.square().sum(1)
    rows = max(1, BLOCK // len(base))
    numbers = []
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows]
        squares = norms - 2 * block @ base.T  # less the query's own norm: the same order
        if itself:
            squares[torch.arange(len(block)), torch.arange(start, start + len(block))] = torch.inf
        numbers.append(squares.argmin(1))
    number = torch.cat(numbers)
    # Computed again from the difference: the expanded square loses small distances.
    distances = [(q.double() - base[n].double()).square().mean().sqrt() for q, n in zip(queries, number, strict=True)]
    return torch.stack(distances).numpy(), number.numpy()
