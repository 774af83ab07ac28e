"""Twins have equal cost within the tolerance, and differ only in keys that are not fixed."""

from __future__ import annotations

import json
import math
import random
import shlex
from dataclasses import replace

import pytest
import torch

from conftest import small_model
from dit_in_dit import cost
from dit_in_dit.benchmark.timing import Times, step_seconds
from dit_in_dit.cli import main
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import from_yaml, override, to_yaml
from dit_in_dit.config.run import InnerConfig, ModelConfig, OuterConfig, RunConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.pretrained import find_run
from dit_in_dit.study.arms import match_arms
from dit_in_dit.study.match import COUNTS, NoTwin, count_parameters, find_twin, forward_macs, match
from dit_in_dit.study.plan import StudyConfig
from test_cli import lines_of
from test_cost import counted

CPU = torch.device("cpu")


def random_nested(seed: int) -> ModelConfig:
    """A random nested model, whose inner blocks are cheaper than its outer ones."""
    draw = random.Random(seed)
    heads, inner_heads = draw.choice([2, 3, 4, 6]), draw.choice([1, 2])
    program = draw.choice(
        [
            "inner*{i} outer*{o}",
            "(inner outer*{i})*3",
            "outer*{o} inner*{i}",
            "inner outer*{o} inner*{i}",
            "outer inner outer*{o}",
        ]
    )
    return ModelConfig(
        image_size=draw.choice([(32, 32), (32, 16)]),
        patch_size=8,
        num_classes=draw.choice([0, 9]),
        stages=program.format(i=draw.randint(1, 3), o=draw.randint(4, 10)),
        outer=OuterConfig(math.lcm(4, heads) * draw.randint(10, 18), heads, mlp_ratio=draw.choice([2, 3.5, 4])),
        inner=InnerConfig(
            sub_patch=draw.choice([2, 4]),
            width=4 * inner_heads * draw.randint(1, 3),
            num_heads=inner_heads,
            mlp_ratio=2,
            embed=draw.choice(["linear", "conv"]),
            mixer=draw.choice(["patch", "window", "image", "conv", "none"]),
            condition=draw.choice(["image", "patch", "sub_patch"]),
            aggregate=draw.choice(["mean", "weighted", "attention", "concat"]),
            fuse=draw.choice(["add", "gate", "replace"]),
        ),
    )


def total(model: ModelConfig, by: str) -> int:
    return cost.macs(model)["total"] if by == "macs" else count_parameters(model)


def dearer_plain(nested: ModelConfig, by: str, seed: int) -> ModelConfig:
    """A plain model that costs up to twice as much. At equal cost, the nested model's inner blocks might exceed it."""
    factor = 1 + random.Random(seed).random()
    plain = (replace(nested, use_inner=False, stages=f"outer*{n}") for n in range(1, 500))
    return next(model for model in plain if total(model, by) >= factor * total(nested, by))


def levels(model: ModelConfig) -> list:
    """The program without the numbers of outer blocks."""
    return [(level, count if level == "inner" else None) for level, count in model.program]


@pytest.mark.parametrize("by", ["macs", "params"])
@pytest.mark.parametrize("way", ["plain like nested", "nested like plain"])
def test_twenty_random_models_have_a_twin_within_a_percent(by, way):
    for seed in range(20):
        nested = random_nested(seed)
        plain = replace(nested, use_inner=False)
        model, like = (plain, nested) if way == "plain like nested" else (nested, dearer_plain(nested, by, seed))
        found = find_twin(model, total(like, by), COUNTS[by])
        assert total(found.model, by) == pytest.approx(total(like, by), rel=0.01), (seed, found)
        assert total(found.model, by) / total(like, by) - 1 == pytest.approx(found.gap, abs=1e-9)
        assert levels(found.model) == levels(model)
        assert found.model.inner == model.inner
        assert found.changed.keys() <= {"model.stages", "model.outer.width", "model.outer.mlp_ratio"}
        assert found.model.use_inner == model.use_inner


def test_the_flop_counter_confirms_that_twins_cost_the_same():
    for seed in range(4):
        nested = replace(random_nested(seed), num_classes=9)
        plain = find_twin(replace(nested, use_inner=False), forward_macs(nested), forward_macs).model
        assert counted(plain) == pytest.approx(counted(nested), rel=0.015)


def test_parameters_are_counted_without_building_every_block():
    for seed in range(10):
        model = random_nested(seed)
        assert count_parameters(model) == cost.parameters(model)["total"]
    for stages in ("first", "interleaved", "last", "both"):
        model = small_model(stages, depth=9)
        assert count_parameters(model) == cost.parameters(model)["total"]


def test_only_the_depth_changes_if_that_is_enough():
    found = find_twin(presets.get("dit-xl2").model, forward_macs(presets.get("dit-in-dit-xl2").model), forward_macs)
    assert found.changed == {"model.depth": (28, None), "model.stages": ("first", "outer*55")}
    assert abs(found.gap) < 0.001


def test_outer_blocks_are_divided_among_the_stages_in_proportion():
    model = small_model("outer*4 inner outer*2 inner outer*2")
    block = forward_macs(small_model("outer*2")) - forward_macs(small_model("outer*1"))
    for blocks, stages in (
        (16, "outer*8 inner*1 outer*4 inner*1 outer*4"),
        (3, "outer*1 inner*1 outer*1 inner*1 outer*1"),
    ):
        assert find_twin(model, forward_macs(model) + (blocks - 8) * block, forward_macs).model.stages == stages


def test_a_named_order_becomes_a_program_with_the_same_inner_blocks():
    model = small_model("both", depth=8, inner={"depth_ratio": 0.5})
    found = find_twin(model, 1.5 * forward_macs(model), forward_macs, tolerance=0.05)
    assert found.model.depth is None
    assert levels(found.model) == [("inner", 2), ("outer", None), ("inner", 2)]


def test_a_fixed_depth_ratio_ties_inner_blocks_to_the_depth():
    model = small_model("last", depth=8, inner={"depth_ratio": 0.5})
    found = find_twin(model, 2 * forward_macs(model), forward_macs, tolerance=0.1, fixed=["model.inner.depth_ratio"])
    assert found.changed == {"model.depth": (8, found.model.depth)}
    assert found.model.blocks("inner") == found.model.depth // 2


@pytest.mark.parametrize(
    ("fixed", "changed"),
    [
        (["model.depth"], {"model.outer.width"}),
        (["model.outer.width"], {"model.stages", "model.outer.mlp_ratio"}),
        (["model.outer.width", "model.depth"], {"model.outer.mlp_ratio"}),
        (["model.outer"], {"model.stages"}),
        (["model.stages", "model.outer.mlp_ratio"], {"model.stages", "model.outer.width"}),
    ],
)
def test_fixed_keys_are_not_changed(fixed, changed):
    model = random_nested(0)
    found = find_twin(model, 1.3 * forward_macs(model), forward_macs, tolerance=0.03, fixed=fixed)
    assert found.changed.keys() <= changed
    assert found.changed


def test_the_width_stays_a_multiple_of_the_heads_and_keeps_even_heads():
    for seed in range(20):
        model = random_nested(seed)
        outer = find_twin(model, 1.37 * forward_macs(model), forward_macs, fixed=["model.depth"]).model.outer
        assert outer.num_heads == model.outer.num_heads
        if model.outer.width // model.outer.num_heads % 2 == 0:
            assert outer.width // outer.num_heads % 2 == 0


def test_rotary_positions_keep_heads_whose_size_is_a_multiple_of_four():
    model = presets.get("pixnerd-l16").model
    twin = find_twin(model, forward_macs(presets.get("pixeldit-b16").model), forward_macs)
    assert twin.model.outer.width != 1024
    assert twin.model.outer.width // twin.model.outer.num_heads % 4 == 0


def test_levels_of_one_width_keep_it():
    model = presets.get("mpdit-b").model
    twin = find_twin(model, count_parameters(presets.get("ddt-b2").model), count_parameters)
    assert (twin.model.outer.width, twin.model.inner.width) == (768, 768)


def test_another_mlp_ratio_is_tried_before_a_far_width():
    """The target is 4% above the cost of six blocks. At near widths no number of blocks fits; at half the width, some
    number might."""
    model = ModelConfig(stages="outer*6", outer=OuterConfig(192, 4))
    found = find_twin(model, 1.04 * forward_macs(model), forward_macs, tolerance=0.001)
    assert found.changed.keys() >= {"model.outer.mlp_ratio"}
    assert abs(found.model.outer.width / 192 - 1) <= 0.2
    hidden = found.model.outer.width * found.model.outer.mlp_ratio
    assert hidden == pytest.approx(round(hidden), abs=1e-6)


def test_a_model_within_the_tolerance_is_unchanged():
    model = random_nested(3)
    assert find_twin(model, 1.009 * forward_macs(model), forward_macs).changed == {}


def test_a_missing_twin_gives_a_one_line_error():
    dear = small_model("inner*40 outer*1", inner={"width": 128})
    with pytest.raises(NoTwin, match=r"no twin within 1% in cost.*% off; raise the tolerance, or shrink the inner"):
        find_twin(dear, forward_macs(small_model("outer*2")), forward_macs)
    model = small_model("outer*2")
    with pytest.raises(NoTwin, match="free more of depth"):
        find_twin(model, 2 * forward_macs(model), forward_macs, fixed=["model.outer", "model.depth"])
    huge = replace(model, outer=replace(model.outer, mlp_ratio=40))
    with pytest.raises(NoTwin, match="free more of depth"):
        find_twin(huge, 9 * forward_macs(huge), forward_macs, fixed=["model.outer.width", "model.depth"])


# --------------------------------------------------------------------------------------------- time


def run_of(model: ModelConfig) -> RunConfig:
    return RunConfig(model=model, train=TrainConfig(batch_size=4, precision="float32"))


def wide(stages: str) -> ModelConfig:
    """A model wide enough for matrix products to take most of the time."""
    return ModelConfig(stages=stages, outer=OuterConfig(192, 4), inner=InnerConfig(32, 2, sub_patch=2))


@pytest.mark.slow
def test_a_model_with_twice_the_blocks_takes_about_twice_as_long():
    threads = torch.get_num_threads()
    pair = {"short": run_of(wide("outer*3")), "long": run_of(wide("outer*6"))}
    for _ in range(3):  # others may use the machine
        times = step_seconds(pair, CPU, threads=1, seconds=3)
        if 1.5 <= times["long"].over(times["short"]) <= 2.5:
            break
    assert 1.5 <= times["long"].over(times["short"]) <= 2.5
    assert torch.get_num_threads() == threads


def test_times_are_compared_round_by_round():
    quiet, twice = Times((1.0, 1.0, 9.0)), Times((2.0, 2.0, 18.0))
    assert twice.over(quiet) == 2
    assert twice.seconds == 2


def test_timing_stays_in_its_budget_and_keeps_the_random_state():
    config = replace(run_of(small_model("outer inner")), train=TrainConfig(batch_size=2, accumulate=2))
    before = torch.random.get_rng_state()
    times = step_seconds({"a": config, "b": config}, CPU, threads=1, seconds=0.0)
    assert len(times["a"].rounds) == len(times["b"].rounds) == 1
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.full
def test_a_twin_by_time_takes_as_long_when_measured_again():
    config, like = run_of(wide("outer*2")), run_of(wide("outer*4 inner*2"))
    for _ in range(3):  # others may use the machine; the tolerance stays what it is
        try:
            model = match(config, like, "time", tolerance=0.05, device=CPU, threads=1).model
        except NoTwin:
            continue
        again = step_seconds({"this": replace(config, model=model), "like": like}, CPU, threads=1, seconds=5)
        if abs(again["this"].over(again["like"]) - 1) <= 0.05:
            return
    pytest.fail("no twin by time stood a second measurement in three tries")


# --------------------------------------------------------------------------------------------- arms

SMALL = {
    "model.image_size": 16,
    "model.stages": "outer*4 inner*2",
    "model.outer.width": 64,
    "model.inner.sub_patch": 2,
    "model.inner.num_heads": 2,
    "model.inner.width": 16,
    "train.batch_size": 2,
    "train.warmup": 200,
}


@pytest.fixture
def quickly(monkeypatch):
    """Replace measured times by made-up times."""
    for module in ("arms", "match"):
        monkeypatch.setattr(f"dit_in_dit.study.{module}.SECONDS_EACH", 0.1)


def study(**values) -> StudyConfig:
    return StudyConfig.from_dict({"base": "emoji-dit", "set": SMALL, "budget": {"steps": 100}, **values})


def arms_of(**values) -> dict:
    return {arm.name: arm for arm in match_arms(study(**values), CPU, 1)}


@pytest.mark.usefixtures("quickly")
def test_arms_cost_as_much_as_the_control():
    arms = arms_of(
        arms={
            "full": {},
            "plain": {"model.use_inner": False},
            "wide inner": {"model.inner.width": 24},
            "same": {"model.inner.fuse": "gate"},
        }
    )
    full = arms["full"]
    for name, arm in arms.items():
        assert arm.config.model.outer.width == 64, "the study names it"
        assert cost.macs(arm.config.model)["total"] == pytest.approx(full.cost["macs"], rel=0.02), name
        assert arm.gap["macs"] == pytest.approx(arm.cost["macs"] / full.cost["macs"] - 1)
        assert arm.gap["params"] == pytest.approx(arm.cost["params"] / full.cost["params"] - 1)
        assert arm.cost["time"] > 0
    assert full.gap["macs"] == full.gap["time"] == 0
    assert arms["same"].matched == {}
    assert arms["plain"].matched["model.stages"][0] == "outer*4 inner*2"
    assert arms["wide inner"].config.model.inner.width == 24


@pytest.mark.usefixtures("quickly")
def test_an_arm_is_matched_to_the_arm_it_is_compared_with():
    arms = arms_of(
        arms={
            "far": {"against": "big", "model.inner.mixer": "none"},
            "big": {"model.stages": "outer*8 inner*2", "model.depth": None, "against": "huge"},
            "huge": {"model.stages": "outer*12 inner*2", "model.depth": None},
        },
        control="huge",
    )
    assert list(arms) == ["far", "big", "huge"]
    assert arms["huge"].matched == {}
    assert arms["huge"].against == "huge"
    assert arms["big"].cost["macs"] == arms["huge"].cost["macs"]
    assert arms["far"].cost["macs"] == pytest.approx(arms["big"].cost["macs"], rel=0.02)


@pytest.mark.usefixtures("quickly")
def test_arms_stay_unchanged_if_nothing_is_matched():
    arms = arms_of(arms={"full": {}, "deep": {"model.stages": "outer*8 inner*2"}}, match="none")
    assert arms["deep"].matched == {}
    assert arms["deep"].gap["macs"] > 0.3


@pytest.mark.usefixtures("quickly")
def test_a_budget_holds_after_matching():
    arms = arms_of(arms={"full": {}, "plain": {"model.use_inner": False}}, budget={"macs": 1e11}, match="params")
    for arm in arms.values():
        spent = 3 * arm.cost["macs"] * arm.config.global_batch * arm.config.train.steps
        assert spent == pytest.approx(1e11, rel=0.01)
    arms = arms_of(
        arms={"full": {}, "deep": {"model.stages": "outer*9 inner*2"}}, budget={"seconds": 300}, match="none"
    )
    for arm in arms.values():
        assert arm.config.train.steps == round(300 / arm.cost["time"])
        assert arm.config.train.warmup == 200, "not shortened to a budget that was only guessed at first"


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (
            {"arms": {"a": {}, "x": {"model.inner.width": 96, "model.outer": {"width": 64, "num_heads": 4}}}},
            r"arm 'x' costs [\d.]+x 'a' in MACs, more than tolerance 0.02 allows",
        ),
        ({"arms": {"a": {}, "b": {"against": "c"}, "c": {"against": "b"}}}, "b, c are compared in a circle"),
    ],
)  # fmt: skip
def test_a_study_with_unmatchable_arms_gives_a_one_line_error(values, part):
    with pytest.raises(UserError, match=part) as refused:
        match_arms(study(**values), CPU, 1)
    assert len(str(refused.value)) <= 220


# ------------------------------------------------------------------------------------------ command


@pytest.mark.usefixtures("quickly")
def test_the_command_names_the_keys_that_make_the_twin(capsys, tmp_path):
    start = ["--preset", "emoji-reference", "--set", "train.batch_size=2"]
    like = override(presets.get("dit-s8"), ["model.channels=3", "model.num_classes=9"])
    (tmp_path / "like.yaml").write_text(to_yaml(like))
    like_it = ["--like", str(tmp_path / "like.yaml"), "--device", "cpu"]
    main(["match", *start, *like_it, "--out", str(tmp_path / "twin.yaml")])
    printed = capsys.readouterr().out
    assert "MACs per image" in printed
    assert "unequal" in printed
    words = shlex.split(printed.splitlines()[-1])
    assert words[:2] == ["dit-in-dit", "train"]
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    made = from_yaml((tmp_path / "twin.yaml").read_text())
    assert override(presets.get("emoji-reference"), sets) == made
    assert forward_macs(made.model) == pytest.approx(forward_macs(like.model), rel=0.01)


@pytest.mark.usefixtures("quickly")
def test_the_command_prints_json(capsys, tmp_path):
    (tmp_path / "like.yaml").write_text(to_yaml(presets.get("emoji")))
    words = ["--preset", "emoji-dit", "--set", "train.batch_size=1", "--like", str(tmp_path / "like.yaml")]
    main(["match", *words, "--by", "params", "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["costs"].keys() == {"macs", "params", "activation_bytes", "time"}
    assert abs(found["gap"]) <= 0.01
    assert found["costs"]["params"]["ratio"] == pytest.approx(1 + found["gap"])
    assert [word.partition("=")[0] for word in found["set"]] == list(found["changed"])


@pytest.mark.usefixtures("quickly")
def test_a_model_can_be_matched_to_a_run_and_to_a_shipped_model(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["match", "--preset", "emoji-dit", "--device", "cpu", "--json"]
    wanted = {name: read_config(find_run(name)) for name in ("models/emoji", "models/emoji-dit")}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text(to_yaml(wanted["models/emoji"]))
    for name, config in {**wanted, "mine": wanted["models/emoji"]}.items():
        main([*words, "--set", "model.num_classes=99", "--like", name])
        costs = json.loads(capsys.readouterr().out)["costs"]
        assert costs["macs"]["like"] == forward_macs(config.model)
    main([*words, "--like", "emoji"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["costs"]["macs"]["like"] == forward_macs(presets.get("emoji").model)
    assert "--like emoji is the preset; the run of that name is" in printed.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--preset", "emoji"], "--like"),
        (["--like", "emoji"], "--preset NAME"),
        (["--preset", "emoji", "--like", "emojy"], "did you mean 'emoji'"),
        (["--preset", "emoji", "--like", "absent.yaml"], "cannot read --like absent.yaml"),
        (["--preset", "emoji", "--like", "dit-s8", "--by", "love"], "--by"),
        (["--preset", "emoji", "--like", "dit-s8", "--tolerance", "0"], "--tolerance must be"),
        (["--preset", "emoji", "--like", "dit-s8", "--device", "tpu"], "not available"),
        (
            [
                "--preset",
                "dit-in-dit-s2",
                "--set",
                "model.channels=3",
                "--set",
                "model.num_classes=9",
                "--like",
                "emoji",
            ],
            "no twin within 1% in MACs",
        ),
        (["--preset", "emoji-dit", "--like", "dit-s8"], "has model.channels=4, model.num_classes=1000: set the same"),
        (["--preset", "emoji", "--set", "model.image_size=64", "--like", "emoji"], "model.image_size=[32, 32]"),
        (["--preset", "emoji", "--set", "model.num_classes=0", "--like", "models/emoji"], "model.num_classes=99"),
        (["--preset", "emoji", "--like", "model/emoji"], "did you mean 'models/emoji'"),
        (["--preset", "emoji", "--like", "."], "no run at ."),
    ],
)
def test_mistakes_give_a_one_line_error(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in lines_of(["match", *words], capsys)
