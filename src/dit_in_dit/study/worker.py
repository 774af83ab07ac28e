"""A worker: takes trials from the board, trains and measures each as an ordinary run, and tells what came of it."""

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

from dit_in_dit.benchmark.timing import step_seconds
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

DRAWN = 24  # images that a trial draws to be looked at
SEARCHED = 200  # images of an endless source looked through for some of each class


@dataclass(frozen=True)
class WorkerEvent:
    """What a worker does: `kind` is waiting, training, measuring, done, failed, pruned or lost."""

    kind: str
    key: str = ""
    step: int = 0
    steps: int = 0
    text: str = ""


def work(plan: Plan, out: Path, board: Queue, device: torch.device) -> Generator[WorkerEvent, None, None]:
    """Do trials until none is left. Close the generator to stop: its trial is given back.

    Raises:
        UserError: the weights of a metric are not there, or the data changed since the study was planned.
        AwayError: the board's storage has been away for a lease.
    """
    used = networks(plan.study, device)
    if not board.finished():
        check_data(plan)
    before = torch.get_num_threads()
    torch.set_num_threads(plan.study.threads)
    try:
        while True:
            claim = board.claim()
            if claim is not None:
                with board.keep(claim):
                    yield from _try(plan, out, board, claim, device, used)
            elif board.finished():
                return
            else:  # others have what is left, or had it
                yield WorkerEvent("waiting", text=f"for {board.counts()['running']} trials that others have")
                _pause(board)
    finally:
        torch.set_num_threads(before)


def _try(
    plan: Plan, out: Path, board: Queue, claim: Lease, device: torch.device, networks: tuple[Network, ...]
) -> Generator[WorkerEvent, None, None]:
    """One trial, from where it was left to its result."""
    run = out / "runs" / claim.key
    run.mkdir(parents=True, exist_ok=True)
    try:
        result = read_result(run)  # its worker was lost between writing and telling
        if result is None:
            arm, seed = claim.key, plan.study.seeds[0]
            try:
                arm, seed, config = _config(plan, claim, run, device)
                if claim.losses >= MOST_LOSSES:
                    raise UserError(f"it was lost by {claim.losses} workers since it last saved something")
                result = yield from _train_and_measure(plan, board, claim, run, (arm, seed, config), device, networks)
            except (UserError, torch.OutOfMemoryError) as error:
                reason = str(error).splitlines()[0][:200]
                result = Result(arm, seed, "failed", claim.step, {}, {}, {}, reason)
            claim.check()
            atomic.write_atomic(run / "result.json", result.to_json() + "\n")
        board.done(claim, result.state, result.metrics.get(plan.study.primary))
        yield WorkerEvent(result.state, claim.key, result.step, result.step, result.reason)
    except LeaseLostError:
        yield WorkerEvent("lost", claim.key)


def _pause(board: Queue) -> None:
    """Leave other workers some time: as long as between two signs of their life, a second at most."""
    time.sleep(min(1.0, board.lease / BEATS))


def _config(plan: Plan, claim: Lease, run: Path, device: torch.device) -> tuple[str, int, RunConfig]:
    """Arm, seed and config of a trial; of a search, they follow from what its sampler chose."""
    if not plan.study.search:
        trial = next(trial for trial in plan.trials if trial.key == claim.key)
        return trial.arm, trial.seed, trial.config
    changes = claim.trial.params
    atomic.write_atomic(run / "changes.json", json.dumps({"changes": changes, "number": int(claim.key[1:])}) + "\n")
    seed = plan.study.seeds[0]
    if (run / "config.yaml").exists():
        return describe(changes), seed, read_config(run)
    return describe(changes), seed, replace(_chosen(plan, changes, device), seed=seed)


def _chosen(plan: Plan, changes: dict[str, Any], device: torch.device) -> RunConfig:
    """The config that a sampler's choice makes, of the control's cost and within the budget; UserError without one."""
    study, threads = plan.study, plan.study.threads
    config, _ = matched(study, changes, plan.control.config, device, threads)
    seconds = None
    if "seconds" in study.budget:
        seconds = step_seconds({"it": config}, device, threads=threads)["it"].seconds
    return resolve_precision(budgeted(study, config, changes, seconds), device)


def _train_and_measure(
    plan: Plan,
    board: Queue,
    claim: Lease,
    run: Path,
    what: tuple[str, int, RunConfig],
    device: torch.device,
    networks: tuple[Network, ...],
) -> Generator[WorkerEvent, None, Result]:
    arm, seed, config = what
    total = config.train.steps
    pruned = yield from _train(plan, board, claim, run, config, device)
    if pruned:
        return Result(arm, seed, "pruned", claim.step, _held_out(run), {}, {})
    yield WorkerEvent("measuring", claim.key, total, total)
    metrics, floors, protocol = _held_out(run), {}, {}
    if not math.isfinite(metrics.get(plan.study.primary, 0.0)):
        raise UserError(f"diverged: {plan.study.primary} is not finite at step {total}")
    if set(plan.study.metrics) - {"held_out"}:
        subject = run_subject(run, device, lambda config, _: (config, []), seed=0, averaged=True)
        real = reference(None, subject, wanted=2 * plan.study.samples)
        for fact in evaluate(subject, real, run / "evaluation" / f"{total:07d}", plan.study.samples, networks=networks):
            claim.check()
            if isinstance(fact, Evaluation):
                scores, protocol = fact.result["scores"], fact.result["protocol"]
                metrics |= {name: score["value"] for name, score in scores.items()}
                floors = {name: score["floor"] for name, score in scores.items() if score["floor"] is not None}
    _draw(run, device)
    if not math.isfinite(metrics.get(plan.study.primary, math.nan)):
        raise UserError(f"{plan.study.primary} is {metrics.get(plan.study.primary, 'not there')}: nothing to compare")
    return Result(arm, seed, "done", total, metrics, floors, protocol)


def _train(
    plan: Plan, board: Queue, claim: Lease, run: Path, config: RunConfig, device: torch.device
) -> Generator[WorkerEvent, None, bool]:
    """Train from the last checkpoint on; whether it was pruned. Waits while a lost worker still holds the run."""
    while True:
        started = (run / "config.yaml").exists()
        with closing(train(config, run, resume=started, device=str(device))) as facts:
            try:
                first = next(facts)
            except BusyError as busy:
                claim.check()
                yield WorkerEvent("waiting", claim.key, text=str(busy))
                _pause(board)
                continue
            return (yield from _follow(plan, board, claim, run, first, facts))


def _follow(
    plan: Plan, board: Queue, claim: Lease, run: Path, first: Event, facts: Iterator[Event]
) -> Generator[WorkerEvent, None, bool]:
    """Tell the board how the training goes; whether it was pruned."""
    steps = read_config(run).train.steps
    claim.step = claim.saved = first.step
    for step, error in _errors(run, plan.study.primary):  # told again: this try is a new one to the pruner
        if step <= first.step:
            board.report(claim, error, step)
    yield WorkerEvent("training", claim.key, first.step, steps, "continued" if first.step else "")
    for fact in facts:
        claim.check()
        claim.step = fact.step
        if fact.kind == "checkpoint":
            claim.saved = fact.step
        if fact.kind == "held_out":
            found = dict(_errors(run, plan.study.primary))
            if fact.step in found and board.report(claim, found[fact.step], fact.step) and fact.step < steps:
                return True
        yield WorkerEvent("training", claim.key, fact.step, steps)
    return False


def _errors(run: Path, primary: str) -> list[tuple[int, float]]:
    """Steps and held-out errors so far: the primary metric's, or those at high frequencies in the middle."""
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
    """Samples 0 to 23 of the averaged model, whose classes take turns, and real images of the same classes."""
    saved = Checkpoint.open(run)
    config = saved.config
    images = to_pixels(sample(saved.model(device), config, DRAWN))
    labels = [class_of(i, range(config.model.num_classes or 1)) for i in range(DRAWN)]
    with atomic.file(run / "drawn.npz") as file:
        np.savez(file, images=images, labels=np.array(labels), real=_real(config, labels))


def _real(config: RunConfig, labels: list[int]) -> NDArray[np.uint8]:
    """A training image for each label, another one each time while there are; any where there is none."""
    source = open_source(config.data, config.model)
    if source.train_size is None:  # endless: the first that have the label
        there = np.array([source.train(number)[1] for number in range(SEARCHED)])
    else:
        there = source.labels
    turns: Counter[int] = Counter()
    images = []
    for y in labels:
        mine = np.flatnonzero(there == y) if config.model.num_classes and (there == y).any() else np.arange(len(there))
        images.append(source.train(int(mine[turns[y] * len(mine) // len(labels) % len(mine)]))[0])
        turns[y] += 1
    return to_pixels(torch.from_numpy(np.stack(images)))


def memory(config: RunConfig) -> int:
    """Bytes that a trial needs on its device, roughly: weights, gradient, optimizer and average, and what the backward
    pass keeps, half as much again for what is on its way."""
    from dit_in_dit.inspection import cost
    from dit_in_dit.inspection.trace import inspect

    kept: Any = inspect(config.model, config.train.batch_size, config.train.recompute)["activation_bytes"]
    return int(5 * 4 * cost.parameters(config.model)["total"] + 1.5 * kept["total"])
