"""Tools that people put around a model: torch.func, torch.export, ONNX, gradient checkpointing, LoRA, accelerate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint as recompute

from conftest import inputs, perturbed, small_model
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import to_dict
from dit_in_dit.interop.transformer import DiTInDiTTransformer2DModel
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run
from test_model import EVERY_CHOICE


def tiny(choice: dict) -> NestedDiT:
    """A model in float64, so that differences are small enough to be compared with derivatives."""
    inner = {"sub_patch": 1, "width": 8, "num_heads": 2, **choice.get("inner", {})}
    outer = {"width": 16, "num_heads": 2, **choice.get("outer", {})}
    if "width" in choice.get("inner", {}):  # for choices that need equal widths
        outer["width"] = inner["width"]
    keys = {"image_size": (4, 4), "patch_size": 2, "channels": 1, **choice, "inner": inner, "outer": outer}
    if "tokens" in keys:  # there is one outer block
        keys["tokens"] = replace(keys["tokens"], start=0)
    return perturbed(NestedDiT(small_model("inner outer inner", **keys))).double()


# -------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("choice", EVERY_CHOICE, ids=str)
def test_transforms_give_the_values_and_derivatives_of_plain_calls(choice):
    model = tiny(choice)
    x, t, y = inputs(model.config)
    x = x.double()
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def one(parameters: dict, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (x[None], t[None], y[None])).squeeze(0)

    def loss(parameters: dict, *example: torch.Tensor) -> torch.Tensor:
        return one(parameters, *example).square().sum()

    torch.testing.assert_close(vmap(one, (None, 0, 0, 0))(parameters, x, t, y), model(x, t, y))
    each = vmap(grad(loss), (None, 0, 0, 0))(parameters, x, t, y)
    together = torch.autograd.grad(model(x, t, y).square().sum(), list(parameters.values()))
    for name, expected in zip(parameters, together, strict=True):
        torch.testing.assert_close(each[name].sum(0), expected, msg=name)
    direction, step = torch.randn_like(x), 1e-5
    value, slope = jvp(lambda x: model(x, t, y), (x,), (direction,))
    torch.testing.assert_close(value, model(x, t, y))
    difference = (model(x + step * direction, t, y) - model(x - step * direction, t, y)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixer", ["patch", "conv"])
def test_jacobians_and_hessians_agree_in_every_mode(mixer):
    model = tiny({"inner": {"mixer": mixer}})
    x, t, y = (part[:1] for part in inputs(model.config))

    def corner(x: torch.Tensor) -> torch.Tensor:
        return model(x, t, y)[0, :, :2, :2]

    x = x.double()
    back, ahead = jacrev(corner)(x), jacfwd(corner)(x)
    torch.testing.assert_close(back, ahead)
    torch.testing.assert_close(back, torch.autograd.functional.jacobian(corner, x))

    def value(scale: torch.Tensor) -> torch.Tensor:
        return model(x * scale, t, y).square().sum()

    scale, step = torch.tensor(1.0, dtype=torch.float64), 1e-4
    numeric = (value(scale + step) - 2 * value(scale) + value(scale - step)) / step**2
    torch.testing.assert_close(hessian(value)(scale), numeric, rtol=1e-5, atol=1e-5)


def test_a_model_that_was_transformed_trains_with_the_same_bits_as_before():
    model = perturbed(NestedDiT(small_model()))
    x, t, y = inputs(model.config)

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(x, t, y).square().sum(), list(model.parameters())))

    before = gradients()
    jvp(lambda x: model(x, t, y), (x,), (x,))
    assert all(map(torch.equal, before, gradients()))


# ---------------------------------------------------------------------------------- export and ONNX


@pytest.mark.parametrize("stages", ["(inner outer)*2", "outer inner"])
def test_a_model_is_exported_with_any_batch_size(stages):
    model = perturbed(NestedDiT(small_model(stages))).eval()
    batch = torch.export.Dim("batch", max=2**16)  # without a maximum, PyTorch 2.6 finds a guard
    shapes = tuple({0: batch} for _ in range(3))
    with torch.set_grad_enabled(Version(torch.__version__) >= Version("2.7")):  # 2.6 fails at a Function of any size
        program = torch.export.export(model, inputs(model.config), dynamic_shapes=shapes).module()
    for count in (2, 5):
        x, t, y = inputs(model.config, count)
        torch.testing.assert_close(program(x, t, y), model(x, t, y))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """A run with one checkpoint."""
    made = tmp_path_factory.mktemp("runs") / "mine"
    config = RunConfig(model=small_model("outer*1 inner*1"))
    create_run(made, config)
    torch.manual_seed(0)
    weights = perturbed(NestedDiT(config.model)).state_dict()
    checkpoint.save(made, config, 10, {f"model.{k}": v + 1 for k, v in weights.items()}, weights, tuple("abcde"))
    return made


@pytest.mark.skipif(Version(torch.__version__) < Version("2.7"), reason="PyTorch 2.6 fails at addcmul of any size")
def test_onnx_gives_the_model_s_outputs_for_any_batch_size(run, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    main(["export", str(run), "--format", "onnx", "--out", str(tmp_path / "new" / "model.onnx")])
    assert f"{run} as {tmp_path / 'new' / 'model.onnx'}" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.onnx"]  # one file, with the weights
    session = onnxruntime.InferenceSession(tmp_path / "new" / "model.onnx", providers=["CPUExecutionProvider"])
    saved = checkpoint.Checkpoint.open(run)
    model = saved.model(torch.device("cpu"))
    for count in (1, 2, 5):
        x, t, y = inputs(model.config, count)
        (found,) = session.run(["prediction"], {"x": x.numpy(), "t": t.numpy(), "y": y.numpy()})
        np.testing.assert_allclose(found, model(x, t, y).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_onnx_without_its_packages_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dit_in_dit.interop.export_pipeline.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["export", str(run), "--format", "onnx", "--out", str(tmp_path / "model.onnx")])
    error = capsys.readouterr().err
    assert "pip install 'dit-in-dit[onnx]'" in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_model_that_onnx_cannot_hold_is_refused_in_one_line(run, tmp_path, monkeypatch, capsys):
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such operation\nstep 2 of 3")

    monkeypatch.setattr("torch.onnx.export", fails)
    monkeypatch.setattr("dit_in_dit.interop.export_pipeline.find_spec", lambda name: True)
    with pytest.raises(SystemExit):
        main(["export", str(run), "--format", "onnx", "--out", str(tmp_path / "model.onnx")])
    error = capsys.readouterr().err
    assert "as ONNX: no such operation" in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------- a model of diffusers


def transformer(stages: str = "outer*2 inner*2") -> DiTInDiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTInDiTTransformer2DModel(to_dict(small_model(stages)), {"path": "flow", "predict": "velocity"})
    perturbed(model.nested)
    return model


def test_gradient_checkpointing_gives_the_same_gradients_with_fewer_activations():
    model = transformer()
    x, t, y = inputs(model.nested.config)
    counts = []

    def gradients() -> list[torch.Tensor]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            value = model(x, t, y).sample.square().sum()
        counts.append(sum(kept))
        return list(torch.autograd.grad(value, list(model.parameters())))

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert all(map(torch.equal, plain, gradients()))
    calls = []
    model.enable_gradient_checkpointing(
        lambda block, *given: calls.append(type(block).__name__) or recompute(block, *given, use_reentrant=False)
    )
    gradients()
    assert calls == ["Block"] * 4
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    assert all(map(torch.equal, plain, gradients()))
    assert counts[0] == counts[3] > 2 * counts[1]


def test_class_names_of_blocks_are_those_of_the_model():
    """accelerate and regional compilation find blocks by these names."""
    for inner in ({}, {"mixer": "none"}):
        nested = NestedDiT(small_model("outer inner", inner=inner))
        names = {type(block).__name__ for block in (*nested.outer_blocks, *nested.inner_blocks)}
        assert names <= set(DiTInDiTTransformer2DModel._no_split_modules)
    assert DiTInDiTTransformer2DModel._repeated_blocks == DiTInDiTTransformer2DModel._no_split_modules


def test_blocks_are_compiled_alone():
    model = transformer()
    x, t, y = inputs(model.nested.config)
    expected = model(x, t, y).sample
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(x, t, y).sample, expected)


@pytest.mark.parametrize(("steps", "got"), [([999, 20, 0], "999"), ([0.5, 1.001, 0.2], "1.001")])
def test_times_of_0_to_1000_are_refused(steps, got):
    model = transformer()
    x, _, y = inputs(model.nested.config)
    with pytest.raises(UserError, match=f"t from 0 to 1: got {got}; divide"):
        model(x, torch.tensor(steps), y)
    assert model(x, torch.tensor([0.0, 1.0, 0.5]), y).sample.shape == x.shape


# -------------------------------------------------------------------------------------------- LoRA


def test_lora_trains_and_merges(tmp_path):
    peft = pytest.importorskip("peft")
    model = perturbed(NestedDiT(small_model("outer inner")))
    x, t, y = inputs(model.config)
    before = model(x, t, y).detach()
    names = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and ".branches." in name]
    assert any(".mix." in name for name in names)
    assert any(".mlp." in name for name in names)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=True))
    torch.testing.assert_close(adapted(x, t, y), before)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(names)
    optimizer = torch.optim.SGD(trained, 0.01)
    losses = []
    for _ in range(4):
        value = (adapted(x, t, y) - x).square().mean()
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    after = adapted(x, t, y).detach()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x, t, y), after, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == NestedDiT(model.config).state_dict().keys()


def test_adapters_of_diffusers_are_added_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft")
    model, x, t, y = transformer(), *inputs(small_model())
    before = model(x, t, y).sample.detach()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False), "style")
    styled = model(x, t, y).sample.detach()
    assert not torch.allclose(styled, before)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    model.disable_adapters()
    torch.testing.assert_close(model(x, t, y).sample, before)
    other = transformer()
    name = "pytorch_lora_weights.safetensors"
    other.load_lora_adapter(tmp_path, prefix=None, adapter_name="again", weight_name=name, use_safetensors=True)
    torch.testing.assert_close(other(x, t, y).sample, styled)
