"""MFU and peak memory of a run, in `timing.jsonl` and in progress bars."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from conftest import with_train
from dit_in_dit.cli import main
from dit_in_dit.config import presets
from dit_in_dit.config.files import to_yaml
from dit_in_dit.curves.logs import read_run
from dit_in_dit.inspection.gpus import DRIVER_NAMES, GPUS, peak_flops
from dit_in_dit.runtime.memory import peak_memory
from dit_in_dit.training.event import Event, progress_text
from dit_in_dit.training.loop import train
from dit_in_dit.training.utilization import Utilization

XL2 = with_train(presets.get("dit-xl2"), precision="bfloat16")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def fake(monkeypatch):
    """Make torch see a device of a name, with 5 GB as its peak."""

    def see(name: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 10**9)

    return see


def test_mfu_equals_a_computation_by_hand(fake):
    fake("NVIDIA H100 80GB HBM3")
    model = replace(XL2.model, learn_variance=False)
    assert not model.learn_variance
    # DiT-XL/2: 118.6 GMACs forward, the "Gflops" of the paper; 2 FLOPs per MAC; backward costs two forward passes.
    flops = 118_616_702_976 * 2 * 3 * 800  # at 800 images per second
    usage = Utilization(replace(XL2, model=model), CUDA, 2, {}).read(800)
    assert usage == {"mfu": pytest.approx(flops / (2 * 989e12), rel=1e-2), "memory": 5 * 10**9}
    recomputed = Utilization(with_train(replace(XL2, model=model), recompute="both"), CUDA, 2, {})
    assert recomputed.read(800) == usage


@pytest.mark.parametrize(
    ("name", "keys", "objects"),
    [
        ("NVIDIA H100 PCIe", {}, {}),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", {}, {}),
        ("NVIDIA GH200 480GB", {}, {}),
        ("NVIDIA H200", {"precision": "float32"}, {}),
        ("NVIDIA H200", {}, {"model": "mine.Model"}),
    ],
)
def test_mfu_is_absent_where_the_peak_or_the_cost_is_unknown(fake, name, keys, objects):
    fake(name)
    assert Utilization(with_train(XL2, **keys), CUDA, 1, objects).read(800) == {"memory": 5 * 10**9}


def test_every_driver_name_is_that_of_a_known_gpu():
    assert set(DRIVER_NAMES.values()) == set(GPUS)
    assert peak_flops("NVIDIA H200") == peak_flops("H200") == 989e12


GROWTH = """
import torch
from dit_in_dit.runtime.memory import peak_memory
cpu, start = torch.device("cpu"), peak_memory(torch.device("cpu"))
block = torch.ones(2**26)  # 256 MB
with_block = peak_memory(cpu)
del block
print(with_block - start, peak_memory(cpu) - with_block)
"""


def test_peak_memory_of_a_cpu_grows_with_what_is_used_and_stays():
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    grown, after = map(int, done.stdout.split())
    assert 2**28 * 0.95 <= grown < 2**29
    assert after > -0.01 * grown  # the kernel's counters of pages are approximate
    assert peak_memory(torch.device("meta")) is None


def test_timing_lines_have_memory_on_a_cpu_and_are_read_with_older_lines(run_config, tmp_path):
    list(train(run_config, tmp_path / "run", device="cpu"))
    path = tmp_path / "run/timing.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [set(line) for line in lines] == [{"step", "seconds", "images_per_second", "memory"}] * len(lines)
    older = {key: value for key, value in lines[0].items() if key in ("step", "seconds")}
    path.write_text("".join(json.dumps(line) + "\n" for line in [older, *lines[1:]]))
    assert read_run(tmp_path / "run").timed.tolist() == [line["step"] for line in lines]
    longer = with_train(run_config, steps=7)
    list(train(longer, tmp_path / "run", device="cpu", resume=True))
    assert read_run(tmp_path / "run").timed[-1] == 7


def test_progress_bars_show_speed_mfu_and_memory_where_known(run_config, tmp_path, monkeypatch, capsys):
    assert progress_text(Event("step", 1, {"loss": 0.5, "images_per_second": 81.2})) == "loss 0.5000  81 images/s"
    monkeypatch.setattr(Utilization, "read", lambda self, speed: {"mfu": 0.414, "memory": 12_340_000_000})
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "run.yaml").write_text(to_yaml(run_config))
    main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "cli"), "--device", "cpu"])
    assert "images/s  MFU 41%  12.3 GB" in capsys.readouterr().err
    train(run_config, tmp_path / "notebook", device="cpu").run()
    assert "images/s  MFU 41%  12.3 GB" in capsys.readouterr().err
    last = json.loads((tmp_path / "cli/timing.jsonl").read_text().splitlines()[-1])
    assert (last["mfu"], last["memory"]) == (0.414, 12_340_000_000)
