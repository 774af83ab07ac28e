"""`data`: show a source of images, and choose a config for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dit_in_dit.cli.options import Commands, make_folder, named_config, print_table
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import parse_assignment
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs import atomic
from dit_in_dit.runtime.process import is_main

if TYPE_CHECKING:
    from torch import Tensor

    from dit_in_dit.data.summary import Summary

SHOWN = 24  # most classes and unread files in a list


def add(commands: Commands) -> None:
    """Add the command."""
    about = "show images: classes, counts, sizes, duplicates, what is not read, and the preset that fits"
    data = commands.add("data", _data, about)
    data.add_argument("source", metavar="SOURCE", help="a folder, .zip, .npz, .tar shards, hf:NAME ... (data.source)")
    data.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config; repeatable")
    data.add_argument("--out", type=Path, metavar="DIR", help="folder for data.png and nearest.png")


def _data(options: argparse.Namespace) -> None:
    from dit_in_dit.data.summary import draw_pairs, find_duplicates, summarise_source
    from dit_in_dit.reporting.images import image_png

    summary = summarise_source(options.source, dict(map(parse_assignment, options.set)))
    show_summary(summary)
    source, found = summary.source, find_duplicates(summary.source)
    print(
        f"\nduplicates, of {found.searched[0]} training and {found.searched[1]} held-out images at the model's size\n"
        f"  equal to an earlier training image: {found.copies[0]}; held out, and equal to another: {found.copies[1]}"
    )
    names = [(source.title(trained), source.title(held, held_out=True)) for _, held, trained in found.pairs]
    rows = [[f"{pair[0]:.3f}", held, trained] for pair, (trained, held) in zip(found.pairs, names, strict=True)]
    title = f"nearest pairs across the split (rms distance, pixels of range 2; median {found.median:.3f})"
    print_table(["distance", "held out", "training image"], rows, title=title)
    if options.out:
        draw_summary(summary, options.out)
        if found.pairs:
            content = image_png(draw_pairs(source, found.pairs, decoder(summary.config)))
            atomic.write_atomic(options.out / "nearest.png", content)


def own_config(options: argparse.Namespace) -> RunConfig:
    """The config that fits --data, printed with its reasons; `data.png` is written into a new run's folder."""
    from dit_in_dit.data.summary import summarise_source

    settings = {key: value for key, value in map(parse_assignment, options.set) if value != "auto"}
    base = named_config(options) if options.preset or options.config else None
    summary = summarise_source(options.data, settings, base)
    if is_main() and not (options.out / "config.yaml").exists():
        show_summary(summary)
        draw_summary(summary, options.out)
    return summary.config


def show_summary(summary: Summary) -> None:
    """Print sizes, classes and counts, what is not read, and the choices."""
    source, rows = summary.source, sorted(summary.rows(), key=lambda row: -(row[2] if row[1] == "endless" else row[1]))
    print(f"{summary.config.data.source}: {len(rows)} classes, {summary.sizes()}")
    print_table(["class", "training images", "held out"], rows[:SHOWN])
    if len(rows) > SHOWN:
        print(f"  and {len(rows) - SHOWN} smaller classes")
    unread = [*source.notes, *(f"cannot be read: {name}" for name in source.skipped)]
    for line in [*unread[:SHOWN], *([f"and {len(unread) - SHOWN} more"] if len(unread) > SHOWN else [])]:
        print(f"  not read: {line}")
    print_table(["chosen", "", "why", "to change it"], summary.choices, title="")


def draw_summary(summary: Summary, out: Path) -> None:
    """Write `data.png`."""
    from dit_in_dit.data.summary import draw_classes
    from dit_in_dit.reporting.images import image_png

    make_folder(out)
    atomic.write_atomic(out / "data.png", image_png(draw_classes(summary.source, decoder(summary.config))))
    print(f"\npictures of each class: {out / 'data.png'}")


def decoder(config: RunConfig) -> Callable[[Tensor], Tensor]:
    """Decode latents; without their VAE, latents stay as they are, and are shown as pictures of three channels."""
    import torch

    from dit_in_dit.data.encode import open_decoder

    try:
        decode = open_decoder(config.data, torch.device("cpu"))
    except UserError as error:
        print(f"dit-in-dit: pictures show latents: {error}", file=sys.stderr)
        decode = None
    return decode or (lambda images: images)
