"""The speed of models: by part, in relation to their cost, and compared with other code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_in_dit.benchmark.timing import Times, estimate_seconds, product_speed, step_seconds

__all__ = ["Times", "estimate_seconds", "product_speed", "step_seconds"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the device check starts without the packages of `timing`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dit_in_dit.benchmark import timing

    return getattr(timing, name)
