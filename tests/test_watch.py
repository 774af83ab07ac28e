"""Hooks show what the forward pass computed, change nothing, and are gone afterwards."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import inputs, perturbed, small_model
from dit_in_dit.inspection.hooks import (
    attentions,
    can_run_without_inner,
    watch_aggregation,
    watch_attention,
    watch_blocks,
    watch_contribution,
    watch_heads,
    without_inner,
)
from dit_in_dit.model import aggregate, layers
from dit_in_dit.model.nested import NestedDiT

INTERLEAVED = "(inner outer)*2"


def made(stages: str = INTERLEAVED, **inner) -> NestedDiT:
    return perturbed(NestedDiT(small_model(stages, inner={"window": 2, **inner}))).eval()


def weights_in_use(monkeypatch, module) -> list[Tensor]:
    """The attention weights of every later `attend` of the module: the kernel's output if the values are the identity
    matrix."""
    used: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        identity = torch.eye(k.shape[-2]).expand(*k.shape[:-1], -1)
        used.append(F.scaled_dot_product_attention(q, k, identity))
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(module, "attend", attend)
    return used


@pytest.mark.parametrize("mixer", ["patch", "window", "image", "conv", "none"])
def test_attention_weights_are_those_of_the_forward_pass(monkeypatch, mixer):
    model, used = made(mixer=mixer), weights_in_use(monkeypatch, layers)
    with torch.no_grad(), watch_attention(model) as seen:
        model(*inputs(model.config))
    wanted = {"conv": 2, "none": 2}.get(mixer, 4)  # two outer blocks, and two inner ones that attend
    assert len(seen) == len(used) == wanted
    groups = {"patch": 8, "window": 2, "image": 1}
    for (name, weights), kernel in zip(seen.items(), used, strict=True):
        assert weights.shape[:2] == (3, groups[mixer] if name.startswith("inner") else 1)
        torch.testing.assert_close(weights.flatten(0, 1), kernel, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_attention_is_observed_in_the_order_of_execution():
    model = made()
    with torch.no_grad(), watch_attention(model) as seen, watch_blocks(model) as blocks:
        model(*inputs(model.config))
    assert list(seen) == list(blocks) == ["inner_blocks.0", "outer_blocks.0", "inner_blocks.1", "outer_blocks.1"]
    assert blocks["inner_blocks.1"].shape == (3, 8, 4, 16)


def test_pooling_weights_are_those_of_the_forward_pass(monkeypatch):
    model, used = made(aggregate="attention"), weights_in_use(monkeypatch, aggregate)
    with torch.no_grad(), watch_aggregation(model) as seen:
        model(*inputs(model.config))
    assert list(seen) == ["aggregates.0", "aggregates.1"]
    for weights, kernel in zip(seen.values(), used, strict=True):
        torch.testing.assert_close(weights, kernel.view(3, 8, 2, 4), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 8, 2))


@pytest.mark.parametrize("kind", ["mean", "weighted"])
def test_pooling_weights_rebuild_the_pooled_vector(kind):
    model = made(aggregate=kind)
    inner = torch.randn(3, 8, 4, 16, generator=torch.Generator().manual_seed(1))
    module = model.aggregates[0]
    rebuilt = module.proj((module.weights(inner).transpose(2, 3) * inner).sum(2))
    torch.testing.assert_close(rebuilt, module(inner))


def test_concat_weights_are_the_norms_of_each_sub_patchs_contribution():
    model = made(aggregate="concat")
    inner = torch.zeros(1, 8, 4, 16)
    inner[:, :, 2] = 1.0
    assert torch.equal(model.aggregates[0].weights(inner)[0, :, 0].argmax(-1), torch.full((8,), 2))
    torch.testing.assert_close(model.aggregates[0].weights(inner)[..., 2], torch.ones(1, 8, 1))


@pytest.mark.parametrize("stages", ["inner outer", "outer inner"])
@pytest.mark.parametrize("fuse", ["add", "gate", "replace"])
def test_contribution_is_the_share_of_norms(stages, fuse):
    model = made(stages, fuse=fuse)
    x, t, y = inputs(model.config)
    kept: dict[str, Tensor] = {}
    for name in ("aggregates.0", "fuses.0", "outer_head", "inner_head"):
        if name in dict(model.named_modules()):
            model.get_submodule(name).register_forward_hook(
                lambda module, given, output, name=name: kept.update({name: output, f"{name}.given": given[0]})
            )
    with torch.no_grad(), watch_contribution(model) as seen:
        model(x, t, y)
    if fuse == "replace":
        expected = torch.ones(3, 8)
    elif stages == "inner outer":
        scale = model.fuses[0].gate if fuse == "gate" else 1.0
        added, outer = (kept["aggregates.0"] * scale).norm(dim=-1), kept["fuses.0.given"].norm(dim=-1)
        expected = added / (added + outer)
    else:
        patch = [(slice(4 * r, 4 * r + 4), slice(4 * c, 4 * c + 4)) for r in range(4) for c in range(2)]
        inner, outer = (
            torch.stack([kept[head][:, :, a, b].flatten(1).norm(dim=1) for a, b in patch], 1)
            for head in ("inner_head", "outer_head")
        )
        expected = inner / (inner + outer)
    assert list(seen) == ["aggregates.0" if stages == "inner outer" else "inner_head"]
    torch.testing.assert_close(next(iter(seen.values())), expected, rtol=1e-4, atol=1e-5)


def test_a_gate_that_starts_at_zero_contributes_nothing():
    model = NestedDiT(small_model("inner outer", inner={"fuse": "gate"}))
    with torch.no_grad(), watch_contribution(model) as seen:
        model(*inputs(model.config))
    assert seen["aggregates.0"].abs().max() == 0


@pytest.mark.parametrize("stages", ["inner*2 outer*2", "(inner outer)*2", "outer*2 inner*2", "inner outer*2 inner"])
@pytest.mark.parametrize("inner", [{}, {"fuse": "gate", "condition": "patch", "mixer": "window"}])
def test_without_the_inner_path_the_output_is_that_of_the_plain_dit(stages, inner):
    model = made(stages, **inner)
    plain = NestedDiT(replace(model.config, use_inner=False)).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    x, t, y = inputs(model.config)
    with torch.no_grad():
        with without_inner(model):
            without = model(x, t, y)
        assert torch.equal(without, plain(x, t, y))
        assert not torch.allclose(model(x, t, y), without, atol=1e-3)
    assert can_run_without_inner(model)


def test_without_the_inner_path_equals_a_gate_of_zero():
    model = made("inner outer", fuse="gate")
    shut = copy.deepcopy(model)
    torch.nn.init.zeros_(shut.fuses[0].gate)
    with torch.no_grad(), without_inner(model):
        assert torch.equal(model(*inputs(model.config)), shut(*inputs(model.config)))


def test_plain_models_and_fuse_replace_cannot_run_without_the_inner_path():
    assert not can_run_without_inner(made("inner outer", fuse="replace"))
    assert not can_run_without_inner(NestedDiT(small_model("outer*2")))


def hooks(model: NestedDiT) -> int:
    # Stages stand in no module list: blocks are registered once, under names that no order changes.
    stages = [*model.stages, *model.heads]
    return sum(len(module._forward_hooks) for module in [*model.modules(), *stages])


@pytest.mark.parametrize("stages", ["(inner outer)*2", "outer inner", "outer*2"])
def test_watching_changes_no_bit_and_leaves_no_hook(stages):
    model = made(stages, aggregate="attention")
    x, t, y = inputs(model.config)
    with torch.no_grad():
        before = model(x, t, y)
        contexts = (watch_attention, watch_aggregation, watch_contribution, watch_blocks)
        for context in contexts:
            with context(model) as seen:
                assert torch.equal(model(x, t, y), before)
            assert seen or stages == "outer*2" or context is watch_aggregation
        assert torch.equal(model(x, t, y), before)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "context", [watch_attention, watch_aggregation, watch_contribution, watch_blocks, without_inner]
)
def test_hooks_are_gone_after_an_error(context):
    model = made("inner outer inner")

    def fail() -> None:
        with context(model):
            assert hooks(model) > 0
            model(torch.zeros(1, 1, 1, 1), torch.zeros(1))

    with pytest.raises(ValueError, match="x must be"):
        fail()
    assert hooks(model) == 0


def test_watching_keeps_no_autograd_graph():
    model = made()
    with watch_attention(model) as attention, watch_contribution(model) as contribution:
        model(*inputs(model.config)).square().mean().backward()
    assert not any(x.requires_grad for x in [*attention.values(), *contribution.values()])


def test_watched_queries_and_keys_have_an_image_axis():
    model = made(mixer="window")
    shapes = {}
    with torch.no_grad(), watch_heads(model, lambda name, q, k: shapes.update({name: (q.shape, k.shape)})):
        model(*inputs(model.config))
    assert shapes["inner_blocks.0"] == ((3, 2, 2, 16, 8),) * 2  # 2 windows, 2 heads, 16 tokens, 8 channels
    assert shapes["outer_blocks.0"] == ((3, 1, 4, 8, 8),) * 2
    assert set(shapes) == set(attentions(model))
