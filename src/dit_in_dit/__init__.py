"""DiT-in-DiT: nested diffusion transformers, written as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_in_dit.config import presets as presets
    from dit_in_dit.config.errors import UserError as UserError
    from dit_in_dit.config.registration import register as register
    from dit_in_dit.config.run import RunConfig as RunConfig
    from dit_in_dit.inspection import cost as cost
    from dit_in_dit.inspection.trace import inspect as inspect
    from dit_in_dit.model.nested import NestedDiT as NestedDiT
    from dit_in_dit.sampling.numbered import sample as sample
    from dit_in_dit.training.loop import train as train

__version__ = "0.1.0"

_HOMES = {
    "presets": ("dit_in_dit.config.presets", None),
    "cost": ("dit_in_dit.inspection.cost", None),
    "register": ("dit_in_dit.config.registration", "register"),
    "RunConfig": ("dit_in_dit.config.run", "RunConfig"),
    "UserError": ("dit_in_dit.config.errors", "UserError"),
    "inspect": ("dit_in_dit.inspection.trace", "inspect"),
    "NestedDiT": ("dit_in_dit.model.nested", "NestedDiT"),
    "sample": ("dit_in_dit.sampling.numbered", "sample"),
    "train": ("dit_in_dit.training.loop", "train"),
}
__all__ = ["NestedDiT", "RunConfig", "UserError", "cost", "inspect", "presets", "register", "sample", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, because configs need no torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'dit_in_dit' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    home = import_module(module)
    return getattr(home, attribute) if attribute else home


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
