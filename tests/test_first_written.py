"""The model against its first implementation: equal outputs and gradients, in both precisions."""

from __future__ import annotations

import pytest
import torch

from conftest import inputs, perturbed, small_model
from dit_in_dit.benchmark.first_written import FirstWritten, to_first_written
from dit_in_dit.config.errors import UserError
from dit_in_dit.model.nested import NestedDiT

FIRST = [
    {"aggregate": aggregate, "fuse": fuse}
    for aggregate in ("mean", "weighted", "attention", "concat")
    for fuse in ("add", "gate", "replace")
]
ALONE = [{}, {"embed": "conv"}, {"width": 32, "num_heads": 4}, {"sub_patch": 1}, {"mlp_ratio": 2.0}]
CASES = [("inner*2 outer*2", choice) for choice in FIRST + ALONE]
CASES += [
    (stages, {"fuse": fuse}) for stages in ("outer*2 inner*2", "inner outer inner") for fuse in ("add", "replace")
]
CASES += [("(inner outer*2)*2", {}), ("outer*2 inner", {"embed": "conv"}), ("outer*2", {})]


def pair(stages: str, choice: dict, dtype: torch.dtype) -> tuple[NestedDiT, FirstWritten]:
    """The model, with noise on every weight, and its first implementation with the same weights."""
    model = perturbed(NestedDiT(small_model(stages, inner=choice))).to(dtype)
    # Features of time are float32 by design, as everything outside of a test is.
    model.time_embed.mlp.register_forward_pre_hook(lambda module, given: (given[0].to(dtype),))
    return model, FirstWritten(model.config).to(dtype).load(model.state_dict())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error divided by the largest value."""
    scale = expected.abs().max().clamp(min=1e-30)
    return float(((found - expected).abs().max() / scale).detach())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize(("stages", "choice"), CASES, ids=str)
def test_the_model_equals_the_first_implementation(stages, choice, dtype, most):
    model, first = pair(stages, choice, dtype)
    x, t, y = inputs(model.config)
    x, weights = x.to(dtype), torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = [net(x, t, y) for net in (model, first)]
    assert relative(*outputs) <= most
    for output in outputs:
        (output * weights).sum().backward()
    gradients = to_first_written({name: p.grad for name, p in model.named_parameters()})
    for name, parameter in first.named_parameters():
        assert relative(gradients[name].view_as(parameter), parameter.grad) <= most, name
    assert gradients.keys() == dict(first.named_parameters()).keys()


def test_models_without_labels_equal_the_first_implementation():
    model, first = pair("inner outer", {}, torch.float32)
    x, t, _ = inputs(model.config)
    torch.testing.assert_close(first(x, t), model(x, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", [{"mixer": "conv"}, {"condition": "patch"}], ids=str)
def test_choices_missing_in_the_first_implementation_give_a_one_line_error(choice):
    with pytest.raises(UserError, match=r"the first-written model needs .* got"):
        FirstWritten(small_model("inner outer", inner=choice))
