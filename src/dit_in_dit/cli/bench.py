"""`bench`: the speed of models, their time by part, and whether they meet the speed goals."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median_high
from typing import TYPE_CHECKING, Any

from dit_in_dit.cli.options import (
    Commands,
    add_device,
    chosen_config,
    make_folder,
    number_where,
    print_table,
    whole_number,
)
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs import atomic

if TYPE_CHECKING:
    from dit_in_dit.benchmark.report import BenchmarkReport

BESIDE = ("plain", "first-written", "diffusers", "official")
TWIN_TOLERANCE = 0.02  # in MACs, of the plain twin


def add(commands: Commands) -> None:
    """Add the command."""
    about = "measure time, memory and parts of models, and compare them with other models and with goals"
    bench = commands.add("bench", _bench, about)
    bench.add_argument(
        "--suite",
        choices=("cpu", "cuda", "quick"),
        help="measure a suite of goals (default without --preset and --sweep: the suite of the device)",
    )
    bench.add_argument("--preset", nargs="+", default=[], metavar="NAME|FILE", help="presets or YAML files of configs")
    bench.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of every config")
    bench.add_argument(
        "--beside",
        type=_others,
        default=("plain",),
        metavar="A,B",
        help="models to compare with: plain (equal MACs), first-written, diffusers, official (default: plain)",
    )
    bench.add_argument(
        "--sweep",
        type=_swept,
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="how cost grows over image, p, s, S, E or batch; repeatable (default preset: emoji)",
    )
    bench.add_argument("--dit", type=Path, metavar="DIR", help="a checkout of facebookresearch/DiT to compare with")
    add_device(bench)
    bench.add_argument("--threads", type=whole_number, help="CPU threads (default: torch's default)")
    bench.add_argument(
        "--seconds",
        type=number_where(lambda seconds: 0 < seconds <= 3600, "above 0 and at most 3600"),
        help="measuring time for each comparison (default: the suite's, or 5)",
    )
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.add_argument("--out", type=Path, metavar="DIR", help="folder for bench.json and plots")


def _others(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(BESIDE):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(BESIDE)}: got {sorted(unknown)[0][:40]!r}")
    return names


def _swept(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, values = text.partition("=")
    try:
        return name, tuple(whole_number(value) for value in values.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be KEY=A,B,... with whole numbers, such as E=32,64,128: got {text[:40]!r}"
        ) from None


def _bench(options: argparse.Namespace) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler reports when it starts
    from dit_in_dit.benchmark.bench import Bench
    from dit_in_dit.benchmark.experiments import comparison, run_experiments, run_sweeps
    from dit_in_dit.benchmark.report import draw_benchmark
    from dit_in_dit.benchmark.suite import SUITES, check_suite
    from dit_in_dit.reporting.plots import figure
    from dit_in_dit.runtime.device import pick_device
    from dit_in_dit.runtime.threads import use_threads
    from dit_in_dit.study.match import match

    def twin(plain: RunConfig, like: RunConfig) -> RunConfig:
        return replace(plain, model=match(plain, like, "macs", tolerance=TWIN_TOLERANCE).model)

    device = pick_device(_device(options))
    runs, asked = _runs(options), dict(options.sweep)
    suite = options.suite or (None if runs or asked else "cuda" if device.type == "cuda" else "cpu")
    if suite:
        check_suite(suite, device)
    if options.out:
        figure()  # a missing matplotlib is an error before anything is measured
        make_folder(options.out)
    if "official" in options.beside and not options.dit:
        raise UserError("--beside official needs the official code: name a checkout of facebookresearch/DiT with --dit")
    seconds = options.seconds or (SUITES[suite].seconds if suite else 5.0)
    bench = Bench(_command(options), device, seconds, twin, options.dit)
    if suite == "quick":
        bench.report.notes.append("models of --suite quick are far too small for its goals to mean anything")
    todo = [*(run_experiments(SUITES[suite], bench) if suite else ()), *comparison(runs, options.beside, bench)]
    todo += run_sweeps(runs or {"emoji": chosen_config(_start(options, "emoji"))}, asked, bench)
    with use_threads(options.threads):
        _run(todo)
        values = bench.report.to_dict()
    if options.json:
        print(json.dumps(values, indent=1))
    else:
        _show(bench.report, values)
    if options.out:
        atomic.write_atomic(options.out / "bench.json", json.dumps(values, indent=1) + "\n")
        written = [path.name for path in draw_benchmark(bench.report, options.out)]
        if not options.json:
            print(f"\n{', '.join([*written, 'bench.json'])} in {options.out}")


def _device(options: argparse.Namespace) -> str:
    """The device's name; with --device auto, the suite's device."""
    if options.device != "auto" or options.suite is None:
        return str(options.device)
    return "cpu" if options.suite == "quick" else str(options.suite)


def _runs(options: argparse.Namespace) -> dict[str, RunConfig]:
    if options.set and not options.preset and not options.sweep:
        raise UserError("--set changes what --preset names: give --preset NAME")
    return {name: chosen_config(_start(options, name)) for name in options.preset}


def _start(options: argparse.Namespace, name: str) -> argparse.Namespace:
    """The arguments of `chosen_config` for a preset or a file."""
    is_file = Path(name).suffix in (".yaml", ".yml")
    return argparse.Namespace(preset=None if is_file else name, config=Path(name) if is_file else None, set=options.set)


def _command(options: argparse.Namespace) -> str:
    """The command that repeats the measurements."""
    words = ["dit-in-dit", "bench"]
    if options.suite:
        words += ["--suite", options.suite]
    if options.preset:
        words += ["--preset", *options.preset, "--beside", ",".join(options.beside)]
    words += [word for key in options.set for word in ("--set", key)]
    words += [word for key, values in options.sweep for word in ("--sweep", f"{key}={','.join(map(str, values))}")]
    words += ["--dit", "DIT"] if options.dit else []
    for name in ("threads", "seconds"):
        if value := getattr(options, name):
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _run(todo: list[Any]) -> None:
    """Run every experiment; show a progress bar, and a line when an experiment ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bar:
        task = bar.add_task("", total=len(todo))
        for name, experiment in todo:
            bar.update(task, description=name)
            began = time.perf_counter()
            experiment()
            bar.console.print(f"{name}: {time.perf_counter() - began:.0f} s", markup=False)
            bar.advance(task)


def _show(report: BenchmarkReport, values: Mapping[str, Any]) -> None:
    hardware = values["hardware"]
    place = hardware.get("accelerator", f"{hardware['processor']}, {hardware['threads']} threads")
    print(f"{place}, torch {values['versions']['torch']}")
    for precision, speed in report.products.items():
        print(f"best matrix product in {precision}: {speed / 1e9:,.0f} GMAC/s")
    _show_ratios(values["ratios"])
    _show_subjects(values["subjects"])
    _show_parts(report)
    _show_sweeps(values["sweeps"])
    for note in report.notes:
        print(f"note: {note}")


def _show_ratios(ratios: list[dict[str, Any]]) -> None:
    rows = []
    for ratio in ratios:
        sign = ">=" if ratio["at_least"] else "<="
        goal = "-" if ratio["goal"] is None else f"{sign} {ratio['goal']:.2f}"
        low, high = ratio["quartiles"]
        met = {True: "met", False: "NOT MET", None: ""}[ratio["met"]]
        spread = f"{low:.3f} to {high:.3f}" if len(ratio["rounds"]) > 1 else "exact"
        rows.append([ratio["name"], f"{ratio['ratio']:.3f}", spread, len(ratio["rounds"]), goal, met, ratio["how"]])
    print_table(
        ["", "ratio", "half of the rounds", "rounds", "goal", "", "of"], rows, title="ratios, measured in turns"
    )


def _show_subjects(subjects: Mapping[str, dict[str, Any]]) -> None:
    rows = []
    for name, subject in subjects.items():
        kind = subject["precision"] + (", compiled" if subject["compiled"] else "")
        times = [f"{1000 * median_high(subject[what]):,.1f}" for what in ("forward", "step")]
        peak = "-" if subject["peak_bytes"] is None else f"{subject['peak_bytes'] / 1e9:.2f}"
        rate = [f"{subject['images_per_second']:,.1f}", f"{subject['macs_per_second'] / 1e9:,.1f}"]
        share, kept = f"{subject['share']:.0%}", f"{subject['kept_bytes'] / 1e6:,.1f}"
        rows.append([name, f"{subject['macs'] / 1e6:,.1f}", subject["batch"], kind, *times, *rate, share, kept, peak])
    heads = ["", "MMACs", "batch", "", "forward, ms", "step, ms", "images/s", "GMAC/s", "share", "kept, MB", "peak, GB"]
    print_table(heads, rows, title="models (share: of the best matrix product, in training)")


def _show_parts(report: BenchmarkReport) -> None:
    from dit_in_dit.benchmark.parts import table_kinds, table_parts

    for name, parts in report.parts.items():
        seconds, macs, kinds = table_parts(parts.seconds), table_parts(parts.macs), table_kinds(parts.kinds)
        best = report.products[parts.precision]
        rows = []
        for part, taken in seconds.items():
            rate = f"{macs[part] / taken / 1e9:,.1f}" if macs.get(part) else "-"
            share = f"{macs[part] / taken / best:.0%}" if macs.get(part) else "-"
            mostly = sorted(kinds.get(part, {}).items(), key=lambda kind: -kind[1])[:4]
            whole_part = sum(kinds.get(part, {}).values()) or 1.0
            why = ", ".join(f"{kind} {value / whole_part:.0%}" for kind, value in mostly)
            rows.append([part, f"{1000 * taken:,.2f}", f"{taken / sum(seconds.values()):.0%}", rate, share, why])
        heads = ["", "ms", "time", "GMAC/s", "share", "by the profiler"]
        print_table(heads, rows, title=f"parts of a training step: {name}")


def _show_sweeps(sweeps: Mapping[str, dict[str, Any]]) -> None:
    for name, sweep in sweeps.items():
        rows = []
        for point in sweep["points"]:
            times = [f"{1000 * median_high(point[what]):,.2f}" for what in ("step", "inner")]
            counts = [f"{point[what] / 1e6:,.1f}" for what in ("macs", "inner_macs", "kept")]
            rows.append([point["value"], *times, *counts])
        powers = sweep["exponents"]
        order = ("step", "inner", "macs", "inner_macs", "kept")
        rows.append(["exponent", *(f"{powers[what]:.2f}" if what in powers else "-" for what in order)])
        heads = [sweep["axis"], "step, ms", "inner path, ms", "MMACs", "of inner path", "kept, MB"]
        print_table(heads, rows, title=f"{name} (exponents against {sweep['label']})")
