"""Guidance by a weak model: closed-form Gaussians through the package's sampler, commands, protocols, errors."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dit_in_dit as dd
from conftest import inputs, perturbed, small_model, with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash, from_yaml, override, to_yaml
from dit_in_dit.config.run import DiffusionConfig, ModelConfig, RunConfig, SampleConfig
from dit_in_dit.config.terms import TermsConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.diffusion.guidance import away_from_weak
from dit_in_dit.diffusion.path import make_path
from dit_in_dit.interop.export_pipeline import export, pipeline_of
from dit_in_dit.interop.pipeline import DiTInDiTPipeline
from dit_in_dit.interop.resolve import open_guide
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.sampling.guide import Guide
from dit_in_dit.sampling.numbered import numbered_noise, sample_batches
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.term import Pass
from dit_in_dit.training.trainer import Trainer

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------- closed forms


class Gaussian(nn.Module):
    """The exact denoiser of N(0, s^2), with another s for each class and for the null class; `weak`: of wider ones."""

    def __init__(self, model: ModelConfig, diffusion: DiffusionConfig, scales: list[float], weak: list[float] = ()):
        super().__init__()
        self.config, self.diffusion = model, diffusion
        self.scales, self.weak_scales = nn.Parameter(torch.tensor(scales)), torch.tensor(list(weak))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None, weak: bool = False) -> Any:
        a, b = (each[:, None, None, None] for each in make_path(self.diffusion).coefficients(t))
        row = torch.full_like(t, 0).long() if y is None else y

        def predicted(scales: torch.Tensor) -> torch.Tensor:
            s = scales[row][:, None, None, None]
            given_x = x / (a**2 * s**2 + b**2)  # E[image] = a s^2 given_x, E[noise] = b given_x
            image, noise = a * s**2 * given_x, b * given_x
            return {"velocity": noise - image, "image": image, "noise": noise}[self.diffusion.predict]

        return (predicted(self.scales), predicted(self.weak_scales)) if weak else predicted(self.scales)


def variance(s: float, t: float) -> float:
    """Variance of x_t = (1 - t) x + t e for x of N(0, s^2)."""
    return (1 - t) ** 2 * s**2 + t**2


def shrinkage(s: float, low: float = 0.0, high: float = 1.0) -> float:
    """log(x(low) / x(high)) along the exact flow of N(0, s^2), on which x(t) keeps its quantile."""
    return 0.5 * math.log(variance(s, low) / variance(s, high))


def gaussian_config(predict: str = "velocity", classes: int = 0, **how: Any) -> RunConfig:
    sample = SampleConfig(**{"sampler": "heun", "steps": 100, "micro_batch": 4, **how})
    return RunConfig(model=small_model(num_classes=classes), diffusion=DiffusionConfig(predict=predict), sample=sample)


def drawn_over_noise(config: RunConfig, net: nn.Module, guide: Guide | None = None) -> torch.Tensor:
    """log |sample / noise| of four samples, which the flow of a Gaussian makes one number per class."""
    ((_, samples),) = sample_batches(net, config, range(4), guide=guide)
    noise = numbered_noise(0, range(4), config.model.image_shape, CPU)()
    return (samples.double() / noise.double()).abs().log().flatten(1)


def guided_config(config: RunConfig, how: SampleConfig) -> RunConfig:
    """The config with other sampling, of a model whose outer head was trained as a weak head."""
    model = small_model("outer*1 inner*1", num_classes=0)
    return replace(config, model=model, train=TrainConfig(terms=TermsConfig(internal=0.5)), sample=how)


def gaussian_guide(config: RunConfig, scales: list[float], predict: str = "velocity") -> Guide:
    other = replace(config, diffusion=replace(config.diffusion, predict=predict))
    names = tuple(map(str, range(other.model.num_classes)))
    return Guide("weak", Gaussian(other.model, other.diffusion, scales), other, names)


@pytest.mark.parametrize(
    ("predict", "weak_predicts"), [("velocity", "velocity"), ("velocity", "image"), ("image", "noise")]
)
def test_autoguidance_of_gaussians_is_the_closed_form(predict, weak_predicts):
    """The guided flow dx/dt = (k_S + w (k_s - k_S)) x ends at noise * s^w S^(1 - w)."""
    config = gaussian_config(predict, guide_scale=1.8)
    net = Gaussian(config.model, config.diffusion, [0.7])
    got = drawn_over_noise(config, net, gaussian_guide(config, [1.1], weak_predicts))
    expected = 1.8 * math.log(0.7) - 0.8 * math.log(1.1)
    assert expected < math.log(0.7) - 0.1  # narrower than the data
    torch.testing.assert_close(got, torch.full_like(got, expected), rtol=0, atol=1e-3)
    alone = drawn_over_noise(config, net)
    torch.testing.assert_close(alone, torch.full_like(alone, math.log(0.7)), rtol=0, atol=1e-3)


def test_the_interval_of_a_weak_model_is_apart_from_that_of_classifier_free_guidance():
    """Each guidance acts in its own interval, on each branch of classifier-free guidance first."""
    s, weak, low, high, g, w = (0.5, 0.8), (0.9, 1.2), (0.0, 0.7), (0.3, 1.0), 1.6, 2.2
    config = gaussian_config(
        classes=1, guidance=g, interval=low, guide_scale=w, guide_interval=high, sampler="euler", steps=500
    )
    net = Gaussian(config.model, config.diffusion, list(s))
    got = drawn_over_noise(config, net, gaussian_guide(config, list(weak)))

    def away(index: int, start: float, end: float, scale: float) -> float:
        """The integral of the guided coefficient of class 0 or of the null class, 1."""
        return scale * shrinkage(s[index], start, end) + (1 - scale) * shrinkage(weak[index], start, end)

    def both(start: float, end: float, scale: float) -> float:
        return g * away(0, start, end, scale) + (1 - g) * away(1, start, end, scale)

    expected = away(0, 0.7, 1.0, w) + both(0.3, 0.7, w) + both(0.0, 0.3, 1.0)
    torch.testing.assert_close(got, torch.full_like(got, expected), rtol=0, atol=0.01)
    wrong = away(0, 0.7, 1.0, w) + both(0.0, 0.7, w)  # without an interval of its own
    assert abs(wrong - expected) > 0.05


def test_on_the_ddpm_path_samples_follow_a_fine_integration():
    """DDIM's ODE of two Gaussians, integrated by NumPy in the variable b/a with Runge and Kutta's step."""
    diffusion = DiffusionConfig(path="ddpm", predict="noise")
    sample = SampleConfig(sampler="ddim", steps=500, micro_batch=4, guide_scale=2.0)
    config = RunConfig(model=small_model(num_classes=0), diffusion=diffusion, sample=sample)
    got = drawn_over_noise(config, Gaussian(config.model, diffusion, [0.6]), gaussian_guide(config, [0.9], "noise"))
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    first, last = math.sqrt(1 / bar[-1] - 1), math.sqrt(1 / bar[1] - 1)  # sigma = b/a at the first and the last step

    def slope(sigma: float, u: float) -> float:
        """du/dsigma of u = x_t / a: the guided noise estimate."""
        return u * sigma * (2 / (0.36 + sigma**2) - 1 / (0.81 + sigma**2))

    u, grid = math.sqrt(1 / bar[-1]), np.geomspace(first, last, 4000)
    for sigma, after in itertools.pairwise(grid):
        h = after - sigma
        one = slope(sigma, u)
        two = slope(sigma + h / 2, u + h / 2 * one)
        three = slope(sigma + h / 2, u + h / 2 * two)
        u += h / 6 * (one + 2 * two + 2 * three + slope(after, u + h * three))
    estimate = u - last * slope(last, u)  # the last step goes to the image estimate
    torch.testing.assert_close(got, torch.full_like(got, math.log(estimate)), rtol=0, atol=0.01)


def test_a_learned_variance_is_that_of_the_strong_model():
    strong, weak = torch.ones(2, 6, 4, 4), torch.full((2, 6, 4, 4), 3.0)
    guided = away_from_weak(lambda x, t, y: strong, lambda x, t, y: (strong, weak), 2.0, (0.0, 1.0))
    out = guided(torch.zeros(2, 3, 4, 4), torch.zeros(2), None)
    assert (out[:, :3] == -1).all()
    assert (out[:, 3:] == 1).all()


# ------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory) -> dict[str, Path]:
    """A run with an older checkpoint, and a smaller one that predicts the image."""
    root = tmp_path_factory.mktemp("guides")
    model = small_model("outer*1 inner*1", image_size=(8, 8), num_classes=3)
    config = RunConfig(seed=3, model=model, sample=SampleConfig(steps=2, sampler="euler"))
    keys = {"steps": 4, "batch_size": 4, "ema": 0.5, "precision": "float32", "checkpoint_every": 2, "sample_every": 0}
    config = with_train(replace(config, data=replace(config.data, source=str(folder), held_out=0.2)), **keys)
    small = small_model("outer*1", image_size=(8, 8), num_classes=3, outer={"width": 16, "num_heads": 2})
    dd.train(config, root / "strong").run()
    weak = replace(config, model=small, diffusion=DiffusionConfig(predict="image", weight="velocity"))
    dd.train(weak, root / "weak").run()
    dd.train(with_train(weak, ema=(0.3, 0.6), learning_rate=0.05), root / "averages").run()
    bald = replace(weak, model=replace(small, num_classes=0))
    dd.train(bald, root / "bald").run()
    dd.train(with_train(replace(weak, model=replace(small, image_size=(16, 16))), steps=1), root / "large").run()
    dd.train(with_train(weak, label_drop=0.0, steps=1), root / "no-null").run()
    return {path.name: path for path in root.iterdir()}


def sampled(*arguments: object) -> None:
    main(["sample", *map(str, arguments), "-n", "3", "--device", "cpu"])


def pixels(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("0*.png")))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()  # earlier commands
    with pytest.raises(SystemExit) as stop:
        sampled(*arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_sample_with_a_guide_differs_and_is_named_by_its_weights(runs, tmp_path, capsys):
    strong, weak = runs["strong"], runs["weak"]
    sampled(strong, "--out", tmp_path / "plain")
    sampled(strong, "--out", tmp_path / "guided", "--guide", weak)
    sampled(strong, "--out", tmp_path / "one", "--guide", weak, "--guide-scale", 1)
    assert pixels(tmp_path / "plain") != pixels(tmp_path / "guided")
    assert pixels(tmp_path / "plain") == pixels(tmp_path / "one")
    identity = json.loads((tmp_path / "guided/samples.json").read_text())["samples"]
    assert identity["guide"] == open_guide(str(weak), CPU).sha256
    assert (identity["guide_scale"], identity["guidance"]) == (2.0, 1.0)
    plain = json.loads((tmp_path / "plain/samples.json").read_text())["samples"]
    assert not {"guide", "guide_scale", "guide_interval"} & plain.keys()
    assert "samples.guide" in refusal(capsys, strong, "--out", tmp_path / "plain", "--guide", weak)
    assert "guide_scale" in refusal(capsys, strong, "--out", tmp_path / "guided", "--guide", weak, "--guide-scale", 3)
    late = ("--guide", weak, "--guide-interval", 0.5, 1)
    assert "guide_interval" in refusal(capsys, strong, "--out", tmp_path / "guided", *late)


def test_the_average_of_a_guide_is_chosen_by_its_own_option(runs, tmp_path, capsys):
    strong, weak = runs["strong"], runs["averages"]
    drawn = {}
    for name, options in {
        "first": (),
        "named": ("--guide-ema", 0.3),
        "other": ("--guide-ema", 0.6),
        "raw": ("--raw",),
    }.items():
        sampled(strong, "--out", tmp_path / name, "--guide", weak, *options)
        guide = json.loads((tmp_path / name / "samples.json").read_text())["samples"]["guide"]
        drawn[name] = (guide, pixels(tmp_path / name))
    assert drawn["named"] == drawn["first"]
    assert drawn["other"][0] != drawn["first"][0]
    assert drawn["other"][1] != drawn["first"][1]
    assert drawn["raw"][0] == drawn["first"][0]  # --raw is of the model alone
    assert "name the weak model with --guide" in refusal(capsys, strong, "--out", tmp_path / "a", "--guide-ema", 0.5)
    line = refusal(capsys, strong, "--out", tmp_path / "b", "--guide", weak, "--guide-ema", 0.7)
    assert "0.7" in line
    assert "0.6" in line


def test_python_samples_equal_those_of_the_command(runs, tmp_path):
    sampled(runs["strong"], "--out", tmp_path, "--guide", runs["weak"], "--guide-scale", 3)
    model = dd.load(runs["strong"])
    for guide in (str(runs["weak"]), dd.load(runs["weak"])):
        pictures = model.sample(num=3, guide=guide, guide_scale=3)
        pictures.save(tmp_path / "python")
        assert pixels(tmp_path / "python") == pixels(tmp_path)


def test_an_older_checkpoint_is_a_guide(runs, tmp_path, capsys):
    strong = runs["strong"]
    old = open_guide(f"{strong}@2", CPU)
    assert old.sha256 != open_guide(str(strong), CPU).sha256
    assert any(
        not torch.equal(a, b) for a, b in zip(old.net.parameters(), dd.load(strong).net.parameters(), strict=True)
    )
    sampled(strong, "--out", tmp_path, "--guide", f"{strong}@2")
    line = refusal(capsys, strong, "--out", tmp_path / "b", "--guide", f"{strong}@3")
    assert "no checkpoint of step 3: there are 2, 4" in line


def test_guides_that_do_not_fit_are_refused_in_one_line(runs, tmp_path, capsys):
    strong, out = runs["strong"], ("--out", tmp_path)
    line = refusal(capsys, strong, *out, "--guide", runs["large"])
    assert "the guide must have the model's image size and channels, 3x8x8" in line
    assert "3x16x16" in line
    assert "no run at" in refusal(capsys, strong, *out, "--guide", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    shutil.copy(strong / "config.yaml", tmp_path / "empty")
    assert "has no checkpoint yet" in refusal(capsys, strong, *out, "--guide", tmp_path / "empty")
    assert "has no null class" in refusal(capsys, strong, *out, "--guide", runs["no-null"], "--guidance", 2)
    assert "name the weak model with --guide" in refusal(capsys, strong, *out, "--guide-scale", 2)
    assert "must go from low to high" in refusal(capsys, strong, *out, "--guide", strong, "--guide-interval", 1, 0)
    sampled(strong, *out, "--guide", runs["bald"], "--guidance", 2)  # a guide without classes


def test_guides_of_other_classes_latents_or_paths_are_refused(runs):
    guide = open_guide(str(runs["weak"]), CPU)
    config = dd.load(runs["strong"]).config
    guide.checked(config, guide.classes)
    with pytest.raises(UserError, match=r"the model's 3 classes in their order, or none: .* has 3, blue, green, red"):
        guide.checked(config, guide.classes[::-1])
    with pytest.raises(UserError, match=r"diffusion.path, ddpm"):
        guide.checked(
            replace(config, diffusion=DiffusionConfig(path="ddpm"), sample=SampleConfig(sampler="ddim")), guide.classes
        )
    with pytest.raises(UserError, match=r"data.latent_mean and latent_scale, \[None, \(2.0,\)\]"):
        guide.checked(replace(config, data=replace(config.data, latent_scale=(2.0,))), guide.classes)


def test_evaluations_name_the_guide_and_are_not_mixed(runs, tmp_path, capsys):
    strong = runs["strong"]

    def evaluated(name: str, *arguments: object) -> None:
        command = ["evaluate", strong, "--num", 4, "--out", tmp_path / name, "--device", "cpu", *arguments]
        main([*map(str, command)])

    evaluated("plain")
    evaluated("guided", "--guide", runs["weak"])
    assert "guidance 1, guide scale 2, seed 0" in capsys.readouterr().out
    protocol = json.loads((tmp_path / "guided/metrics.json").read_text())["protocol"]
    assert len(protocol["samples"]["guide"]) == 64
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "plain"), str(tmp_path / "guided")])
    assert "guide" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluated("guided")


def test_the_pipeline_guided_by_a_transformer_draws_the_samples_of_the_package(runs):
    strong, weak = Checkpoint.open(runs["strong"]), Checkpoint.open(runs["weak"])
    config = replace(strong.config, sample=replace(strong.config.sample, guidance=2.0, guide_scale=3.0, micro_batch=4))
    names = list(strong.classes)
    pipe, other = (pipeline_of(s.model(CPU), c, names) for s, c in ((strong, config), (weak, weak.config)))
    ((_, ours),) = sample_batches(strong.model(CPU), config, range(4), guide=open_guide(str(runs["weak"]), CPU))
    noise = numbered_noise(0, range(4), config.model.image_shape, CPU)()
    keys: dict[str, Any] = {"latents": noise, "output_type": "latent", "guide": other.transformer}
    assert torch.equal(pipe([0, 1, 2, 0], guide_scale=3.0, **keys).images, ours)
    assert not torch.equal(pipe([0, 1, 2, 0], guide_scale=3.0, guide_interval=(0.9, 1.0), **keys).images, ours)
    other.transformer.register_to_config(model={**other.transformer.config.model, "num_classes": 7})
    with pytest.raises(UserError, match="the guide must have the model's num_classes, 3: got 7"):
        pipe([0, 1, 2, 0], **keys)


def test_the_guide_runs_beside_classifier_free_guidance(runs):
    """Each branch is guided away from the weak model; an untrained difference shows the order of the two."""
    config = RunConfig(model=small_model(num_classes=2), sample=SampleConfig(steps=1, sampler="euler", guidance=3.0))
    config = replace(config, sample=replace(config.sample, guide_scale=2.0, micro_batch=2))
    net, weak = (perturbed(NestedDiT(config.model), seed).eval() for seed in (0, 1))
    ((_, got),) = sample_batches(net, config, range(2), guide=Guide("weak", weak, config, ("a", "b")))
    x, t = numbered_noise(0, range(2), config.model.image_shape, CPU)(), torch.ones(2)
    with torch.no_grad():
        given, none = (
            weak(x, t, y) + 2 * (net(x, t, y) - weak(x, t, y)) for y in (torch.tensor([0, 1]), torch.tensor([2, 2]))
        )
    torch.testing.assert_close(got, x - (none + 3 * (given - none)), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------- internal guidance

ARRANGEMENTS = [("outer*3", 1), ("outer*3", 2), ("inner*1 outer*3", 2), ("outer*2 inner*2", 1), ("outer*2 inner*1", 2)]


@pytest.mark.parametrize(("stages", "after"), ARRANGEMENTS)
def test_an_internal_head_is_a_shallower_model_and_leaves_the_output_alone(stages, after):
    """Its weak prediction is that of a model that ends after block `after`; the output keeps its bits."""
    config = small_model(stages)
    plain, net = perturbed(NestedDiT(config)), perturbed(NestedDiT(replace(config, internal_head=after)), seed=1)
    missing = net.load_state_dict(plain.state_dict(), strict=False)
    assert {name.partition(".")[0] for name in missing.missing_keys} == {"internal_head"}
    assert not missing.unexpected_keys
    x, t, y = inputs(config)
    strong, weak = net(x, t, y, weak=True)
    assert torch.equal(strong, plain(x, t, y))
    assert torch.equal(strong, net(x, t, y))
    start = "inner*1 " if stages.startswith("inner") else ""
    short = NestedDiT(small_model(f"{start}outer*{after}"))
    heads = {
        name.replace("internal_head", "outer_head"): w for name, w in net.state_dict().items() if "internal" in name
    }
    short.load_state_dict(
        {**{name: net.state_dict()[name] for name in short.state_dict() if "head" not in name}, **heads}
    )
    assert torch.equal(weak, short(x, t, y))
    assert not torch.equal(weak, strong)


def test_the_outer_head_alone_is_the_plain_model_of_the_outer_blocks():
    nested = perturbed(NestedDiT(small_model("outer*2 inner*1")))
    plain = NestedDiT(small_model("outer*2"))
    plain.load_state_dict({name: nested.state_dict()[name] for name in plain.state_dict()})
    x, t, y = inputs(nested.config)
    assert torch.equal(nested(x, t, y, weak=True)[1], plain(x, t, y))


@pytest.mark.parametrize("stages", ["outer*2", "inner*1 outer*2"])
def test_a_model_without_a_weak_head_says_so(stages):
    net = NestedDiT(small_model(stages))
    with pytest.raises(ValueError, match=r"no weak prediction: set model.internal_head"):
        net(*inputs(net.config), weak=True)


def test_cost_counts_the_internal_head():
    plain = small_model("outer*3")
    with_head, counts = dd.inspect(replace(plain, internal_head=1)), dd.inspect(plain)
    width, out = 32, 4 * 4 * 3
    assert with_head["parameters"]["internal_head"] == width * out + out + 2 * width * (width + 1)
    assert with_head["macs"]["internal_head"] == 8 * width * out + 2 * width * width == counts["macs"]["outer_head"]
    assert with_head["macs"]["total"] == counts["macs"]["total"] + counts["macs"]["outer_head"]
    kept = [each["activation_bytes"] for each in (with_head, counts)]  # the next block keeps the head's input too
    assert kept[1]["total"] < kept[0]["total"] <= kept[1]["total"] + kept[1]["outer_head"]
    assert "internal_head" not in {**counts["parameters"], **counts["macs"]}


def test_internal_guidance_of_gaussians_is_the_closed_form_in_one_call_a_step():
    config, calls = gaussian_config("velocity"), []
    net = Gaussian(config.model, config.diffusion, [0.7], weak=[1.1])
    net.register_forward_hook(lambda *_: calls.append(1))
    list(sample_batches(net, config, [0]))
    once = len(calls)
    how = replace(config.sample, internal_guidance=1.8, guide_interval=(0.4, 1.0), steps=500, sampler="euler")
    got = drawn_over_noise(guided_config(config, how), net)
    expected = shrinkage(0.7, 0.0, 0.4) + 1.8 * shrinkage(0.7, 0.4, 1.0) - 0.8 * shrinkage(1.1, 0.4, 1.0)
    torch.testing.assert_close(got, torch.full_like(got, expected), rtol=0, atol=5e-3)
    calls.clear()
    sample_all = guided_config(config, replace(config.sample, internal_guidance=1.8))
    got = drawn_over_noise(sample_all, net)
    assert len(calls) == once
    torch.testing.assert_close(got, torch.full_like(got, 1.8 * math.log(0.7) - 0.8 * math.log(1.1)), rtol=0, atol=1e-3)


def test_internal_guidance_comes_before_a_guide():
    """Both: the internally guided prediction is the strong one of autoguidance."""
    config = gaussian_config()
    how = replace(config.sample, internal_guidance=1.5, guide_scale=2.0)
    config = guided_config(config, how)
    net = Gaussian(config.model, config.diffusion, [0.7], weak=[0.9])
    got = drawn_over_noise(config, net, gaussian_guide(config, [1.2]))
    expected = 2.0 * (1.5 * math.log(0.7) - 0.5 * math.log(0.9)) - 1.0 * math.log(1.2)
    torch.testing.assert_close(got, torch.full_like(got, expected), rtol=0, atol=2e-3)


@pytest.fixture(scope="module")
def internal_runs(folder, tmp_path_factory) -> dict[str, Path]:
    """Runs with the loss term: of the outer head of a nested model, and of an internal head of a plain one."""
    root = tmp_path_factory.mktemp("internal")
    shape: dict[str, Any] = {"image_size": (8, 8), "num_classes": 3}
    models = {
        "outer": small_model("outer*1 inner*1", **shape),
        "internal": small_model("outer*3", internal_head=1, **shape),
        "variance": small_model("outer*1 inner*1", learn_variance=True, **shape),
    }
    keys = {"steps": 3, "batch_size": 4, "ema": 0.5, "precision": "float32", "learning_rate": 1e-2}
    keys |= {"sample_every": 0, "checkpoint_every": 3}
    train = TrainConfig(terms=TermsConfig(internal=0.5))
    for name, model in models.items():
        config = RunConfig(
            seed=3, model=model, train=train, sample=SampleConfig(steps=2, sampler="euler", guidance=2.0)
        )
        config = replace(config, data=replace(config.data, source=str(folder), held_out=0.2))
        if name == "variance":
            sample = SampleConfig(steps=2, sampler="ddpm")
            config = replace(config, diffusion=DiffusionConfig(path="ddpm", predict="noise"), sample=sample)
        dd.train(with_train(config, **keys), root / name).run()
    return {name: root / name for name in models}


def trainer_of(run: Path) -> Trainer:
    """A trainer with the run's last weights."""
    saved = Checkpoint.open(run)
    trainer = Trainer(saved.config, open_source(saved.config.data, saved.config.model), CPU, fresh=False)
    trainer.restore(saved.state(), saved.averaged(), saved.step)
    return trainer


@pytest.mark.parametrize("name", ["outer", "internal", "variance"])
def test_the_loss_term_trains_the_weak_head(internal_runs, name):
    """Its value is the objective's loss of the weak prediction, and its gradient reaches the weak head."""
    run = internal_runs[name]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = [line["loss.internal"] for line in lines if "loss.internal" in line]
    assert len(logged) == 3
    trainer = trainer_of(run)
    batch = Examples(trainer.source, trainer.config)[0]
    x, noise, t, y = trainer.unpack(batch)[:4]
    net = trainer.model

    def weakly(x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        return net(x_t, t, y, weak=True)[1][:, :3]

    expected = trainer.objective.loss(weakly, x, noise, t, y)
    expected.mean().backward()
    head = "internal_head" if name == "internal" else "outer_head"
    assert net.get_submodule(head).final.linear.weight.grad.abs().sum() > 0
    net.zero_grad()
    assert trainer.update([batch])["loss.internal"] == pytest.approx(expected.mean().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["outer", "internal", "variance"])
def test_the_term_changes_gradients_by_its_weight(internal_runs, name):
    """Of the whole sum, by finite differences along a random direction, in float64."""
    trainer = trainer_of(internal_runs[name])
    trainer.model.double()
    batch = Examples(trainer.source, trainer.config)[0]
    x, noise, t, y = (part.double() if part.is_floating_point() else part for part in trainer.unpack(batch)[:4])
    draw = torch.Generator().manual_seed(0)
    way = [torch.randn(w.shape, generator=draw, dtype=torch.float64) for w in trainer.model.parameters()]

    def total(shift: float) -> torch.Tensor:
        with torch.no_grad():
            for weight, step in zip(trainer.model.parameters(), way, strict=True):
                weight.add_(step, alpha=shift)
        with trainer.terms.recorded(trainer.model) as outputs:
            each = trainer.objective.loss(trainer.model, x, noise, t, y)
        given = Pass(x, noise, t, y, torch.arange(len(x)), outputs, trainer.objective, trainer.ema.model, False)
        value = trainer.terms.add_to(each, given)[0].mean()
        if not shift:
            value.backward()
        with torch.no_grad():
            for weight, step in zip(trainer.model.parameters(), way, strict=True):
                weight.sub_(step, alpha=shift)
        return value

    total(0.0)
    slope = sum((w.grad * step).sum() for w, step in zip(trainer.model.parameters(), way, strict=True))
    numeric = (total(1e-3) - total(-1e-3)) / 2e-3
    assert slope.item() == pytest.approx(numeric.item(), rel=1e-2)


@pytest.mark.parametrize("name", ["outer", "internal", "variance"])
def test_samples_of_command_python_and_pipeline_agree(internal_runs, tmp_path, name):
    run = internal_runs[name]
    sampled(run, "--out", tmp_path / "plain")
    sampled(run, "--out", tmp_path / "guided", "--internal-guidance", 1.5)
    assert pixels(tmp_path / "plain") != pixels(tmp_path / "guided")
    identity = json.loads((tmp_path / "guided/samples.json").read_text())["samples"]
    assert identity["internal_guidance"] == 1.5
    assert "internal_guidance" not in json.loads((tmp_path / "plain/samples.json").read_text())["samples"]
    dd.load(run).sample(num=3, internal_guidance=1.5).save(tmp_path / "python")
    assert pixels(tmp_path / "python") == pixels(tmp_path / "guided")
    if name == "variance":
        return  # its noise comes from the pipeline's generators
    export(run, tmp_path / "pipeline")
    pipe = DiTInDiTPipeline.from_pretrained(tmp_path / "pipeline", low_cpu_mem_usage=False)
    saved = Checkpoint.open(run)
    config = replace(saved.config, sample=replace(saved.config.sample, internal_guidance=1.5, micro_batch=4))
    ((_, ours),) = sample_batches(saved.model(CPU), config, range(4))
    noise = numbered_noise(0, range(4), config.model.image_shape, CPU)()
    drawn = pipe([0, 1, 2, 0], latents=noise, output_type="latent", internal_guidance=1.5).images
    assert torch.equal(drawn, ours)
    sampled(tmp_path / "pipeline", "--out", tmp_path / "again", "--internal-guidance", 1.5)  # it is imported
    assert pixels(tmp_path / "again") == pixels(tmp_path / "guided")


def test_internal_guidance_without_its_training_is_refused(runs, tmp_path, capsys):
    line = refusal(capsys, runs["strong"], "--out", tmp_path, "--internal-guidance", 1.4)
    assert "sample.internal_guidance=1.4 needs a weak head that was trained as one: give 1, or train with" in line
    strong = Checkpoint.open(runs["strong"])
    pipe = pipeline_of(strong.model(CPU), strong.config, list(strong.classes))
    with pytest.raises(UserError, match="no trained weak head: give internal_guidance=1"):
        pipe(0, internal_guidance=1.4)


@pytest.mark.parametrize(
    ("sets", "rule"),
    [
        (["train.terms.internal=0.5", "model.stages=outer*3"], "train.terms.internal needs a weak head"),
        (["model.internal_head=1", "model.stages=outer*3"], "model.internal_head=1 needs its loss"),
        (["model.internal_head=3", "model.stages=outer*3"], "model.internal_head must be at most 2"),
        (
            ["train.terms.internal=1", "diffusion.predict=split", "model.internal_head=1"],
            "train.terms.internal does not work with diffusion.predict=split",
        ),
    ],
)
def test_configs_without_use_are_refused(sets, rule):
    config = RunConfig(model=small_model("outer*3"))
    with pytest.raises(UserError, match=rule):
        override(config, sets)


def test_defaults_are_neither_written_nor_hashed():
    config = RunConfig(model=small_model("outer*1 inner*1"))
    text = to_yaml(config)
    assert not any(word in text for word in ("guide_", "internal"))
    plain = config_hash(config)
    other = override(config, ["train.terms.internal=0.5", "model.internal_head=1", "sample.internal_guidance=1.4"])
    assert config_hash(other) != plain
    assert from_yaml(to_yaml(other)) == other


def test_a_plain_run_starts_a_model_with_an_internal_head(runs, tmp_path, folder):
    small = small_model("outer*2 inner*1", image_size=(8, 8), num_classes=3, internal_head=1)
    config = RunConfig(seed=3, model=small, train=TrainConfig(terms=TermsConfig(internal=0.5)))
    keys = {"steps": 1, "batch_size": 4, "sample_every": 0, "init": str(runs["strong"]), "init_blocks": (0, 0)}
    config = with_train(replace(config, data=replace(config.data, source=str(folder), held_out=0.2)), **keys)
    run = dd.train(config, tmp_path / "run").run()
    assert "internal_head.final.linear.weight" in Checkpoint.open(run.folder).weights()
