"""The trials of a study in a storage that any number of workers share: each is done once, and none is lost.

Optuna keeps the trials: in a journal file for the workers of one machine, or in a database for those of many. A worker
asks for a trial, and while it has one it raises a counter in the storage, its *beat*. A trial whose beat stands still
for the length of a lease, by the clock of whoever looks on, has lost its worker: it is marked as failed, which only one
of those who look on can do, and put up again, to be continued from its last checkpoint.

Two workers may put up the same trial at once. Of all trials of one key the first that is not lost counts; whoever gets
another throws it away.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_in_dit.study.plan import Plan
from dit_in_dit.study.storage import AwayError, open_storage

if TYPE_CHECKING:
    import optuna

LEASE = 60.0  # seconds
BEATS = 4  # in a lease
MOST_LOSSES = 5  # workers that a trial may take with it before it has saved anything further
OUTCOME = "outcome"  # of a try that Optuna calls failed: failed, surplus or given back; none: its worker was lost


class LeaseLostError(Exception):
    """The trial is not this worker's any more."""


@dataclass
class Lease:
    """A trial that this worker has.

    Attributes:
        key: the trial's name, the same for every try.
        losses: workers that it was lost by since it last saved something.
        step, saved: how far it is, and its last checkpoint, for others to see.
    """

    key: str
    trial: optuna.Trial
    losses: int = 0
    step: int = 0
    saved: int = 0
    lost: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """LostError when the trial was given to somebody else, because this worker's beat stood still."""
        if self.lost.is_set():
            raise LeaseLostError(self.key)


class Queue:
    """A study's trials, for one worker or for looking on.

    Args:
        url: SQLAlchemy's, of a database (postgresql+psycopg://...); None: the journal file in `out`.
        lease: seconds after which a trial whose worker gives no sign is given to another, and for which a storage that
            is away is waited for.
        say: gets a line when it is, and when it is back.

    Raises:
        UserError: the storage cannot be opened.
        AwayError: later, from any method, the storage has been away for a lease.
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
        self._seen: dict[int, tuple[Any, float]] = {}  # trial -> its beat, and since when it stands still
        self._outages = 0  # of the storage, when that was noted
        self._mine: Lease | None = None

    # ------------------------------------------------------------------------------------- looking on

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All tries, in the order in which they were put up."""
        return self.study.get_trials(deepcopy=False)

    def _live(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether nobody need take it up: it waits, runs or is finished, and was neither lost nor thrown away."""
        return trial.state != self.states.FAIL or trial.user_attrs.get(OUTCOME) == "failed"

    def keys(self) -> dict[str, optuna.trial.FrozenTrial]:
        """By key the first live try."""
        found: dict[str, optuna.trial.FrozenTrial] = {}
        for trial in self.trials():
            if self._live(trial) and (key := trial.user_attrs.get("key")):
                found.setdefault(key, trial)
        return found

    @property
    def total(self) -> int:
        """How many trials the study has."""
        return self.plan.study.trials if self.plan.study.search else len(self.plan.trials)

    def counts(self) -> Counter[str]:
        """How many trials are done, failed, pruned, running and waiting."""
        names = {"COMPLETE": "done", "FAIL": "failed", "PRUNED": "pruned", "RUNNING": "running"}
        found = Counter(names.get(trial.state.name, "waiting") for trial in self.keys().values())
        found["waiting"] = self.total - sum(found[name] for name in names.values())
        return found

    def steps(self) -> int:
        """Training steps of the trials that run now."""
        beats = (t.user_attrs.get("beat") for t in self.keys().values() if t.state == self.states.RUNNING)
        return sum(beat[1] for beat in beats if beat)

    def finished(self) -> bool:
        """Whether no trial is left."""
        counts = self.counts()
        return counts["done"] + counts["failed"] + counts["pruned"] >= self.total

    # ---------------------------------------------------------------------------------------- claiming

    def claim(self) -> Lease | None:
        """A trial to work on; None when all are done or in other hands."""
        while True:
            self._give_up_lost()
            self._put_up()
            left = sum(trial.state == self.states.WAITING for trial in self.trials())
            if not left and not (self.plan.study.search and len(self._searched()) < self.total):
                return None
            trial = self.study.ask()
            self._suggest(trial)
            key = trial.user_attrs.get("key")
            if key is not None and self._is_first(key, trial.number):
                self._mine = Lease(key, trial, losses=self._losses(key))
                return self._mine
            trial.set_user_attr(OUTCOME, "surplus")
            self.study.tell(trial, state=self.states.FAIL)

    def _suggest(self, trial: optuna.Trial) -> None:
        """Of a search: let the sampler choose, or what was chosen before, and name a new trial.

        The sampler is seeded by the trial's number: one that lives on would choose alike in every worker, and again
        what it chose before whenever the study goes on.
        """
        from optuna.samplers import TPESampler

        self.study.sampler = TPESampler(seed=(self.plan.study.seeds[0] + trial.number) % 2**32, constant_liar=True)
        for name, values in self.plan.study.search.items():
            if isinstance(values, list):
                trial.suggest_categorical(name, values)
            elif all(isinstance(values[end], int) for end in ("low", "high")):
                trial.suggest_int(name, values["low"], values["high"], **_spacing(values))
            else:
                trial.suggest_float(name, values["low"], values["high"], **_spacing(values))
        if self.plan.study.search and "key" not in trial.user_attrs:
            trial.set_user_attr("key", f"t{trial.number:04d}")

    def _is_first(self, key: str, number: int) -> bool:
        """Whether this try of a key counts, and the key is one of the study's."""
        if self.plan.study.search and key not in self._searched()[: self.total]:
            return False
        return self.keys()[key].number == number

    def _searched(self) -> list[str]:
        """Keys that a search has chosen for, in order."""
        kept = (trial.user_attrs for trial in self.trials() if trial.user_attrs.get(OUTCOME) != "surplus")
        return sorted({attributes["key"] for attributes in kept if "key" in attributes})

    def _put_up(self) -> None:
        """Put up what nobody has: all trials at the start, later those that were lost."""
        there = self.keys()
        if not self.plan.study.search:
            for trial in self.plan.trials:
                if trial.key not in there:
                    self.study.enqueue_trial({"arm": trial.arm, "seed": trial.seed}, user_attrs={"key": trial.key})
            return
        for lost in self.trials():
            key = lost.user_attrs.get("key")
            if key and key not in there and lost.user_attrs.get(OUTCOME) != "surplus":
                self.study.enqueue_trial(lost.params, user_attrs={"key": key})
                there[key] = lost

    def _losses(self, key: str) -> int:
        """Workers lost since the trial last saved something."""
        tries = [t for t in self.trials() if t.user_attrs.get("key") == key and not self._live(t)]
        saved = [t.user_attrs["beat"][2] for t in tries if "beat" in t.user_attrs and OUTCOME not in t.user_attrs]
        return saved.count(max(saved)) if saved else 0

    def _give_up_lost(self) -> None:
        """Mark trials whose beat has stood still for a lease as failed, as the first of those who look on."""
        trials, now = self.trials(), time.monotonic()
        if self._outages != self.storage.outages:  # no beat could be heard meanwhile
            self._outages = self.storage.outages
            self._seen.clear()
        for trial in trials:
            if trial.state != self.states.RUNNING or (self._mine and self._mine.trial.number == trial.number):
                self._seen.pop(trial.number, None)
                continue
            beat = trial.user_attrs.get("beat")
            before, since = self._seen.get(trial.number, (None, now))
            self._seen[trial.number] = (beat, now if beat != before else since)
            if beat == before and now - since > self.lease:
                self._end(trial.number, self.states.FAIL)

    # ------------------------------------------------------------------------------------------ holding

    @contextmanager
    def keep(self, claim: Lease) -> Iterator[None]:
        """Give signs of life while the trial is worked on, and look after the others' meanwhile.

        A trial that was not told when this is left is given back, for the next who asks.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._beats, args=(claim, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._mine = None
            self._give_back(claim)

    def _beats(self, claim: Lease, done: threading.Event) -> None:
        number, heard = 0, time.monotonic()
        while not claim.lost.is_set():
            try:
                with self.storage.at_once():  # a thread that waits could not be ended
                    claim.trial.set_user_attr("beat", [number, claim.step, claim.saved])
                    self._give_up_lost()
                number, heard = number + 1, time.monotonic()
            except self.errors:
                claim.lost.set()
            except Exception:  # a database that is away for a while
                if time.monotonic() - heard > self.lease:
                    claim.lost.set()
            if done.wait(self.lease / BEATS):
                return

    def _give_back(self, claim: Lease) -> None:
        try:
            with self.storage.at_once():
                claim.trial.set_user_attr(OUTCOME, "given back")
                self._end(claim.trial.number, self.states.FAIL)
        except (*self.errors, AwayError):  # it has ended; or a lease will end it
            return

    def _end(self, number: int, state: Any, value: float | None = None) -> bool:
        """Tell how a trial ended; False when it had ended otherwise."""
        try:
            self.study.tell(number, value, state)
        except self.errors:
            ended = self.trials()[number]  # so, where the answer to the first call was lost with the connection
            return ended.state == state and (state != self.states.FAIL or ended.user_attrs.get(OUTCOME) == "failed")
        return True

    def report(self, claim: Lease, value: float, step: int) -> bool:
        """Tell an error on the way; whether the trial should stop there. One that is not finite is not compared: its
        run goes on, or ends as a diverged one."""
        if not math.isfinite(value):
            return False
        try:
            claim.trial.report(value, step)
        except self.errors:
            raise LeaseLostError(claim.key) from None
        return self.plan.study.prune and claim.trial.should_prune()

    def done(self, claim: Lease, state: str, value: float | None) -> None:
        """Tell the result: done with the primary metric's value, pruned or failed.

        Raises:
            LostError: the trial was given to somebody else before.
        """
        try:
            if state == "failed":
                claim.trial.set_user_attr(OUTCOME, "failed")
        except self.errors:
            raise LeaseLostError(claim.key) from None
        ends = {"done": self.states.COMPLETE, "pruned": self.states.PRUNED, "failed": self.states.FAIL}
        if not self._end(claim.trial.number, ends[state], value if state == "done" else None):
            raise LeaseLostError(claim.key)


def _spacing(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in ("step", "log") if name in values}
