"""Calls to the operating system, seen by Python's profiler: fault points that need no hook in the tested code."""

from __future__ import annotations

import io
from collections.abc import Callable


def is_of_the_system(function: Callable) -> bool:
    """Whether a call is `open`, a method of a file, or a function of `os` that asks the kernel."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, io.StringIO | io.BytesIO):
        return False
    module = getattr(owner, "__name__", None) or type(owner).__module__
    return module in ("posix", "_io", "io") and function.__name__ not in ("fspath", "text_encoding", "__init__")
