"""Muon: torch.optim.Muon's steps on separated matrices, the weights that it trains, its state, processes and cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import SHARDED, small_model, with_train
from dit_in_dit.cli import main
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.field import FAMILIES, PUBLISHED
from dit_in_dit.data.sources import open_source
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.inspection import launch_plan
from dit_in_dit.inspection.optimizer_cost import moments, moments_per_weight, step_macs
from dit_in_dit.model.layers import Attention
from dit_in_dit.model.matrices import block_matrices
from dit_in_dit.model.mixers import CompactMixer
from dit_in_dit.model.mlps import GeluMlp, SwiGlu
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training import muon as muon_module
from dit_in_dit.training.loop import train
from dit_in_dit.training.muon import MuonAdamW, matrix_groups, orthogonalised
from dit_in_dit.training.trainer import Trainer
from processes import run_together

CPU = torch.device("cpu")
SHAPES = {"fused": (48, 16, 3), "square": (16, 16, 1), "wide": (16, 40, 1), "tall": (64, 16, 2), "other": (16, 16, 0)}
FIRST_OF_FAMILY = {family: name for name, (family, *_) in reversed(PUBLISHED.items())}
OWN = [name for name in presets.NAMES if name not in PUBLISHED]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, columns, generator=draw) for name, (rows, columns, _) in SHAPES.items()}


def muon_of(weights: dict[str, nn.Parameter], adjust: str = "original", **keys) -> MuonAdamW:
    groups = [{"params": [weight], "parts": SHAPES[name][2]} for name, weight in weights.items()]
    return MuonAdamW(groups, adjust=adjust, **{"scale": 1.0, "lr": 0.01, "weight_decay": 0.1, "fused": True, **keys})


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(weight) for name, weight in tensors(seed).items()}


# ------------------------------------------------------------------------------------------ the step


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9 has no Muon")
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_steps_are_those_of_torchs_muon_on_separated_matrices(adjust, monkeypatch):
    monkeypatch.setattr(muon_module, "bfloat16_is_native", lambda device: True)  # as torch's, on every CPU
    ours, theirs = parameters(), {}
    for name, weight in ours.items():
        theirs[name] = [nn.Parameter(m.clone()) for m in weight.detach().chunk(max(1, SHAPES[name][2]))]
    optimizer = muon_of(ours, adjust, scale=2.0)
    flat = [matrix for name, matrices in theirs.items() for matrix in matrices if SHAPES[name][2]]
    oracles = [
        torch.optim.Muon(flat, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust),
        torch.optim.AdamW(theirs["other"], lr=0.01, weight_decay=0.1, fused=True),
    ]
    for step in range(4):
        optimizer.found_inf = torch.zeros(())
        for name, gradient in tensors(step + 1).items():
            ours[name].grad = gradient
            for matrix, part in zip(theirs[name], gradient.chunk(len(theirs[name])), strict=True):
                matrix.grad = part.clone()
        for one in (optimizer, *oracles):
            one.step()
    for name, weight in ours.items():
        torch.testing.assert_close(weight.detach(), torch.cat(theirs[name]).detach(), rtol=0, atol=1e-6)


def test_matrices_of_different_size_do_not_share_a_norm_and_singular_values_come_near_one():
    draw = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 24, 40, generator=draw) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    values = torch.linalg.svdvals(orthogonalised(matrices).float())
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert not orthogonalised(torch.zeros(1, 4, 4)).any()


def test_devices_without_bfloat16_orthogonalise_in_float32(monkeypatch):
    matrices = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    results = {}
    for native in (True, False):
        monkeypatch.setattr(muon_module, "bfloat16_is_native", lambda device, native=native: native)
        results[native] = orthogonalised(matrices)
    assert [each.dtype for each in results.values()] == [torch.bfloat16, torch.float32]
    x = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
    a, b, c = muon_module.COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(results[False].double(), x, rtol=0, atol=1e-4)
    torch.testing.assert_close(results[True].double(), x, rtol=0, atol=0.1)


def test_a_skipped_step_changes_neither_weights_nor_state_and_leaves_no_trace():
    runs = []
    for faults in ([], [0, 2]):
        weights = parameters()
        optimizer = muon_of(weights)
        for step in range(4):
            for bad in (True, False) if step in faults else (False,):
                optimizer.found_inf = torch.tensor(float(bad))
                for name, gradient in tensors(step + 1).items():
                    weights[name].grad = torch.full_like(gradient, torch.nan) if bad else gradient
                optimizer.step()
        state = [value for weight in weights.values() for value in optimizer.state[weight].values()]
        runs.append([*(weight.detach() for weight in weights.values()), *state])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_direction_is_the_first_step_divided_by_the_learning_rate():
    weights = parameters()
    optimizer = muon_of(weights, "match_rms_adamw", scale=3.0, weight_decay=0.0)
    for name, gradient in tensors(1).items():
        weights[name].grad = gradient
    optimizer.step()
    for name, weight in weights.items():
        direction = optimizer.direction(weight)
        if name == "other":
            assert direction is None
        else:
            torch.testing.assert_close(weight.detach(), tensors(0)[name] - 0.01 * direction, rtol=0, atol=2e-3)


# ------------------------------------------------------------------------------------------ which weights


def expected(model: NestedDiT) -> dict[str, int]:
    """Matrices of blocks, by the classes of the layers that this package has."""
    counts = {}
    for path, module in model.named_modules():
        if isinstance(module, Attention):
            layers = {"qkv": 3, "proj": 1}
        elif isinstance(module, CompactMixer):
            layers = {"compress": 1, "expand": 1}
        elif isinstance(module, SwiGlu):
            layers = {"up": 2, "down": 1}
        elif isinstance(module, GeluMlp):
            layers = {"0": 1, "2": 1}
        else:
            continue
        counts |= {f"{path}.{layer}.weight": count for layer, count in layers.items()}
    return counts


@pytest.mark.parametrize("name", [*OWN, *PUBLISHED])
def test_every_parameter_of_every_preset_is_in_the_right_group(name, full):
    if not full and name not in ("emoji", "emoji-reference", "dit-s2", *FIRST_OF_FAMILY.values()):
        pytest.skip("with --full")
    assert FIRST_OF_FAMILY.keys() == FAMILIES.keys()
    with torch.device("meta"):
        model = NestedDiT(presets.get(name).model)
    groups = [{"params": [weight for weight in model.parameters() if weight.requires_grad], "scale": 1.0}]
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = [(names[id(w)], group["parts"]) for group in matrix_groups(groups, model) for w in group["params"]]
    assert len(found) == len(groups[0]["params"]) == len(dict(found))
    assert {name: count for name, count in found if count} == expected(model)


class Doubled(nn.Linear):
    """A plug-in's layer with a matrix of its own and a fused weight."""

    stacked = {"both": 2}  # noqa: RUF012

    def __init__(self):
        super().__init__(8, 8)
        self.table, self.both = nn.Parameter(torch.zeros(3, 8)), nn.Linear(8, 4)


def test_two_dimensional_weights_of_a_plugin_inside_blocks_are_matrices():
    model = nn.ModuleDict(
        {"inner_blocks": nn.ModuleList([nn.ModuleDict({"branches": nn.ModuleDict({"mix": Doubled()})})])}
    )
    root = "inner_blocks.0.branches.mix"
    assert block_matrices(model) == {f"{root}.weight": 1, f"{root}.table": 1, f"{root}.both.weight": 2}
    model.get_submodule(root).both = nn.Linear(8, 3)
    with pytest.raises(UserError, match=r"both\.weight: `stacked` must divide the 3 rows of the weight: got 2"):
        block_matrices(model)
    with pytest.raises(UserError, match="needs a model with matrices in blocks: got none; set adamw"):
        matrix_groups([{"params": [], "scale": 1.0}], nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------ runs


@pytest.fixture
def muon(run_config):
    """A run whose matrices have rows that two processes cannot share equally (qkv: 3 * 12, inner up: 2 * 10)."""
    inner, outer = {"width": 8, "mlp": "swiglu", "mlp_ratio": 2.0}, {"width": 12, "num_heads": 3, "mlp_ratio": 1.25}
    config = replace(
        run_config, model=small_model("outer inner", image_size=(8, 8), num_classes=3, inner=inner, outer=outer)
    )
    keys = {"optimizer": "muon", "weight_decay": 0.1, "accumulate": 2, "warmup": 2}
    return with_train(config, **keys, lr_scale=replace(config.train.lr_scale, inner=0.5))


def trained(config, out: Path, *parts: int) -> str:
    """Train in one go, or up to each of `parts` and then to the end; returns the log."""
    for number, until in enumerate((*parts, None)):
        list(train(config, out, device="cpu", until=until, resume=number > 0))
    return (out / "log.jsonl").read_text()


def saved(run: Path) -> dict[str, torch.Tensor]:
    folder = sorted((run / "checkpoints").iterdir())[-1]
    return {
        f"{name}.{key}": t
        for name in ("state", "ema")
        for key, t in load_tensors(folder / f"{name}.safetensors").items()
    }


def assert_same(one: Path, two: Path) -> None:
    a, b = saved(one), saved(two)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_a_run_resumes_bit_for_bit_and_keeps_one_moment_of_matrices(muon, tmp_path):
    assert trained(muon, tmp_path / "parts", 2, 4) == trained(muon, tmp_path / "whole")
    assert_same(tmp_path / "parts", tmp_path / "whole")
    kept = {
        key.split(".", 2)[2] for key in saved(tmp_path / "whole") if key.startswith("state.optimizer.momentum_buffer")
    }
    assert {name.removeprefix("momentum_buffer.") for name in kept} == block_matrices(NestedDiT(muon.model)).keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{}, pytest.param({"parallel": "fsdp"}, marks=SHARDED.marks), {"reduction": "fixed"}], ids=str
)
def test_two_processes_train_as_one_and_resume_bit_for_bit(muon, how, tmp_path, full):
    if not full and how.get("parallel") != "fsdp":
        pytest.skip("with --full")
    config = with_train(muon, **how)
    alone = trained(with_train(config, parallel="ddp"), tmp_path / "alone")
    together = run_together(2, trained, config, tmp_path / "run", 2)[0]
    if "reduction" in how:
        assert together == alone
        assert_same(tmp_path / "run", tmp_path / "alone")
    else:
        losses = [
            [line["loss"] for line in map(json.loads, log.splitlines()) if "loss" in line] for log in (alone, together)
        ]
        np.testing.assert_allclose(*losses, rtol=1e-4)
        one, two = saved(tmp_path / "alone"), saved(tmp_path / "run")
        for name in (name for name in one if name.startswith(("state.model", "ema"))):
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-4)  # steps are 1e-3
    if full:
        run_together(2, trained, config, tmp_path / "whole")
        assert_same(tmp_path / "run", tmp_path / "whole")


def test_doctor_sees_gradients_and_the_rate_of_matrices(muon, tmp_path):
    reports = []
    for rate in (1e-3, 3.0):
        config = with_train(muon, learning_rate=rate, accumulate=1)
        trained(config, tmp_path / str(rate))
        reports.append(examine(config, CPU, tmp_path / str(rate)))
    said = [[f.seen for section in report.sections for f in section.findings] for report in reports]
    assert not [text for text in said[0] if "never got a gradient" in text or "peak rate changes" in text], said[0]
    assert [text for text in said[1] if "peak rate changes" in text]


# ------------------------------------------------------------------------------------------ cost


def test_moments_and_macs_are_those_of_the_optimizer(muon):
    trainer = Trainer(muon, open_source(muon.data, muon.model), CPU)
    for weight in trainer.weights.values():
        weight.grad = torch.ones_like(weight)
    trainer.optimizer.found_inf = torch.zeros(())
    with FlopCounterMode(display=False) as counted:
        trainer.optimizer.step()
    assert counted.get_total_flops() == 2 * step_macs(muon.model, "muon")
    state = [value for state in trainer.optimizer.state.values() for value in state.values() if value.ndim]
    assert sum(value.numel() for value in state) == moments(muon.model, "muon")["total"]
    assert moments_per_weight(muon.model, "adamw") == 2
    assert step_macs(muon.model, "adamw") == 0


def test_inspect_and_launch_plan_count_muon(capsys):
    plans = [launch_plan.recipe("dit-s2", with_train(presets.get("dit-s2"), optimizer=o), 8) for o in ("adamw", "muon")]
    assert plans[1].memory < plans[0].memory
    assert 1 < plans[1].step / plans[0].step < 1.2
    for keys, said in (([], False), (["--set", "train.optimizer=muon"], True)):
        main(["inspect", "--preset", "dit-s2", *keys])
        out = capsys.readouterr().out
        assert ("numbers that muon and AdamW keep" in out) == ("muon on all matrices" in out) == said
