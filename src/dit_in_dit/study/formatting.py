"""Numbers and verdicts as a report writes them."""

from __future__ import annotations

import math

from dit_in_dit.metrics.metric import direction, metric_of
from dit_in_dit.study.statistics import Difference, Estimate


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many digits that count; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if math.isfinite(value) else "not finite"


def format_estimate(found: Estimate | None) -> str:
    """Mean and half the width of its interval, with two digits of the smaller (not more than two below the other)."""
    if found is None:
        return "-"
    if found.low is None or found.high is None or found.high == found.low:
        return number(found.mean)
    reach = (found.high - found.low) / 2
    smaller = min(reach, max(abs(found.mean), reach / 100))
    decimals = max(0, 1 - math.floor(math.log10(smaller)))
    return f"{found.mean:.{decimals}f} ± {reach:.{decimals}f}"


def scale(metric: str, found: Difference) -> float | None:
    """What makes percent of a difference; None where it is told as it is: of sizes around zero, and of nothing."""
    return None if direction(metric) == "zero" else found.scale


def signed(percent: float) -> str:
    """Percent with a sign and one decimal; no sign where nothing is left."""
    text = f"{percent:+.1f}"
    return text if text.strip("+-0.") else text[1:]


def format_difference(metric: str, found: Difference) -> str:
    """The mean difference with its sign, and its unit."""
    if found.equal:
        return "0"
    if not math.isfinite(found.mean):
        return "-"
    percent = scale(metric, found)
    return f"{signed(found.mean * percent)} %" if percent else f"{found.mean:+.2g}"


def interval(metric: str, found: Difference, *, wide: bool) -> str:
    """An interval of a difference in the unit of `format_difference`: for all comparisons together, or for this one."""
    low, high = (found.wide_low, found.wide_high) if wide else (found.low, found.high)
    if low is None or high is None:
        return ""
    if percent := scale(metric, found):
        return f"{signed(low * percent)} to {signed(high * percent)} %"
    return f"{low:+.2g} to {high:+.2g}"


def verdict(metric: str, found: Difference) -> str:
    """What may be said about a difference."""
    if not found.seeds:
        return "no seed in common"
    if math.isnan(found.mean):
        return "not finite"
    if found.equal:
        return "equal in every seed"
    if found.constant:
        return "the same difference in every seed: no interval"
    if found.low is None:
        return "one seed: no claim"
    if not found.marked:
        return "no difference seen"
    return "better" if metric_of(metric).better(found.mean) else "worse"


def listing(names: list[str]) -> str:
    """Names in quotes, in a sentence."""
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + f" and {quoted[-1]}" if quoted else "none"


def count(amount: int, thing: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{amount} {thing}" if amount == 1 else f"{amount} {thing}s"
