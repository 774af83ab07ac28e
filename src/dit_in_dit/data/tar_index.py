"""The index of a tar file: offsets of its images, computed once and stored beside the file."""

from __future__ import annotations

import json
import os
import tarfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.strict_json import has_form, read_json
from dit_in_dit.data.names import HIDDEN, SUFFIXES, link_target, normalise_name, resolve_links
from dit_in_dit.runs import atomic

VERSION = 3  # of the index files
BLOCK = tarfile.BLOCKSIZE
CHUNK = 2**20  # bytes of zeros at a time
TAR_INDEX = ".index.json"  # suffix of a shard's name
FORM = {
    **{"images": [list], "labels": dict, "others": int, "examples": [str]},
    **{"folders": [str], "linked": [str], "trailing": int},
}


def example_key(name: str) -> str:
    """The key that the files of one example share: the name up to the first dot after the last slash."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def extension(name: str) -> str:
    """The name after the first dot that follows the last slash, in lower case."""
    return PurePosixPath(name).name.partition(".")[2].lower()


def read_tar_index(shard: Path) -> dict[str, Any]:
    """The index of a shard, stored beside it, or in the user's cache if the folder is read-only.

    The index is computed again when the shard's size or modification time has changed.

    Returns:
        images: [[name, offset, size]]; offset -1 for an image that cannot be read in place.
        labels: {key of an example: number}.
        others, examples: number of other members, and two of their names.
        folders, linked: all folders, and the folders that are links.
        trailing: number of bytes after the end mark that are not a tar.
    """
    state = shard.stat()
    identity = {"version": VERSION, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-in-dit" / "tars"
    cached = cache / f"{sha256(os.fsencode(shard.resolve())).hexdigest()}.json"
    places = (shard.with_name(f"{shard.name}{TAR_INDEX}"), cached)
    for place in places:
        with suppress(UserError):  # none yet, or truncated: computed below
            index = read_json(place)
            if {name: index.get(name) for name in identity} == identity and _is_index(index, state.st_size):
                return index
    index = {**identity, **_walk(shard, state.st_size)}
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_atomic(place, json.dumps(index))
            break
    return index


def _is_index(index: dict[str, Any], length: int) -> bool:
    """Whether a stored index has the form of `_walk`'s, for a shard of `length` bytes."""
    return (
        has_form(index, FORM)
        and has_form(list(index["labels"].values()), [int])
        and all(len(row) == 3 and has_form(row[0], str) and has_form(row[1:], [int]) for row in index["images"])
        and all(at >= -1 and size >= 0 and at + size <= length for _, at, size in index["images"])
    )


def _walk(shard: Path, length: int) -> dict[str, Any]:
    """The index of a tar file, from its headers; UserError when it is no tar file or is truncated.

    A file may hold several archives, one after another (`cat a.tar b.tar`). If several members have the same name, the
    last is used, as when the file is unpacked. Bytes that follow an end mark and do not begin with a tar header are
    counted, not read.
    """
    members = _Members()
    try:
        with shard.open("rb") as file:
            start = _skip_zeros(file, members.read(file, 0, shard), length)
            while _is_header(file, start):
                start = _skip_zeros(file, members.read(file, start, shard), length)
            return {**members.index(file, shard), "trailing": length - start}
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.source: {truncate(shard, 60)} is not a plain .tar: {truncate(error, 70)}; unpack or fix it"
        ) from None


def _skip_zeros(file: BinaryIO, end: int, length: int) -> int:
    """Offset of the next archive in a file, after the zeros from `end` on; the file's length if there is none."""
    for start in range(end, length, CHUNK):
        file.seek(start)
        chunk = file.read(CHUNK)
        if rest := chunk.lstrip(b"\0"):
            return start + (len(chunk) - len(rest)) // BLOCK * BLOCK
    return length


def _is_header(file: BinaryIO, start: int) -> bool:
    """Whether a tar header, and so an archive, begins at `start`."""
    file.seek(start)
    with suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(file.read(BLOCK), tarfile.ENCODING, "surrogateescape")
        return True
    return False


class _Members:
    """The members of all archives in one file: offsets of files, targets of links."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, int]] = {}  # offset (-1 for links and what cannot be read in place) and size
        self.links: dict[str, str] = {}
        self.folders: set[str] = set()
        self.twice: list[str] = []

    def read(self, file: BinaryIO, start: int, shard: Path) -> int:
        """Read the archive that begins at `start` and return its end; UserError when it is truncated."""
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                self._add(member)
            end = archive.offset
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise UserError(
                f"data.source: {truncate(shard, 60)} is truncated: at byte {end} there is neither a member nor a tar's "
                "end mark; download it again"
            )
        return end

    def _add(self, member: tarfile.TarInfo) -> None:
        name = normalise_name(member.name)
        if not name:
            return
        if member.isdir():
            self.folders.add(name)
            return
        if name in self.files and member.islnk() and normalise_name(member.linkname) == name:
            return  # the same file, stored once more
        if name in self.files:
            self.twice.append(name)
            self.links.pop(name, None)
        self.files[name] = (member.offset_data, member.size) if member.isreg() and not member.issparse() else (-1, 0)
        if member.islnk():
            self.links[name] = normalise_name(member.linkname)
        elif member.issym():
            self.links[name] = link_target(name, member.linkname)

    def index(self, file: BinaryIO, shard: Path) -> dict[str, Any]:
        """The index (see read_tar_index) with links resolved."""
        ends = resolve_links(self.links, self.files.keys() - self.links.keys())
        linked = []
        for name, end in ends.items():
            if end.endswith("/"):
                del self.files[name]
                self.folders.add(name)
                linked.append(f"{name}/")
            else:
                self.files[name] = self.files.get(end, (-1, 0))
        seen = [name for name in self.files if not HIDDEN.search(name)]  # links may lead to others
        read = {end for name, end in ends.items() if name.lower().endswith(SUFFIXES)}
        others = [name for name in seen if not name.lower().endswith((*SUFFIXES, ".cls")) and name not in read]
        others += self.twice
        labels = [name for name in seen if extension(name) == "cls"]
        parents = {name.rpartition("/")[0]: name for name in others}
        return {
            "images": [(name, *self.files[name]) for name in seen if name.lower().endswith(SUFFIXES)],
            "labels": {example_key(name): _label(file, self.files[name], shard, name) for name in labels},
            "others": len(others),
            "examples": others[:2],
            "linked": linked,
            "folders": sorted({f"{name}/" for name in self.folders if not HIDDEN.search(name)} | set(parents.values())),
        }


def _label(file: BinaryIO, place: tuple[int, int], shard: Path, name: str) -> int:
    """The number in a `.cls` file."""
    offset, size = place
    text = os.pread(file.fileno(), min(size, 32), max(offset, 0)).decode("ascii").strip()
    if not text.isdecimal():
        raise UserError(f"{truncate(shard, 60)}: {truncate(name)} must hold a class number: got {text[:20]!r}")
    return int(text)
