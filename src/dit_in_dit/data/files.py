"""Image files of a folder or .zip, with a folder per class or labels in a `dataset.json`."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.strict_json import parse_json
from dit_in_dit.data.groups import family
from dit_in_dit.data.labels import DATASET_JSON, WAY, find_table, label_names, table_labels
from dit_in_dit.data.names import (
    HIDDEN,
    SUFFIXES,
    check_class_names,
    class_folders,
    common_folder,
    left_out_clause,
    link_target,
    normalise_name,
    number_classes,
    resolve_links,
)
from dit_in_dit.data.picture import MOST_BYTES, UNREADABLE, Seen, apply_to_image

SAMPLES = "samples.json"
SHARD = re.compile(r"\d{5}/")  # a folder as the tools of StyleGAN and EDM2 number them
MOST_LINK = 4096  # bytes of a path


class ImageFiles:
    """The image files of a folder or .zip, by name.

    `notes` lists what is not read, one clause each. `kind` and `suffixes` name the files that are read.

    Raises:
        UserError: the path is neither a folder nor a .zip, no image is in it, a member's name points out of the
            archive, the `dataset.json` does not fit, or the classes would not be the folders that a person sees
            (names.check_class_names).
    """

    kind, suffixes = "images", SUFFIXES

    def __init__(self, path: Path, num_classes: int = 0) -> None:
        """`num_classes`: number of classes of a `dataset.json`; 0 means the largest label plus one."""
        self.path, self.num_classes = path, num_classes
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self._linked: set[str] = set()  # folders of an archive that are links
        self._members: dict[str, str] = {}  # of an archive: name -> stored name, where they differ
        shown = truncate(path, 60)
        names = sorted(name for name in self._list(shown) if not HIDDEN.search(name))
        if SAMPLES in names:  # a folder written by `sample`: its grid is no sample
            names = [name for name in names if name not in (SAMPLES, "grid.png")]
        self.names = [name for name in names if self._is_read(name)]
        if not self.names:
            raise UserError(f"data.source: no {', '.join(self.suffixes)} files in {shown}: name another place")
        others = [name for name in names if not self._is_read(name)]
        self.notes: list[str] = []
        self._labels = self._read_table(others)
        if self._labels is None and self.kind != "images":
            raise UserError(f"{shown} has no {DATASET_JSON}: copy it beside the folders of {self.kind}")
        if self._labels is None:
            check_class_names(self.names, others, str(path), packed=not path.is_dir(), linked=self._linked)
        captions = (f"{name.rpartition('.')[0]}.txt" for name in self.names)
        unread = [name for name in others if not name.endswith("/")]
        self.notes += left_out_clause(unread, f"files that are no {self.kind}", captions)

    def _is_read(self, name: str) -> bool:
        """Whether a file is read, by its name."""
        return name.lower().endswith(self.suffixes)

    def _list(self, shown: str) -> list[str]:
        """All names; names of folders end with `/`."""
        members, problem = None, ""
        try:
            if self.path.is_dir():
                return list(_names(self.path))
            if self.path.is_file():  # opening a pipe would wait
                members = self._read_directory()
        except UNREADABLE as error:
            problem = f"{truncate(getattr(error, 'strerror', None) or error, 60)}; "
        if members is None:
            raise UserError(f"data.source: {shown} is neither a folder nor a .zip: {problem}name a folder or .zip")
        return self._list_archive(members, shown)

    def _read_directory(self) -> list[tuple[str, str | None]]:
        """Stored name of each member of the archive, and the target of a symbolic link."""
        archive, members = self._open(), []
        for member in archive.infolist():
            linked = stat.S_ISLNK(member.external_attr >> 16) and member.file_size <= MOST_LINK
            members.append((member.filename, archive.read(member).decode(errors="replace") if linked else None))
        return members

    def _list_archive(self, members: list[tuple[str, str | None]], shown: str) -> list[str]:
        """All names of an archive. If several members have the same name, the last is used, as when the archive is
        unpacked.
        """
        names, links = dict[str, None](), dict[str, str]()
        for stored_name, target in members:
            name = stored_name.replace("\\", "/")  # some programs on Windows write backslashes
            if name.startswith("/") or ".." in name.split("/"):
                out = truncate(name, 40)
                raise UserError(f"data.source: {shown} holds {out!r}, which points out of the archive: rename it")
            if not (name := normalise_name(name)):  # the archive's root
                continue
            names[name] = None
            self._members[name] = stored_name
            if target is not None:
                links[name] = link_target(name, target)
        for name, end in resolve_links(links, names.keys() - links.keys()).items():
            if end in self._members and not end.endswith("/"):
                self._members[name] = self._members[end]
                if name.lower().endswith(SUFFIXES) and not end.lower().endswith(SUFFIXES):
                    names.pop(end, None)  # read as an image
            elif end:
                names[f"{name}/"] = names.pop(name)
                self._linked.add(f"{name}/")
        self._members = {name: member for name, member in self._members.items() if name != member}
        return list(names)

    def _read_table(self, others: list[str]) -> dict[str, int] | None:
        """The labels of a `dataset.json` (see table_labels); None without such a file. Its name is removed from
        `others`.
        """
        if (place := find_table(others, self.names)) is None:
            return None
        shown = truncate(self.path / place, 60)
        try:
            content = self.content(place)
        except UNREADABLE as error:
            raise UserError(f"cannot read {shown}: {truncate(error, 60)}; {WAY}") from None
        table = parse_json(content, shown, WAY)
        if not isinstance(table, dict) or "labels" not in table:
            if all(SHARD.match(name, len(place) - len(DATASET_JSON)) for name in self.names):
                raise UserError(f"{shown} has no labels, and folders such as 00000 are no classes: {WAY}")
            return None
        others.remove(place)
        labels, notes = table_labels(table["labels"], shown, place.removesuffix(DATASET_JSON), self.names)
        self.notes += notes
        return labels

    def _open(self) -> zipfile.ZipFile:
        """The archive, opened once per process: workers must not share a file position."""
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        return self._archive[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None}

    def content(self, name: str) -> bytes:
        """The stored bytes of one file; ValueError when it is too large or not a regular file."""
        if self.path.is_dir():
            path = self.path / name
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("not a file")
            size, read = status.st_size, path.read_bytes
        else:
            archive, member = self._open(), self._members.get(name, name)
            size, read = archive.getinfo(member).file_size, partial(archive.read, member)  # it reads at most `size`
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes, more than {MOST_BYTES}")
        return read()

    def inside(self) -> list[str]:
        """The names, in order, relative to the folder that contains all class folders."""
        start = sum(len(part) + 1 for part in common_folder(self.names))
        return [name[start:] for name in self.names]

    def sizes(self) -> list[int]:
        """The size of each file in bytes, in order; -1 if a file cannot be read."""
        if not self.path.is_dir():
            return [self._open().getinfo(self._members.get(name, name)).file_size for name in self.names]
        return [file_size(self.path / name) for name in self.names]

    def about(self, names: list[str]) -> tuple[tuple[str, ...], list[int], list[str]]:
        """The classes, and the labels and families of `names`."""
        families = [family(name) for name in names]
        if not self._labels:
            folders = class_folders(names) if self._labels is None else ["images"] * len(names)
            return *number_classes(folders), families
        labels = [self._labels[name] for name in names]
        return label_names(labels, self.num_classes, truncate(self.path, 60)), labels, families

    def open(self, name: str, look: Callable[[Image.Image], Seen]) -> Seen:
        """The result of `look` on one image; UserError with the file's name when the image cannot be decoded."""
        try:
            return apply_to_image(self.content(name), look)
        except UNREADABLE as error:
            problem = truncate(getattr(error, "strerror", None) or str(error) or type(error).__name__, 60)
        place, way = truncate(self.path / name, 60), "fix or remove the image, or set data.corrupt=skip"
        raise UserError(f"cannot read {place}: {problem}; {way}")


def file_size(path: Path) -> int:
    """The size of a file in bytes; -1 if the file cannot be read."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _names(root: Path) -> Iterator[str]:
    """Names of all files and folders below a folder; names of folders end with `/`. Links are followed, each once."""
    seen = {os.path.realpath(root)}

    def refuse(error: OSError) -> None:
        raise error  # an unreadable folder would be a missing class

    for folder, below, plain in os.walk(root, onerror=refuse, followlinks=True):
        place = Path(folder).relative_to(root)
        below[:] = [name for name in below if not HIDDEN.search(name)]  # may be unreadable
        yield from ((place / name).as_posix() for name in plain)
        yield from (f"{(place / name).as_posix()}/" for name in below)
        below[:] = [name for name in sorted(below) if os.path.realpath(Path(folder, name)) not in seen]
        seen |= {os.path.realpath(Path(folder, name)) for name in below}
