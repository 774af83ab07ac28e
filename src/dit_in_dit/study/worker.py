"""A worker: takes trials from the queue, trains and measures each as an ordinary run, and records its result."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_in_dit.benchmark.timing import step_seconds
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.curves.logs import read_run
from dit_in_dit.data.run_data import images_of_classes
from dit_in_dit.inspection import cost
from dit_in_dit.inspection.trace import inspect
from dit_in_dit.metrics.evaluate import Evaluation, evaluate
from dit_in_dit.metrics.feature_networks import Network
from dit_in_dit.metrics.subject import reference, run_subject
from dit_in_dit.reporting.images import to_pixels
from dit_in_dit.runs import atomic
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.lock import BusyError
from dit_in_dit.runtime.device import resolve_auto
from dit_in_dit.runtime.threads import use_threads
from dit_in_dit.sampling.numbered import class_of, sample
from dit_in_dit.study.arms import budgeted_config, describe_changes, matched_config
from dit_in_dit.study.plan import Plan, Trial
from dit_in_dit.study.planning import check_data, open_networks
from dit_in_dit.study.queue import BEATS, MOST_LOSSES, Lease, LeaseLostError, Queue
from dit_in_dit.study.result import Result, read_result
from dit_in_dit.training.event import Event
from dit_in_dit.training.loop import train

DRAWN = 24  # samples of a trial, for the report's picture


@dataclass(frozen=True)
class WorkerEvent:
    """Progress of a worker: `kind` is waiting, training, measuring, done, failed, pruned or lost."""

    kind: str
    key: str = ""
    step: int = 0
    steps: int = 0
    text: str = ""


def run_trials(plan: Plan, out: Path, queue: Queue, device: torch.device) -> Generator[WorkerEvent, None, None]:
    """Do trials until no trial is left. Closing the generator stops the worker and gives its trial back.

    Raises:
        UserError: the weights of a metric are missing, or the data changed since the study was planned.
        StorageAwayError: the queue's storage has not answered for the length of a lease.
    """
    feature_networks = open_networks(plan.study, device)
    if not queue.finished():
        check_data(plan)
    with use_threads(plan.study.threads):
        while True:
            lease = queue.claim()
            if lease is not None:
                with queue.keep(lease):
                    yield from _Try(plan, queue, lease, out / "runs" / lease.key, device, feature_networks).do()
            elif queue.finished():
                return
            else:  # other workers hold the remaining trials, or have lost them
                yield WorkerEvent("waiting", text=f"for {queue.counts()['running']} trials of other workers")
                _pause(queue)


def _pause(queue: Queue) -> None:
    """Wait for other workers for the time between two beats, but at most a second."""
    time.sleep(min(1.0, queue.lease / BEATS))


@dataclass(frozen=True)
class _Try:
    """A worker's try at one trial, in the folder `run`."""

    plan: Plan
    queue: Queue
    lease: Lease
    run: Path
    device: torch.device
    networks: tuple[Network, ...]

    def do(self) -> Generator[WorkerEvent, None, None]:
        """Do the trial, from its last checkpoint to its result."""
        lease, run, study = self.lease, self.run, self.plan.study
        run.mkdir(parents=True, exist_ok=True)
        try:
            result = read_result(run)  # a result exists if a worker was lost between writing and recording it
            if result is None:
                trial = None
                try:
                    trial = self._trial()
                    if lease.losses >= MOST_LOSSES:
                        raise UserError(f"{lease.losses} workers were lost with it since its last checkpoint")
                    result = yield from self._train_and_measure(trial)
                except (UserError, torch.OutOfMemoryError) as error:
                    reason = str(error).splitlines()[0][:200]
                    arm, seed = (trial.arm, trial.seed) if trial else (lease.key, study.seeds[0])
                    result = Result(arm, seed, "failed", lease.step, {}, {}, {}, reason)
                lease.check()
                atomic.write_atomic(run / "result.json", result.to_json() + "\n")
            self.queue.done(lease, result.state, result.metrics.get(study.primary))
            yield WorkerEvent(result.state, lease.key, result.step, result.step, result.reason)
        except LeaseLostError:
            yield WorkerEvent("lost", lease.key)

    def _trial(self) -> Trial:
        """The planned trial. In a search, the trial with the sampler's choice."""
        plan, run, key = self.plan, self.run, self.lease.key
        if not plan.study.search:
            return next(trial for trial in plan.trials if trial.key == key)
        changes, seed = self.lease.trial.params, plan.study.seeds[0]
        atomic.write_atomic(run / "changes.json", json.dumps({"changes": changes, "number": int(key[1:])}) + "\n")
        started = (run / "config.yaml").exists()
        config = read_config(run) if started else replace(self._chosen(changes), seed=seed)
        return Trial(describe_changes(changes), seed, config)

    def _chosen(self, changes: dict[str, Any]) -> RunConfig:
        """The config of a sampler's choice, matched to the control's cost, within the budget. Raises UserError."""
        study, threads = self.plan.study, self.plan.study.threads
        config, _ = matched_config(study, changes, self.plan.control.config, self.device, threads)
        seconds = None
        if "seconds" in study.budget:
            seconds = step_seconds({"it": config}, self.device, threads=threads)["it"].seconds
        return resolve_auto(budgeted_config(study, config, changes, seconds), self.device)

    def _train_and_measure(self, trial: Trial) -> Generator[WorkerEvent, None, Result]:
        lease, run, study, total = self.lease, self.run, self.plan.study, trial.config.train.steps
        pruned = yield from self._train(trial.config)
        if pruned:
            return Result(trial.arm, trial.seed, "pruned", lease.step, _held_out(run), {}, {})
        yield WorkerEvent("measuring", lease.key, total, total)
        metrics, floors, protocol = _held_out(run), {}, {}
        if not math.isfinite(metrics.get(study.primary, 0.0)):
            raise UserError(f"diverged: {study.primary} is not finite at step {total}")
        if set(study.metrics) - {"held_out"}:
            subject = run_subject(run, self.device, lambda config, _: (config, []), seed=0, averaged=True)
            real = reference(None, subject, wanted=2 * study.samples)
            folder = run / "evaluation" / f"{total:07d}"
            how: dict[str, Any] = {"networks": self.networks, "classify": "classifier" in study.metrics}
            for event in evaluate(subject, real, folder, study.samples, **how):
                lease.check()
                if isinstance(event, Evaluation):
                    scores, protocol = event.result["scores"], event.result["protocol"]
                    metrics |= {name: score["value"] for name, score in scores.items()}
                    floors = {name: score["floor"] for name, score in scores.items() if score["floor"] is not None}
        _draw(run, self.device)
        if not math.isfinite(metrics.get(study.primary, math.nan)):
            raise UserError(f"{study.primary} is {metrics.get(study.primary, 'not measured')}: nothing to compare")
        return Result(trial.arm, trial.seed, "done", total, metrics, floors, protocol)

    def _train(self, config: RunConfig) -> Generator[WorkerEvent, None, bool]:
        """Train from the last checkpoint; returns whether the trial was pruned. Waits while the run is locked."""
        while True:
            started = (self.run / "config.yaml").exists()
            with closing(train(config, self.run, resume=started, device=str(self.device))) as events:
                try:
                    first = next(events)
                except BusyError as busy:
                    self.lease.check()
                    yield WorkerEvent("waiting", self.lease.key, text=str(busy))
                    _pause(self.queue)
                    continue
                return (yield from self._follow(first, events))

    def _follow(self, first: Event, events: Iterator[Event]) -> Generator[WorkerEvent, None, bool]:
        """Report held-out errors to the queue during training; returns whether the trial was pruned."""
        queue, lease, run, primary = self.queue, self.lease, self.run, self.plan.study.primary
        steps = read_config(run).train.steps
        lease.step = lease.saved = first.step
        for step, error in _errors(run, primary):  # reported again, because a resumed try is new to the pruner
            if step <= first.step:
                queue.report(lease, error, step)
        yield WorkerEvent("training", lease.key, first.step, steps, "continued" if first.step else "")
        for event in events:
            lease.check()
            if event.kind == "checkpoint":  # with train.save=async of an earlier step
                lease.saved = event.step
            else:
                lease.step = event.step
            if event.kind == "held_out":
                errors = dict(_errors(run, primary))
                if event.step in errors and queue.report(lease, errors[event.step], event.step) and event.step < steps:
                    return True
            yield WorkerEvent("training", lease.key, lease.step, steps)
        return False


def _errors(run: Path, primary: str) -> list[tuple[int, float]]:
    """Steps and held-out errors so far, for the primary metric.

    If this metric is not a held-out error, the errors at t = 0.5 and high frequencies take its place.
    """
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
    """Write samples 0 to 23 of the averaged model, with alternating classes, and real images of the same classes."""
    checkpoint = Checkpoint.open(run)
    config = checkpoint.config
    images = to_pixels(sample(checkpoint.model(device), config, DRAWN))
    labels = [class_of(i, range(config.model.num_classes or 1)) for i in range(DRAWN)]
    with atomic.file(run / "drawn.npz") as file:
        np.savez(file, images=images, labels=np.array(labels), real=images_of_classes(config, labels))


def trial_bytes(config: RunConfig) -> int:
    """A rough estimate of a trial's memory in bytes: weights, gradients, optimizer state, averaged weights, and 1.5
    times the activations that are kept for the backward pass."""
    train = config.train
    activations: Any = inspect(config.model, train.batch_size, train.recompute, token_drop=config.lasting_token_drop)[
        "activation_bytes"
    ]
    copies = 5 + len(train.further_averages)
    return int(copies * 4 * cost.parameters(config.model)["total"] + 1.5 * activations["total"])
