"""Write the README's headline, and the tables of docs/does-nesting-help.md, from the studies' files.

`python scripts/headline.py` reads plan.json and results.csv of results/studies/* (and unguided.csv, where there is one:
the same trials drawn again without guidance), writes results/headline.png and puts each table between its marks
`<!-- NAME -->` and `<!-- /NAME -->`. Run it again and nothing changes.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from pathlib import Path

from dit_in_dit.figures import COLOURS, figure, save
from dit_in_dit.study.metrics import ranked
from dit_in_dit.study.statistics import Difference, difference

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "results" / "studies"
ERRORS = {
    "held_out.0.2.high": "fine error, t = 0.2",
    "held_out.0.5.high": "t = 0.5",
    "held_out.0.8.high": "t = 0.8",
}
SAMPLES = {"swd.32": "samples: finest SWD", "swd.16": "middle SWD", "swd.8": "coarse SWD", "spectrum": "spectrum"}
WHOLE = {
    "held_out.0.2.whole": "whole error, t = 0.2",
    "held_out.0.5.whole": "t = 0.5",
    "held_out.0.8.whole": "t = 0.8",
}
SETS = {"nesting": "emoji", "nesting-mosaic": "mosaic"}
Values = dict[tuple[str, str], dict[int, float]]  # by arm and metric, by seed


def read(name: str, file: str) -> tuple[dict[str, str], Values]:
    """What each arm of a study is compared with, and every number; nothing where the study is not there."""
    folder = STUDIES / name
    if not (folder / file).exists():
        return {}, {}
    plan = json.loads((folder / "plan.json").read_text())
    against = {arm["name"]: arm["against"] for arm in plan["arms"] if arm["against"] != arm["name"]}
    values: Values = defaultdict(dict)
    with (folder / file).open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["state"] == "done":
                values[row["arm"], row["metric"]][int(row["seed"])] = ranked(row["metric"], float(row["value"]))
    return against, values


def changes(name: str, file: str, metrics: dict[str, str]) -> dict[str, dict[str, Difference]]:
    """By arm and metric: the difference to what the arm is compared with, for all arms of the study together."""
    against, values = read(name, file)
    return {
        arm: {m: difference(values[arm, m], values[other, m], len(against)) for m in metrics if (arm, m) in values}
        for arm, other in against.items()
    }


def cell(found: Difference | None) -> str:
    """Percent and interval; bold where the interval excludes zero."""
    if found is None or found.scale is None:
        return ""
    text = f"{found.percent:+.1f}%"
    if found.wide_low is None or found.wide_high is None:
        return text
    text += f" ({found.wide_low * found.scale:+.1f} to {found.wide_high * found.scale:+.1f})"
    return f"**{text}**" if found.marked else text


def table(name: str, file: str, metrics: dict[str, str]) -> str:
    """A row for each compared arm."""
    found = changes(name, file, metrics)
    against, _ = read(name, file)
    control = json.loads((STUDIES / name / "plan.json").read_text())["study"]["control"] if found else ""
    lines = [f"| {SETS[name]} | {' | '.join(metrics.values())} |", "|---" * (1 + len(metrics)) + "|"]
    for arm, row in found.items():
        beside = "" if against[arm] == control else f" (to {against[arm]})"
        lines.append(f"| {arm}{beside} | {' | '.join(cell(row.get(metric)) for metric in metrics)} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """A panel for each metric and data set: the change in percent with its interval, an arm a colour."""
    shown = {**ERRORS, "swd.32": SAMPLES["swd.32"]}
    made, axes = figure(len(SETS), len(shown), width=2.6, height=1.7)
    for row, name in zip(axes, SETS, strict=True):
        unguided = "unguided.csv" if (STUDIES / name / "unguided.csv").exists() else "results.csv"
        found = changes(name, "results.csv", ERRORS)
        for arm, more in changes(name, unguided, {"swd.32": ""}).items():
            found[arm] |= more
        for axis, (metric, title) in zip(row, shown.items(), strict=True):
            for y, differences in enumerate(found.values()):
                change, colour = differences.get(metric), COLOURS[y % len(COLOURS)]
                if change is None or change.scale is None:
                    continue
                if change.wide_low is not None and change.wide_high is not None:
                    axis.hlines(-y, change.wide_low * change.scale, change.wide_high * change.scale, color=colour, lw=2)
                axis.plot(change.percent, -y, "o", color=colour, markersize=4)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set(yticks=[-y for y in range(len(found))], ylim=(0.6 - len(found), 0.4))
            axis.set_yticklabels(list(found) if axis is row[0] else [], fontsize=7)
            axis.tick_params(axis="x", labelsize=6)
            axis.set_title(f"{SETS[name]}: {title}", fontsize=8)
    made.suptitle(
        "change to plain DiT in percent, with 95% intervals for all arms together; left of 0: better", fontsize=8
    )
    save(made, path)


def put(path: Path, blocks: dict[str, str]) -> None:
    """Replace what stands between the marks of each block that the file has."""
    text = path.read_text()
    for name, block in blocks.items():
        marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
        text = marks.sub(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)
    path.write_text(text)


def blocks() -> dict[str, str]:
    """Every table by the name of its marks."""
    found = {}
    for name, images in SETS.items():
        found[f"{images} errors"] = table(name, "results.csv", ERRORS)
        found[f"{images} whole"] = table(name, "results.csv", WHOLE)
        found[f"{images} samples"] = table(name, "results.csv", SAMPLES)
        if (STUDIES / name / "unguided.csv").exists():
            found[f"{images} unguided"] = table(name, "unguided.csv", SAMPLES)
    return found


def main() -> None:
    draw(ROOT / "results" / "headline.png")
    for path in (ROOT / "README.md", ROOT / "docs" / "does-nesting-help.md"):
        put(path, blocks())


if __name__ == "__main__":
    main()
