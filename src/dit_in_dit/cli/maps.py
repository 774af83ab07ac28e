"""`maps`: a trained run's attention, effect of the inner path, and trajectories, as a page and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_in_dit.cli.options import Commands, add_sampling, chosen_average, make_folder, sampling_config, whole_number
from dit_in_dit.runs.pretrained import find_run, results_folder

MOST_TIMES = 99


def add(commands: Commands) -> None:
    """Add the command."""
    maps = commands.add("maps", _maps, "look inside a trained run: attention, effect of the inner path, trajectories")
    maps.add_argument("run_folder", type=find_run, metavar="RUN")
    maps.add_argument(
        "--num", type=whole_number, default=6, help="number of held-out images and of samples (default 6)"
    )
    maps.add_argument(
        "--times", type=parse_times, default="0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9", help="default 0.1,...,0.9"
    )
    add_sampling(maps)
    maps.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the page (default: RUN/maps; for a shipped run: maps/RUN)"
    )


def parse_times(text: str) -> tuple[float, ...]:
    """Parse comma-separated times above 0 and below 1, and sort them."""
    try:
        times = sorted({float(part) for part in text.split(",")})
    except ValueError:
        times = []
    if not 1 <= len(times) <= MOST_TIMES or not 0 < times[0] <= times[-1] < 1:
        raise argparse.ArgumentTypeError(f"must be times above 0 and below 1, such as 0.1,0.5,0.9: got {text[:40]!r}")
    return tuple(times)


def _maps(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from dit_in_dit.attention_maps.figures import figures
    from dit_in_dit.attention_maps.findings import findings, not_shown
    from dit_in_dit.attention_maps.page import page
    from dit_in_dit.attention_maps.record import choose, record_maps
    from dit_in_dit.data.run_data import open_source_of
    from dit_in_dit.reporting.plots import figure, figure_png
    from dit_in_dit.runs import atomic
    from dit_in_dit.runs.checkpoint import Checkpoint
    from dit_in_dit.runtime.device import pick_device

    figure()  # first: a missing matplotlib is reported before the long work
    device = pick_device(options.device)
    saved = Checkpoint.open(options.run_folder)
    model, names = saved.model(device, averaged=chosen_average(options, saved.config)), saved.classes
    config, classes = sampling_config(options, saved.config, names)
    source = open_source_of(options.run_folder, config)
    views = choose(source, config, options.num, options.times, classes)
    out: Path = options.out or results_folder(options.run_folder, "maps")
    make_folder(out)
    with Progress(
        TextColumn("looking"), BarColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=len(views.images) * len(views.times) + 2 * config.sample.steps)
        record = record_maps(
            model,
            config,
            views,
            samples=min(options.num, 8),
            seed=options.seed,
            classes=classes,
            advance=lambda: bar.advance(task),
        )
    title = options.run_folder.resolve().name
    written = [("maps.html", "all of them in one page: open it in a browser, move t, click a patch")]
    atomic.write_atomic(out / "maps.html", page(record, names, title, saved.step))
    for name, what, drawn in figures(record, names):
        atomic.write_atomic(out / name, figure_png(drawn))
        written.append((name, what))
    for name, what in written:
        print(f"{out / name}  {what}")
    print()
    for sentence in findings(record) + not_shown(config.model):
        print(sentence)
