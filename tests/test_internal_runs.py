"""Training with the loss of a weak head: resume, processes, compilation, doctor, maps, export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dit_in_dit as dd
from conftest import SHARDED, inputs, perturbed, small_model
from dit_in_dit.cli import main
from dit_in_dit.config.run import DataConfig, RunConfig, SampleConfig
from dit_in_dit.config.terms import TermsConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.model import compiled
from dit_in_dit.model.compiled import compile_blocks
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training.loop import train
from processes import run_together

CPU = torch.device("cpu")
MODELS = {
    "outer head": small_model("outer*1 inner*1", image_size=(8, 8), num_classes=3),
    "internal head": small_model("outer*3", image_size=(8, 8), num_classes=3, internal_head=1),
}


def config_of(folder: Path, name: str, **keys: Any) -> RunConfig:
    usual: dict[str, Any] = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "ema": 0.9, "precision": "float32"}
    usual |= {"checkpoint_every": 2, "sample_every": 4, "evaluate_every": 2, "terms": TermsConfig(internal=0.5)}
    sample = SampleConfig(steps=2, sampler="euler", internal_guidance=1.5)
    data = DataConfig(source=str(folder), held_out=0.2)
    return RunConfig(seed=3, model=MODELS[name], data=data, train=TrainConfig(**usual | keys), sample=sample)


def trained(config: RunConfig, out: Path, **options: Any) -> str:
    """Train a run; returns its log."""
    for _ in train(config, out, device="cpu", **options):
        pass
    return (out / "log.jsonl").read_text()


def tensors(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return {
        f"{name} {k}": v for name in ("state", "ema") for k, v in load_tensors(newest / f"{name}.safetensors").items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_stopped_run_ends_with_the_same_bits(folder, tmp_path, name):
    config = config_of(folder, name, accumulate=2, recompute="both", precision="bfloat16")
    whole = trained(config, tmp_path / "whole")
    trained(config, tmp_path / "parts", until=1)
    assert trained(config, tmp_path / "parts", resume=True) == whole
    one, two = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    pictures = [(tmp_path / run / "samples").glob("*.png") for run in ("whole", "parts")]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]
    assert all("loss.internal" in line for line in map(json.loads, whole.splitlines()) if "loss" in line)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"parallel": "ddp"}, pytest.param({"parallel": "fsdp"}, marks=SHARDED.marks)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_agree_with_one(folder, tmp_path, how, name, full):
    if not full and ("outer" in name) == ("fsdp" in how.values()):
        pytest.skip("with --full")
    config = config_of(folder, name, accumulate=2, **how)
    logs = [trained(config_of(folder, name, accumulate=2), tmp_path / "alone")]
    logs += run_together(2, trained, config, tmp_path / "run")[:1]
    for key in ("loss", "loss.internal"):
        values = [[line[key] for line in map(json.loads, log.splitlines()) if key in line] for log in logs]
        assert len(values[0]) == 4
        np.testing.assert_allclose(*values, rtol=1e-4)
    one, two = tensors(tmp_path / "alone"), tensors(tmp_path / "run")
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one if key.startswith("ema"))


def test_compiled_blocks_give_both_predictions_without_a_graph_break(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    config = small_model("outer*2 inner*1", internal_head=1)
    net = perturbed(NestedDiT(config))
    given = inputs(config)
    plain = net(*given, weak=True)
    compile_blocks(net)
    for expected, got in zip(plain, net(*given, weak=True), strict=True):
        torch.testing.assert_close(got, expected)


def test_an_exported_program_computes_the_prediction_alone():
    config = small_model("outer*2 inner*1", internal_head=1)
    net = perturbed(NestedDiT(config)).eval()
    x, t, y = inputs(config)
    program = torch.export.export(net, (x, t, y)).module()
    torch.testing.assert_close(program(x, t, y), net(x, t, y))


def test_doctor_and_maps_work_with_an_internal_head(folder, tmp_path, capsys):
    config = config_of(folder, "internal head", steps=6)
    trained(config, tmp_path / "run")
    report = examine(config, CPU, tmp_path / "run")
    said = [finding.seen for section in report.sections for finding in section.findings]
    assert not [text for text in said if "never got a gradient" in text], said
    model = replace(config.model, stages="outer*2 inner*1")
    trained(replace(config, model=model), tmp_path / "nested")
    main(["maps", str(tmp_path / "nested"), "--num", "2", "--steps", "2", "--device", "cpu"])
    assert (tmp_path / "nested/maps/maps.html").stat().st_size > 10_000


def test_inspect_compares_with_a_plain_model_without_an_internal_head(capsys):
    sets = ["--set", "model.internal_head=3", "--set", "train.terms.internal=0.5"]
    main(["inspect", "--preset", "emoji", *sets])
    lines = [line for line in capsys.readouterr().out.splitlines() if "internal head" in line]
    assert len(lines) == 4  # flow, parameters, MACs, bytes
    assert dd.inspect(dd.preset("emoji", *sets[1::2]))["parameters"]["internal_head"] > 0
