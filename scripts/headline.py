"""Write the tables of README.md and of pages in docs, the README's figures, and those of reports, from result files.

`python scripts/headline.py` reads plan.json, results.csv and curves.csv of results/studies/* and the evaluations of
models/*, writes results/headline.png and the differences.png beside each study's report, and puts each table between
its marks, `<!-- STUDY WHAT -->` and `<!-- /STUDY WHAT -->`, where WHAT is arms, errors, whole, samples, samples64,
semantic, detail, curve, search, goals or summary; the shipped models' marks say `models scores` and `models64 scores`;
`FOLDER sampling` is the table of the evaluations in results/FOLDER, which sample one model in several ways.
Run it again and nothing changes.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageDraw

from dit_in_dit.config.program import format_stages
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.metrics.metric import metric_of
from dit_in_dit.reporting.plots import COLOURS, figure, figure_png
from dit_in_dit.runs import atomic
from dit_in_dit.study.exports import take_trials
from dit_in_dit.study.forest import draw_forest
from dit_in_dit.study.results import read_study
from dit_in_dit.study.statistics import Difference, paired_difference

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "results" / "studies"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("does-nesting-help", "lab-notebook", "recipes", "shipped-models")),
)
METRICS = {
    "errors": {
        "held_out.0.2.high": "fine error, t = 0.2",
        "held_out.0.5.high": "t = 0.5",
        "held_out.0.8.high": "t = 0.8",
    },
    "whole": {
        "held_out.0.2.whole": "whole error, t = 0.2",
        "held_out.0.5.whole": "t = 0.5",
        "held_out.0.8.whole": "t = 0.8",
    },
    "samples": {
        "swd.32": "samples: finest SWD",
        "swd.16": "middle SWD",
        "swd.8": "coarse SWD",
        "spectrum": "spectrum",
        "seam.8": "patch borders",
    },
    "samples64": {
        "swd.64": "samples: finest SWD",
        "swd.32": "next",
        "swd.8": "coarsest",
        "spectrum": "spectrum",
        "seam.8": "patch borders",
    },
    "semantic": {
        "classifier.accuracy": "recognised as their class",
        "classifier.frechet": "Fréchet distance of the classifier's features",
    },
    "detail": {
        "detail.period@0.5": "known texture at t = 0.5: period",
        "detail.direction@0.5": "direction",
        "detail.contrast@0.5": "contrast",
        "detail.layout@0.5": "layout",
    },
}
CURVE = (300, 600, 1200, 2400, 3600, 4800)  # steps
HEADLINE = {"nesting": "emoji", "nesting-mosaic": "mosaic"}  # the two studies that answer the question
# The default nested model against a plain DiT with the same blocks: (study, data, arm).
SUMMARY = (
    ("field", "emoji, 32x32", "nested, today"),
    ("nesting-64", "emoji, 64x64", "nested"),
    ("field-fashion", "Fashion-MNIST, 32x32", "nested, today"),
    ("field-mosaic", "mosaic (made textures), 32x32", "nested, today"),
    ("nesting-64-mosaic", "mosaic, 64x64", "nested"),
)
ROWS_SHOWN = 3  # of each shipped model's samples, in the picture
# (arm, what is wanted, metric, least gain in percent; 0: no worse)
GOALS = (
    ("nested", "equal MACs, fine error at t = 0.2", "held_out.0.2.high", 25),
    ("nested", "at t = 0.5", "held_out.0.5.high", 10),
    ("nested", "at t = 0.8", "held_out.0.8.high", 0),
    ("nested", "finest SWD of samples", "swd.32", 20),
    ("nested, equal time", "equal time, fine error at t = 0.2", "held_out.0.2.high", 15),
    ("nested, equal time", "at t = 0.5", "held_out.0.5.high", 5),
    ("nested, equal time", "finest SWD of samples", "swd.32", 10),
)
MODELS = {"models": ("emoji", "emoji-dit"), "models64": ("emoji-64", "emoji-64-dit")}  # nested, and its plain twin
SCORES = {
    "models": {
        "swd.32": "finest SWD",
        "swd.16": "middle SWD",
        "swd.8": "coarse SWD",
        "spectrum": "spectrum, dB",
        "seam.8": "patch borders",
        "classifier.accuracy": "recognised",
        "memorised": "memorised",
        "repeated": "repeated",
    },
    "models64": {
        "swd.64": "finest SWD",
        "swd.32": "next",
        "swd.8": "coarsest",
        "spectrum": "spectrum, dB",
        "seam.8": "patch borders",
        "classifier.accuracy": "recognised",
        "memorised": "memorised",
        "repeated": "repeated",
    },
}
MARKS = re.compile(r"<!-- ([\w-]+) (\w+) -->\n(.*?)<!-- /\1 \2 -->", re.DOTALL)


@dataclass(frozen=True)
class Found:
    """What a study found.

    Attributes:
        plan: plan.json.
        against: what each compared arm is compared with.
        values: every number, by arm and metric, by seed.
    """

    plan: dict[str, Any]
    against: dict[str, str]
    values: dict[tuple[str, str], dict[int, float]]

    def change(self, arm: str, metric: str) -> Difference | None:
        """To what the arm is compared with, with an interval for all arms of the study together."""
        other = self.against[arm]
        if (arm, metric) not in self.values:
            return None
        return paired_difference(self.values[arm, metric], self.values[other, metric], len(self.against))


def read(study: str) -> Found:
    """A study's files."""
    plan = json.loads((STUDIES / study / "plan.json").read_text())
    values: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    with (STUDIES / study / "results.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["state"] == "done":
                value = metric_of(row["metric"]).ranked(float(row["value"]))
                values[row["arm"], row["metric"]][int(row["seed"])] = value
    against = {arm["name"]: arm["against"] for arm in plan["arms"] if arm["against"] != arm["name"]}
    return Found(plan, against, values)


def cell(found: Difference | None) -> str:
    """Percent and interval; bold where the interval excludes zero."""
    if found is None or found.scale is None:
        return ""
    text = f"{found.percent:+.1f}%"
    if found.wide_low is None or found.wide_high is None:
        return text
    text += f" ({found.wide_low * found.scale:+.1f} to {found.wide_high * found.scale:+.1f})"
    return f"**{text}**" if found.marked else text


def rows(header: list[str], lines: list[list[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def changes(study: str, kind: str) -> str:
    """A row for each compared arm."""
    found, metrics = read(study), METRICS[kind]
    lines = []
    for arm, other in found.against.items():
        beside = "" if other == found.plan["study"]["control"] else f" (to {other})"
        lines.append([arm + beside, *(cell(found.change(arm, metric)) for metric in metrics)])
    return rows([HEADLINE.get(study, study), *metrics.values()], lines)


def arms(study: str) -> str:
    """What each arm is and costs."""
    found, lines = read(study).plan["arms"], []
    base = found[0]["cost"]
    for arm in found:
        model, cost = ModelConfig.from_dict(arm["config"]["model"]), arm["cost"]
        stages = f"`{format_stages(model.program)}`"
        inner = f"s = {model.inner.sub_patch}, E = {model.inner.width}" if model.blocks("inner") else ""
        lines.append(
            [
                *(arm["name"], stages, str(model.patch_size), str(model.outer.width), inner),
                *(f"{cost['macs'] / 1e6:.2f} M", f"{cost['params'] / 1e6:.2f} M"),
                f"{cost['time'] / base['time']:.2f}",
            ]
        )
    return rows(["arm", "stages", "p", "D", "inner", "MACs", "parameters", "step"], lines)


def curve(study: str) -> str:
    """The change of the fine error on the way, at three times, mean over seeds; then when each arm has what the arm it
    is compared with has at the end."""
    found, errors = read(study), defaultdict(dict)
    with (STUDIES / study / "curves.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            errors[row["arm"], row["metric"]].setdefault(int(row["step"]), []).append(float(row["value"]))

    def mean(arm: str, metric: str) -> dict[int, float]:
        return {step: sum(values) / len(values) for step, values in errors[arm, metric].items()}

    lines = []
    for arm, other in found.against.items():
        both = [(mean(arm, metric), mean(other, metric)) for metric in METRICS["errors"]]
        changes_at = [[f"{100 * (mine[s] / its[s] - 1):+.1f}" for mine, its in both] for s in CURVE]
        there = [next((str(s) for s in sorted(mine) if mine[s] <= its[CURVE[-1]]), "never") for mine, its in both]
        lines.append([arm, *map(" / ".join, changes_at), " / ".join(there)])
    return rows(["change in % at step", *map(str, CURVE), f"has plain's error of step {CURVE[-1]} at step"], lines)


def search(study: str) -> str:
    """What each trial of a search changed, and its fine errors, the best first."""
    trials: dict[str, dict[str, str]] = defaultdict(dict)
    with (STUDIES / study / "results.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            changed = {name.removeprefix("model."): value for name, value in row.items() if name.startswith("model.")}
            trials[row["number"]] |= changed | {row["metric"]: row["value"]}
    heads = [*changed, *METRICS["errors"].values()]
    best = sorted(trials.values(), key=lambda trial: float(trial["held_out.0.2.high"]))
    lines = [
        [*(trial[name] for name in changed), *(f"{float(trial[metric]):.4f}" for metric in METRICS["errors"])]
        for trial in best
    ]
    return rows(heads, lines)


def scores(pair: str) -> str:
    """What the evaluations of a pair of shipped models found."""
    found = {}
    for name in MODELS[pair]:
        (path,) = (ROOT / "models" / name / "evaluation").glob("*/metrics.json")
        found[f"`{name}`"] = read_evaluation(path)
    return scored(found, SCORES[pair])


def sampling(folder: str) -> str:
    """What a model's evaluations in results/FOLDER found, one for each way of sampling."""
    paths = sorted((ROOT / "results" / folder).glob("*/metrics.json"))
    found = [read_evaluation(path) for path in paths]
    return scored({way(each["protocol"]["samples"]): each for each in found}, SCORES["models64"])


def read_evaluation(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def way(samples: dict[str, Any]) -> str:
    """The guidance of an evaluation, by its protocol."""
    below = f", below t = {samples['interval'][1]:g}" if samples["interval"][1] < 1 else ""
    twin = f", and {samples['guide_scale']:g} away from the twin" if "guide" in samples else ""
    seed = f", seed {samples['seed']}" if samples["seed"] else ""
    return f"guidance {samples['guidance']:g}{below}{twin}{seed}"


def scored(found: dict[str, dict[str, Any]], metrics: dict[str, str]) -> str:
    """A row of scores for each evaluation, and their floors: real images against real images."""
    lines = [[name, *(f"{each['scores'][metric]['value']:.3g}" for metric in metrics)] for name, each in found.items()]
    floors = [f"{next(iter(found.values()))['scores'][metric]['floor']:.3g}" for metric in metrics]
    return rows(["", *metrics.values()], [*lines, ["real against real", *floors]])


def verdict(change: Difference, wanted: int) -> str:
    """Whether a goal is met: the mean is as wanted, and the interval for all arms together excludes zero."""
    if change.percent is None:
        return "not shown"
    if wanted == 0:
        return "not met" if change.marked and change.percent > 0 else "met" if change.percent <= 0 else "not shown"
    if change.percent > -wanted:
        return "not met"
    return "met" if change.marked else "mean alone"


def summary() -> str:
    """The default nested model's fine errors on each data set, to a plain DiT with the same blocks."""
    lines = []
    for study, data, arm in SUMMARY:
        found = read(study)
        lines.append([data, *(cell(found.change(arm, metric)) for metric in METRICS["errors"])])
    return rows(["data", "t = 0.2", "t = 0.5", "t = 0.8"], lines)


def draw_samples(path: Path) -> None:
    """The first rows of samples of both models of 32x32, the same noise and classes one above the other."""
    grids = [Image.open(ROOT / "models" / name / "samples.png") for name in reversed(MODELS["models"])]
    width, height = grids[0].size
    part = height * ROWS_SHOWN // 10  # of ten
    sheet = Image.new("RGB", (width, 2 * part + 44), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (grid, name) in enumerate(zip(grids, ("plain DiT", "nested, equal MACs"), strict=True)):
        top = number * (part + 22)
        pen.text((6, top + 4), name, fill="black", font_size=14)
        sheet.paste(grid.crop((0, 0, width, part)), (0, top + 22))
    sheet.save(path, optimize=True)


def draw_differences(study: Path) -> None:
    """The figure at the head of a study's report, from its kept rows."""
    with TemporaryDirectory() as place:
        take_trials(study, Path(place))
        atomic.write_atomic(study / "differences.png", draw_forest(read_study(Path(place))))


def goals() -> str:
    """Each goal on each data set of the headline."""
    studies = [read(study) for study in HEADLINE]
    lines = []
    for arm, what, metric, wanted in GOALS:
        line = [f"{what}, {f'{wanted}%' if wanted else 'no worse'}"]
        for found in studies:
            change = found.change(arm, metric)
            line.append(f"{verdict(change, wanted)}: {cell(change)}" if change else "")
        lines.append(line)
    return rows(["goal", *HEADLINE.values()], lines)


def block(study: str, what: str) -> str:
    """The table between two marks; KeyError where there is no such study, or nothing of that name."""
    whole = {"goals": goals, "summary": summary}
    if what in whole:
        return whole[what]()
    tables = {"arms": arms, "curve": curve, "search": search, "scores": scores, "sampling": sampling}
    return tables[what](study) if what in tables else changes(study, what)


def draw(path: Path) -> None:
    """A panel for each metric and data set: the change in percent with its interval, an arm a colour."""
    shown = {**METRICS["errors"], "swd.32": METRICS["samples"]["swd.32"]}
    made, axes = figure(len(HEADLINE), len(shown), width=2.6, height=1.7)
    for row, study in zip(axes, HEADLINE, strict=True):
        found = read(study)
        for axis, (metric, title) in zip(row, shown.items(), strict=True):
            for y, arm in enumerate(found.against):
                change, colour = found.change(arm, metric), COLOURS[y % len(COLOURS)]
                if change is None or change.scale is None:
                    continue
                if change.wide_low is not None and change.wide_high is not None:
                    axis.hlines(-y, change.wide_low * change.scale, change.wide_high * change.scale, color=colour, lw=2)
                axis.plot(change.percent, -y, "o", color=colour, markersize=4)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set(yticks=[-y for y in range(len(found.against))], ylim=(0.6 - len(found.against), 0.4))
            axis.set_yticklabels(list(found.against) if axis is row[0] else [], fontsize=7)
            axis.tick_params(axis="x", labelsize=6)
            axis.set_title(f"{HEADLINE[study]}: {title}", fontsize=8)
    made.suptitle(
        "change to plain DiT in percent, with 95% intervals for all arms together; left of 0: better", fontsize=8
    )
    path.write_bytes(figure_png(made))


def filled(text: str) -> str:
    """A page with every table as the files have it."""

    def fill(found: re.Match[str]) -> str:
        name, what, _ = found.groups()
        return f"<!-- {name} {what} -->\n{block(name, what)}\n<!-- /{name} {what} -->"

    return MARKS.sub(fill, text)


def main() -> None:
    draw(ROOT / "results" / "headline.png")
    draw_samples(ROOT / "results" / "nested-beside-plain.png")
    for report in sorted(STUDIES.glob("*/report.md")):
        if "](differences.png)" in report.read_text():  # a search has no differences
            draw_differences(report.parent)
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
