"""Split prediction (AsymFlow) and DeCo's frequency loss, against outputs of the official code and closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from conftest import inputs, perturbed, small_model, with_train
from dit_in_dit import cost, sample, train
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash, from_yaml, override, to_yaml
from dit_in_dit.config.run import DiffusionConfig, RunConfig, SampleConfig
from dit_in_dit.data.run_data import find_source
from dit_in_dit.diffusion import frequency
from dit_in_dit.diffusion.frequency import frequency_error, frequency_matrix
from dit_in_dit.diffusion.objective import LOSS_WEIGHTS, Objective
from dit_in_dit.diffusion.path import convert, make_path
from dit_in_dit.diffusion.samplers import denoise, guided, trajectory
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.interop.export_pipeline import export, pipeline_of
from dit_in_dit.interop.import_pipeline import import_pipeline
from dit_in_dit.interop.import_run import export_official
from dit_in_dit.interop.pipeline import DiTInDiTPipeline
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.split import SplitOutput
from dit_in_dit.runs.checkpoint import Checkpoint, newest
from dit_in_dit.training import batches
from dit_in_dit.training.batches import principal_patches
from test_cost import counted

RECORD = {
    name: torch.from_numpy(values)
    for name, values in np.load(Path(__file__).parent / "golden" / "field" / "losses.npz").items()
    if values.dtype.kind == "f"
}
SPLIT = DiffusionConfig(predict="split", weight="velocity")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def in_time(t: Tensor) -> Tensor:
    return t[:, None, None, None]


# ------------------------------------------------------------------------------- split: the official code


def recorded(name: str) -> Tensor:
    return RECORD[f"asym/{name}"]


def official_split(scale: float, rank: int = 8) -> SplitOutput:
    split = SplitOutput(rank, scale, 0.04, 3, 4)
    split.basis.copy_(rearrange(recorded("basis"), "(p q c) r -> r (c p q)", p=4, q=4)[-rank:])
    return split


def official_output() -> Tensor:
    return rearrange(recorded("network"), "n (h w) (p q c) -> n c (h p) (w q)", h=4, p=4, q=4)


@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_a_split_prediction_gives_the_official_velocity_in_training_and_in_sampling(scale):
    split, x, t = official_split(scale), recorded("x"), recorded("t")
    seen, time = split.scaled(x, t)
    assert difference(seen, recorded(f"s{scale}/input")) < 1e-6
    assert difference(time, recorded(f"s{scale}/time")) < 1e-6
    for mode in ("train", "eval"):
        image = split.train(mode == "train")(official_output(), x, t)
        velocity = convert(make_path(SPLIT), image, x, t, given="split", wanted="velocity")
        for ours, theirs in zip(velocity, recorded(f"s{scale}/{mode}"), strict=True):
            assert difference(ours, theirs) < 1e-5


def split_losses(split: SplitOutput) -> Tensor:
    predict = lambda x, t, y: split(official_output(), x, t)  # noqa: E731
    return Objective(SPLIT).loss(predict, recorded("image"), recorded("noise"), recorded("t"), None)


@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_the_loss_of_a_split_prediction_is_the_official_loss(scale):
    losses = split_losses(official_split(scale))
    torch.testing.assert_close(losses, recorded(f"s{scale}/losses"), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.mean(), recorded(f"s{scale}/loss"), rtol=1e-5, atol=0)


def test_another_rank_scale_mode_or_order_of_a_patch_breaks_the_equality():
    other_order = official_split(1.0)
    other_order.basis.copy_(recorded("basis").T)
    for split in (official_split(1.0, rank=7), official_split(0.8), official_split(1.0).eval(), other_order):
        assert ((split_losses(split) / recorded("s1.0/losses") - 1).abs() > 1e-3).any()


def test_the_subspace_of_training_images_is_the_official_one():
    """The projections are equal; the sign of a row is free."""

    class Recorded:
        train_size = 4

        def train(self, index: int) -> tuple[np.ndarray, int]:
            return recorded("image")[index].numpy(), 0

    rows = principal_patches(Recorded(), small_model(image_size=(16, 16)), 8)
    expected = official_split(1.0).basis
    torch.testing.assert_close(rows.T @ rows, expected.T @ expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8), rtol=0, atol=1e-6)


def test_a_large_source_gives_evenly_spaced_images(monkeypatch):
    class Counted:
        train_size, seen = 100, []

        def train(self, index: int) -> tuple[np.ndarray, int]:
            self.seen.append(index)
            return np.full((3, 16, 8), 0.5, np.float32), 0

    monkeypatch.setattr(batches, "PCA_IMAGES", 5)
    for size in (100, 3, None):
        Counted.train_size, Counted.seen = size, []
        rows = principal_patches(Counted(), small_model(), 1)
        assert Counted.seen == {100: [0, 20, 40, 60, 80], 3: [0, 1, 2], None: [0, 1, 2, 3, 4]}[size]
        torch.testing.assert_close(rows.abs(), torch.full((1, 48), 48**-0.5))


# ------------------------------------------------------------------------------ split: all uses of predict


def random_split(scale: float, clamp: float = 1e-4, dtype: torch.dtype = torch.float64) -> SplitOutput:
    split = SplitOutput(5, scale, clamp, 3, 4).to(dtype).eval()
    split.basis.copy_(torch.linalg.qr(normal(48, 5, dtype=dtype))[0].T)
    return split


def projected(split: SplitOutput, x: Tensor) -> Tensor:
    p = rearrange(x, "n c (h p) (w q) -> n h w (c p q)", p=4, q=4) @ split.basis.T @ split.basis
    return rearrange(p, "n h w (c p q) -> n c (h p) (w q)", p=4, q=4)


def exact_output(split: SplitOutput, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """The network's output for the image x and the noise e, from its definition: inside the subspace, the velocity
    from k s x to k e at the network's time; outside, minus the image; both in units of s."""
    k = 1 / (split.scale + (1 - split.scale) * in_time(t))
    x_t, time, s = (1 - in_time(t)) * x + in_time(t) * e, in_time(t), split.scale
    inside = ((e - x) - (1 - s * k) / time * x_t) / (s * k)
    return projected(split, inside) + (-x + projected(split, x)) / s


def exact_predict(split: SplitOutput, x: Tensor):
    def predict(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        noise = (x_t - (1 - in_time(t)) * x) / in_time(t)
        return split(exact_output(split, x, noise, t), x_t, t)

    return predict


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("mode", [True, False])
def test_an_exact_split_prediction_gives_the_image(scale, mode):
    split, t = random_split(scale).train(mode), torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)
    x, e = normal(2, 3, 3, 16, 8, dtype=torch.float64)
    x_t = (1 - in_time(t)) * x + in_time(t) * e
    torch.testing.assert_close(split(exact_output(split, x, e, t), x_t, t), x)


def test_the_clamp_limits_divisions_in_sampling_only():
    split, t = random_split(1.0, clamp=0.2), torch.tensor([0.05], dtype=torch.float64)
    x, e = normal(2, 1, 3, 16, 8, dtype=torch.float64)
    x_t = 0.95 * x + 0.05 * e
    outside = (split(exact_output(split, x, e, t), x_t, t) - x) - projected(split, x_t - x)
    sampled = split.eval()(exact_output(split, x, e, t), x_t, t)
    away = x_t - projected(split, x_t) - 0.25 * ((x_t - x) - projected(split, x_t - x))
    torch.testing.assert_close(sampled, projected(split, x) + away)
    assert outside.abs().max() > 1e-3
    torch.testing.assert_close(split.train()(exact_output(split, x, e, t), x_t, t), x)


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "dpm++", "unipc"])
def test_every_sampler_returns_the_images_of_an_exact_split_prediction(sampler):
    split, x = random_split(0.9, clamp=1e-6, dtype=torch.float32), normal(2, 3, 16, 8, seed=1)
    predict, noise, how = exact_predict(split, x), normal(2, 3, 16, 8, seed=2), SampleConfig(sampler=sampler, steps=7)
    images = denoise(predict, SPLIT, how, noise, None)
    torch.testing.assert_close(images, x, rtol=0, atol=2e-3)
    for _, _, image, _ in trajectory(predict, SPLIT, how, noise, None):
        torch.testing.assert_close(image, x, rtol=0, atol=2e-3)
    assert (denoise(lambda *a: -predict(*a), SPLIT, how, noise, None) - x).abs().max() > 0.1


def test_estimates_and_held_out_errors_use_the_image():
    split, (x, e) = random_split(1.0, dtype=torch.float32), normal(2, 2, 3, 16, 8)
    objective, predict = Objective(SPLIT), exact_predict(split, x)
    torch.testing.assert_close(objective.estimate(predict, x, e, torch.tensor([0.2, 0.7]), None)[1], x)
    whole, high = objective.denoising_error(predict, x, e, 0.5, None)
    assert max(whole.max(), high.max()) < 1e-9


def test_guidance_of_a_split_prediction_is_guidance_of_its_velocity():
    split, x = random_split(1.0), normal(2, 3, 16, 8, dtype=torch.float64)
    t = torch.full((2,), 0.6, dtype=torch.float64)
    outputs = normal(2, 2, 3, 16, 8, seed=3, dtype=torch.float64)
    given, none = (split(u, x, t) for u in outputs)
    both = lambda x, t, y: torch.cat([given, none]) if len(y) == 4 else given  # noqa: E731
    steered = guided(both, null=5, how=SampleConfig(guidance=3.0))(x, t, torch.tensor([0, 1]))
    torch.testing.assert_close(steered, split(outputs[1] + 3 * (outputs[0] - outputs[1]), x, t))


@pytest.mark.parametrize("weight", ["prediction", "velocity", "image", "noise", "min_snr"])
def test_every_loss_weight_of_a_split_prediction_is_that_of_its_image(weight):
    t = torch.linspace(0, 1, 21)
    weights = [Objective(DiffusionConfig(predict=name, weight=weight)).weight(t) for name in ("split", "image")]
    assert torch.equal(*weights)
    assert weights[0].isfinite().all()


def test_the_loss_has_the_gradient_of_its_formula():
    split, (x, e) = random_split(0.8).train(), normal(2, 2, 3, 16, 8, dtype=torch.float64)
    objective, t = Objective(replace(SPLIT, frequency_weight=0.5)), torch.tensor([0.1, 0.8], dtype=torch.float64)

    def loss(u: Tensor) -> Tensor:
        exact = lambda x_t, t, y: Doubles(split(u.expand(2, -1, 16, 8), x_t, t))  # noqa: E731
        return objective.loss(exact, x, e, t, None)

    torch.autograd.gradcheck(loss, normal(2, 3, 1, 1, dtype=torch.float64).requires_grad_())


class Doubles:
    """A prediction that stays in float64, so that finite differences are exact enough."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape = values, values.shape

    def float(self) -> Tensor:
        return self.values


# ------------------------------------------------------------------------------------ split: the model


@pytest.fixture
def split_run(run_config: RunConfig) -> RunConfig:
    settings = ["diffusion.predict=split", "diffusion.split_rank=4", "diffusion.split_scale=0.9"]
    config = override(run_config, [*settings, "diffusion.weight=velocity", "diffusion.frequency_weight=0.1"])
    return with_train(config, steps=4, checkpoint_every=2, evaluate_every=2)


def split_model(stages: str = "inner*2 outer*2") -> NestedDiT:
    net = perturbed(NestedDiT(replace(small_model(stages), split=(4, 0.9, 0.04))))
    net.split.basis.copy_(torch.linalg.qr(normal(48, 4))[0].T)
    return net


def test_the_model_scales_its_input_and_converts_its_output():
    net, plain = split_model(), NestedDiT(small_model())
    assert plain.load_state_dict(net.state_dict(), strict=False).unexpected_keys == ["split.basis"]
    x, t, y = inputs(net.config)
    seen, time = net.split.scaled(x, t)
    torch.testing.assert_close(net(x, t, y), net.split(plain(seen, time, y), x, t))
    assert (net.eval()(x, t, y) - net.train()(x, t, y))[t > 0.04].abs().max() == 0


def test_the_subspace_is_projected_in_float32_under_autocast_and_in_float64():
    net = split_model()
    x, t, y = inputs(net.config)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t, y)
        u, noisy = normal(3, 3, 16, 8), x
        torch.testing.assert_close(net.split(u, noisy, t), net.double().split(u.double(), noisy.double(), t).float())
    assert out.dtype == torch.float32
    assert net(x.double(), t, y).dtype == torch.float64
    assert net.bfloat16()(x.bfloat16(), t, y).dtype == torch.bfloat16


def test_the_split_model_compiles_as_one_graph():
    net = split_model("outer*1")
    x, t, y = inputs(net.config)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, y), net(x, t, y))


def test_the_cost_of_the_projection_is_counted():
    model = small_model("outer*1")
    split = replace(model, split=(4, 1.0, 0.04))
    assert counted(split) - counted(model) == cost.macs(split)["split"] == 2 * 4 * 48 * 8
    assert cost.macs(split)["total"] - cost.macs(model)["total"] == 2 * 4 * 48 * 8
    assert "split" not in cost.macs(model)


def test_a_split_run_resumes_byte_for_byte_and_keeps_its_subspace(split_run, tmp_path):
    events = list(train(split_run, tmp_path / "whole"))
    assert {"step", "held_out", "checkpoint"} <= {event.kind for event in events}
    list(train(split_run, tmp_path / "again"))
    list(train(split_run, tmp_path / "parts", until=2))
    list(train(split_run, tmp_path / "parts", resume=True))
    runs = [newest(tmp_path / name) for name in ("whole", "again", "parts")]
    for other in runs[1:]:
        for mine, theirs in ((runs[0].state(), other.state()), (runs[0].averaged(), other.averaged())):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    source, _ = find_source(split_run, None, None)
    expected = principal_patches(source, split_run.model, 4)
    for weights in (runs[0].weights(), runs[0].weights(averaged=False)):
        assert torch.equal(weights["split.basis"], expected)
    model = Checkpoint.open(tmp_path / "whole").model(torch.device("cpu"))
    assert sample(model, split_run, 2).isfinite().all()


def test_a_split_run_is_exported_and_imported_with_its_subspace(split_run, tmp_path):
    list(train(with_train(split_run, evaluate_every=0), tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "out")
    saved = newest(tmp_path / "run")
    model = saved.model(torch.device("cpu"))
    pipes = [
        pipeline_of(model, split_run, list(saved.classes)),
        DiTInDiTPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False),
    ]
    assert torch.equal(pipes[1].transformer.nested.split.basis, model.split.basis)
    expected = {"path": "flow", "predict": "split", "split_rank": 4, "split_scale": 0.9}
    assert dict(pipes[1].transformer.config.diffusion) == expected  # without split_clamp, at its default
    noise, pictures = normal(2, 3, 8, 8), []
    for each in pipes:
        each.set_progress_bar_config(disable=True)
        pictures.append(each([0, 1], latents=noise, output_type="latent").images)
    assert torch.equal(*pictures)
    predict = guided(model, split_run.model.num_classes, split_run.sample)
    with torch.no_grad():
        ours = denoise(predict, split_run.diffusion, split_run.sample, noise, torch.tensor([0, 1]))
    torch.testing.assert_close(pictures[0], ours)
    import_pipeline(tmp_path / "out", tmp_path / "back")
    back = newest(tmp_path / "back")
    assert back.config.diffusion.split == split_run.diffusion.split
    assert torch.equal(back.weights()["split.basis"], model.split.basis)


def test_a_run_that_starts_from_a_split_run_keeps_its_subspace(split_run, tmp_path):
    short = with_train(split_run, steps=1, checkpoint_every=1, evaluate_every=0)
    list(train(short, tmp_path / "first"))
    basis = newest(tmp_path / "first").weights()["split.basis"]
    later = override(short, [f"train.init={tmp_path / 'first'}", "data.held_out=0.5"])
    list(train(later, tmp_path / "second"))
    assert torch.equal(newest(tmp_path / "second").weights()["split.basis"], basis)
    list(train(override(later, ["diffusion.split_rank=5"]), tmp_path / "third"))
    assert newest(tmp_path / "third").weights()["split.basis"].shape == (5, 48)
    list(train(override(later, ["diffusion.predict=image"]), tmp_path / "fourth"))


def test_a_plain_split_run_is_not_exported_as_an_official_dit(split_run, tmp_path):
    plain = with_train(override(split_run, ["model.stages=outer*1"]), steps=1, checkpoint_every=1, evaluate_every=0)
    list(train(plain, tmp_path / "run"))
    with pytest.raises(UserError, match="is no official model at any size"):
        export_official(tmp_path / "run", tmp_path / "out.pt")


@pytest.mark.parametrize("settings", [[], ["diffusion.predict=velocity"], ["diffusion.frequency_weight=0"]])
def test_the_untrained_loss_of_these_objectives_is_no_finding(split_run, settings):
    report = examine(override(split_run, [*settings, "train.batch_size=16"]), torch.device("cpu"))
    assert not {finding.check for finding in report.findings} & {"loss at start", "gradients"}


def test_a_split_run_trains_in_bfloat16(split_run, tmp_path):
    events = list(train(with_train(split_run, precision="bfloat16"), tmp_path / "run"))
    assert [event.values["loss"] > 0 for event in events if event.kind == "step"] == [True] * 4


# ------------------------------------------------------------------------------------- frequency loss


def deco(name: str) -> Tensor:
    return RECORD[f"deco/{name}"]


def deco_losses(config: DiffusionConfig, predicted: Tensor) -> Tensor:
    return Objective(config).loss(lambda *_: predicted, deco("image"), deco("noise"), 1 - deco("t"), None)


def test_the_frequency_loss_is_the_official_loss():
    """DeCo's velocity is image - noise, at 1 - t: ours with the other sign."""
    plain = deco_losses(DiffusionConfig(), -deco("predicted"))
    both = deco_losses(DiffusionConfig(frequency_weight=1.0), -deco("predicted"))
    torch.testing.assert_close(plain.mean(), deco("fm_loss"), rtol=1e-5, atol=0)
    torch.testing.assert_close(both.mean(), deco("loss"), rtol=1e-5, atol=0)
    torch.testing.assert_close((both - plain).mean(), deco("fm_loss_freq"), rtol=1e-5, atol=0)
    half = deco_losses(DiffusionConfig(frequency_weight=0.5), -deco("predicted"))
    torch.testing.assert_close((half - plain).mean(), deco("fm_loss_freq") / 2, rtol=1e-5, atol=0)


def test_the_linear_map_has_the_official_coefficients_and_weights():
    blocks = rearrange(deco("image") - deco("noise"), "n c (h p) (w q) -> n h w (c p q)", p=8, q=8)
    ours = rearrange(blocks.double() @ frequency_matrix().T, "n h w (c u v) -> n c h w u v", u=8, v=8)
    theirs = deco("dct") * deco("weights").sqrt()[:, None, None]
    assert difference(ours, theirs.double()) < 1e-6


def test_another_quality_colour_space_or_block_order_breaks_the_equality(monkeypatch):
    error, expected = deco("predicted") - (deco("image") - deco("noise")), deco("fm_loss_freq")
    torch.testing.assert_close(frequency_error(error).mean(), expected, rtol=1e-5, atol=0)
    assert frequency_error(error.transpose(2, 3)).mean() / expected - 1 != pytest.approx(0, abs=1e-4)
    assert frequency_error(error.flip(1)).mean() / expected - 1 != pytest.approx(0, abs=1e-4)
    monkeypatch.setattr(frequency, "_matrix", lambda device: frequency_matrix(80).float())
    assert frequency_error(error).mean() / expected - 1 != pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("path", ["flow", "ddpm"])
@pytest.mark.parametrize("predict", ["velocity", "image", "noise"])
def test_the_frequency_loss_is_that_of_the_velocity_whatever_is_predicted(path, predict):
    config = DiffusionConfig(path=path, predict=predict, weight="image", frequency_weight=2.0)
    objective, t = Objective(config), torch.tensor([0.3, 0.6])
    x, e, wrong = normal(3, 2, 3, 8, 16)
    x_t = objective.noisy(x, e, t)
    a, b = objective.path.coefficients(in_time(t))
    u, w = objective.path.velocity(a, b)
    velocity = convert(objective.path, wrong, x_t, t, given=predict, wanted="velocity")
    losses = [Objective(replace(config, frequency_weight=f)).loss(lambda *_: wrong, x, e, t, None) for f in (2.0, 0.0)]
    expected = 2 * frequency_error(velocity - (u * x + w * e))
    torch.testing.assert_close(losses[0] - losses[1], expected, rtol=1e-3, atol=1e-4)
    assert LOSS_WEIGHTS["velocity"](objective.path, predict, t).isfinite().all()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_the_frequency_loss_is_computed_in_the_type_of_the_error_under_autocast():
    error = normal(2, 3, 16, 8)
    alone = frequency_error(error)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frequency_error(error), alone)
    torch.testing.assert_close(frequency_error(error.double()).float(), alone)
    compiled = torch.compile(frequency_error, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(error), alone)


# -------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["diffusion.predict=split", "diffusion.path=ddpm", "sample.sampler=ddim"], "got ddpm, false"),
        (["diffusion.predict=split", "model.learn_variance=true"], "got flow, true"),
        (["diffusion.predict=split", "diffusion.split_rank=49"], "at most 48, the numbers of a patch: got 49"),
        (["diffusion.frequency_weight=1", "model.channels=4"], r"got 4, \[8, 8\]; set it to 0"),
        (["diffusion.frequency_weight=1", "model.image_size=[8, 12]"], r"got 3, \[8, 12\]; set it to 0"),
        (["diffusion.frequency_weight=-1"], "from 0 to 1e.06: got -1"),
        (["diffusion.predict=splitt"], "velocity, image, noise, split"),
    ],
)
def test_incompatible_keys_are_refused_in_one_line(run_config, settings, part):
    steps = ["sample.steps=50"] if "sample.sampler=ddim" in settings else []
    with pytest.raises(UserError, match=part) as raised:
        override(run_config, [*settings, *steps])
    assert "\n" not in str(raised.value)


def test_new_keys_change_neither_yaml_nor_hash_of_configs_without_them(run_config):
    assert not any(name in to_yaml(run_config) for name in ("split_", "frequency"))
    split = override(run_config, ["diffusion.predict=split", "diffusion.split_rank=4", "diffusion.frequency_weight=1"])
    assert from_yaml(to_yaml(split)) == split
    assert split.model.split == (4, 1.0, 0.04)
    assert override(split, ["diffusion.predict=velocity"]).model.split is None
    hashes = [
        config_hash(override(run_config, each))
        for each in ([], ["diffusion.predict=split"], ["diffusion.frequency_weight=1"], ["diffusion.split_rank=8"])
    ]
    assert hashes[0] == hashes[3]
    assert len(set(hashes)) == 3
