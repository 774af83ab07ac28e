"""`encode`: encode images to latents before training."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from pathlib import Path

from dit_in_dit.cli.options import Commands, add_device, whole_number
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runtime.process import is_main


def add(commands: Commands) -> None:
    """Add the command."""
    encode = commands.add("encode", _encode, "encode images with a VAE to latents for training")
    encode.add_argument("--data", required=True, metavar="SOURCE", help="the images: any value of data.source")
    encode.add_argument("--vae", required=True, help="a diffusers VAE or pipeline: a folder or a hub id")
    encode.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the latents")
    encode.add_argument("--size", type=_size, default=(256, 256), help="image size: 256 or 256x384 (default 256)")
    encode.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="type of the latents"
    )
    encode.add_argument("--no-flips", action="store_true", help="do not encode the mirror images")
    encode.add_argument(
        "--features", type=Path, metavar="DINOV2", help="also store features of this local DINOv2, for train.terms.repa"
    )
    encode.add_argument(
        "--features-grid", type=whole_number, default=16, metavar="N", help="their patches on a side (default 16)"
    )
    encode.add_argument("--batch", type=whole_number, default=32, help="images per batch (default 32)")
    encode.add_argument("--shard", type=whole_number, default=2048, help="images per file (default 2048)")
    encode.add_argument("--workers", type=int, default=0, choices=range(257), metavar="N", help="reading processes")
    encode.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of data; repeatable"
    )
    add_device(encode)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text, re.ASCII)
    if not match or not int(match[1]) or not int(match[2] or 1):
        raise argparse.ArgumentTypeError(f"must be a number such as 256, or 256x384: got {text[:40]!r}")
    return int(match[1]), int(match[2] or match[1])


def _encode(options: argparse.Namespace) -> None:
    for assignment in options.set:
        if not assignment.startswith("data."):
            raise UserError(f"encode --set takes only keys of data: got {assignment[:60]!r}")
    data = override(RunConfig(), [f"data.source={json.dumps(options.data)}", *options.set]).data

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from dit_in_dit.data.encode import Encoding, encode
    from dit_in_dit.data.encode_features import encode_features
    from dit_in_dit.runtime.device import pick_device

    device = pick_device(options.device)
    how = Encoding(
        data=data,
        vae=options.vae,
        size=options.size,
        dtype=options.dtype,
        flips=not options.no_flips,
        batch=options.batch,
        shard=options.shard,
        workers=options.workers,
    )
    work = [encode(how, options.out, device)]
    if options.features:
        work.append(encode_features(how, options.features, options.features_grid, options.out, device))
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for progress in work:
        done, total = next(progress)  # raises a UserError before the progress bar is shown
        with Progress(*columns, console=Console(stderr=True), disable=not is_main()) as bar:
            task = bar.add_task("", total=total, completed=done)
            for done, _ in progress:
                bar.update(task, completed=done)
    if is_main():
        _report(options.out, total, features=bool(options.features))


def _report(out: Path, total: int, *, features: bool) -> None:
    """Print what the folder holds, and the settings that train on it."""
    from dit_in_dit.data.features import read_features_index
    from dit_in_dit.data.formats.latents import read_latents_index

    index = read_latents_index(out)
    channels, height, width = index["made"]["shape"]
    mean, scale = index["measured"]["mean"], [1 / deviation for deviation in index["measured"]["deviation"]]
    print(
        f"{total} latents of {channels}x{height}x{width} in {out}: train with --set {shlex.quote(f'data.source={out}')}"
    )
    if features:
        made = read_features_index(out)["made"]
        size = 2 * math.prod(made["shape"]) * (1 + made["flips"])
        print(f"Features of {'x'.join(map(str, made['shape']))}, {size:,} bytes per image: train.terms.repa uses them")
    vae = index["vae"]
    print(f"The VAE's own mean and scale, the default: [{_numbers(vae['mean'])}], [{_numbers(vae['scale'])}]")
    print(
        "Measured mean and scale instead: "
        f"--set data.latent_mean=[{_numbers(mean)}] --set data.latent_scale=[{_numbers(scale)}]"
    )


def _numbers(values: list[float]) -> str:
    return ",".join(f"{value:.5g}" for value in values)
