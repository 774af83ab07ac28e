"""Every arrangement compiles without a graph break and gives the same outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from conftest import inputs, perturbed, small_model
from dit_in_dit.model import compiled
from dit_in_dit.model.compiled import compile_blocks
from dit_in_dit.model.nested import NestedDiT
from test_model import EVERY_CHOICE, PROGRAMS, is_in_random_sets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "choice"),
    [(stages, {}) for stages in PROGRAMS] + [("inner outer inner", choice) for choice in EVERY_CHOICE],
    ids=str,
)
def test_models_compile_without_graph_breaks(stages, choice, full):
    if not full and is_in_random_sets(choice):
        pytest.skip("a part of random sets of options; alone with --full")
    torch._dynamo.reset()
    model = perturbed(NestedDiT(small_model(stages, **choice)))
    first = not choice and stages == PROGRAMS[0]
    backend = "aot_eager" if full or first else "eager"  # the former also compiles the backward pass, and takes longer
    whole = torch.compile(model, backend=backend, fullgraph=True)
    x, t, y = inputs(model.config)
    torch.testing.assert_close(whole(x, t, y), model(x, t, y))


@pytest.mark.slow
@pytest.mark.parametrize("choice", EVERY_CHOICE, ids=str)
def test_blocks_of_every_choice_compile_by_kind(choice, full, monkeypatch):
    if not full and choice not in EVERY_CHOICE[::40]:
        pytest.skip("with --full")
    torch._dynamo.reset()
    graphs = []
    monkeypatch.setattr(compiled, "BACKEND", lambda module, inputs: graphs.append(module) or aot_eager(module, inputs))
    model = perturbed(NestedDiT(small_model("inner outer*3 inner*2", **choice)))
    plain = copy.deepcopy(model)
    compile_blocks(model)
    for batch in (3, 3, 4, 2):
        x, t, y = inputs(model.config, batch)
        found, expected = model(x, t, y), plain(x, t, y)
        torch.testing.assert_close(found, expected)
        gradients = [
            torch.autograd.grad(out.square().sum(), _trained(net), allow_unused=True)
            for out, net in ((found, model), (expected, plain))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    # For each kind of block one graph, and one more for batches of any size. Tokens that join make another length.
    graphs_of_kinds = 2 * len({level for level, _ in model.config.program})
    assert graphs_of_kinds <= len(graphs) <= graphs_of_kinds + 2 * bool(model.config.tokens.count)


def _trained(net):
    """The parameters that a gradient reaches."""
    return [weight for name, weight in net.named_parameters() if weight.requires_grad]


@pytest.mark.slow
def test_recomputing_blocks_compile_too():
    torch._dynamo.reset()
    model = perturbed(NestedDiT(small_model(), recompute="both"))
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, t, y = inputs(model.config)
    whole(x, t, y).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
