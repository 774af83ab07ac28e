"""Optimised code equals the plain formulas in values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conftest import inputs, perturbed, small_model
from dit_in_dit.model import aggregate, layers
from dit_in_dit.model.gelu import Gelu
from dit_in_dit.model.nested import NestedDiT
from test_model import PROGRAMS


def plain_gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_gelu_equals_its_formula_in_every_dtype(dtype, error):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -0.0, 0.0, 1e-30, 1e4])]).to(dtype)
    found, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    y, true = Gelu()(found), plain_gelu(expected)
    torch.testing.assert_close(y.double(), true, rtol=error, atol=error)
    y.sum().backward()
    true.sum().backward()
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=error, atol=error)
    with torch.no_grad():
        assert torch.equal(Gelu()(found), y)  # a model draws what it trains


@pytest.mark.parametrize("stages", PROGRAMS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_fast_model_equals_a_model_of_plain_formulas(monkeypatch, stages, dtype, error):
    model = perturbed(NestedDiT(small_model(stages, inner={"aggregate": "attention"}))).to(dtype)
    x, t, y = inputs(model.config)
    # Times stay float32 features: only what comes after them is asked for so exactly.
    monkeypatch.setattr(
        model.time_embed, "forward", lambda t, _: model.time_embed.mlp(t.to(dtype)[:, None].expand(-1, 256))
    )
    results = []
    for plainly in (False, True):
        if plainly:
            monkeypatch.setattr(Gelu, "forward", lambda self, x: plain_gelu(x))
            for module in (layers, aggregate):
                monkeypatch.setattr(module, "attend", plain_attention)
        out = model(x.to(dtype), t, y)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for fast, plain in zip(*results, strict=True):
        assert (fast - plain).norm() <= error * plain.norm()
