"""Scores of a run's averages over their length relative to the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dit_in_dit.config.averages import LENGTH
from dit_in_dit.metrics.report import read_evaluation
from dit_in_dit.reporting import plots
from dit_in_dit.runs import atomic
from dit_in_dit.runs.power_function import measured_length
from dit_in_dit.training.ema import ema_decay

COLUMNS = 4  # panels in a row


def average_length(name: str, step: int) -> float:
    """Relative length of an average at a step: the standard deviation of the averaged steps by their weights."""
    if name.startswith(LENGTH):
        return float(name.removeprefix(LENGTH))
    return measured_length(partial(ema_decay, most=float(name)), step)


def compare_averages(evaluations: Mapping[str, Path], step: int) -> dict[str, Any]:
    """Scores of evaluations of a run's averages at a step, by name: the averages in the order of their lengths, and by
    score an entry of each."""
    lengths = {name: average_length(name, step) for name in evaluations}
    names = sorted(evaluations, key=lengths.__getitem__)
    scores = [read_evaluation(evaluations[name])["scores"] for name in names]
    every = dict.fromkeys(score for each in scores for score in each)
    return {
        "step": step,
        "averages": {name: lengths[name] for name in names},
        "scores": {score: [each.get(score) for each in scores] for score in every},
    }


def draw_averages(compared: Mapping[str, Any], out: Path) -> None:
    """Write averages.json and averages.png: each score over the averages' relative length."""
    atomic.write_atomic(out / "averages.json", json.dumps(compared, indent=1) + "\n")
    names, lengths = list(compared["averages"]), list(compared["averages"].values())
    marks = [name.removeprefix(LENGTH) if name.startswith(LENGTH) else f"ema {name}" for name in names]
    figure, axes = plots.panel_grid(len(compared["scores"]), COLUMNS, width=3.0, height=2.4)
    for axis, (score, entries) in zip(axes, compared["scores"].items(), strict=True):
        points = [(x, each) for x, each in zip(lengths, entries, strict=True) if each is not None]
        axis.plot([x for x, _ in points], [each["value"] for _, each in points], "o-", color=plots.COLOURS[0], ms=4)
        for x, each in points:
            if each["low"] is not None:
                axis.vlines(x, each["low"], each["high"], color=plots.COLOURS[0], alpha=0.4, linewidth=4)
        if floor := next((each["floor"] for _, each in points if each["floor"] is not None), None):
            axis.axhline(floor, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(score, fontsize=8)
        axis.set_xticks(lengths, marks, rotation=60, fontsize=6)
    title = f"averages at step {compared['step']} by relative length, with 95% intervals; dotted: real against real"
    figure.suptitle(title, fontsize=8)
    atomic.write_atomic(out / "averages.png", plots.figure_png(figure))
