"""A study's conclusions in sentences that claim no more than its intervals support."""

from __future__ import annotations

import math
from collections import Counter

from dit_in_dit.metrics.metric import WORDS, direction, metric_of
from dit_in_dit.study import formatting
from dit_in_dit.study.plan import Arm, Plan
from dit_in_dit.study.results import StudyResults
from dit_in_dit.study.statistics import LEVEL, Difference, standard_errors

FALSE_RATE = 1 - LEVEL
MOST_NAMED = 14  # arms that a sentence lists


def summarise_study(study: StudyResults) -> list[str]:
    """Sentences about the primary metric, the other metrics, the scope of the study, and missing trials."""
    if not any(study.values(arm.name, study.primary) for arm in study.plan.arms):
        measured = f" Measured: {', '.join(study.ranked)}." if study.ranked else ""
        first = [
            f"No trial has ended with the primary metric {study.primary}: nothing can be said by it yet.{measured}"
        ]
    else:
        first = _one_seed(study) if len(study.plan.study.seeds) == 1 else _primary(study)
    return [*first, *_secondary(study), describe_scope(study.plan), *_unequal(study.plan), *_missing(study)]


def _name(study: StudyResults) -> str:
    return f"{study.primary} ({WORDS[direction(study.primary)]})"


def _one_seed(study: StudyResults) -> list[str]:
    values = {
        arm.name: metric_of(study.primary).ranked(next(iter(of_arm.values())))
        for arm in study.plan.arms
        if (of_arm := study.values(arm.name, study.primary))
    }
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    sentences = ["One seed: a lead, no claim. Another seed moves every number, and one seed cannot tell by how much."]
    if finite and direction(study.primary) != "listed":
        low, high = min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)
        sentences.append(
            f"By {_name(study)}, the arms lie between {formatting.number(finite[low])} ('{low}') and "
            f"{formatting.number(finite[high])} ('{high}')."
        )
    return sentences


def _primary(study: StudyResults) -> list[str]:
    metric, many = study.primary, len(study.compared)
    seeds = formatting.count(len(study.plan.study.seeds), "seed")
    if direction(metric) == "listed":
        return [f"The primary metric {metric} is neither better nor worse at any value: it is listed, not ranked."]
    if not study.compared:
        return ["The study has one arm: there is nothing to compare it with."]
    groups: dict[str, list[tuple[Arm, Difference]]] = {}
    for arm in study.compared:
        change = study.difference(arm, metric)
        groups.setdefault(formatting.verdict(metric, change), []).append((arm, change))
    marked = [*groups.pop("better", []), *groups.pop("worse", [])]
    compared = f"{formatting.count(many, 'arm')} compared, {seeds} planned each"
    seen = len(marked) or "none"
    sentences = [f"Primary metric: {_name(study)}; {compared}. A difference is seen for {seen} of them."]
    for arm, change in marked:
        sentences.append(
            f"'{arm.name}' is {formatting.verdict(metric, change)} than '{arm.against}': "
            f"{formatting.format_difference(metric, change)}, {formatting.interval_name(study)} "
            f"{formatting.interval(metric, change, wide=True)}, {len(change.seeds)} seeds."
        )
    if unseen := groups.pop("no difference seen", []):
        few = len(unseen) <= MOST_NAMED
        names = formatting.listing([arm.name for arm, _ in unseen]) if few else f"{len(unseen)} arms"
        sentences.append(f"No difference is seen for {names}. {_allowed(study, unseen)}")
    for verdict, members in groups.items():
        sentences.append(f"{formatting.listing([arm.name for arm, _ in members])}: {verdict}.")
    if unseen or marked:
        sentences.append(_strength(study, {len(change.seeds) for _, change in [*marked, *unseen]}))
    return sentences


def _allowed(study: StudyResults, unseen: list[tuple[Arm, Difference]]) -> str:
    """A sentence about the largest difference that the intervals of the `unseen` arms allow."""
    percents = [formatting.scale(study.primary, change) for _, change in unseen]
    ends = [max(abs(change.wide_low or 0), abs(change.wide_high or 0)) for _, change in unseen]
    text = formatting.number(max(ends), 2)
    if all(percents):
        most = max(end * (percent or 0) for end, percent in zip(ends, percents, strict=True))
        text = f"{most:.{1 if most < 10 else 0}f} %"
    return f"That is no proof of equality: differences of up to {text} fit the numbers."


def _strength(study: StudyResults, seeds: set[int]) -> str:
    """A sentence about half the width of the intervals in standard errors, for each number of seeds."""
    many, parts = len(study.compared), []
    for amount in sorted(seeds):
        alone, together = (f"{standard_errors(amount, m):.1f}" for m in (1, many))
        more = f" ({together} for {many} comparisons together)" if many > 1 else ""
        parts.append(f"with {amount} seeds {alone} standard errors to each side{more}")
    return f"An interval reaches {', '.join(parts)}: smaller or less consistent differences cannot be seen."


def _secondary(study: StudyResults) -> list[str]:
    others = [name for name in study.ranked if name != study.primary]
    if not others or len(study.plan.study.seeds) < 2:
        return []
    lines, metrics = [], set()
    for arm in study.compared:
        verdicts = {name: formatting.verdict(name, study.difference(arm, name)) for name in others}
        clauses = []
        for verdict in ("better", "worse"):
            names = [name for name in others if verdicts[name] == verdict]
            metrics.update(names)
            clauses += [f"{verdict} by {', '.join(names)}"] if names else []
        if clauses:
            lines.append(f"Secondary: '{arm.name}' against '{arm.against}' is {'; '.join(clauses)}.")
    seen = f"some difference is seen in {len(metrics)}" if metrics else "a difference is seen in none"
    chance = formatting.number(FALSE_RATE * len(others), 2)
    return [
        f"Secondary metrics: of {len(others)}, {seen}. Each is corrected for the number of arms only: of so many "
        f"metrics, about {chance} could show a difference by chance.",
        *lines,
    ]


def describe_scope(plan: Plan) -> str:
    """The size, budget and data for which a study's conclusions hold."""
    configs = [arm.config for arm in plan.arms]
    steps = _between([config.train.steps for config in configs], ",d")
    batch = _between([config.global_batch for config in configs], ",d")
    macs = _between([arm.cost["macs"] / 1e6 for arm in plan.arms], ",.4g")
    sources = ", ".join(dict.fromkeys(config.data.source for config in configs))
    seeds = formatting.count(len(plan.study.seeds), "seed")
    return (
        f"Every trial: {steps} steps of {batch} images from {sources}, at {macs} million MACs per image (forward); "
        f"{seeds} planned for each arm. The conclusions hold for this size, budget and data only."
    )


def _between(values: list[int] | list[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def _unequal(plan: Plan) -> list[str]:
    """A sentence about the costs in which arms differ by more than the tolerance; empty if there are no such costs."""
    study, unequal = plan.study, []
    kinds = {"macs": "MACs", "params": "parameters", "time": "time of a step"}
    for kind, name in kinds.items():
        gaps = [100 * arm.gap[kind] for arm in plan.arms if kind in arm.gap and arm.against != arm.name]
        if gaps and max(map(abs, gaps)) > 100 * study.tolerance:
            unequal.append(f"{name} {formatting.signed(min(gaps))} to {formatting.signed(max(gaps))} %")
    matched = f"Matched by {kinds[study.match]}" if study.match != "none" else "Nothing is matched"
    within = f"within {100 * study.tolerance:g} % of what an arm is compared with"
    return [f"{matched}. Not {within}: {', '.join(unequal)}."] if unequal else []


def _missing(study: StudyResults) -> list[str]:
    missing = list(study.missing())
    states = Counter(state for _, _, state, _ in missing)
    lost = list(dict.fromkeys(arm for arm, _, state, _ in missing if state in ("failed", "pruned")))
    sentences = []
    if lost:
        sentences.append(
            f"Seeds of {formatting.listing(lost)} failed or were pruned: the numbers of these arms are of their other "
            "seeds, which flatters them."
        )
    if states:
        parts = ", ".join(f"{amount} {state}" for state, amount in states.items())
        sentences.append(
            f"Incomplete: of {formatting.count(len(study.folders), 'trial')}, {parts}; they are listed below."
        )
    return sentences
