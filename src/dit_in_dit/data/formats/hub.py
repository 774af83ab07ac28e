"""Hugging Face datasets of images, map-style: a hub id, or local parquet, Arrow and `save_to_disk` folders."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dit_in_dit.config.errors import UserError, did_you_mean
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data.files import ImageFiles, file_size
from dit_in_dit.data.formats.images import ImageSource
from dit_in_dit.data.groups import family
from dit_in_dit.data.labels import label_names
from dit_in_dit.data.names import left_out_clause

PREFIX = "hf:"
FILES = {".parquet": "parquet", ".arrow": "arrow"}


class HubRows(ImageFiles):
    """The rows of a dataset, in order; UserError when it cannot be loaded or lacks a column.

    The family of a row is its image's file name up to the first `~`, or the row's number if no file name is stored.
    """

    def __init__(self, data: DataConfig, num_classes: int) -> None:
        self.path, self.data, self.num_classes = Path(data.source), data, num_classes
        self.rows = load_hub(data)
        for column in (data.image_column, data.label_column)[: 2 if num_classes else 1]:
            if column not in self.rows.column_names:
                what = "image" if column == data.image_column else "label"
                raise UserError(
                    f"data.{what}_column: {data.source} has no {column!r}{did_you_mean(column, self.rows.column_names)}"
                )
        other = [name for name in self.rows.column_names if name not in (data.image_column, data.label_column)]
        self.notes = left_out_clause(other, "columns", ("text", "caption"))
        self._encoded = self._without_decoding()
        self.names = [f"row {number}" for number in range(len(self.rows))]
        if not self.names:
            raise UserError(f"data.source: {data.source} has no rows in the split {data.split!r}")

    def _without_decoding(self) -> Any:
        """The rows with only their image column, as bytes of image files."""
        column, kind = self.data.image_column, self.rows.features[self.data.image_column]
        name = type(kind).__name__
        rows = self.rows.select_columns([column])
        if isinstance(kind, dict) and "binary" in str(getattr(kind.get("bytes"), "dtype", "")):
            return rows  # a plain struct {bytes, path}, without the metadata of `datasets`
        if name not in ("Image", "Value") or (name == "Value" and "binary" not in kind.dtype):
            raise UserError(f"data.image_column: {column!r} of {self.data.source} holds {str(kind)[:60]}, no images")
        return rows.cast_column(column, type(kind)(decode=False)) if name == "Image" else rows

    def content(self, name: str) -> bytes:
        """The stored bytes of one image."""
        cell = self._encoded[int(name.split()[1])][self.data.image_column]
        if isinstance(cell, dict):
            content, path = cell["bytes"], cell.get("path")
            cell = content if content is not None else Path(path or "").read_bytes()
        return cell or b""

    def inside(self) -> list[str]:
        """The names: `row 0`, `row 1`, ..."""
        return self.names

    def sizes(self) -> list[int]:
        """The size of each image in bytes, in order, from Arrow's offsets: no image is read."""
        compute = import_module("pyarrow.compute")
        column = self._encoded.data.column(self.data.image_column)
        if _has(column, "bytes"):
            column = compute.struct_field(column, "bytes")
        sizes: list[int | None] = compute.binary_length(column).to_pylist()
        paths = self._paths() if None in sizes else []
        return [file_size(Path(paths[n] or "")) if size is None else size for n, size in enumerate(sizes)]

    def about(self, names: list[str]) -> tuple[tuple[str, ...], list[int], list[str]]:
        numbers = [int(name.split()[1]) for name in names]
        paths = self._paths()
        families = [family(paths[n] or str(n)) for n in numbers]
        if not self.num_classes:
            return ("images",), [0] * len(numbers), families
        kind = self.rows.features[self.data.label_column]
        column: list[Any] = self.rows.data.column(self.data.label_column).to_pylist()
        labels = [column[n] for n in numbers]
        if all(isinstance(label, str) for label in labels):
            classes = tuple(sorted(set(labels)))
            return classes, [classes.index(label) for label in labels], families
        if not all(isinstance(label, int) for label in labels):
            raise UserError(
                f"data.label_column: {self.data.label_column!r} of {self.data.source} must hold only numbers "
                f"or only names: got {str(kind)[:60]}"
            )
        labels = list(map(int, labels))  # of false and true, too
        known: Sequence[str] = getattr(kind, "names", None) or ()
        return label_names(labels, len(known) or self.num_classes, self.data.source, known), labels, families

    def _paths(self) -> list[str | None]:
        column = self._encoded.data.column(self.data.image_column)
        if _has(column, "path"):
            return list(import_module("pyarrow.compute").struct_field(column, "path").to_pylist())
        return [None] * len(self.rows)


def _has(column: Any, field: str) -> bool:
    """Whether an Arrow column holds structs with this field."""
    return str(column.type).startswith("struct") and column.type.get_field_index(field) >= 0


class HubSource(ImageSource):
    """The rows of a dataset as a source, `hf:NAME`."""

    name = "hf"
    by_path = False

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether `source` begins with `hf:`."""
        return source.startswith(PREFIX)

    @classmethod
    def count_classes(cls, data: DataConfig) -> int:
        """Number of classes in the label column; 0 without that column."""
        rows = load_hub(data)
        if data.label_column not in rows.column_names:
            return 0
        if names := getattr(rows.features[data.label_column], "names", None):
            return len(names)
        labels = rows.data.column(data.label_column).unique().to_pylist()
        return 1 + max(labels) if all(isinstance(label, int) for label in labels) else len(labels)

    @classmethod
    def list_files(cls, data: DataConfig, num_classes: int) -> ImageFiles:
        """The rows of the dataset."""
        return HubRows(data, num_classes)


def load_hub(data: DataConfig) -> Any:
    """One split of a dataset: `NAME[:SUBSET][@REVISION]` on the hub, or a local file or folder."""
    name, split = data.source.removeprefix(PREFIX), data.split
    try:
        datasets: Any = import_module("datasets")
    except ImportError:
        raise UserError(
            f"data.source={PREFIX}{name} needs the package datasets: pip install 'dit-in-dit[hub]'"
        ) from None
    path = Path(name)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            rows = saved if isinstance(saved, datasets.Dataset) else saved[split]
        elif path.suffix in FILES and path.is_file():
            rows = datasets.load_dataset(FILES[path.suffix], data_files={split: str(path)}, split=split)
        elif path.is_dir():
            rows = datasets.load_dataset(str(path), split=split)
        else:
            name, _, revision = name.partition("@")
            name, _, subset = name.partition(":")
            rows = datasets.load_dataset(name, subset or None, revision=revision or None, split=split)
    except Exception as error:  # of datasets, the hub's client, Arrow or the network
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load {PREFIX}{name}, split {split!r}: {problem[:120]}") from None
    if not isinstance(rows, datasets.Dataset):
        raise UserError(f"{PREFIX}{name}: {split!r} must name one split")
    used, columns = {data.image_column, data.label_column}, {*rows.column_names}
    cifar = {"img": "image", "fine_label": "label"}.items()  # its names of the default columns
    rows = rows.rename_columns({new: old for new, old in cifar if new in columns - used and old in used - columns})
    return rows.flatten_indices() if rows._indices is not None else rows
