"""Shared parts of commands: the parser, argument types, groups of options, and the values that options name."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import get_terminal_size
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NoReturn

from dit_in_dit.config import presets
from dit_in_dit.config.averages import average_name
from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.config.files import from_file, override
from dit_in_dit.config.run import AUTO, RunConfig
from dit_in_dit.data.labels import class_numbers

if TYPE_CHECKING:
    import torch

    from dit_in_dit.model.nested import NestedDiT
    from dit_in_dit.sampling.guide import Guide

MOST = 10**7  # largest whole number that an option accepts


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a one-line `UserError`."""

    def error(self, message: str) -> NoReturn:
        if wrong := re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL):
            names = wrong[3].replace("'", "").split(", ")
            raise UserError(f"{wrong[1]}: unknown {wrong[2][:40]!r}{did_you_mean(wrong[2], names)}")
        raise UserError(f"{message} (see {self.prog} --help)")


class Commands:
    """The subcommands of a parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(self, name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        """Add a command with a line of help; `run` gets the parsed options. Returns the command's parser."""
        command = self._commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        command.add_argument(
            "--plugin",
            action="append",
            default=argparse.SUPPRESS,
            metavar="FILE.py|NAME",
            help="load your own classes from a file or an installed package (CONTRIBUTING.md); repeatable",
        )
        return command


def add_config(command: argparse.ArgumentParser) -> None:
    """Add the options --preset, --config and --set, for `chosen_config`."""
    command.add_argument("--preset", help="start from this preset (see `dit-in-dit presets`)")
    command.add_argument("--config", type=Path, help="start from this YAML file")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")


def chosen_config(options: argparse.Namespace, default: str | None = None) -> RunConfig:
    """The config that --config, --preset or else `default` names, changed by --set. Raises UserError."""
    if options.preset and options.config:
        raise UserError("--preset and --config exclude each other: give one of them")
    if options.config:
        config = from_file(options.config, "--config")
    elif name := options.preset or default:
        config = presets.get(name)
    else:
        raise UserError("name what to start from: --preset NAME (see `dit-in-dit presets`) or --config FILE")
    config = override(config, options.set)
    if config.model.num_classes == AUTO:
        from dit_in_dit.data.sources import count_auto_classes

        config = count_auto_classes(config)
    return config


def add_device(command: argparse.ArgumentParser) -> None:
    """Add the option --device, for `pick_device`."""
    command.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best available)")


def device_fit(options: argparse.Namespace) -> Callable[[NestedDiT, RunConfig, Guide | None], RunConfig]:
    """`fit_to_device` with the options of `add_sampling`."""
    from dit_in_dit.sampling.fit import fit_to_device

    compiled = None if options.compile == "auto" else options.compile == "true"
    return partial(fit_to_device, num=options.num, given=options.micro_batch is not None, compiled=compiled)


def add_scale(command: argparse.ArgumentParser) -> None:
    """Add the option --scale, for `image_grid`."""
    about = "enlarge images in grids by N (default: small ones to 64 pixels)"
    command.add_argument("--scale", type=whole_number, metavar="N", help=about)


def add_sampling(
    command: argparse.ArgumentParser, num: int | None = None, *, classes: str = "all", averages: str = ""
) -> None:
    """Add the options of sampling, for `sampling_config`, and --device; `classes` describes the default of --classes,
    `averages` more values of --ema.
    For a command that writes samples, by default `num`: also --num, --micro-batch, --precision, --compile and
    --vae, for `device_fit`."""
    if num is not None:  # -n: under torchrun, --num is a prefix of torchrun's options
        command.add_argument("-n", "--num", type=whole_number, default=num, help=f"images (default {num})")
    command.add_argument(
        "--seed", type=seed, default=0, help="seed; sample number i depends on the seed and i (default 0)"
    )
    command.add_argument(
        "--classes",
        help=f"class names (`animal`: all `animal-*`) or numbers, comma-separated, in rotation (default: {classes})",
    )
    command.add_argument("--steps", type=whole_number, help="sampler steps (default: the run's)")
    command.add_argument("--sampler", help="euler, heun, ddim, dpm++, unipc or ddpm (default: the run's)")
    command.add_argument(
        "--guidance", type=float, help="scale of classifier-free guidance; 1: none (default: the run's)"
    )
    about = "times t between which classifier-free guidance is applied (default: the run's)"
    command.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=about)
    command.add_argument("--raw", action="store_true", help="use the trained weights instead of their average")
    add_average(command, averages)
    if num is not None:
        add_guide(command)
        about = "images per forward pass; last bits of samples depend on it (default: the run's; on CUDA what fits)"
        command.add_argument("--micro-batch", type=whole_number, metavar="N", help=about)
        about = "float32 or bfloat16 (default: the run's; on a CPU float32)"
        command.add_argument("--precision", metavar="TYPE", help=about)
        about = "compile the model's blocks; auto: on CUDA, for many images, if the run was compiled"
        command.add_argument("--compile", choices=("auto", "true", "false"), default="auto", help=about)
        command.add_argument("--vae", help="decode latents by this VAE: a folder or hub id (default: the run's)")
    add_device(command)


def add_guide(command: argparse.ArgumentParser) -> None:
    """Add the options of guidance by a weak model, for `sampling_config` and `named_guide`."""
    about = "autoguidance: a weak model of the same images (any RUN), or RUN@STEP, an older checkpoint"
    command.add_argument("--guide", metavar="RUN[@STEP]", help=about)
    about = "average of the guide's weights, as --ema names it (default: the first of its train.ema)"
    command.add_argument("--guide-ema", metavar="AVERAGE", help=about)
    command.add_argument("--guide-scale", type=float, metavar="W", help="scale of autoguidance (default: the run's, 2)")
    about = "scale of guidance by the model's own weak head; 1: none (default: the run's)"
    command.add_argument("--internal-guidance", type=float, metavar="W", help=about)
    about = "times t between which guidance by a weak model is applied (default: the run's)"
    command.add_argument("--guide-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=about)


def named_guide(options: argparse.Namespace, device: torch.device) -> Guide | None:
    """The model of --guide; UserError if it does not exist, or if its options are given without it."""
    from dit_in_dit.interop.resolve import open_guide

    if options.guide:
        return open_guide(options.guide, device, average=options.guide_ema)
    for name in ("guide_scale", "guide_ema"):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is for autoguidance: name the weak model with --guide RUN")
    return None


def add_average(command: argparse.ArgumentParser, more: str = "") -> None:
    """Add the option --ema, for `chosen_average`."""
    about = (
        f"average of the weights, by its decay (0.9996) or length (length=0.1){more} (default: the first of train.ema)"
    )
    command.add_argument("--ema", metavar="AVERAGE", help=about)


def chosen_average(options: argparse.Namespace, config: RunConfig) -> bool | str:
    """The weights that --ema and --raw choose, as `Checkpoint.weights` takes them."""
    if options.ema is None:
        return not options.raw
    if options.raw:
        raise UserError("--ema and --raw exclude each other: give one of them")
    return average_name(config.train.decays[0], options.ema)


def sampling_config(
    options: argparse.Namespace, config: RunConfig, names: Sequence[str]
) -> tuple[RunConfig, list[int]]:
    """The config with the options of `add_sampling`, and the numbers of --classes, found in `names` (empty: all)."""
    keys = ["sampler", "steps", "guidance", "interval", "micro_batch", "precision"]
    keys += ["guide_scale", "internal_guidance", "guide_interval"]
    changes: dict[str, Any] = {key: value for key in keys if (value := getattr(options, key, None)) is not None}
    config = replace(config, sample=replace(config.sample, **changes))
    if options.classes is not None and not config.model.num_classes:
        raise UserError("--classes: this run was trained without labels")
    return config, [] if options.classes is None else class_numbers(options.classes, names)


def whole_number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MOST):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MOST}: got {text[:40]!r}")
    return int(text)


def number_where(fits: Callable[[float], bool], rule: str) -> Callable[[str], float]:
    """The type of an option that takes a number; `rule` tells the user which numbers fit."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {rule}: got {text[:40]!r}")
        return value

    return number


def seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1: got {text[:40]!r}")
    return int(text)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "") -> None:
    """Print a plain-text table below its title, or nothing if there are no rows. Cells wrap only on a terminal."""
    from dit_in_dit.reporting.tables import text_table

    if not rows:
        return
    if title:
        print(f"\n{title}")
    print(text_table(heads, rows, width=get_terminal_size().columns if sys.stdout.isatty() else None))


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(
            f"cannot write to {truncate(path)}: {getattr(error, 'strerror', None) or error}; choose another --out"
        ) from None
