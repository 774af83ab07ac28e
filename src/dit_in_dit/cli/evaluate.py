"""`evaluate`: measure images against real ones; `compare`: put several evaluations into one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_in_dit.cli.options import (
    Commands,
    add_sampling,
    chosen_average,
    device_fit,
    make_folder,
    named_guide,
    print_table,
    sampling_config,
    whole_number,
)
from dit_in_dit.config.errors import UserError, did_you_mean
from dit_in_dit.runs import atomic
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.pretrained import find_run, results_folder
from dit_in_dit.runtime.process import is_main

if TYPE_CHECKING:
    import torch

    from dit_in_dit.metrics.evaluate import Evaluation, Progress
    from dit_in_dit.metrics.feature_distances import ReferenceStatistics
    from dit_in_dit.metrics.feature_networks import Network
    from dit_in_dit.metrics.subject import Subject

GROUPS = ("pixels", "classifier", "inception", "dinov2")


def add(commands: Commands) -> None:
    """Add the commands."""
    evaluate = commands.add(
        "evaluate", _evaluate, "measure a run's samples, or a folder or array of images, against real images"
    )
    evaluate.add_argument("subject", type=find_run, metavar="RUN|IMAGES", help="a run, or a folder, .zip, .npz or .npy")
    about = "real images: emoji, mosaic, a folder, .zip or arrays (default: the run's data)"
    evaluate.add_argument("--against", metavar="DATA", help=about)
    evaluate.add_argument(
        "--metrics",
        default="pixels",
        help="separated by commas: pixels (no network; always computed), classifier (of the real images, trained once "
        "in minutes on a CPU: is a sample recognised as its class?), inception (FID, sFID, IS, KID, precision, "
        "recall, density, coverage), dinov2 (FD-DINOv2)",
    )
    evaluate.add_argument("--weights", type=Path, metavar="FILE", help="torch-fidelity's Inception weights")
    evaluate.add_argument("--dinov2", type=Path, metavar="DIR", help="folder of DINOv2 ViT-L/14 for transformers")
    about = "for FID and sFID: an .npz file in ADM's layout (mu, sigma, mu_s, sigma_s)"
    evaluate.add_argument("--statistics", type=Path, metavar="FILE", help=about)
    evaluate.add_argument("--npz", action="store_true", help="also write samples.npz for ADM's evaluator")
    add_sampling(evaluate, 1000, classes="all, as often as in the training data", averages="; all: each, and a curve")
    evaluate.add_argument(
        "--batch", type=whole_number, default=64, help="images per batch of the feature networks (default 64)"
    )
    about = "folder for the results (default: RUN/evaluation/STEP; for a shipped run: evaluation/RUN/STEP)"
    evaluate.add_argument("--out", type=Path, metavar="DIR", help=about)

    compare = commands.add("compare", _compare, "put evaluations with equal protocols into one table and one picture")
    compare.add_argument(
        "evaluations", type=find_run, nargs="+", metavar="RUN|DIR", help="evaluated runs, or --out folders"
    )
    compare.add_argument("--out", type=Path, metavar="DIR", help="folder for compare.png and compare.json")


def _evaluate(options: argparse.Namespace) -> None:
    from dit_in_dit.runtime.device import pick_device

    groups = [group for group in options.metrics.split(",") if group]
    for group in groups:
        if group not in GROUPS:
            raise UserError(f"unknown metrics {group!r}{did_you_mean(group, GROUPS)}")
    device = pick_device(options.device)
    networks, statistics = _networks(options, groups, device)
    measure = partial(_measure, options, device, networks, statistics)
    if options.ema == "all":
        _evaluate_all(options, measure)
    else:
        measure()


def _evaluate_all(options: argparse.Namespace, measure: Callable[[Path | None], Path]) -> None:
    """Evaluate each average of a run, then write and print their scores over their lengths."""
    from dit_in_dit.metrics.average_curve import compare_averages, draw_averages
    from dit_in_dit.metrics.report import score_table
    from dit_in_dit.runs.averages import average_names, evaluation_folder
    from dit_in_dit.runs.checkpoint import Checkpoint

    saved, out = Checkpoint.open(options.subject), options.out
    folders: dict[str, Path] = {}
    for name in (str(saved.config.train.decays[0]), *average_names(saved.state())):
        options.ema, first = name, next(iter(folders.values()), None)
        options.out = out and evaluation_folder(out, chosen_average(options, saved.config))
        folders[name] = measure(first and first / "features")
    if is_main():
        compared, place = compare_averages(folders, saved.step), next(iter(folders.values()))
        labels = [f"{name} ({length:.3f})" for name, length in compared["averages"].items()]
        print_table(*score_table(compared["scores"], labels), title="average (its length relative to the run)")
        draw_averages(compared, place)
        print(f"averages.json and averages.png in {place}")


def _measure(
    options: argparse.Namespace,
    device: torch.device,
    networks: tuple[Network, ...],
    statistics: ReferenceStatistics | None,
    real_features: Path | None = None,
) -> Path:
    """Evaluate what the options name; returns the folder of the results."""
    from dit_in_dit.metrics.evaluate import evaluate, images_of, write_npz
    from dit_in_dit.metrics.subject import reference

    subject, out = _subject(options, device)
    make_folder(out)
    num = min(options.num, subject.count or options.num)
    real = reference(options.against, subject, wanted=2 * num)
    how: dict[str, Any] = {"networks": networks, "statistics": statistics, "real_features": real_features}
    how["classify"] = "classifier" in options.metrics.split(",")
    evaluation = _follow(evaluate(subject, real, out, num, batch=options.batch, **how))
    if evaluation is not None:  # process 0 reports
        if options.npz:
            write_npz(out / "samples.npz", images_of(subject, out, num), num)
        _report(evaluation, out)
    return out


def _networks(
    options: argparse.Namespace, groups: list[str], device: torch.device
) -> tuple[tuple[Network, ...], ReferenceStatistics | None]:
    """The feature networks of the groups, and the statistics of --statistics."""
    from dit_in_dit.metrics.feature_distances import read_reference
    from dit_in_dit.metrics.feature_networks import open_network

    weights = {"inception": options.weights, "dinov2": options.dinov2}
    networks = tuple(open_network(group, weights[group], device) for group in GROUPS[2:] if group in groups)
    statistics = read_reference(options.statistics) if options.statistics else None
    if statistics and "inception" not in groups:
        raise UserError("--statistics is for FID: give --metrics inception with it")
    return networks, statistics


def _subject(options: argparse.Namespace, device: torch.device) -> tuple[Subject, Path]:
    """The images to evaluate, and the folder of the evaluation."""
    from dit_in_dit.data.encode import open_decoder
    from dit_in_dit.metrics.subject import files_subject, run_subject
    from dit_in_dit.runs.averages import evaluation_folder

    if (options.subject / "config.yaml").is_file():
        averaged = chosen_average(options, read_config(options.subject))
        subject = run_subject(
            options.subject,
            device,
            lambda config, names: sampling_config(options, config, names),
            seed=options.seed,
            averaged=averaged,
            decoder=lambda data: open_decoder(replace(data, vae=options.vae or data.vae), device),
            fit=device_fit(options),
            guide=named_guide(options, device),
        )
        folder = results_folder(options.subject, "evaluation") / f"{subject.about['step']:07d}"
        return subject, options.out or evaluation_folder(folder, averaged)
    subject = files_subject(options.subject)
    if options.out is None:
        raise UserError("an evaluation of images needs a folder for its results: give --out DIR")
    return subject, options.out


def _report(evaluation: Evaluation, out: Path) -> None:
    """Print the scores, the files and the warnings; draw the figures."""
    from dit_in_dit.metrics import report

    result = evaluation.result
    print(report.caption(result["subject"], result["protocol"]))
    print_table(*report.score_table({name: [score] for name, score in result["scores"].items()}, ["value"]))
    files = [(out / "metrics.json", "every number and how it was made")]
    try:
        files += report.draw_evaluation(evaluation, out)
    except UserError as error:  # without matplotlib the numbers remain
        print(f"dit-in-dit: {error}", file=sys.stderr)
    for path, what in files:
        print(f"  {path}  {what}")
    for warning in result["warnings"]:
        print(f"\n!!! {warning}", file=sys.stderr)


def _follow(events: Iterator[Progress | Evaluation]) -> Evaluation | None:
    """Show the progress; returns the evaluation on process 0, and None on other processes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from dit_in_dit.metrics.evaluate import Evaluation

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with Bar(*columns, console=Console(stderr=True)) as bar:
        for event in events:
            if isinstance(event, Evaluation):
                return event
            if event.part not in tasks:
                tasks[event.part] = bar.add_task(event.part, total=event.total)
            bar.update(tasks[event.part], completed=event.done)
    return None


def _compare(options: argparse.Namespace) -> None:
    from dit_in_dit.metrics.report import compare_evaluations, draw_compared, score_table

    if len(options.evaluations) < 2:
        raise UserError("compare needs two evaluations or more: got one; name a second evaluation")
    labels, scores = compare_evaluations(options.evaluations)
    print_table(*score_table(scores, labels))
    if options.out:
        make_folder(options.out)
        table = {"evaluations": list(map(str, options.evaluations)), "scores": scores}
        atomic.write_atomic(options.out / "compare.json", json.dumps(table, indent=1) + "\n")
        draw_compared(labels, scores, options.out / "compare.png")
        print(f"compare.json and compare.png in {options.out}")
