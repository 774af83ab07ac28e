"""`draw`: the figure of a model's architecture, or of all presets."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_in_dit.cli.options import Commands, add_config, chosen_config, make_folder
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.field import FAMILIES, PUBLISHED
from dit_in_dit.config.files import override
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.pretrained import find_run


def add(commands: Commands) -> None:
    """Add the command."""
    command = commands.add("draw", _draw, "draw a model: stages, shapes, who sees whom, parameters and MACs, as an SVG")
    command.add_argument("run_folder", nargs="?", type=find_run, metavar="RUN", help="draw the model of this run")
    add_config(command)
    command.add_argument("--all", action="store_true", help="draw every preset, and a page with all figures")
    about = "light, dark, or auto (default): as the viewer prefers"
    command.add_argument("--theme", choices=("auto", "light", "dark"), default="auto", help=about)
    about = "the SVG file (default: NAME.svg); with --all a folder (default: figures)"
    command.add_argument("--out", type=Path, metavar="FILE|DIR", help=about)


def _draw(options: argparse.Namespace) -> None:
    from dit_in_dit.api.diagram import draw

    if options.all:
        _draw_all(options.out or Path("figures"), options)
        return
    if (run := options.run_folder) and (options.preset or options.config):
        raise UserError("RUN, --preset and --config exclude each other: give one of them")
    title = run.resolve().name if run else options.preset or (options.config.stem if options.config else "model")
    out = options.out or Path(f"{title}.svg")
    if out.suffix != ".svg":
        raise UserError(f"--out must end in .svg: got {truncate(out)}")
    config = override(read_config(run), options.set) if run else chosen_config(options)
    figure = draw(config, theme=options.theme, title=title)
    make_folder(out.parent)
    figure.save(out)
    print(f"the figure of {title} in {out}")


def _draw_all(out: Path, options: argparse.Namespace) -> None:
    """Write the figure of every preset, and `index.html` with all of them."""
    from rich.console import Console
    from rich.progress import track

    from dit_in_dit.api.diagram import draw, gallery_page
    from dit_in_dit.runs import atomic

    if options.run_folder or options.preset or options.config or options.set:
        raise UserError("--all draws the presets as they are: leave out RUN, --preset, --config and --set")
    make_folder(out)
    for name in track(presets.NAMES, "drawing", console=Console(stderr=True)):
        draw(presets.get(name), theme=options.theme, title=name).save(out / f"{name}.svg")
    about = {name: FAMILIES[PUBLISHED[name][0]].title if name in PUBLISHED else "" for name in presets.NAMES}
    atomic.write_atomic(out / "index.html", gallery_page(about))
    print(f"{len(presets.NAMES)} figures and index.html in {out}")
