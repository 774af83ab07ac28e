"""`sample`: generate numbered images from a run. Several processes can share the work, and it can be resumed."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from dit_in_dit.cli.options import (
    Commands,
    add_sampling,
    add_scale,
    chosen_average,
    device_fit,
    make_folder,
    named_guide,
    sampling_config,
    whole_number,
)
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.runs import atomic
from dit_in_dit.runs.pretrained import find_run
from dit_in_dit.runtime.process import gc_paused, is_main


def add(commands: Commands) -> None:
    """Add the command."""
    sample = commands.add("sample", _sample, "generate images from a trained run; existing images are kept")
    about = "a run, an export, weights of other projects, or USER/NAME of the Hub"
    sample.add_argument("run_folder", type=find_run, metavar="RUN", help=about)
    add_sampling(sample, 64)
    sample.add_argument(
        "--batch",
        type=whole_number,
        default=1,
        help="images that a process generates between writes, in whole micro-batches; does not change the images "
        "(default: one micro-batch)",
    )
    add_scale(sample)
    sample.add_argument(
        "--film", type=Path, metavar="FILE", help="also write the way from noise to the images: a .gif or .webp"
    )
    about = "folder for the images (default samples/RUN plus options that change images, such as samples/RUN-seed5)"
    sample.add_argument("--out", type=Path, metavar="DIR", help=about)


def _sample(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    with gc_paused():
        from dit_in_dit.data.encode import open_decoder
        from dit_in_dit.interop.resolve import resolve_run
        from dit_in_dit.runs.checkpoint import Checkpoint
        from dit_in_dit.runtime.device import pick_device
        from dit_in_dit.sampling.folder import SampleFolder, film

    with TemporaryDirectory() as scratch:
        device, saved = (
            pick_device(options.device),
            Checkpoint.open(resolve_run(str(options.run_folder), Path(scratch))),
        )
        averaged = chosen_average(options, saved.config)
        model = saved.model(device, averaged=averaged)
        config, classes = sampling_config(options, saved.config, saved.classes)
        guide = named_guide(options, device)
        config = device_fit(options)(model, config, guide)
        decode = open_decoder(replace(config.data, vae=options.vae or config.data.vae), device)
        out: Path = options.out or Path("samples", _default_name(options))
        make_folder(out)
        if options.film:
            if options.film.suffix not in (".gif", ".webp"):
                raise UserError(f"--film must end in .gif or .webp: got {truncate(options.film)}")
            make_folder(options.film.parent)
        folder = SampleFolder(out, saved, model, config, classes, options.seed, averaged, decode, options.scale, guide)
        counts = folder.fill(options.num, options.batch)
        with Progress(console=Console(stderr=True), disable=not is_main()) as bar:
            task = bar.add_task("sampling", total=options.num)
            for count in counts:
                bar.update(task, completed=count)
        if is_main():
            print(f"{options.num} samples and grid.png in {out}")
            if options.film:
                atomic.write_atomic(options.film, film(folder.frames(options.num), options.film.suffix[1:]))
                print(f"the way from noise to them in {options.film}")


def _default_name(options: argparse.Namespace) -> str:
    """The run's name and the options that change the samples, such as `emoji-seed5`, so that folders differ."""
    weak = ("guide", "guide_ema", "guide_scale", "internal_guidance", "guide_interval")
    names = ("classes", "ema", "steps", "sampler", "guidance", "interval", *weak, "micro_batch", "precision", "vae")
    given = {name: getattr(options, name) for name in names}
    words = [f"seed{options.seed}"] if options.seed else []
    words += [f"{name.replace('_', '-')}{value}" for name, value in given.items() if value is not None]
    words += ["raw"] if options.raw else []
    return "-".join([options.run_folder.resolve().name, *(re.sub(r"[^\w.+]+", "_", word)[:40] for word in words)])
