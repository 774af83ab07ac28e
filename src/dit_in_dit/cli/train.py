"""`train` and `demo`: from a config to a run."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_in_dit.cli.options import Commands, add_config, add_device, chosen_config, whole_number
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs import atomic
from dit_in_dit.runtime.process import is_main

if TYPE_CHECKING:
    from torch import Tensor

    from dit_in_dit.model.nested import NestedDiT
    from dit_in_dit.training.interrupt import Stop
    from dit_in_dit.training.session import Event

DEMO_IMAGES = 64
GRID_IMAGES = 36
REAL_SEARCHED = 1000  # training images looked at to find real ones of each class


def add(commands: Commands) -> None:
    """Add the commands."""
    train = commands.add("train", _train, "train a model into a run folder")
    add_config(train)
    train.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    train.add_argument("--init", metavar="RUN", help="begin with the weights of a run or a shipped model (train.init)")
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    train.add_argument("--data", metavar="PLACE", help="with --resume: where the run's data are now; the same data")
    train.add_argument(
        "--track",
        metavar="NAMES",
        help="tell trackers too: tensorboard, wandb, trackio, mlflow, with commas; none (default: those told before)",
    )
    train.add_argument("--until", type=whole_number, metavar="STEP", help="end after this step, to go on another time")
    train.add_argument(
        "--deterministic", action="store_true", help="the same bits on CUDA too, slower (always with reduction=fixed)"
    )
    add_device(train)

    demo = commands.add("demo", _demo, "train a small model on emoji and draw with it, from nothing")
    add_config(demo)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="RUN", help="default runs/demo")
    add_device(demo)


def _train(options: argparse.Namespace) -> None:
    from dit_in_dit.data.latents import complete
    from dit_in_dit.runs.folder import read_config
    from dit_in_dit.training.loop import train

    if options.data and not options.resume:
        raise UserError("--data is the new place of a resumed run's data: use it with --resume, or --set data.source")
    stop = _signals()
    if options.init:
        options.set.append(f"train.init={json.dumps(options.init)}")
    if options.resume:
        stored = read_config(options.out)
        config = chosen_config(options) if options.preset or options.config else override(stored, options.set)
    else:
        config = chosen_config(options)
    config = replace(config, data=complete(config.data))  # so that the run knows its VAE wherever the latents are
    facts = train(
        config,
        options.out,
        resume=options.resume,
        device=options.device,
        stop=stop,
        until=options.until,
        deterministic=options.deterministic,
        data=options.data,
    )
    _follow(_tracked(facts, options), options.out, stop)


def _tracked(facts: Iterator[Event], options: argparse.Namespace) -> Iterator[Event]:
    """The facts, which trackers are told on the way if they are asked for; by the first of several processes."""
    from dit_in_dit.training.trackers import chosen_trackers, log_to

    names = chosen_trackers(options.track, options.out) if is_main() else []
    if not names:
        return facts
    return log_to(facts, names, options.out, lambda line: print(f"dit-in-dit: {line}", file=sys.stderr))


def _signals() -> Stop:
    """From here on SIGINT and SIGTERM end a run between two steps, saved."""
    from dit_in_dit.training.interrupt import Stop

    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop.ask)
    return stop


def _follow(facts: Iterator[Event], out: Path, stop: Stop) -> None:
    """Show training facts as a progress bar and lines; draw sample grids when they are due.

    When the run was stopped, ends the process as its signal would have.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dit_in_dit.runs.folder import read_config

    quiet = not is_main()  # one of several processes speaks
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=quiet)
    start = next(facts)  # first: a mistake is found here, before there is anything to show
    config, values = read_config(out), start.values
    console.print(
        f"{values['parameters'] / 1e6:.2f} M parameters on {_devices(values)} in {values['precision']}, "
        f"{len(values['classes'])} classes: {', '.join(values['classes'][:12])}"
    )
    for damage in values["passed_over"]:
        console.print(f"passed over: {damage}")
    if begun := values["begun"]:
        console.print(
            f"begins with {begun.taken} tensors of {begun.run}, step {begun.step}; {begun.new} are new: "
            + ("its output is still that model's" if begun.exact else "its output is no longer that model's")
        )
        if begun.other_data:
            console.print(f"{begun.run} was trained on other data: it may have seen images that are held out here")
    if values["unrecorded"]:
        console.print("the checkpoint does not say which data it was trained on: whether these changed is not known")
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=quiet) as bar:
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
                _draw_grid(fact, config, out, stop)
            elif fact.kind == "checkpoint":
                console.print(f"step {fact.step}  saved {values['path']}")
            elif fact.kind == "unsaved":
                console.print(f"step {fact.step}  {values['why']}; the next checkpoint tries again")
            elif fact.kind == "skipped":
                low, high = values["examples"]
                seen = (
                    f"examples {low} to {high}, not finite: {', '.join(map(str, values['not_finite'])) or 'none alone'}"
                )
                numbers = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
                console.print(f"step {fact.step}  skipped: {numbers} ({seen})")
            elif fact.kind == "rolled_back":
                console.print(f"{values['why']}: back to step {values['to']}, and on with later examples")
            elif fact.kind == "stopped":
                bar.stop()
                _end(fact, console)


def _devices(values: dict[str, Any]) -> str:
    return values["device"] if values["processes"] == 1 else f"{values['processes']} processes, {values['device']} ..."


def _draw_grid(fact: Event, config: RunConfig, out: Path, stop: Stop) -> None:
    """The grid of a step, unless a run that goes on finds it drawn; one cut short is drawn when the run goes on."""
    from dit_in_dit.reporting.images import image_grid, image_png, to_pixels
    from dit_in_dit.sampling.numbered import sample
    from dit_in_dit.training.interrupt import Interrupted

    assert fact.model is not None
    path = out / "samples" / f"{fact.step:07d}.png"
    if path.exists():
        return
    with suppress(Interrupted), stop.waiting():
        images = _pixels(sample(fact.model, config, GRID_IMAGES), config, fact.model)
        try:
            pixels = to_pixels(images)
        except UserError as error:  # the run goes the way that train.on_divergence says
            print(f"dit-in-dit: no grid of step {fact.step}: {error}", file=sys.stderr)
            return
        path.parent.mkdir(exist_ok=True)
        atomic.write_atomic(path, image_png(image_grid(pixels)))


def _pixels(images: Tensor, config: RunConfig, model: NestedDiT) -> Tensor:
    """The images that latents stand for, if the run's VAE can be had: a grid must not end a run."""
    import torch

    from dit_in_dit.data.encode import decoder

    try:
        decode = decoder(config.data, next(model.parameters()).device)
    except UserError as error:
        print(f"dit-in-dit: the grid shows latents: {error}", file=sys.stderr)
        return images
    if decode is None:
        return images
    few = [images[start : start + 4] for start in range(0, len(images), 4)]  # a training step has most of the memory
    return torch.cat([decode(some) for some in few])


def _end(fact: Event, console: Any) -> None:
    """Say where the run stopped; after a signal, exit as it asks to."""
    console.print(f"step {fact.step}  stopped; it goes on with --resume")
    if number := fact.values["signal"]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or the loader takes the end of a worker for a fault
        for child in multiprocessing.active_children():
            child.kill()  # it may still wait for its data
        sys.exit(128 + number)


def _demo(options: argparse.Namespace) -> None:
    """Train (or go on, or find done), sample, and put the samples beside real images."""
    from dit_in_dit.reporting.images import image_grid, image_png, side_by_side, to_pixels
    from dit_in_dit.runs.checkpoint import Checkpoint
    from dit_in_dit.runs.folder import read_config
    from dit_in_dit.runtime.device import pick_device
    from dit_in_dit.sampling.numbered import sample
    from dit_in_dit.training.loop import train

    out: Path = options.out
    started = (out / "config.yaml").exists()
    asked = options.preset or options.config or options.set
    config = read_config(out) if started and not asked else chosen_config(options, "emoji")
    stop = _signals()
    _follow(train(config, out, resume=started, device=options.device, stop=stop), out, stop)
    saved = Checkpoint.open(out)
    model, config = saved.model(pick_device(options.device)), saved.config
    print("drawing samples ...", file=sys.stderr)
    drawn = image_grid(to_pixels(sample(model, config, DEMO_IMAGES)))
    atomic.write_atomic(out / "samples.png", image_png(drawn))
    real = image_grid(_real(config, DEMO_IMAGES))
    atomic.write_atomic(out / "real.png", image_png(real))
    both = side_by_side({"drawn by the model": drawn, "real training images": real})
    atomic.write_atomic(out / "samples-beside-real.png", image_png(both))
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

    from dit_in_dit.data.sources import open_source
    from dit_in_dit.reporting.images import to_pixels
    from dit_in_dit.sampling.numbered import class_of
    from dit_in_dit.training.batches import image_number

    source = open_source(config.data, config.model)
    images: dict[int, list[Any]] = {}
    for index in range(REAL_SEARCHED):
        image, y = source.train(image_number(config.seed, index, source.train_size))
        images.setdefault(y if config.model.num_classes else 0, []).append(image)
    every = sorted(images)  # a small class may have no training image
    chosen = [images[class_of(i, every)][i // len(every) % len(images[class_of(i, every)])] for i in range(count)]
    return to_pixels(torch.from_numpy(np.stack(chosen)))
