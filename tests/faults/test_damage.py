"""Checkpoints damaged on the disk: flipped bits, truncated, missing, exchanged or extra files are found and named."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from conftest import small_model
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig, RunConfig, SampleConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.runs import checkpoint
from dit_in_dit.training.loop import train

FILES = ("ema.safetensors", "manifest.json", "state.safetensors")
LAST, BEFORE = "0000006", "0000003"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A run of six steps with checkpoints of the third and the sixth step."""
    config = RunConfig(
        model=small_model("outer inner", image_size=(8, 8), num_classes=3),
        data=DataConfig(source=str(folder), held_out=0.2),
        train=TrainConfig(steps=6, batch_size=2, precision="float32", checkpoint_every=3, sample_every=0),
        sample=SampleConfig(steps=2),
    )
    run = tmp_path_factory.mktemp("damage") / "run"
    list(train(config, run, device="cpu"))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def found(run: Path) -> list[tuple[str, str, str]]:
    """Folder, file and kind of all damages that are passed over; the previous checkpoint must be in use."""
    newest = checkpoint.newest(run)
    assert newest.folder.name == (BEFORE if newest.passed_over else LAST)
    return [(damage.folder.name, damage.file, damage.kind) for damage in newest.passed_over]


def test_every_flipped_bit_is_found_and_named(run, full):
    draw, count = np.random.default_rng(0), 300 if full else 30
    for number in range(count):
        file = FILES[number % len(FILES)]
        content = (run / "checkpoints" / LAST / file).read_bytes()
        last = 8 * len(content) - 1
        bit = {0: 0, 1: last}.get(number // len(FILES), int(draw.integers(last)))  # the ends first
        with changed(run / "checkpoints" / LAST / file, flipped(content, bit)):
            kind = (
                "flipped" if file != "manifest.json" or bit < last - 15 else "truncated"
            )  # its end tells it from a cut
            assert found(run) == [(LAST, file, kind)], (file, bit)
    assert found(run) == []


def test_every_flipped_bit_of_a_manifest_is_found(run, full):
    path = run / "checkpoints" / LAST / "manifest.json"
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 1 if full else 41):
        with changed(path, flipped(content, bit)), pytest.raises(checkpoint.DamagedError, match=r"manifest\.json"):
            checkpoint.verify(path.parent)


def test_every_truncation_is_found_and_named(run, full):
    draw, count = np.random.default_rng(1), 100 if full else 15
    for number in range(count):
        file = FILES[number % len(FILES)]
        content = (run / "checkpoints" / LAST / file).read_bytes()
        size = {0: 0, 1: len(content) - 1}.get(number // len(FILES), int(draw.integers(len(content))))
        with changed(run / "checkpoints" / LAST / file, content[:size]):
            assert found(run) == [(LAST, file, "truncated")], (file, size)
    assert found(run) == []


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_found_and_named(run, file):
    (run / "checkpoints" / LAST / file).unlink()
    assert found(run) == [(LAST, file, "missing")]


@pytest.mark.parametrize("file", FILES)
def test_files_exchanged_between_checkpoints_are_found_and_named(run, file):
    a, b = (run / "checkpoints" / name / file for name in (LAST, BEFORE))
    whole = a.read_bytes(), b.read_bytes()
    a.write_bytes(whole[1])
    assert found(run) == [(LAST, file, "swapped")]
    b.write_bytes(whole[0])
    for name in (LAST, BEFORE):
        with pytest.raises(checkpoint.DamagedError) as error:
            checkpoint.verify(run / "checkpoints" / name)
        assert [(damage.file, damage.kind) for damage in error.value.damages] == [(file, "swapped")]
    with pytest.raises(UserError, match=rf"no checkpoint of .* is good: .*{file}.*; put a copy back, or remove "):
        checkpoint.newest(run)


def test_files_exchanged_within_a_checkpoint_are_found_and_named(run):
    a, b, aside = (run / "checkpoints" / LAST / name for name in ("ema.safetensors", "state.safetensors", "aside"))
    a.rename(aside)
    b.rename(a)
    aside.rename(b)
    assert found(run) == [(LAST, "state.safetensors", "swapped"), (LAST, "ema.safetensors", "swapped")]


def test_an_extra_file_is_named_unless_it_is_hidden(run):
    (run / "checkpoints" / LAST / ".DS_Store").write_bytes(b"")
    assert found(run) == []
    (run / "checkpoints" / LAST / "optimizer.pt").write_bytes(b"")
    assert found(run) == [(LAST, "optimizer.pt", "extra")]


def test_a_renamed_checkpoint_is_found(run):
    (run / "checkpoints" / LAST).rename(run / "checkpoints" / "0000009")
    assert found(run) == [("0000009", "manifest.json", "swapped")]


def test_the_safetensors_format_itself_detects_no_flipped_bit(run):
    """The reason for hashes: safetensors loads a flipped bit without an error."""
    path = run / "checkpoints" / LAST / "ema.safetensors"
    before = safetensors.torch.load(path.read_bytes())  # load_file would look at the file itself
    path.write_bytes(flipped(path.read_bytes(), 8 * path.stat().st_size - 2))
    after = safetensors.torch.load_file(path)
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 1


DAMAGES: dict[str, Callable[[Path], object]] = {
    "state.safetensors is not what was written": lambda c: (c / FILES[2]).write_bytes(
        flipped((c / FILES[2]).read_bytes(), 80_000)
    ),
    "ema.safetensors is truncated": lambda c: (c / FILES[0]).write_bytes(b""),
    "manifest.json is missing": lambda c: (c / FILES[1]).unlink(),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_run_resumed_past_a_damaged_checkpoint_reports_it_and_ends_with_the_same_bits(trained, run, capsys, said):
    DAMAGES[said](run / "checkpoints" / LAST)
    main(["train", "--out", str(run), "--resume", "--device", "cpu"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert lines == [f"passed over: {run / 'checkpoints' / LAST}/{said}"]
    assert found(run) == []
    assert checkpoint.newest(run).manifest == checkpoint.newest(trained).manifest
    assert (run / "log.jsonl").read_bytes() == (trained / "log.jsonl").read_bytes()


@pytest.mark.parametrize("command", [["sample", "--num", "1", "--out"], ["doctor", "--out"]])
def test_commands_report_that_they_passed_over_a_damaged_checkpoint(run, tmp_path, capsys, command):
    DAMAGES["ema.safetensors is truncated"](run / "checkpoints" / LAST)
    name, *options = command
    with warnings.catch_warnings():  # pytest collects warnings; this prints them as Python does
        warnings.showwarning = lambda *warning: print(warnings.formatwarning(*warning[:4]), end="", file=sys.stderr)
        with suppress(SystemExit):  # the doctor says by it that it found something
            main([name, str(run), *options, str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert lines == [f"dit-in-dit: passed over: {run / 'checkpoints' / LAST}/ema.safetensors is truncated"]
