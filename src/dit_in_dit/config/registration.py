"""`register`: users' own classes and functions join the tables of choices.

    import dit_in_dit
    from dit_in_dit.model.aggregate import Aggregator

    class Max(Aggregator):
        ...

    dit_in_dit.register("aggregate", "max", Max)

A command runs a file of such lines with `--plugin FILE`.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from importlib import import_module
from typing import Any

from dit_in_dit.config.choices import KINDS, PACKAGE, PARTS, PLUGIN_KEYS, table
from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.config.schema import Section


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

    >>> dd.register("weight", "late", lambda path, predict, t: 1 + t)  # a loss weight
    >>> config = dd.preset("emoji", weight="late")
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
        PLUGIN_KEYS[name] = keys
    entries[name] = thing


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
    own: Any = getattr(thing, "forward", None)  # torch.nn.Module's own, if nobody wrote one
    unwritten = {"forward"} if getattr(own, "__name__", "") == "_forward_unimplemented" else set()
    if lacks := sorted({*getattr(thing, "__abstractmethods__", ()), *unwritten}):
        raise UserError(f"register: {thing.__name__} lacks {', '.join(lacks)} of {base.__name__}: define it")


def _check_keys(kind: str, name: str, keys: Any) -> None:
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
    if "." in name:
        raise UserError(f"register: a name with keys must have no '.', which separates keys: got {name!r}")
    _check_section(f"plugins.{name}", keys)


def _check_section(prefix: str, section: Any) -> None:
    """Check the fields of a section of keys, and give it and the groups in it their prefix."""
    if "__dataclass_fields__" not in vars(section):
        raise UserError(f"register: {section.__name__} of {prefix} must be a dataclass: add @dataclass(frozen=True)")
    for field in fields(section):
        if "meaning" not in field.metadata or hasattr(Section, field.name):
            raise UserError(f"register: {prefix}.{field.name} must be `key(DEFAULT, MEANING)`, of a name that is free")
        if not field.metadata["meaning"].isprintable():
            raise UserError(f"register: the meaning of {prefix}.{field.name} must be one line")
    section.prefix = prefix
    try:
        hash(defaults := section())
    except TypeError as error:
        raise UserError(
            f"register: each key of {prefix} must have a default of numbers, text or tuples: {truncate(error, 80)}"
        ) from None
    for field in fields(section):
        if isinstance(group := getattr(defaults, field.name), Section):
            _check_section(f"{prefix}.{field.name}", type(group))


def _is_same(one: Any, other: Any) -> bool:
    """Whether both come from one definition, in a module that ran twice (as in a worker process)."""
    if type(one) is type(other) and not callable(one):
        return True if one == other else repr(one) == repr(other)
    names = [(getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)) for thing in (one, other)]
    return names[0] == names[1] and None not in names[0]
