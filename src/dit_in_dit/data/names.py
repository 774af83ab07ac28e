"""File names: which files are images, which class each image has, and checks that no class is lost."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Container, Iterable, Mapping
from posixpath import normpath

from dit_in_dit.config.errors import UserError, truncate

SUFFIXES: tuple[str, ...] = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp"),
    *(".bmp", ".tif", ".tiff", ".gif", ".avif"),
)
HIDDEN = re.compile(  # paths with a part that file managers or file systems leave behind
    r"(^|/)(\.[^/]*|__MACOSX|lost\+found|System Volume Information|\$RECYCLE\.BIN|@eaDir|#recycle"
    r"|(eh)?thumbs\.db|desktop\.ini|Icon\r)(/|$)",
    re.IGNORECASE,
)
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
MOST_LINKS = 40  # in a chain of links, as on Linux


def left_out_clause(names: Collection[str], what: str, texts: Iterable[str] = (), count: int = 0) -> list[str]:
    """A clause about things that are not read, if any: how many (`count`, where `names` are only examples), and two
    examples. `texts` are names of captions."""
    if not names:
        return []
    examples = [*names][:2]
    captions = " (captions)" if not {*examples}.isdisjoint(texts) else ""
    shown = ", ".join(truncate(name, 30) for name in examples)
    return [f"left out {what}: {count or len(names)}, such as {shown}{captions}"]


def normalise_name(name: str) -> str:
    """A member's name from the root of its archive, without empty parts and parts `.`; a folder keeps its final `/`."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/".join(parts) + "/" * (name.endswith("/") and bool(parts))


def common_folder(names: Iterable[str]) -> list[str]:
    """The path, from the root, of the folder that contains all class folders."""
    paths = [name.split("/")[:-1] for name in names]
    depth = 0
    while all(len(path) > depth + 1 and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    return paths[0][:depth]


def class_folders(names: list[str]) -> list[str]:
    """The class folder of each image: its first folder below the common folder, or `images` if there is no folder."""
    depth = len(common_folder(names))
    paths = [name.split("/")[depth:-1] for name in names]
    return [path[0] if path else "images" for path in paths]


def number_classes(folders: list[str]) -> tuple[tuple[str, ...], list[int]]:
    """The classes, sorted by name, and the label of each image. Names that differ only in their Unicode normal form
    (macOS writes NFD) are one class, sorted and shown by the first spelling.
    """
    first: dict[str, str] = {}
    for folder in sorted(set(folders)):
        first.setdefault(unicodedata.normalize("NFC", folder), folder)
    numbers = {form: number for number, form in enumerate(first)}
    labels = {folder: numbers[unicodedata.normalize("NFC", folder)] for folder in set(folders)}
    return tuple(first.values()), [labels[folder] for folder in folders]


def check_class_names(
    images: list[str], others: Iterable[str], place: str, *, packed: bool, linked: Container[str] = ()
) -> None:
    """Check that the classes of `place` are the folders that a person sees there.

    Args:
        others: all other names; names of folders end with `/`.
        packed: whether `place` is an archive, which has to be unpacked to name a folder in it.
        linked: folders that are links, which are not followed.

    Raises:
        UserError: the classes are splits, a name cannot be printed, or a class folder has no image. Without this error,
            later classes would get other labels.
    """
    wrapped = common_folder(images)
    depth = len(wrapped)
    paths = [path for name in images if len(path := name.split("/")) > depth + 1]
    classes = {path[depth] for path in paths}
    refuse_split_folders(
        classes, "/".join((place, *wrapped)), "unpack it and name one, {}" if packed else "name one, {}"
    )
    for name in sorted(classes):
        if not name.isprintable():
            raise UserError(
                f"class folder {truncate(repr(name))} of {truncate(place, 50)} cannot be printed: rename it"
            )
    without: dict[str, str] = {}  # folder -> a file in it
    for name in others:
        path = name.removesuffix("/").split("/")
        folder = name.endswith("/")
        if path[:depth] == wrapped and len(path) > depth + (not folder) and path[depth] not in classes:
            without[path[depth]] = without.get(path[depth]) or ("" if folder else path[-1])
    shift = "(skipping it would shift later labels)"
    for name, example in sorted(without.items()):
        shown = truncate("/".join((place, *wrapped, name)))
        if not example and "/".join((*wrapped, f"{name}/")) in linked:
            raise UserError(
                f"class folder {shown} is a link, and links to folders are not followed in an archive: pack its images "
                f"there, or remove it {shift}"
            )
        if not example:
            raise UserError(f"class folder {shown} is empty: fill it, or remove it {shift}")
        if classes:  # else the images have no class folders
            raise UserError(
                f"class folder {shown} holds {truncate(example, 30)}, but no image of a kind that is read: "
                f"convert it, or move the folder away {shift}"
            )


def refuse_split_folders(classes: Iterable[str], place: str, way: str = "name one, {}", pattern: str = "{}") -> None:
    """UserError when two or more of the classes in `place` are splits of a data set: the user means one split."""
    splits = sorted(name for name in classes if name.lower() in SPLIT_NAMES)
    if len({name.lower() for name in splits}) > 1:
        ways = " or ".join(truncate(f"{place}/{pattern.format(name)}", 50) for name in splits[:3])
        raise UserError(f"data.source: {truncate(place, 40)} holds splits, not classes: {way.format(ways)}")


def resolve_links(links: Mapping[str, str], files: Iterable[str]) -> dict[str, str]:
    """Resolve the links of an archive: link -> a file, a folder (with a final `/`), or an empty text if the target is
    not in the archive.

    Args:
        links: link -> the name that it points to, which may be a link or lie in a linked folder.
    """
    if not links:
        return {}
    known = {name: name for name in files}
    for name in list(known):
        while (name := name.rpartition("/")[0]) and name not in known:
            known[name] = f"{name}/"
    return {link: _end(target, known, links) for link, target in links.items()}


def _end(name: str, known: Mapping[str, str], links: Mapping[str, str]) -> str:
    for _ in range(MOST_LINKS):
        if name in known:
            return known[name]
        parts = name.split("/", MOST_LINKS)
        heads = ("/".join(parts[:end]) for end in range(1, len(parts) + 1))
        head = next((head for head in heads if head in links), None)
        if head is None:
            break
        name = links[head] + name[len(head) :]
    return ""


def link_target(name: str, target: str) -> str:
    """The target of a symbolic link, from the root of the archive; empty if the target is outside."""
    parts, steps = name.split("/")[:-1], normpath(target).split("/")
    up = steps.count("..")
    if target.startswith("/") or up > len(parts):
        return ""
    return "/".join([*parts[: len(parts) - up], *(step for step in steps[up:] if step != ".")])
