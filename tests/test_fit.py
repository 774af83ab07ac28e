"""Sampling and evaluation fitted to the device: precision, micro-batches, compilation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from conftest import perturbed, small_model, with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig, SampleConfig
from dit_in_dit.inspection.trace import inspect
from dit_in_dit.metrics.report import compare_evaluations
from dit_in_dit.model import compiled
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.images import check_finite
from dit_in_dit.runtime.device import resolve_sample_precision
from dit_in_dit.sampling import fit
from dit_in_dit.sampling.guide import Guide
from dit_in_dit.sampling.numbered import sample, sample_batches
from dit_in_dit.training.loop import train

CUDA = torch.device("cuda")


def with_sample(config: RunConfig, **keys) -> RunConfig:
    return replace(config, sample=replace(config.sample, **keys))


@pytest.fixture
def run(run_config, tmp_path) -> Path:
    list(train(with_train(run_config, steps=2, evaluate_every=0), tmp_path / "run", device="cpu"))
    return tmp_path / "run"


def command(*words: object) -> int:
    try:
        main([*map(str, words), "--device", "cpu"])
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_samples_are_drawn_in_the_runs_precision_on_cuda_and_in_float32_elsewhere(trained):
    config = with_train(RunConfig(), precision=trained)
    assert resolve_sample_precision(config, CUDA).sample.precision == trained
    for device in ("cpu", "mps"):
        assert resolve_sample_precision(config, torch.device(device)).sample.precision == "float32"
    for given in ("float32", "bfloat16"):
        assert resolve_sample_precision(with_sample(config, precision=given), CUDA).sample.precision == given


def test_samples_in_bfloat16_differ_by_rounding(run_config):
    model = perturbed(NestedDiT(run_config.model)).eval()
    single, auto = (sample(model, with_sample(run_config, precision=how), 3) for how in ("float32", "auto"))
    half = sample(model, with_sample(run_config, precision="bfloat16"), 3)
    assert torch.equal(single, auto)
    assert half.dtype == torch.float32
    assert 0 < (half - single).abs().max() < 0.1 * single.abs().max()
    with torch.no_grad():
        model.heads[0].final.linear.bias.fill_(torch.inf)
    with pytest.raises(UserError, match="hold NaN"):
        check_finite(sample(model, with_sample(run_config, precision="bfloat16"), 1))


def test_a_guide_computes_in_the_precision_of_the_samples(run_config):
    model, weak = (perturbed(NestedDiT(run_config.model), seed).eval() for seed in (0, 1))
    guide, seen = Guide("weak", weak, run_config, ("red", "green", "blue")), set()
    weak.outer_blocks[0].branches["mix"].qkv.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    drawn = {}
    for how in ("float32", "bfloat16"):
        batches = sample_batches(model, with_sample(run_config, precision=how), range(3), guide=guide)
        drawn[how] = torch.cat([images for _, images in batches])
        assert seen == {getattr(torch, how)}
        seen.clear()
    single, half = drawn.values()
    assert half.dtype == torch.float32
    assert 0 < (half - single).abs().max() < 0.1 * single.abs().max()
    assert not torch.allclose(single, sample(model, run_config, 3))  # the guide moves the samples


def test_the_precision_is_part_of_a_folders_and_an_evaluations_protocol(run, tmp_path, capsys):
    half = ("--precision", "bfloat16")
    assert command("sample", run, "-n", 2, *half, "--out", tmp_path / "half") == 0
    identity = json.loads((tmp_path / "half/samples.json").read_text())
    assert identity["samples"]["precision"] == "bfloat16"
    assert command("sample", run, "-n", 3, "--out", tmp_path / "half") == 2
    assert 'samples.precision: "bfloat16" / "float32"' in capsys.readouterr().err
    for name, options in (("a", ()), ("b", half)):
        assert command("evaluate", run, "-n", 4, *options, "--out", tmp_path / name) == 0
    with pytest.raises(UserError, match=r"samples\.precision: .*float32.* / .*bfloat16"):
        compare_evaluations([tmp_path / "a", tmp_path / "b"])
    assert command("sample", run, "--precision", "float8") == 2
    assert "sample.precision must be one of auto, float32, bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("size", [8, 16, 64, 256])
def test_micro_batches_fill_half_of_the_memory(size):
    model = small_model()
    needed = 2 * (2 * size * inspect(model)["activation_bytes"]["total"])  # guidance doubles the images
    assert fit.fitting_micro_batch([model], needed) == size
    assert fit.fitting_micro_batch([model], 1.9 * needed) == size
    assert fit.fitting_micro_batch([model], needed - 1) == max(8, size // 2)
    assert fit.fitting_micro_batch([model], 1e15) == 256
    assert fit.fitting_micro_batch([model, model], 2 * needed) == size  # with a guide
    assert fit.fitting_micro_batch([model, model], 2 * needed - 1) == max(8, size // 2)
    assert fit.fitting_micro_batch([model], 0) == SampleConfig().micro_batch  # a CPU


def test_a_given_micro_batch_is_kept(run_config, monkeypatch):
    model = NestedDiT(run_config.model)
    assert fit.fit_to_device(model, run_config).sample.micro_batch == 8
    monkeypatch.setattr(fit, "device_memory", lambda device: 1e12)
    assert fit.fit_to_device(model, run_config).sample.micro_batch == 256
    weak = Guide("weak", NestedDiT(run_config.model), run_config, ())
    monkeypatch.setattr(
        fit, "device_memory", lambda device: 4 * 64 * inspect(run_config.model)["activation_bytes"]["total"]
    )
    assert fit.fit_to_device(model, run_config).sample.micro_batch == 64
    assert fit.fit_to_device(model, run_config, weak).sample.micro_batch == 32
    assert fit.fit_to_device(model, run_config, given=True).sample.micro_batch == 8
    assert fit.fit_to_device(model, with_sample(run_config, micro_batch=5)).sample.micro_batch == 5


def test_samples_of_a_compiled_model_are_the_same_but_for_rounding(run, tmp_path, monkeypatch, capsys):
    graphs = []
    monkeypatch.setattr(compiled, "BACKEND", lambda module, inputs: graphs.append(module) or aot_eager(module, inputs))
    assert command("sample", run, "-n", 9, "--out", tmp_path / "eager") == 0
    assert not graphs  # auto, on a CPU
    assert command("sample", run, "-n", 9, "--compile", "true", "--out", tmp_path / "compiled") == 0
    assert 2 <= len(graphs) <= 4  # two kinds; guided steps have twice the images
    made = len(graphs)
    assert command("sample", run, "-n", 9, "--compile", "true", "--guide", run, "--out", tmp_path / "guided") == 0
    assert len(graphs) == 3 * made  # the model again, and its guide
    eager, other = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("eager", "compiled"))
    assert other["made on"].pop("compiled") is True
    assert eager == other
    for number in range(9):
        images = [(tmp_path / name / f"{number:06d}.png").read_bytes() for name in ("eager", "compiled")]
        assert images[0] == images[1]
    assert command("sample", run, "-n", 9, "--out", tmp_path / "compiled") == 2
