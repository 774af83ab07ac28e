"""A run killed 150 times, at numbered points inside the save and at random moments, ends like an uninterrupted run.

A process that has everything imported (this file, run as a program) forks a child for each life. The child continues
the training, and is killed. Points inside the save are its calls to the system, counted by Python's profiler.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from calls import is_of_the_system

from dit_in_dit.config.files import from_yaml, to_yaml
from dit_in_dit.config.run import DataConfig, RunConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.runs import checkpoint
from dit_in_dit.training.loop import train

MOST_SECONDS = 300.0  # of a life


@dataclass(frozen=True)
class Plan:
    """How a life ends: at a call inside its first or a later save, some seconds after its birth, or without a kill."""

    run: str
    config: str
    save: int = 0
    call: int | None = None
    seconds: float | None = None


# ------------------------------------------------------------------------------------------ the forking process


def serve() -> None:
    """Run the plans that come line by line, and report the output of each life."""
    torch.set_num_threads(1)  # a thread started before a fork would be missing after it
    for line in sys.stdin:
        plan = Plan(**json.loads(line))
        warm_up(plan.config)
        print(json.dumps(live(plan)), flush=True)


@cache
def warm_up(config: str) -> None:
    """Begin a run as every life does, so that Python's imports are done before the first life."""
    with TemporaryDirectory() as place, closing(train(from_yaml(config), place, device="cpu")) as facts:
        next(facts)


def live(plan: Plan) -> list[str]:
    """Fork a life; returns its lines, the last of which says how the life ended."""
    read, write = os.pipe()
    born = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            grow(plan, write)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    said, end = b"", born + (MOST_SECONDS if plan.seconds is None else plan.seconds)
    while select.select([read], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(read, 65536)
        if not part:
            break
        said += part
    else:
        os.kill(child, signal.SIGKILL)
        while part := os.read(read, 65536):
            said += part
    os.close(read)
    _, status = os.waitpid(child, 0)
    return [*said.decode().splitlines(), f"ended {os.waitstatus_to_exitcode(status)}"]


def grow(plan: Plan, pipe: int) -> None:
    """Continue the training, and be killed as planned."""
    save, saves = checkpoint.save, 0

    def say(text: str) -> None:
        os.write(pipe, f"{text}\n".encode())

    def watched(*arguments, **keys) -> Path:
        nonlocal saves
        armed, saves = plan.call is not None and saves >= plan.save, saves + 1
        calls: list[str] = []

        def watch(frame, event: str, function) -> None:
            if event != "c_call" or not is_of_the_system(function):
                return
            if armed and len(calls) == plan.call:
                tear(function, len(calls))
                say(f"killed at {function.__name__}")
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(function.__name__)

        say("save")
        sys.setprofile(watch)
        try:
            return save(*arguments, **keys)
        finally:
            sys.setprofile(None)
            say(f"saved by {' '.join(calls)}")

    checkpoint.save = watched
    run = Path(plan.run)
    for _ in train(from_yaml(plan.config), run, resume=(run / "config.yaml").exists(), device="cpu"):
        pass


def tear(function, number: int) -> None:
    """Leave a half-written file behind: the content that was written so far, cut somewhere every other time."""
    file = getattr(function, "__self__", None)
    if function.__name__ in ("write", "flush") and hasattr(file, "truncate") and file.writable():
        file.flush()
        if number % 2:
            os.ftruncate(file.fileno(), int(file.tell() * random.Random(number).random()))


# ------------------------------------------------------------------------------------------ the test


@contextmanager
def lives() -> Iterator[subprocess.Popen[str]]:
    """The forking process; at the end, the process and all its children are killed."""
    where = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(process: subprocess.Popen[str], plan: Plan) -> list[str]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(asdict(plan)) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def good_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that verify, newest first."""
    found = []
    for folder in (run / "checkpoints").glob("[0-9]*"):
        if folder.suffix != ".part":
            found.append(checkpoint.verify(folder)["step"])  # none that has its name may be damaged
    return sorted(found, reverse=True)


def small(folder: Path, steps: int, save: str) -> RunConfig:
    from conftest import small_model

    how = {
        "learning_rate": 1e-3,
        "ema": 0.9,
        "precision": "float32",
        "sample_every": 0,
        "evaluate_every": 20,
        "save": save,
    }
    return RunConfig(
        model=small_model("outer inner", image_size=(8, 8), num_classes=3),
        data=DataConfig(source=str(folder), held_out=0.2),
        train=TrainConfig(steps=steps, batch_size=2, checkpoint_every=2, **how),
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("save", ["sync", pytest.param("async", marks=pytest.mark.full)])  # test_saving has some
def test_a_repeatedly_killed_run_ends_like_an_uninterrupted_run(folder, tmp_path, full, save):
    inside, anywhere = (100, 50) if full else (4, 3)
    always = {"rename", "unlink", "fsync", "mkdir", "rmdir"} if full else {"rename", "unlink"}
    # So many that no life comes to the end, however fast the machine: only killed lives are counted.
    config = to_yaml(small(folder, 6000 if full else 300, save))
    draw = random.Random(0)
    unbroken, run = tmp_path / "unbroken", tmp_path / "killed"
    killed_at: Counter[str] = Counter()
    hit, progressed = 0, 0
    with lives() as process:
        said = ask(process, Plan(str(unbroken), config))
        assert said[-1] == "ended 0"
        calls = said[-2].removeprefix("saved by ").split()
        plans = [Plan(str(run), config, save=n % 2, call=n * len(calls) // inside) for n in range(inside)]
        named = [number for number, name in enumerate(calls) if name in always]
        plans += [Plan(str(run), config, save=1, call=number) for number in named]  # a first one also clears up
        plans += [Plan(str(run), config, seconds=draw.uniform(0, 0.5 if full else 0.3)) for _ in range(anywhere)]
        draw.shuffle(plans)
        before: list[int] = []
        for plan in plans:
            said = ask(process, plan)
            assert said[-1] == "ended -9", said
            last = said[-2] if len(said) > 1 else ""
            hit += last == "save" or last.startswith("killed at ")
            if plan.call is not None:
                killed_at[last.removeprefix("killed at ")] += 1
            good = good_steps(run)
            assert good[:1] >= before[:1], "the newest checkpoint was lost"
            assert len(good) >= len(before[:2]), "two there were, and one was lost"
            progressed += good[:1] > before[:1]
            before = good
        said = ask(process, Plan(str(run), config))
        assert said[-1] == "ended 0"
    assert hit >= 0.9 * inside
    assert progressed >= 0.5 * inside
    assert always <= set(killed_at)
    assert checkpoint.newest(run).manifest == checkpoint.newest(unbroken).manifest  # SHA-256 of weights, EMA, optimizer
    assert (run / "log.jsonl").read_bytes() == (unbroken / "log.jsonl").read_bytes()
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    print(f"{hit} kills inside a save, {progressed} lives that made progress; {dict(killed_at)}")


if __name__ == "__main__":
    serve()
