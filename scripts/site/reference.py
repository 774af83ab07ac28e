"""Reference pages, made from the package: config keys, command line, models of the field, figures.

`fill` replaces the markers of a page. Everything is read from the schema, the parser and the presets themselves.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from html import escape
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import dit_in_dit
from dit_in_dit.cli import parser
from dit_in_dit.config import presets
from dit_in_dit.config.choices import KEYS
from dit_in_dit.config.field import FAMILIES, PUBLISHED
from dit_in_dit.config.program import format_stages
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import PluginKeys, Section
from dit_in_dit.inspection import cost
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.pretrained import pretrained_models

ROOT = Path(__file__).resolve().parents[2]
MARKER = r"^<!-- generated: ([\w -]+) -->$"
ERRORS = ("UserError", "SaveError", "BusyError")
FIGURES = (
    "emoji",
    "emoji-reference",
    "pixeldit-xl16",
    "emoji-run",
)  # presets that pages show; NAME-run: a model in the package
API = ROOT / "docs" / "reference" / "python.md"


def fill(markdown: str) -> str:
    """The text with generated text in place of every line `<!-- generated: NAME -->`. KeyError: an unknown name."""
    return re.sub(MARKER, lambda found: GENERATED[found[1]](), markdown, flags=re.MULTILINE)


def figure(name: str, theme: str) -> str:
    """The figure of a preset's model, or of the model NAME in the package for NAME-run, as SVG text."""
    run = pretrained_models().get(name.removesuffix("-run")) if name.endswith("-run") else None
    config = read_config(run) if run else presets.get(name)
    return dit_in_dit.draw(config, theme=theme, title=name.removesuffix("-run")).svg


def figure_link(preset: str) -> str:
    """Markdown that shows the figure of a preset, for a page in a folder of docs, in both themes."""
    themes = ("light", "dark")
    return "\n".join(f"![{preset}](../figures/{preset}-{theme}.svg#only-{theme})" for theme in themes)


def undocumented() -> list[str]:
    """Public names without a docstring, or without a line in the page of the Python API."""
    listed = re.findall(r"^::: dit_in_dit\.(?:[\w.]+\.)?(\w+)$", API.read_text(), re.MULTILINE)
    missing = [name for name in dit_in_dit.__all__ if name not in listed or not getattr(dit_in_dit, name).__doc__]
    for name in dit_in_dit.__all__:
        thing = getattr(dit_in_dit, name)
        for member, value in vars(thing).items() if isinstance(thing, type) else ():
            if not member.startswith("_") and callable(value) and not inspect.getdoc(getattr(thing, member)):
                missing.append(f"{name}.{member}")
    return missing


def config_keys() -> str:
    """A table for each group of config keys."""
    return "\n".join(_group(RunConfig, "", "The run"))


def _keys(section: type[Section]) -> Iterator[tuple[Field[Any], Any]]:
    hints = get_type_hints(section)
    yield from ((f, hints[f.name]) for f in fields(section) if "meaning" in f.metadata)


def _group(section: type[Section], prefix: str, meaning: str) -> Iterator[str]:
    """Heading and table of a group, then its subgroups."""
    inner = [(f, hint) for f, hint in _keys(section) if is_dataclass(hint) and hint is not PluginKeys]
    yield f"\n## {f'`{prefix[:-1]}`: ' if prefix else ''}{meaning}\n"
    yield "| key | default | values | meaning |\n|---|---|---|---|"
    for f, hint in _keys(section):
        if not is_dataclass(hint):
            name = prefix + f.name
            meant = _prose(f.metadata["meaning"])
            row = (f"[](){{ #{name} }}`{name}`", f"`{_plain(f.default)}`", _values(name, f, hint), meant)
            yield "| " + " | ".join(map(_cell, row)) + " |"
    for f, hint in inner:
        yield from _group(hint, f"{prefix}{f.name}.", f.metadata["meaning"])


def _plain(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if value is None or value is MISSING:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(name: str, f: Field[Any], hint: Any) -> str:
    """The values that a key takes: their type or names, and their range."""
    low, high = f.metadata["low"], f.metadata["high"]
    most = "2^63 - 1" if high == 2**63 - 1 else f"{high:g}"
    bounds = f"{low:g} to {most}" if math.isfinite(low) and math.isfinite(high) else ""
    if not bounds and (math.isfinite(low) or math.isfinite(high)):
        bounds = f"at least {low:g}" if math.isfinite(low) else f"at most {most}"
    plugin = "; or a plug-in's" if name in KEYS else ""
    return _spell(hint) + plugin + (f", {bounds}" if bounds else "")


def _spell(hint: Any) -> str:
    """A type in words, names as code."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{_plain(part)}`" for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(_spell(part) for part in parts)
    if origin is tuple:
        return f"list of {_spell(parts[0])}" if parts[-1] is Ellipsis else f"{len(parts)} values: {_spell(parts[0])}"
    words = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", type(None): "`null`"}
    return words.get(hint, "names and values" if origin is dict else str(hint))


def commands() -> str:
    """Every command with its usage and options."""
    return "\n".join(_commands(parser()))


def _commands(command: argparse.ArgumentParser) -> Iterator[str]:
    below = [action for action in command._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield f"\n## `{command.prog}`\n\n{_sentence(command.description or '')}\n"
        usage = command.format_usage().removeprefix("usage: ")
        yield f"```text\n{usage.rstrip()}\n```\n\n| option | meaning |\n|---|---|"
        for action in command._actions:
            if action.dest not in ("help", "plugin"):
                yield f"| {_cell(_option(action))} | {_cell(_prose(_help(action)))} |"
        return
    for name in dict.fromkeys(below[0].choices):
        yield from _commands(below[0].choices[name])


def _option(action: argparse.Action) -> str:
    """An option as it is typed, with the name of its value."""
    value = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
    if action.choices is not None:
        value = "|".join(map(str, action.choices))
    names = [*([] if not isinstance(value, tuple) else value)] or [str(value)]
    words = action.option_strings or names
    takes = "" if action.nargs == 0 or not action.option_strings else " " + " ".join(names)
    return ", ".join(f"`{word}{takes}`" for word in words)


def _help(action: argparse.Action) -> str:
    required = "required; " if action.required and action.option_strings else ""
    return required + (action.help or "").replace("%%", "%")


def _sentence(text: str) -> str:
    return _prose(text[:1].upper() + text[1:] + ("" if text.endswith(".") else "."))


def _prose(text: str) -> str:
    """Plain text as Markdown that shows it unchanged, but for code between backticks."""
    parts = re.split(r"(`[^`]*`)", escape(text, quote=False))
    return "".join(part if part.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", part) for part in parts)


def _cell(text: str) -> str:
    """Text of a table's cell. A bar inside code does not end the cell; a backslash would be shown."""
    parts = re.split(r"(`[^`]*`)", text.replace("\n", " "))
    return "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in parts)


def models() -> str:
    """A table of the presets of published models, and of the package's own sizes."""
    rows = ["| preset | model | input | p | D | stages | inner level | predicts | GMACs |", "|" + "---|" * 9]
    for name in [n for n in presets.NAMES if n.startswith(("dit-xl", "dit-in-dit-xl")) or n in PUBLISHED]:
        config = presets.get(name)
        model = config.model
        family = FAMILIES[PUBLISHED[name][0]] if name in PUBLISHED else None
        size = "x".join(map(str, (*model.image_size, model.channels)))
        inner = model.inner
        nested = "inner" in format_stages(model.program)
        shape = f"s={inner.sub_patch}, E={inner.width}, {inner.mixer}, {inner.condition}" if nested else "none"
        title = f"{family.title} ({family.paper})" if family else "nested" if nested else "DiT (Peebles & Xie 2023)"
        macs = f"{cost.macs(model)['total'] / 1e9:.1f}"
        cells = (f"`{name}`", escape(title), size, model.patch_size, model.outer.width)
        more = (f"`{format_stages(model.program)}`", shape, config.diffusion.predict, macs)
        rows.append("| " + " | ".join(str(cell) for cell in (*cells, *more)) + " |")
    return "\n".join(rows)


def costs() -> str:
    """MACs and parameters by part, of the reference arrangement and of its plain DiT."""
    rows = ["| part | `dit-in-dit-xl2` | `dit-xl2` |", "|---|---|---|"]
    nested, plain = (cost.macs(presets.get(name).model) for name in ("dit-in-dit-xl2", "dit-xl2"))
    for part in sorted({**nested, **plain}, key="total".__eq__):
        values = (f"{counts.get(part, 0) / 1e9:.2f}" for counts in (nested, plain))
        rows.append(f"| {part.replace('_', ' ')} | {' | '.join(values)} |")
    return "\n".join(rows)


def messages() -> str:
    """The text of every `UserError` that the package raises, by room; `…` stands for a value."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "src" / "dit_in_dit").rglob("*.py")):
        for text in message_texts(path.read_text()):
            found.setdefault(path.relative_to(ROOT / "src" / "dit_in_dit").parts[0], set()).add(text)
    lines = []
    for room, texts in found.items():
        lines.append(f"\n### {room.removesuffix('.py').replace('_', ' ')} {{ #all-{room} }}\n")
        lines += [f"- {_verbatim(text)}" for text in sorted(texts, key=lambda text: text.strip("… "))]
    return "\n".join(lines)


def message_texts(source: str) -> list[str]:
    """Messages of the errors that a module raises. Those without ten letters of their own are left out."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    raised = [c.args[0] for c in calls if isinstance(c.func, ast.Name) and c.func.id in ERRORS]
    texts = [_message(node) for node in raised]
    return [text for text in texts if len(re.sub(r"[^a-z]", "", text)) >= 10]


def _message(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…"


def _verbatim(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


GENERATED: dict[str, Callable[[], str]] = {
    "config keys": config_keys,
    "commands": commands,
    "models": models,
    "costs": costs,
    "messages": messages,
    **{f"figure {name}": partial(figure_link, name) for name in FIGURES},
}
