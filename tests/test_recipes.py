"""Launch plans: on any number of GPUs the run is the same, and estimates follow the textbook formulas."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from dit_in_dit.cli import main, parser
from dit_in_dit.cli.options import chosen_config
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import changed_keys, override
from dit_in_dit.inspection.gpus import GPUS
from dit_in_dit.inspection.launch_plan import recipe
from test_cli import lines_of


def launched(command: str):
    """Config and number of processes of a printed command."""
    words = shlex.split(command)
    nodes = int(words[words.index("--nodes") + 1]) if "--nodes" in words else 1
    if "--wrap" in words:
        words = shlex.split(words[words.index("--wrap") + 1])
    processes = nodes * int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
    options = parser().parse_args(words[words.index("train") :])
    return chosen_config(options), processes


@pytest.mark.parametrize("name", ["dit-s2", "dit-in-dit-s16", "dit-xl2"])
def test_every_launch_plan_trains_on_the_same_examples(name):
    preset = presets.get(name)
    for gpus in (1, 8, 64):
        found = recipe(name, preset, gpus)
        config, processes = launched(found.command)
        assert processes == gpus
        assert config.global_batch == preset.global_batch == found.rows * found.accumulate * gpus
        shared = {
            key: getattr(preset.train, key) for key in ("batch_size", "accumulate", "recompute", "parallel", "shard")
        }
        # All that may differ, and none of it is an example.
        assert not changed_keys(preset, replace(config, train=replace(config.train, **shared)))


def test_time_is_six_flops_per_mac_over_the_assumed_throughput():
    """DiT-XL/2 takes 118.64 "Gflops" forward (Peebles & Xie 2023), which are MACs."""
    found = recipe("dit-xl2", presets.get("dit-xl2"), 8, gpu="a100", mfu=0.5)
    assert found.step == pytest.approx(3 * 2 * 118.64e9 * 256 / (8 * 312e12 * 0.5), rel=0.002)
    assert found.hours == pytest.approx(found.step * 400_000 / 3600)
    assert found.images == pytest.approx(256 / found.step)


def test_planned_memory_is_state_plus_activations_and_fits():
    preset = presets.get("dit-xl2")
    few, many = (recipe("dit-xl2", preset, gpus, settings=["train.parallel=ddp"]) for gpus in (64, 8))
    # 22 bytes for each of 675 M parameters, and 0.66 GB an image (README: 5.3 GB for eight).
    assert few.memory == pytest.approx(22 * 674.8e6 + few.rows * 5.3e9 / 8, rel=0.02)
    assert many.memory - few.memory == pytest.approx((many.rows - few.rows) * 5.3e9 / 8, rel=0.02)
    for gpu, (capacity, _) in GPUS.items():
        small = recipe("dit-s2", presets.get("dit-s2"), 1, gpu=gpu)
        assert small.memory <= 0.9e9 * capacity
        if small.accumulate > 1:  # one pass fewer would not fit
            state = 22 * 32.96e6
            assert state + 2 * (small.memory - state) > 0.9e9 * capacity


def test_if_no_image_fits_activations_are_recomputed_and_then_the_plan_is_refused():
    preset = override(presets.get("dit-in-dit-xl2"), ["model.depth=32"])
    tight = recipe("dit-in-dit-xl2", preset, 8, gpu="rtx4090")
    assert tight.recompute == "both"
    assert "--set train.recompute=both" in tight.command
    plain = recipe("dit-in-dit-xl2", preset, 8, gpu="h200")
    assert tight.step / plain.step == pytest.approx(8 / 6 * 989 / 165)
    wide = override(presets.get("dit-s8"), ["model.outer.width=12288", "model.depth=3"])
    with pytest.raises(UserError, match="exceed 24 GB"):
        recipe("dit-s8", wide, 64, gpu="rtx4090")


def test_over_several_machines_each_holds_one_sharded_copy_and_both_launchers_start_the_same_run():
    preset = presets.get("dit-xl2")
    plan = recipe("dit-xl2", preset, 16)
    config, processes = launched(plan.command)
    assert (config.train.parallel, config.train.shard, plan.shard, processes) == ("fsdp", 8, 8, 16)
    words = shlex.split(plan.sky)
    assert words[:6] == ["sky", "launch", "--gpus", "H100:8", "--num-nodes", "2"]
    inner = shlex.split(words[-1])
    assert changed_keys(chosen_config(parser().parse_args(inner[inner.index("train") :])), config) == {}
    # By hand: 675 M parameters, a ring of 8, two copies.
    total, share = 674.8e6, 7 / 8
    assert plan.inside == pytest.approx(share * 8 * total, rel=0.01)  # 2 + 2 bytes gathered, 4 reduced
    assert plan.outside == pytest.approx(2 * (1 / 2) * 4 * total / 8, rel=0.01)
    assert plan.state == pytest.approx(20 * total / 8, rel=0.3)
    assert plan.checkpoint == pytest.approx(16 * total, rel=0.01)
    for keys in (["train.reduction=fixed", "train.accumulate=16", "train.batch_size=16"], ["train.parallel=ddp"]):
        assert "train.shard" not in recipe("dit-xl2", override(preset, keys), 16, settings=keys).command


def test_the_command_prints_the_plans_as_json_and_as_text(capsys):
    main(["recipe", "dit-s8", "--gpus", "8", "--gpus", "64", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [one["gpus"] for one in found["recipes"]] == [8, 64]
    main(["recipe", "dit-s8"])
    printed = capsys.readouterr().out
    assert "an assumption" in printed
    assert printed.count("--preset dit-s8") == 4  # with SkyPilot's
    main(["recipe", "dit-s8", "--mfu", "0.5"])
    assert "an assumption" not in capsys.readouterr().out


def test_a_mistake_gives_a_one_line_error(capsys):
    for words, part in (
        (["dit-b5"], "did you mean"),
        (["dit-s8", "--gpus", "7"], "must divide the 256 examples"),
        (["dit-s8", "--gpus", "16", "--per-node", "5"], "multiple of 5"),
        (["dit-s8", "--gpu", "h1000"], "did you mean 'h100'"),
        (["dit-s8", "--mfu", "2"], "at most 1"),
    ):
        assert part in lines_of(["recipe", *words], capsys)
