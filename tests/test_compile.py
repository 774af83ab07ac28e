"""Every arrangement compiles without a graph break and gives the same outputs."""

from __future__ import annotations

import pytest
import torch

from conftest import inputs, perturbed, small_model
from dit_in_dit.model.nested import NestedDiT
from test_model import EVERY_CHOICE, PROGRAMS, is_in_random_sets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "choice"),
    [(stages, {}) for stages in PROGRAMS] + [("inner outer*2 inner", choice) for choice in EVERY_CHOICE],
    ids=str,
)
def test_models_compile_without_graph_breaks(stages, choice, full):
    if not full and is_in_random_sets(choice):
        pytest.skip("a part of random sets of options; alone with --full")
    torch._dynamo.reset()
    model = perturbed(NestedDiT(small_model(stages, **choice)))
    backend = "eager" if choice and not full else "aot_eager"  # which also compiles the backward pass, and takes longer
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, t, y = inputs(model.config)
    torch.testing.assert_close(compiled(x, t, y), model(x, t, y))


@pytest.mark.slow
def test_recomputing_blocks_compile_too():
    torch._dynamo.reset()
    model = perturbed(NestedDiT(small_model(), recompute="both"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, t, y = inputs(model.config)
    compiled(x, t, y).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
