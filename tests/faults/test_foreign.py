"""Imported weights are data: no code in a file runs, and one line refuses such a file.

Every attack writes a canary file when it works. Plain `torch.load(weights_only=False)` is the reference: an attack that
works there must not work here.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import io
import os
import pickle
import runpy
import subprocess
import tarfile
import timeit
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.runs.safe_load import read_pt, read_safetensors


class Call:
    """Pickled as a call that runs when the object is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


class Built:
    """Pickled as a call, with a state that makes a second call."""

    def __init__(self, state: object) -> None:
        self.state = state

    def __reduce__(self) -> tuple:
        return argparse.Namespace, (), self.state


class WithStorage(pickle.Pickler):
    """Pickles an object in place of the storage of a tensor."""

    def persistent_id(self, part: object) -> object:
        return ("storage", torch.FloatStorage, "0", part.state, 4) if isinstance(part, Built) else None


def touch(canary: Path) -> str:
    return f"touch '{canary}'"


def python(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def saved(path: Path, value: object, **keys: object) -> None:
    torch.save(value, path, **keys)


def raw(path: Path, content: bytes) -> None:
    """A zip as torch writes it, with another pickle in it."""
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in members.items():
            archive.writestr(name, content if name.endswith("data.pkl") else old)


def stored_in_metadata(path: Path, canary: Path) -> None:
    content = io.BytesIO()
    WithStorage(content, 2).dump({"a": Built(Call(os.system, touch(canary)))})
    raw(path, content.getvalue())


def hub(path: Path, canary: Path) -> None:
    (path.parent / "hubconf.py").write_text(f"def model():\n    {python(canary)}\n")
    saved(path, {"a": Call(functools.partial(torch.hub.load, source="local"), str(path.parent), "model")})


def bytes_that_load(path: Path, canary: Path) -> None:
    inner = io.BytesIO()
    torch.save(Call(os.system, touch(canary)), inner)
    saved(path, {"a": Call(torch.storage._load_from_bytes, inner.getvalue())})


def tar(path: Path, canary: Path) -> None:
    content = pickle.dumps(Call(os.system, touch(canary)), 2)
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def compressed(path: Path, canary: Path) -> None:
    saved(path, {"a": Call(os.system, touch(canary))})
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "os.system": lambda path, canary: saved(path, {"model": {"a": Call(os.system, touch(canary))}}),
    "posix.system, by hand": lambda path, canary: raw(path, b"cposix\nsystem\n(V" + touch(canary).encode() + b"\ntR."),
    "the whole file is a call": lambda path, canary: saved(path, Call(os.system, touch(canary))),
    "eval": lambda path, canary: saved(path, {"a": Call(builtins.eval, python(canary))}),
    "exec": lambda path, canary: saved(path, {"a": Call(builtins.exec, python(canary))}),
    "open": lambda path, canary: saved(path, {"a": Call(builtins.open, str(canary), "w")}),
    "subprocess": lambda path, canary: saved(path, {"a": Call(subprocess.check_call, ["touch", str(canary)])}),
    "timeit": lambda path, canary: saved(path, {"a": Call(timeit.timeit, "pass", python(canary))}),
    "runpy": lambda path, canary: saved(path, {"a": Call(runpy._run_code, python(canary), {})}),
    "a partial, called": lambda path, canary: saved(path, {"a": Call(functools.partial(os.system, touch(canary)))}),
    "a method": lambda path, canary: saved(path, {"a": Call(Path.touch, canary)}),
    "a map that calls": lambda path, canary: saved(path, {"a": Call(list, Call(map, os.system, [touch(canary)]))}),
    "torch.hub": hub,
    "torch loads its bytes": bytes_that_load,
    "a Namespace with an evil member": lambda path, canary: saved(
        path, {"model": {}, "args": argparse.Namespace(lr=1e-4, out=Call(os.system, touch(canary)))}
    ),
    "an evil state of a Namespace": lambda path, canary: saved(
        path, {"args": Built({"lr": Call(os.system, touch(canary))})}
    ),
    "a key of a dict": lambda path, canary: saved(path, {"a": {Call(os.system, touch(canary)): 1}}),
    "a default factory": lambda path, canary: saved(path, {"a": Call(defaultdict, Call(os.system, touch(canary)))}),
    "an attribute of a tensor": lambda path, canary: saved(path, {"a": tensor_with(Call(os.system, touch(canary)))}),
    "where the storage is named": stored_in_metadata,
    "an object array": lambda path, canary: saved(path, {"a": np.array([Call(os.system, touch(canary))], object)}),
    "the older format": lambda path, canary: saved(
        path, {"a": Call(os.system, touch(canary))}, _use_new_zipfile_serialization=False
    ),
    "a newer pickle": lambda path, canary: saved(path, {"a": Call(os.system, touch(canary))}, pickle_protocol=4),
    "in a compressed zip": compressed,
    "the tar format": tar,
}


def tensor_with(attribute: object) -> torch.Tensor:
    tensor = torch.zeros(2)
    tensor.attribute = attribute
    return tensor


def refusal(read: Callable[[Path], object], path: Path) -> str:
    """The one line of a refusal, which names the file and the way out; no other error or warning occurs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as error:
            read(path)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) <= 200 - len("dit-in-dit: ")
    assert path.name in line
    assert "get it again" in line
    return line


@pytest.mark.parametrize("name", ATTACKS)
def test_no_code_of_a_pt_file_runs(name, tmp_path):
    path, canary = tmp_path / "evil.pt", tmp_path / "canary"
    ATTACKS[name](path, canary)
    try:
        torch.load(path, weights_only=False)
    except Exception as error:  # after the call, most of these are no checkpoint
        print(error)
    assert canary.exists()
    canary.unlink()
    refusal(read_pt, path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["set.npz", "set.npy"])
def test_no_code_of_arrays_runs(name, tmp_path, capsys):
    canary = tmp_path / "canary"
    evil = np.array([Call(os.system, touch(canary))], object)
    np.savez(tmp_path / name, images=evil) if name.endswith("npz") else np.save(tmp_path / name, evil)
    loaded = np.load(tmp_path / name, allow_pickle=True)
    assert len(loaded["images"] if name.endswith("npz") else loaded) == 1
    assert canary.exists()
    canary.unlink()
    for words in (
        ["train", "--preset", "emoji", "--set", f"data.source={tmp_path / name}", "--out", str(tmp_path / "run")],
        ["evaluate", str(tmp_path / name), "--against", "emoji", "--out", str(tmp_path / "out")],
        [
            "evaluate",
            str(tmp_path / "set.npz"),
            "--metrics",
            "pixels",
            "--statistics",
            str(tmp_path / name),
            "--out",
            "o",
        ],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not canary.exists()


# ------------------------------------------------------------------------------------- what is read


def official(draw: int = 0) -> dict[str, object]:
    """A file as DiT's training script saves it: weights, their average, the state of AdamW, and the arguments."""
    torch.manual_seed(draw)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "ema": OrderedDict((name, tensor * 2) for name, tensor in model.state_dict().items()),
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="DiT-XL/2", image_size=256, lr=None, betas=(0.9, 0.999), vae={"kind": "ema"}),
    }


@pytest.mark.parametrize("new", [True, False])
def test_an_official_training_checkpoint_is_read(new, tmp_path):
    written = official()
    torch.save(written, tmp_path / "0050000.pt", _use_new_zipfile_serialization=new)
    before = set(torch.serialization.get_safe_globals())
    read = read_pt(tmp_path / "0050000.pt")
    assert set(torch.serialization.get_safe_globals()) == before  # the exception was made for this file
    oracle = torch.load(tmp_path / "0050000.pt", weights_only=False)
    assert read.keys() == written.keys()
    for group in ("model", "ema"):
        assert type(read[group]) is dict
        assert all(torch.equal(read[group][name], tensor) for name, tensor in oracle[group].items())
    assert read["args"] == written["args"]
    assert read["opt"]["param_groups"] == oracle["opt"]["param_groups"]
    assert torch.equal(read["opt"]["state"][0]["exp_avg"], oracle["opt"]["state"][0]["exp_avg"])


def test_tensors_that_were_read_have_no_hooks_or_attributes(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.note = "an attribute"
    tied = OrderedDict(a=weight, b=weight)
    tied._metadata = "not what load_state_dict expects"
    torch.save(tied, tmp_path / "tied.pt")
    read = read_pt(tmp_path / "tied.pt")
    assert type(read["a"]) is torch.Tensor
    assert not read["a"].requires_grad
    assert not hasattr(read["a"], "note")
    assert not hasattr(read, "_metadata")
    assert read["a"].data_ptr() == read["b"].data_ptr()
    with pytest.raises(AttributeError):  # attributes of the file's own tensors would break the reader's model
        torch.nn.ParameterDict(tied).load_state_dict(torch.load(tmp_path / "tied.pt", weights_only=True))
    torch.nn.ParameterDict(tied).load_state_dict(read)


def test_tensors_are_memory_mapped_and_the_file_is_unchanged(tmp_path):
    path = tmp_path / "large.pt"
    torch.save({"a": torch.ones(2**24)}, path)
    before = path.read_bytes()
    tensor = read_pt(path)["a"]
    assert str(path.resolve()) in Path("/proc/self/maps").read_text()
    tensor.add_(1)
    assert path.read_bytes() == before


def test_safetensors_files_are_read_or_refused_like_pt_files(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    for read in (read_pt, read_safetensors):
        assert torch.equal(read(path)["a"], tensors["a"])
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:4],
        whole[:-1],
        b"\xff" * 40,
        whole.replace(b"F32", b"F99"),
        b"\x00" * 8,
        b"<html>" * 9,
    ):
        path.write_bytes(content)
        refusal(read_safetensors, path)


# ---------------------------------------------------------------------------------- what is refused


def cycle() -> dict[str, object]:
    group: dict[str, object] = {}
    group["itself"] = group
    return group


def nested(depth: int) -> dict[str, object]:
    group: dict[str, object] = {}
    for _ in range(depth):
        group = {"in": group}
    return group


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda: torch.zeros(3), "tensors by name"),
        (lambda: [torch.zeros(3)], "tensors by name"),
        (lambda: {1: torch.zeros(3)}, "tensors by name"),
        (lambda: {"a": torch.zeros(1).expand(10**9)}, "claim 4 GB"),
        (lambda: {"a": torch.empty(10**6, 10**6, device="meta")}, "no ordinary tensor"),
        (lambda: {"a": torch.eye(3).to_sparse()}, "no ordinary tensor"),
        (lambda: {"a": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)}, "no ordinary tensor"),
        (lambda: {"a": bytearray(10)}, "no plain value"),
        (lambda: {"a": torch.nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
        (cycle, "nests more than"),
        (lambda: nested(3000), "nests more than|damaged"),
    ],
)
def test_files_without_weights_are_refused(value, reason, tmp_path):
    path = tmp_path / "odd.pt"
    with warnings.catch_warnings(action="ignore"):  # quantised tensors are deprecated
        made = value()
        try:
            torch.save(made, path)
        except RecursionError:  # pickle's own limit: write the same by hand
            raw(path, b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 3000 + b"}" + b"s" * 3000 + b".")
    assert any(part in refusal(read_pt, path) for part in reason.split("|"))


def test_a_zip_that_grows_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"a": 0}, 2))
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data/0", bytes(2**26))
    assert path.stat().st_size < 2**17
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    assert "zip bomb" in refusal(read_pt, path)


def test_overlapping_members_are_refused(tmp_path):
    """A zip can list the same stored bytes many times (Fifield 2019)."""
    path = tmp_path / "bomb.pt"
    torch.save({"a": torch.zeros(10**5)}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start, count = archive.start_dir, len(archive.infolist())
    directory, end = whole[start:-22], whole[-22:]
    if b"PK\x06\x06" in directory:
        directory = directory[: directory.index(b"PK\x06\x06")]
    directory *= 9
    numbers = (count * 9).to_bytes(2, "little") * 2 + len(directory).to_bytes(4, "little")
    path.write_bytes(whole[:start] + directory + end[:8] + numbers + start.to_bytes(4, "little") + end[20:])
    assert "zip bomb" in refusal(read_pt, path)


@pytest.mark.parametrize("new", [True, False])
def test_damage_anywhere_in_a_file_gives_a_one_line_error(new, tmp_path, full):
    """A file that is cut anywhere, or has one bit flipped, is refused, or gives a checkpoint with a changed value."""
    torch.save(official(), tmp_path / "whole.pt", _use_new_zipfile_serialization=new)
    whole = (tmp_path / "whole.pt").read_bytes()
    draw, path = np.random.default_rng(1), tmp_path / "torn.pt"
    refused = 0
    for _ in range(400 if full else 40):
        path.write_bytes(whole[: draw.integers(len(whole))])
        refusal(read_pt, path)
        torn = bytearray(whole)
        torn[draw.integers(len(whole))] ^= 1 << draw.integers(8)
        path.write_bytes(torn)
        try:
            assert read_pt(path).keys()
        except UserError:
            refusal(read_pt, path)
            refused += 1
    assert refused


def test_files_of_other_kinds_are_refused_without_waiting(tmp_path):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    (tmp_path / "page.pt").write_text("<html>404: get a free account</html>")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2702409600\n")
    for name, reason in (
        ("empty.pt", "empty"),
        ("folder.pt", "not a file"),
        ("pipe.pt", "not a file"),
        ("loop.pt", "symbolic links"),
        ("absent.pt", "No such file"),
        ("page.pt", "damaged"),
        ("pointer.pt", "damaged"),
    ):
        assert reason in refusal(read_pt, tmp_path / name)


def test_a_long_name_leaves_room_for_the_way_out(tmp_path):
    path = tmp_path / ("n" * 200 + "\n.pt")
    path.touch()
    with pytest.raises(UserError) as error:
        read_pt(path)
    assert len(str(error.value)) <= 188
    assert "\n" not in str(error.value)
    assert "as .safetensors" in str(error.value)
