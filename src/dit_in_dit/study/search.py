"""What is told of a search: everything that was tried, and no more than one seed can say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from dit_in_dit.config.program import format_stages
from dit_in_dit.inspection import cost
from dit_in_dit.metrics.metric import WORDS, direction
from dit_in_dit.reporting.document import Cell, Chapter, Picture, Table, Verbatim
from dit_in_dit.reporting.plots import COLOURS, figure, figure_png
from dit_in_dit.runs import atomic
from dit_in_dit.study import formatting, tables
from dit_in_dit.study.arms import describe
from dit_in_dit.study.exports import csv_text, metric_rows
from dit_in_dit.study.figures import draw_samples
from dit_in_dit.study.results import SearchResults, SearchTrial

CONFIRMED = 3  # best trials that the proposed study takes
SHOWN = 6  # best trials whose samples are drawn


def summarise_search(searched: SearchResults) -> list[str]:
    """Sentences: how much was tried, what came out best, and what that is worth."""
    study = searched.plan.study
    states = {
        name: sum(_state(t) == name for t in searched.trials) for name in ("done", "pruned", "failed", "not done")
    }
    counted = ", ".join(f"{amount} {state}" for state, amount in states.items() if amount)
    found = [f"Tried: {len(searched.trials)} of {study.trials} configs ({counted or 'none'})."]
    if not searched.ranked:
        return [*found, f"No trial has ended with the primary metric {study.primary}: nothing can be said yet."]
    best, last = searched.ranked[0], searched.ranked[-1]
    value, far = (formatting.number(searched.value(tried)) for tried in (best, last))
    found.append(
        f"By {study.primary} ({WORDS[direction(study.primary)]}), the best of {len(searched.ranked)} is number "
        f"{best.number}, {describe(best.changes)}, with {value}; the last is number {last.number} with {far}."
    )
    found.append(
        "This is a lead, no claim: the best of many by one seed each is better than it would be with another seed. "
        "Confirm it by a study with named arms and fresh seeds; one is proposed below."
    )
    return found


def _state(tried: SearchTrial) -> str:
    return "not done" if tried.result is None else tried.result.state


def chapters(searched: SearchResults, out: Path) -> list[Chapter]:
    """Protocol, what was tried, panels and samples."""
    evaluated = next((t.result.protocol for t in searched.trials if t.result and t.result.protocol), {})
    found = [
        Chapter("Protocol", tables.protocol_tables(searched.plan, evaluated)),
        Chapter("Tried", [_table(searched)]),
    ]
    if searched.ranked:
        panels, samples = out / "figures" / "search.png", out / "figures" / "samples.png"
        _draw(searched, panels)
        caption = f"{searched.plan.study.primary} against each key and MACs, a dot for each trial; ring: the best."
        found.append(Chapter("Key by key", [Picture(panels, caption)]))
        drawn = {f"number {t.number}": t.folder / "drawn.npz" for t in searched.ranked[:SHOWN]}
        drawn = {name: path for name, path in drawn.items() if path.exists()}
        if drawn:
            draw_samples(drawn, samples)
            what = "The best trials, the best first: below each other, images of the same noise and class."
            found.append(Chapter("Samples", [Picture(samples, what)]))
        what = "A study of the best, with seeds that the search has not used"
        found.append(Chapter("To confirm", [Verbatim(what, confirm(searched))]))
    return found


def _keys(searched: SearchResults) -> list[str]:
    return list(dict.fromkeys(name for tried in searched.trials for name in tried.changes))


def _rows(searched: SearchResults) -> list[tuple[SearchTrial, list[str]]]:
    """Every trial, the best first and those without a number last, and its cells."""
    ranked = searched.ranked
    known = {tried.number for tried in ranked}
    rest = [tried for tried in searched.trials if tried.number not in known]
    found = []
    for tried in [*ranked, *rest]:
        value = searched.value(tried)
        macs = _macs(tried)
        changes = [str(tried.changes.get(name, "-")) for name in _keys(searched)]
        shown = formatting.number(value) if math.isfinite(value) else "-"
        found.append((tried, [str(tried.number), *changes, formatting.number(macs), shown]))
    return found


def _macs(tried: SearchTrial) -> float | None:
    """Millions for an image, forward."""
    return cost.macs(tried.config.model)["total"] / 1e6 if tried.config else None


def _heads(searched: SearchResults) -> list[str]:
    keys = [name.removeprefix("model.") for name in _keys(searched)]
    return ["number", *keys, "million MACs", searched.plan.study.primary]


def _table(searched: SearchResults) -> Table:
    rows: list[list[str | Cell]] = []
    for tried, cells in _rows(searched):
        step = f"at step {tried.result.step}" if tried.result else ""
        reason = tried.result.reason if tried.result and tried.result.reason else step
        state = _state(tried)
        stages = format_stages(tried.config.model.program) if tried.config else "-"
        rows.append([*cells, stages, state, "" if state == "done" else Cell(reason, "soft")])
    heads = [*_heads(searched), "stages", "state", "reason"]
    return Table(heads, rows, note="Sorted by the primary metric; one seed each.")


def _draw(searched: SearchResults, path: Path) -> None:
    """A panel for each key, and one for MACs."""
    ranked = searched.ranked
    values = [searched.value(tried) for tried in ranked]
    panels: dict[str, list[Any]] = {
        name.removeprefix("model."): [tried.changes.get(name) for tried in ranked] for name in _keys(searched)
    }
    panels["million MACs per image"] = [_macs(tried) for tried in ranked]
    columns = min(3, len(panels))
    made, axes = figure(-(-len(panels) // columns), columns, width=3.6, height=2.7)
    for axis in axes.ravel()[len(panels) :]:
        axis.set_visible(False)
    for number, (axis, (name, at)) in enumerate(zip(axes.ravel(), panels.items(), strict=False)):
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
    atomic.write_atomic(path, figure_png(made))


def confirm(searched: SearchResults) -> str:
    """YAML of a study of the best trials against the base, with seeds that the search has not used."""
    plan = searched.plan
    study, used = plan.study, set(plan.study.seeds)
    fresh = [seed for seed in range(len(used) + 5) if seed not in used][:5]
    best: list[SearchTrial] = []
    for tried in searched.ranked:  # a sampler may choose the same twice
        if len(best) < CONFIRMED and all(tried.changes != other.changes for other in best):
            best.append(tried)
    arms: dict[str, Any] = {"base": {}, **{f"number {tried.number}": tried.changes for tried in best}}
    proposed = {
        "question": f"are the best configs of the search {plan.name} better than its base?",
        "base": study.base,
        "set": study.set,
        "arms": arms,
        "match": study.match,
        "tolerance": study.tolerance,
        "budget": study.budget,
        "seeds": fresh,
        "metrics": list(study.metrics),
        "primary": study.primary,
        "samples": study.samples,
        "weights": study.weights,
        "dinov2": study.dinov2,
        "threads": study.threads,
    }
    plain = json.loads(json.dumps({name: value for name, value in proposed.items() if value not in ("", {})}))
    return yaml.safe_dump(plain, sort_keys=False, width=110)


def search_paper_table(searched: SearchResults) -> tuple[list[str], list[list[str]], str]:
    """Heads, rows and caption of a table to paste: the trials with a number."""
    rows = [cells for tried, cells in _rows(searched) if math.isfinite(searched.value(tried))]
    caption = f"{searched.plan.study.question or searched.plan.name} A search, one seed each: a lead, no claim."
    return _heads(searched), rows, caption


def search_csv(searched: SearchResults) -> str:
    """CSV: a line for each trial and metric, with its changes; one without a metric for a trial that has none."""
    keys, seed = _keys(searched), searched.plan.study.seeds[0]
    rows = (
        row
        for trial in searched.trials
        for row in metric_rows(
            [trial.number, *(trial.changes.get(name, "") for name in keys), seed, _state(trial)], trial.result
        )
    )
    return csv_text(["number", *keys, "seed", "state", "step", "metric", "value", "floor"], rows)
