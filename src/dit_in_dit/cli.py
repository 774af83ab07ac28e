"""The command `dit-in-dit`: parses, prints, and puts the parts together."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dit_in_dit import presets
from dit_in_dit.config import RunConfig, UserError, format_stages, from_yaml, nearest, override, to_yaml

if TYPE_CHECKING:
    from dit_in_dit.training.loop import Fact

DEMO_IMAGES = 64
GRID_IMAGES = 36
GRID_MOST = 1024
REAL_SEARCHED = 1000  # training images looked at to find real ones of each class
MOST = 10**7  # images asked for at once


class _Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 2."""
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
    except UserError as error:
        print(f"dit-in-dit: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dit-in-dit: stopped; a run goes on from its last checkpoint with --resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `dit-in-dit config ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder where a file should go
        print(f"dit-in-dit: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dit-in-dit", description="Nested diffusion transformers, written as data.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, about: str, *, config: bool) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about)
        made.set_defaults(run=run)
        if config:
            made.add_argument("--preset", help="start from this preset (see `dit-in-dit presets`)")
            made.add_argument("--config", type=Path, help="start from this YAML file")
            made.add_argument(
                "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable"
            )
        return made

    command("presets", _presets, "list the presets", config=False)
    command("config", _config, "print a resolved config, each key with its meaning", config=True)

    inspect = command("inspect", _inspect, "shapes, tokens, parameters, MACs and memory of a model", config=True)
    inspect.add_argument("--batch", type=_whole, default=1, help="images in the batch (default 1)")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    train = command("train", _train, "train a model into a run folder", config=True)
    train.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    train.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")

    sample = command("sample", _sample, "draw images from a trained run", config=False)
    sample.add_argument("run_folder", type=Path, metavar="RUN")
    sample.add_argument("--num", type=_whole, default=64, help="how many (default 64)")
    sample.add_argument("--seed", type=_seed, default=0, help="sample i is a function of this and i")
    sample.add_argument("--classes", help="names or numbers, with commas; they take turns (default: all)")
    sample.add_argument("--steps", type=_whole, help="sampler steps (default: the run's)")
    sample.add_argument("--sampler", help="euler, heun, ddim, dpm++ or unipc (default: the run's)")
    sample.add_argument("--guidance", type=float, help="classifier-free guidance; 1: none (default: the run's)")
    sample.add_argument("--batch", type=_whole, default=32, help="images at a time (default 32)")
    sample.add_argument("--raw", action="store_true", help="trained weights instead of the averaged ones")
    sample.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
    sample.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the images")

    demo = command("demo", _demo, "train a small model on emoji and draw with it, from nothing", config=True)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="RUN", help="default runs/demo")
    demo.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
    return parser


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MOST):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MOST}: got {text[:40]!r}")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1: got {text[:40]!r}")
    return int(text)


def _chosen(options: argparse.Namespace, default: str | None = None) -> RunConfig:
    """The config that --preset or --config and --set name."""
    if options.preset and options.config:
        raise UserError("--preset and --config both name a start: give one of them")
    if options.config:
        try:
            config = from_yaml(options.config.read_text(), str(options.config))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --config {options.config}: {error}") from None
    elif name := options.preset or default:
        config = presets.get(name)
    else:
        raise UserError("name what to start from: --preset NAME (see `dit-in-dit presets`) or --config FILE")
    return override(config, options.set)


def _presets(options: argparse.Namespace) -> None:
    for name in presets.NAMES:
        model = presets.get(name).model
        size = "x".join(map(str, (*model.image_size, model.channels)))
        stages = format_stages(model.program)
        print(f"{name:<18} {size:<12} p={model.patch_size:<3} D={model.outer.width:<5} {stages}")


def _config(options: argparse.Namespace) -> None:
    print(to_yaml(_chosen(options), meanings=True), end="")


# ----------------------------------------------------------------------------------------- inspect


def _inspect(options: argparse.Namespace) -> None:
    from dit_in_dit.model.inspect import inspect

    config = _chosen(options)
    found = inspect(config.model, options.batch, config.train.recompute)
    plain = inspect(replace(config.model, use_inner=False), options.batch, config.train.recompute)
    if options.json:
        print(json.dumps({**found, "plain": plain}, indent=1))
        return
    print(f"flow, batch {options.batch}")
    for row in found["flow"]:
        print(f"  {row['name']:<14} {tuple(row['shape'])}")
    for name, what in (
        ("tokens", "per image"),
        ("token_layers", "per image: a token in a block"),
        ("parameters", ""),
        ("macs", "per image, forward"),
        ("activation_bytes", "kept for the backward pass, float32, whole batch"),
    ):
        large, scale = next((unit, s) for unit, s in (("G", 1e9), ("M", 1e6), ("", 1)) if plain[name]["total"] >= s)
        print(f"\n{name.replace('_', ' ')}{f', {what}' if what else ''}{f', in {large}' if large else ''}")
        print(f"  {'':<14} {'this':>12} {'plain DiT':>12} {'ratio':>7}")
        for part in dict.fromkeys((*found[name], *plain[name])):
            here, there = found[name].get(part, 0), plain[name].get(part, 0)
            if here or there:
                ratio = f"{here / there:7.3f}" if there else f"{'-':>7}"
                numbers = " ".join(f"{n / scale:>12,.{3 if large else 0}f}" for n in (here, there))
                print(f"  {part.replace('_', ' '):<14} {numbers} {ratio}")


# ------------------------------------------------------------------------------------------- train


def _train(options: argparse.Namespace) -> None:
    from dit_in_dit import checkpoint
    from dit_in_dit.training.loop import train

    if options.resume:
        stored = checkpoint.read_config(options.out)
        config = _chosen(options) if options.preset or options.config else override(stored, options.set)
    else:
        config = _chosen(options)
    _follow(train(config, options.out, resume=options.resume, device=options.device), options.out)


def _follow(facts: Iterator[Fact], out: Path) -> None:
    """Show training facts as a progress bar and lines; draw sample grids when they are due."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dit_in_dit import checkpoint
    from dit_in_dit.sampling import grid, sample, to_pixels

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    start = next(facts)  # first: a mistake is found here, before there is anything to show
    config, values = checkpoint.read_config(out), start.values
    console.print(
        f"{values['parameters'] / 1e6:.2f} M parameters on {values['device']} in {values['precision']}, "
        f"{len(values['classes'])} classes: {', '.join(values['classes'][:12])}"
    )
    if values["skipped"]:
        console.print(f"left out {len(values['skipped'])} unreadable files, such as {values['skipped'][0]}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=config.train.steps, completed=start.step)
        for fact in facts:
            values = fact.values
            if fact.kind == "step":
                text = f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s"
                bar.update(task, completed=fact.step, description=text)
            elif fact.kind == "held_out":
                parts = (f"t={t}: {e['whole']:.5f} (high {e['high']:.5f})" for t, e in values.items())
                console.print(f"step {fact.step}  held-out error  {'  '.join(parts)}")
            elif fact.kind == "samples" and fact.model is not None:
                path = out / "samples" / f"{fact.step:07d}.png"
                path.parent.mkdir(exist_ok=True)
                grid(to_pixels(sample(fact.model, config, GRID_IMAGES))).save(path)
            elif fact.kind == "checkpoint":
                console.print(f"step {fact.step}  saved {values['path']}")


# ------------------------------------------------------------------------------------------ sample


def _sample(options: argparse.Namespace) -> None:
    from dit_in_dit import checkpoint
    from dit_in_dit.training.loop import pick_device

    model, config, manifest = checkpoint.load_model(
        options.run_folder, pick_device(options.device), ema=not options.raw
    )
    given = {name: getattr(options, name) for name in ("sampler", "steps", "guidance")}
    given = {name: value for name, value in given.items() if value is not None}
    config = replace(config, sample=replace(config.sample, **given))
    if options.classes is not None and not config.model.num_classes:
        raise UserError("--classes: this run was trained without labels")
    classes = [] if options.classes is None else _classes(options.classes, manifest["classes"])
    _draw(model, config, options, classes)


def _classes(text: str, known: list[str]) -> list[int]:
    """Class numbers from names or numbers with commas."""
    numbers = []
    for name in text.split(","):
        if name in known:
            numbers.append(known.index(name))
        elif name.isdecimal() and int(name) < len(known):
            numbers.append(int(name))
        else:
            raise UserError(f"unknown class {name!r}{nearest(name, known)}")
    return numbers


def _draw(model: Any, config: RunConfig, options: argparse.Namespace, classes: list[int]) -> None:
    """Write samples as numbered PNGs (latents: one .npz) and a grid."""
    import numpy as np
    from rich.progress import track

    from dit_in_dit.sampling import grid, picture, sample_batches, to_pixels

    out: Path = options.out
    _make_folder(out)
    batches = sample_batches(
        model, config, range(options.num), seed=options.seed, classes=classes, batch_size=options.batch
    )
    shown: list[Any] = []
    latents: list[Any] = []
    for indices, images in track(batches, total=-(-options.num // options.batch), description="sampling"):
        pixels = to_pixels(images)
        if len(shown) * options.batch < GRID_MOST:
            shown.append(pixels)
        if config.model.channels not in (1, 3):
            latents.append(images.numpy())
            continue
        for index, image in zip(indices, pixels, strict=True):
            picture(image).save(out / f"{index:06d}.png")
    if latents:
        np.savez(out / "samples.npz", images=np.concatenate(latents))
    grid(np.concatenate(shown)[:GRID_MOST]).save(out / "grid.png")
    print(f"{options.num} samples and grid.png in {out}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from None


# -------------------------------------------------------------------------------------------- demo


def _demo(options: argparse.Namespace) -> None:
    """Train (or go on, or find done), sample, and put the samples beside real images."""
    from dit_in_dit import checkpoint
    from dit_in_dit.sampling import beside, grid, sample, to_pixels
    from dit_in_dit.training.loop import pick_device, train

    out: Path = options.out
    started = (out / "config.yaml").exists()
    asked = options.preset or options.config or options.set
    config = checkpoint.read_config(out) if started and not asked else _chosen(options, "emoji")
    _follow(train(config, out, resume=started, device=options.device), out)
    model, config, _ = checkpoint.load_model(out, pick_device(options.device))
    print("drawing samples ...", file=sys.stderr)
    drawn = grid(to_pixels(sample(model, config, DEMO_IMAGES)))
    drawn.save(out / "samples.png")
    real = grid(_real(config, DEMO_IMAGES))
    real.save(out / "real.png")
    beside({"drawn by the model": drawn, "real training images": real}).save(out / "samples-beside-real.png")
    print("\nThe pictures:")
    for name, what in (
        ("samples-beside-real.png", "samples of the trained model beside real images of the same classes"),
        ("samples.png", "the samples alone"),
        ("samples/", "how they came about during training"),
    ):
        print(f"  {out / name}  {what}")


def _real(config: RunConfig, count: int) -> Any:
    """Training images whose classes take turns as those of the samples do; uint8 (count, H, W, C)."""
    import numpy as np
    import torch

    from dit_in_dit.data.source import open_source
    from dit_in_dit.sampling import label, to_pixels
    from dit_in_dit.training.example import image_number

    source = open_source(config.data, config.model)
    images: dict[int, list[Any]] = {}
    for index in range(REAL_SEARCHED):
        image, y = source.train(image_number(config.seed, index, source.train_size))
        images.setdefault(y if config.model.num_classes else 0, []).append(image)
    every = sorted(images)  # a small class may have no training image
    chosen = [images[label(i, every)][i // len(every) % len(images[label(i, every)])] for i in range(count)]
    return to_pixels(torch.from_numpy(np.stack(chosen)))
