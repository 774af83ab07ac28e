"""A queue of a study's trials for any number of workers: each trial is done once, and none is lost.

Optuna stores the trials: in a journal file for workers on one machine, or in a database for workers on several. While a
worker has a trial, the worker increments a counter in the storage, the trial's *beat*. If an observer's own clock shows
that the beat has not changed for the length of a lease, the trial has lost its worker. One observer marks the trial as
failed and enqueues the trial again; the next worker resumes from the last checkpoint.

Two workers may enqueue the same trial at the same time. Among the tries of one key, the first try that was not lost
counts; a worker discards any other try.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_in_dit.study.plan import Plan, StudyConfig
from dit_in_dit.study.storage import StorageAwayError, open_storage

if TYPE_CHECKING:
    import optuna

LEASE = 60.0  # seconds
BEATS = 4  # in a lease
MOST_LOSSES = 5  # workers that a trial may lose since its last checkpoint
OUTCOME = "outcome"  # of a try that Optuna calls failed: failed, surplus or given back; absent: its worker was lost


class LeaseLostError(Exception):
    """The trial belongs to another worker now."""


@dataclass
class Lease:
    """A trial that this worker holds."""

    key: str  # the trial's name, the same for every try
    trial: optuna.Trial
    losses: int = 0  # number of workers that were lost with the trial since its last checkpoint
    step: int = 0  # the trial's training step, for other processes to read
    saved: int = 0  # the step of its last checkpoint
    lost: threading.Event = field(default_factory=threading.Event)  # set when another worker took the trial

    def check(self) -> None:
        """Raise LeaseLostError if the trial went to another worker because its beat stopped."""
        if self.lost.is_set():
            raise LeaseLostError(self.key)


class Queue:
    """A study's trials, for one worker or for an observer.

    Args:
        url: SQLAlchemy URL of a database (postgresql+psycopg://...); None: the journal file in `out`.
        lease: seconds without a beat after which a trial goes to another worker. Calls also wait this long for a
            storage that does not answer.
        say: called with a line when the storage stops answering, and when it answers again.

    Raises:
        UserError: the storage cannot be opened.
        StorageAwayError: any later call raises it if the storage has not answered for the length of a lease.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        url: str | None = None,
        lease: float = LEASE,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.storage = open_storage(out, url, lease, say)
        import optuna

        self.plan, self.lease = plan, lease
        self.states = optuna.trial.TrialState
        self.errors = (optuna.exceptions.UpdateFinishedTrialError, ValueError)
        self.study = optuna.create_study(
            study_name=plan.identity,
            storage=self.storage,  # type: ignore[arg-type]  # it has every method of Optuna's
            pruner=optuna.pruners.MedianPruner() if plan.study.prune else optuna.pruners.NopPruner(),
            direction="minimize",
            load_if_exists=True,
        )
        self._seen: dict[int, tuple[Any, float]] = {}  # trial number -> its beat, and the time of its last change
        self._outages = 0  # of the storage, when `_seen` was written
        self._own: Lease | None = None

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All tries, in the order in which they were enqueued."""
        return self.study.get_trials(deepcopy=False)

    def _live(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the try counts: it waits, runs or has ended, and was neither lost nor discarded."""
        return trial.state != self.states.FAIL or trial.user_attrs.get(OUTCOME) == "failed"

    def keys(self) -> dict[str, optuna.trial.FrozenTrial]:
        """The first live try of each key."""
        first: dict[str, optuna.trial.FrozenTrial] = {}
        for trial in self.trials():
            if self._live(trial) and (key := trial.user_attrs.get("key")):
                first.setdefault(key, trial)
        return first

    @property
    def total(self) -> int:
        """The number of trials in the study."""
        return self.plan.study.trials if self.plan.study.search else len(self.plan.trials)

    def counts(self) -> Counter[str]:
        """The numbers of trials that are done, failed, pruned, running and waiting."""
        names = {"COMPLETE": "done", "FAIL": "failed", "PRUNED": "pruned", "RUNNING": "running"}
        counts = Counter(names.get(trial.state.name, "waiting") for trial in self.keys().values())
        counts["waiting"] = self.total - sum(counts[name] for name in names.values())
        return counts

    def steps(self) -> int:
        """The sum of the training steps of all running trials."""
        beats = (t.user_attrs.get("beat") for t in self.keys().values() if t.state == self.states.RUNNING)
        return sum(beat[1] for beat in beats if beat)

    def finished(self) -> bool:
        """Whether every trial has ended."""
        counts = self.counts()
        return counts["done"] + counts["failed"] + counts["pruned"] >= self.total

    def claim(self) -> Lease | None:
        """Take a trial to work on; None when every trial has ended or belongs to another worker."""
        while True:
            self._give_up_lost()
            self._enqueue()
            left = sum(trial.state == self.states.WAITING for trial in self.trials())
            if not left and not (self.plan.study.search and len(self._searched()) < self.total):
                return None
            trial = self.study.ask()
            if self.plan.study.search:
                _suggest_changes(self.plan.study, self.study, trial)
                if "key" not in trial.user_attrs:
                    trial.set_user_attr("key", f"t{trial.number:04d}")
            key: str = trial.user_attrs.get("key", "")
            surplus = not key or (self.plan.study.search and key not in self._searched()[: self.total])
            if not surplus and self.keys()[key].number == trial.number:
                self._own = Lease(key, trial, losses=self._losses(key))
                return self._own
            trial.set_user_attr(OUTCOME, "surplus")
            self.study.tell(trial, state=self.states.FAIL)

    def _searched(self) -> list[str]:
        """The keys of the search's trials so far, in order."""
        attributes = [trial.user_attrs for trial in self.trials() if trial.user_attrs.get(OUTCOME) != "surplus"]
        return sorted({each["key"] for each in attributes if "key" in each})

    def _enqueue(self) -> None:
        """Enqueue every trial without a live try: at the start all trials, later the lost trials."""
        live = self.keys()
        if not self.plan.study.search:
            for trial in self.plan.trials:
                if trial.key not in live:
                    self.study.enqueue_trial({"arm": trial.arm, "seed": trial.seed}, user_attrs={"key": trial.key})
            return
        for lost in self.trials():
            key = lost.user_attrs.get("key")
            if key and key not in live and lost.user_attrs.get(OUTCOME) != "surplus":
                self.study.enqueue_trial(lost.params, user_attrs={"key": key})
                live[key] = lost

    def _losses(self, key: str) -> int:
        """The number of workers that were lost with the trial since its last checkpoint."""
        tries = [t for t in self.trials() if t.user_attrs.get("key") == key and not self._live(t)]
        saved = [t.user_attrs["beat"][2] for t in tries if "beat" in t.user_attrs and OUTCOME not in t.user_attrs]
        return saved.count(max(saved)) if saved else 0

    def _give_up_lost(self) -> None:
        """Mark trials as failed if their beat has not changed for a lease, unless another observer has done so."""
        trials, now = self.trials(), time.monotonic()
        if self._outages != self.storage.outages:  # during an outage no beat arrives
            self._outages = self.storage.outages
            self._seen.clear()
        for trial in trials:
            if trial.state != self.states.RUNNING or (self._own and self._own.trial.number == trial.number):
                self._seen.pop(trial.number, None)
                continue
            beat = trial.user_attrs.get("beat")
            before, since = self._seen.get(trial.number, (None, now))
            self._seen[trial.number] = (beat, now if beat != before else since)
            if beat == before and now - since > self.lease:
                self._end(trial.number, self.states.FAIL)

    @contextmanager
    def keep(self, lease: Lease) -> Iterator[None]:
        """Within a `with` block, renew the trial's beat in a thread, and give up trials of lost workers.

        If the trial has not ended when the block ends, the trial is given back for the next worker.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._beats, args=(lease, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._own = None
            with suppress(*self.errors, StorageAwayError), self.storage.at_once():
                # an error is harmless: the trial has ended, or its lease will expire
                lease.trial.set_user_attr(OUTCOME, "given back")
                self._end(lease.trial.number, self.states.FAIL)

    def _beats(self, lease: Lease, done: threading.Event) -> None:
        number, answered = 0, time.monotonic()
        while not lease.lost.is_set():
            try:
                with self.storage.at_once():  # a waiting thread could not be stopped
                    lease.trial.set_user_attr("beat", [number, lease.step, lease.saved])
                    self._give_up_lost()
                number, answered = number + 1, time.monotonic()
            except self.errors:
                lease.lost.set()
            except Exception:  # the database does not answer
                if time.monotonic() - answered > self.lease:
                    lease.lost.set()
            if done.wait(self.lease / BEATS):
                return

    def _end(self, number: int, state: Any, value: float | None = None) -> bool:
        """Record how a trial ended. Returns False if a different end was recorded before."""
        try:
            self.study.tell(number, value, state)
        except self.errors:
            ended = self.trials()[number]  # a first call may have recorded this end before the connection broke
            return ended.state == state and (state != self.states.FAIL or ended.user_attrs.get(OUTCOME) == "failed")
        return True

    def report(self, lease: Lease, value: float, step: int) -> bool:
        """Record a held-out error during training; returns whether the pruner stops the trial.

        A non-finite error is not recorded: the run continues, or it ends as diverged.
        """
        if not math.isfinite(value):
            return False
        try:
            lease.trial.report(value, step)
        except self.errors:
            raise LeaseLostError(lease.key) from None
        return self.plan.study.prune and lease.trial.should_prune()

    def done(self, lease: Lease, state: str, value: float | None) -> None:
        """Record the result: `done` (with the primary metric's value), `pruned` or `failed`.

        Raises:
            LeaseLostError: another worker took the trial earlier.
        """
        if state == "failed":
            try:
                lease.trial.set_user_attr(OUTCOME, "failed")
            except self.errors:
                raise LeaseLostError(lease.key) from None
        ends = {"done": self.states.COMPLETE, "pruned": self.states.PRUNED, "failed": self.states.FAIL}
        if not self._end(lease.trial.number, ends[state], value if state == "done" else None):
            raise LeaseLostError(lease.key)


def _suggest_changes(study: StudyConfig, trials: optuna.Study, trial: optuna.Trial) -> None:
    """Let Optuna's TPE sampler (Bergstra et al., 2011) choose a trial's keys; choices of an earlier try are kept.

    The trial's number seeds the sampler. If a sampler kept its state instead, it would make the same choices in every
    worker, and would repeat its choices when the study is resumed.
    """
    from optuna.samplers import TPESampler

    trials.sampler = TPESampler(seed=(study.seeds[0] + trial.number) % 2**32, constant_liar=True)
    for name, values in study.search.items():
        if isinstance(values, list):
            trial.suggest_categorical(name, values)
            continue
        spacing = {option: values[option] for option in ("step", "log") if option in values}
        whole = isinstance(values["low"], int) and isinstance(values["high"], int)
        suggest = trial.suggest_int if whole else trial.suggest_float
        suggest(name, values["low"], values["high"], **spacing)
