"""The result of a trial, and its file `result.json`."""

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
WAY_OUT = "remove this file, and the trial is done again"


@dataclass(frozen=True)
class Result:
    """How a trial ended, and its metrics."""

    arm: str
    seed: int
    state: Literal["done", "failed", "pruned"]  # done, failed (`reason` says why) or pruned
    step: int
    metrics: dict[str, float]  # values at the last step by name, such as `held_out.0.2.high` or `swd.32`
    floors: dict[str, float]  # scores of real images against real images, for metrics that have such a score
    protocol: dict[str, Any]  # of the evaluation, as in `metrics.json`; empty if only held-out errors are measured
    reason: str = ""

    def to_json(self) -> str:
        """The result as JSON; a metric that is not finite is a string such as "nan", as in a run's log."""
        whole = asdict(self)
        for name in ("metrics", "floors"):
            whole[name] = {metric: v if math.isfinite(v) else str(v) for metric, v in whole[name].items()}
        return json.dumps(whole, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Read what `to_json` wrote; UserError when the text is not a valid result."""
        whole = parse_json(text, "this result of a trial", WAY_OUT)
        valid = has_form(whole, FORM) and whole["state"] in STATES and isinstance(whole.get("reason", ""), str)
        if not valid or whole.keys() - {f.name for f in fields(cls)}:
            raise UserError(f"this is no result of a trial: it lacks a part, or a part has the wrong type; {WAY_OUT}")
        return cls(**{**whole, "metrics": _numbers(whole["metrics"]), "floors": _numbers(whole["floors"])})


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Numbers from JSON, also those that `to_json` wrote as strings; UserError if a value is not a number."""
    if not all(has_form(value, (int, float)) or value in NOT_FINITE for value in values.values()):
        raise UserError(f"this is no result of a trial: one of its metrics is not a number; {WAY_OUT}")
    return {name: float(value) for name, value in values.items()}


def read_result(folder: Path) -> Result | None:
    """The result in a trial's folder; None until the trial ends. UserError when the file is damaged."""
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        return Result.from_json(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; {WAY_OUT}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
