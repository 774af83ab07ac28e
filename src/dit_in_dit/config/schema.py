"""Config groups as frozen dataclasses. Construction checks types, ranges and the rules between keys.

A broken rule raises `UserError`: one line with the rule, the value and the way out.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dit_in_dit.config.choices import KEYS, PLUGIN_KEYS, choice_names
from dit_in_dit.config.errors import UserError, did_you_mean, truncate


def key(
    default: Any, meaning: str, *, low: float = -math.inf, high: float = math.inf, added: int = 1, was: Any = MISSING
) -> Any:
    """A dataclass field with a meaning (printed beside the key in YAML) and a closed range.

    `added` is the first version of the config hash (`files.HASH_VERSION`) that includes the key. A key with `added`
    above 1 is left out of the hash if its value is the default: older configs keep their hash. That default must never
    change. Such a key is given by name only, so that the positions of older keys stay. `was` is the former default of a
    key: the hash has it in place of the present default.
    """
    metadata = {"meaning": meaning, "low": low, "high": high, "added": added, "was": was}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata, kw_only=added > 1)
    return field(default=default, metadata=metadata, kw_only=added > 1)


T = TypeVar("T", bound="Section")


@dataclass(frozen=True)
class Section:
    """A group of config keys. Construction checks types and ranges, then calls `check` for the rules between keys."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = _hints(type(self))  # type: ignore[arg-type]  # mypy takes the __hash__ of instances for the class's
        for f in _fields(self):
            name = f"{self.prefix}.{f.name}" if self.prefix else f.name
            value, hint = getattr(self, f.name), hints[f.name]
            if value is not f.default or type(value) is not hint:  # most defaults need no check: presets load faster
                value = _typed(value, hint, name)
            low, high = f.metadata["low"], f.metadata["high"]
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not low <= number <= high:
                    allowed = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
                    raise UserError(f"{name} must be {allowed}: got {number}")
            object.__setattr__(self, f.name, value)
        self.check()

    def check(self) -> None:
        """Check the rules between the keys of this section. Raises UserError."""

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Build from nested mappings. For an unknown key, a UserError names the nearest known key."""
        known = {f.name for f in _fields(cls)}
        for name in values:
            if name not in known:
                full = f"{cls.prefix}.{truncate(name)}" if cls.prefix else truncate(name)
                raise UserError(f"unknown key {full!r}{did_you_mean(full, cls.names())}")
        return cls(**values)

    @classmethod
    def names(cls) -> list[str]:
        """Dotted keys of this section and of the groups below it."""
        return [name for name, _, _ in keys(cls(), f"{cls.prefix}." if cls.prefix else "")]

    def _repr_html_(self) -> str:
        """A notebook's view: the keys that are not at their default."""
        from html import escape

        usual = {name: value for name, _, value in keys(type(self)())}
        changed = [row for row in keys(self) if not isinstance(row[2], Section) and usual.get(row[0]) != row[2]]
        rows = "".join(f"<tr><td>{n}<td>{escape(str(value))}<td>{escape(what)}" for n, what, value in changed)
        return f"<table><tr><th>{type(self).__name__}<th>value<th>meaning{rows}</table>"

    def items(self) -> Iterator[tuple[str, str, Any]]:
        """(key, meaning, value) of every key of this section."""
        for f in _fields(self):
            yield f.name, f.metadata["meaning"], getattr(self, f.name)


@dataclass(frozen=True)
class PluginKeys(Section):
    """Keys of plug-in classes: a section for each name that was registered with keys.

    A model part registered as `max` reads its section as `model.plugins["max"]`. The groups `data` and `train` have
    `plugins` too.
    """

    prefix: ClassVar[str] = "plugins"
    sections: tuple[tuple[str, Section], ...] = ()

    def __getitem__(self, name: str) -> Any:
        if name not in PLUGIN_KEYS:
            raise UserError(f"{name} has no config keys: register it with keys=")
        return dict(self.sections).get(name) or PLUGIN_KEYS[name]()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PluginKeys:
        """Build from one mapping per name. Raises UserError."""
        for name, section in values.items():
            if name not in PLUGIN_KEYS:
                raise UserError(
                    f"unknown key 'plugins.{truncate(name)}'{did_you_mean(str(name), PLUGIN_KEYS)}: "
                    "name its plug-in with --plugin"
                )
            if not isinstance(section, Mapping):
                raise UserError(f"plugins.{name} must be a group of keys: got {truncate(section, 60)!r}")
        return cls(tuple((name, PLUGIN_KEYS[name].from_dict(section)) for name, section in values.items()))

    @classmethod
    def names(cls) -> list[str]:
        """Dotted keys of the loaded plug-ins."""
        return [name for name, _, _ in keys(PluginKeys().including(PLUGIN_KEYS), f"{cls.prefix}.")]

    def items(self) -> Iterator[tuple[str, str, Any]]:
        """(name, first line of the section's docstring, section) of every section."""
        for name, section in self.sections:
            yield name, (type(section).__doc__ or "").partition("\n")[0], section

    def including(self, names: Iterable[str]) -> PluginKeys:
        """These sections, plus a default section for each of `names` that declares keys and has no section yet."""
        missing = sorted({name for name in names if name in PLUGIN_KEYS} - dict(self.sections).keys())
        return PluginKeys((*self.sections, *((name, PLUGIN_KEYS[name]()) for name in missing)))


def _fields(section: Any) -> tuple[Field[Any], ...]:
    """The fields of a section, or of its class, that are config keys."""
    return _fields_of(section if isinstance(section, type) else type(section))


@cache
def _fields_of(section: Any) -> tuple[Field[Any], ...]:
    return tuple(f for f in fields(section) if "meaning" in f.metadata)


@cache
def _hints(section: type) -> dict[str, Any]:
    """Types of a section's fields, cached: their evaluation takes longer than the check of a config."""
    return get_type_hints(section)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """Convert a value from YAML or Python to the type `hint`; UserError if the value does not fit."""

    def wrong() -> UserError:
        return UserError(f"{name} must be {_spell(hint)}: got {truncate(value, 60)!r}")

    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return hint.from_dict(value)  # type: ignore[union-attr]
        if not isinstance(value, hint):  # type: ignore[arg-type]
            raise UserError(f"{name} must be a group of keys: got {truncate(value, 60)!r}")
        return value
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        if any(value == part and type(value) is type(part) for part in parts):  # 1 is not true
            return value
        if name in KEYS and value in choice_names(name):
            return value
        way_out = " (a plug-in's name needs --plugin)" if name in KEYS else ""
        known = choice_names(name, parts) if way_out else (str(p).lower() if p in (True, False) else p for p in parts)
        raise UserError(f"{name} must be one of {', '.join(known)}{way_out}: got {truncate(value, 60)!r}")
    if origin in (Union, types.UnionType):
        return _typed_union(value, hint, name, wrong)
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise wrong()
        return dict(value)
    if origin is tuple:
        if parts[-1] is Ellipsis:
            parts = (parts[0],) * (len(value) if isinstance(value, list | tuple) else 1)
        values = value if isinstance(value, list | tuple) else (value,) * len(parts)
        if len(values) != len(parts):
            raise wrong()
        return tuple(_typed(v, part, name) for v, part in zip(values, parts, strict=True))
    if hint is bool or hint is str:
        if not isinstance(value, hint) or (hint is str and not str(value).isprintable()):
            raise wrong()
        return value
    try:  # YAML reads 1e-4 as text: numbers may come as strings
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        raise wrong() from None
    if not math.isfinite(number) or (hint is int and not number.is_integer()):
        raise wrong()
    if hint is int:
        return value if isinstance(value, int) else int(number)
    return number


def _typed_union(value: Any, hint: Any, name: str, wrong: Callable[[], UserError]) -> Any:
    """Null or a name if the union has it, a list of values if it has a tuple, or else a value of the union's first
    type. A list of one value becomes the value."""
    if get_origin(many := get_args(hint)[-1]) is tuple and isinstance(value, list | tuple):
        values = _typed(value, many, name)
        return values[0] if len(values) == 1 else values
    if (value is None and type(None) in get_args(hint)) or (isinstance(value, str) and value in _names(hint)):
        return value
    try:
        return _typed(value, get_args(hint)[0], name)
    except UserError:
        if _names(hint):
            raise wrong() from None
        raise


def _names(hint: Any) -> tuple[str, ...]:
    """Names that a union such as `float | Literal["tokens"]` accepts beside the values of its first type."""
    return tuple(name for part in get_args(hint)[1:] if get_origin(part) is Literal for name in get_args(part))


def _spell(hint: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    if get_origin(hint) is dict:
        return "a group of names and values"
    if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
        return f"a list of values, each {_spell(get_args(hint)[0])}"
    if get_origin(hint) is tuple:
        return f"{len(get_args(hint))} values, each {_spell(get_args(hint)[0])}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join([_spell(get_args(hint)[0]), *_names(hint), *["null"] * (type(None) in get_args(hint))])
    return names.get(hint, str(hint))


def keys(section: Section, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted key, meaning, value) of every key of a section and of the groups below it; groups are listed too."""
    for name, meaning, value in section.items():
        yield prefix + name, meaning, value
        if isinstance(value, Section):
            yield from keys(value, f"{prefix}{name}.")


def to_hash(config: Section) -> dict[str, Any]:
    """`to_dict` without the keys that have `added` above 1 and their default value, and with former defaults."""
    plain = to_dict(config)
    for f in _fields(config):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.metadata["was"] is not MISSING and getattr(config, f.name) == default:
            plain[f.name] = f.metadata["was"]
        if f.metadata["added"] > 1 and getattr(config, f.name) == default:
            plain.pop(f.name, None)
    groups = {name: to_hash(value) for name, _, value in config.items() if name in plain and isinstance(value, Section)}
    # A plug-in's section whose keys all came later and have their defaults is none.
    return {name: value for name, value in {**plain, **groups}.items() if value != {} or name not in groups}


def to_dict(config: Section) -> dict[str, Any]:
    """Nested plain values, as JSON and YAML hold them, without an empty `plugins` group and `unwritten` keys."""
    return {
        name: to_dict(value) if isinstance(value, Section) else json.loads(json.dumps(value, default=asdict))
        for name, _, value in config.items()
        if value != PluginKeys() and name not in getattr(config, "unwritten", ())
    }
