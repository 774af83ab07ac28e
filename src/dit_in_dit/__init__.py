"""DiT-in-DiT: nested diffusion transformers, written as data.

>>> import dit_in_dit as dd
>>> model = dd.load("emoji")
>>> pictures = model.sample(["country-flag", "face-smiling"], guidance=2.0, steps=4)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_in_dit.api.diagram import draw
    from dit_in_dit.api.measure import Scores, attention, compare, evaluate, match, run_study
    from dit_in_dit.api.model import Model, Pictures, load
    from dit_in_dit.config import presets
    from dit_in_dit.config.errors import UserError
    from dit_in_dit.config.presets import preset
    from dit_in_dit.config.registration import register
    from dit_in_dit.config.run import RunConfig
    from dit_in_dit.inspection import cost
    from dit_in_dit.inspection.trace import inspect
    from dit_in_dit.model.nested import NestedDiT
    from dit_in_dit.sampling.numbered import sample
    from dit_in_dit.training.loop import Run, train

__version__ = "0.1.0"

_HOMES = {
    "api.diagram": "draw",
    "api.measure": "Scores attention compare evaluate match run_study",
    "api.model": "Model Pictures load",
    "config": "presets",
    "config.errors": "UserError",
    "config.presets": "preset",
    "config.registration": "register",
    "config.run": "RunConfig",
    "inspection": "cost",
    "inspection.trace": "inspect",
    "model.nested": "NestedDiT",
    "sampling.numbered": "sample",
    "training.loop": "Run train",
}
__all__ = ["Model", "NestedDiT", "Pictures", "Run", "RunConfig", "Scores", "UserError", "attention", "compare", "cost"]
__all__ += ["draw", "evaluate", "inspect", "load", "match", "preset", "presets", "register", "run_study", "sample"]
__all__ += ["train"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, because configs need no torch."""
    for module, names in _HOMES.items():
        if name in names.split():
            home = import_module(f"{__name__}.{module}")
            return getattr(home, name, None) or import_module(f"{home.__name__}.{name}")  # a module, if not imported
    raise AttributeError(f"module 'dit_in_dit' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
