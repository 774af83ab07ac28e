"""The tables of a study of named arms."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dit_in_dit.config.program import format_stages
from dit_in_dit.config.schema import to_dict
from dit_in_dit.curves.convergence import DEFINITIONS, stability, steps_to_reach
from dit_in_dit.metrics.metric import TITLES, direction
from dit_in_dit.reporting.document import Cell, Table, Tone
from dit_in_dit.study import formatting
from dit_in_dit.study.plan import Arm, Plan
from dit_in_dit.study.results import StudyResults

BESIDE = "other trials may have run beside"  # a caveat of everything timed while trials ran
BONFERRONI = " (Bonferroni)"
FLOOR = "real against real"
TONES: dict[str, Tone] = {"better": "better", "worse": "worse"}  # by verdict; all other verdicts have the tone "soft"


def protocol_tables(plan: Plan, protocols: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The study's keys, the machine and data with which the study was planned, and the evaluation protocol of its
    trials, which is empty for those that were taken from kept rows."""
    evaluation = next(filter(None, protocols), {})
    rows = []
    for name, value in to_dict(plan.study).items():
        if isinstance(value, dict) and name != "budget":
            rows += [(f"{name}: {key}", _shown(inner)) for key, inner in value.items()]
        elif value != "" and (plan.study.search or name not in ("trials", "prune")):
            rows.append((name, _shown(value) if value != {} else "train.steps"))
    tables = [Table(["key", "value"], rows, "The study", words=True)]
    if rows := [(name, _shown(value)) for name, value in plan.made.items()]:
        tables.append(Table(["what", "value"], rows, "Planned on", words=True))
    if evaluation:
        rows = [(name, _shown(value)) for name, value in _flat(evaluation)]
        note = "The same for all trials: others would have been refused."
        if taken := sum(not protocol for protocol in protocols):
            note = f"The same for all trials trained here. {taken} were taken from kept rows, which have none."
        tables.append(Table(["field", "value"], rows, "Evaluation of samples", note, words=True))
    return tables


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_shown(inner)}" for name, inner in value.items()) or "(nothing changed)"
    return value if isinstance(value, str) else json.dumps(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def cost(study: StudyResults) -> Table:
    """Every arm's stages and costs, with the gaps to the arm it is compared with."""
    kinds = {"macs": ("million MACs", 1e-6), "params": ("million parameters", 1e-6), "time": ("ms a step", 1e3)}
    if not any("time" in arm.cost for arm in study.plan.arms):
        del kinds["time"]
    heads = ["arm", "compared with", "stages", "D", "E", *(head for head, _ in kinds.values())]
    heads += ["training, seconds", "changed to match"]
    scales = {kind: scale for kind, (_, scale) in kinds.items()}
    rows = [_cost_row(study, arm, scales) for arm in study.plan.arms]
    note = (
        "MACs: multiply-accumulates of a forward pass for one image. In brackets: the gap to the arm "
        "that it is compared with. Time of a step: measured when the study was planned. "
        f"Training: mean over seeds, by the clock of the machines that ran them; {BESIDE}."
    )
    return Table(heads, rows, note=note)


def _cost_row(study: StudyResults, arm: Arm, scales: Mapping[str, float]) -> list[str]:
    model, is_control = arm.config.model, arm.against == arm.name
    inner = str(model.inner.width) if model.blocks("inner") else "-"
    row = [arm.name, "-" if is_control else arm.against, format_stages(model.program), str(model.outer.width), inner]
    for kind, scale in scales.items():
        amount = f"{arm.cost[kind] * scale:.4g}" if kind in arm.cost else "-"
        has_gap = kind in arm.gap and not is_control
        row.append(f"{amount} ({formatting.signed(100 * arm.gap[kind])} %)" if has_gap else amount)
    changed = "; ".join(f"{name}: {before} to {after}" for name, (before, after) in arm.matched.items())
    spent = training_seconds(study, arm.name)
    return [*row, "-" if spent is None else f"{spent:,.0f}", changed or "-"]


def training_seconds(study: StudyResults, arm: str) -> float | None:
    """Mean seconds of training over the seeds that are done; None if no times were logged."""
    logs = [log for key, log in study.logs.items() if key[0] == arm and key in study.done]
    totals = [float(log.seconds[-1]) for log in logs if len(log.seconds)]
    return float(np.mean(totals)) if totals else None


def primary(study: StudyResults) -> Table:
    """The differences in the primary metric, with verdicts, intervals, p-values and means."""
    metric, many, interval = study.primary, len(study.compared), formatting.interval_name(study, BONFERRONI)
    intervals = {f"interval, all {many} together": True, "95% interval": False} if many > 1 else {"95% interval": False}
    heads = ["arm", "verdict", "difference", *intervals, "p", "mean", "compared with", "its mean", "seeds"]
    rows: list[list[str | Cell]] = []
    for arm in study.compared:
        change = study.difference(arm, metric)
        row: list[str | Cell] = [arm.name, _verdict(formatting.verdict(metric, change))]
        row.append(formatting.format_difference(metric, change))
        row += [formatting.interval(metric, change, wide=wide) or "-" for wide in intervals.values()]
        row += [formatting.number(change.p, 2), formatting.mean(study, arm.name, metric)]
        rows.append([*row, arm.against, formatting.mean(study, arm.against, metric), str(len(change.seeds))])
    note = (
        "Difference: arm less the other, seed by seed; in percent of the other's mean. Student's t over the seeds that "
        f"both have. A verdict is better or worse where the {interval} excludes zero. p is of the single "
        "comparison. ±: half of the 95% interval over seeds."
    )
    return Table(heads, rows, f"Differences by {metric}", note)


def _verdict(verdict: str, text: str = "") -> Cell:
    return Cell(text or verdict, TONES.get(verdict, "soft"))


def differences(study: StudyResults) -> list[Table]:
    """The differences in every ranked metric, a table for each group of metrics."""
    tables, interval = [], formatting.interval_name(study, BONFERRONI)
    for group, members in study.metrics.items():
        metrics = [name for name in members if direction(name) != "listed"]
        if not metrics:
            continue
        rows: list[list[str | Cell]] = []
        for arm in study.compared:
            name = arm.name if arm.against == study.plan.control.name else f"{arm.name} against {arm.against}"
            rows.append([name, *(_difference(study, arm, metric) for metric in metrics)])
        note = (
            f"Difference ({interval}). In colour and with a word: the interval excludes zero. "
            "Corrected for the number of arms, not for the number of metrics."
        )
        tables.append(Table(["arm", *metrics], rows, f"{TITLES.get(group, group)}: differences", note))
    return tables


def _difference(study: StudyResults, arm: Arm, metric: str) -> Cell:
    change = study.difference(arm, metric)
    verdict, between = formatting.verdict(metric, change), formatting.interval(metric, change, wide=True)
    text = formatting.format_difference(metric, change) + (f" ({between})" if between else "")
    return _verdict(verdict, f"{text} {verdict}" if change.marked else text)


def means_table(study: StudyResults) -> list[Table]:
    """Mean and interval of every arm in every metric, a table for each group of metrics."""
    tables = []
    for group, metrics in study.metrics.items():
        rows: list[list[str | Cell]] = [
            [arm.name, *(formatting.mean(study, arm.name, metric) for metric in metrics)] for arm in study.plan.arms
        ]
        floors = [study.floor(metric) for metric in metrics]
        if any(floor is not None for floor in floors):
            rows.append([Cell(FLOOR, "soft"), *(Cell(formatting.number(floor), "soft") for floor in floors)])
        note = "Mean over seeds ± half of its 95% interval (Student's t)."
        tables.append(Table(["arm", *metrics], rows, TITLES.get(group, group), note))
    return tables


def convergence(study: StudyResults) -> list[Table]:
    """The cost at which each arm reached the final error of the worst run, a table for each time t.

    Raises:
        UserError: the arms' held-out sets differ.
    """
    # ratios are relative to the first arm
    arms = sorted(study.arms_of_curves(), key=lambda arm: arm.name != study.plan.control.name)
    tables: dict[tuple[float, float], list[list[str | Cell]]] = {}
    for row in steps_to_reach(arms):
        cells = [row.arm, f"{row.reached} of {row.seeds}"]
        for kind, scale in (("steps", 1.0), ("macs", 1e-12), ("hours", 3600.0)):
            needed = row.needed.get(kind)
            sign = "<= " if row.bound else ""
            ratio = f" (x{row.ratio[kind]:.2f})" if kind in row.ratio else ""
            cells.append(f"{sign}{needed.mean * scale:.4g}{ratio}" if needed else "-")
        tables.setdefault((row.t, row.error), []).append([*cells])
    heads = ["arm", "seeds that did", "steps", "training TMACs", "seconds"]
    note = f"Mean over seeds: {DEFINITIONS['reach']}. x: ratio to the first arm. Seconds: {BESIDE}."
    return [
        Table(heads, rows, f"Until the held-out error at t = {t:g}, whole image, was {error:.4g}", note)
        for (t, error), rows in tables.items()
    ]


def stability_table(study: StudyResults) -> Table:
    """Skipped steps, spikes and gradient norms of every arm, over all seeds of the arm together."""
    counts, rows = ("steps", "skipped", "non_finite", "loss_spikes", "gradient_spikes"), []
    for arm in study.arms_of_curves():
        runs = [stability(curve) for curve in arm.curves]
        sums = [f"{sum(getattr(run, count) for run in runs):,d}" for count in counts]
        largest = max((run.largest_gradient for run in runs if run.largest_gradient is not None), default=None)
        clipped = [run.clipped for run in runs if run.clipped is not None]
        share = f"{100 * float(np.mean(clipped)):.1f} %" if clipped else "-"
        rows.append([arm.name, str(len(runs)), *sums, formatting.number(largest), share])
    heads = ["arm", "seeds", "steps", "skipped", "not finite", "loss spikes", "gradient spikes"]
    heads += ["largest gradient norm", "clipped"]
    note = "; ".join(f"{kind.replace('_', ' ')}: {DEFINITIONS[kind]}" for kind in (*counts[1:], "clipped"))
    return Table(heads, rows, "Stability, all seeds of an arm together", f"{note}.")


def missing_trials(study: StudyResults) -> Table:
    """Every trial without metrics, and the reason."""
    rows = [[arm, str(seed), state, reason] for arm, seed, state, reason in study.missing()]
    return Table(["arm", "seed", "state", "reason"], rows, words=True)


def not_finite_metrics(study: StudyResults) -> list[str]:
    """Arms and metrics whose values are not all finite numbers."""
    return [
        f"'{arm.name}': {metric} is not finite in {formatting.count(bad, 'seed')}."
        for arm in study.plan.arms
        for metric in study.ranked
        if (bad := sum(not math.isfinite(value) for value in study.values(arm.name, metric).values()))
    ]
