"""Images in tar files (WebDataset's shards), each read where it lies: image number i needs no pass over the others."""

from __future__ import annotations

import json
import os
import re
import tarfile
from contextlib import suppress
from glob import glob
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from dit_in_dit import atomic
from dit_in_dit.config import UserError
from dit_in_dit.data.families import family, label_names
from dit_in_dit.data.files import HIDDEN, SUFFIXES, ImageFiles, class_folders

VERSION = 1  # of the index files
BLOCK = tarfile.BLOCKSIZE
MOST_SHARDS = 100_000


def find(source: str) -> list[Path]:
    """The shards that a source names, in order; none when it names something else.

    `shards/train-{0000..0146}.tar` (all must be there), `shards/train-*.tar`, one `.tar`, or a folder with nothing
    but `.tar` files and what belongs to them.
    """
    path = Path(source)
    if path.is_dir():
        inside = sorted(path.iterdir())
        alone = not any(found.is_dir() or found.name.lower().endswith(SUFFIXES) for found in inside)
        return [found for found in inside if found.suffix == ".tar"] if alone else []
    if not source.endswith(".tar"):
        return []
    if numbers := re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", source):
        first, last = numbers.groups()
        if int(last) - int(first) >= MOST_SHARDS:
            raise UserError(f"data.source: at most {MOST_SHARDS} shards: {source} names more; count them again")
        named = [f"{i:0{len(first)}d}".join(source.split(numbers[0], 1)) for i in range(int(first), int(last) + 1)]
    else:
        named = sorted(glob(source)) or [source]
    missing = next((name for name in named if not Path(name).is_file()), None)
    if missing or not named:
        raise UserError(f"data.source: no such file: {missing or source}")
    return [Path(name) for name in named]


class TarFiles(ImageFiles):
    """The images of tar files, in the order of the files and within them.

    The label of `a/b.jpg` is the number in `a/b.cls`; where no shard has a `.cls`, its class is its folder, and where
    there is no folder either, its shard (as in ImageNet's own archives, one per class). Its family is its
    name up to the first `~`, as that of a file in a folder.
    """

    def __init__(self, source: str, shards: list[Path], num_classes: int) -> None:
        self.path, self.num_classes = Path(source), num_classes
        self._places: dict[str, tuple[Path, int, int]] = {}
        self._labels: dict[str, int] = {}
        if len({shard.name for shard in shards}) < len(shards):
            raise UserError(f"data.source: shards need names of their own: {source} has some twice")
        for shard in shards:
            index = _index(shard)
            self._labels |= {f"{shard.name}/{key}": label for key, label in index["labels"].items()}
            self._places |= {f"{shard.name}/{name}": (shard, at, size) for name, at, size in index["images"]}
        if self._labels:  # then `b.mask.png` is no image, but more about `b`
            self._places = {name: place for name, place in self._places.items() if f".{_extension(name)}" in SUFFIXES}
        self.names = list(self._places)
        if not self.names:
            raise UserError(f"data.source: no {', '.join(SUFFIXES)} files in {source}")

    def content(self, name: str) -> bytes:
        """One image as it is stored."""
        shard, offset, size = self._places[name]
        with shard.open("rb", buffering=0) as file:  # opened each time: workers share no position
            return os.pread(file.fileno(), size, offset)

    def inside(self) -> list[str]:
        """The names, with those of their shards."""
        return self.names

    def sizes(self) -> list[int]:
        """The bytes of each image, in order."""
        return [size for _, _, size in self._places.values()]

    def about(self, names: list[str]) -> tuple[tuple[str, ...], list[int], list[str]]:
        """The classes, and the label and family of each of `names`."""
        if not self._labels:
            inside = [name.split("/", 1)[1] for name in names]
            folders = class_folders(inside if any("/" in name for name in inside) else names)
            classes = tuple(sorted(set(folders)))
            numbers = {folder: number for number, folder in enumerate(classes)}
            return tuple(name.removesuffix(".tar") for name in classes), [numbers[f] for f in folders], families(names)
        labels = []
        for name in names:
            key = _key(name)
            if key not in self._labels:
                raise UserError(f"{self.path}: {name[:80]} has no .cls beside it, as others have")
            labels.append(self._labels[key])
        return label_names(labels, self.num_classes, str(self.path)), labels, families(names)


def families(names: list[str]) -> list[str]:
    """The family of each image."""
    return [family(name) for name in names]


def _key(name: str) -> str:
    """What the files of one example share: the name up to the first dot after the last slash."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def _extension(name: str) -> str:
    """The rest."""
    return PurePosixPath(name).name.partition(".")[2].lower()


# ------------------------------------------------------------------------------------------- index


def _index(shard: Path) -> dict[str, Any]:
    """Where a shard's images lie: {images: [[name, offset, size]], labels: {key: number}}.

    Kept beside the shard, or in the user's cache where nothing can be written there; made again when the shard's size
    or time of change is another.
    """
    state = shard.stat()
    identity = {"version": VERSION, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-in-dit" / "tars"
    places = (
        shard.with_name(f"{shard.name}.index.json"),
        cache / f"{sha256(os.fsencode(shard.resolve())).hexdigest()}.json",
    )
    for place in places:
        try:
            found: dict[str, Any] = json.loads(place.read_bytes())
            if {name: found.get(name) for name in identity} == identity and found.keys() >= {"images", "labels"}:
                return found
        except (OSError, ValueError, AttributeError):
            pass  # none yet, or torn: made below
    made = {**identity, **_walk(shard, state.st_size)}
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(place, json.dumps(made))
            break
    return made


def _walk(shard: Path, length: int) -> dict[str, Any]:
    """The index of a tar file, from its headers; UserError when it is not one, or not whole."""
    images, labels, end = [], {}, 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                name = member.name.removeprefix("./")
                if not member.isreg() or member.issparse() or HIDDEN.search(name):
                    continue
                if name.lower().endswith(SUFFIXES):
                    images.append((name, member.offset_data, member.size))
                elif _extension(name) == "cls":
                    content = archive.extractfile(member)
                    text = content.read(32).decode("ascii").strip() if content else ""
                    if not text.isdecimal():
                        raise UserError(f"{shard}: {name[:80]} must hold a class number: got {text[:20]!r}")
                    labels[_key(name)] = int(text)
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(f"data.source: {shard} is not a plain .tar: {str(error)[:80]}; unpack or mend it") from None
    with shard.open("rb") as file:
        mark = os.pread(file.fileno(), BLOCK, end)
    if end > length or mark != bytes(BLOCK):
        raise UserError(f"data.source: {shard} is cut off: it ends without a tar's end mark; get it again")
    return {"images": images, "labels": labels}
