"""Options of the model in combination: drawn at random, in every published family, and in every tool around a model."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import inputs, perturbed, small_model
from dit_in_dit import cost, inspect
from dit_in_dit.config import presets
from dit_in_dit.config.errors import LeftOutWarning, UserError
from dit_in_dit.config.field import FAMILIES, PUBLISHED
from dit_in_dit.config.files import override
from dit_in_dit.config.model import ModelConfig, TokensConfig
from dit_in_dit.inspection import hooks
from dit_in_dit.model.nested import NestedDiT
from options import built, toy
from test_model import EVERY_CHOICE


def check_on_meta(model: ModelConfig) -> None:
    """Check that a model runs forward and backward, that each trained parameter gets a gradient, and its cost."""
    with torch.device("meta"):
        net = NestedDiT(model)
    x, t, y = (value.to("meta") if value is not None else None for value in inputs(model, batch=2))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = net(x, t, y)
    assert out.shape == (2, model.out_channels, *model.image_size)
    macs = counter.get_total_flops() / 4
    assert cost.macs(model)["total"] == pytest.approx(macs, rel=0.005)
    out.sum().backward()
    assert [name for name, part in net.named_parameters() if part.requires_grad and part.grad is None] == []


@pytest.mark.parametrize("group", range(15))
def test_every_random_set_of_options_runs_or_is_refused_in_one_line(group, full):
    if group and not full:
        pytest.skip("with --full")
    refused, count = [], 40
    for seed in range(group * count, (group + 1) * count):
        try:
            model = built(seed)
        except UserError as error:
            refused.append(str(error))
            continue
        check_on_meta(model)
    assert all(re.fullmatch(r".*(\bgot\b|: set ).*", said) for said in refused), refused  # one line: rule, way out
    assert count * 0.1 < len(refused) < count * 0.5  # both happen


@pytest.mark.parametrize("name", PUBLISHED)
def test_closed_form_agrees_with_the_flop_counter_for_every_published_size(name, full):
    if not full:
        pytest.skip("the first of each family is in test_cost; all with --full")
    check_on_meta(presets.get(name).model)


@pytest.mark.parametrize("choice", EVERY_CHOICE, ids=str)
def test_every_choice_runs_in_float64_without_labels_and_recomputed(choice):
    """On images that are not square. Recomputation and the type change nothing but rounding."""
    model = small_model("inner outer*2 inner", **choice | {"num_classes": 0})
    plain, again = perturbed(NestedDiT(model)), perturbed(NestedDiT(model, recompute="both"))
    again.load_state_dict(plain.state_dict())  # random frequencies too
    x, t, y = inputs(model)
    out, other = plain(x, t, y), again(x, t, y)
    assert torch.equal(out, other)
    out.square().sum().backward()
    other.square().sum().backward()
    for (name, one), two in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (one.grad is None and not one.requires_grad) or torch.equal(one.grad, two.grad), name
    exact = plain.double()(x.double(), t, y)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("group", range(10))
def test_random_sets_of_options_compile_without_graph_breaks(group, full):
    if group and not full:
        pytest.skip("with --full")
    seeds, done = iter(range(10_000 + 1000 * group, 20_000)), 0
    while done < (20 if full else 3):
        try:
            model = built(next(seeds), small=not full)
        except UserError:
            continue
        torch._dynamo.reset()
        net = perturbed(NestedDiT(model))
        x, t, y = inputs(model)
        backend = "aot_eager" if full or done % 5 == 0 else "eager"  # which compiles no backward pass, in half the time
        compiled = torch.compile(net, backend=backend, fullgraph=True)
        found = compiled(x, t, y)
        torch.testing.assert_close(found, net(x, t, y), rtol=1e-4, atol=1e-5)
        found.square().sum().backward()
        missing = [name for name, part in net.named_parameters() if part.requires_grad and part.grad is None]
        assert missing == [], model
        done += 1


# ------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("stages", "keys", "said"),
    [
        ("outer*2 inner", {"inner": {"spread": "none", "fuse": "replace"}}, "outer tokens must reach the image"),
        ("outer*2", {"outer": {"modulation": "none", "head_condition": "none"}}, "a model must read the time"),
        (
            "outer*2",
            {"outer": {"modulation": "none", "head_condition": "none"}, "tokens": TokensConfig(time=1)},
            "a model must read the class",
        ),
        (
            "outer*2",
            {
                "outer": {"modulation": "none", "head_condition": "none"},
                "tokens": TokensConfig(time=1, label=1, rows="own"),
            },
            "set tokens.adaln=false",
        ),
        ("outer inner", {"inner": {"mlp": "hyper", "condition": "sub_patch"}}, "needs one row per patch"),
        ("outer inner", {"inner": {"mlp": "hyper", "modulation": "shared", "width": 32}}, "modulation=shared has none"),
        ("outer inner", {"inner": {"modulation": "shared"}}, "equal widths of both levels: got 16 and 32"),
        ("outer inner", {"inner": {"spread": "refine"}, "tokens": TokensConfig(label=1)}, "mixer=image: got"),
        (
            "outer inner",
            {
                "inner": {"spread": "refine", "mixer": "image", "width": 32, "condition": "outer"},
                "tokens": TokensConfig(time=1),
            },
            "has no row for them: got condition=outer",
        ),
        (
            "inner outer inner",
            {"inner": {"spread": "refine", "mixer": "image", "width": 32}, "tokens": TokensConfig(time=1)},
            "below the 0 first outer blocks: got 0",
        ),
        ("outer*2", {"tokens": TokensConfig(time=1, start=2)}, "must be below the 2 outer blocks: got 2"),
        ("outer*2", {"outer": {"rope": "grid", "num_heads": 16}}, "multiple of 4: got 2"),
        ("outer*2", {"outer": {"mlp": "hyper"}}, "for inner blocks"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_together_are_refused_in_one_line(stages, keys, said):
    with pytest.raises(UserError, match=said) as caught:
        small_model(stages, **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["inner.modulation=none", "inner.condition=patch"], "inner.condition has no effect: neither blocks nor head"),
        (["inner.rope=grid"], "inner.rope has no effect: mixer=conv has no attention"),
        (["inner.bias=mlp"], "inner.bias has no effect: mixer=conv"),
        (["inner.fuse=replace", "outer.head_norm=rms"], "outer.head_norm has no effect: there is no outer"),
        (["stages=inner outer", "inner.head_condition=none"], "there is no inner head in inner"),
        (["outer.modulation=shared", "outer.head_condition=none"], "modulation=shared drives the head"),
        (["stages=inner outer", "inner.fuse=replace", "inner.condition=image", "bottleneck=4"], "bottleneck has no"),
        (["tokens.start=1"], "there are no tokens of time and class"),
        (["tokens.rows=own"], "there are no class tokens"),
        (["stages=outer", "outer.modulation=none", "outer.head_condition=none", "tokens.label=1", "tokens.time=1",
          "silu_twice=true"], "silu_twice has no effect"),
    ],
)  # fmt: skip
def test_a_choice_without_effect_gives_a_warning(assignments, said):
    with pytest.warns(LeftOutWarning, match=re.escape(said)):
        override(presets.get("emoji"), [f"model.{assignment}" for assignment in assignments])


@pytest.mark.parametrize("name", presets.NAMES)
def test_a_preset_has_no_choice_without_effect(name):
    from dit_in_dit.config.rules import unused_choices
    from dit_in_dit.config.schema import keys

    usual = {key: value for key, _, value in keys(ModelConfig())}
    model = presets.get(name).model
    values = {key: value for key, _, value in keys(model)}
    assert [key for key in unused_choices(model) if values[key] != usual[key]] == []


# ------------------------------------------------------------------------------------------ tools


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_model_is_inspected_and_watched(family):
    model = toy(family)
    net = perturbed(NestedDiT(model))
    x, t, y = inputs(model)
    found = inspect(model)
    assert found["parameters"]["total"] == sum(part.numel() for part in net.parameters() if part.requires_grad)
    assert found["flow"][-1]["shape"] == [1, 3, *model.image_size]
    expected = net(x, t, y)
    with (
        hooks.watch_attention(net) as attention,
        hooks.watch_blocks(net) as blocks,
        hooks.watch_contribution(net) as contribution,
        hooks.watch_aggregation(net) as aggregation,
    ):
        assert torch.equal(net(x, t, y), expected)
    assert list(blocks) == ["outer_blocks.0", "outer_blocks.1", *["inner_blocks.0"] * model.inner_stages]
    count = model.tokens.count
    for name, weights in attention.items():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        if name.startswith("outer"):
            joined = count * (int(name.split(".")[1]) >= model.tokens.start)
            assert weights.shape == (3, 1, 4, 8 + joined, 8 + joined)
    attends = model.inner.mixer in ("image", "compact") and model.inner_stages
    assert ("inner_blocks.0" in attention) == bool(attends)
    assert aggregation == {}
    assert contribution.keys() == ({"inner_head"} if model.inner_stages else set())
    with hooks.without_inner(net):  # the inner head is the only one
        assert bool(net(x, t, y).any()) == (not model.inner_stages)


@pytest.mark.parametrize("keys", [
    {"qk_norm": True, "outer": {"norm": "rms", "rope": "grid"}, "inner": {"rope": "extent", "norm": "rms"}},
    {"tokens": TokensConfig(label=2, time=1, start=0), "outer": {"rope": "extent"}},
])  # fmt: skip
def test_the_inner_path_can_be_disabled_in_models_with_tokens_and_rotary_positions(keys):
    nested = perturbed(NestedDiT(small_model("inner outer*2 inner", **keys)))
    plain = NestedDiT(small_model("outer*2", **keys))
    plain.load_state_dict({key: value for key, value in nested.state_dict().items() if key in plain.state_dict()})
    x, t, y = inputs(nested.config)
    with hooks.without_inner(nested):
        torch.testing.assert_close(nested(x, t, y), plain(x, t, y))
