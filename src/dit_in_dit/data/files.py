"""Image files of a folder or .zip, one folder per class."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from dit_in_dit.data.families import family
from dit_in_dit.data.picture import MOST_BYTES, UNREADABLE, Seen, look_at
from dit_in_dit.mistakes import UserError, shortened

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX/)")  # what file managers leave behind


class ImageFiles:
    """The image files of a folder or .zip, by name.

    Raises:
        UserError: it is neither, has no image, a name in it points out of it, or a class folder is empty (the next
            class would take its number) or has a name that cannot be printed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        shown = shortened(path, 60)
        try:
            if path.is_dir():
                found = list(_names(path))
            elif path.is_file():
                found = self._open().namelist()
            else:  # a pipe would be waited for
                raise UserError(f"data.source: {shown} is neither a folder nor a .zip: name one")
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            if isinstance(error, UserError):
                raise
            problem = shortened(getattr(error, "strerror", None) or error, 60)
            raise UserError(f"data.source: {shown} is neither a folder nor a .zip: {problem}; name one") from None
        for name in found:
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                out = shortened(name, 40)
                raise UserError(f"data.source: {shown} holds {out!r}, which points out of it: rename it")
        names = sorted(name for name in found if not HIDDEN.search(name))
        self.names = [name for name in names if name.lower().endswith(SUFFIXES)]
        if not self.names:
            raise UserError(f"data.source: no {', '.join(SUFFIXES)} files in {shown}: name another place")
        self._check_classes(names)

    def _check_classes(self, names: list[str]) -> None:
        """UserError when a folder beside those of the classes is empty, or a class has no name to print."""
        wrapper, classes = _wrapper(self.names), set(class_folders(self.names))
        depth, folders = len(wrapper) + 1, {name for name in names if name.endswith("/")}
        inside = [parts for name in names if (parts := PurePosixPath(name).parts)[: len(wrapper)] == wrapper]
        filled = classes | {parts[depth - 1] for parts in inside if len(parts) > depth}
        for parts in inside:
            if len(parts) == depth and parts[-1] not in filled and "/".join(parts) + "/" in folders:
                folder = shortened(self.path / PurePosixPath(*parts))
                raise UserError(f"class folder {folder} is empty: fill it, or remove it (later classes would move up)")
        for name in classes:
            if not name.isprintable():
                raise UserError(
                    f"class folder {shortened(repr(name))} of {shortened(self.path, 50)} cannot be printed: rename it"
                )

    def _open(self) -> zipfile.ZipFile:
        """The archive, opened once per process: a file position must not be shared by workers."""
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), zipfile.ZipFile(self.path))
        return self._archive[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None}

    def content(self, name: str) -> bytes:
        """One file as it is stored; ValueError when it is too long, or none (a pipe or device has no end)."""
        if self.path.is_dir():
            path = self.path / name
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("not a file")
            size, read = found.st_size, path.read_bytes
        else:
            archive = self._open()
            size, read = archive.getinfo(name).file_size, lambda: archive.read(name)  # never more than it says
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes, more than {MOST_BYTES}")
        return read()

    def inside(self) -> list[str]:
        """The names, in order, below what wraps all class folders, in Unicode's form NFC."""
        wrapper = "".join(f"{part}/" for part in _wrapper(self.names))
        return [unicodedata.normalize("NFC", name.removeprefix(wrapper)) for name in self.names]

    def sizes(self) -> list[int]:
        """The bytes of each file, in order; -1 for one that cannot be looked at."""
        if not self.path.is_dir():
            return [self._open().getinfo(name).file_size for name in self.names]
        return [file_size(self.path / name) for name in self.names]

    def about(self, names: list[str]) -> tuple[tuple[str, ...], list[int], list[str]]:
        """The classes, and the label and family of each of `names`."""
        folders = class_folders(names)
        classes = tuple(sorted(set(folders)))
        numbers = {name: number for number, name in enumerate(classes)}
        return classes, [numbers[folder] for folder in folders], [family(name) for name in names]

    def open(self, name: str, look: Callable[[Image.Image], Seen]) -> Seen:
        """What `look` makes of one image; UserError with its name when it cannot be decoded."""
        try:
            return look_at(self.content(name), look)
        except UNREADABLE as error:
            problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        place = shortened(self.path / name, 60)
        raise UserError(f"cannot read {place}: {shortened(problem, 60)}; mend or remove it, or set data.corrupt=skip")


def file_size(path: Path) -> int:
    """The bytes of a file; -1 where it cannot be looked at."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _names(root: Path) -> Iterator[str]:
    """Names of all files below a folder, and of folders with a `/` at the end; through links too, each folder once."""
    seen = {os.path.realpath(root)}

    def refuse(error: OSError) -> None:
        raise error  # a folder that cannot be listed would be a class less

    for folder, below, plain in os.walk(root, onerror=refuse, followlinks=True):
        place = Path(folder).relative_to(root)
        yield from ((place / name).as_posix() for name in plain)
        yield from (f"{(place / name).as_posix()}/" for name in below)
        below[:] = [name for name in sorted(below) if os.path.realpath(Path(folder, name)) not in seen]
        seen |= {os.path.realpath(Path(folder, name)) for name in below}


def _wrapper(names: list[str]) -> tuple[str, ...]:
    """The folders that wrap all class folders."""
    paths = [PurePosixPath(name).parts[:-1] for name in names]
    depth = 0
    while all(len(path) > depth + 1 and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    return paths[0][:depth]


def class_folders(names: list[str]) -> list[str]:
    """The class folder of each image: its first, below a folder that wraps everything; `images` for none."""
    depth = len(_wrapper(names))
    paths = [PurePosixPath(name).parts[depth:-1] for name in names]
    return [path[0] if path else "images" for path in paths]
