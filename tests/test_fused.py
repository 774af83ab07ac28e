"""Fused norm, modulation, gate and residual against float64 autograd on the plain formulas."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocast import CudaAutocast
from conftest import SHARDED, inputs, perturbed, small_model
from dit_in_dit.config.model import ModelConfig
from dit_in_dit.config.run import DataConfig, RunConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.model import fused, modulation
from dit_in_dit.model.fused import fuses, gate_residual, norm_modulate
from dit_in_dit.model.kernels import KERNELS, PYTORCH, Kernels, kernels_of
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.norms import NORMS, LayerNorm
from processes import run_together, trained

# Tokens and the vectors that modulate them: outer, per image, per patch, per sub-patch; narrow and wide.
SHAPES = {
    "outer": ((3, 5, 24), (3, 1, 24)),
    "image": ((2, 3, 4, 16), (2, 1, 1, 16)),
    "patch": ((2, 3, 4, 16), (2, 3, 1, 16)),
    "sub_patch": ((2, 3, 4, 8), (2, 3, 4, 8)),
    "wide": ((2, 3, 144), (2, 1, 144)),
}


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setitem(KERNELS, "cpu", Kernels(fused=True))


def case(shape: str, kind: str) -> tuple[nn.Module, list[Tensor]]:
    """A perturbed norm, and x, shift, scale, gate and gradients of both results in float64."""
    tokens, row = SHAPES[shape]
    draw = torch.Generator().manual_seed(1)
    shapes = (tokens, row, row, row, tokens, tokens)
    x, *others = (torch.randn(size, generator=draw, dtype=torch.float64) for size in shapes)
    norm = NORMS[kind](tokens[-1]).double()
    for parameter in norm.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=draw), alpha=0.3)
    return norm, [3 * x + 2, *others]  # a mean that is not zero


def both(norm: nn.Module, given: list[Tensor], dtypes: tuple[torch.dtype, torch.dtype], *, plain: bool):
    """x + gate * (norm(x) (1 + scale) + shift)^2, and its gradients by x, the vectors and the norm's parameters; the
    stream in the first dtype, the branch in the second."""
    stream, narrow = dtypes
    x, shift, scale, gate = (
        part.to(dtype).double().to(part.dtype if plain else dtype).detach().requires_grad_()
        for part, dtype in zip(given[:4], (stream, narrow, narrow, narrow), strict=True)
    )
    norm = norm.double() if plain else norm.to(stream)
    if plain:
        out = torch.addcmul(x, gate, modulation.modulate(norm(x), shift, scale).square())
    else:
        x_again, y = norm_modulate(x, norm, shift, scale)
        assert (x_again.dtype, y.dtype) == dtypes
        out = gate_residual(x_again, gate, y.square())
        assert out.dtype == stream
    return out, *torch.autograd.grad(out, [x, shift, scale, gate, *norm.parameters()], given[4].to(out.dtype))


FULL, HALF = torch.float32, torch.bfloat16
DTYPES = {
    "float64": ((torch.float64, torch.float64), 1e-12),
    "float32": ((FULL, FULL), 2e-6),
    "autocast": ((FULL, HALF), 1.5e-2),
    "bfloat16": ((HALF, HALF), 2.5e-2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer", "layer_affine", "rms"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_those_of_the_plain_formulas(on_cpu, shape, kind, dtype):
    dtypes, error = DTYPES[dtype]
    norm, given = case(shape, kind)
    assert fuses(given[0], norm, *given[1:4])
    expected = both(norm, given, dtypes, plain=True)
    for found, wanted in zip(both(norm, given, dtypes, plain=False), expected, strict=True):
        assert found.shape == wanted.shape
        assert (found.double() - wanted).norm() <= error * wanted.norm()


def test_without_gradient_by_the_stream_or_the_vectors_the_rest_is_the_same(on_cpu):
    norm, given = case("patch", "rms")
    x, shift, scale = (part.clone() for part in given[:3])
    plain = modulation.modulate(norm(x), shift, scale)
    assert torch.allclose(norm_modulate(x, norm, shift, scale)[1], plain)  # none: no graph
    for wanted in (x, shift, scale):
        wanted.requires_grad_()
        found = torch.autograd.grad(norm_modulate(x, norm, shift, scale)[1], wanted, given[4])[0]
        expected = torch.autograd.grad(modulation.modulate(norm(x), shift, scale), wanted, given[4])[0]
        torch.testing.assert_close(found, expected)
        wanted.requires_grad_(False)


def run(model: NestedDiT, given: tuple[Tensor, ...]) -> list[Tensor]:
    out = model(*given)
    return [out, *torch.autograd.grad(out.float().square().sum(), list(model.parameters()))]


def model_of(**keys) -> ModelConfig:
    return small_model("inner outer inner", **keys)


MODELS = {
    "default": model_of(inner={"mixer": "conv", "condition": "patch"}),
    "affine": model_of(inner={"norm": "layer_affine", "condition": "sub_patch"}, outer={"norm": "rms"}),
    "shared": model_of(outer={"modulation": "shared"}, inner={"modulation": "post", "condition": "outer_per_block"}),
    "none": model_of(outer={"modulation": "none", "head_condition": "none"}, inner={"mixer": "none"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same_with_and_without(monkeypatch, name):
    model = perturbed(NestedDiT(MODELS[name])).double()
    x, t, y = inputs(model.config)
    plain = run(model, (x.double(), t, y))
    monkeypatch.setitem(KERNELS, "cpu", Kernels(fused=True))
    calls = []
    monkeypatch.setattr(fused._NormModulate, "forward", counting(fused._NormModulate.forward, calls))
    for found, expected in zip(run(model, (x.double(), t, y)), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert bool(calls) == (name != "none" or bool(model.inner_blocks))


def counting(function, calls):
    def counted(*given):
        calls.append(1)
        return function(*given)

    return staticmethod(counted)


@pytest.mark.parametrize("policy", [lambda: torch.autocast("cpu", HALF), CudaAutocast], ids=["cpu", "cuda"])
def test_under_autocast_gradients_are_as_near_to_float64_as_those_of_the_plain_formulas(monkeypatch, policy):
    model = perturbed(NestedDiT(MODELS["default"]))
    given = inputs(model.config)
    exact = run(model.double(), (given[0].double(), *given[1:]))
    model.float()
    distances = []
    for kernels in (PYTORCH, Kernels(fused=True)):
        monkeypatch.setitem(KERNELS, "cpu", kernels)
        with policy():
            found = run(model, given)
        distances.append(
            [((a.double() - b).norm() / b.norm().clamp(min=1e-6)).item() for a, b in zip(found, exact, strict=True)]
        )
    for plain, ours in zip(*distances, strict=True):
        assert ours < 1.6 * plain + 2e-3


def test_recomputed_activations_give_the_same(on_cpu):
    model = perturbed(NestedDiT(MODELS["default"]))
    given = inputs(model.config)
    expected = run(model, given)
    again = NestedDiT(model.config, recompute="both")
    again.load_state_dict(model.state_dict())
    for found, wanted in zip(run(again, given), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.slow
def test_compiled_and_exported_models_use_the_plain_formulas(on_cpu):
    model = perturbed(NestedDiT(small_model("outer")))
    given = inputs(model.config)
    expected = run(model, given)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for found, wanted in zip(run(compiled, given), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    program = torch.export.export(model, given)
    assert not any("var_mean" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*given), expected[0], rtol=1e-4, atol=1e-5)
    torch.export.save(program, io.BytesIO())


def test_transforms_hooks_and_norms_of_others_take_the_plain_formulas(on_cpu):
    norm, given = case("outer", "layer")
    x, row = given[:2]
    assert fuses(x, norm, row)
    assert not torch.func.vmap(lambda x: torch.tensor(fuses(x, norm, row[0])))(x[:, None]).any()
    handle = norm.register_forward_hook(lambda *_: None)
    assert not fuses(x, norm, row)
    handle.remove()
    assert fuses(x, norm, row)

    class Own(LayerNorm):
        pass

    assert not fuses(x, Own(24), row)
    assert not fuses(x, norm, row[:1].expand(1, 5, 24))  # a vector for each place
    assert not fuses(x, norm, row.expand(3, 5, 24)[:, :3])


def test_a_second_derivative_is_refused_in_words(on_cpu):
    norm, given = case("outer", "layer")
    x = given[0].requires_grad_()
    for out in (norm_modulate(x, norm, *given[1:3])[1], gate_residual(x, given[3], x)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


def test_no_device_uses_the_functions_unless_its_row_says_so():
    assert KERNELS == {}  # nothing has been measured
    assert kernels_of(torch.device("cpu")) == kernels_of(torch.device("meta")) == PYTORCH
    assert not any(PYTORCH)


def _losses(kernels: Kernels, config: RunConfig, out: Path) -> list[float]:
    KERNELS["cpu"] = kernels
    try:
        facts = trained(config, out, False)
    finally:
        del KERNELS["cpu"]
    return [values["loss"] for kind, _, values in facts if kind == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", SHARDED])
@pytest.mark.full
def test_two_processes_train_as_one_with_the_plain_formulas(tmp_path, parallel):
    config = RunConfig(
        model=replace(MODELS["affine"], image_size=(16, 16), num_classes=9),
        data=DataConfig(source="emoji"),
        train=TrainConfig(steps=4, batch_size=8, precision="float32", evaluate_every=0, sample_every=0),
    )
    plain = _losses(PYTORCH, config, tmp_path / "plain")
    assert len(plain) == 4
    config = replace(config, train=replace(config.train, parallel=parallel, recompute="inner"))
    for losses in run_together(2, _losses, Kernels(fused=True), config, tmp_path / parallel):
        assert losses == pytest.approx(plain, rel=1e-5)
