"""Sources of images: `open_source(data, model)` opens what `data.source` names, by the table SOURCES.

To add a kind to the package, add a file to `data/formats` with a subclass of `data.source.Source` that has a `name`. To
add a kind from outside the package, call `dit_in_dit.register("source", NAME, CLASS)`. Then `data.source` takes NAME
and NAME:REST.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from dit_in_dit.config.errors import LeftOutWarning, UserError, truncate
from dit_in_dit.config.run import AUTO, DataConfig, ModelConfig, RunConfig
from dit_in_dit.data import formats
from dit_in_dit.data.names import left_out_clause
from dit_in_dit.data.source import Source
from dit_in_dit.data.source_checks import check_opened


def _built_in() -> dict[str, type[Source]]:
    """The named classes of the modules of `data/formats`. The class for any path is listed first and tried last."""
    modules = [import_module(f"{formats.__name__}.{module.name}") for module in iter_modules(formats.__path__)]
    classes = [thing for module in modules for thing in vars(module).values() if isinstance(thing, type)]
    kinds = {kind for kind in classes if issubclass(kind, Source) and "name" in vars(kind) and kind is not Source}
    return {kind.name: kind for kind in sorted(kinds, key=lambda kind: ("fallback" not in vars(kind), kind.name))}


SOURCES = _built_in()  # if several recognise a place, the last one counts: a user's own before ours


def source_kind(source: str) -> type[Source]:
    """The kind of a `data.source`; names are tried before paths.

    Raises:
        UserError: the source is no known name, and nothing is at that path.
    """
    for by_path in (False, True):
        for name, kind in reversed(SOURCES.items()):
            if kind.by_path is by_path and kind.recognises(source, name):
                return kind
    raise UserError(f"data.source: no such file or folder: {source}")


def path_in(source: str) -> str:
    """The path in a `data.source`: the whole text, or the part after a name and a colon; empty for a name alone and
    for a part that is no path."""
    for name, kind in SOURCES.items():
        if not kind.by_path and kind.recognises(source, name):
            return source.removeprefix(name).removeprefix(":") if kind.rest_is_path else ""
    return source


def open_source(data: DataConfig, model: ModelConfig) -> Source:
    """The configured source at the model's size; UserError when it is missing, empty or does not fit.

    One LeftOutWarning names everything at that place that is not read.
    """
    source = source_kind(data.source).open(fill_latent_keys(data), model)
    check_opened(source, model)
    check_class_count(source, data.source, model)
    if notes := [*source.notes, *left_out_clause(source.skipped, "unreadable files")]:
        warnings.warn(f"{truncate(data.source, 50)}: {'; '.join(notes)}", LeftOutWarning, stacklevel=2)
    return source


def fill_latent_keys(data: DataConfig) -> DataConfig:
    """The data's config. Null keys for the VAE, its mean and its scale get the values for the latents at that place."""
    try:
        kind = source_kind(data.source)
    except UserError:  # raised again when the source is opened
        return data
    return replace(data, **{key: value for key, value in kind.latent_keys(data).items() if getattr(data, key) is None})


def check_class_count(source: Source, place: str, model: ModelConfig) -> None:
    """UserError when a model with labels does not have as many classes as the source."""
    if model.num_classes and len(source.classes) != model.num_classes:
        raise UserError(
            f"model.num_classes must fit the data: got {model.num_classes}, but {place} has {len(source.classes)}"
        )


def count_classes(data: DataConfig) -> int:
    """Number of classes, as `Source.count_classes`: 0 if it is known only once the source is open."""
    return source_kind(data.source).count_classes(data)


def count_auto_classes(config: RunConfig, given: Source | None = None) -> RunConfig:
    """The config with the number of classes of its data, or of the `given` source, in place of model.num_classes=auto;
    0 for a single class."""
    if config.model.num_classes != AUTO:
        return config
    model = replace(config.model, num_classes=0 if given else count_classes(config.data))
    number = model.num_classes or len((given or open_source(config.data, model)).classes)
    return replace(config, model=replace(model, num_classes=number if number > 1 else 0))


def size_of(path: Path) -> tuple[int, int, int]:
    """Height, width and channels (1 or 3) that all images of a folder, .zip, .npz or .npy have.

    Raises:
        UserError: sizes differ, or the arrays are not pixels.
    """
    return source_kind(str(path)).size_of(path)
