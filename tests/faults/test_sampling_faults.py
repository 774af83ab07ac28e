"""`sample` gives the same bytes with any batch size and any number of processes, even if killed and restarted."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import small_model, with_train
from dit_in_dit.cli import main
from dit_in_dit.reporting.images import to_pixels
from dit_in_dit.runs import shards
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.sampling.numbered import sample_batches
from dit_in_dit.training.loop import train

NUM = 64
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0", "-m", "dit_in_dit"]

# The command, in a process that dies by SIGKILL when half of its n-th image is written.
KILLED = """
import os, pathlib, signal, sys
from dit_in_dit.cli import main

left, opened = int(sys.argv[1]), pathlib.Path.open

def torn(path, mode="r", *rest, **more):
    global left
    file = opened(path, mode, *rest, **more)
    if mode[0] in "wx" and ".png" in path.name:
        left -= 1
        if not left:
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return file

pathlib.Path.open = torn
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder) -> Path:
    """A few steps that move every weight far from its start; samples come in sixteen micro-batches."""
    from dit_in_dit.config.run import DataConfig, RunConfig, SampleConfig
    from dit_in_dit.config.training import TrainConfig

    config = RunConfig(
        model=small_model("outer*1 inner*1", image_size=(8, 8), num_classes=3),
        data=DataConfig(source=str(folder)),
        train=TrainConfig(batch_size=4, learning_rate=0.03, precision="float32", sample_every=0, evaluate_every=0),
        sample=SampleConfig(steps=4, guidance=2.0, micro_batch=4),
    )
    out = tmp_path_factory.mktemp("runs") / "run"
    for _ in train(with_train(config, steps=8), out, device="cpu"):
        pass
    return out


@pytest.fixture
def words(run) -> list[str]:
    return ["sample", str(run), "-n", str(NUM), "--device", "cpu", "--out"]  # torchrun reads --num as its --numa-...


@pytest.fixture(scope="module")
def unbroken(run, tmp_path_factory) -> Path:
    """The samples of one uninterrupted process."""
    out = tmp_path_factory.mktemp("unbroken") / "drawn"
    main(["sample", str(run), "--num", str(NUM), "--device", "cpu", "--out", str(out)])
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in out.glob("0*.png")}) == NUM  # not all alike
    return out


@pytest.fixture
def start(tmp_path) -> Iterator:
    """Starts commands that write below tmp_path; none of their processes outlives the test."""

    def begin(command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE)

    yield begin
    for left in processes_with(tmp_path):
        os.kill(left, signal.SIGKILL)


def processes_with(path: Path) -> list[int]:
    """Processes with the path in their command line (torchrun puts its workers into sessions of their own)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(path).encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        except OSError:  # gone meanwhile
            continue
    return found


def ended(process: subprocess.Popen[bytes], code: int = 0, seconds: float = 150) -> str:
    """stderr of a process that ends in time with this code."""
    _, errors = process.communicate(timeout=seconds)
    assert process.returncode == code, errors.decode()
    return errors.decode()


def tree(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_every_batch_size_gives_the_same_bytes(words, unbroken, tmp_path, full):
    for batch in (1, 3, 7, 64) if full else (1, 64):
        main([*words, str(tmp_path / str(batch)), "--batch", str(batch)])
        assert tree(tmp_path / str(batch)) == tree(unbroken), batch


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds its processes in /proc")
def test_two_processes_give_the_same_bytes(words, unbroken, tmp_path, start, full):
    for batch in ("1", "3", "7", "64") if full else ("7",):
        out = tmp_path / batch
        errors = ended(start([*TORCHRUN, *words, str(out), "--batch", batch]))
        assert tree(out) == tree(unbroken), errors
    assert not processes_with(tmp_path)


def test_larger_counts_and_single_images_give_the_same_bytes(run, words, unbroken, tmp_path):
    more = words.copy()
    more[3] = "100"
    main([*more, str(tmp_path / "more")])
    assert tree(tmp_path / "more").items() >= {k: v for k, v in tree(unbroken).items() if k != "grid.png"}.items()
    saved = Checkpoint.open(run)
    model, config = saved.model(torch.device("cpu")), saved.config
    for indices, images in sample_batches(model, config, [63, 2, 17, 18]):
        for index, pixels in zip(indices, to_pixels(images), strict=True):
            assert np.array_equal(pixels, np.asarray(Image.open(unbroken / f"{index:06d}.png")))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds its processes in /proc")
def test_sampling_killed_repeatedly_within_an_image_is_continued(words, unbroken, tmp_path, start, full):
    out = tmp_path / "drawn"
    made: dict[Path, int] = {}
    for life, at in enumerate((1, 6, 13, 4) if full else (6, 13)):
        ended(start([sys.executable, "-c", KILLED, str(at), *words, str(out)]), -signal.SIGKILL)
        assert list(out.glob("*.part"))  # it was killed while it wrote
        now = {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
        assert len(now) == len(made) + at - 1, life  # every life got on
        assert now.items() >= made.items()  # and drew nothing again
        made = now
    assert not (out / "grid.png").exists()
    main([*words, str(out)])
    assert tree(out) == tree(unbroken)  # and no half file is left
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in made.items())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds its processes in /proc")
def test_one_process_continues_after_two_processes_were_killed(words, unbroken, tmp_path, start, full):
    if not full:
        pytest.skip("make test-full: its processes' starts take as long as all others")
    out = tmp_path / "drawn"
    command = [sys.executable, "-m", "dit_in_dit", *words, str(out)]
    lives = 0
    for wanted in (2, 40):
        ranks = [start(command, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
        deadline = time.monotonic() + 120
        while len(list(out.glob("0*.png"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        for rank in ranks:
            rank.kill()
            rank.communicate(timeout=60)
        lives += wanted <= len(list(out.glob("0*.png"))) < NUM
    assert lives  # killed amid the work at least once: what is drawn in between depends on the machine
    main([*words, str(out)])
    assert tree(out) == tree(unbroken)


def test_a_folder_of_other_samples_is_refused_and_unchanged(words, unbroken, tmp_path, capsys):
    before = tree(unbroken)
    refused = {
        ("--seed", "1"): "samples.seed: 0 / 1",
        ("--guidance", "3"): "samples.guidance: 2.0 / 3.0",
        ("--classes", "red"): 'samples.labels: "all in turn" / ["red"]',
        ("--micro-batch", "5"): "micro_batch: 4 / 5",
        ("--raw",): "checkpoint: ",
    }
    for options, reason in refused.items():
        with pytest.raises(SystemExit) as stop:
            main([*words, str(unbroken), *options])
        lines = capsys.readouterr().err.splitlines()
        assert (stop.value.code, len(lines)) == (2, 1)
        assert reason in lines[0]
        assert "choose another --out" in lines[0]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "000063.png").write_bytes(b"somebody's")
    with pytest.raises(SystemExit) as stop:
        main([*words, str(foreign)])
    assert stop.value.code == 2
    assert "000063.png was not written by this command" in capsys.readouterr().err
    assert [path.name for path in foreign.iterdir()] == ["000063.png"]
    assert tree(unbroken) == before


def test_waiting_for_the_images_of_another_process_times_out(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(shards, "PATIENCE", 0.3)
    with pytest.raises(SystemExit) as stop:
        main([*words, str(tmp_path / "drawn")])
    assert stop.value.code == 2
    assert "images from number 4 on did not come" in capsys.readouterr().err
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == NUM // 2  # every second micro-batch


def test_a_damaged_image_is_named(words, tmp_path, capsys):
    out = tmp_path / "drawn"
    main([*words, str(out)])
    (out / "000005.png").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        main([*words, str(out)])
    assert stop.value.code == 2
    assert "000005.png is damaged: remove it and run again" in capsys.readouterr().err


def test_an_evaluation_uses_exactly_the_sampled_images(run, words, tmp_path):
    main([*words, str(tmp_path / "drawn"), "--classes", "red,green"])
    asked = ["evaluate", str(run), "--num", "10", "--classes", "red,green", "--device", "cpu"]
    main([*asked, "--out", str(tmp_path / "evaluated")])
    images = np.concatenate(list(shards.read_chunks(tmp_path / "evaluated/samples", 10, 4, "images")))
    for number, pixels in enumerate(images):
        assert np.array_equal(pixels, np.asarray(Image.open(tmp_path / f"drawn/{number:06d}.png")))


def test_sampled_latents_have_the_same_bits_in_numbered_files_and_in_the_final_array(tmp_path):
    """Pixels are rounded, latents are not: here the last bit counts."""
    from dit_in_dit.config.run import DataConfig, RunConfig, SampleConfig
    from dit_in_dit.config.training import TrainConfig

    images = np.random.default_rng(0).standard_normal((12, 4, 8, 8), np.float32)
    np.savez(tmp_path / "latents.npz", images=images, labels=np.arange(12) % 3)
    config = RunConfig(
        model=replace(small_model("outer*1 inner*1"), image_size=(8, 8), channels=4, num_classes=3),
        data=DataConfig(source=str(tmp_path / "latents.npz"), held_out=0),
        train=TrainConfig(
            steps=8, batch_size=4, learning_rate=0.03, precision="float32", sample_every=0, evaluate_every=0
        ),
        sample=SampleConfig(steps=4, guidance=2.0, micro_batch=4),
    )
    for _ in train(config, tmp_path / "run", device="cpu"):
        pass
    out = tmp_path / "drawn"
    words = ["sample", str(tmp_path / "run"), "--device", "cpu", "--out", str(out)]
    main([*words, "--num", "6", "--batch", "1"])  # on some CPUs, a batch of one gives other bits than larger batches
    kept = (out / "000005.npy").stat().st_mtime_ns
    main([*words, "--num", "9", "--batch", "7"])
    assert (out / "000005.npy").stat().st_mtime_ns == kept
    saved = Checkpoint.open(tmp_path / "run")
    model, config = saved.model(torch.device("cpu")), saved.config
    expected = torch.cat([images for _, images in sample_batches(model, config, range(9))]).numpy()
    with np.load(out / "samples.npz") as found:
        assert np.array_equal(found["images"], expected)
    assert np.array_equal(np.load(out / "000008.npy"), expected[8])
    assert Image.open(out / "grid.png").size > (100, 100)
