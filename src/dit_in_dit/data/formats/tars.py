"""Images in tar files (WebDataset shards), read in place: image i is read without reading the images before it."""

from __future__ import annotations

import os
import re
from glob import glob
from pathlib import Path

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data.files import ImageFiles
from dit_in_dit.data.formats.images import ImageSource
from dit_in_dit.data.groups import family
from dit_in_dit.data.labels import label_names
from dit_in_dit.data.names import (
    HIDDEN,
    SPLIT_NAMES,
    SUFFIXES,
    check_class_names,
    class_folders,
    left_out_clause,
    number_classes,
    refuse_split_folders,
)
from dit_in_dit.data.picture import MOST_BYTES
from dit_in_dit.data.tar_index import TAR_INDEX, example_key, extension, read_tar_index

MOST_SHARDS = 100_000
PACKED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|lzma|br)|zip)$", re.IGNORECASE)  # not read


def find_shards(source: str) -> tuple[list[Path], list[str]]:
    """The shards that a source names, in order, and other files beside them. Both are empty if the source does not name
    shards.

    A source of shards is `shards/train-{0000..0146}.tar` (all must exist), `shards/train-*.tar`, one `.tar`, or a
    folder with only `.tar` files, their indices and files that are no images.

    Raises:
        UserError: a shard is missing or compressed, or the shards of a folder belong to several splits.
    """
    path = Path(source)
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if not HIDDEN.search(file.name))
        shards = [file for file in inside if file.suffix.lower() == ".tar"]
        if not shards or any(file.is_dir() or file.name.lower().endswith(SUFFIXES) for file in inside):
            return [], []
        if packed := next((file.name for file in inside if PACKED.search(file.name)), None):
            raise UserError(
                f"data.source: {truncate(packed, 40)} lies among the .tar files of {truncate(path, 50)}: "
                "unpack it to a plain .tar, or move it away"
            )
        words = (re.split(r"[^A-Za-z]+", shard.stem) for shard in shards)  # such as train-0000.tar and val-0000.tar
        splits = {next((word for word in several if word.lower() in SPLIT_NAMES), "") for several in words}
        refuse_split_folders(splits, str(path), pattern="*{}*.tar")
        return shards, [file.name for file in inside if not file.name.lower().endswith((".tar", f".tar{TAR_INDEX}"))]
    if not source.endswith(".tar"):
        return [], []
    if numbers := re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", source):
        first, last = numbers.groups()
        if int(last) - int(first) >= MOST_SHARDS:
            raise UserError(
                f"data.source: at most {MOST_SHARDS} shards are allowed: {source} names more; check its range"
            )
        named = [f"{i:0{len(first)}d}".join(source.split(numbers[0], 1)) for i in range(int(first), int(last) + 1)]
    else:
        named = sorted(glob(source)) or [source]
    missing = next((name for name in named if not Path(name).is_file()), None)
    if missing or not named:
        raise UserError(f"data.source: no such file: {missing or source}")
    return [Path(name) for name in named], []


class TarFiles(ImageFiles):
    """The images of tar files, in the order of the shards and of their members.

    The label of `a/b.jpg` is the number in `a/b.cls`. If no shard has a `.cls`, the class is the image's folder.
    Without folders, the class is the shard, as in ImageNet's own archives (one archive per class). The family is the
    file's name up to the first `~`.
    """

    def __init__(self, source: str, shards: list[Path], num_classes: int, beside: list[str]) -> None:
        """`beside`: names of unread files beside the shards."""
        self.path, self.num_classes = Path(source), num_classes
        self.notes = left_out_clause(beside, "files beside the shards")
        self._places: dict[str, tuple[Path, int, int]] = {}
        self._labels = {}
        if len({shard.name for shard in shards}) < len(shards):
            raise UserError(f"data.source: each shard needs a different name: {source} has a name twice")
        others, examples, folders = 0, list[str](), list[str]()
        trailing: dict[str, int] = {}
        self._linked = set()
        for shard in shards:
            index = read_tar_index(shard)
            self._labels |= {f"{shard.name}/{key}": label for key, label in index["labels"].items()}
            self._places |= {f"{shard.name}/{name}": (shard, at, size) for name, at, size in index["images"]}
            others += index["others"]
            examples += [f"{shard.name}/{name}" for name in index["examples"]][: 2 - len(examples)]
            folders += [f"{shard.name}/{name}" for name in index["folders"]]
            self._linked |= set(index["linked"])
            trailing |= {shard.name: index["trailing"]} if index["trailing"] else {}
        if self._labels:  # then `b.mask.png` is no image, but an annotation of `b`
            images = {name: place for name, place in self._places.items() if f".{extension(name)}" in SUFFIXES}
            more = [name for name in self._places if name not in images]
            others, examples, self._places = others + len(more), examples + more, images
        self.names = list(self._places)
        if not self.names:
            raise UserError(f"data.source: no {', '.join(SUFFIXES)} files in {source}")
        self._in_folders = any(name.count("/") > 1 for name in self.names)  # of their shard
        captions = (f"{example_key(name)}.{end}" for name in self.names for end in ("txt", "json"))
        self.notes += left_out_clause(examples, "members that are no images", captions, others)
        self.notes += left_out_clause(trailing, "bytes behind a tar's end mark", count=sum(trailing.values()))
        self._check(folders, shards)

    def _check(self, folders: list[str], shards: list[Path]) -> None:
        """UserError when a class (a label, a folder or a shard) has no image."""
        if self._labels:
            keys = {*map(example_key, self.names)} & self._labels.keys()
            if lost := {*self._labels.values()} - {self._labels[key] for key in keys}:
                raise UserError(
                    f"data.source: {truncate(self.path, 60)}: a .cls names class {min(lost)}, but no image has it"
                )
        elif self._in_folders:
            inside = [name.split("/", 1)[1] for name in folders]
            names = [name.split("/", 1)[1] for name in self.names]
            check_class_names(names, inside, str(self.path), packed=True, linked=self._linked)
        else:
            filled = {name.split("/", 1)[0] for name in self.names}
            if empty := next((shard for shard in shards if shard.name not in filled), None):
                raise UserError(
                    f"data.source: no images in {truncate(empty, 60)}: convert what it holds, or move it away "
                    "(skipping it would shift later labels)"
                )

    def content(self, name: str) -> bytes:
        """The stored bytes of one image; ValueError when the image is too large or not stored in one piece."""
        shard, offset, size = self._places[name]
        if offset < 0:
            raise ValueError("a link to a missing file, or not a plain file")
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes, more than {MOST_BYTES}")
        with shard.open("rb", buffering=0) as file:  # opened each time: workers must not share a position
            return os.pread(file.fileno(), size, offset)

    def inside(self) -> list[str]:
        """The names, in order, each below the name of its shard."""
        return self.names

    def sizes(self) -> list[int]:
        """The size of each image in bytes, in order."""
        return [size for _, _, size in self._places.values()]

    def about(self, names: list[str]) -> tuple[tuple[str, ...], list[int], list[str]]:
        families = list(map(family, names))
        if not self._labels:
            inside = [name.split("/", 1)[1] for name in names]
            classes, numbers = number_classes(class_folders(inside if self._in_folders else names))
            return tuple(name.removesuffix(".tar") for name in classes), numbers, families
        if bare := next((name for name in names if example_key(name) not in self._labels), None):
            raise UserError(f"{self.path}: {bare[:80]} has no .cls file, but other images have one")
        labels = [self._labels[example_key(name)] for name in names]
        return label_names(labels, self.num_classes, str(self.path)), labels, families


class TarSource(ImageSource):
    """Tar shards as a source (see `find_shards`)."""

    name = "tar shards"

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether `source` names shards; UserError when a shard is missing."""
        return bool(find_shards(source)[0])

    @classmethod
    def list_files(cls, data: DataConfig, num_classes: int) -> ImageFiles:
        """The members of all shards."""
        shards, beside = find_shards(data.source)
        return TarFiles(data.source, shards, num_classes, beside)
