"""The result of a trial, as its folder keeps it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.strict_json import has_form, parse_json

STATES = ("done", "failed", "pruned")
NOT_FINITE = ("nan", "inf", "-inf")
FORM = {"arm": str, "seed": int, "state": str, "step": int, "metrics": dict, "floors": dict, "protocol": dict}
WAY = "remove it, and the trial is done again"


@dataclass(frozen=True)
class Result:
    """What became of a trial, as its folder's `result.json` holds it.

    Attributes:
        state: done, failed (`reason` says why) or pruned.
        metrics: number by name, such as `held_out.0.2.high` or `swd.32`; at the last step.
        floors: what real images score against real ones, for those metrics that have it.
        protocol: of the evaluation, as `metrics.json` has it; empty where only held-out errors were asked for.
    """

    arm: str
    seed: int
    state: Literal["done", "failed", "pruned"]
    step: int
    metrics: dict[str, float]
    floors: dict[str, float]
    protocol: dict[str, Any]
    reason: str = ""

    def to_json(self) -> str:
        """For `from_json`; a metric that is not finite is its name, as in a run's log."""
        numbers = {"metrics": _written(self.metrics), "floors": _written(self.floors)}
        return json.dumps({**asdict(self), **numbers}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """What `to_json` wrote; UserError when it is something else."""
        whole = parse_json(text, "this result of a trial", WAY)
        good = has_form(whole, FORM) and whole["state"] in STATES and isinstance(whole.get("reason", ""), str)
        if not good or whole.keys() - {f.name for f in fields(cls)}:
            raise UserError(f"this is no result of a trial: it lacks a part, or holds one of another kind; {WAY}")
        return cls(**{**whole, "metrics": _numbers(whole["metrics"]), "floors": _numbers(whole["floors"])})


def _written(numbers: dict[str, float]) -> dict[str, float | str]:
    """Numbers as JSON knows them; those that are not finite by their names, as in a run's log."""
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """What `_written` was given; UserError where one is no number."""
    if not all(has_form(value, (int, float)) or value in NOT_FINITE for value in values.values()):
        raise UserError(f"this is no result of a trial: one of its metrics is no number; {WAY}")
    return {name: float(value) for name, value in values.items()}


def read_result(folder: Path) -> Result | None:
    """The result in a trial's folder; None where it has not ended. UserError when its file is damaged."""
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        return Result.from_json(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; {WAY}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
