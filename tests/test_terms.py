"""Loss terms beside the objective's loss: values and gradients, logs, checkpoints, processes, exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager

import dit_in_dit as dd
from conftest import SHARDED_FULL, inputs, perturbed, small_model, with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash, override, to_yaml
from dit_in_dit.data.sources import open_source
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.inspection import cost
from dit_in_dit.inspection.hooks import watch_blocks
from dit_in_dit.interop.release import export_release
from dit_in_dit.model import compiled
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.route import Route
from dit_in_dit.runs import checkpoint
from dit_in_dit.runtime.philox import uniform
from dit_in_dit.training import alignment, graphs
from dit_in_dit.training.alignment import sra_blocks
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.loop import train
from dit_in_dit.training.term import Pass
from dit_in_dit.training.terms import TERMS, LossTerms
from dit_in_dit.training.trainer import Trainer
from processes import run_together, trained

CPU = torch.device("cpu")
SRA = ("train.terms.sra=0.5",)


def with_terms(config, *settings, stages="outer*2 inner*1 outer*1", **model):
    model = small_model(stages, image_size=(8, 8), num_classes=3, **model)
    return override(replace(config, model=model), [*SRA, *settings])


def losses(config, steps=3) -> list[dict[str, float]]:
    """What `Trainer.update` returns for the first steps."""
    trainer = Trainer(config, source := open_source(config.data, config.model), CPU)
    examples = Examples(source, config)
    lines = []
    for step in range(steps):
        numbers = range(step * examples.per_step, (step + 1) * examples.per_step)
        lines.append({k: float(v) for k, v in trainer.update([examples[number] for number in numbers]).items()})
    return lines


def log(out: Path) -> str:
    return (out / "log.jsonl").read_text()


def state(out: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.newest(out)
    return {**saved.state(), **{f"averaged.{name}": tensor for name, tensor in saved.averaged().items()}}


def passed(config, *, seed=1) -> tuple[NestedDiT, LossTerms, Pass]:
    """A float64 model, its terms, and a pass in which the averaged model has other weights than the model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # else the slopes of `check_gradients` depend on the tests that ran before
        model, averaged = (perturbed(NestedDiT(config.model), seed + k).double() for k in (0, 1))
    terms = LossTerms(config, model).double()
    x, t, y = inputs(config.model)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    given = (x.double(), noise, t.double(), y, torch.tensor([5, 2**40, 9]))
    return model, terms, Pass(*given, {}, Objective(config.diffusion), averaged, sharded=False)


def summed(model, terms, given) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the terms without the objective's loss, which is computed in float32; and the parts alone."""
    with terms.recorded(model) as outputs:
        model(given.objective.noisy(given.x, given.noise, given.t), given.t, given.y)
        total, alone = terms.add_to(torch.zeros_like(given.t), replace(given, outputs=outputs))
    return total.mean(), alone


@pytest.mark.parametrize("distance", ["smooth_l1", "cosine"])
@pytest.mark.parametrize("tokens", [{}, {"tokens": {"time": 1, "label": 2}}])
def test_sra_equals_a_computation_in_plain_torch(run_config, distance, tokens):
    config = override(with_terms(run_config, "train.terms.sra_blocks=[0,2]"), [f"train.terms.sra_distance={distance}"])
    config = override(config, [f"model.tokens.{name}={count}" for name, count in tokens.get("tokens", {}).items()])
    model, terms, given = passed(config)
    _, alone = summed(model, terms, given)
    t = (given.t - 0.2 * uniform(config.seed, "terms", given.example)).clamp(0, 1)
    assert ((given.t - t) > 0).all()
    mix = [(1 - s)[:, None, None, None] * given.x + s[:, None, None, None] * given.noise for s in (given.t, t)]
    patches = config.model.patches
    with torch.no_grad():
        with watch_blocks(model) as seen:
            model(mix[0], given.t, given.y)
        student = seen["outer_blocks.0"][:, -patches:]
        with watch_blocks(given.averaged) as seen:
            given.averaged(mix[1], t, given.y)
        target = seen["outer_blocks.2"][:, -patches:]
        (w, b), (v, d) = ((terms["sra"].projector[n].weight, terms["sra"].projector[n].bias) for n in (0, 2))
        student = F.silu(student @ w.T + b) @ v.T + d
        difference = (student - target).abs()
        huber = torch.where(difference < 0.05, difference**2 / 0.1, difference - 0.025).flatten(1).mean(1)
        cosine = 1 - ((student * target).sum(-1) / (student.norm(dim=-1) * target.norm(dim=-1))).mean(1)
    torch.testing.assert_close(alone[1], huber if distance == "smooth_l1" else cosine, rtol=1e-10, atol=1e-10)


def check_gradients(model, terms, given):
    """Gradients of the sum equal finite differences, of the model's and of the terms' weights."""
    weights = [*model.parameters(), *terms.parameters()]
    gradients = torch.autograd.grad(summed(model, terms, given)[0], weights, allow_unused=True)
    draw = torch.Generator().manual_seed(0)
    for group in (range(len(weights)), range(len(weights) - len(list(terms.parameters())), len(weights))):
        way = [torch.randn(weights[k].shape, generator=draw, dtype=torch.float64) for k in group]
        slope = sum((way[n] * gradients[k]).sum() for n, k in enumerate(group) if gradients[k] is not None)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for n, k in enumerate(group):
                    weights[k].add_(way[n], alpha=sign * 1e-6)
                ends.append(summed(model, terms, given)[0])
                for n, k in enumerate(group):
                    weights[k].add_(way[n], alpha=-sign * 1e-6)
        assert abs(slope) > 1e-3
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(slope), rel=1e-6)
    assert all(weight.grad is None for weight in given.averaged.parameters())


def test_gradients_of_sra_equal_finite_differences(run_config):
    check_gradients(*passed(with_terms(run_config)))


class PatchEncoder(torch.nn.Module):
    """Stands in for DINOv2, with its interface: a class token, then a token for each patch of 2x2 pixels."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.embed = torch.nn.Conv2d(3, 6, 2, 2)

    def forward(self, x):
        tokens = self.embed(x.to(self.embed.weight.dtype)).flatten(2).mT
        return SimpleNamespace(last_hidden_state=torch.cat([100 + tokens[:, :1], tokens], 1))


@pytest.fixture
def encoder(tmp_path, monkeypatch) -> Path:
    """The folder of the stand-in."""
    about = {"model_type": "dinov2", "hidden_size": 6, "num_hidden_layers": 1, "patch_size": 2}
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(about))
    monkeypatch.setattr(alignment, "read_dinov2", lambda folder, side: PatchEncoder())
    return tmp_path / "encoder"


def with_repa(config, encoder, *settings):
    repa = ["train.terms.sra=0", "train.terms.repa=0.5", f"train.terms.repa_encoder={encoder}"]
    return with_terms(config, *repa, "train.terms.repa_width=10", *settings)


def test_repa_equals_a_computation_in_plain_torch_and_its_gradients_finite_differences(run_config, encoder):
    model, terms, given = passed(with_repa(run_config, encoder, "train.terms.repa_block=1"))
    _, alone = summed(model, terms, given)
    with torch.no_grad(), watch_blocks(model) as seen:
        model(given.objective.noisy(given.x, given.noise, given.t), given.t, given.y)
        tokens = terms["repa"].projector(seen["outer_blocks.1"])
        pixels = F.interpolate((given.x + 1) / 2, (32, 32), mode="bicubic")  # 2x2 patches, each 8x8 of the encoder's
        shift, scale = (torch.tensor(c)[:, None, None].double() for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        embed = PatchEncoder().double().embed((pixels - shift) / scale)  # N 6 16 16
        target = torch.stack([embed[:, :, a : a + 8, b : b + 8].mean((2, 3)) for a in (0, 8) for b in (0, 8)], 1)
        cosine = (F.normalize(tokens, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean(1)
    torch.testing.assert_close(alone[1], -cosine, rtol=1e-4, atol=1e-5)  # the stand-in computes in float32
    check_gradients(model, terms, given)
    assert len(list(terms.parameters())) == 6


@pytest.mark.parametrize("first", [0, 1])
def test_terms_compare_the_patches_that_a_block_sees(run_config, encoder, first):
    """With token dropping: block 1 is on the route, which starts at it or before it."""
    blocks = ["train.terms.sra=0.5", "train.terms.sra_blocks=[1,2]", "train.terms.repa_block=1", "model.tokens.time=1"]
    model, terms, given = passed(with_repa(run_config, encoder, *blocks))
    keep = torch.tensor([[0, 3], [1, 2], [2, 3]])  # of four patches
    given = replace(given, route=Route(keep, first, 1))
    x_t = given.objective.noisy(given.x, given.noise, given.t)
    with terms.recorded(model) as outputs:
        model(x_t, given.t, given.y, route=given.route)
        _, (_, sra, repa) = terms.add_to(torch.zeros_like(given.t), replace(given, outputs=outputs))
    earlier = (given.t - 0.2 * uniform(run_config.seed, "terms", given.example)).clamp(0, 1)
    with torch.no_grad():
        with watch_blocks(given.averaged) as seen:
            given.averaged(given.objective.noisy(given.x, given.noise, earlier), earlier, given.y)
        teacher, features = seen["outer_blocks.2"][:, 1:], terms["repa"].features(given.x)
        assert outputs["outer_blocks.1"].shape[1] == 1 + 2
        for image in range(3):
            tokens, own = outputs["outer_blocks.1"][image, 1:], keep[image]
            aligned = F.smooth_l1_loss(terms["sra"].projector(tokens), teacher[image, own], beta=0.05)
            cosine = F.cosine_similarity(terms["repa"].projector(tokens), features[image, own], dim=-1).mean()
            torch.testing.assert_close((sra[image], repa[image]), (aligned, -cosine))


def test_the_encoder_of_repa_is_neither_trained_nor_saved(run_config, encoder, tmp_path):
    config = with_repa(run_config, encoder, "train.terms.sra=0.1", "train.steps=3")
    for _ in train(config, tmp_path / "run", device="cpu"):
        pass
    names = {name.split(".")[1] for name in state(tmp_path / "run") if name.startswith("terms.")}
    assert names == {"sra", "repa"}
    assert not any("embed.weight" in name for name in state(tmp_path / "run") if "terms" in name)
    assert "loss.repa" in json.loads(log(tmp_path / "run").splitlines()[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.terms.repa_encoder=null"], "needs train.terms.repa_encoder, a folder"),
        (["data.vae=somewhere"], "needs features beside the latents: run the same `dit-in-dit encode` with --features"),
        (["model.image_size=[8,16]"], r"as many rows as columns of patches: got \[2, 4\]; use sra"),
        (["train.terms.repa_block=3"], "repa_block must be at most 2, the last outer block: got 3"),
        (["train.terms.repa_encoder=missing"], "missing"),
    ],
)
def test_wrong_settings_of_repa_give_one_line(run_config, encoder, settings, message):
    with pytest.raises(UserError, match=message) as error:
        LossTerms(config := with_repa(run_config, encoder, *settings), NestedDiT(config.model))
    assert "\n" not in str(error.value)


def test_the_default_blocks_are_those_of_the_official_code():
    deep = [small_model(f"outer*{depth}") for depth in (28, 12, 3, 2, 1)]
    base = dd.RunConfig()
    assert [sra_blocks(replace(base, model=model)) for model in deep] == [(7, 19), (3, 8), (0, 2), (0, 1), (0, 0)]


def test_uniform_numbers_depend_on_the_example_alone():
    numbers = torch.arange(20_000)
    drawn = uniform(3, "terms", numbers)
    assert torch.equal(drawn[100:200], uniform(3, "terms", numbers[100:200]))
    assert 0 <= drawn.min() <= drawn.max() < 1
    assert float(drawn.mean()) == pytest.approx(1 / 2, abs=0.01)
    assert float(drawn.var()) == pytest.approx(1 / 12, abs=0.002)
    assert not torch.equal(drawn, uniform(4, "terms", numbers))


def test_a_resumed_run_with_terms_equals_an_unbroken_one(run_config, tmp_path):
    config = with_terms(run_config, "train.accumulate=2")
    for _ in train(config, tmp_path / "whole", device="cpu"):
        pass
    for until in (2, None):
        for _ in train(config, tmp_path / "halves", device="cpu", resume=until is None, until=until):
            pass
    assert log(tmp_path / "halves") == log(tmp_path / "whole")
    whole, halves = state(tmp_path / "whole"), state(tmp_path / "halves")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    own = {name for name in whole if "terms." in name}
    assert {name for name in own if name.startswith("terms.")} == {
        f"terms.sra.projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert "optimizer.exp_avg.terms.sra.projector.0.weight" in own
    assert not any(name.startswith(("model.", "averaged.")) for name in own)
    lines = [json.loads(line) for line in log(tmp_path / "whole").splitlines() if "loss" in line]
    assert all(line["loss.sra"] > 0 and line["grad_norm.term"] > 0 for line in lines if "loss" in line)


def test_the_loss_in_the_log_is_that_of_the_objective(run_config):
    on, off = losses(with_terms(run_config)), losses(with_terms(run_config, "train.terms.sra=0"))
    assert on[0]["loss"] == off[0]["loss"]
    assert not any("term" in name or "sra" in name for name in off[0])


@pytest.mark.parametrize("setting", ["train.recompute=both", "train.compile=true", "train.compile=graphs"])
def test_sra_gives_the_same_numbers_however_the_passes_run(run_config, setting, monkeypatch, full):
    if "compile" in setting and not full:
        pytest.skip("compilation takes long: --full")
    config = with_terms(run_config)
    expected = losses(config)
    monkeypatch.setattr(compiled, "BACKEND", aot_eager)

    def capture(call):
        """Graphs need CUDA: the warm-up, then a call for each replay into the same tensor."""
        result = call()

        def replay():
            result.copy_(call())

        return replay, result

    monkeypatch.setattr(graphs, "capture", capture)
    for line, same in zip(losses(override(config, [setting])), expected, strict=True):
        assert line == pytest.approx(same, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", TERMS)
def test_every_term_trains_in_bfloat16_nearly_as_in_float32(run_config, encoder, name):
    settings = [f"train.terms.{each}={0.5 * (each == name)}" for each in TERMS]
    settings += ["model.internal_head=1"] if name == "internal" else []
    config = with_repa(run_config, encoder, *settings)
    whole, half = (losses(override(config, [f"train.precision={how}"])) for how in ("float32", "bfloat16"))
    for line, same in zip(half, whole, strict=True):
        assert line.keys() == same.keys()
        assert line[f"loss.{name}"] == pytest.approx(same[f"loss.{name}"], rel=0.02, abs=0.01)
        assert line["grad_norm"] == pytest.approx(same["grad_norm"], rel=0.05)
    assert whole[-1][f"loss.{name}"] != half[-1][f"loss.{name}"]  # a head that starts at zero rounds nothing at first


def test_a_run_with_terms_exports_without_them_and_is_judged_by_doctor(run_config, tmp_path):
    config = with_terms(run_config)
    for _ in train(config, tmp_path / "run", device="cpu"):
        pass
    model = dd.load(tmp_path / "run", "cpu")
    assert model.net.state_dict().keys() == NestedDiT(config.model).state_dict().keys()
    export_release(tmp_path / "run", tmp_path / "slim")
    assert not any("terms" in name for name in state(tmp_path / "slim"))
    assert "grad_norm.term" in {name for part in examine(config, CPU, tmp_path / "run").sections for name in part.rows}


def test_inspect_counts_terms(run_config, capsys):
    for arguments in ([], ["--json"]):
        main(["inspect", "--preset", "emoji", "--set", "train.terms.sra=0.2", *arguments])
    text = capsys.readouterr().out
    assert "loss terms" in text
    assert '"terms"' in text


def test_a_truncated_pass_costs_what_it_computes():
    for stages in ("outer*4", "inner*2 outer*4", "outer*2 inner*1 outer*2", "inner*1 outer*1 inner*2 outer*3"):
        model = small_model(stages)
        depth, parts = model.blocks("outer"), cost.macs(model)
        heads = parts["outer_head"] + parts["inner_head"]
        assert cost.macs_through(model, depth - 1) == parts["total"] - heads
        through = [cost.macs_through(model, number) for number in range(depth)]
        assert through == sorted(set(through))


@pytest.mark.parametrize(
    ("settings", "stages", "message"),
    [
        (["train.terms.sra_blocks=[0,3]"], "outer*3", "at most 2, the last outer block: got 3"),
        (["train.terms.sra=-1"], "outer*3", "train.terms.sra must be from 0"),
        (["train.terms.sra_gap=2"], "outer*3", "from 0 to 1: got 2"),
    ],
)
def test_wrong_settings_give_one_line(run_config, settings, stages, message):
    with pytest.raises(UserError, match=message) as error:
        losses(with_terms(run_config, *settings, stages=stages))
    assert "\n" not in str(error.value)


def test_a_model_of_a_user_without_the_block_is_refused(run_config):
    config = with_terms(run_config)
    with pytest.raises(UserError, match=r"sra reads outer_blocks\.0, which the model lacks: set train\.terms\.sra=0"):
        Trainer(config, open_source(config.data, config.model), CPU, model=torch.nn.Linear(2, 2))


def test_configs_without_terms_stay_as_they_were(run_config):
    assert "terms" not in to_yaml(run_config)
    assert config_hash(run_config) == config_hash(override(run_config, ["train.terms.sra=0"]))
    assert config_hash(run_config) != config_hash(with_train(run_config, terms=override(run_config, SRA).train.terms))


@pytest.mark.slow
def test_terms_on_one_and_two_processes_give_the_same_bits_with_fixed_sums(run_config, tmp_path):
    config = with_terms(run_config, "train.reduction=fixed", "train.accumulate=2", "train.noise=device")
    run_together(1, trained, config, tmp_path / "alone", False)
    for world, until in ((1, 2), (2, 4), (1, None)):
        run_together(world, trained, config, tmp_path / "many", until != 2, until)
    assert log(tmp_path / "many") == log(tmp_path / "alone")
    alone, many = state(tmp_path / "alone"), state(tmp_path / "many")
    assert all(torch.equal(tensor, many[name]) for name, tensor in alone.items())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", SHARDED_FULL])
def test_two_processes_train_terms_like_one(run_config, tmp_path, parallel):
    config = with_terms(run_config, f"train.parallel={parallel}", "train.accumulate=2")
    run_together(1, trained, config, tmp_path / "alone", False)
    run_together(2, trained, config, tmp_path / "many", False)
    for until in (2, None):
        run_together(2, trained, config, tmp_path / "halves", until is None, until)
    assert log(tmp_path / "halves") == log(tmp_path / "many")
    alone, many, halves = (state(tmp_path / name) for name in ("alone", "many", "halves"))
    assert alone.keys() == many.keys()
    for name, tensor in many.items():
        assert torch.equal(tensor, halves[name]), name
        if name.startswith(("model.", "terms.")):
            torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-5)
    logs = (log(tmp_path / name).splitlines() for name in ("alone", "many"))
    for one, two in zip(*([json.loads(line) for line in lines if '"loss"' in line] for lines in logs), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
