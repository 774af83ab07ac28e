"""Several processes see the examples of one process, and compute the same bits if train.reduction=fixed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SHARDED, small_model, with_train
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import to_yaml
from dit_in_dit.config.run import DataConfig
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.distributed import check_process_count
from processes import Together, run_together, trained

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]


def hashes(out) -> dict[str, str]:
    found = checkpoint.newest(out)
    return {**checkpoint.verify(found.folder)["sha256"], "log": (out / "log.jsonl").read_text()}


def state(out) -> dict[str, torch.Tensor]:
    folder = checkpoint.newest(out).folder
    return load_tensors(folder / checkpoint.STATE) | load_tensors(folder / "ema.safetensors")


@pytest.fixture
def shared(run_config):
    """Four micro-batches of four a step, which 1, 2 and 4 processes can share."""
    return with_train(run_config, accumulate=4, batch_size=4, steps=8, checkpoint_every=8, evaluate_every=4)


@given(
    world=st.sampled_from([1, 2, 4, 8]),
    rows=st.integers(1, 4),
    accumulate=st.sampled_from([8, 16]),
    reduction=st.sampled_from(["fast", "fixed"]),
    step=st.integers(0, 10**9),
)
@settings(max_examples=60, deadline=None)
def test_several_processes_see_the_same_examples_as_one_process(
    run_config_plain, world, rows, accumulate, reduction, step
):
    config = with_train(run_config_plain, batch_size=8 * rows, accumulate=accumulate, reduction=reduction)
    found = []
    for rank in range(world):
        examples = Examples(None, config, rank, world)
        numbers = range(step * examples.per_step, (step + 1) * examples.per_step)
        found += [index for number in numbers for index in examples.indices(number)]
    assert sorted(found) == list(range(step * config.global_batch, (step + 1) * config.global_batch))


@pytest.fixture(scope="module")
def run_config_plain():
    from dit_in_dit.config.run import RunConfig

    return RunConfig(model=small_model("outer inner"))


@pytest.mark.slow
def test_a_run_that_changes_its_number_of_processes_ends_with_the_same_bits(shared, tmp_path, full):
    config = with_train(shared, reduction="fixed")
    worlds = (1, 2, 1, 4) if full else (2, 1)
    [alone] = run_together(1, trained, config, tmp_path / "alone", False)
    for turn, world in enumerate(worlds):
        until = config.train.steps * (turn + 1) // len(worlds)
        facts = run_together(world, trained, config, tmp_path / "many", turn > 0, until)
        assert facts[0][0][2]["processes"] == world
        assert facts[0][-1][1] == until
    assert hashes(tmp_path / "many") == hashes(tmp_path / "alone")
    assert [fact for fact in alone if fact[0] == "step"][-1][1] == config.train.steps


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", SHARDED])
def test_two_processes_agree_with_one_process_within_rounding(shared, tmp_path, parallel, full):
    config = with_train(shared, parallel=parallel)
    run_together(1, trained, config, tmp_path / "alone", False)
    run_together(
        2, trained, config, tmp_path / "two", False, 5
    )  # stopped, and resumed: whole state is gathered and spread
    run_together(2 if parallel == "ddp" or not full else 4, trained, config, tmp_path / "two", True)
    alone, two = state(tmp_path / "alone"), state(tmp_path / "two")
    assert alone.keys() == two.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    lines = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("alone", "two")]
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-5)
        assert one.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=1e-4)


def test_processes_that_cannot_share_a_batch_are_refused(shared):
    check_process_count(shared.train, 4)
    with pytest.raises(UserError, match=r"train\.batch_size must be a multiple"):
        check_process_count(shared.train, 3)
    fixed = with_train(shared, reduction="fixed").train
    check_process_count(fixed, 4)
    for size in (3, 8):
        with pytest.raises(UserError, match=r"power of two and divides train\.accumulate=4"):
            check_process_count(fixed, size)
    with pytest.raises(UserError, match=r"power of two with train\.reduction=fixed: got 3"):
        with_train(shared, reduction="fixed", accumulate=3)


@pytest.mark.slow
def test_a_number_that_is_not_finite_in_one_process_skips_the_step_in_all_processes(shared, tmp_path):
    images = np.zeros((32, 3, 8, 8), np.float32)
    images[7] = 3e38
    np.savez(tmp_path / "set.npz", images=images, labels=np.zeros(32, int))
    config = with_train(shared, evaluate_every=0, steps=4, checkpoint_every=2, reduction="fixed")
    config = replace(config, data=DataConfig(source=str(tmp_path / "set.npz"), held_out=0))
    run_together(1, trained, config, tmp_path / "alone", False)
    facts = run_together(2, trained, config, tmp_path / "two", False)
    skipped = [fact for fact in facts[0] if fact[0] == "skipped"]
    assert [fact[2]["images"] for fact in skipped] == [[7], [7]]
    assert [kind for kind, _, _ in facts[1]] == [kind for kind, _, _ in facts[0]]
    assert hashes(tmp_path / "two") == hashes(tmp_path / "alone")
    assert all(tensor.isfinite().all() for tensor in state(tmp_path / "two").values())


@pytest.mark.slow
def test_a_stopped_process_ends_the_job_and_is_named(run_config, tmp_path):
    """SIGSTOP to one of two processes under torchrun, with a timeout of 8 s: all processes are gone after 15 s."""
    config = with_train(run_config, steps=10**6, checkpoint_every=10**6, evaluate_every=0, timeout=8)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    train = ["-m", "dit_in_dit", "train", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    job = subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", "2", *train, "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        ranks = _ranks(job, tmp_path / "run" / "log.jsonl")
        os.kill(ranks[1], signal.SIGSTOP)
        began = time.monotonic()
        _, errors = job.communicate(timeout=60)
        took = time.monotonic() - began
    finally:
        _kill_all(job)
    assert took < 15, errors
    assert job.returncode != 0
    [line] = [line for line in errors.splitlines() if line.startswith("dit-in-dit: ")]
    assert f"process 1 of 2 (pid {ranks[1]} on " in line
    assert "within 8 s" in line
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)


def _ranks(job: subprocess.Popen, log) -> list[int]:
    """Process numbers of the trainers, in the order of their ranks, once they train."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.1)
    found = {}
    for child in _children(job):
        variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        rank = [line for line in variables if line.startswith("RANK=")]
        if rank:
            found[int(rank[0].removeprefix("RANK="))] = int(child)
    assert sorted(found) == [0, 1]
    return [found[0], found[1]]


def _children(job: subprocess.Popen) -> list[str]:
    return Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()


def _kill_all(job: subprocess.Popen) -> None:
    for pid in _children(job) if job.poll() is None else []:
        os.kill(int(pid), signal.SIGKILL)
    job.kill()
    job.wait()


@pytest.mark.slow
def test_a_process_that_dies_is_named(shared, tmp_path):
    config = with_train(shared, steps=10**6, checkpoint_every=10**6, evaluate_every=0, timeout=20)
    jobs = Together(2, trained, config, tmp_path / "run", False)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    jobs.processes[1].kill()
    found = jobs.end(timeout=60)
    assert found[1] == (False, "")
    good, why = found[0]
    assert not good
    assert why.startswith("ProcessLostError: process 1 of 2 (pid ")
