"""Plug-ins: Python files of a user's, or packages, that register choices of their own.

A plug-in is named on the command line, `--plugin my_idea.py` or the name of an entry point of the group
`dit_in_dit.plugins`, or imported by a user's own program. No file that is loaded, such as a config, can name one.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dit_in_dit.config.errors import UserError, did_you_mean, truncate

GROUP = "dit_in_dit.plugins"


@dataclass(frozen=True)
class Plugin:
    """A plug-in as a run notes it: how it was named, without its folder, and the SHA-256 of its source."""

    name: str
    sha256: str


_loaded: dict[str, Plugin] = {}  # by the text that named it, in the order of loading


def load_plugin(text: str) -> None:
    """Run a plug-in, once in a process.

    Args:
        text: path of a `.py` file, or the name of an installed package's entry point.

    Raises:
        UserError: there is none, or it raises an error.
    """
    name = str(Path(text).resolve()) if text.endswith(".py") else text
    if name in _loaded:
        return
    module = _module_of(Path(name)) if text.endswith(".py") else _entry_point(text)
    try:
        made = import_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        problem = f"{type(error).__name__}: {truncate(error, 100)}"
        raise UserError(f"--plugin {truncate(text, 60)} ends with {problem}") from error
    source = Path(str(made.__file__))
    _loaded[name] = Plugin(Path(text).name, hashlib.sha256(source.read_bytes()).hexdigest())


def arguments() -> list[str]:
    """The options that load the same plug-ins in another process."""
    return [word for name in _loaded for word in ("--plugin", name)]


def noted() -> list[dict[str, str]]:
    """The loaded plug-ins, as a checkpoint's manifest holds them."""
    return [asdict(plugin) for plugin in _loaded.values()]


def missing_plugins(manifest: Mapping[str, Any]) -> str:
    """What to pass for the plug-ins that a manifest notes and that are not loaded; empty where none is missing."""
    known = {plugin.name for plugin in _loaded.values()}
    return " ".join(f"--plugin {entry['name']}" for entry in manifest.get("plugins", ()) if entry["name"] not in known)


def changed_sources(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the loaded plug-ins whose source is not the one that a manifest notes."""
    known = {plugin.name: plugin.sha256 for plugin in _loaded.values()}
    return [
        entry["name"]
        for entry in manifest.get("plugins", ())
        if known.get(entry["name"], entry["sha256"]) != entry["sha256"]
    ]


def _module_of(path: Path) -> str:
    """The name under which a file can be imported, by this process and by those that it starts: its folder goes to the
    end of the search path, so that nothing installed is hidden."""
    if not path.is_file():
        raise UserError(f"--plugin: no such file: {truncate(path, 80)}")
    if not path.stem.isidentifier():
        raise UserError(f"--plugin: a file is imported by its name: {path.name!r} must be letters, digits and '_'")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    found = find_spec(path.stem)
    if found is None or found.origin is None or Path(found.origin).resolve() != path:
        place = f" ({truncate(found.origin, 60)})" if found and found.origin else ""
        raise UserError(f"--plugin: Python has a module {path.stem!r} already{place}: rename {path.name}")
    return path.stem


def _entry_point(name: str) -> str:
    from importlib.metadata import entry_points  # here: every command would wait for it

    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise UserError(
            f"--plugin: no installed package has an entry point {truncate(name, 40)!r} in {GROUP}"
            f"{did_you_mean(name, points)}; a file ends in .py"
        )
    return points[name].module
