"""Configs as strict YAML, overrides by dotted keys, differences, and the hash of a config."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dit_in_dit.config.errors import LeftOutWarning, UserError, did_you_mean, truncate
from dit_in_dit.config.rules import unused_choices
from dit_in_dit.config.run import ModelConfig, RunConfig
from dit_in_dit.config.schema import PluginKeys, Section, keys, to_dict, to_hash
from dit_in_dit.config.strict_yaml import parse_yaml, read_yaml


class _Dumper(yaml.SafeDumper):
    """Writes groups as blocks with one key per line, and lists such as [32, 32] inline."""


_Dumper.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)


def from_yaml(text: str, what: str = "config") -> RunConfig:
    """Read a config from YAML; missing keys take their defaults. Raises UserError."""
    return _run(parse_yaml(text, what), what)


def from_file(path: Path, what: str = "") -> RunConfig:
    """Read a config from a YAML file. In the message of a UserError, `what` is the kind of file."""
    return _run(read_yaml(path, f"{what} " if what else ""), truncate(path))


def _run(values: Any, what: str) -> RunConfig:
    if not isinstance(values, dict):
        raise UserError(f"{what} must hold keys such as 'model:' and 'train:': got {truncate(values, 40)!r}")
    return RunConfig.from_dict(values)


def changed_keys(before: Section, after: Section, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two configs, with both values."""
    old, new = ({name: value for name, _, value in keys(section, prefix)} for section in (before, after))
    pairs = {name: (old.get(name), new.get(name)) for name in old | new}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b and not isinstance(a, Section)}


def to_yaml(config: RunConfig, *, meanings: bool = False) -> str:
    """YAML that `from_yaml` reads back to an equal config; with `meanings`, each key has its meaning as a comment."""
    return "".join(f"{line:<32}  # {meaning}\n" if meanings else f"{line}\n" for line, meaning in _yaml_lines(config))


def _yaml_lines(section: Section, indent: str = "") -> Iterator[tuple[str, str]]:
    """(line, meaning) of each key; a group is followed by its keys."""
    plain = to_dict(section)
    for name, meaning, value in section.items():
        if isinstance(value, Section) and plain.get(name):
            yield f"{indent}{name}:", meaning
            yield from _yaml_lines(value, f"{indent}  ")
        elif name in plain:
            text = yaml.dump({name: plain[name]}, Dumper=_Dumper, sort_keys=False, width=math.inf)
            yield from ((f"{indent}{line}", meaning) for line in text.splitlines())


def override(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """The config with `key.path=value` assignments applied together; values are read as YAML."""
    return replace_keys(config, dict(parse_assignment(assignment) for assignment in assignments))


def parse_assignment(assignment: str) -> tuple[str, Any]:
    """Key and value of `key.path=value`; the value is read as YAML."""
    name, equals, text = assignment.partition("=")
    if not equals:
        raise UserError(f"--set takes key=value: got {assignment!r}")
    return name, parse_yaml(text, f"--set {name}") if text else ""


def replace_keys(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The config with new values at dotted keys, checked after all are set. Raises UserError.

    A choice that the config's stages do not use gives a LeftOutWarning.
    """
    values, known = to_dict(config), [*RunConfig.names(), *PluginKeys.names()]
    for name, other in (("train.steps", "epochs"), ("train.epochs", "steps")):
        if name in changes:
            values["train"].pop(other, None)  # the new one replaces the other
    for name, value in changes.items():
        if name not in known:
            raise UserError(f"unknown key {name!r}{did_you_mean(name, known)}")
        *groups, last = name.split(".")
        target = values
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise UserError(
                    f"{name}: {group} is set to {truncate(target, 40)!r} and has a key below it: leave out one"
                )
        target[last] = value
    config = RunConfig.from_dict(values)
    usual = {name: value for name, _, value in keys(ModelConfig())}
    for choice, reason in unused_choices(config.model).items():
        if changes.get(name := f"model.{choice}", usual[choice]) != usual[choice]:
            warnings.warn(f"{name} has no effect: {reason}", LeftOutWarning, stacklevel=3)
    return config


HASH_VERSION = 4  # raise it with each release that adds keys, and give the new keys `added=HASH_VERSION`


def config_hash(config: RunConfig) -> str:
    """SHA-256 of the config's canonical JSON, the identity of a run. A key of a later version counts only if its value
    is not the default."""
    return hashlib.sha256(json.dumps(to_hash(config), sort_keys=True).encode()).hexdigest()
