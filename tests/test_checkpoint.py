"""Checkpoints hold the intended bytes, are verified on the disk, and are kept as long as they are needed."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch

from conftest import with_train
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override, to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint, integrity, retention
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.folder import create_run, lock_run
from dit_in_dit.runs.tensors import LazyTensors, load_tensors, serialize

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(7.0)}


def save(run: Path, step: int, config: RunConfig | None = None, value: float = 0.0) -> Path:
    tensors = {**TENSORS, "value": torch.tensor([float(step), value])}
    config = config or RunConfig()
    (run / "config.yaml").write_text(to_yaml(config))
    return checkpoint.save(run, config, step, tensors, tensors, ("a", "b"))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def good_ones(run: Path) -> list[str]:
    found = []
    for name in names(run):
        with suppress(checkpoint.DamagedError):
            checkpoint.verify(run / "checkpoints" / name)
            found.append(name)
    return found


def flip(path: Path, byte: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def test_tensors_are_written_as_safetensors_writes_them():
    draw = torch.Generator().manual_seed(0)
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    tensors = {f"{number}.é": torch.randn(3, 5, generator=draw).to(kind) for number, kind in enumerate(floats)}
    tensors |= {str(kind): torch.arange(5).to(kind) for kind in (torch.int64, torch.int32, torch.uint8, torch.bool)}
    tensors |= {"none": torch.tensor(3.0), "empty": torch.zeros(0, 4), "turned": torch.randn(3, 4, generator=draw)}
    expected = safetensors.torch.save(tensors)
    tensors["turned"] = tensors["turned"].t().contiguous().t()  # the same values, laid out otherwise
    assert b"".join(bytes(part) for part in serialize(tensors)) == expected


def test_a_saved_checkpoint_is_read_back(tmp_path):
    folder = save(tmp_path, 12)
    found = checkpoint.newest(tmp_path)
    assert found.folder == folder
    assert found.passed_over == ()
    assert (found.manifest["step"], found.manifest["classes"]) == (12, ["a", "b"])
    for file in ("state.safetensors", "ema.safetensors"):
        loaded = load_tensors(folder / file)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_the_newest_two_and_milestones_are_kept(tmp_path):
    config = override(RunConfig(), ["train.checkpoint_every=10", "train.keep_every=30"])
    for step in range(10, 100, 10):
        save(tmp_path, step, config)
    assert names(tmp_path) == ["0000030", "0000060", "0000080", "0000090"]


def test_milestones_that_no_checkpoint_can_meet_are_refused(run_config):
    with pytest.raises(UserError, match=r"train\.keep_every must be a multiple of train\.checkpoint_every: got 5, 3"):
        with_train(run_config, keep_every=5)


@pytest.mark.parametrize("damaged", [20, 30])
def test_a_damaged_checkpoint_is_not_counted_among_the_newest_two(tmp_path, damaged):
    for step in (10, 20):
        save(tmp_path, step)
    if damaged == 30:  # the newest, which is then trained again
        save(tmp_path, 30)
        save(tmp_path, 20)
    flip(tmp_path / f"checkpoints/{damaged:07d}/ema.safetensors")
    save(tmp_path, 25)
    assert len(good_ones(tmp_path)) == 2
    assert checkpoint.newest(tmp_path).folder.name == "0000025"
    save(tmp_path, 40)
    save(tmp_path, 50)
    assert names(tmp_path) == ["0000040", "0000050"]  # damaged ones go with their time


def test_remains_of_a_killed_save_are_deleted_by_the_next_save_or_trainer(tmp_path):
    for attempt in (lambda: save(tmp_path, 20), lambda: lock_run(tmp_path).__enter__()):
        (tmp_path / "checkpoints/0000010.part").mkdir(parents=True)
        (tmp_path / "checkpoints/0000010.part/state.safetensors").write_bytes(b"half")
        attempt()
        assert names(tmp_path) == ["0000020"]


@pytest.mark.parametrize("name", ["0000010", "0000010.old", "12"])
def test_remains_of_a_killed_deletion_are_deleted(tmp_path, monkeypatch, name):
    going = save(tmp_path, 10)
    going = going.rename(going.with_name(name))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda folder: None)  # killed before the first file goes
        retention._drop(going)
    assert names(tmp_path) == [f"{name}.gone.part"]
    retention.clear_unfinished(tmp_path)
    assert names(tmp_path) == []


def test_trained_weights_are_loaded_without_the_moments(run_config, tmp_path, monkeypatch):
    model, read = NestedDiT(run_config.model), list[str]()
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    moments = {f"optimizer.{name}": tensor for name, tensor in weights.items()}
    create_run(tmp_path / "run", run_config)
    checkpoint.save(tmp_path / "run", run_config, 1, {**weights, **moments}, model.state_dict(), ())
    whole = LazyTensors.__getitem__
    monkeypatch.setattr(LazyTensors, "__getitem__", lambda self, name: read.append(name) or whole(self, name))
    Checkpoint.open(tmp_path / "run").model(torch.device("cpu"), averaged=False)
    assert set(read) == set(weights)


def test_an_opened_checkpoint_names_its_weights_and_warns_of_damaged_newer_ones(run_config, tmp_path):
    model, run = NestedDiT(run_config.model), tmp_path / "run"
    averaged = model.state_dict()
    trained = {name: tensor + 1 for name, tensor in averaged.items()}
    create_run(run, run_config)
    for step in (3, 4):
        checkpoint.save(run, run_config, step, {f"model.{k}": v for k, v in trained.items()}, averaged, ("a", "b"))
    flip(run / "checkpoints/0000004/ema.safetensors")
    with pytest.warns(
        integrity.DamagedWarning, match=r"passed over: .*0000004/ema\.safetensors is not what was written"
    ):
        saved = Checkpoint.open(run)
    assert (saved.step, saved.classes, saved.config) == (3, ("a", "b"), run_config)
    for kind, weights, file in ((True, averaged, checkpoint.AVERAGED), (False, trained, checkpoint.STATE)):
        assert saved.sha256(averaged=kind) == integrity.file_sha256(saved.folder / file)
        given = saved.model(torch.device("cpu"), averaged=kind)
        assert not given.training
        assert all(torch.equal(tensor, weights[name]) for name, tensor in given.state_dict().items())
        assert saved.weights(averaged=kind).keys() == weights.keys()


@pytest.mark.parametrize("data", [5, None, [], {}, {"digest": "a"}, {"digest": 5, "place": "b"}])
def test_a_manifest_with_a_wrong_data_record_is_damaged(tmp_path, data):
    folder = save(tmp_path, 10)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["seal"]
    for noted, good in ((data, False), ({"digest": "a", "place": "b"}, True)):
        (folder / "manifest.json").write_bytes(integrity.seal({**manifest, "data": noted}))
        assert good_ones(tmp_path) == (["0000010"] if good else [])


def test_a_checkpoint_is_synced_before_its_rename_and_before_an_older_one_is_deleted(tmp_path, monkeypatch):
    """The order of writes and syncs, which matters at a loss of power and cannot be tested by SIGKILL."""
    for step in (10, 20):
        save(tmp_path, step)
    said = []
    fsync, rename, write, verify = os.fsync, Path.rename, integrity.write_hashed, checkpoint.verify

    def name(path) -> str:
        return str(Path(path).relative_to(tmp_path))

    def place(descriptor: int) -> str:
        here = os.fstat(descriptor)
        return next(name(p) for p in [tmp_path, *tmp_path.rglob("*")] if os.path.samestat(p.stat(), here))

    def noted(word, function, where=name):
        def call(path, *rest):
            said.append((word, where(path)))
            return function(path, *rest)

        return call

    monkeypatch.setattr(os, "fsync", noted("sync", fsync, place))
    monkeypatch.setattr(Path, "rename", noted("rename", rename))
    monkeypatch.setattr(integrity, "write_hashed", noted("write", write))
    for module in (checkpoint, retention):
        monkeypatch.setattr(module, "verify", noted("verify", verify))
    save(tmp_path, 30)
    part, files = "checkpoints/0000030.part", ("state.safetensors", "ema.safetensors", "manifest.json")
    written = [(word, f"{part}/{file}") for file in files for word in ("write", "sync")]
    assert said == [
        ("sync", "."),
        *written,
        ("sync", part),
        ("verify", part),
        ("verify", "checkpoints/0000030"),  # nothing there that is to be replaced
        ("rename", part),
        ("sync", "checkpoints"),
        ("verify", "checkpoints/0000020"),  # the second that stays
        ("rename", "checkpoints/0000010"),  # on its way out
    ]


def test_replacing_a_checkpoint_always_leaves_a_good_one(tmp_path, monkeypatch):
    save(tmp_path, 10, value=1)
    seen = []

    def look():
        seen.append(float(load_tensors(checkpoint.newest(tmp_path).folder / checkpoint.STATE)["value"][1]))

    def watched(function):
        def call(*arguments, **keys):
            look()
            result = function(*arguments, **keys)
            look()
            return result

        return call

    monkeypatch.setattr(Path, "rename", watched(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    save(tmp_path, 10, value=2)
    assert seen == sorted(seen)  # first the former, then the other
    assert {seen[0], seen[-1]} == {1.0, 2.0}
    assert names(tmp_path) == ["0000010"]


def test_a_checkpoint_whose_replacement_was_killed_is_found(tmp_path):
    save(tmp_path, 10)
    folder = save(tmp_path, 20)
    folder.rename(folder.with_name("0000020.old"))
    assert checkpoint.newest(tmp_path).folder.name == "0000020.old"
    save(tmp_path, 20, value=1)
    assert names(tmp_path) == ["0000010", "0000020"]


def test_wrong_bytes_on_the_disk_are_detected_before_an_older_checkpoint_is_deleted(tmp_path, monkeypatch):
    for step in (10, 20):
        save(tmp_path, step)
    write = integrity.write_hashed

    def lying(path, parts):
        told = write(path, parts)
        if path.name == "ema.safetensors":
            flip(path)
        return told

    monkeypatch.setattr(integrity, "write_hashed", lying)
    with pytest.raises(checkpoint.SaveError, match="gives other bytes; older checkpoints are unchanged"):
        save(tmp_path, 30)
    assert names(tmp_path) == ["0000010", "0000020"]
    assert good_ones(tmp_path) == ["0000010", "0000020"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages of a file it has in memory")
def test_written_files_are_read_again_from_the_disk_and_not_from_the_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert pages_in_memory(path) == (1 << 20) // mmap.PAGESIZE
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_in_memory(path):
        pytest.skip("the tests' folder is on a file system that lives in memory")
    integrity.write_hashed(path, [bytes(1 << 20)])
    assert pages_in_memory(path) == 0


def pages_in_memory(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        start = ctypes.c_char.from_buffer(view)
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        address, length = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view))
        assert ctypes.CDLL(None).mincore(address, length, pages) == 0
        del start  # the view cannot be closed before
        return sum(page & 1 for page in pages)
