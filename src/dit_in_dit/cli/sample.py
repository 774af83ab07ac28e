"""`sample`: generate numbered images from a run. Several processes can share the work, and it can be resumed."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

from dit_in_dit.cli.options import (
    Commands,
    add_device,
    add_micro_batch,
    add_num,
    add_sampling,
    add_vae,
    make_folder,
    sampling_config,
    whole_number,
)
from dit_in_dit.runs.pretrained import find_run
from dit_in_dit.runtime.process import gc_paused, is_main


def add(commands: Commands) -> None:
    """Add the command."""
    sample = commands.add("sample", _sample, "generate images from a trained run; existing images are kept")
    sample.add_argument("run_folder", type=find_run, metavar="RUN", help="a run's folder, or USER/NAME of the Hub")
    add_num(sample, 64)
    add_sampling(sample)
    add_micro_batch(sample)
    sample.add_argument(
        "--batch",
        type=whole_number,
        default=1,
        help="images that a process generates between writes, in whole micro-batches; does not change the images "
        "(default: one micro-batch)",
    )
    add_vae(sample)
    add_device(sample)
    sample.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the images (default samples/RUN plus options that change images, such as samples/RUN-seed5)",
    )


def _sample(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    with gc_paused():
        from dit_in_dit.data.encode import open_decoder
        from dit_in_dit.interop.hub import fetch_repo, is_repo_id
        from dit_in_dit.runs.checkpoint import Checkpoint
        from dit_in_dit.runtime.device import pick_device
        from dit_in_dit.sampling.folder import SampleFolder

    device, averaged = pick_device(options.device), not options.raw
    named = str(options.run_folder)
    saved = Checkpoint.open(fetch_repo(named) if is_repo_id(named) else options.run_folder)
    model = saved.model(device, averaged=averaged)
    config, classes = sampling_config(options, saved.config, saved.classes)
    decode = open_decoder(replace(config.data, vae=options.vae or config.data.vae), device)
    out: Path = options.out or Path("samples", _default_name(options))
    make_folder(out)
    folder = SampleFolder(out, saved, model, config, classes, options.seed, averaged, decode)
    counts = folder.fill(options.num, options.batch)
    with Progress(console=Console(stderr=True), disable=not is_main()) as bar:
        task = bar.add_task("sampling", total=options.num)
        for count in counts:
            bar.update(task, completed=count)
    if is_main():
        print(f"{options.num} samples and grid.png in {out}")


def _default_name(options: argparse.Namespace) -> str:
    """The run's name and the options that change the samples, such as `emoji-seed5`, so that folders differ."""
    given = {name: getattr(options, name) for name in ("classes", "steps", "sampler", "guidance", "micro_batch", "vae")}
    words = [f"seed{options.seed}"] if options.seed else []
    words += [f"{name.replace('_', '-')}{value}" for name, value in given.items() if value is not None]
    words += ["raw"] if options.raw else []
    return "-".join([options.run_folder.resolve().name, *(re.sub(r"[^\w.+]+", "_", word)[:40] for word in words)])
