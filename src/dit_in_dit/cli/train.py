"""`train` and `demo`: train a config into a run folder."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_in_dit.cli.data import open_or_keep, own_config
from dit_in_dit.cli.options import Commands, add_config, add_device, add_scale, chosen_config, whole_number
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs import atomic
from dit_in_dit.runtime.process import gc_paused, is_main

if TYPE_CHECKING:
    from torch import Tensor

    from dit_in_dit.model.nested import NestedDiT
    from dit_in_dit.training.event import Event
    from dit_in_dit.training.interrupt import StopRequest

# Chosen by eye among three recipes of some minutes on two cores (nine groups, subgroups, subgroups in three styles).
DEMO = ("data.source=emoji:noto", "model.num_classes=auto", "train.steps=3200", "sample.guidance=2")
DEMO_IMAGES = 64
GRID_IMAGES = 36


def add(commands: Commands) -> None:
    """Add the commands."""
    train = commands.add("train", _train, "train a model into a run folder")
    add_config(train)
    train.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    train.add_argument(
        "--init",
        metavar="RUN",
        help="start from weights (train.init): a run, a shipped model, USER/NAME on the Hub, or what `import` reads",
    )
    train.add_argument(
        "--resume", action="store_true", help="continue the run in --out; longer with --set train.steps=N"
    )
    train.add_argument(
        "--data",
        metavar="PLACE",
        help="your images: a folder, .zip, hf:NAME ... (data.source); a preset that fits is chosen if none is named; "
        "with --resume: the new place of the run's data, which must be the same",
    )
    train.add_argument(
        "--track",
        metavar="NAMES",
        help="also log to trackers, comma-separated: tensorboard, wandb, trackio, mlflow; none (default: as before)",
    )
    train.add_argument("--until", type=whole_number, metavar="STEP", help="stop after this step, to resume later")
    train.add_argument(
        "--deterministic",
        action="store_true",
        help="bitwise equal results on CUDA too, but slower (always on with reduction=fixed)",
    )
    add_scale(train)
    add_device(train)

    demo = commands.add("demo", _demo, "train a small model on emoji from scratch and generate samples")
    add_config(demo)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="RUN", help="default runs/demo")
    add_device(demo)


def _train(options: argparse.Namespace) -> None:
    with gc_paused():
        from dit_in_dit.data.sources import fill_latent_keys
        from dit_in_dit.runs.folder import read_config
        from dit_in_dit.training.loop import train

    if options.init:
        options.set.append(f"train.init={json.dumps(options.init)}")
    if options.resume:
        stored = read_config(options.out)
        config = chosen_config(options) if options.preset or options.config else override(stored, options.set)
    else:
        config = own_config(options) if options.data else chosen_config(options)
    config = replace(config, data=fill_latent_keys(config.data))  # the config then names the VAE of its latents
    stop = _signals()
    events = train(
        config,
        options.out,
        resume=options.resume,
        device=options.device,
        stop=stop,
        until=options.until,
        deterministic=options.deterministic,
        data=options.data if options.resume else None,
    )
    _follow(_tracked(events, options), options.out, stop, options.scale)


def _tracked(events: Iterator[Event], options: argparse.Namespace) -> Iterator[Event]:
    """The events, logged to the chosen trackers on process 0."""
    from dit_in_dit.training.trackers import chosen_trackers, log_to

    if not is_main() or not (names := chosen_trackers(options.track, options.out)):
        return events
    return log_to(events, names, options.out, lambda line: print(f"dit-in-dit: {line}", file=sys.stderr))


def _signals() -> StopRequest:
    """Make SIGINT and SIGTERM stop a run between two steps; a checkpoint is written."""
    from dit_in_dit.training.interrupt import StopRequest

    stop = StopRequest()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop.ask)
    return stop


def _follow(events: Iterator[Event], out: Path, stop: StopRequest, scale: int | None = None) -> None:
    """Show events of training as a progress bar and lines; write sample grids when they are due.

    If a signal stopped the run, the process ends with the exit code of that signal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dit_in_dit.runs.folder import read_config
    from dit_in_dit.training.event import progress_text

    quiet = not is_main()
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=quiet)
    start = next(events)  # first: a user's mistake is raised here, before anything is shown
    config = read_config(out)
    for line in _start_lines(start.values):
        console.print(line)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task("", total=config.train.steps, completed=start.step)
        for event in events:
            if event.kind == "step":
                bar.update(task, completed=event.step, description=progress_text(event))
            elif event.kind == "samples" and event.model is not None:
                _draw_grid(event, config, out, stop, start.values["classes"], scale)
            elif event.kind == "stopped":
                bar.stop()
                _end(event, console)
            elif line := _event_line(event):
                console.print(line)


def _start_lines(values: dict[str, Any]) -> Iterator[str]:
    """Lines about the model, the data and the checkpoint that training starts with."""
    many = f"{values['processes']} processes, {values['device']} ..."
    device = values["device"] if values["processes"] == 1 else many
    yield (
        f"{values['parameters'] / 1e6:.2f} M parameters on {device} in {values['precision']}, "
        f"{len(values['classes'])} classes: {', '.join(values['classes'][:12])}"
    )
    if values["changed"]:
        yield values["changed"]
    for damage in values["passed_over"]:
        yield f"passed over: {damage}"
    if begun := values["begun"]:
        yield str(begun)
        if begun.other_data:
            yield f"{begun.run} was trained on other data: it may have seen images that are held out here"
    if values["unrecorded"]:
        yield "the checkpoint does not record its data: whether the data changed is unknown"


def _event_line(event: Event) -> str:
    """The line about an event; empty if events of its kind are not shown."""
    values = event.values
    match event.kind:
        case "held_out":
            parts = (f"t={t}: {e['whole']:.5f} (high {e['high']:.5f})" for t, e in values.items())
            return f"step {event.step}  held-out error  {'  '.join(parts)}"
        case "checkpoint":
            return f"step {event.step}  saved {values['path']}"
        case "unsaved":
            return f"step {event.step}  {values['why']}; the next checkpoint tries again"
        case "skipped":
            low, high = values["examples"]
            bad = ", ".join(map(str, values["not_finite"])) or "none alone"
            numbers = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
            return f"step {event.step}  skipped: {numbers} (examples {low} to {high}, not finite: {bad})"
        case "rolled_back":
            return f"{values['why']}: back to step {values['to']}, and on with later examples"
    return ""


def _draw_grid(
    event: Event, config: RunConfig, out: Path, stop: StopRequest, classes: Sequence[str], scale: int | None
) -> None:
    """Write the sample grid of a step, unless it exists. If a signal interrupts this, a resumed run writes the grid."""
    from dit_in_dit.reporting.images import image_grid, image_png, to_pixels
    from dit_in_dit.sampling.numbered import class_of, sample
    from dit_in_dit.training.interrupt import Interrupted

    assert event.model is not None
    path = out / "samples" / f"{event.step:07d}.png"
    if path.exists():
        return
    with suppress(Interrupted), stop.waiting():
        images = _pixels(sample(event.model, config, GRID_IMAGES), config, event.model)
        try:
            pixels = to_pixels(images)
        except UserError as error:  # train.on_divergence decides how the run continues
            print(f"dit-in-dit: no grid of step {event.step}: {error}", file=sys.stderr)
            return
        path.parent.mkdir(exist_ok=True)
        names = [class_of(i, classes) for i in range(GRID_IMAGES)] if config.model.num_classes else []
        atomic.write_atomic(path, image_png(image_grid(pixels, scale=scale, names=names)))


def _pixels(images: Tensor, config: RunConfig, model: NestedDiT) -> Tensor:
    """Decode latents to images. If the VAE cannot be loaded, return the latents: a failed grid must not end a run."""
    import torch

    decode = open_or_keep(config.data, next(model.parameters()).device)
    batches = [images[start : start + 4] for start in range(0, len(images), 4)]  # training occupies most of the memory
    return torch.cat([decode(batch) for batch in batches])


def _end(event: Event, console: Any) -> None:
    """Print the step at which the run stopped; after a signal, exit with its code."""
    console.print(f"step {event.step}  stopped; continue it with --resume")
    if number := event.values["signal"]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else the loader would report the killed workers as a fault
        for child in multiprocessing.active_children():
            child.kill()  # it may be waiting for data
        sys.exit(128 + number)


def _demo_classes(known: int) -> list[int]:
    """The class number of each picture: all in turn, or evenly spaced ones of more classes than pictures."""
    return [i * known // DEMO_IMAGES if known > DEMO_IMAGES else i % max(known, 1) for i in range(DEMO_IMAGES)]


def _demo(options: argparse.Namespace) -> None:
    """Train or resume, generate samples, and put the samples beside real images."""
    from dit_in_dit.data.run_data import images_of_classes
    from dit_in_dit.reporting.images import image_grid, image_png, side_by_side, to_pixels
    from dit_in_dit.runs.checkpoint import Checkpoint
    from dit_in_dit.runs.folder import read_config
    from dit_in_dit.runtime.device import pick_device
    from dit_in_dit.sampling.numbered import sample
    from dit_in_dit.training.loop import train

    out: Path = options.out
    started = (out / "config.yaml").exists()
    config_named = options.preset or options.config or options.set
    if not (options.preset or options.config):
        options.set = [*DEMO, *options.set]
    config = read_config(out) if started and not config_named else chosen_config(options, "emoji")
    stop = _signals()
    _follow(train(config, out, resume=started, device=options.device, stop=stop), out, stop)
    saved = Checkpoint.open(out)
    model, config = saved.model(pick_device(options.device)), saved.config
    print("drawing samples ...", file=sys.stderr)
    labels = _demo_classes(config.model.num_classes)
    drawn = image_grid(to_pixels(sample(model, config, DEMO_IMAGES, classes=labels)))
    atomic.write_atomic(out / "samples.png", image_png(drawn))
    real = image_grid(images_of_classes(config, labels))
    atomic.write_atomic(out / "real.png", image_png(real))
    both = side_by_side({"drawn by the model": drawn, "real training images": real})
    atomic.write_atomic(out / "samples-beside-real.png", image_png(both))
    print("\nThe pictures:")
    for name, what in (
        ("samples-beside-real.png", "samples of the trained model beside real images of the same classes"),
        ("samples.png", "the samples alone"),
        ("samples/", "samples during training"),
    ):
        print(f"  {out / name}  {what}")
