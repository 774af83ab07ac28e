"""Worker processes that are killed at any moment still give the table of a serial run, with both kinds of storage."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import to_dict
from dit_in_dit.runs import checkpoint
from dit_in_dit.study.plan import Plan, StudyConfig
from dit_in_dit.study.planning import open_plan, plan_study
from dit_in_dit.study.queue import OUTCOME, Queue
from dit_in_dit.study.result import Result
from dit_in_dit.study.worker import run_trials
from postgres import Server

CPU = torch.device("cpu")
LEASE = 3.0
STEPS = 120
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    """Plan without long measurements of step times, which these studies do not need."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("arms", "match"):
            patch.setattr(f"dit_in_dit.study.{module}.SECONDS_EACH", 0.01)
        yield


@pytest.fixture(scope="module")
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, folder: Path) -> StudyConfig:
    """A study of four arms with one seed (two with --full): trials of some seconds, each with ten checkpoints."""
    from conftest import small_model
    from dit_in_dit.config.run import DataConfig, SampleConfig
    from dit_in_dit.config.training import TrainConfig

    config = RunConfig(
        model=small_model("outer*2 inner*2", image_size=(8, 8), num_classes=3),
        data=DataConfig(source=str(folder), held_out=0.2),
        train=TrainConfig(steps=STEPS, batch_size=16, learning_rate=1e-3, precision="float32", checkpoint_every=12),
        sample=SampleConfig(steps=3),
    )
    base = tmp_path_factory.mktemp("study") / "base.yaml"
    base.write_text(to_yaml(config))
    arms = {"one": {}, "two": {"model.inner.mixer": "none"}, "three": {"model.use_inner": False}}
    arms["four"] = {"train.learning_rate": 3e-3}
    values = {
        "base": str(base),
        "arms": arms,
        "match": "none",
        "samples": 4,
        "budget": {"steps": STEPS},
        "seeds": [0, 1] if request.config.getoption("--full") else [1],
    }
    return StudyConfig.from_dict(values)


def planned(study: StudyConfig, out: Path) -> Plan:
    out.mkdir(parents=True)
    return open_plan(out, lambda: plan_study("killed", study, CPU))


def table(out: Path) -> dict[str, Result]:
    return {path.parent.name: Result.from_json(path.read_text()) for path in sorted(out.glob("runs/*/result.json"))}


@pytest.fixture(scope="module")
def serial(study: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The results of a study that one undisturbed worker has done."""
    out = tmp_path_factory.mktemp("serial") / "study"
    plan = planned(study, out)
    list(run_trials(plan, out, Queue(plan, out), CPU))
    found = table(out)
    assert len(found) == 4 * len(study.seeds)
    return found


def start(out: Path, number: int, url: str | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dit_in_dit", "study", "work", str(out), "--lease", str(LEASE), "--device", "cpu"]
    command += ["--storage", url] if url else []
    with (out / f"worker{number}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def halfway(out: Path, alive: dict[int, subprocess.Popen[bytes]], spared: Container[str]) -> tuple[int, str] | None:
    """A worker that is some checkpoints into the training of a trial, and the trial's name."""
    numbers = {worker.pid: number for number, worker in alive.items()}
    for lock in out.glob("runs/*/lock"):
        key, owner = lock.parent.name, re.match(r"process (\d+)", lock.read_text())
        number = numbers.get(int(owner[1])) if owner else None
        if number is not None and key not in spared and 0 < saved(lock.parent) < STEPS:
            return number, key
    return None


def saved(run: Path) -> int:
    """The step from which a run would be resumed."""
    return checkpoint.newest(run).manifest["step"] if checkpoint.has_any(run) else 0


def kill_while_they_work(
    plan: Plan, out: Path, workers: int, url: str | None, kills: int
) -> tuple[Queue, dict[str, int]]:
    """Let workers do a study. Kill some workers, each in the middle of a different trial, and replace each of them.

    Returns the queue, and the last saved step of each trial whose worker was killed.
    """
    queue = Queue(plan, out, url)
    alive = {number: start(out, number, url) for number in range(workers)}
    left: dict[str, int] = {}
    number = workers
    try:
        while not queue.finished():
            time.sleep(0.05)
            found = halfway(out, alive, left) if len(left) < kills else None
            if found:
                victim, key = found
                alive[victim].send_signal(signal.SIGKILL)
                alive.pop(victim).wait()
                if (step := saved(out / "runs" / key)) < STEPS:
                    left[key] = step
                alive[number], number = start(out, number, url), number + 1
            for name, worker in list(alive.items()):  # one that ended by itself may have found nothing left to do
                assert worker.poll() in (None, 0), (out / f"worker{name}.log").read_text()
        for worker in alive.values():
            assert worker.wait(60) == 0
    finally:
        for worker in alive.values():
            worker.kill()
    assert len(left) == kills, "the study ended before all were killed: make its trials longer"
    return queue, left


def check(queue: Queue, out: Path, serial: dict[str, Result], left: dict[str, int]) -> None:
    """Check that every trial was done once, that lost trials resumed from their saved step, and that the table equals
    the serial run's table."""
    assert table(out) == serial
    tries = queue.trials()
    done = Counter(trial.user_attrs["key"] for trial in tries if trial.state.name == "COMPLETE")
    assert done == Counter(serial.keys())
    values = {trial.user_attrs["key"]: trial.value for trial in tries if trial.state.name == "COMPLETE"}
    assert values == {key: result.metrics["held_out.0.2.high"] for key, result in serial.items()}
    lost = {t.user_attrs["key"] for t in tries if t.state.name == "FAIL" and t.user_attrs.get(OUTCOME) is None}
    assert set(left) <= lost
    said = "".join(path.read_text() for path in out.glob("worker*.log"))
    for key, step in left.items():
        assert f"{key}: continued from step {step}\n" in said, (key, step)


def test_no_trial_is_lost_or_done_twice_when_workers_are_killed(study, serial, tmp_path):
    plan = planned(study, tmp_path / "study")
    queue, left = kill_while_they_work(plan, tmp_path / "study", 2, None, 1 + len(study.seeds))
    check(queue, tmp_path / "study", serial, left)


# ------------------------------------------------------------------------------------------- PostgreSQL


PASSWORD = "p@ss:w/o%rd"
WRITTEN = "p%40ss%3Aw%2Fo%25rd"  # in a URL


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A database server, and its password."""
    started = Server(PASSWORD)
    try:
        started.start()
        yield started
    finally:
        started.remove()


def test_no_trial_in_a_database_is_lost_or_done_twice_when_workers_are_killed(study, serial, tmp_path, server, full):
    if not full:
        pytest.skip("with --full: above, the same with a journal; below, a database that is away")
    plan = planned(study, tmp_path / "study")
    url = server.url(WRITTEN, server.create("killed"))
    queue, left = kill_while_they_work(plan, tmp_path / "study", 2, url, len(study.seeds))
    check(queue, tmp_path / "study", serial, left)
    assert not (tmp_path / "study" / "journal.log").exists()


def command_lines() -> str:
    """The command lines of all processes, as `ps` shows them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_text(errors="replace").replace("\0", " "))
    return "\n".join(found)


@pytest.mark.full
def test_a_short_outage_stops_no_worker_and_the_password_appears_nowhere(study, serial, tmp_path, server):
    out = tmp_path / "out"
    planned(study, out)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(to_dict(study)))
    command = [sys.executable, "-m", "dit_in_dit", "study", "run", str(tmp_path / "mine.yaml"), "--out", str(out)]
    command += ["--workers", "2", "--device", "cpu", "--lease", "20"]
    environment = {**os.environ, "DIT_IN_DIT_STORAGE": server.url(WRITTEN)}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    shown = ""
    try:
        while not len(list(out.glob("runs/*/checkpoints/*"))) > 1:
            assert run.poll() is None, run.communicate()
            time.sleep(0.1)
        server.stop()
        shown = command_lines()
        time.sleep(4)
        server.start()
        said, errors = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 0, errors
    assert table(out) == serial
    assert "study work" in shown
    away = f"the storage postgresql+psycopg://study:***@127.0.0.1:{server.port}/postgres"
    logs = [path.read_text() for path in out.glob("workers/*.log")]
    for text in (errors, *logs):
        assert text.count(f"{away} does not answer (") == text.count(f"{away} answers again, after ") == 1, text
    written = [path.read_bytes().decode(errors="replace") for path in out.rglob("*") if path.is_file()]
    for text in (said, errors, shown, *written):
        assert not re.search(f"{re.escape(PASSWORD)}|{WRITTEN}", text)


@pytest.mark.parametrize(
    ("password", "database", "reason"),
    [("no%40ne", "postgres", "password authentication failed"), (WRITTEN, "none", 'database "none" does not exist')],
)
def test_a_database_that_refuses_gives_an_immediate_one_line_error(study, tmp_path, server, password, database, reason):
    plan, began = planned(study, tmp_path / "study"), time.monotonic()
    with pytest.raises(UserError, match=f"cannot open --storage postgresql.*study:\\*\\*\\*@.*{reason}") as found:
        Queue(plan, tmp_path / "study", server.url(password, database))
    assert time.monotonic() - began < 5
    assert not re.search(r"no@ne|no%40ne|p@ss|p%40ss", str(found.value))


# ---------------------------------------------------------------------------------------------- --workers


def test_the_command_starts_workers_and_reports(study, serial, tmp_path, capsys):
    from dit_in_dit.cli import main

    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(to_dict(study)))
    out = tmp_path / "out"
    main(["study", "run", str(tmp_path / "mine.yaml"), "--out", str(out), "--workers", "2", "--device", "cpu"])
    assert table(out) == serial
    assert (out / "report.html").exists()
    assert f"{len(serial)} done" in capsys.readouterr().err
    main(["study", "status", str(out)])
    assert f"{len(serial)} done" in capsys.readouterr().out
