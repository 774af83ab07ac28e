"""Labels of images: from a `dataset.json`, as StyleGAN, EDM2 and REPA write it, or given as numbers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.config.strict_json import has_form
from dit_in_dit.data.names import left_out_clause, normalise_name

DATASET_JSON = "dataset.json"
WAY = "fix it, or rename it if it is not from StyleGAN, EDM2 or REPA"
MOST_CLASSES = 10_000_000  # as model.num_classes


def label_names(labels: list[int], count: int, what: str, known: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of `count` classes (0: the largest label plus one); UserError when a label is out of range."""
    count = count or max(labels) + 1
    if min(labels) < 0 or max(labels) >= min(count, MOST_CLASSES):
        raise UserError(
            f"labels of {what} must be from 0 to {min(count, MOST_CLASSES) - 1}: got {min(labels)} to {max(labels)}"
        )
    return tuple(known) or tuple(map(str, range(count)))


def find_table(names: Sequence[str], images: Sequence[str]) -> str | None:
    """The `dataset.json` that covers all images: in the folder that holds them all, or in one of its parents."""
    tables = (name for name in names if name.split("/")[-1] == DATASET_JSON)
    above = [name for name in tables if all(image.startswith(name.removesuffix(DATASET_JSON)) for image in images)]
    return min(above, key=len, default=None)


def table_labels(rows: Any, shown: str, folder: str, images: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Labels by image name from a table's `labels`, [["00000/img00000000.png", 6], ...], and a clause on unused labels.

    A null table gives no labels.

    Args:
        folder: the folder that the table's names are relative to, with a final `/`.

    Raises:
        UserError: the table has another form, an image has no label, or a class of the table has no image.
    """
    if rows is None:
        return {}, []
    if not has_form(rows, [list]) or not all(len(row) == 2 and has_form(row[:1], [str]) for row in rows):
        raise UserError(f"{shown}: labels must be [[NAME, CLASS NUMBER], ...] or null; {WAY}")
    if not has_form([row[1] for row in rows], [int]):
        raise UserError(f"{shown}: labels must be whole numbers, one per image; {WAY}")
    named = {folder + normalise_name(name.replace("\\", "/")): label for name, label in rows}
    if len(named) < len(rows):
        raise UserError(f"{shown} gives two labels to one image; {WAY}")
    if missing := [name for name in images if name not in named]:
        raise UserError(f"{shown} has no label for {len(missing)} images, such as {truncate(missing[0], 50)}; {WAY}")
    labels = {name: named.pop(name) for name in images}
    if lost := set(named.values()) - set(labels.values()):
        raise UserError(
            f"{shown} has labels of class {min(lost)}, but no image has this class: add images, or fetch the data again"
        )
    return labels, left_out_clause(named, f"labels of {DATASET_JSON} without an image")


def class_numbers(text: str, known: Sequence[str]) -> list[int]:
    """Class numbers from comma-separated names or numbers. Names may contain commas: the longest match counts.
    Surrounding spaces and Unicode normalisation do not matter. A name that is no class, but the part of class names up
    to a hyphen, such as `animal` of `animal-bird` and `animal-bug`, stands for all of these."""
    names: dict[str, int] = {}
    for number, name in enumerate(known):
        names.setdefault(_plain(name), number)
    most = 1 + max((name.count(",") for name in names), default=0)  # most comma-separated parts of a name
    parts, numbers, start = text.split(","), [], 0
    while start < len(parts):
        ends = range(min(len(parts), start + most), start + 1, -1)
        end = next((end for end in ends if _plain(",".join(parts[start:end])) in names), start + 1)
        name, start = _plain(",".join(parts[start:end])), end
        if name in names:
            numbers.append(names[name])
        elif name.isdecimal() and len(name) < 10 and int(name) < len(known):
            numbers.append(int(name))
        elif members := [number for full, number in names.items() if name and full.startswith(f"{name}-")]:
            numbers += members
        else:
            raise UserError(f"unknown class {name!r}{did_you_mean(name, known)}")
    return numbers


def _plain(name: str) -> str:
    """A class name in the form used for comparison."""
    return unicodedata.normalize("NFC", name.strip())
