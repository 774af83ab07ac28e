"""After SIGTERM or SIGINT the step ends and the run is saved. It resumes as if it had not been interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import with_train
from dit_in_dit.cli import main
from dit_in_dit.config.files import to_yaml
from dit_in_dit.runs import checkpoint
from dit_in_dit.training.interrupt import Interrupted, StopRequest
from dit_in_dit.training.loop import train

# Trains as the command does, prints the moment and waits there: a step, a save, a picture, the first step, data.
DRIVER = """
import os, sys, time
from pathlib import Path
moment, told, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])

def slow(owner, name, when=lambda count: True):
    plain, count = getattr(owner, name), 0
    def slowly(*arguments, **keys):
        nonlocal count
        count += 1
        if when(count) and not told.exists():
            told.write_text(str(os.getpid()))
            deadline = time.monotonic() + seconds  # a sleep that a signal would end is no work
            while time.monotonic() < deadline:
                time.sleep(0.01)
        return plain(*arguments, **keys)
    setattr(owner, name, slowly)

from dit_in_dit.runs import checkpoint, integrity as sealed
from dit_in_dit.sampling import numbered as sampling
from dit_in_dit.data.formats.images import ImageSource
from dit_in_dit.training.trainer import Trainer
{
    "step": lambda: slow(Trainer, "gradient_norms", lambda count: count == 5),
    "first step": lambda: slow(Trainer, "gradient_norms"),
    "save": lambda: slow(sealed, "sync", lambda count: count == 3),
    "sampling": lambda: slow(sampling, "denoise"),
    "data": lambda: slow(ImageSource, "train", lambda count: count == 20),
}[moment]()
from dit_in_dit.cli import main
main(sys.argv[4:])
"""
MOMENTS = ["step", "first step", "save", "sampling", "data"]
LONG = {"sampling", "data"}  # waits that a signal cuts short: they would last a minute


@pytest.fixture
def config(run_config):
    return with_train(run_config, steps=12, checkpoint_every=4, sample_every=4, evaluate_every=4)


@pytest.fixture
def unbroken(config, tmp_path):
    """Hashes of a run's last checkpoint, and its log lines and pictures."""
    for workers in (0, 2):
        (tmp_path / f"{workers}.yaml").write_text(to_yaml(with_workers(config, workers)))
    out = tmp_path / "unbroken"
    main(arguments(tmp_path, out, 0))
    return outcome(out)


def with_workers(config, workers):
    return replace(config, data=replace(config.data, workers=workers))


def arguments(folder: Path, out: Path, workers: int) -> list[str]:
    return ["train", "--config", str(folder / f"{workers}.yaml"), "--out", str(out), "--device", "cpu"]


def outcome(out: Path) -> tuple:
    saved = checkpoint.newest(out)
    folder, manifest = saved.folder, saved.manifest
    checkpoint.verify(folder)
    pictures = {path.name: path.read_bytes() for path in (out / "samples").glob("*.png")}
    return manifest["step"], manifest["sha256"], (out / "log.jsonl").read_bytes(), pictures


def start(folder: Path, out: Path, workers: int, moment: str) -> tuple[subprocess.Popen, Path]:
    told, seconds = folder / f"{out.name}.told", "60" if moment in LONG else "1"
    what = [sys.executable, "-c", DRIVER, moment, str(told), seconds, *arguments(folder, out, workers)]
    job = subprocess.Popen(what, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 90
    while not told.exists():
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return job, told


def finish(job: subprocess.Popen) -> tuple[float, str]:
    """Seconds until the process ended, and its output."""
    began = time.monotonic()
    try:
        _, said = job.communicate(timeout=30)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    return time.monotonic() - began, said


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_the_step_and_the_run_resumes_exactly(tmp_path, unbroken, full):
    cases = [(moment, workers) for moment in MOMENTS for workers in (0, 2)] if full else [("sampling", 0), ("data", 2)]
    for moment, workers in cases:
        out = tmp_path / f"{moment}-{workers}".replace(" ", "-")
        job, _ = start(tmp_path, out, workers, moment)
        os.killpg(job.pid, signal.SIGTERM)
        took, said = finish(job)
        assert job.returncode == 143, (moment, workers, said)
        assert took < 10, (moment, workers)
        assert "Traceback" not in said, said
        assert "continue it with --resume" in said
        reached = checkpoint.newest(out).manifest["step"]
        assert reached == {"step": 5, "first step": 1, "save": 4, "sampling": 4}.get(moment, reached) > 0
        main(["train", "--out", str(out), "--resume", "--device", "cpu"])
        assert no_process_left(job.pid)
        step, _, lines, pictures = outcome(out)
        if workers == 0:  # the number of workers is a key of the config, whose hash is only in the manifest
            assert outcome(out) == unbroken, moment
        assert (step, lines, pictures) == (unbroken[0], unbroken[2], unbroken[3]), (moment, workers)


def no_process_left(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


MISTAKEN = """
from dit_in_dit.config.errors import UserError
from dit_in_dit.data.formats.images import ImageSource
plain = ImageSource.train
def train(self, index):
    if index == 3:
        raise UserError("image 3 is torn: fix it")
    return plain(self, index)
ImageSource.train = train
import sys
from dit_in_dit.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_user_error_in_a_worker_ends_the_process_and_its_workers(tmp_path, config):
    """Python ends its children with SIGTERM, which workers ignore."""
    (tmp_path / "2.yaml").write_text(to_yaml(with_workers(config, 2)))
    what = [sys.executable, "-c", MISTAKEN, *arguments(tmp_path, tmp_path / "run", 2)]
    job = subprocess.Popen(what, stderr=subprocess.PIPE, text=True, start_new_session=True)
    _, said = finish(job)
    assert job.returncode == 2
    assert said.strip().splitlines()[-1] == "dit-in-dit: image 3 is torn: fix it"
    assert no_process_left(job.pid)


KEPT = """
import sys
from dit_in_dit.config.files import from_yaml
from dit_in_dit.training.loop import train
facts = train(from_yaml(open(sys.argv[1]).read()), sys.argv[2], device="cpu")
print(next(facts).kind, next(facts).kind)
"""


@pytest.mark.slow
def test_a_program_exits_although_a_run_is_unfinished(tmp_path, config):
    (tmp_path / "2.yaml").write_text(to_yaml(with_workers(config, 2)))
    what = [sys.executable, "-c", KEPT, str(tmp_path / "2.yaml"), str(tmp_path / "run")]
    job = subprocess.Popen(what, stderr=subprocess.PIPE, text=True, start_new_session=True)
    _, said = finish(job)
    assert (job.returncode, said) == (0, "")
    assert no_process_left(job.pid)


@pytest.mark.slow
def test_a_second_signal_during_the_save_is_harmless(tmp_path, unbroken):
    out = tmp_path / "twice"
    job, _ = start(tmp_path, out, 0, "save")
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.killpg(job.pid, number)
        time.sleep(0.2)
    _, said = finish(job)
    assert job.returncode == 143, said  # the first signal's
    assert checkpoint.newest(out).manifest["step"] == 4
    main(["train", "--out", str(out), "--resume", "--device", "cpu"])
    assert outcome(out) == unbroken


def test_a_stop_shortens_only_work_that_does_not_change_the_run():
    stop, done = StopRequest(), []
    with pytest.raises(Interrupted), stop.waiting():  # noqa: PT012
        stop.ask(signal.SIGTERM)
        done.append("cut")
    stop.ask(signal.SIGINT)  # outside: only noted
    assert stop.signal == signal.SIGTERM
    with pytest.raises(Interrupted), stop.waiting():
        done.append("begun")
    assert done == []


def test_a_stopped_run_saves_immediately_and_catches_up_on_due_work(run_config, tmp_path):
    config = with_train(run_config, sample_every=3)
    list(train(config, tmp_path / "unbroken", device="cpu"))
    stop, kinds = StopRequest(), []
    for fact in train(config, tmp_path / "run", device="cpu", stop=stop):
        kinds.append((fact.kind, fact.step))
        if fact.kind == "step" and fact.step == 3:
            stop.ask(signal.SIGINT)
    assert kinds[-2:] == [("checkpoint", 3), ("stopped", 3)]
    assert ("held_out", 3) not in kinds
    facts = list(train(config, tmp_path / "run", device="cpu", resume=True))
    assert [(fact.kind, fact.step) for fact in facts[:3]] == [("start", 3), ("held_out", 3), ("samples", 3)]
    assert (tmp_path / "run/log.jsonl").read_bytes() == (tmp_path / "unbroken/log.jsonl").read_bytes()


def test_training_in_pieces_with_until_equals_one_run(run_config, tmp_path):
    list(train(run_config, tmp_path / "whole", device="cpu"))
    for until in (2, 3, 99):
        facts = list(train(run_config, tmp_path / "pieces", device="cpu", resume=until > 2, until=until))
        assert facts[-1].step == min(until, run_config.train.steps)
    names = ("log.jsonl", "config.yaml")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "pieces" / n).read_bytes() for n in names)
    hashes = [checkpoint.newest(tmp_path / name).manifest["sha256"] for name in ("whole", "pieces")]
    assert hashes[0] == hashes[1]
