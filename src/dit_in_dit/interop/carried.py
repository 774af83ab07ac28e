"""The code in a saved folder, with which the `diffusers` library loads the folder if this package is not installed."""

from __future__ import annotations

import hashlib
from importlib import import_module
from typing import Any

from dit_in_dit.config.choices import PACKAGE
from dit_in_dit.interop.remote import carried
from dit_in_dit.interop.remote_code import bundle

# Classes that folders name, and their modules in this package.
INSTALLED = {
    "DiTInDiTPipeline": f"{PACKAGE}.interop.pipeline",
    "DiTInDiTTransformer2DModel": f"{PACKAGE}.interop.transformer",
}


def code_of(cls: type) -> tuple[str, str]:
    """Name and text of a module that defines a class and does not import this package.

    The name contains a hash of the text, because `diffusers` copies such modules of all folders into one place.
    """
    if not cls.__module__.startswith(f"{PACKAGE}."):  # loaded from a folder's code: copy that code
        return carried.code_of(cls)
    text, module = bundle(cls.__module__, cls.__name__), cls.__module__.rpartition(".")[2]
    return f"{PACKAGE}_{module}_{hashlib.sha256(text.encode()).hexdigest()[:8]}", text


def installed(config: dict[str, Any]) -> dict[str, Any]:
    """A folder's config with this package's classes in place of the folder's own."""
    replaced = dict(config)
    for key, value in config.items():
        if isinstance(value, list | tuple) and len(value) == 2 and value[1] in INSTALLED:
            replaced[key] = value[1] if key == "_class_name" else [INSTALLED[value[1]], value[1]]
            import_module(INSTALLED[value[1]])  # diffusers looks among loaded modules
    return replaced
