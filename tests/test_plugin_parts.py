"""A user's part with a wrong output shape or invalid MACs is refused before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_in_dit
from conftest import small_model
from dit_in_dit.config import choices
from dit_in_dit.config.errors import UserError
from dit_in_dit.inspection.plugin_parts import check_plugin_parts
from dit_in_dit.inspection.trace import inspect
from dit_in_dit.model.aggregate import FUSIONS, SPREADS, Mean
from dit_in_dit.model.condition import DitTime, ImageCondition, PatchCondition
from dit_in_dit.model.embed import LinearEmbed
from dit_in_dit.model.mixers import ConvMixer
from dit_in_dit.model.mlps import SwiGlu
from dit_in_dit.model.modulation import AdaLNZero, BlockModulation
from dit_in_dit.model.norms import LayerNorm
from dit_in_dit.model.rope import GridRope
from dit_in_dit.training.loop import train


def altered(base: type[nn.Module], change: Any) -> type[nn.Module]:
    """A user's class: a subclass of `base` with a changed output."""

    class Altered(base):  # type: ignore[misc,valid-type]
        def forward(self, *inputs: Tensor) -> Any:
            out = super().forward(*inputs)
            return tuple(map(change, out)) if isinstance(out, tuple) else change(out)

    return Altered


BASES = {
    "embed": LinearEmbed,
    "aggregate": Mean,
    "mixer": ConvMixer,
    "condition": PatchCondition,
    "fuse": FUSIONS["add"],
    "spread": SPREADS["add"],
    "norm": LayerNorm,
    "mlp": SwiGlu,
    "rope": GridRope,
    "modulation": AdaLNZero,
    "time_embed": DitTime,
}


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Restore the tables after each test."""
    before = {kind: dict(choices.table(kind)) for kind in choices.PARTS}
    yield
    for kind, entries in before.items():
        choices.table(kind).clear()
        choices.table(kind).update(entries)


def config(kind: str, part: type[nn.Module]) -> Any:
    dit_in_dit.register(kind, "mine", part)
    choice = {kind: "mine"} if kind == "time_embed" else {"inner": {kind: "mine"}}
    return small_model("(inner outer)*2 inner", **choice)


def test_every_kind_of_part_is_tested():
    assert BASES.keys() == set(choices.PARTS)


@pytest.mark.parametrize("kind", BASES)
def test_a_part_with_the_right_shape_passes(kind):
    check_plugin_parts(config(kind, altered(BASES[kind], lambda out: out + 1)))


@pytest.mark.parametrize("change", [lambda out: out[:1], lambda out: out[..., :1], lambda out: (out, out)])
@pytest.mark.parametrize("kind", BASES)
def test_a_wrong_output_shape_gives_a_one_line_error(kind, change):
    with pytest.raises(UserError, match=rf"{kind}=mine: Altered must give a tensor \[(2|16), .*\]: got (\[|tuple)"):
        inspect(config(kind, altered(BASES[kind], change)))


@pytest.mark.parametrize("kind", BASES)
def test_another_type_is_refused_in_one_line(kind):
    with pytest.raises(UserError, match=rf"{kind}=mine: Altered must keep the type of its input, torch.float32: got"):
        inspect(config(kind, altered(BASES[kind], lambda out: out.double())))


def test_the_rows_that_a_condition_states_are_those_that_it_gives():
    part = altered(PatchCondition, lambda out: out)
    part.rows = staticmethod(lambda model: 1000)
    with pytest.raises(UserError, match=r"Altered\.rows must be the rows per image that it gives, 8: got 1000"):
        check_plugin_parts(config("condition", part))


def test_a_condition_may_give_one_row_for_all_tokens():
    check_plugin_parts(config("condition", altered(ImageCondition, lambda out: out)))


def test_a_modulation_may_give_vectors_for_each_place():
    dit_in_dit.register("modulation", "mine", altered(AdaLNZero, lambda out: out))
    check_plugin_parts(small_model("outer inner", inner={"modulation": "mine", "condition": "outer_per_block"}))
    check_plugin_parts(small_model("outer inner", inner={"modulation": "mine", "mixer": "none"}))


@pytest.mark.parametrize("kind", ["rope", "modulation"])
def test_a_wrong_number_of_tensors_gives_a_one_line_error(kind):
    class Fewer(BASES[kind]):
        def forward(self, *inputs: Tensor) -> Any:
            return super().forward(*inputs)[:1]

    with pytest.raises(UserError, match=rf"{kind}=mine: Fewer must give \d tensors \[.*\]: got tuple of 1"):
        check_plugin_parts(config(kind, Fewer))


@pytest.mark.parametrize(
    ("kind", "name", "value", "said"),
    [
        ("mlp", "macs", staticmethod(lambda width, hidden: 1.5), r"macs must give a whole number .*: got 1\.5"),
        ("mlp", "row_macs", staticmethod(lambda width, hidden, condition: -1), "Altered.row_macs must give .*: got -1"),
        ("mlp", "macs", staticmethod(lambda model: 1), "macs takes width and hidden width, as a static"),
        ("modulation", "macs", staticmethod(lambda model: 1), "macs takes condition, width, branches and places"),
        ("modulation", "macs", staticmethod(lambda *sizes: None), "Altered.macs must give .*: got None"),
        ("time_embed", "macs", staticmethod(lambda model: "1"), "time_embed=mine: Altered.macs must give .*: got '1'"),
    ],
)  # fmt: skip
def test_invalid_macs_of_parts_of_both_levels_give_a_one_line_error(kind, name, value, said):
    part = altered(BASES[kind], lambda out: out)
    setattr(part, name, value)
    with pytest.raises(UserError, match=said):
        check_plugin_parts(config(kind, part))


def test_a_modulation_without_a_number_of_vectors_gives_a_one_line_error():
    class Bare(BlockModulation):
        def forward(self, c: Tensor) -> tuple[Tensor, ...]:
            return ()

        @staticmethod
        def branch(x: Tensor, norm: nn.Module, branch: Any, *vectors: Tensor) -> Tensor:
            return x + branch(norm(x))

    with pytest.raises(UserError, match=r"modulation=mine: Bare\.macs takes .* has no attribute 'per_branch'"):
        check_plugin_parts(config("modulation", Bare))


def test_one_class_at_both_levels_is_checked_with_the_width_of_each():
    dit_in_dit.register("modulation", "mine", altered(AdaLNZero, lambda out: out))
    check_plugin_parts(small_model("outer inner", inner={"modulation": "mine"}, outer={"modulation": "mine"}))


def test_a_part_of_the_outer_level_of_a_plain_model_is_checked():
    dit_in_dit.register("mlp", "mine", altered(SwiGlu, lambda out: out[:1]))
    with pytest.raises(
        UserError, match=r"model\.outer\.mlp=mine: Altered must give a tensor \[2, 8, 32\]: got \[1, 8, 32\]"
    ):
        check_plugin_parts(small_model("outer", outer={"mlp": "mine"}))


@pytest.mark.parametrize(
    ("macs", "said"),
    [
        (staticmethod(lambda model: "many"), "macs must give a whole number of at least 0: got 'many'"),
        (staticmethod(lambda model: 1.5), "a whole number of at least 0: got 1.5"),
        (staticmethod(lambda model: -1), "a whole number of at least 0: got -1"),
        (lambda self, model: 1, "macs takes the model's config, as a staticmethod"),
    ],
)
def test_invalid_macs_give_a_one_line_error(macs, said):
    part = altered(Mean, lambda out: out)
    part.macs = macs
    with pytest.raises(UserError, match=said):
        check_plugin_parts(config("aggregate", part))


def test_a_part_that_reads_numbers_is_checked_on_the_cpu():
    with pytest.raises(UserError, match="must give a tensor"):
        check_plugin_parts(config("aggregate", altered(Mean, lambda out: out[:, :1] * out.sum().item())))


def test_a_part_that_reads_numbers_passes():
    check_plugin_parts(config("aggregate", altered(Mean, lambda out: out * out.sum().item())))


def test_training_refuses_a_wrong_part_before_it_makes_a_folder(run_config, tmp_path):
    from dataclasses import replace

    model = config("aggregate", altered(Mean, lambda out: out[:, :1]))
    with pytest.raises(UserError, match="must give a tensor"):
        list(train(replace(run_config, model=model), tmp_path / "run", device="cpu"))
    assert not (tmp_path / "run").exists()
    assert torch.is_grad_enabled()
