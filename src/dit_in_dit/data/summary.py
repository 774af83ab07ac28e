"""A look at images before a run: sizes, classes, counts and duplicates, and the config that fits them."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_in_dit.config import presets
from dit_in_dit.config.errors import LeftOutWarning
from dit_in_dit.config.files import replace_keys
from dit_in_dit.config.run import DataConfig, ModelConfig, RunConfig
from dit_in_dit.data.files import UnreadableError
from dit_in_dit.data.formats.latents import is_latents_folder, read_latents_index
from dit_in_dit.data.groups import SplitError
from dit_in_dit.data.nearest import nearest, shrink
from dit_in_dit.data.run_data import absolute_place
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import count_classes, open_source, source_kind
from dit_in_dit.reporting.images import image_grid, side_by_side, to_pixels

OWN = {32: "emoji", 64: "pixels-64", 128: "pixels-128"}  # side in pixels -> preset
FEW = 1000  # training images below which `small` is chosen (docs/presets.md)
SURVEYED = 4096  # most images whose size is read, and most of each part that are searched for duplicates
Decode = Callable[[Tensor], Tensor]


class Choice(NamedTuple):
    """A key that was chosen, its value, the reason, and the option that changes it."""

    key: str
    value: Any
    why: str
    change: str


@dataclass(frozen=True)
class Summary:
    """An opened source, (C, H, W) of its stored images, the config that fits, and the choices that led to it."""

    source: Source
    shapes: list[tuple[int, int, int]]
    config: RunConfig
    choices: list[Choice]

    def rows(self) -> list[list[Any]]:
        """Name, number of training images and number of held-out images of every class."""
        trained, held = (Counter(map(int, y)) for y in (self.source.labels, self.source.held_out_labels))
        endless = self.source.train_size is None
        return [[name, "endless" if endless else trained[n], held[n]] for n, name in enumerate(self.source.classes)]

    def sizes(self) -> str:
        """The stored sizes in a clause."""
        if not self.shapes:
            return "made at any size"
        areas = sorted((h * w, f"{h}x{w}") for _, h, w in self.shapes)
        least, most, middle = areas[0][1], areas[-1][1], areas[len(areas) // 2][1]
        grey = sum(shape[0] == 1 for shape in self.shapes)
        return (least if least == most else f"{least} to {most}, median {middle}") + f"; {grey} grey" * bool(grey)


class Duplicates(NamedTuple):
    """Copies in a source, and the held-out images that are nearest to a training image."""

    searched: tuple[int, int]  # numbers of training and held-out images that are compared, evenly spaced
    copies: tuple[int, int]  # of training and held-out images: those that equal an earlier one in every value
    median: float  # distance of a held-out image to its nearest training image: rms over pixels of range 2
    pairs: list[tuple[float, int, int]]  # distance, held-out number and training number; nearest first


def summarise_source(place: str, settings: Mapping[str, Any], base: RunConfig | None = None) -> Summary:
    """Look at a `data.source`, and choose the keys of a config that depend on it.

    Args:
        settings: values by dotted key that the user has set; they replace the chosen ones.
        base: the config whose data and number of classes are set; None: a preset is chosen too.

    Raises:
        UserError: nothing is at that place, or the images cannot be used.
    """
    given = {**settings, "data.source": absolute_place(place)}
    start = replace_keys(base or RunConfig(), {key: value for key, value in given.items() if key.startswith("data.")})
    kind = source_kind(start.data.source)
    shapes = kind.stored_shapes(start.data, SURVEYED)
    choices = [] if base else _choose_shape(shapes, fixed=kind.fixed_size)
    shape = {"model.image_size": start.model.image_size, "model.channels": start.model.channels}
    size, channels = ({**shape, **{c.key: c.value for c in choices}, **given}[key] for key in shape)
    model = ModelConfig(image_size=size, channels=channels, patch_size=1, num_classes=count_classes(start.data))
    source, data = _open(start.data, model, given)
    choices += _choose_data(source, start.data, data)
    if base is None:
        preset, more = _choose_preset(source, model, start.data.source)
        base, choices = presets.get(preset.value), [preset, *choices, *more]
    choices = [choice for choice in choices if choice.key not in given]
    chosen = {choice.key: choice.value for choice in choices if choice.key != "preset"}
    return Summary(source, shapes, replace_keys(base, {**chosen, **given}), choices)


def _choose_shape(shapes: Sequence[tuple[int, int, int]], *, fixed: bool) -> list[Choice]:
    """Size and channels: as stored, or the largest side of OWN that at least half of the images reach."""
    if fixed:
        channels, *size = shapes[0]
        return [Choice("model.image_size", size, "as stored", ""), Choice("model.channels", channels, "as stored", "")]
    sides, grey = [min(shape[1:]) for shape in shapes], bool(shapes) and all(shape[0] == 1 for shape in shapes)
    reached = [side for side in OWN if 2 * sum(have >= side for have in sides) >= len(sides)]
    side = max(reached, default=32) if sides else 64
    small, cropped = sum(have < side for have in sides), sum(h != w for _, h, w in shapes)
    why = f"of {len(sides)} images {small} are enlarged, {cropped} cropped to a square"
    other, colour = 32 if side == 64 else 64, ("all are grey", 1, 3) if grey else ("colour", 3, 1)
    return [
        Choice("model.image_size", [side, side], why, f"--set model.image_size={other}"),
        Choice("model.channels", colour[1], colour[0], f"--set model.channels={colour[2]}"),
    ]


def _choose_data(source: Source, before: DataConfig, now: DataConfig) -> list[Choice]:
    """Number of classes, and the data keys that had to change for the source to open."""
    count = len(source.classes)
    why = f"{', '.join(source.classes[:4])}{', ...' * (count > 4)}" if count > 1 else "one class: no labels"
    choices = [Choice("model.num_classes", count if count > 1 else 0, why, "--set model.num_classes=0")]
    if now.held_out != before.held_out:
        why = f"{before.held_out:g} of so few images is none or all"
        choices.append(Choice("data.held_out", now.held_out, why, "--set data.held_out=0.5"))
    if now.corrupt != before.corrupt:
        why = f"{len(source.skipped)} files cannot be read, such as {source.skipped[0]}"
        choices.append(Choice("data.corrupt", now.corrupt, why, "--set data.corrupt=error"))
    return choices


def _choose_preset(source: Source, model: ModelConfig, place: str) -> tuple[Choice, list[Choice]]:
    """The preset, and keys in which it is changed."""
    count, more = source.train_size, list[Choice]()
    if model.channels not in (1, 3):
        preset = Choice("preset", "dit-in-dit-s2", "latents", "--preset dit-in-dit-b2")
        flips = is_latents_folder(place) and read_latents_index(Path(place))["made"]["flips"]
        more.append(Choice("data.flip", flips, "mirror images are encoded" if flips else "no mirror images", ""))
    else:
        fits = OWN[min(OWN, key=lambda side: abs(math.log2(max(model.image_size) / side)))]
        preset = Choice("preset", fits, f"{count or 'endless'} training images of this size", "--preset small")
        if count is not None and count < FEW:
            preset = Choice("preset", "small", f"{count} training images, fewer than {FEW}", f"--preset {fits}")
    usual = max(1, min(presets.get(preset.value).model.patch_size, min(model.image_size) // 4))
    patch = next(p for p in range(usual, 0, -1) if not any(side % p for side in model.image_size))
    change = f"--set model.patch_size={max(1, patch // 2)}"
    return preset, [*more, Choice("model.patch_size", patch, "divides the size", change)]


def _open(data: DataConfig, model: ModelConfig, given: Mapping[str, Any]) -> tuple[Source, DataConfig]:
    """The source and its config. Unless they are given, data.corrupt and data.held_out change if it does not open."""
    while True:
        try:
            with warnings.catch_warnings(action="ignore", category=LeftOutWarning):  # the caller shows them
                return open_source(data, model), data
        except UnreadableError:
            if "data.corrupt" in given:
                raise
            data = replace(data, corrupt="skip")
        except SplitError:
            if "data.held_out" in given:
                raise
            data = replace(data, held_out=0.3 if 0 < data.held_out < 0.3 else 0.0)


def _spaced(count: int | None, most: int = SURVEYED) -> range:
    """At most `most` numbers below `count`, evenly spaced; None: the first `most`."""
    return range(most) if count is None else range(0, count, -(-count // most) or 1)


def _images(source: Source, numbers: Iterable[int], *, held_out: bool = False) -> Tensor:
    """Images (N, C, H, W) by number."""
    take = source.held_out if held_out else source.train
    return torch.from_numpy(np.stack([take(int(number))[0] for number in numbers]))


def draw_classes(source: Source, decode: Decode, *, classes: int = 16) -> Image.Image:
    """Eight training images of each class, at most `classes` of them, under the class names."""
    labels = source.labels if source.train_size is not None else np.array([source.train(n)[1] for n in range(256)])
    present = np.unique(labels)
    each, columns = (8, 4) if len(present) > 1 else (32, 8)
    pictures = {}
    for number in present[_spaced(len(present), classes)]:
        own = np.flatnonzero(labels == number)
        images = decode(_images(source, own[_spaced(len(own), each)]))
        pictures[source.classes[number][:36]] = image_grid(to_pixels(images), columns)
    return side_by_side(pictures, 4)


def find_duplicates(source: Source, most: int = 8) -> Duplicates:
    """Search evenly spaced images of both parts for copies and near pairs; of an endless source, the first ones."""
    numbers = _spaced(source.train_size), _spaced(source.held_out_size)
    seen, copies, small = set[bytes](), [0, 0], list[Tensor]()
    for part, chosen in enumerate(numbers):
        for number in chosen:
            image = _images(source, [number], held_out=part == 1)
            copies[part] += (content := image.numpy().tobytes()) in seen
            seen.add(content)
            small.append(shrink(image).flatten(1))
    if not numbers[1]:
        return Duplicates((len(numbers[0]), 0), (copies[0], 0), math.nan, [])
    distance, found = nearest(torch.cat(small[len(numbers[0]) :]), torch.cat(small[: len(numbers[0])]))
    pairs = [(float(distance[i]), numbers[1][i], numbers[0][found[i]]) for i in np.argsort(distance)[:most].tolist()]
    return Duplicates((len(numbers[0]), len(numbers[1])), (copies[0], copies[1]), float(np.median(distance)), pairs)


def draw_pairs(source: Source, pairs: Sequence[tuple[float, int, int]], decode: Decode) -> Image.Image:
    """Held-out images, each above its nearest training image, under rank and distance."""
    pictures = {}
    for rank, (distance, held, trained) in enumerate(pairs, 1):
        pair = torch.cat([_images(source, [held], held_out=True), _images(source, [trained])])
        pictures[f"{rank}: {distance:.3f}"] = image_grid(to_pixels(decode(pair)), 1)
    return side_by_side(pictures)
