"""The report of a search: every trial, the best ones, and a study that would confirm them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from dit_in_dit.config.program import format_stages
from dit_in_dit.config.schema import to_dict
from dit_in_dit.inspection import cost
from dit_in_dit.metrics.metric import WORDS, direction
from dit_in_dit.reporting.document import Cell, Chapter, Table, Verbatim
from dit_in_dit.reporting.plots import COLOURS, figure_png, panel_grid
from dit_in_dit.study import formatting, tables
from dit_in_dit.study.arms import describe_changes
from dit_in_dit.study.exports import csv_text, metric_rows
from dit_in_dit.study.figures import draw_samples, save_picture
from dit_in_dit.study.results import SearchResults, SearchTrial

CONFIRMED = 3  # best trials that the proposed study takes
SHOWN = 6  # best trials whose samples are shown


def summarise_search(searched: SearchResults) -> list[str]:
    """Sentences about the number of trials, the best trial, and how much a search can claim."""
    study = searched.plan.study
    states = Counter(map(_state, searched.trials))
    counted = ", ".join(f"{states[s]} {s}" for s in ("done", "pruned", "failed", "not done") if states[s])
    sentences = [f"Tried: {len(searched.trials)} of {study.trials} configs ({counted or 'none'})."]
    if not searched.ranked:
        return [*sentences, f"No trial has ended with the primary metric {study.primary}: nothing can be said yet."]
    best, last = searched.ranked[0], searched.ranked[-1]
    value, worst = (formatting.number(searched.value(trial)) for trial in (best, last))
    sentences.append(
        f"By {study.primary} ({WORDS[direction(study.primary)]}), the best of {len(searched.ranked)} is number "
        f"{best.number}, {describe_changes(best.changes)}, with {value}; the last is number {last.number} with {worst}."
    )
    sentences.append(
        "This is a lead, no claim: the best of many by one seed each is better than it would be with another seed. "
        "Confirm it by a study with named arms and fresh seeds; one is proposed below."
    )
    return sentences


def _state(trial: SearchTrial) -> str:
    return "not done" if trial.result is None else trial.result.state


def chapters(searched: SearchResults, out: Path) -> list[Chapter]:
    """The report's chapters: panels, samples, a study to confirm the best trials, all trials, and the protocol."""
    protocols = [t.result.protocol for t in searched.trials if t.result and t.result.state == "done"]
    parts: list[Chapter] = []
    if searched.ranked:
        caption = f"{searched.plan.study.primary} against each key and MACs, a dot for each trial; ring: the best."
        parts.append(Chapter("Key by key", [save_picture(out, "search", _draw(searched), caption)]))
        drawn = {f"number {t.number}": t.folder / "drawn.npz" for t in searched.ranked[:SHOWN]}
        if drawn := {name: path for name, path in drawn.items() if path.exists()}:
            what = "The best trials, the best first: below each other, images of the same noise and class."
            parts.append(Chapter("Samples", [save_picture(out, "samples", draw_samples(drawn), what)]))
        what = "A study of the best, with seeds that the search has not used"
        parts.append(Chapter("To confirm", [Verbatim(what, confirm(searched))]))
    protocol = tables.protocol_tables(searched.plan, protocols)
    return [*parts, Chapter("Tried", [_table(searched)]), Chapter("Protocol", protocol, True)]


def _keys(searched: SearchResults) -> list[str]:
    return list(dict.fromkeys(name for trial in searched.trials for name in trial.changes))


def _rows(searched: SearchResults) -> list[tuple[SearchTrial, list[str]]]:
    """Every trial and its table cells. The best trial comes first; trials without a finite metric come last."""
    ranked, keys, rows = searched.ranked, _keys(searched), []
    known = {trial.number for trial in ranked}
    for trial in [*ranked, *(trial for trial in searched.trials if trial.number not in known)]:
        value = searched.value(trial)
        changes = [str(trial.changes.get(name, "-")) for name in keys]
        shown = formatting.number(value) if math.isfinite(value) else "-"
        rows.append((trial, [str(trial.number), *changes, formatting.number(_macs(trial)), shown]))
    return rows


def _macs(trial: SearchTrial) -> float | None:
    """Million MACs of a forward pass per image; None without a config."""
    return cost.macs(trial.config.model)["total"] / 1e6 if trial.config else None


def _heads(searched: SearchResults) -> list[str]:
    keys = [name.removeprefix("model.") for name in _keys(searched)]
    return ["number", *keys, "million MACs", searched.plan.study.primary]


def _table(searched: SearchResults) -> Table:
    rows: list[list[str | Cell]] = []
    for trial, cells in _rows(searched):
        state, result = _state(trial), trial.result
        reason = result.reason or f"at step {result.step}" if result else ""
        stages = format_stages(trial.config.model.program) if trial.config else "-"
        rows.append([*cells, stages, state, "" if state == "done" else Cell(reason, "soft")])
    heads = [*_heads(searched), "stages", "state", "reason"]
    return Table(heads, rows, note="Sorted by the primary metric; one seed each.")


def _draw(searched: SearchResults) -> bytes:
    """Plot a panel for each searched key, and a panel for MACs."""
    ranked = searched.ranked
    values = [searched.value(trial) for trial in ranked]
    panels: dict[str, list[Any]] = {
        name.removeprefix("model."): [trial.changes.get(name) for trial in ranked] for name in _keys(searched)
    }
    panels["million MACs per image"] = [_macs(trial) for trial in ranked]
    columns = min(3, len(panels))
    page, axes = panel_grid(len(panels), columns, width=3.6, height=2.7)
    for number, (axis, (name, at)) in enumerate(zip(axes, panels.items(), strict=True)):
        numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x in at)
        kinds = sorted({str(x) for x in at})
        x = at if numeric else [kinds.index(str(value)) for value in at]
        axis.plot(x, values, "o", color=COLOURS[0], alpha=0.55, markersize=5, markeredgewidth=0)
        axis.plot(x[0], values[0], "o", markersize=9, markerfacecolor="none", markeredgecolor=COLOURS[1])
        if not numeric:
            long = max(map(len, kinds)) > 8
            axis.set_xticks(range(len(kinds)), [k[:28].replace("$", r"\$") for k in kinds], rotation=20 if long else 0)
            axis.set_xlim(-0.5, len(kinds) - 0.5)
        elif min(at) > 0 and max(at) > 10 * min(at):
            axis.set_xscale("log")
        axis.set_xlabel(name)
        if number % columns == 0:
            axis.set_ylabel(searched.plan.study.primary)
    return figure_png(page)


def confirm(searched: SearchResults) -> str:
    """YAML of a study that compares the best trials with the base, on seeds that the search has not used."""
    plan = searched.plan
    study, used = plan.study, set(plan.study.seeds)
    fresh = [seed for seed in range(len(used) + 5) if seed not in used][:5]
    best: list[SearchTrial] = []
    for trial in searched.ranked:  # a sampler may repeat a choice
        if len(best) < CONFIRMED and all(trial.changes != other.changes for other in best):
            best.append(trial)
    arms: dict[str, Any] = {"base": {}, **{f"number {trial.number}": trial.changes for trial in best}}
    changed: dict[str, Any] = {"question": f"are the best configs of the search {plan.name} better than its base?"}
    changed |= {"arms": arms, "seeds": fresh}
    left_out = ("grid", "search", "trials", "control", "prune")
    proposed = {name: changed.get(name, value) for name, value in to_dict(study).items() if name not in left_out}
    plain = json.loads(json.dumps({name: value for name, value in proposed.items() if value not in ("", {})}))
    return yaml.safe_dump(plain, sort_keys=False, width=110)


def search_paper_table(searched: SearchResults) -> tuple[list[str], list[list[str]], str]:
    """Column heads, rows and caption of the table for a paper: all trials with a finite primary metric."""
    rows = [cells for trial, cells in _rows(searched) if math.isfinite(searched.value(trial))]
    caption = f"{searched.plan.study.question or searched.plan.name} A search, one seed each: a lead, no claim."
    return _heads(searched), rows, caption


def search_csv(searched: SearchResults) -> str:
    """CSV: a line for each trial and metric, with the trial's changes. A trial without metrics has one line."""
    keys, seed = _keys(searched), searched.plan.study.seeds[0]
    rows = (
        row
        for trial in searched.trials
        for row in metric_rows(
            [trial.number, *(trial.changes.get(name, "") for name in keys), seed, _state(trial)], trial.result
        )
    )
    return csv_text(["number", *keys, "seed", "state", "step", "metric", "value", "floor"], rows)
