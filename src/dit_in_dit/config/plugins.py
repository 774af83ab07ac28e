"""Plug-ins: a user's Python files or packages, which register choices.

The option `--plugin` names a plug-in: a file (`my_idea.py`), or an entry point of the group `dit_in_dit.plugins`. A
user's own program imports the plug-in itself. A loaded file, such as a config, cannot name a plug-in.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dit_in_dit.config.errors import UserError, did_you_mean, truncate

GROUP = "dit_in_dit.plugins"


# By absolute path or entry point, in the order of loading: what a run records of a plug-in, the file name without the
# folder (`name`), and the SHA-256 of the source (`sha256`).
_loaded: dict[str, dict[str, str]] = {}


def load_plugin(text: str) -> None:
    """Import a plug-in, once per process; `text`: path of a `.py` file, or name of an installed package's entry point.
    UserError if it does not exist, or its import raises an error."""
    name = str(Path(text).resolve()) if text.endswith(".py") else text
    if name in _loaded:
        return
    module = _module_of(Path(name)) if text.endswith(".py") else _entry_point(text)
    try:
        imported = import_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        problem = f"{type(error).__name__}: {truncate(error, 100)}"
        raise UserError(f"--plugin {truncate(text, 60)} failed: {problem}") from error
    source = Path(str(imported.__file__)).read_bytes()
    _loaded[name] = {"name": Path(text).name, "sha256": hashlib.sha256(source).hexdigest()}


def plugin_arguments() -> list[str]:
    """Command-line options that load the same plug-ins in another process."""
    return [word for name in _loaded for word in ("--plugin", name)]


def loaded_plugins() -> list[dict[str, str]]:
    """The loaded plug-ins, as a checkpoint's manifest stores them."""
    return [dict(plugin) for plugin in _loaded.values()]


def missing_plugins(manifest: Mapping[str, Any]) -> str:
    """`--plugin` options for the plug-ins that a manifest names and that are not loaded; empty if none is missing."""
    known = {plugin["name"] for plugin in _loaded.values()}
    return " ".join(f"--plugin {entry['name']}" for entry in manifest.get("plugins", ()) if entry["name"] not in known)


def changed_sources(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the loaded plug-ins whose source differs from the one that a manifest records."""
    known = {plugin["name"]: plugin["sha256"] for plugin in _loaded.values()}
    recorded = {entry["name"]: entry["sha256"] for entry in manifest.get("plugins", ())}
    return [name for name, sha256 in recorded.items() if known.get(name, sha256) != sha256]


def _module_of(path: Path) -> str:
    """Import name of a plug-in file. The folder is put last in the search path and so hides no installed module."""
    if not path.is_file():
        raise UserError(f"--plugin: no such file: {truncate(path, 80)}")
    if not path.stem.isidentifier():
        raise UserError(f"--plugin: a file name must be letters, digits and '_': got {path.name!r}; rename it")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = find_spec(path.stem)
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != path:
        origin = f" ({truncate(spec.origin, 60)})" if spec and spec.origin else ""
        raise UserError(f"--plugin: Python has a module {path.stem!r} already{origin}: rename {path.name}")
    return path.stem


def _entry_point(name: str) -> str:
    from importlib.metadata import entry_points  # imported here, because it would slow every command

    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise UserError(
            f"--plugin: no installed package has an entry point {truncate(name, 40)!r} in {GROUP}"
            f"{did_you_mean(name, points)}; a file must end in .py"
        )
    return points[name].module
