"""A worker: takes trials from the queue, trains and measures each as an ordinary run, and records its result."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_in_dit.benchmark.timing import on_threads, step_seconds
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.curves.logs import read_run
from dit_in_dit.data.sources import open_source
from dit_in_dit.metrics.evaluate import Evaluation, evaluate
from dit_in_dit.metrics.feature_networks import Network
from dit_in_dit.metrics.subject import reference, run_subject
from dit_in_dit.reporting.images import to_pixels
from dit_in_dit.runs import atomic
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.lock import BusyError
from dit_in_dit.runtime.device import resolve_precision
from dit_in_dit.sampling.numbered import class_of, sample
from dit_in_dit.study.arms import budgeted, describe, matched
from dit_in_dit.study.plan import Plan
from dit_in_dit.study.planning import check_data, networks
from dit_in_dit.study.queue import BEATS, MOST_LOSSES, Lease, LeaseLostError, Queue
from dit_in_dit.study.result import Result, read_result
from dit_in_dit.training.loop import train
from dit_in_dit.training.session import Event

DRAWN = 24  # samples of a trial, for the report's picture
SEARCHED = 200  # images of an endless source in which real images of each class are looked for


@dataclass(frozen=True)
class WorkerEvent:
    """Progress of a worker: `kind` is waiting, training, measuring, done, failed, pruned or lost."""

    kind: str
    key: str = ""
    step: int = 0
    steps: int = 0
    text: str = ""


def work(plan: Plan, out: Path, queue: Queue, device: torch.device) -> Generator[WorkerEvent, None, None]:
    """Do trials until none is left. Closing the generator stops the worker and gives its trial back.

    Raises:
        UserError: the weights of a metric are missing, or the data changed since the study was planned.
        AwayError: the queue's storage has not answered for a lease.
    """
    feature_networks = networks(plan.study, device)
    if not queue.finished():
        check_data(plan)
    with on_threads(plan.study.threads):
        while True:
            lease = queue.claim()
            if lease is not None:
                with queue.keep(lease):
                    yield from _try(plan, out, queue, lease, device, feature_networks)
            elif queue.finished():
                return
            else:  # other workers hold the rest, or have lost it
                yield WorkerEvent("waiting", text=f"for {queue.counts()['running']} trials of other workers")
                _pause(queue)


def _try(
    plan: Plan, out: Path, queue: Queue, lease: Lease, device: torch.device, networks: tuple[Network, ...]
) -> Generator[WorkerEvent, None, None]:
    """Do one trial, from its last checkpoint to its result."""
    run = out / "runs" / lease.key
    run.mkdir(parents=True, exist_ok=True)
    try:
        result = read_result(run)  # there is one if a worker was lost between writing and recording it
        if result is None:
            arm, seed = lease.key, plan.study.seeds[0]
            try:
                arm, seed, config = _config(plan, lease, run, device)
                if lease.losses >= MOST_LOSSES:
                    raise UserError(f"{lease.losses} workers were lost with it since its last checkpoint")
                result = yield from _train_and_measure(plan, queue, lease, run, (arm, seed, config), device, networks)
            except (UserError, torch.OutOfMemoryError) as error:
                reason = str(error).splitlines()[0][:200]
                result = Result(arm, seed, "failed", lease.step, {}, {}, {}, reason)
            lease.check()
            atomic.write_atomic(run / "result.json", result.to_json() + "\n")
        queue.done(lease, result.state, result.metrics.get(plan.study.primary))
        yield WorkerEvent(result.state, lease.key, result.step, result.step, result.reason)
    except LeaseLostError:
        yield WorkerEvent("lost", lease.key)


def _pause(queue: Queue) -> None:
    """Wait for other workers: the time between two beats, at most a second."""
    time.sleep(min(1.0, queue.lease / BEATS))


def _config(plan: Plan, lease: Lease, run: Path, device: torch.device) -> tuple[str, int, RunConfig]:
    """Arm, seed and config of a trial; in a search, from the sampler's choice."""
    if not plan.study.search:
        trial = next(trial for trial in plan.trials if trial.key == lease.key)
        return trial.arm, trial.seed, trial.config
    changes = lease.trial.params
    atomic.write_atomic(run / "changes.json", json.dumps({"changes": changes, "number": int(lease.key[1:])}) + "\n")
    seed = plan.study.seeds[0]
    if (run / "config.yaml").exists():
        return describe(changes), seed, read_config(run)
    return describe(changes), seed, replace(_chosen(plan, changes, device), seed=seed)


def _chosen(plan: Plan, changes: dict[str, Any], device: torch.device) -> RunConfig:
    """The config of a sampler's choice, of the control's cost and within the budget; UserError if none exists."""
    study, threads = plan.study, plan.study.threads
    config, _ = matched(study, changes, plan.control.config, device, threads)
    seconds = None
    if "seconds" in study.budget:
        seconds = step_seconds({"it": config}, device, threads=threads)["it"].seconds
    return resolve_precision(budgeted(study, config, changes, seconds), device)


def _train_and_measure(
    plan: Plan,
    queue: Queue,
    lease: Lease,
    run: Path,
    trial: tuple[str, int, RunConfig],
    device: torch.device,
    networks: tuple[Network, ...],
) -> Generator[WorkerEvent, None, Result]:
    arm, seed, config = trial
    total = config.train.steps
    pruned = yield from _train(plan, queue, lease, run, config, device)
    if pruned:
        return Result(arm, seed, "pruned", lease.step, _held_out(run), {}, {})
    yield WorkerEvent("measuring", lease.key, total, total)
    metrics, floors, protocol = _held_out(run), {}, {}
    if not math.isfinite(metrics.get(plan.study.primary, 0.0)):
        raise UserError(f"diverged: {plan.study.primary} is not finite at step {total}")
    if set(plan.study.metrics) - {"held_out"}:
        subject = run_subject(run, device, lambda config, _: (config, []), seed=0, averaged=True)
        real = reference(None, subject, wanted=2 * plan.study.samples)
        folder = run / "evaluation" / f"{total:07d}"
        for event in evaluate(subject, real, folder, plan.study.samples, networks=networks):
            lease.check()
            if isinstance(event, Evaluation):
                scores, protocol = event.result["scores"], event.result["protocol"]
                metrics |= {name: score["value"] for name, score in scores.items()}
                floors = {name: score["floor"] for name, score in scores.items() if score["floor"] is not None}
    _draw(run, device)
    if not math.isfinite(metrics.get(plan.study.primary, math.nan)):
        raise UserError(
            f"{plan.study.primary} is {metrics.get(plan.study.primary, 'not measured')}: nothing to compare"
        )
    return Result(arm, seed, "done", total, metrics, floors, protocol)


def _train(
    plan: Plan, queue: Queue, lease: Lease, run: Path, config: RunConfig, device: torch.device
) -> Generator[WorkerEvent, None, bool]:
    """Train from the last checkpoint; whether the trial was pruned. Waits while a lost worker still locks the run."""
    while True:
        started = (run / "config.yaml").exists()
        with closing(train(config, run, resume=started, device=str(device))) as events:
            try:
                first = next(events)
            except BusyError as busy:
                lease.check()
                yield WorkerEvent("waiting", lease.key, text=str(busy))
                _pause(queue)
                continue
            return (yield from _follow(plan, queue, lease, run, first, events))


def _follow(
    plan: Plan, queue: Queue, lease: Lease, run: Path, first: Event, events: Iterator[Event]
) -> Generator[WorkerEvent, None, bool]:
    """Report the training's errors to the queue; whether the trial was pruned."""
    steps = read_config(run).train.steps
    lease.step = lease.saved = first.step
    for step, error in _errors(run, plan.study.primary):  # again: to the pruner a resumed try is new
        if step <= first.step:
            queue.report(lease, error, step)
    yield WorkerEvent("training", lease.key, first.step, steps, "continued" if first.step else "")
    for event in events:
        lease.check()
        lease.step = event.step
        if event.kind == "checkpoint":
            lease.saved = event.step
        if event.kind == "held_out":
            errors = dict(_errors(run, plan.study.primary))
            if event.step in errors and queue.report(lease, errors[event.step], event.step) and event.step < steps:
                return True
        yield WorkerEvent("training", lease.key, event.step, steps)
    return False


def _errors(run: Path, primary: str) -> list[tuple[int, float]]:
    """Steps and held-out errors so far: of the primary metric, or at t = 0.5 and high frequencies."""
    curve = read_run(run)
    name = primary if primary.startswith("held_out.") else "held_out.0.5.high"
    _, whole, part, kind = name.split(".")
    errors = curve.held_out.get((float(f"{whole}.{part}"), kind), np.empty(0))
    return [(int(step), float(error)) for step, error in zip(curve.evaluated, errors, strict=False)]


def _held_out(run: Path) -> dict[str, float]:
    """The last held-out errors by name."""
    curve = read_run(run)
    return {f"held_out.{t}.{kind}": float(errors[-1]) for (t, kind), errors in curve.held_out.items() if len(errors)}


def _draw(run: Path, device: torch.device) -> None:
    """Write samples 0 to 23 of the averaged model, whose classes take turns, and real images of the same classes."""
    checkpoint = Checkpoint.open(run)
    config = checkpoint.config
    images = to_pixels(sample(checkpoint.model(device), config, DRAWN))
    labels = [class_of(i, range(config.model.num_classes or 1)) for i in range(DRAWN)]
    with atomic.file(run / "drawn.npz") as file:
        np.savez(file, images=images, labels=np.array(labels), real=_real(config, labels))


def _real(config: RunConfig, labels: list[int]) -> NDArray[np.uint8]:
    """A training image for each label, different ones while the class has more; of any class if its own has none."""
    source = open_source(config.data, config.model)
    if source.train_size is None:  # endless
        known = np.array([source.train(number)[1] for number in range(SEARCHED)])
    else:
        known = source.labels
    turns: Counter[int] = Counter()
    images = []
    for y in labels:
        of_class = np.flatnonzero(known == y) if config.model.num_classes else np.empty(0, int)
        if not len(of_class):
            of_class = np.arange(len(known))
        images.append(source.train(int(of_class[turns[y] * len(of_class) // len(labels) % len(of_class)]))[0])
        turns[y] += 1
    return to_pixels(torch.from_numpy(np.stack(images)))


def memory(config: RunConfig) -> int:
    """Rough bytes of a trial on its device: weights, gradients, optimizer and average, and 1.5 times the activations
    kept for the backward pass."""
    from dit_in_dit.inspection import cost
    from dit_in_dit.inspection.trace import inspect

    activations: Any = inspect(config.model, config.train.batch_size, config.train.recompute)["activation_bytes"]
    return int(5 * 4 * cost.parameters(config.model)["total"] + 1.5 * activations["total"])
