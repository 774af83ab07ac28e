"""Token dropping in training: patches that bypass outer blocks, the same in every run, at the cost that is stated."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compiling import NoHostWait, losses, recorded
from conftest import SHARDED, inputs, perturbed, small_model, with_train
from dit_in_dit import cost, inspect
from dit_in_dit.cli import main
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash, override
from dit_in_dit.config.model import TokensConfig
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.token_drop import TokenDrop
from dit_in_dit.curves.logs import read_run
from dit_in_dit.data.sources import open_source
from dit_in_dit.inspection.hooks import watch_attention, watch_blocks
from dit_in_dit.inspection.launch_plan import recipe
from dit_in_dit.model import nested
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.rope import ROPES, GridRope
from dit_in_dit.model.route import Route
from dit_in_dit.model.stages import OuterStage, State
from dit_in_dit.runtime.seeding import PURPOSES, generator
from dit_in_dit.study.arms import budgeted_config
from dit_in_dit.training import graphs
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.loop import train
from dit_in_dit.training.routing import kept_patches
from dit_in_dit.training.terms import terms_cost
from dit_in_dit.training.trainer import Trainer
from dit_in_dit.training.utilization import Utilization
from processes import run_together

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"stages": "outer*4"},
    "rope": {"stages": "outer*4", "outer": {"rope": "grid"}, "qk_norm": True},
    "extent, tokens": {"stages": "outer*4", "outer": {"rope": "extent"}, "tokens": TokensConfig(label=2, time=1)},
    "tokens that join late": {"stages": "outer*4", "outer": {"rope": "grid"}, "tokens": TokensConfig(label=2, start=2)},
    "inner last": {"stages": "outer*4 inner", "inner": {"condition": "patch"}},
    "interleaved": {"stages": "inner outer*2 inner outer*2", "inner": {"condition": "outer"}},
    "internal head": {"stages": "outer*4", "internal_head": 2, "outer": {"rope": "grid"}},
    "shared": {"stages": "outer*4", "outer": {"modulation": "shared", "mlp": "swiglu"}},
}
MIDDLE = TokenDrop(3, 1, 2)  # of 8 patches, around the two middle blocks of four


def perturbed_model(name: str, **keys) -> NestedDiT:
    model = dict(MODELS[name])
    return perturbed(NestedDiT(small_model(model.pop("stages"), **model), **keys))


def route_of(model, drop=MIDDLE, batch: int = 3) -> Route:
    keep = kept_patches(0, torch.arange(batch), model.config.patches, drop.kept)
    return Route(keep, drop.first, drop.last)


def long_model(stages: str = "outer*5 inner", /, **keys) -> Any:
    """256 patches of one pixel, and small."""
    return small_model(
        stages, image_size=(16, 16), patch_size=1, num_classes=3,
        **{"outer": {"width": 8, "num_heads": 2, "rope": "grid"}, "inner": {"sub_patch": 1, "width": 8}, **keys},
    )  # fmt: skip


@pytest.fixture
def long(run_config) -> RunConfig:
    """A run of six steps with 256 patches, of which a quarter stays."""
    config = replace(run_config, model=long_model())
    return with_train(config, token_drop=0.75, batch_size=2, evaluate_every=0, steps=4)


def trained(config: RunConfig, out, resume: bool = False, until: int | None = None) -> str:
    list(train(config, out, device="cpu", resume=resume, until=until))
    return (out / "log.jsonl").read_text()


def saved(run) -> dict[str, bytes]:
    newest = max((run / "checkpoints").iterdir())
    return {file.name: file.read_bytes() for file in newest.iterdir() if file.suffix == ".safetensors"}


# ------------------------------------------------------------------------------------------ the patches that stay


def test_the_patches_of_an_example_depend_on_seed_and_number_alone():
    kept = kept_patches(5, torch.arange(40), 256, 64)
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < 256
    order = torch.tensor([17, 3, 39, 17])
    assert torch.equal(kept_patches(5, order, 256, 64), kept[order])
    assert not torch.equal(kept_patches(6, order, 256, 64), kept[order])
    assert torch.equal(kept_patches(5, torch.arange(2**33, 2**33 + 1), 9, 9), torch.arange(9)[None])


def test_every_patch_stays_equally_often():
    kept = kept_patches(1, torch.arange(4000), 256, 64)
    count = torch.bincount(kept.flatten(), minlength=256).double()
    # Each count is binomial, 4000 times 1/4; patches of an image exclude each other.
    assert (count / 4000 - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / 4000) ** 0.5
    chi2 = float(((count - 1000) ** 2 / 750).sum()) * 255 / 256
    assert 180 < chi2 < 340  # mean 255, standard deviation 23


def test_the_numbers_are_those_of_philox():
    """NumPy's Philox is another generator: the words come from the published one, which tests/test_philox.py holds."""
    assert PURPOSES["token_drop"] not in {value for name, value in PURPOSES.items() if name != "token_drop"}
    one = kept_patches(0, torch.tensor([0]), 256, 128)
    assert not np.array_equal(one[0].numpy(), np.sort(generator(0, "order", 0).permutation(256)[:128]))


# ------------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("name", MODELS)
def test_dropping_no_patch_gives_the_dense_network(name):
    model = perturbed_model(name)
    x, t, y = inputs(model.config)
    every = route_of(model, TokenDrop(8, 1, 2))
    torch.testing.assert_close(model(x, t, y, route=every), model(x, t, y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_dropped_patches_are_as_if_the_blocks_ran_on_a_smaller_image(name):
    """The outer stages, written out: blocks run one image at a time on the kept rows, whose angles are cut out."""
    model = perturbed_model(name)
    x, t, y = inputs(model.config)
    route = route_of(model)
    found = model(x, t, y, route=route)
    for image in range(3):
        one = [part[image : image + 1] for part in (x, t, y)]
        torch.testing.assert_close(found[image : image + 1], _by_hand(model, route, image, *one), rtol=1e-5, atol=1e-5)


def _by_hand(model: NestedDiT, route: Route, image: int, x, t, y):
    state = State(model.outer_embed(x), model.inner_embed(x))
    condition = model._condition(model.time_embed(t, x.dtype), model.label_embed(y), y)
    done = 0
    for stage in model.stages:
        if not isinstance(stage, OuterStage):
            state = stage(state, condition)
            continue
        row, lead, patches = condition.row(stage.shared)[:, None], state.tokens, state.outer.clone()
        for number, block in enumerate(stage.blocks):
            if number == stage.start:
                lead = condition.tokens
            own = route.keep[image] if route.first <= done <= route.last else torch.arange(8)
            count = 0 if lead is None else lead.shape[1]
            sequence = patches[:, own] if lead is None else torch.cat([lead, patches[:, own]], 1)
            rope = block.branches["mix"].rope
            if rope is not None:
                rows = torch.cat([torch.arange(count), own + count])
                whole = rope.cos, rope.sin
                rope.cos, rope.sin = rope.cos[rows], rope.sin[rows]
            out = block(sequence, row)
            if rope is not None:
                rope.cos, rope.sin = whole
            patches[:, own] = out[:, count:]
            lead = None if lead is None else out[:, :count]
            done += 1
        state = State(patches, state.inner, lead, state.rows)
    return sum(head(state, condition) for head in model.heads)


def test_patches_that_bypass_blocks_are_unchanged_and_kept_ones_do_not_see_them():
    model = perturbed_model("inner last")
    x, t, y = inputs(model.config)
    route = route_of(model)
    with watch_blocks(model) as seen:
        model(x, t, y, route=route)
    assert [seen[f"outer_blocks.{n}"].shape[1] for n in range(4)] == [8, 3, 3, 8]
    assert seen["inner_blocks.0"].shape[:3] == (3, 8, 4)  # the inner level stays dense
    stage = model.stages[0]
    before = seen["outer_blocks.0"]
    after = route.leave(seen["outer_blocks.2"], before, 8)
    dropped = torch.ones(3, 8, dtype=torch.bool).scatter(1, route.keep, False)
    assert torch.equal(after[dropped], before[dropped])
    assert not (after == before)[~dropped].all(-1).any()
    assert stage.first == 0


def test_attention_in_a_training_pass_can_be_watched():
    model = perturbed_model("rope")
    x, t, y = inputs(model.config)
    with watch_attention(model) as seen:
        model(x, t, y, route=route_of(model))
    assert [seen[f"outer_blocks.{n}"].shape[-1] for n in range(4)] == [8, 3, 3, 8]


@pytest.mark.parametrize("name", ["rope", "tokens that join late", "interleaved"])
def test_gradients_equal_finite_differences(name):
    model = perturbed_model(name).double()
    x, t, y = inputs(model.config)
    x, route = x.double(), route_of(model)
    draw = torch.Generator().manual_seed(1)
    first = next(name for name, _ in model.outer_embed.named_parameters())
    for part in (
        f"outer_embed.{first}",
        "outer_blocks.0.branches.mix.proj.weight",
        "outer_blocks.2.branches.mix.qkv.weight",
    ):
        weight = model.get_parameter(part)
        way = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        (slope,) = torch.autograd.grad(model(x, t, y, route=route).square().sum(), weight)
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight.add_(way, alpha=step)
                ends.append(float(model(x, t, y, route=route).square().sum()))
                weight.sub_(way, alpha=step)
        assert float((slope * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("recompute", ["outer", "both", "selective"])
def test_recomputed_blocks_give_the_same_gradients(recompute):
    found = []
    for how in ("none", recompute):
        torch.manual_seed(0)
        model = perturbed_model("extent, tokens", recompute=how)
        x, t, y = inputs(model.config)
        model(x, t, y, route=route_of(model)).square().sum().backward()
        found.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_bfloat16_gives_nearly_the_same():
    model = perturbed_model("rope")
    x, t, y = inputs(model.config)
    exact = model(x, t, y, route=route_of(model))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x, t, y, route=route_of(model)).float(), exact, rtol=0.1, atol=0.1)


# ------------------------------------------------------------------------------------------ cost


@pytest.mark.parametrize("name", MODELS)
def test_training_macs_agree_with_the_flop_counter(name):
    model = perturbed_model(name)
    x, t, y = inputs(model.config)
    counts = []
    for route in (None, route_of(model)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t, y, route=route)
        counts.append(counter.get_total_flops() / 2 / 3)
    stated = [cost.training_macs(model.config, drop)["total"] / 3 for drop in (None, MIDDLE)]
    assert stated == pytest.approx(counts, rel=0.005)
    assert stated[0] - stated[1] == pytest.approx(counts[0] - counts[1], rel=1e-6)  # exact where patches are dropped
    assert stated[0] == cost.macs(model.config)["total"]


@pytest.mark.parametrize("name", ["rope", "tokens that join late", "interleaved"])
def test_activation_bytes_are_what_a_real_pass_keeps(name):
    model, kept = perturbed_model(name), {}
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    x, t, y = inputs(model.config, batch=4)
    route = route_of(model, batch=4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, t, y, route=route)
    real = sum(size for size, _ in kept.values())
    stated = inspect(model.config, batch=4, token_drop=MIDDLE)["activation_bytes"]["total"]
    assert stated == pytest.approx(real, rel=0.01)
    assert stated < inspect(model.config, batch=4)["activation_bytes"]["total"]


def test_inspect_states_the_cost_of_a_step_and_of_a_dense_one(capsys):
    words = ["inspect", "--preset", "dit-s2", "--set", "train.token_drop=0.75"]
    main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)

    def block(tokens: int, width: int = 384) -> int:
        return tokens * (12 * width**2 + 2 * tokens * width) + 6 * width**2

    dense, saved_macs = found["macs"]["total"], 8 * (block(256) - block(64))  # blocks 2 to 9 of 12
    assert found["training_macs"]["total"] == 3 * (dense - saved_macs)
    main(words)
    share = f"{1 - saved_macs / dense:.3f}"
    assert f"outer blocks 2 to 9 see 64 of 256 patches; a step has {share} of" in capsys.readouterr().out


def test_macs_of_a_run_and_of_a_budget_follow_the_steps(long, tmp_path):
    config = with_train(long, token_drop_steps=3)
    sparse, dense = (cost.training_macs(config.model, drop)["total"] * 2 for drop in (config.token_drop, None))
    assert sparse < 0.9 * dense
    trained(with_train(config, steps=4), tmp_path / "run")
    curve = read_run(tmp_path / "run")
    assert curve.macs(np.array([0.0, 2, 3, 4])).tolist() == [0, 2 * sparse, 3 * sparse, 3 * sparse + dense]
    for steps in (2, 3, 7):
        study: Any = type("Study", (), {"set": {}, "budget": {"macs": cost.run_macs(config, steps)}})
        assert budgeted_config(study, config, {}).train.steps == steps


def test_inspect_counts_terms_on_the_patches_that_their_blocks_see(long):
    config = override(long, ["train.terms.sra=0.5", "train.terms.sra_blocks=[2, 4]"])
    dense = terms_cost(with_train(config, token_drop=0.0))["sra"]["macs"]
    assert dense - terms_cost(config)["sra"]["macs"] == 3 * 4 * (256 - 64) * 8**2


def test_mfu_counts_the_macs_of_the_steps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    dense = override(presets.get("dit-s2"), ["train.precision=bfloat16"])
    sparse, mixed = (override(dense, ["train.token_drop=0.75", f"train.token_drop_steps={n}"]) for n in ("null", 9))
    mfu = [Utilization(each, torch.device("cuda"), 1, {}).read(100).get("mfu") for each in (dense, sparse, mixed)]
    macs = [cost.training_macs(dense.model, drop)["total"] for drop in (None, sparse.token_drop)]
    assert mfu[1] / mfu[0] == pytest.approx(macs[1] / macs[0])
    assert mfu[2] is None


def test_a_launch_plan_has_the_time_and_memory_of_the_steps():
    config = override(presets.get("dit-xl2"), ["train.batch_size=32"])
    dense, sparse = recipe("dit-xl2", config, 1), recipe("dit-xl2", override(config, ["train.token_drop=0.75"]), 1)
    assert sparse.step / dense.step == pytest.approx(0.3527, abs=1e-4)
    assert sparse.memory < 0.65 * dense.memory
    half = override(config, ["train.token_drop=0.75", f"train.token_drop_steps={config.train.steps // 2}"])
    mixed = recipe("dit-xl2", half, 1)
    assert mixed.hours == pytest.approx((dense.hours + sparse.hours) / 2)
    assert mixed.memory == dense.memory


# ------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("keys", "drop"),
    [
        ({"token_drop": 0.75}, TokenDrop(64, 2, 2)),
        ({"token_drop": 0.5, "token_drop_blocks": (0, 4)}, TokenDrop(128, 0, 4)),
        ({"token_drop": 0.3, "token_drop_blocks": (1, 3)}, TokenDrop(179, 1, 3)),
        ({}, None),
        ({"token_drop_blocks": (1, 3), "token_drop_steps": 5}, None),
    ],
    ids=str,
)
def test_keys_name_the_blocks_and_the_patches_that_stay(run_config, keys, drop):
    assert with_train(replace(run_config, model=long_model()), **keys).token_drop == drop


@pytest.mark.parametrize(
    ("assignments", "part"),
    [
        (["model.patch_size=2"], "needs at least 256 patches: got 64; set a smaller model.patch_size"),
        (["model.stages=outer*4"], "leaves the first 2 and last 2 outer blocks dense, and the model has 4"),
        (["train.token_drop_blocks=[3, 5]"], "first <= last < 5, the number of outer blocks: got [3, 5]"),
        (["train.token_drop_blocks=[3, 2]"], "got [3, 2]"),
        (["train.token_drop=0.99"], "from 0 to 0.95"),
        (["train.token_drop_steps=0"], "from 1 to 1e+12: got 0"),
        (["train.compile=graphs", "train.token_drop_steps=2"], "set train.token_drop_steps=null"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_in_one_line(long, assignments, part):
    with pytest.raises(UserError) as error:
        override(long, assignments)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_without_it_keeps_its_hash(run_config):
    assert config_hash(with_train(run_config, token_drop=0.0)) == config_hash(run_config)
    long = replace(run_config, model=long_model())
    assert config_hash(with_train(long, token_drop=0.5)) != config_hash(long)


def test_a_model_that_takes_no_route_is_refused(long, tmp_path):
    class Own(NestedDiT):
        def forward(self, x, t, y=None):
            return super().forward(x, t, y)

    with pytest.raises(UserError, match=r"needs a NestedDiT whose forward takes a route: got Own"):
        list(train(long, tmp_path / "run", device="cpu", model=Own(long.model)))


def test_rotary_positions_of_ones_own_must_take_rows(long, monkeypatch):
    class Turned(GridRope):
        def forward(self, q, k):
            return super().forward(q, k)

    monkeypatch.setitem(ROPES, "grid", Turned)
    with pytest.raises(UserError, match=r"Turned.forward must take `rows`"):
        Trainer(long, open_source(long.data, long.model), CPU)


# ------------------------------------------------------------------------------------------ runs


def test_the_numbers_of_the_examples_decide_and_later_steps_are_dense(long, monkeypatch):
    config = with_train(long, accumulate=2, token_drop_steps=3)
    source, given, forward = open_source(config.data, config.model), [], nested.NestedDiT.forward

    def watched(self, x, t, y=None, *, route=None):
        given.append(route)
        return forward(self, x, t, y, route=route)

    monkeypatch.setattr(nested.NestedDiT, "forward", watched)
    trainer, examples = Trainer(config, source, CPU), Examples(source, config)
    for step in range(4):  # examples of two skipped steps are left out
        trainer.update([examples[2 * (step + 2) + number] for number in range(2)])
    assert [route is None for route in given] == [False] * 6 + [True] * 2
    for number, route in enumerate(given[:6], 4):
        expected = kept_patches(config.seed, torch.arange(2 * number, 2 * number + 2), 256, 64)
        assert torch.equal(route.keep, expected)
        assert (route.first, route.last) == (2, 2)


@pytest.mark.parametrize("settings", [[], ["train.noise=device", "train.dropout=0.1", "train.terms.sra=0.5"]], ids=str)
def test_a_stopped_run_with_token_dropping_resumes_bit_for_bit(long, settings, tmp_path):
    config = override(with_train(long, token_drop_steps=3, accumulate=2), settings)
    config = override(config, ["train.terms.sra_blocks=[2, 4]"])  # the first sees fewer patches
    whole = trained(config, tmp_path / "whole")
    trained(config, tmp_path / "parts", until=2)
    assert trained(config, tmp_path / "parts", resume=True) == whole
    assert saved(tmp_path / "parts") == saved(tmp_path / "whole")
    dense = trained(with_train(config, token_drop=0.0), tmp_path / "dense")
    assert json.loads(dense.splitlines()[0])["loss"] == json.loads(whole.splitlines()[0])["loss"]  # heads start at zero
    assert dense != whole


def test_held_out_errors_and_samples_are_those_of_all_patches(long, tmp_path, monkeypatch):
    lengths, forward = [], nested.NestedDiT.forward

    def watched(self, x, t, y=None, *, route=None):
        lengths.append((self.training, route is not None))
        return forward(self, x, t, y, route=route)

    monkeypatch.setattr(nested.NestedDiT, "forward", watched)
    trained(with_train(long, steps=2, evaluate_every=2), tmp_path / "run")
    main(["sample", str(tmp_path / "run"), "--num", "2", "--out", str(tmp_path / "drawn"), "--device", "cpu"])
    assert set(lengths) == {(True, True), (False, False)}


@pytest.mark.slow
def test_token_dropping_has_the_same_bits_on_one_and_two_processes(long, tmp_path):
    config = with_train(long, reduction="fixed", accumulate=2, token_drop_steps=3)
    trained(config, tmp_path / "alone")
    for turn, (world, until) in enumerate(((2, 2), (1, 4))):
        run_together(world, trained, config, tmp_path / "many", turn > 0, until)
    assert saved(tmp_path / "many") == saved(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", SHARDED])
@pytest.mark.full
def test_two_processes_train_as_one(long, parallel, tmp_path):
    config = with_train(long, parallel=parallel, accumulate=2, token_drop_steps=3)
    logs = [trained(with_train(config, parallel="ddp"), tmp_path / "alone")]
    logs += run_together(2, trained, config, tmp_path / "run")[:1]
    losses = [[line["loss"] for line in map(json.loads, log.splitlines()) if "loss" in line] for log in logs]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("recompute", ["both", "selective"])
def test_recomputed_steps_with_dropout_and_a_term_train_as_others(long, recompute):
    config = override(with_train(long, dropout=0.2), ["train.terms.sra=0.5", "train.terms.sra_blocks=[2, 4]"])
    found, expected = ([loss for loss, _ in losses(with_train(config, recompute=how))] for how in (recompute, "none"))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("keys", [{}, {"accumulate": 2, "precision": "bfloat16", "recompute": "both"}], ids=str)
def test_no_step_waits_for_the_device(long, monkeypatch, keys):
    monkeypatch.setattr(nested, "_check_inputs", lambda *inputs: None)
    config = with_train(long, **keys)
    source = open_source(config.data, config.model)
    trainer, examples = Trainer(config, source, CPU), Examples(source, config)
    with NoHostWait():
        trainer.update([examples[number] for number in range(examples.per_step)])


@pytest.mark.parametrize("keys", [{}, {"recompute": "selective", "accumulate": 2, "dropout": 0.1}], ids=str)
def test_compiled_blocks_have_a_graph_for_each_number_of_tokens_from_the_first_step_on(long, backend, keys, full):
    if not full and keys:
        pytest.skip("with --full")
    config = with_train(long, token_drop_steps=3, **keys)
    found = losses(with_train(config, compile=True), steps=4, counting=backend)
    assert [graphs for _, graphs in found] == [3, 3, 3, 3]  # inner, outer on 256 and on 64; the dense step needs none
    expected = [loss for loss, _ in losses(with_train(config, compile=False), steps=4)]
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-5)


def test_a_replayed_step_trains_as_a_compiled_one(long, backend, monkeypatch):
    monkeypatch.setattr(graphs, "capture", recorded)
    replayed = [loss for loss, _ in losses(with_train(long, compile="graphs"), steps=4)]
    assert replayed == pytest.approx([loss for loss, _ in losses(with_train(long, compile=False), steps=4)], rel=1e-5)
    assert len(set(replayed)) == 4  # each step has its own patches
