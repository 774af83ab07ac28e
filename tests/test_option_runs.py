"""Runs of models with the field's options: training, resumption, processes, doctor, maps, benchmark and exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import SHARDED, inputs, only_full, perturbed, small_model, with_train
from dit_in_dit.attention_maps.figures import figures
from dit_in_dit.attention_maps.findings import findings, not_shown
from dit_in_dit.attention_maps.page import page
from dit_in_dit.attention_maps.record import record_maps
from dit_in_dit.benchmark.parts import part_macs, part_seconds, profile_by_part, subject_for_parts
from dit_in_dit.cli import main
from dit_in_dit.config.model import TokensConfig
from dit_in_dit.config.run import RunConfig, SampleConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.inspection.hooks import watch_heads
from dit_in_dit.interop.export_pipeline import export
from dit_in_dit.interop.pipeline import DiTInDiTPipeline
from dit_in_dit.model.layers import attention_weights
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training.loop import train
from dit_in_dit.training.trainer import Trainer
from options import toy
from processes import run_together
from test_maps import maps_of, run_of, views

NESTED = ("ddt", "deco", "pixnerd", "pixeldit", "rae", "raev2", "mpdit")
CPU = torch.device("cpu")
FROZEN = "time_embed.frequencies"
# Random frequencies, one adaLN for all blocks of both levels, and tokens of time and class at both levels.
MIXED = small_model(
    "outer*2 inner",
    image_size=(8, 8),
    num_classes=3,
    time_embed="gauss",
    silu_twice=True,
    tokens=TokensConfig(label=2, time=1, rows="own", start=1),
    outer={"modulation": "shared", "rope": "grid", "norm": "rms"},
    inner={"modulation": "shared", "width": 32, "num_heads": 4, "mixer": "image", "spread": "refine", "mlp": "swiglu"},
)


@pytest.fixture
def mixed(run_config: RunConfig) -> RunConfig:
    """A run of four steps of `MIXED`, whose weights decay."""
    config = replace(run_config, model=MIXED)
    return with_train(config, steps=4, checkpoint_every=2, evaluate_every=2, weight_decay=0.1, accumulate=2, warmup=1)


def trained(config: RunConfig, out: Path, **options: Any) -> str:
    """Train a run; returns its log."""
    for _ in train(config, out, device="cpu", **options):
        pass
    return (out / "log.jsonl").read_text()


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("reduction", ["fast", "fixed"])
def test_random_frequencies_are_kept_and_never_trained(mixed, reduction, tmp_path):
    config = with_train(mixed, reduction=reduction)
    torch.manual_seed(config.seed)
    begun = NestedDiT(config.model).get_parameter(FROZEN).detach()
    trained(config, tmp_path / "run")
    folder = newest(tmp_path / "run")
    state, averaged = (load_tensors(folder / f"{name}.safetensors") for name in ("state", "ema"))
    assert torch.equal(state[f"model.{FROZEN}"], begun)
    assert torch.equal(averaged[FROZEN], begun)
    assert not [name for name in state if name.startswith("optimizer") and FROZEN in name]
    assert any(name.startswith("optimizer.exp_avg.shared_modulation") for name in state)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_optimizer_has_only_trained_parameters(mixed, scale):
    config = with_train(mixed, lr_scale=replace(mixed.train.lr_scale, inner=scale))
    trainer = Trainer(config, open_source(config.data, config.model), CPU)
    taken = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert {name for name, weight in trainer.weights.items() if id(weight) not in taken} == {FROZEN}


def test_a_run_with_random_frequencies_resumes_bit_for_bit(mixed, tmp_path):
    whole = trained(mixed, tmp_path / "whole")
    trained(mixed, tmp_path / "parts", until=2)
    assert trained(mixed, tmp_path / "parts", resume=True) == whole
    for name in ("state", "ema"):
        one, two = (load_tensors(newest(tmp_path / run) / f"{name}.safetensors") for run in ("whole", "parts"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        only_full({"parallel": "ddp"}),
        only_full({"reduction": "fixed"}),
        pytest.param({"parallel": "fsdp"}, marks=SHARDED.marks),
    ],
    ids=str,
)
def test_two_processes_train_random_frequencies_and_shared_modulation(mixed, how, tmp_path):
    config = with_train(mixed, **how)
    logs = [trained(with_train(config, parallel="ddp"), tmp_path / "alone")]
    logs += run_together(2, trained, config, tmp_path / "run")[:1]
    losses = [[line["loss"] for line in map(json.loads, log.splitlines()) if "loss" in line] for log in logs]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    one, two = (load_tensors(newest(tmp_path / run) / "ema.safetensors") for run in ("alone", "run"))
    assert one.keys() == two.keys()
    assert torch.equal(one[FROZEN], two[FROZEN])


# ------------------------------------------------------------------------------------------ inspection


def test_doctor_examines_a_run_with_tokens_and_random_frequencies(mixed, tmp_path):
    trained(mixed, tmp_path / "run")
    report = examine(mixed, CPU, tmp_path / "run")
    said = [finding.seen for section in report.sections for finding in section.findings]
    assert not [text for text in said if "never got a gradient" in text], said
    rows = next(section.rows for section in report.sections if section.title.startswith("attention"))
    # Eight by eight images of four patches; three tokens join at the second block and go along.
    assert {name: row["length"] for name, row in rows.items()} == {
        "outer_blocks.0": 4, "outer_blocks.1": 7, "inner_blocks.0": 19,
    }  # fmt: skip


@pytest.mark.parametrize("family", NESTED)
def test_doctor_examines_published_models(family, mixed, tmp_path, full):
    if not full and family not in ("pixnerd", "pixeldit"):
        pytest.skip("with --full")
    config = with_train(replace(mixed, model=toy(family, image_size=(8, 8), patch_size=4)), steps=6, accumulate=1)
    trained(config, tmp_path / "run")
    report = examine(config, CPU, tmp_path / "run")
    said = [finding.seen for section in report.sections for finding in section.findings]
    assert not [text for text in said if "never got a gradient" in text or "not finite" in text], said


def test_maps_show_patches_and_say_what_tokens_get():
    tokens = TokensConfig(label=2, time=1, start=1)
    maps = maps_of("outer*2 inner", tokens=tokens, outer={"rope": "grid"})
    assert maps.outer.entropy.shape[-1] == maps.outer.received.shape[-1] == 8  # patches
    np.testing.assert_allclose(maps.outer.received.mean(-1), 1, rtol=1e-5)
    net = perturbed(NestedDiT(maps.config.model), 0)
    torch.manual_seed(0)
    net = perturbed(NestedDiT(maps.config.model))
    shares = []

    def look(name: str, q: torch.Tensor, k: torch.Tensor) -> None:
        if name == "outer_blocks.1":
            weights = attention_weights(q, k)[..., 3:, :]
            shares.append(float(weights[..., :3].sum(-1).mean()))
            among = weights[..., 3:] / weights[..., 3:].sum(-1, keepdim=True)
            torch.testing.assert_close(torch.from_numpy(maps.outer.reach[0, 0, 1]), among[0, 0].float())

    seen = views(maps.config.model)
    x_t = torch.from_numpy(maps.noisy[0, 0])[None]
    with watch_heads(net, look), torch.no_grad():
        net(x_t, torch.tensor([seen.times[0]]), torch.tensor(seen.labels[:1]))
    assert 0 < maps.outer.beside < 1
    text = " ".join(findings(maps))
    assert f"In outer blocks that see tokens of time and class, these get {maps.outer.beside:.0%} of" in text
    assert maps_of("outer*2 inner").outer.beside == 0
    assert "tokens of time" not in " ".join(findings(maps_of("outer*2 inner")))


@pytest.mark.parametrize("family", NESTED)
def test_maps_of_a_published_model_have_a_page_and_figures(family, full):
    if not full and family not in ("mpdit", "pixeldit"):
        pytest.skip("with --full")
    config = run_of(toy(family))
    torch.manual_seed(0)
    maps = record_maps(perturbed(NestedDiT(config.model)), config, views(config.model), samples=2)
    assert "<html" in page(maps, ("a", "b", "c"), "toy", 4)
    drawn = {name for name, _, _ in figures(maps, ("a", "b", "c"))}
    assert drawn >= {"attention-over-t.png", "outer-attention.png", "contribution.png"}
    reasons = " ".join(not_shown(config.model))
    assert (maps.inner is None) == (config.model.inner.mixer in ("none", "compact"))
    assert ("No inner attention" in reasons) == (maps.inner is None)
    if config.model.inner.mixer == "compact":
        assert "compacted to one token" in reasons
    assert bool(maps.outer.beside) == bool(config.model.tokens.count)
    assert bool(maps.inner and maps.inner.beside) == config.model.carries_tokens


@pytest.mark.parametrize(
    "model",
    [MIXED, toy("pixeldit"), toy("pixnerd"), small_model("outer*2", outer={"modulation": "shared"})],
    ids=["mixed", "pixeldit", "pixnerd", "plain"],
)
def test_benchmark_times_every_part_that_has_macs(model):
    subject = subject_for_parts(RunConfig(model=model, train=replace(RunConfig().train, batch_size=2)), CPU)
    parts = part_seconds(subject)
    assert {part for part, count in part_macs(subject).items() if count} <= parts.keys()
    found = profile_by_part(subject, steps=1)
    if model.outer.norm == "rms":
        assert found["outer_blocks"]["norms"] > 0


# ------------------------------------------------------------------------------------------ exports


def saved_run(family: str, folder: Path) -> tuple[Path, NestedDiT]:
    """A run folder with weights of a toy model."""
    config = RunConfig(model=toy(family), sample=SampleConfig(sampler="euler", steps=2, guidance=2.0))
    torch.manual_seed(0)
    net = perturbed(NestedDiT(config.model)).eval()
    create_run(folder, config)
    weights = net.state_dict()
    checkpoint.save(
        folder, config, 3, {f"model.{name}": value for name, value in weights.items()}, weights, ("a", "b", "c")
    )
    return folder, net


@pytest.mark.parametrize("family", NESTED)
def test_a_published_model_is_a_pipeline_that_loads_bit_for_bit(family, tmp_path, full):
    if not full and family not in ("raev2", "pixeldit", "mpdit"):
        pytest.skip("with --full")
    run, net = saved_run(family, tmp_path / "run")
    export(run, tmp_path / "folder")
    pipe = DiTInDiTPipeline.from_pretrained(tmp_path / "folder")
    x, t, y = inputs(net.config)
    assert torch.equal(pipe.transformer(x, t, y).sample, net(x, t, y))
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a", num_inference_steps=2).images[0].size == (net.config.image_size[1], net.config.image_size[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["jit", *NESTED])
def test_onnx_gives_the_outputs_of_a_published_model(family, tmp_path, full):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    if not full and family != "mpdit":
        pytest.skip("with --full")
    run, net = saved_run(family, tmp_path / "run")
    main(["export", str(run), "--format", "onnx", "--out", str(tmp_path / "model.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x, t, y = inputs(net.config, count)
        (found,) = session.run(["prediction"], {"x": x.numpy(), "t": t.numpy(), "y": y.numpy()})
        np.testing.assert_allclose(found, net(x, t, y).detach().numpy(), rtol=1e-4, atol=1e-5)
