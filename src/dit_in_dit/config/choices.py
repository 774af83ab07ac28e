"""Choices: config keys whose value names a class or function in a table. `register` adds a user's own to it.

This module imports no torch. A table is imported when a name that is not built in is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.facts import CROSSES_PATCHES, KEEPS_OUTER, READS_OUTER, READS_TIME

PACKAGE = __name__.split(".", maxsplit=1)[0]


@dataclass(frozen=True)
class Kind:
    """A kind of choice."""

    keys: tuple[str, ...]  # config keys that take a name of this kind; empty if a command or a study takes the name
    module: str  # module of the package that holds the table
    table: str  # name of the table, a dictionary
    base: str = ""  # name of the class that states what a choice must offer; empty: any callable
    instance: bool = False  # whether the table holds instances of the base instead of subclasses


def _at_both(*names: str) -> tuple[str, ...]:
    """Keys that both levels have."""
    return tuple(f"model.{level}.{name}" for name in names for level in ("outer", "inner"))


KINDS = {
    "embed": Kind(("model.inner.embed",), "model.embed", "EMBEDS", "Embed"),
    "aggregate": Kind(("model.inner.aggregate",), "model.aggregate", "AGGREGATORS", "Aggregator"),
    "mixer": Kind(("model.inner.mixer",), "model.mixers", "MIXERS", "Mixer"),
    "condition": Kind(("model.inner.condition",), "model.condition", "CONDITIONS", "Condition"),
    "fuse": Kind(("model.inner.fuse",), "model.aggregate", "FUSIONS", "Fusion"),
    "spread": Kind(("model.inner.spread",), "model.aggregate", "SPREADS", "Spread"),
    "norm": Kind(_at_both("norm", "head_norm"), "model.norms", "NORMS", "Norm"),
    "mlp": Kind(_at_both("mlp"), "model.mlps", "MLPS", "Mlp"),
    "rope": Kind(_at_both("rope"), "model.rope", "ROPES", "Rope"),
    "modulation": Kind(_at_both("modulation"), "model.modulation", "MODULATIONS", "BlockModulation"),
    "time_embed": Kind(("model.time_embed",), "model.condition", "TIME_EMBEDS", "TimeEmbed"),
    "path": Kind(("diffusion.path",), "diffusion.path", "PATHS"),
    "predict": Kind(("diffusion.predict",), "diffusion.path", "QUANTITIES"),
    "weight": Kind(("diffusion.weight",), "diffusion.objective", "LOSS_WEIGHTS"),
    "time": Kind(("diffusion.time",), "diffusion.objective", "TIME_DISTRIBUTIONS"),
    "sampler": Kind(("sample.sampler",), "config.samplers", "SAMPLERS", "Sampler", instance=True),
    "optimizer": Kind(("train.optimizer",), "training.optimizer", "OPTIMIZERS"),
    "source": Kind((), "data.sources", "SOURCES", "Source"),
    "metric": Kind((), "metrics.metric", "METRICS", "Metric", instance=True),
    "tracker": Kind((), "training.trackers", "TRACKERS"),
}
KEYS = {key: name for name, kind in KINDS.items() for key in kind.keys}  # config keys that accept registered names
PLUGIN_KEYS: dict[str, Any] = {}  # registered name: the section of config keys that the user's class declares
PARTS = (  # kinds whose classes are model parts
    *("embed", "aggregate", "mixer", "condition", "fuse", "spread"),
    *("norm", "mlp", "rope", "modulation", "time_embed"),
)


def table(kind: str) -> dict[str, Any]:
    """The table of a kind: its classes, functions or instances by name."""
    entries: dict[str, Any] = getattr(import_module(f"{PACKAGE}.{KINDS[kind].module}"), KINDS[kind].table)
    return entries


def choice_names(key: str, built_in: Iterable[str] = ()) -> list[str]:
    """Names that a config key accepts: built-in ones, then registered ones."""
    return list(dict.fromkeys([*built_in, *table(KEYS[key])]))


def is_plugin(part: Any) -> bool:
    """Whether a class in a table is a user's own."""
    return part is not None and part.__module__.split(".")[0] != PACKAGE


def check_travels(values: Mapping[str, Any]) -> None:
    """Check that a config, given as values by dotted key, names no class of a plug-in: an exported pipeline has only
    the package's code. Raises UserError."""
    for key in (key for kind in PARTS for key in KINDS[kind].keys):
        if is_plugin(table(KEYS[key]).get(values[key])):
            raise UserError(
                f"a pipeline must have no class of a plug-in: got {key}={values[key]}; use export --format run, "
                "and load the exported run with --plugin"
            )


def _property(kind: str, name: str, built_in: Mapping[str, bool]) -> Callable[[str], bool]:
    """A function from a choice to a property of its class; the classes of built-in choices are not imported."""
    return lambda choice: built_in[choice] if choice in built_in else bool(getattr(table(kind)[choice], name))


# Whether a mixer mixes inner tokens of several patches, whether a fusion keeps the outer tokens (or replaces them), and
# whether a condition gives the outer tokens, and the time without the class, to inner adaLN.
crosses_patches = _property("mixer", "crosses_patches", CROSSES_PATCHES)
keeps_outer = _property("fuse", "keeps_outer", KEEPS_OUTER)
reads_outer = _property("condition", "reads_outer", READS_OUTER)
reads_time = _property("condition", "reads_time", READS_TIME)
