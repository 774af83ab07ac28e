"""Choices: config keys whose value names a class or function in a table. `register` adds a user's class or
function.

    import dit_in_dit
    from dit_in_dit.model.aggregate import Aggregator

    class Max(Aggregator):
        ...

    dit_in_dit.register("aggregate", "max", Max)

This module imports no torch. A table is imported when a name that is not built in is first used.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.config.facts import CROSSES_PATCHES, KEEPS_OUTER, READS_OUTER

PACKAGE = __name__.split(".", maxsplit=1)[0]


@dataclass(frozen=True)
class Kind:
    """A kind of choice.

    Attributes:
        keys: config keys that take a name of this kind; empty if a command or a study takes the name.
        module: module of the package that holds the table.
        table: name of the table, a dictionary.
        base: name of the class that states what a choice must offer; empty: any callable.
        instance: whether the table holds instances of the base instead of subclasses.
    """

    keys: tuple[str, ...]
    module: str
    table: str
    base: str = ""
    instance: bool = False


KINDS = {
    "embed": Kind(("model.inner.embed",), "model.embed", "EMBEDS", "Embed"),
    "aggregate": Kind(("model.inner.aggregate",), "model.aggregate", "AGGREGATORS", "Aggregator"),
    "mixer": Kind(("model.inner.mixer",), "model.mixers", "MIXERS", "Mixer"),
    "condition": Kind(("model.inner.condition",), "model.condition", "CONDITIONS", "Condition"),
    "fuse": Kind(("model.inner.fuse",), "model.aggregate", "FUSIONS", "Fusion"),
    "spread": Kind(("model.inner.spread",), "model.aggregate", "SPREADS", "Spread"),
    "norm": Kind(("model.outer.norm", "model.inner.norm"), "model.norms", "NORMS", "Norm"),
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
KEYS = {key: name for name, kind in KINDS.items() for key in kind.keys}
PLUGIN_KEYS: dict[str, Any] = {}  # registered name: the section of config keys that the user's class declares
PARTS = ("embed", "aggregate", "mixer", "condition", "fuse", "spread", "norm")  # kinds whose classes are model parts


def register(kind: str, name: str, thing: Any, *, keys: Any = None) -> None:
    """Add a class or function to a table, so that the config key of its kind accepts its name.

    Args:
        kind: embed, aggregate, mixer, condition, fuse, spread, norm, path, predict, weight, time, sampler, optimizer,
            source, metric, tracker.
        name: its name in the config: a letter, then letters, digits, `_`, `-`, `.` and `+`.
        thing: the class or function: a subclass of the kind's base, a `Sampler`, a `Metric`, or a function.
        keys: config keys of `thing`, a `config.schema.Section`. The config sets the keys under `plugins.NAME`; `thing`
            reads them as `plugins["NAME"]` of its config group. Only for model parts, optimizers and sources.

    Raises:
        UserError: the kind is unknown, the name is taken or invalid, or the class lacks a method of its base.
    """
    if kind not in KINDS:
        raise UserError(f"register: unknown kind {truncate(kind, 40)!r}{did_you_mean(str(kind), KINDS)}")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w.+-]*", name):
        raise UserError(f"register: a name must be a letter, then letters, digits, _-.+: got {truncate(name, 40)!r}")
    entries = table(kind)
    if name in entries and not _is_same(entries[name], thing):
        raise UserError(f"register: the {kind} {name!r} exists already: choose another name")
    _check_contract(kind, name, thing)
    if keys is not None:
        _check_keys(kind, name, keys)
        keys.prefix = f"plugins.{name}"
        PLUGIN_KEYS[name] = keys
    entries[name] = thing


def table(kind: str) -> dict[str, Any]:
    """The table of a kind: its classes, functions or instances by name."""
    entries: dict[str, Any] = getattr(import_module(f"{PACKAGE}.{KINDS[kind].module}"), KINDS[kind].table)
    return entries


def plugin_keys() -> dict[str, Any]:
    """The sections of config keys that plug-ins declare, by registered name."""
    return PLUGIN_KEYS


def is_choice(key: str) -> bool:
    """Whether a config key accepts registered names."""
    return key in KEYS


def choice_names(key: str, built_in: Iterable[str] = ()) -> list[str]:
    """Names that a config key accepts: built-in ones, then registered ones."""
    return list(dict.fromkeys([*built_in, *table(KEYS[key])]))


def check_travels(values: Mapping[str, Any]) -> None:
    """Check that a config names no class of a plug-in: an exported pipeline carries only the package's code.

    Args:
        values: every value of a config, by dotted key.

    Raises:
        UserError: a model part of the config comes from a plug-in.
    """
    for key in (key for kind in PARTS for key in KINDS[kind].keys):
        part = table(KEYS[key])[values[key]]
        if part is not None and part.__module__.split(".")[0] != PACKAGE:
            raise UserError(
                f"a pipeline must have no class of a plug-in: got {key}={values[key]}; use export --format run, "
                "and load the exported run with --plugin"
            )


def crosses_patches(mixer: str) -> bool:
    """Whether a mixer mixes inner tokens of several patches."""
    return CROSSES_PATCHES[mixer] if mixer in CROSSES_PATCHES else bool(table("mixer")[mixer].crosses_patches)


def keeps_outer(fuse: str) -> bool:
    """Whether a fusion keeps the outer tokens; false if the aggregated tokens replace the outer tokens."""
    return KEEPS_OUTER[fuse] if fuse in KEEPS_OUTER else bool(table("fuse")[fuse].keeps_outer)


def reads_outer(condition: str) -> bool:
    """Whether a condition gives the outer tokens to inner adaLN."""
    return READS_OUTER[condition] if condition in READS_OUTER else bool(table("condition")[condition].reads_outer)


def _check_contract(kind: str, name: str, thing: Any) -> None:
    if not KINDS[kind].base:
        if not callable(thing):
            raise UserError(f"register: the {kind} {name!r} must be a class or a function: got {truncate(thing, 40)}")
        return
    base = getattr(import_module(f"{PACKAGE}.{KINDS[kind].module}"), KINDS[kind].base)
    if KINDS[kind].instance:
        if not isinstance(thing, base) or getattr(thing, "name", name) != name:
            raise UserError(f"register: the {kind} {name!r} must be a {base.__name__} with that name")
        return
    if not (inspect.isclass(thing) and issubclass(thing, base)):
        raise UserError(
            f"register: the {kind} {name!r} must be a class with the base {base.__module__}.{base.__name__}"
        )
    unwritten = {"forward"} if kind in PARTS and getattr(thing, "forward", 0) is getattr(base, "forward", 1) else set()
    if lacks := sorted({*getattr(thing, "__abstractmethods__", ()), *unwritten}):
        raise UserError(f"register: {thing.__name__} lacks {', '.join(lacks)} of {base.__name__}: define it")


def _check_keys(kind: str, name: str, keys: Any) -> None:
    from dit_in_dit.config.schema import Section  # which imports this module

    if kind not in (*PARTS, "optimizer", "source"):
        raise UserError(f"register: a {kind} cannot have config keys: leave out keys")
    if not (inspect.isclass(keys) and issubclass(keys, Section)):
        raise UserError(
            f"register: the keys of {name!r} must be a class with the base dit_in_dit.config.schema.Section"
        )
    if keys.prefix not in ("", f"plugins.{name}"):
        raise UserError(f"register: these keys belong to {keys.prefix}: write another class for {name!r}")
    if name in PLUGIN_KEYS and not _is_same(PLUGIN_KEYS[name], keys):
        raise UserError(f"register: plugins.{name} exists already: choose another name")
    try:
        keys()
    except TypeError as error:
        raise UserError(f"register: each of the keys of {name!r} must have a default: {truncate(error, 80)}") from None


def _is_same(one: Any, other: Any) -> bool:
    """Whether both come from one definition, in a module that ran twice (as in a worker process)."""
    if type(one) is type(other) and not callable(one):
        return True if one == other else repr(one) == repr(other)
    names = [(getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)) for thing in (one, other)]
    return names[0] == names[1] and None not in names[0]
