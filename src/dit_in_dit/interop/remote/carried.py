"""In place of `interop.carried`: code that came with a folder goes with the next as it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def code_of(made: type) -> tuple[str, str]:
    """Name and text of the module that defines a class."""
    path = Path(str(sys.modules[made.__module__].__file__))
    return path.stem, path.read_text()


def installed(config: dict[str, Any]) -> dict[str, Any]:
    """A folder's config: its classes are those that it carries."""
    return config
