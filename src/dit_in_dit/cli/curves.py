"""`curves`: loss, held-out error, convergence speed and stability of several runs."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dit_in_dit.cli.options import Commands, make_folder, print_table
from dit_in_dit.config.errors import UserError
from dit_in_dit.runs import atomic
from dit_in_dit.runs.pretrained import find_run, results_folder


def add(commands: Commands) -> None:
    """Add the command."""
    curves = commands.add("curves", _curves, "training curves of runs: loss, held-out error, gradients, speed")
    curves.add_argument(
        "runs", type=find_run, nargs="+", metavar="RUN", help="run folders; runs that differ only in seed form a band"
    )
    curves.add_argument(
        "--reach",
        type=_target,
        action="append",
        default=[],
        metavar="T:ERROR",
        help="report when the held-out error at time T reached ERROR, such as 0.5:0.04; repeatable "
        "(default: the last error of the worst run)",
    )
    curves.add_argument("--out", type=Path, metavar="DIR", help="folder for results (default for one run: its folder)")


def _target(text: str) -> tuple[float, float]:
    t, _, error = text.partition(":")
    try:
        target = float(t), float(error)
    except ValueError:
        target = math.nan, math.nan
    if not (0 <= target[0] <= 1 and 0 < target[1] < math.inf):
        raise argparse.ArgumentTypeError(f"must be T:ERROR, such as 0.5:0.04: got {text[:40]!r}")
    return target


def _curves(options: argparse.Namespace) -> None:
    from dit_in_dit.curves.arms import arms, notes
    from dit_in_dit.curves.convergence import convergence_tables
    from dit_in_dit.curves.logs import read_run
    from dit_in_dit.curves.plots import draw_curves

    if not options.out and len(options.runs) > 1:
        raise UserError("curves of several runs need a folder for the results: give --out DIR")
    curves = [read_run(run) for run in options.runs]
    compared = arms(curves)
    result = {**convergence_tables(compared, options.reach), "notes": notes(curves)}
    out: Path = options.out or results_folder(options.runs[0], "curves")
    make_folder(out)
    pictures = draw_curves(compared, out)
    atomic.write_atomic(out / "curves.json", json.dumps(result, indent=1) + "\n")
    _print_arms(result["arms"])
    _print_held_out(result["held_out"])
    _print_reach(result["reach"])
    _print_stability(result)
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"\n{', '.join(path.name for path in pictures)} and curves.json in {out}")


def _print_stability(result: dict[str, Any]) -> None:
    heads = ["arm", "seed", "steps", "skipped", "non-finite", "loss spikes", "gradient spikes"]
    rows = []
    for row in result["stability"]:
        counts = [row[head.replace(" ", "_").replace("-", "_")] for head in heads]
        clipped = "-" if row["clipped"] is None else f"{100 * row['clipped']:.2f} %"
        rows.append([*counts, _number(row["largest_gradient"]), row["largest_at"], clipped])
    print_table([*heads, "largest gradient", "at step", "clipped"], rows, title="stability")
    for name in ("loss_spikes", "gradient_spikes"):
        print(f"  {name.replace('_', ' ')}: {result['definitions'][name]}")


def _print_arms(arms: list[dict[str, Any]]) -> None:
    rows = []
    for arm in arms:
        millions = f"{arm['forward_macs'] / 1e6:,.2f}"
        for run in arm["runs"]:
            speed = _number(run["hours"]), _number(run["images_per_second"])
            rows.append([arm["arm"], run["seed"], run["steps"], millions, *speed, run["run"]])
    print_table(["arm", "seed", "steps", "forward MMACs", "hours", "images/s", "run"], rows, title="arms")
    differing = list(dict.fromkeys(key for arm in arms for key in arm["differs"]))
    if differing:
        table = [[key, *(arm["differs"].get(key, "-") for arm in arms)] for key in differing]
        print_table(["key", *(str(number + 1) for number in range(len(arms)))], table, title="they differ in")


def _print_held_out(rows: list[dict[str, Any]]) -> None:
    heads = list(dict.fromkeys(f"t={row['t']:g} {row['frequencies']}" for row in rows))
    arms: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        cells = arms.setdefault((row["arm"], row["step"]), {})
        shown = "not finite" if row["mean"] is None else f"{row['mean']:.5f}{_between(row, '.5f')}"
        cells[f"t={row['t']:g} {row['frequencies']}"] = shown
    table = [[arm, step, *(cells.get(head, "-") for head in heads)] for (arm, step), cells in arms.items()]
    print_table(["arm", "step", *heads], table, title="last held-out error (mean over seeds)")


def _print_reach(rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        target = f"t={row['t']:g}: {row['error']:.5g}"
        if not row["needed"]:
            best = "-" if row["best"] is None else f"{row['best']:.5f}"
            missing = f"by {row['reached']} of {row['seeds']} seeds; best {best}"
            table.append([target, row["arm"], missing, "-", "-", "-"])
            continue
        sign = "<= " if row["bound"] else ""
        cells = []
        for name, scale, form in (("steps", 1, ".0f"), ("macs", 1e12, ".4g"), ("hours", 1, ".3g")):
            cell = "-"
            if values := row["needed"].get(name):
                scaled = {key: value / scale for key, value in values.items()}
                cell = f"{sign}{scaled['mean']:{form}}{_between(scaled, form)}"
                if name in row["ratio"]:
                    cell += f"  x{row['ratio'][name]:.2f}"
            cells.append(cell)
        table.append([target, row["arm"], f"by {row['reached']} of {row['seeds']} seeds", *cells])
    heads = ["held-out error", "arm", "reached", "steps", "training TMACs", "hours"]
    print_table(heads, table, title="convergence speed (x: ratio to the first arm)")


def _between(values: dict[str, float], form: str) -> str:
    return "" if values["low"] == values["high"] else f" ({values['low']:{form}} to {values['high']:{form}})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
