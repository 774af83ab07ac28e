"""Configs: accepted and refused values, stage programs, YAML, hash."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import small_model
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash, from_yaml, override, replace_keys, to_yaml
from dit_in_dit.config.program import ORDERS, format_stages, parse_stages
from dit_in_dit.config.run import RunConfig, SampleConfig
from dit_in_dit.config.schema import to_dict


@pytest.mark.parametrize("name", presets.NAMES)
@pytest.mark.parametrize("meanings", [False, True])
def test_yaml_round_trip_keeps_every_preset(name, meanings):
    config = presets.get(name)
    assert from_yaml(to_yaml(config, meanings=meanings)) == config


def test_printed_config_has_a_meaning_for_every_key():
    for line in to_yaml(RunConfig(), meanings=True).splitlines():
        assert len(line.split("#", 1)[1].strip()) > 5, line


def test_configs_can_be_read_without_torch():
    code = "import sys, dit_in_dit.cli, dit_in_dit.config.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_configs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        presets.get("emoji").seed = 1


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("inner*7 outer*28", (("inner", 7), ("outer", 28))),
        ("(inner outer*4)*7", (("inner", 1), ("outer", 4)) * 7),
        ("outer*26 inner*4", (("outer", 26), ("inner", 4))),
        ("inner*2 outer*24 inner*2", (("inner", 2), ("outer", 24), ("inner", 2))),
        ("outer*28", (("outer", 28),)),
        ("outer outer*2 (outer)*3", (("outer", 6),)),
        ("((inner outer)*2 outer)*2", (("inner", 1), ("outer", 1), ("inner", 1), ("outer", 2)) * 2),
    ],
)
def test_stage_programs_parse_into_levels_and_block_counts(text, program):
    assert parse_stages(text) == program
    assert parse_stages(format_stages(program)) == program


@given(st.lists(st.tuples(st.sampled_from(["inner", "outer"]), st.integers(1, 9)), min_size=1, max_size=8))
def test_a_stage_program_round_trips_through_text(runs):
    program = parse_stages(" ".join(f"{level}*{count}" for level, count in runs))
    assert parse_stages(format_stages(program)) == program
    for level in ("inner", "outer"):
        assert sum(n for name, n in program if name == level) == sum(n for name, n in runs if name == level)


@pytest.mark.parametrize(
    ("order", "program"),
    [
        ("first", "inner*3 outer*12"),
        ("last", "outer*12 inner*3"),
        ("interleaved", "(inner outer*4)*3"),
        ("both", "inner*2 outer*12 inner*1"),
    ],
)
def test_named_orders_expand_to_stage_programs(order, program):
    named = small_model(order, depth=12)
    assert named.program == parse_stages(program)  # int(12 * 0.25) = 3 inner blocks


def test_interleaving_keeps_every_block_if_the_inner_depth_does_not_divide_the_outer_depth():
    model = small_model("interleaved", depth=7, inner={"depth_ratio": 0.45})
    assert (model.blocks("outer"), model.blocks("inner")) == (7, 3)


def test_use_inner_false_leaves_only_the_outer_blocks():
    for stages in ("inner*3 outer*2", "(inner outer)*2", "outer*2 inner"):
        assert small_model(stages, use_inner=False).program == (("outer", 2),)
    for order in ORDERS:  # also where the order itself could not be had
        assert small_model(order, depth=2, use_inner=False).program == (("outer", 2),)


@pytest.mark.parametrize(
    ("assignment", "part"),
    [
        ("model.inner.agregate=mean", "did you mean 'model.inner.aggregate'"),
        ("modle.depth=3", "did you mean 'model.depth'"),
        ("model.patch_size=5", "must divide image_size"),
        ("model.inner.sub_patch=3", "must divide patch_size"),
        ("model.outer.num_heads=7", "must divide width"),
        ("model.outer.width=190", "must divide width"),
        ("model.inner.kernel=2", "must be odd"),
        ("model.inner.mixer=windows", "one of patch, window"),
        ("model.depth=3", "set model.depth=null"),
        ("model.stages=lst", "cannot read 'lst'"),
        ("model.stages=inner*2", "at least one outer block"),
        ("model.stages=inner*2)", "cannot read"),
        ("model.stages=(inner outer*2", "cannot read"),
        ("model.stages=outer*0", "at least one outer block"),
        ("model.stages=((outer*999)*999)*999", "blocks"),
        ("model.stages=outer*5000", "at most 1000"),
        ("model.stages=first", "set model.depth=N"),
        ("model.image_size=[32, 32, 3]", "2 values"),
        ("model.channels=0", "from 1 to"),
        ("model.use_inner=maybe", "true or false"),
        ("seed=-1", "from 0"),
        ("seed=1.5", "whole number"),
        ("train.steps=nan", "whole number"),
        ("train.learning_rate=-1", "from 0"),
        ("train.learning_rate=inf", "finite"),
        ("train.ema=1", "from 0"),
        ("data.held_out=1", "from 0"),
        ("sample.interval=[0.9, 0.1]", "low to high"),
        ("sample.sampler=plms", "one of euler"),
        ("train=5", "group of keys"),
        ("model", "key=value"),
        ("model.depth=[", "not valid YAML"),
    ],
)
def test_invalid_values_give_a_one_line_error_with_the_way_out(assignment, part):
    with pytest.raises(UserError) as error:
        override(presets.get("emoji"), [assignment])
    message = str(error.value)
    assert part in message
    assert "\n" not in message
    assert len(message) <= 200


def test_invalid_values_raise_an_error_in_python_too():
    with pytest.raises(UserError, match=r"sample\.steps"):
        SampleConfig(steps="many")
    with pytest.raises(UserError, match="window must divide"):
        small_model(image_size=(16, 12), inner={"mixer": "window"})
    with pytest.raises(UserError, match="2 inner blocks"):
        small_model("both", depth=4)


def test_a_sampler_must_support_the_path():
    with pytest.raises(UserError, match="use ddim"):
        override(presets.get("emoji"), ["diffusion.path=ddpm", "sample.sampler=heun"])
    with pytest.raises(UserError, match="must divide 1000"):
        override(presets.get("emoji"), ["diffusion.path=ddpm", "sample.steps=217"])


def test_guidance_needs_a_trained_null_class():
    with pytest.raises(UserError, match="label_drop above 0"):
        override(presets.get("emoji"), ["train.label_drop=0"])
    override(presets.get("emoji"), ["train.label_drop=0", "sample.guidance=1"])


def test_long_programs_print_as_one_line():
    config = override(presets.get("emoji"), ["model.stages=" + "inner outer " * 90])
    assert from_yaml(to_yaml(config, meanings=True)) == config


@pytest.mark.parametrize(
    ("stages", "key", "unused"),
    [
        ("outer*3 inner*3", "aggregate=attention", True),
        ("outer*3 inner*3", "spread=add", False),
        ("inner*2 outer*3", "spread=add", False),
        ("inner*2 outer*3", "spread=interpolate", True),
        ("inner*2 outer*3", "aggregate=mean", False),
        ("inner outer inner", "aggregate=concat", False),
        ("inner outer inner", "spread=interpolate", False),
        ("outer*3", "aggregate=attention", False),
    ],
)
def test_a_choice_that_no_stage_uses_gives_a_warning(stages, key, unused, recwarn):
    override(presets.get("emoji"), [f"model.stages={stages}", f"model.inner.{key}"])
    assert [f"model.inner.{key.split('=')[0]} has no effect" in str(each.message) for each in recwarn] == [
        True
    ] * unused


def test_overrides_apply_together():
    config = override(
        presets.get("dit-in-dit-s2"), ["model.depth=null", "model.stages=outer*3 inner", "train.steps=1e3"]
    )
    assert config.model.program == (("outer", 3), ("inner", 1))
    assert config.train.steps == 1000


def test_unsafe_or_ambiguous_yaml_is_refused():
    with pytest.raises(UserError, match="did you mean 'train'"):
        from_yaml("trian: {steps: 3}")
    with pytest.raises(UserError, match="given twice, the second on line 2"):
        from_yaml("seed: 1\nseed: 2")
    with pytest.raises(UserError, match="not valid YAML"):
        from_yaml("seed: !!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="must hold keys"):
        from_yaml("just text")


def test_an_unknown_preset_names_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'dit-in-dit-xl2'"):
        presets.get("dit-in-dit-xl-2")


def test_the_config_hash_identifies_a_config():
    config = presets.get("emoji")
    assert config_hash(config) == config_hash(from_yaml(to_yaml(config)))
    assert config_hash(config) != config_hash(replace(config, seed=1))


# ------------------------------------------------------------------------------------- round trips


def values(section=RunConfig, prefix=""):
    """A strategy for each key, made only from its type and range, so that new keys are tested too."""
    found = {}
    for f, hint in (
        (f, get_type_hints(section)[f.name]) for f in fields(section) if "low" in f.metadata and f.name != "plugins"
    ):
        if is_dataclass(hint):
            found |= values(hint, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = value_of(hint, f.metadata["low"], f.metadata["high"])
    return found


def value_of(hint, low, high):
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in (Union, UnionType):
        return st.none() | value_of(parts[0], low, high)
    if origin is tuple:
        one = value_of(parts[0], low, high)
        return (
            st.lists(one, min_size=1, max_size=5).map(tuple)
            if parts[-1] is Ellipsis
            else st.tuples(*[one] * len(parts))
        )
    if hint is bool:
        return st.booleans()
    if hint is int:
        small = [n for n in (0, 1, 2, 4, 8, 16, 48, 64) if low <= n <= high]
        return st.sampled_from(small) | st.integers(max(int(low), -(2**63)), min(int(high), 2**63))
    if hint is float:
        return st.floats(max(low, -1e308), min(high, 1e308)) | st.sampled_from([low, min(high, 1e308)])
    awkward = [
        "yes",
        "null",
        "1e5",
        "0x1f",
        "2020-01-01",
        "a: b",
        "# no",
        "- a",
        "'",
        '"',
        "{a}",
        "*a",
        "&a",
        "~",
        "é\u3000",
    ]
    stages = st.lists(st.sampled_from(["inner", "outer", "outer*2", "(inner outer)*3"]), min_size=1, max_size=9).map(
        " ".join
    )
    return (
        stages | st.sampled_from(awkward) | st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=200)
    )


VALUES = values()
CHANGE = st.sampled_from(sorted(VALUES)).flatmap(lambda name: st.tuples(st.just(name), VALUES[name]))


@settings(max_examples=50, deadline=None)
@given(st.lists(CHANGE, max_size=15))
def test_any_valid_config_round_trips_through_yaml(changes):
    config = RunConfig()
    for change in changes:
        with suppress(UserError):  # not with what was changed before
            config = replace_keys(config, dict([change]))
    for meanings in (False, True):
        assert from_yaml(to_yaml(config, meanings=meanings)) == config
    again = RunConfig.from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert config_hash(again) == config_hash(config)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300) | st.text("{}[]:,-?&*!|>'\"%@#\n ab1.", max_size=60))
def test_any_text_gives_a_valid_config_or_a_one_line_error(text):
    with suppress(UserError):
        config = from_yaml(text)
        assert from_yaml(to_yaml(config)) == config
