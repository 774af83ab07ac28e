"""`match`: change a model until it costs as much as another model."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_in_dit.cli.options import Commands, add_config, add_device, chosen_config, make_folder, print_table
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.files import to_yaml
from dit_in_dit.config.plugins import plugin_arguments
from dit_in_dit.runs.pretrained import find_run

ROWS = {  # the name in the table and the unit of each cost
    "macs": ("MACs per image", ""),
    "params": ("parameters", ""),
    "activation_bytes": ("kept for backward, per image", "B"),
    "time": ("training step", "s"),
}


def add(commands: Commands) -> None:
    """Add the command."""
    about = "change a model's outer transformer until both models cost the same; keys given with --set stay"
    match = commands.add("match", _match, about)
    add_config(match)
    about = "the model with the wanted cost: a preset, a YAML file or a run"
    match.add_argument("--like", required=True, metavar="NAME|FILE|RUN", help=about)
    match.add_argument(
        "--by", choices=("macs", "time", "params"), default="macs", help="the cost to match (default: macs)"
    )
    match.add_argument("--tolerance", type=float, default=0.01, help="largest relative difference (default: 0.01)")
    add_device(match)
    match.add_argument("--json", action="store_true", help="print JSON")
    match.add_argument("--out", type=Path, metavar="FILE.yaml", help="file for the twin's config")


def _match(options: argparse.Namespace) -> None:
    from dit_in_dit.api.measure import find_config
    from dit_in_dit.benchmark.timing import estimate_seconds
    from dit_in_dit.runtime.device import pick_device
    from dit_in_dit.study.match import costs, match, quick_times

    if not 1e-4 <= options.tolerance < 1:
        raise UserError(f"--tolerance must be at least 0.0001 and below 1: got {options.tolerance:g}")
    config, device = chosen_config(options), pick_device(options.device)
    named = find_config(options.like, "--like").model
    like = replace(config, model=named)  # step times compare only with equal training keys
    if options.out:
        make_folder(options.out.parent)
    if options.by == "time" and (seconds := estimate_seconds({"this": config, "like": like}, device)) > 10:
        print(f"about {seconds:.0f} s for each of several measurements", file=sys.stderr)
    fixed = {assignment.partition("=")[0] for assignment in options.set}
    twin = match(config, like, options.by, tolerance=options.tolerance, fixed=fixed, device=device)
    matched = replace(config, model=twin.model)
    like_costs = costs(like)
    pairs = {name: (own, like_costs[name]) for name, own in costs(matched).items()}
    ratios = {name: own / other for name, (own, other) in pairs.items()}
    if twin.seconds:
        pairs["time"], ratios["time"] = twin.seconds, 1 + twin.gap
    elif times := quick_times({"this": matched, "like": like}, device):
        pairs["time"] = times["this"].seconds, times["like"].seconds
        ratios["time"] = times["this"].over(times["like"])
    if options.like in presets.NAMES and (run := find_run(options.like) / "config.yaml").is_file():
        print(f"--like {options.like} is the preset; the run of that name is {truncate(run.parent)}", file=sys.stderr)
    words = [f"{name}={_yaml(after)}" for name, (_, after) in twin.changed.items()]
    if options.out:
        options.out.write_text(to_yaml(matched))
    if options.json:
        rows = {name: {"this": a, "like": b, "ratio": ratios[name]} for name, (a, b) in pairs.items()}
        wanted = {"by": options.by, "tolerance": options.tolerance, "gap": twin.gap, "device": str(device)}
        print(json.dumps({**wanted, "costs": rows, "changed": twin.changed, "set": words}, indent=1))
    else:
        _show(options, pairs, ratios, twin.changed, words)


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value)


def _amount(value: float, unit: str) -> str:
    prefix, scale = next((p, s) for p, s in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1), ("m", 0)) if value >= s)
    return f"{value / (scale or 1e-3):,.2f} {prefix}{unit}"


def _show(
    options: argparse.Namespace,
    pairs: dict[str, tuple[float, float]],
    ratios: dict[str, float],
    changed: dict[str, tuple[Any, Any]],
    words: list[str],
) -> None:
    start = ["--preset", options.preset] if options.preset else ["--config", str(options.config)]
    print(f"{start[1]}, matched to {options.like}\n")
    rows = []
    for name, (what, unit) in ROWS.items():
        if name in pairs:
            equal = "equal" if abs(ratios[name] - 1) <= options.tolerance else "unequal"
            verdict = "matched" if name == options.by else equal
            rows.append([what, *(_amount(value, unit) for value in pairs[name]), f"{ratios[name]:.3f}", verdict])
    print_table(["", "this", options.like, "ratio", ""], rows)
    for what in (ROWS[name][0] for name in ROWS if name not in pairs):
        print(f"  {what}: not measured, it takes long here or compiles")
    print("\nchanged" if changed else "\nnothing changed: the costs agree")
    print_table([], [[name, f"{_yaml(before)} -> {_yaml(after)}"] for name, (before, after) in changed.items()])
    arguments = [
        *start,
        *plugin_arguments(),
        *(word for assignment in (*options.set, *words) for word in ("--set", assignment)),
    ]
    print(f"\n  dit-in-dit train {shlex.join(arguments)} --out RUN")
