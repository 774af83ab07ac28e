"""Calls of a run to CUDA and torch.distributed, recorded on a machine without a GPU."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conftest import SHARDED, SHARDED_FULL, with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig, DiffusionConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.diffusion.path import Ddpm, on_device
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.tensors import LazyTensors, file_order, load_tensors, serialize
from dit_in_dit.runtime.deterministic import deterministic
from dit_in_dit.runtime.device import pick_device
from dit_in_dit.training import distributed, loop, sharding, step_log
from dit_in_dit.training.held_out import HELD_OUT_BATCH
from dit_in_dit.training.loop import train
from dit_in_dit.training.sharding import GatheredTensors
from dit_in_dit.training.trainer import Trainer
from processes import run_together

CUDA = torch.device("cuda:1")


def test_the_chosen_gpu_becomes_the_current_device_of_the_process(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:3", "cpu")] == [
        "cuda:2",
        "cuda:2",
        "cuda:3",
        "cpu",
    ]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(pick_device()) == "cuda:1"
    assert chosen == [2, 2, 3, 1]


def test_deterministic_mode_is_set_on_cuda_and_restored(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for device, on, expected in ((CUDA, True, True), (CUDA, False, False), (torch.device("cpu"), True, False)):
        with deterministic(device, on=on):
            assert torch.are_deterministic_algorithms_enabled() == expected
            assert torch.utils.deterministic.fill_uninitialized_memory == (not expected)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1)
    with pytest.raises(UserError, match="before CUDA starts"), deterministic(CUDA, on=True):
        pass


@pytest.mark.parametrize(
    ("keys", "asked", "expected"), [({}, False, False), ({}, True, True), ({"reduction": "fixed"}, False, True)]
)
def test_deterministic_runs_set_the_deterministic_mode(run_config, tmp_path, monkeypatch, keys, asked, expected):
    seen = []
    real = loop.deterministic_algorithms

    def recorded(device, *, on):
        seen.append(on)
        return real(device, on=on)

    monkeypatch.setattr(loop, "deterministic_algorithms", recorded)
    next(train(with_train(run_config, **keys), tmp_path / "run", device="cpu", deterministic=asked))
    assert seen == [expected]


def test_deterministic_mode_is_set_before_anything_is_moved_to_the_device(run_config, tmp_path, monkeypatch):
    order = []
    for name in ("deterministic_algorithms", "join_group", "Trainer"):
        real = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *a, name=name, real=real, **k: order.append(name) or real(*a, **k))
    next(train(run_config, tmp_path / "run", device="cpu", deterministic=True))
    assert order == ["deterministic_algorithms", "join_group", "Trainer"]


def _train_on_a_full_disk(config, out):
    from dit_in_dit.runs.jsonl import Lines

    def full(self):
        raise checkpoint.SaveError("no room for the log")

    Lines.keep = full
    try:
        list(train(config, out, device="cpu"))
    except checkpoint.SaveError as error:  # raised only at the last step: before it, a run continues
        return str(error)
    return "saved"


@pytest.mark.parametrize("parallel", ["ddp", SHARDED_FULL])
def test_no_process_waits_for_parts_of_a_checkpoint_that_cannot_be_written(run_config, tmp_path, parallel):
    config = with_train(run_config, parallel=parallel, timeout=20)
    assert run_together(2, _train_on_a_full_disk, config, tmp_path / "run") == ["no room for the log"] * 2


def test_a_process_group_gets_its_gpu_and_timeout_and_ends_with_the_process(monkeypatch):
    begun, stores, ends = [], [], []

    class Store:
        def __init__(self, host, port, timeout):
            stores.append([timeout])

        def set_timeout(self, timeout):
            stores[-1].append(timeout)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **keys: begun.append((backend, keys["device_id"])))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **keys: None)
    monkeypatch.setattr(dist, "all_gather_object", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "TCPStore", Store)
    monkeypatch.setattr(atexit, "register", ends.append)
    distributed.join_group(CUDA, 600)
    distributed.join_group(torch.device("cpu"), 600)
    assert begun == [("nccl", CUDA), ("gloo", None)]
    assert stores == [[timedelta(seconds=600), timedelta(seconds=3)]] * 2
    assert ends == [distributed.leave_group] * 2


def test_a_process_group_ended_by_the_user_is_not_ended_again(tmp_path):
    """The exit handler must check: PyTorch refuses to destroy a group that is gone."""
    user = (
        "import torch, torch.distributed as dist\n"
        "from dit_in_dit.training import distributed\n"
        "distributed.world_size = lambda: 2\n"
        "distributed.ProcessGroup = lambda timeout: None\n"
        "begin = dist.init_process_group\n"
        "dist.init_process_group = lambda *_, **__: begin('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "distributed.join_group(torch.device('cpu'), 60)\n"
        "dist.destroy_process_group()\n"
    )
    ended = subprocess.run([sys.executable, "-c", user], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_constant_tables_are_copied_to_a_device_once():
    made = []
    table = on_device(lambda: made.append(1) or torch.ones(3))
    cpu = torch.device("cpu")
    with torch.inference_mode():
        first = table(cpu)
    assert table(cpu) is first
    assert made == [1]
    assert not first.is_inference()  # otherwise no gradient could pass through it
    path = Ddpm()
    assert path.table(cpu) is path.table(cpu)


def test_values_of_many_steps_are_read_from_the_device_in_one_copy(monkeypatch):
    copies = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(len(self)) or real(self))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("a copy for one number"))
    steps = [{"loss": torch.tensor(1.5 + n), "rate": 0.1, "norm": torch.tensor(2.5)} for n in range(3)]
    assert step_log._read(steps) == [{"loss": 1.5 + n, "rate": 0.1, "norm": 2.5} for n in range(3)]
    assert copies == [6]


@pytest.fixture
def without_float64(monkeypatch):
    """Check, on a CPU, that no float64 tensor is moved to a device: MPS has no float64."""
    real = torch.Tensor.to

    def to(tensor, *arguments, **keys):
        moved = any(isinstance(a, torch.device) for a in (*arguments, *keys.values()))
        narrowed = any(isinstance(a, torch.dtype) and a != torch.float64 for a in (*arguments, *keys.values()))
        if moved and tensor.dtype == torch.float64 and not narrowed:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return real(tensor, *arguments, **keys)

    monkeypatch.setattr(torch.Tensor, "to", to)


@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_no_float64_reaches_a_device(run_config, tmp_path, monkeypatch, without_float64, path):
    from dit_in_dit.doctor.doctor import examine
    from dit_in_dit.sampling.numbered import sample

    samplers = {"flow": ("euler", "heun", "dpm++", "unipc"), "ddpm": ("ddim", "dpm++", "unipc", "ddpm")}[path]
    how = replace(run_config.sample, sampler=samplers[0], steps=4)
    config = replace(run_config, diffusion=DiffusionConfig(path=path, time="uniform"), sample=how)
    list(train(config, tmp_path / "run", device="cpu"))
    saved = Checkpoint.open(tmp_path / "run")
    model, config = saved.model(torch.device("cpu")), saved.config
    for sampler in samplers:
        sample(model, replace(config, sample=replace(how, sampler=sampler)), 2)
    examine(config, torch.device("cpu"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    main(["maps", "run", "--num", "1", "--times", "0.5", "--device", "cpu"])
    main(["evaluate", "run", "-n", "8", "--device", "cpu"])


# ------------------------------------------------------------------------------------------ held-out errors


def test_held_out_images_are_evaluated_in_batches_of_one_size(run_config, tmp_path):
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "set.npz", images=draw.standard_normal((300, 3, 8, 8), np.float32), labels=np.zeros(300, int))
    config = replace(run_config, data=DataConfig(source=str(tmp_path / "set.npz"), held_out=0.5))
    sizes = {}
    for batch in (8, 128, 256):
        trainer = Trainer(
            with_train(config, batch_size=batch), open_source(config.data, config.model), torch.device("cpu")
        )
        seen = []
        trainer.objective.denoising_error = lambda model, x, *rest, seen=seen: (  # type: ignore[method-assign]
            seen.append(len(x)) or (torch.zeros(len(x)), torch.zeros(len(x)))
        )
        trainer.evaluate()
        sizes[batch] = max(seen)
    assert sizes == {8: 8, 128: HELD_OUT_BATCH, 256: HELD_OUT_BATCH}


@pytest.mark.parametrize("value", [1e20, 3e38])
def test_a_non_finite_held_out_error_is_logged_as_a_string(run_config, tmp_path, monkeypatch, value):
    evaluated = Objective.denoising_error

    def huge(self, predict, x, *rest):
        return evaluated(self, predict, x * value, *rest)

    monkeypatch.setattr(Objective, "denoising_error", huge)
    facts = list(train(run_config, tmp_path / "run", device="cpu"))
    assert [fact.step for fact in facts if fact.kind == "checkpoint"] == [3, 6]  # the run saves as usual
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open()]
    errors = [error for line in lines for kinds in line.get("held_out", {}).values() for error in kinds.values()]
    assert errors
    assert all(error in ("inf", "nan") for error in errors)
    monkeypatch.undo()
    list(train(run_config, tmp_path / "run", device="cpu", resume=True))


def test_a_diverged_run_stops_even_if_an_evaluation_is_due(run_config, tmp_path):
    config = with_train(run_config, skip_most=1, evaluate_every=1, checkpoint_every=6, clip=0.0, learning_rate=10.0)
    images = np.full((32, 3, 8, 8), 3e38, np.float32)
    np.savez(tmp_path / "set.npz", images=images, labels=np.zeros(32, int))
    config = replace(config, data=DataConfig(source=str(tmp_path / "set.npz"), held_out=0.2))
    with pytest.raises(UserError, match="training diverged"):
        list(train(config, tmp_path / "run", device="cpu"))


# ------------------------------------------------------------------------------------------ sharded runs


def test_a_checkpoint_file_is_read_one_tensor_at_a_time(run_config, tmp_path):
    list(train(run_config, tmp_path / "run", device="cpu"))
    folder = checkpoint.newest(tmp_path / "run").folder
    stored, whole = LazyTensors(folder / checkpoint.STATE), load_tensors(folder / checkpoint.STATE)
    assert set(stored) == set(whole)
    assert all(torch.equal(stored[name], tensor) for name, tensor in whole.items())
    with pytest.raises(KeyError):
        stored["nothing"]


class Counted(dict):
    """Tensors that record the name of each tensor that is read."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.read = []

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name)


def test_a_sharded_state_is_gathered_one_tensor_at_a_time(monkeypatch):
    gathered, written = [], []
    monkeypatch.setattr(sharding, "full_tensor", lambda tensor: gathered.append(len(written)) or tensor)
    state = GatheredTensors({f"weight{n}": torch.full((4,), float(n)) for n in range(3)})
    for part in serialize(state):
        written.append(part)
    assert gathered == [2, 3, 4]  # the header has two parts; then each tensor is gathered just before it is written
    assert file_order(state) == ["weight0", "weight1", "weight2"]
    assert len(gathered) == 3


def test_processes_do_not_wait_for_a_save_that_failed_on_rank_0(tmp_path, run_config):
    tensors = {"weight": torch.ones(4), "bias": torch.ones(2)}
    state, ema = Counted(tensors), Counted(tensors)
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(checkpoint.SaveError):
        checkpoint.save(tmp_path, run_config, 1, state, ema, ("a",))
    for one in (state, ema):
        assert one.read[-2:] == file_order(tensors)


def _sharded(config, out):
    facts = list(train(config, out, device="cpu"))
    return [fact.kind for fact in facts if fact.model is not None], dist.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [SHARDED])
def test_only_rank_0_generates_the_samples_of_a_sharded_run(run_config, tmp_path, parallel):
    config = with_train(run_config, parallel=parallel, sample_every=3)
    drawn = run_together(2, _sharded, config, tmp_path / "run")
    assert drawn == [(["samples", "samples"], True), ([], True)]
