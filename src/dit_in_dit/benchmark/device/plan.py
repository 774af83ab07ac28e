"""The parts of the device check in order of value, and the goals that their results decide."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

CaseLine = dict[str, Any]  # a case, as `cases` writes it


@dataclass(frozen=True)
class Part:
    """A part: processes that call `measure_NAME` of `module`."""

    name: str
    module: str
    seconds: float  # in which cases begin, on a GPU; processes are killed after 1.5 times as much
    rows: int  # of the table
    processes: int = 1  # at the same time, each with its share of the cases
    tiny_processes: int = 1
    environment: dict[str, str] = field(default_factory=dict)


# Each process of `right` compiles with one thread, so that they do not wait for each other.
_ALONE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
_SAME_BITS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # read when CUDA starts
DEVICE_PARTS = (
    Part("place", "rates", 15, 2),
    Part("right", "right", 80, 3, 12, 1, _ALONE),
    Part("limits", "rates", 25, 2, 6, 2),
    Part("pieces", "rates", 40, 4),
    Part("pixels", "steps", 75, 4),
    Part("latents", "steps", 65, 2),
    Part("waits", "running", 20, 1),
    Part("runs", "running", 30, 1, environment=_SAME_BITS),
    Part("drawing", "running", 30, 1),
    Part("feeding", "running", 20, 1),
    Part("beside", "steps", 45, 1),
)


@dataclass(frozen=True)
class Goal:
    """A goal for CUDA: the best value of `value` over the cases, and its limit."""

    name: str
    limit: float
    value: Callable[[Iterable[CaseLine]], float | None]
    at_least: bool = False

    def __str__(self) -> str:
        return f"{self.name} {'>=' if self.at_least else '<='} {self.limit:g}"

    def met(self, value: float) -> bool:
        """Whether a measured value meets the goal."""
        return value >= self.limit if self.at_least else value <= self.limit


def _best(lines: Iterable[CaseLine], part: str, row: str, key: str, case: str = "") -> float | None:
    """The largest number under `key` of the cases that ended, of one row of a part; `case` is a part of their names."""
    wanted = {"part": part, "row": row, "state": "done", "device": "cuda"}
    found = [line for line in lines if wanted.items() <= line.items()]
    return max((line[key] for line in found if key in line and case in line["case"]), default=None)


def _times(part: str, row: str, other: str, cases: tuple[str, str]) -> Callable[[Iterable[CaseLine]], float | None]:
    """Seconds an image of one row's best case, over those of another's."""

    def value(lines: Iterable[CaseLine]) -> float | None:
        pairs = zip((row, other), cases, strict=True)
        speeds = [_best(lines, part, each, "images_per_second", case) for each, case in pairs]
        return speeds[1] / speeds[0] if speeds[0] and speeds[1] else None

    return value


def _share(part: str, row: str, case: str = "") -> Callable[[Iterable[CaseLine]], float | None]:
    return lambda lines: _best(lines, part, row, "share", case)


_BESIDE = _times("beside", "dit-xl2", "dit-xl2", ("ours, compiled", "diffusers, eager"))
_TINY_ATTENTION = _share("pieces", "attention in groups", "4 tokens")
GOALS = (
    Goal("plain XL/2, compiled: its step / diffusers', eager", 0.75, _BESIDE),
    Goal("nested B/16 / its twin", 1.2, _times("pixels", "dit-in-dit-b16", "dit-b16", ("", ""))),
    Goal("nested XL/16 / its twin", 1.1, _times("pixels", "dit-in-dit-xl16", "dit-xl16", ("", ""))),
    Goal("plain XL/2: share of the product rate", 0.5, _share("latents", "dit-xl2"), at_least=True),
    Goal("nested XL/2: share of the product rate", 0.45, _share("latents", "dit-in-dit-xl2"), at_least=True),
    Goal("attention of 4 tokens: share of the copy bandwidth", 0.7, _TINY_ATTENTION, at_least=True),
)
