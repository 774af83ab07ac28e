"""The network against external references: DiT, convolutions, closed forms, and which tokens may see each other."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import inputs, perturbed, small_model
from dit_in_dit.config.model import InnerConfig, ModelConfig, OuterConfig, TokensConfig
from dit_in_dit.model.aggregate import AGGREGATORS, FUSIONS, SPREADS, AttentionPool, Mean, Weighted
from dit_in_dit.model.condition import CONDITIONS
from dit_in_dit.model.embed import EMBEDS, ConvEmbed, LinearEmbed, OuterEmbed, SplitSubPatches, Unpatch
from dit_in_dit.model.layers import sincos
from dit_in_dit.model.mixers import MIXERS
from dit_in_dit.model.mlps import MLPS
from dit_in_dit.model.modulation import MODULATIONS
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.norms import NORMS, RmsNorm
from dit_in_dit.model.rope import ROPES

GOLDEN = Path(__file__).parent / "golden" / "official_dit.npz"
PROGRAMS = ("inner*2 outer*2", "(inner outer*2)*2", "outer*2 inner*2", "inner outer*2 inner", "outer*2")
TABLES = {
    "embed": EMBEDS,
    "aggregate": AGGREGATORS,
    "mixer": MIXERS,
    "condition": CONDITIONS,
    "spread": SPREADS,
    "fuse": FUSIONS,
    "norm": NORMS,
    "mlp": MLPS,
    "rope": ROPES,
    "modulation": MODULATIONS,
}


def choices(section: type) -> dict[str, tuple]:
    """Every key of a config section with named or boolean values, and all its values."""
    found: dict[str, tuple] = {}
    for key, kind in get_type_hints(section).items():
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        for one in kinds:
            if get_origin(one) is Literal or one is bool:
                found[key] = get_args(one) or (False, True)
    return found


CHOICES = choices(InnerConfig) | {key: tuple(table) for key, table in TABLES.items()}
# What a value of the inner level needs beside it.
NEEDS = {("modulation", "shared"): {"width": 32}, ("spread", "refine"): {"width": 32}}
OTHERS = (  # numbers and groups, which have no list of values
    {"bottleneck": 5},
    {"inner": {"embed_layers": 2}},
    {"tokens": TokensConfig(label=2, start=1)},
    {"tokens": TokensConfig(time=2, label=1, adaln=False)},
    {"tokens": TokensConfig(label=3, rows="own", adaln=False)},
    {"tokens": TokensConfig(label=3, rows="own")},
    {"tokens": TokensConfig(time=1), "outer": {"rope": "grid"}},
    {"qk_norm": True, "outer": {"rope": "extent", "bias": "none"}, "inner": {"rope": "grid", "bias": "mlp"}},
    {"inner": {"mlp": "hyper", "condition": "outer"}},
    {"inner": {"modulation": "none", "mlp": "hyper", "condition": "outer", "head_condition": "rows"}},
    {"inner": {"modulation": "post", "condition": "outer_per_block", "mixer": "compact", "rope": "extent"}},
)
# Arguments of `small_model`: every value of every choice, those of later versions included. All defaults are one.
EVERY_CHOICE = list(
    {
        small_model(**choice): choice
        for choice in (
            *(
                {"inner": {key: value, **NEEDS.get((key, value), {})}}
                for key, values in CHOICES.items()
                for value in values
            ),
            *(
                {"outer": {key: value}}
                for key, values in choices(OuterConfig).items()
                for value in values
                if (key, value) != ("mlp", "hyper")  # of inner blocks only
            ),
            *({key: value} for key, values in choices(ModelConfig).items() for value in values),
            *OTHERS,
        )
    }.values()
)

# Keys and values that random sets of options cover (test_option_sets): here each in fewer programs.
RANDOM = {"mlp", "bias", "rope", "modulation", "position", "head_condition", "head_norm", "embed_layers", "bottleneck"}
RANDOM |= {"silu_twice", "tokens", "compact", "refine", "outer", "outer_sub_patch", "outer_per_block", "gauss", "repa"}
RANDOM |= {"ddt", "dct"}


def is_in_random_sets(choice: dict) -> bool:
    """Whether random sets of options cover a choice."""
    named = {key: value for key, value in choice.items() if not isinstance(value, dict)}
    for group in choice.values():
        named |= group if isinstance(group, dict) else {}
    return bool(named.keys() & RANDOM or RANDOM & {value for value in named.values() if isinstance(value, str)})


PAIRS = [
    (stages, choice)
    for stages in PROGRAMS
    for choice in EVERY_CHOICE
    if stages == "inner outer*2 inner" or not is_in_random_sets(choice)
]


@pytest.mark.parametrize("key", TABLES)
def test_config_choices_equal_the_tables_of_the_model(key):
    assert set(choices(InnerConfig)[key]) <= TABLES[key].keys()  # the config looks the others up in the table


def test_the_tested_arrangements_cover_every_choice():
    assert CHOICES.keys() - TABLES.keys() == {"bias", "position", "head_condition", "head_norm"}
    assert choices(ModelConfig).keys() >= {"use_inner", "learn_variance", "time_embed", "qk_norm", "silu_twice"}


def our_name(official: str) -> str:
    """Name in this package of a parameter of facebookresearch/DiT."""
    name = re.sub(r"^blocks\.(\d+)\.", r"outer_blocks.\1.", official)
    for old, new in (
        ("x_embedder.proj", "outer_embed.proj"),
        ("t_embedder", "time_embed"),
        ("y_embedder.embedding_table", "label_embed.table"),
        ("final_layer.adaLN_modulation.1", "outer_head.final.modulation.linear"),
        ("final_layer.linear", "outer_head.final.linear"),
        (".adaLN_modulation.1", ".modulation.linear"),
        (".attn.", ".branches.mix."),
        (".mlp.fc1", ".branches.mlp.0"),
        (".mlp.fc2", ".branches.mlp.2"),
    ):
        name = name.replace(old, new)
    return name


def plain(width: int, depth: int) -> ModelConfig:
    return ModelConfig(
        image_size=(8, 8),
        channels=4,
        patch_size=2,
        num_classes=10,
        stages=f"outer*{depth}",
        outer=OuterConfig(width=width, num_heads=4),
    )


def test_plain_dit_matches_the_official_dit():
    golden = np.load(GOLDEN)
    model = NestedDiT(plain(32, 2))
    position = torch.from_numpy(golden["state/pos_embed"])[0]
    torch.testing.assert_close(model.outer_embed.position, position, rtol=0, atol=1e-6)
    names = {k.removeprefix("state/") for k in golden.files if k.startswith("state/")} - {"pos_embed"}
    state = {our_name(name): torch.from_numpy(golden[f"state/{name}"]) for name in names}
    state["outer_embed.proj.weight"] = state["outer_embed.proj.weight"].flatten(1)
    model.load_state_dict(state)  # strict: exactly DiT's parameters, no more and no fewer
    x, y = torch.from_numpy(golden["x"]), torch.from_numpy(golden["y"])
    with torch.no_grad():
        out = model(x, torch.from_numpy(golden["t"]) / 1000, y)
    torch.testing.assert_close(out, torch.from_numpy(golden["out"]), rtol=0, atol=1e-5)


def test_plain_dit_is_initialised_like_the_official_dit():
    golden = np.load(GOLDEN)
    torch.manual_seed(0)
    parameters = dict(NestedDiT(plain(128, 2)).named_parameters())
    for key in golden.files:
        if key.startswith("init_std/") and "pos_embed" not in key:
            name = key.removeprefix("init_std/")
            value = parameters[our_name(name)].double()
            expected, mean = float(golden[key]), float(golden[f"init_mean/{name}"])
            assert value.std(correction=0).item() == pytest.approx(expected, rel=0.05), name
            chance = 4 * (2 / value.numel()) ** 0.5 * expected + 1e-12  # difference of two means over this many draws
            assert value.mean().item() == pytest.approx(mean, abs=chance), name


def test_patch_embedding_is_a_strided_convolution():
    model = small_model()
    embed = OuterEmbed(model)
    x, _, _ = inputs(model)
    weight = embed.proj.weight.unflatten(1, (3, 4, 4))
    expected = F.conv2d(x, weight, embed.proj.bias, stride=4).flatten(2).transpose(1, 2) + embed.position
    torch.testing.assert_close(embed(x), expected)


def test_a_convolution_with_kernel_size_one_equals_the_linear_embedding():
    model = small_model(inner={"embed": "conv", "kernel": 1})
    conv, linear = ConvEmbed(model), LinearEmbed(model)
    with torch.no_grad():
        linear[1].weight.copy_(conv.conv.weight.flatten(1))
        linear[1].bias.copy_(conv.conv.bias)
    x, _, _ = inputs(model)
    torch.testing.assert_close(conv(x), linear(x))


def test_only_the_convolutional_embedding_reaches_across_patch_borders():
    for kind, reaches in (("conv", True), ("linear", False)):
        model = NestedDiT(small_model(inner={"embed": kind}))
        x, _, _ = inputs(model.config)
        moved = x.clone()
        moved[:, :, :4, :4] += 1  # patch 0
        change = (model.inner_embed(moved) - model.inner_embed(x)).abs().amax(dim=(0, 2, 3))
        assert change[0] > 0
        assert bool(change[1:].max() > 0) is reaches


@pytest.mark.parametrize("size", [(16, 8), (8, 24), (4, 4)])
def test_unpatchify_inverts_patchify(size):
    model = small_model(image_size=size)
    x, _, _ = inputs(model)
    by_sub_patch = SplitSubPatches(model)(x).unflatten(-1, (3, 2, 2)).permute(0, 1, 2, 4, 5, 3).flatten(3)
    assert torch.equal(Unpatch(model, is_inner=True)(by_sub_patch), x)
    patches = F.unfold(x, 4, stride=4).transpose(1, 2).unflatten(-1, (3, 4, 4)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(Unpatch(model, is_inner=False)(patches), x)


def test_sub_patches_lie_inside_their_patch():
    model = small_model()
    x = torch.arange(16 * 8, dtype=torch.float32).view(1, 1, 16, 8).expand(1, 3, 16, 8)
    tokens = SplitSubPatches(model)(x)  # 1 T=8 S=4 12
    # patch 3 is the second of the second row: rows 4-7, columns 4-7; its last sub-patch starts at (6, 6)
    assert tokens[0, 3, 3, 0] == 6 * 8 + 6


def test_positions_differ_at_every_place():
    table = sincos(32, 5, 7)
    assert table.shape == (35, 32)
    assert torch.pdist(table).min() > 0.1


@pytest.mark.parametrize(("mixer", "seen"), [("patch", 1), ("none", 1), ("window", 4), ("conv", 4), ("image", 8)])
def test_each_mixer_mixes_exactly_its_scope(mixer, seen):
    """Number of patches that a change of sub-patch 0 of patch 0 reaches; 16x8 is a grid of 4x2 patches."""
    model = perturbed(NestedDiT(small_model("inner outer", inner={"mixer": mixer})))
    block = model.inner_blocks[0]
    tokens = torch.randn(2, 8, 4, 16)
    moved = tokens.clone()
    corner = 3 if mixer == "conv" else 0  # a 3x3 kernel reaches the neighbours from the patch's inner corner
    moved[:, 0, corner] += torch.randn(16)
    c = torch.randn(2, 1, 1, 32)
    change = (block(moved, c) - block(tokens, c)).abs().amax(dim=(0, 3))  # T S
    assert int((change.amax(1) > 1e-6).sum()) == seen
    if mixer == "none":
        assert int((change > 1e-6).sum()) == 1
    if mixer == "patch":
        assert bool((change[0] > 1e-6).all())


def test_conv_mixing_equals_a_convolution_over_the_image_of_tokens():
    model = perturbed(NestedDiT(small_model("inner outer", inner={"mixer": "conv"})))
    mixer = model.inner_blocks[0].branches["mix"]
    picture = torch.randn(2, 16, 8, 4)  # N E rows columns: 8x4 sub-patches
    tokens = picture.view(2, 16, 4, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
    expected = F.conv2d(picture, mixer.conv.weight, mixer.conv.bias, padding=1, groups=16)
    out = mixer(tokens).unflatten(1, (4, 2)).unflatten(3, (2, 2)).permute(0, 5, 1, 3, 2, 4).reshape(2, 16, 8, 4)
    torch.testing.assert_close(out, expected)


def test_attention_is_softmax_of_scaled_products():
    model = perturbed(NestedDiT(small_model("inner outer")))
    mixer = model.inner_blocks[0].branches["mix"].double()
    x = torch.randn(2, 8, 4, 16, dtype=torch.float64)
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)  # N T S heads d
    scores = torch.einsum("ntihd,ntjhd->nthij", q, k) / 8**0.5
    out = mixer.proj(torch.einsum("nthij,ntjhd->ntihd", scores.softmax(-1), v).flatten(-2))
    torch.testing.assert_close(mixer(x), out)


def test_weighted_aggregation_starts_as_the_mean():
    model = small_model()
    inner = torch.randn(2, 8, 4, 16)
    mean, weighted = Mean(model), Weighted(model)
    weighted.proj.load_state_dict(mean.proj.state_dict())
    torch.testing.assert_close(weighted(inner), mean(inner))


def test_attention_pooling_of_equal_tokens_gives_the_same_token():
    pool = AttentionPool(small_model())
    torch.nn.init.normal_(pool.query)
    token = torch.randn(2, 8, 1, 16)
    value = pool.kv(F.layer_norm(token, (16,), eps=1e-6))[..., 16:]
    torch.testing.assert_close(pool(token.expand(2, 8, 4, 16)), pool.proj(value[:, :, 0]))


def test_mean_has_no_projection_at_equal_width():
    model = small_model(inner={"width": 32})
    assert not list(Mean(model).parameters())


@pytest.mark.parametrize("stages", ["inner*2 outer*4", "(inner outer*2)*2", "outer*4 inner*2", "inner outer*4 inner"])
def test_gate_fusion_starts_as_the_plain_dit_bit_for_bit(stages):
    trained = perturbed(NestedDiT(small_model("outer*4")))
    nested = NestedDiT(small_model(stages, inner={"fuse": "gate"}))
    missing, unexpected = nested.load_state_dict(trained.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("inner_", "aggregates", "fuses", "spreads", "conditions")) for name in missing)
    x, t, y = inputs(trained.config)
    assert torch.equal(nested(x, t, y), trained(x, t, y))


def test_use_inner_false_gives_the_plain_dit():
    ablated = NestedDiT(small_model("inner*2 outer*3", use_inner=False))
    assert ablated.state_dict().keys() == NestedDiT(small_model("outer*3")).state_dict().keys()


@pytest.mark.parametrize("stages", PROGRAMS)
@pytest.mark.parametrize("choice", EVERY_CHOICE, ids=str)
def test_every_arrangement_can_train_one_step(stages, choice):
    model = perturbed(NestedDiT(small_model(stages, **choice)))
    x, t, y = inputs(model.config, batch=6)
    target = x.repeat(1, model.config.out_channels // model.config.channels, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = (model(x, t, y) - target).square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        if name == "time_embed.frequencies":
            assert not parameter.requires_grad
            continue
        assert parameter.grad is not None, f"{name} takes no part"
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, f"{name} gets no gradient"
    optimizer.step()
    assert (model(x, t, y) - target).square().mean() < loss


@pytest.mark.parametrize("stages", PROGRAMS)
def test_the_prediction_starts_at_zero(stages):
    model = NestedDiT(small_model(stages))
    assert not model(*inputs(model.config)).any()


def test_fuse_replace_leaves_no_path_that_avoids_the_inner_level():
    model = perturbed(NestedDiT(small_model("outer*2 inner", inner={"fuse": "replace"})))
    assert not hasattr(model, "outer_head")
    model = perturbed(NestedDiT(small_model("inner outer*2", inner={"fuse": "replace"})))
    x, t, y = inputs(model.config)
    with torch.no_grad():
        for parameter in model.inner_embed.parameters():
            parameter.zero_()  # cuts off the outer path: no other path may carry the image to the output
    assert torch.equal(model(x, t, y), model(torch.randn_like(x), t, y))


def test_fuse_replace_keeps_the_patch_positions():
    model = perturbed(NestedDiT(small_model("inner outer", inner={"fuse": "replace"})))
    x = torch.zeros(1, 3, 16, 8)  # all patches are equal
    out = SplitSubPatches(model.config)(model(x, torch.ones(1)))[0]
    assert not torch.allclose(out[0], out[5])


def test_missing_labels_equal_the_null_class():
    model = perturbed(NestedDiT(small_model()))
    x, t, _ = inputs(model.config)
    torch.testing.assert_close(model(x, t), model(x, t, torch.full((3,), 5)))


@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 0, (8, 8)), (4, 3, (4, 12)), (7, 0, (16, 4))])
def test_a_model_works_without_labels_and_with_other_channels_and_sizes(channels, classes, size):
    model = perturbed(
        NestedDiT(small_model("(inner outer)*2", channels=channels, num_classes=classes, image_size=size))
    )
    x, t, y = inputs(model.config)
    assert model(x, t, y).shape == (3, channels, *size)


def test_a_wrong_image_size_gives_an_error_with_the_size():
    model = NestedDiT(small_model())
    with pytest.raises(ValueError, match=r"x must be \(N, 3, 16, 8\): got \(2, 3, 8, 16\)"):
        model(torch.zeros(2, 3, 8, 16), torch.zeros(2))


@pytest.mark.parametrize("recompute", ["inner", "outer", "both"])
def test_recomputing_activations_changes_nothing(recompute):
    config = small_model("inner outer inner")
    plainly = perturbed(NestedDiT(config))
    again = NestedDiT(config, recompute=recompute)
    again.load_state_dict(plainly.state_dict())
    for model in (plainly, again):
        model(*inputs(config)).square().sum().backward()
    for one, other in zip(plainly.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_copy_of_a_model_is_independent_of_it():
    model = perturbed(NestedDiT(small_model("(inner outer)*2")))
    copied = copy.deepcopy(model)
    x, t, y = inputs(model.config)
    before = copied(x, t, y)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(x, t, y), before)


def test_interpolation_lies_between_the_sub_patch_token_and_the_message():
    model = small_model("outer inner", inner={"spread": "interpolate"})
    spread = perturbed(NestedDiT(model)).spreads[0]
    inner, outer, c = torch.randn(3, 8, 4, 16), torch.randn(3, 8, 32), torch.randn(3, 32)
    with torch.no_grad():
        spread.share.linear.weight.zero_()
        for bias, expected in (
            (-30.0, inner),
            (30.0, spread.message(outer)),
            (0.0, (inner + spread.message(outer)) / 2),
        ):
            spread.share.linear.bias.fill_(bias)
            torch.testing.assert_close(spread(inner, outer, c), expected)


def test_the_interpolation_weight_depends_on_time_and_channel():
    spread = perturbed(NestedDiT(small_model("outer inner", inner={"spread": "interpolate"}))).spreads[0]
    inner, outer = torch.zeros(2, 8, 4, 16), torch.randn(1, 8, 32).expand(2, -1, -1)
    told = spread(inner, outer, torch.stack([torch.zeros(32), torch.ones(32)]))
    share = told / spread.message(outer)
    assert share.std(dim=(1, 2)).max() < 1e-4  # one value for all sub-patches of an image
    assert (share[0] - share[1]).abs().max() > 1e-3
    assert share[1, 0, 0].std() > 1e-3


def test_rms_norm_equals_its_formula_and_is_used_by_all_blocks_of_a_level():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    norm = RmsNorm(8, 1e-6).double()
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    model = NestedDiT(small_model("(inner outer)*2 inner", inner={"norm": "rms"}))
    weights = [name for name, _ in model.named_parameters() if "norm" in name]
    assert len(weights) == 3 * 2 + 1  # two per block, one in the head
    assert all(name.startswith("inner") for name in weights)


@pytest.mark.parametrize("stages", PROGRAMS)
def test_qk_norm_makes_attention_independent_of_the_scale_of_queries_and_keys(stages):
    model = perturbed(NestedDiT(small_model(stages, qk_norm=True)))
    x, t, y = inputs(model.config)
    with torch.no_grad():
        before = model(x, t, y)
        for block in (*model.outer_blocks, *model.inner_blocks):
            qkv, width = block.branches.mix.qkv, block.branches.mix.proj.in_features
            qkv.weight[: 2 * width] *= 100
            qkv.bias[: 2 * width] *= 100
        torch.testing.assert_close(model(x, t, y), before, rtol=1e-3, atol=1e-4)
        for block in model.outer_blocks:
            block.branches.mix.qk_norm.key.mul_(5)
        assert (model(x, t, y) - before).abs().max() > 1e-3  # the learned scale acts
