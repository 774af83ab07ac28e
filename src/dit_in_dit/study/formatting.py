"""Numbers and verdicts as a report writes them."""

from __future__ import annotations

import math

from dit_in_dit.metrics.metric import direction, metric_of
from dit_in_dit.study.results import StudyResults
from dit_in_dit.study.statistics import Difference, Estimate


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if math.isfinite(value) else "not finite"


def format_estimate(estimate: Estimate | None) -> str:
    """Mean ± half the width of its interval; the smaller of the two numbers gets two significant digits."""
    if estimate is None:
        return "-"
    if estimate.low is None or estimate.high is None or estimate.high == estimate.low:
        return number(estimate.mean)
    reach = (estimate.high - estimate.low) / 2
    smaller = min(reach, max(abs(estimate.mean), reach / 100))
    decimals = max(0, 1 - math.floor(math.log10(smaller)))
    return f"{estimate.mean:.{decimals}f} ± {reach:.{decimals}f}"


def mean(study: StudyResults, arm: str, metric: str) -> str:
    """An arm's mean in a metric, formatted by `format_estimate`."""
    return format_estimate(study.estimate(arm, metric))


def scale(metric: str, change: Difference) -> float | None:
    """The factor that converts a difference to percent; None if the metric lies around 0 or the other mean is 0."""
    return None if direction(metric) == "zero" else change.scale


def signed(percent: float) -> str:
    """Percent with a sign and one decimal; zero has no sign."""
    text = f"{percent:+.1f}"
    return text if text.strip("+-0.") else text[1:]


def format_difference(metric: str, change: Difference) -> str:
    """The mean difference with its sign: in percent, or in the metric's unit if `scale` is None."""
    if change.equal:
        return "0"
    if not math.isfinite(change.mean):
        return "-"
    percent = scale(metric, change)
    return f"{signed(change.mean * percent)} %" if percent else f"{change.mean:+.2g}"


def interval_name(study: StudyResults, method: str = "") -> str:
    """What the wide interval of a difference is called; `method` follows if it holds for several comparisons."""
    many = len(study.compared)
    return f"interval for all {many} comparisons together{method}" if many > 1 else "95% interval"


def interval(metric: str, change: Difference, *, wide: bool) -> str:
    """A difference's interval in the unit of `format_difference`. `wide`: the one that holds for all comparisons."""
    low, high = (change.wide_low, change.wide_high) if wide else (change.low, change.high)
    if low is None or high is None:
        return ""
    if percent := scale(metric, change):
        return f"{signed(low * percent)} to {signed(high * percent)} %"
    return f"{low:+.2g} to {high:+.2g}"


def verdict(metric: str, change: Difference) -> str:
    """The claim that a difference supports."""
    if not change.seeds:
        return "no seed in common"
    if math.isnan(change.mean):
        return "not finite"
    if change.equal:
        return "equal in every seed"
    if change.constant:
        return "the same difference in every seed: no interval"
    if change.low is None:
        return "one seed: no claim"
    if not change.marked:
        return "no difference seen"
    return "better" if metric_of(metric).better(change.mean) else "worse"


def listing(names: list[str]) -> str:
    """Quoted names, joined as in a sentence."""
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + f" and {quoted[-1]}" if quoted else "none"


def count(amount: int, thing: str) -> str:
    """A number with its noun: `1 seed`, `2 seeds`."""
    return f"{amount} {thing}" if amount == 1 else f"{amount} {thing}s"
