"""The order of the blocks, as text: named orders and programs such as `inner*2 outer*6`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Literal

from dit_in_dit.config.errors import UserError

Level = Literal["inner", "outer"]
Program = tuple[tuple[Level, int], ...]
MOST_BLOCKS = 1000  # per level; far above any published depth, and low enough to catch a typo


def parse_stages(text: str) -> Program:
    """Parse a stage program such as `(inner outer*4)*7` into (level, number of blocks) runs. Raises UserError.

    Grammar: one or more of `inner`, `outer` or `( ... )`, separated by spaces, each with an optional `*N`.
    """
    flat = text
    while group := re.search(r"\(([^()]*)\)(?:\*(\d{1,4}))?", flat):
        repeated = f" {group[1]}" * int(group[2] or 1)
        flat = f"{flat[: group.start()]}{repeated} {flat[group.end() :]}"
        if len(flat) > 100 * MOST_BLOCKS:
            raise UserError(f"stages: more than {MOST_BLOCKS} blocks in {text[:60]!r}; use fewer")
    runs: list[tuple[Level, int]] = []
    for item in flat.split():
        match = re.fullmatch(r"(inner|outer)(?:\*(\d{1,4}))?", item)
        if not match:
            raise UserError(f"stages: cannot read {item[:40]!r} in {text[:60]!r}; write for example 'inner*7 outer*28'")
        runs.append(("inner" if match[1] == "inner" else "outer", int(match[2] or 1)))
    return merge_runs(runs)


def merge_runs(blocks: Iterable[tuple[Level, int]]) -> Program:
    """Join adjacent runs of one level and drop empty runs."""
    merged: list[tuple[Level, int]] = []
    for level, count in blocks:
        if merged and merged[-1][0] == level:
            merged[-1] = (level, merged[-1][1] + count)
        elif count:
            merged.append((level, count))
    return tuple(merged)


def split_run(program: Program, after: int) -> Program:
    """The program with its outer run cut in two after outer block number `after` (from 1)."""
    runs: list[tuple[Level, int]] = []
    for level, count in program:
        first = after if level == "outer" and 0 < after < count else 0
        runs += [(level, first), (level, count - first)] if first else [(level, count)]
        after -= count if level == "outer" else 0
    return tuple(runs)


def format_stages(program: Program) -> str:
    """The program as text, the inverse of `parse_stages`."""
    return " ".join(f"{level}*{count}" for level, count in program)


def _both(outer: int, inner: int) -> Program:
    if inner < 2:
        raise UserError(f"stages=both needs 2 inner blocks: depth {outer} gives {inner}; raise model.inner.depth_ratio")
    return ("inner", inner - inner // 2), ("outer", outer), ("inner", inner // 2)


def _interleaved(outer: int, inner: int) -> Program:
    """Each inner block, followed by an even share of the outer blocks, as in TNT (Han et al. 2021)."""
    cuts = [i * outer // inner for i in range(inner + 1)]
    runs: list[tuple[Level, int]] = []
    for start, end in pairwise(cuts):
        runs += [("inner", 1), ("outer", end - start)]
    return merge_runs(runs)


ORDERS: dict[str, Callable[[int, int], Program]] = {  # arguments: numbers of outer and inner blocks
    "first": lambda outer, inner: (("inner", inner), ("outer", outer)),
    "interleaved": _interleaved,
    "last": lambda outer, inner: (("outer", outer), ("inner", inner)),
    "both": _both,
}
