"""In place of `config.choices`: no class of a user's travels, so a choice is one of the package's own."""

from collections.abc import Iterable
from typing import Any

from dit_in_dit.config.facts import CROSSES_PATCHES, KEEPS_OUTER, READS_OUTER


def plugin_keys() -> dict[str, Any]:
    """The section of keys that each registered name declares: none here."""
    return {}


def is_choice(key: str) -> bool:
    """Whether a config key names a choice that a user's own can join: it cannot here."""
    return False


def choice_names(key: str, built_in: Iterable[str] = ()) -> list[str]:
    """What a config key can be."""
    return list(built_in)


def crosses_patches(mixer: str) -> bool:
    """Whether inner tokens see past their patch."""
    return CROSSES_PATCHES[mixer]


def keeps_outer(fuse: str) -> bool:
    """Whether the outer tokens go on where aggregated ones join them."""
    return KEEPS_OUTER[fuse]


def reads_outer(condition: str) -> bool:
    """Whether outer tokens drive inner adaLN."""
    return READS_OUTER[condition]
