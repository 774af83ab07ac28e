"""The data of a run: recorded with its checkpoints, located again, and compared by digest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import DataConfig, RunConfig
from dit_in_dit.data.source import Source
from dit_in_dit.data.source_checks import check_opened
from dit_in_dit.data.sources import check_class_count, open_source, path_in, source_kind
from dit_in_dit.reporting.images import to_pixels
from dit_in_dit.runs import checkpoint

SEARCHED = 200  # images of an endless source that are searched for images of each class
OBJECT = "object:"  # prefix of the class of a source given to train()


def qualified_name(thing: object) -> str:
    """Module and name of an object's class."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def find_source(
    config: RunConfig, given: str | Source | None, noted: Mapping[str, str] | None
) -> tuple[Source, dict[str, str]]:
    """The images to train on and their record, from the given source or place; without one, from the place in the
    config or in a checkpoint's record.
    """
    if isinstance(given, Source):
        place = f"{OBJECT}{qualified_name(given)}"
        check_opened(given, config.model)
        check_class_count(given, place, config.model)
        return given, {"digest": given.digest, "place": place}
    data = replace(config.data, source=given) if given else find_moved_data(config.data, noted)
    source = open_source(data, config.model)
    return source, data_record(source, data)


def open_source_of(run: Path, config: RunConfig) -> Source:
    """The data of a run, at their current place.

    Raises:
        UserError: the data cannot be opened, or have changed since the run was trained.
    """
    noted = checkpoint.recorded_data(run)
    data = find_moved_data(config.data, noted)
    if data.source.startswith(OBJECT):
        raise UserError(
            f"{truncate(run, 60)} was trained on a source given to train(), {data.source.removeprefix(OBJECT)}: "
            "register its class, and resume with train --resume --data NAME"
        )
    try:
        source = open_source(data, config.model)
    except UserError as error:
        raise UserError(f"the data of {truncate(run, 60)}: {error}") from None
    if noted:
        check_unchanged(data_record(source, data), noted, str(run))
    return source


def data_record(source: Source, data: DataConfig) -> dict[str, str]:
    """A checkpoint's record of its images: their digest, and their place with an absolute path."""
    return {"digest": source.digest, "place": absolute_place(data.source)}


def absolute_place(place: str) -> str:
    """A `data.source` with an absolute path, if it names an existing one."""
    path = path_in(place)
    return place.removesuffix(path) + os.path.abspath(path) if _is_here(place) else place


def find_moved_data(data: DataConfig, noted: Mapping[str, str] | None) -> DataConfig:
    """The data's config. Its place is taken from `noted`, a checkpoint's record, if the config's relative path does not
    exist in this working folder, or if the record names another kind of source than the config.
    """
    if not noted:
        return data
    place, kind = noted["place"], noted["place"].partition(":")[0]
    given = place.startswith(OBJECT) or (path_in(place) != place and kind != data.source.partition(":")[0])
    if not given and (not path_in(data.source) or _is_here(data.source)):
        return data
    return replace(data, source=place)


def check_unchanged(data: Mapping[str, str], noted: Mapping[str, str] | None, what: str) -> None:
    """Compare the record of a run's data with the record in its checkpoint, if there is one.

    Raises:
        UserError: the images have changed since `what` was trained on them.
    """
    if noted and data["digest"] != noted["digest"]:
        raise UserError(
            f"{truncate(data['place'], 60)} changed since {truncate(what, 60)} was trained on it: put the images "
            "back, give their new place (train --resume --data PLACE) or begin a new run (--init)"
        )


def _is_here(source: str) -> bool:
    """Whether the path in a `data.source` exists from this working folder."""
    path = path_in(source)
    if not path or Path(path).exists():
        return bool(path)
    try:
        return path == source and source_kind(source).by_path  # a pattern such as train-{000..009}.tar
    except UserError:
        return False


def images_of_classes(config: RunConfig, labels: list[int]) -> NDArray[np.uint8]:
    """A training image for each label (any image if a class has none). Images repeat only if a class has too few."""
    source = open_source(config.data, config.model)
    if source.train_size is None:  # endless
        known = np.array([source.train(number)[1] for number in range(SEARCHED)])
    else:
        known = source.labels
    turns: Counter[int] = Counter()
    images = []
    for y in labels:
        of_class = np.flatnonzero(known == y) if config.model.num_classes else np.empty(0, int)
        if not len(of_class):
            of_class = np.arange(len(known))
        images.append(source.train(int(of_class[turns[y] * len(of_class) // len(labels) % len(of_class)]))[0])
        turns[y] += 1
    return to_pixels(torch.from_numpy(np.stack(images)))
