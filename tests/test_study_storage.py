"""Outages of a storage, and the passwords in its URL."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import IntegrityError, OperationalError, PendingRollbackError

from conftest import only_full, with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.study.queue import Queue
from dit_in_dit.study.storage import Storage, StorageAwayError, _reason, masked_url, parse_url
from dit_in_dit.study.worker import run_trials
from test_study import planned, results, small

CPU = torch.device("cpu")


@pytest.fixture
def base(run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file of a config that trains a few steps on the small image folder; step times are not measured."""
    monkeypatch.setattr("dit_in_dit.study.arms._times", lambda *_: {})
    path = tmp_path / "base.yaml"
    path.write_text(to_yaml(with_train(run_config, steps=8)))
    return str(path)


def away() -> OperationalError:
    return OperationalError("select 1", {}, ConnectionRefusedError("connection refused"))


class Flaky:
    """A storage whose first `fails` calls fail. With `after`, a call is carried out before it fails."""

    def __init__(self, storage: Any, fails: int, *, after: bool = False) -> None:
        self.storage, self.fails, self.after, self.calls = storage, fails, after, 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            failing, self.fails = self.fails > 0, self.fails - 1
            if failing and not self.after:
                raise away()
            found = getattr(self.storage, name)(*args, **kwargs)
            if failing:
                raise away()
            return found

        return call


class Answers:
    """A storage that always answers."""

    def get(self, value: int) -> int:
        return value

    def refuse(self) -> None:
        raise IntegrityError("insert", {}, ValueError("twice"))


def storage(fails: int, lease: float = 5.0) -> tuple[Storage, Flaky, list[str]]:
    lines: list[str] = []
    flaky = Flaky(Answers(), fails)
    return Storage(flaky, "the storage here", str, lease, lines.append), flaky, lines


# -------------------------------------------------------------------------------------------- patience


def test_a_call_waits_for_a_silent_storage_and_reports_its_outage_and_return():
    waiting, flaky, lines = storage(fails=4)
    assert waiting.get(3) == 3
    assert flaky.calls == 5
    assert [re.sub(r"[\d.]+ s", "T", line) for line in lines] == [
        f"the storage here does not answer ({away()}): waiting up to T",
        "the storage here answers again, after T",
    ]
    assert waiting.outages == 1


def test_an_outage_as_long_as_the_lease_ends_this_call_and_later_calls():
    waiting, flaky, lines = storage(fails=1000, lease=1.0)
    began = time.monotonic()
    with pytest.raises(
        StorageAwayError, match=r"(?s)the storage here has not answered for 1 s \(.*\): run the same command"
    ):
        waiting.get(3)
    assert 1.0 < time.monotonic() - began < 4.0
    calls = flaky.calls
    with pytest.raises(StorageAwayError):
        waiting.get(3)
    assert flaky.calls == calls + 1
    assert len(lines) == 1


def test_a_call_that_must_not_wait_fails_immediately():
    waiting, flaky, _ = storage(fails=1)
    with pytest.raises(StorageAwayError), waiting.at_once():
        waiting.get(3)
    assert flaky.calls == 1
    assert waiting.get(3) == 3


def test_a_connection_that_breaks_within_a_query_is_an_outage():
    """Optuna repeats such a query in the broken session, and raises the session's error as an error of Optuna."""

    class Interrupted(Answers):
        calls = 0

        def get(self, value: int) -> int:
            self.calls += 1
            if self.calls == 1:
                raise StorageInternalError("during the commit") from PendingRollbackError("cannot reconnect")
            return value

    waiting = Storage(Interrupted(), "the storage here", str, 5.0, (lines := []).append)
    assert waiting.get(3) == 3
    assert (waiting.outages, len(lines)) == (1, 2)


def test_an_error_other_than_an_outage_is_raised_unchanged():
    waiting, flaky, lines = storage(fails=0)
    with pytest.raises(IntegrityError):
        waiting.refuse()
    assert (flaky.calls, lines) == (1, [])


@pytest.mark.parametrize("after", [only_full(False), True])
def test_a_study_whose_storage_often_fails_ends_with_the_same_results(base, tmp_path, after):
    def done(name: str, every: int) -> dict[str, Any]:
        out, url = tmp_path / name, f"sqlite:///{tmp_path / name}.db"
        plan = planned(small(base), out)
        queue = Queue(plan, out, url, lease=30)
        inner = queue.storage._storage

        draw = random.Random(0)  # not every n-th call: one and the same call of each round would fail for ever

        class EveryFew(Flaky):
            def __getattr__(self, call: str) -> Any:
                self.fails = int(every > 0 and draw.random() < 1 / every)
                return super().__getattr__(call)

        queue.storage._storage = EveryFew(inner, 0, after=after)
        kinds = [event.kind for event in run_trials(plan, out, queue, CPU)]
        assert kinds.count("done") == 2
        assert "lost" not in kinds
        assert queue.counts()["done"] == 2
        return results(out)

    assert done("flaky", 5) == done("steady", 0)


@pytest.mark.parametrize("state", ["done", "failed", "pruned"])
def test_a_result_whose_answer_was_lost_with_the_connection_counts(base, tmp_path, state):
    plan = planned(small(base), tmp_path)
    queue = Queue(plan, tmp_path, f"sqlite:///{tmp_path}/trials.db")
    claim, inner = queue.claim(), queue.storage._storage
    real, asked = inner.set_trial_state_values, []

    def loses_the_answer(*args: Any, **kwargs: Any) -> bool:
        asked.append(args)
        found = real(*args, **kwargs)
        if len(asked) == 1:
            raise away()
        return found

    inner.set_trial_state_values = loses_the_answer
    queue.done(claim, state, 1.0)
    assert len(asked) == 2
    assert queue.counts()[state] == 1


def test_a_storage_outage_does_not_mark_workers_as_lost(base, tmp_path):
    plan, url = planned(small(base), tmp_path), f"sqlite:///{tmp_path}/trials.db"
    worker, other = Queue(plan, tmp_path, url, lease=1), Queue(plan, tmp_path, url, lease=1)
    worker.claim().trial.set_user_attr("beat", [0, 0, 0])
    other._give_up_lost()
    other.storage._storage = Flaky(other.storage._storage, 10_000)  # and nobody's beat arrives either
    for _ in range(4):
        with pytest.raises(StorageAwayError), other.storage.at_once():
            other._give_up_lost()
        time.sleep(0.4)
    other.storage._storage.fails = 0
    other._give_up_lost()
    assert other.counts()["running"] == 1
    time.sleep(1.1)
    other._give_up_lost()
    assert other.counts()["running"] == 0  # it has given no sign since


def test_a_lasting_outage_ends_the_command_with_a_one_line_error(base, tmp_path, monkeypatch, capsys):
    planned(small(base), tmp_path / "study")
    real = Queue.claim

    def claim(queue: Queue) -> Any:
        if not isinstance(queue.storage._storage, Flaky):
            queue.storage._storage = Flaky(queue.storage._storage, 10_000)
        return real(queue)

    monkeypatch.setattr(Queue, "claim", claim)
    url = f"sqlite:///{tmp_path}/trials.db"
    with pytest.raises(SystemExit) as ended:
        main(["study", "work", str(tmp_path / "study"), "--storage", url, "--lease", "1", "--device", "cpu"])
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit-in-dit:")]
    assert len(lines) == 1
    assert "has not answered for 1 s" in lines[0]


# -------------------------------------------------------------------------------------------- passwords


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://me:secret@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("postgresql://me:s%40e%3Ac%2Fr%25et@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se:cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se/cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:100%secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://:secret@host/db", "postgresql://:***@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql://host/db", "postgresql://host/db"),
        ("postgresql:///db?host=/run&user=me&password=secret", "postgresql:///db"),
        ("mssql+pyodbc://?odbc_connect=DRIVER%3Dx%3BPWD%3Dsecret", "mssql+pyodbc://"),
        ("sqlite:///trials.db", "sqlite:///trials.db"),
        ("sqlite:////home/me@work/trials.db", "sqlite:////home/me%40work/trials.db"),
    ],
)
def test_a_url_is_shown_without_its_password(url, shown):
    assert masked_url(parse_url(url)) == shown


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:sec@ret@host/db",
        "postgresql://me:s@ec/ret@host/db",
        "postgresql://m/e:secret@host/db",
        "postgresql://host:secret",
        "postgresql:/me:secret@host/db",
        "secret",
        "://me:secret@host",
    ],
)
def test_the_error_for_an_ambiguous_url_does_not_show_the_url(base, tmp_path, url):
    plan = planned(small(base), tmp_path)
    with pytest.raises(UserError, match=r"cannot open --storage: .*; write it as postgresql\+psycopg://") as found:
        Queue(plan, tmp_path, url)
    assert not re.search("sec|ret", str(found.value).replace("--storage", ""))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:se%40cret@host/db", "no se@cret, no se%40cret\nat all"),
        ("postgresql://me:se+cret@host/db", "no se+cret, no se%2Bcret"),
        ("postgresql://host/db?sslpassword=se%20cret", "no se cret, no se%20cret, no se+cret"),
        ("postgresql://host/db?password=secret&password=cretse", "no secret, no cretse"),
    ],
)
def test_a_drivers_message_is_shown_without_the_password(url, said):
    shown = _reason(ValueError(said), parse_url(url))
    assert shown == re.sub(r"no [^,]*(, |$)", r"no ***\1", said.splitlines()[0])


def test_the_command_line_error_does_not_show_the_password(capsys):
    with pytest.raises(SystemExit):
        main(["study", "report", "here", "--storage", "postgresql://me:sec@ret@host/db?sslpassword=secret&x=1"])
    assert "--storage postgresql://me:***@host/db?sslpassword=***&x=1" in capsys.readouterr().err


def test_an_environment_variable_can_name_the_storage(base, tmp_path, monkeypatch, capsys):
    planned(small(base), tmp_path / "study")
    monkeypatch.setenv("DIT_IN_DIT_STORAGE", f"sqlite:///{tmp_path}/trials.db")
    main(["study", "status", str(tmp_path / "study")])
    assert (tmp_path / "trials.db").exists()
    assert not (tmp_path / "study" / "journal.log").exists()


def test_an_empty_environment_variable_names_no_storage(base, tmp_path, monkeypatch):
    planned(small(base), tmp_path / "study")
    monkeypatch.setenv("DIT_IN_DIT_STORAGE", "")
    main(["study", "status", str(tmp_path / "study")])
    assert (tmp_path / "study" / "journal.log").exists()
