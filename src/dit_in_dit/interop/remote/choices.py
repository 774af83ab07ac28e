"""In place of `config.choices`: a user's classes are not exported, so every choice is one of the package's own."""

from collections.abc import Iterable
from typing import Any

from dit_in_dit.config.facts import CROSSES_PATCHES, KEEPS_OUTER, READS_OUTER, READS_TIME

KEYS: dict[str, str] = {}  # config keys that accept registered names: none here
PLUGIN_KEYS: dict[str, Any] = {}  # the section of keys that each registered name declares: none here


def choice_names(key: str, built_in: Iterable[str] = ()) -> list[str]:
    """The values of a config key."""
    return list(built_in)


def crosses_patches(mixer: str) -> bool:
    """Whether inner tokens attend beyond their patch."""
    return CROSSES_PATCHES[mixer]


def keeps_outer(fuse: str) -> bool:
    """Whether a fusion keeps the outer tokens (false: the aggregated tokens replace them)."""
    return KEEPS_OUTER[fuse]


def reads_outer(condition: str) -> bool:
    """Whether outer tokens drive inner adaLN."""
    return READS_OUTER[condition]


def reads_time(condition: str) -> bool:
    """Whether the time without the class drives inner adaLN."""
    return READS_TIME[condition]
