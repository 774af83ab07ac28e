"""`data`: show a source of images, and choose a config for it."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dit_in_dit.cli.options import Commands, chosen_config, make_folder, print_table
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import parse_assignment
from dit_in_dit.config.run import DataConfig, RunConfig
from dit_in_dit.runs import atomic
from dit_in_dit.runtime.process import is_main

if TYPE_CHECKING:
    import torch

    from dit_in_dit.data.summary import Summary

SHOWN = 24  # most classes and most unread files that are listed


def add(commands: Commands) -> None:
    """Add the command."""
    about = "show images: classes, counts, sizes, copies, near pairs, what is not read, and the preset that fits"
    data = commands.add("data", _data, about)
    data.add_argument("source", metavar="SOURCE", help="a folder, .zip, .npz, .tar shards, hf:NAME ... (data.source)")
    data.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config; repeatable")
    data.add_argument("--out", type=Path, metavar="DIR", help="folder for data.png and nearest.png")


def _data(options: argparse.Namespace) -> None:
    from dit_in_dit.data.summary import near_pairs, summarise_source
    from dit_in_dit.reporting.images import image_png
    from dit_in_dit.runtime.device import pick_device

    summary = summarise_source(options.source, dict(map(parse_assignment, options.set)))
    _show(summary, options.out)
    source, found = summary.source, near_pairs(summary.source)
    print(f"\ncopies: {found.copies[0]} of {found.searched[0]} training images equal an earlier one,")
    print(f"  {found.copies[1]} of {found.searched[1]} held-out images equal a training or an earlier held-out image")
    rows = [[f"{d:.3f}", source.title(held, held_out=True), source.title(train)] for d, held, train in found.pairs]
    print_table(["rms distance", "held out", "training image"], rows, title="nearest pairs across the split")
    if options.out and rows:
        content = image_png(found.draw(source, open_or_keep(summary.config.data, pick_device("cpu"))))
        atomic.write_atomic(options.out / "nearest.png", content)


def own_config(options: argparse.Namespace) -> RunConfig:
    """The config that fits --data. A new run's folder gets `data.png`, and the choices are printed."""
    from dit_in_dit.data.summary import summarise_source

    settings = {key: value for key, value in map(parse_assignment, options.set) if value != "auto"}
    base = None
    if options.preset or options.config:  # if it has num_classes=auto, the classes of the new place are counted
        place = [f"data.source={json.dumps(options.data)}"]
        base = chosen_config(argparse.Namespace(preset=options.preset, config=options.config, set=place))
    summary = summarise_source(options.data, settings, base)
    if is_main() and not (options.out / "config.yaml").exists():
        _show(summary, options.out)
    return summary.config


def _show(summary: Summary, out: Path | None) -> None:
    """Print sizes, classes and counts, what is not read, and the choices; write `data.png`."""
    from dit_in_dit.data.summary import draw_classes
    from dit_in_dit.reporting.images import image_png
    from dit_in_dit.runtime.device import pick_device

    source = summary.source
    areas = sorted((h * w, f"{h}x{w}") for _, h, w in summary.shapes) or [(0, "any size")]
    sizes = dict.fromkeys(areas[n][1] for n in (0, len(areas) // 2, -1))
    print(f"{summary.config.data.source}: {len(source.classes)} classes, {', '.join(sizes)} (least, median, most)")
    trained = Counter(map(int, source.labels))
    of = "training images" if source.train_size is not None else "endless"
    print_table(["class", of], [(source.classes[n], count) for n, count in trained.most_common(SHOWN)])
    more = [f"{len(trained) - SHOWN} smaller classes"] if len(trained) > SHOWN else []
    more.append(f"{source.train_size or 'endless'} training images, {source.held_out_size} held out")
    for line in [*more, *source.notes, *(f"cannot be read: {name}" for name in source.skipped[:SHOWN])]:
        print(f"  {line}")
    print_table(["chosen", "", "why", "to change it"], summary.choices)
    if out:
        make_folder(out)
        picture = draw_classes(source, open_or_keep(summary.config.data, pick_device("cpu")))
        atomic.write_atomic(out / "data.png", image_png(picture))
        print(f"\nimages of each class: {out / 'data.png'}")


def open_or_keep(data: DataConfig, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """The decoder of latents. If their VAE cannot be loaded, latents are kept, and shown by three channels."""
    from dit_in_dit.data.encode import open_decoder

    try:
        return open_decoder(data, device) or (lambda images: images)
    except UserError as error:
        print(f"dit-in-dit: the grid shows latents: {error}", file=sys.stderr)
        return lambda images: images
