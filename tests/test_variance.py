"""Learned variance: loss, samples and counts against diffusers, closed forms and torch.distributions."""

from __future__ import annotations

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from conftest import inputs, perturbed, small_model, with_train
from dit_in_dit import cost, sample, train
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.run import DiffusionConfig, RunConfig, SampleConfig
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.diffusion.samplers import denoise, guided
from dit_in_dit.diffusion.variance import ancestral, posterior
from dit_in_dit.inspection.hooks import watch_contribution
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.images import to_pixels
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.sampling.numbered import sample_batches
from test_cost import counted
from test_model import PROGRAMS

DDPM = DiffusionConfig(path="ddpm", predict="noise")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def config(run_config: RunConfig) -> RunConfig:
    return override(
        run_config,
        ["model.learn_variance=true", "diffusion.path=ddpm", "sample.sampler=ddpm", "sample.steps=5"],
    )


# ------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("stages", PROGRAMS)
def test_learned_variance_doubles_the_channels_and_the_counted_cost_agrees(stages):
    plain = small_model(stages)
    model = replace(plain, learn_variance=True)
    out = NestedDiT(model)(*inputs(model))
    assert out.shape == (3, 6, 16, 8)
    assert cost.macs(model)["total"] == pytest.approx(counted(model), rel=0.005)
    assert cost.macs(model)["total"] > cost.macs(plain)["total"]


def test_the_inner_contribution_is_measured_on_the_prediction_only():
    plain = small_model("outer*2 inner*2")
    model = perturbed(NestedDiT(replace(plain, learn_variance=True)))
    with watch_contribution(model) as before:
        model(*inputs(plain))
    share = before["inner_head"].clone()
    for head, p in ((model.outer_head, 4), (model.inner_head, 2)):
        rows = head.final.linear.weight.view(p * p, 6, -1)  # the fractions' rows
        with torch.no_grad():
            rows[:, 3:] *= 100
    with watch_contribution(model) as after:
        model(*inputs(plain))
    assert torch.equal(after["inner_head"], share)


# -------------------------------------------------------------------------------------------- loss


def terms(k: int, fraction: float, x: torch.Tensor, noise: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """L_k of Nichol & Dhariwal 2021 in bits per dimension, from textbook densities in float64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    x, noise, predicted = x.double(), noise.double(), predicted.double()
    noisy = kept[k].sqrt() * x + (1 - kept[k]).sqrt() * noise
    image = (noisy - (1 - kept[k]).sqrt() * predicted) / kept[k].sqrt()
    if k == 0:
        smallest = betas[1] * (1 - kept[0]) / (1 - kept[1])
        deviation = (smallest ** (1 - (fraction + 1) / 2) * betas[0] ** ((fraction + 1) / 2)).sqrt()
        model = Normal(image, deviation)
        upper = torch.where(x > 0.999, torch.tensor(1.0), model.cdf(x + 1 / 255))
        lower = torch.where(x < -0.999, torch.tensor(0.0), model.cdf(x - 1 / 255))
        return -(upper - lower).clamp(min=1e-12).log() / math.log(2)
    before = kept[k - 1]
    smallest = betas[k] * (1 - before) / (1 - kept[k])
    c1, c2 = betas[k] * before.sqrt() / (1 - kept[k]), (1 - before) * (1 - betas[k]).sqrt() / (1 - kept[k])
    deviation = (smallest ** (1 - (fraction + 1) / 2) * betas[k] ** ((fraction + 1) / 2)).sqrt()
    true, ours = Normal(c1 * x + c2 * noisy, smallest.sqrt()), Normal(c1 * image + c2 * noisy, deviation)
    return kl_divergence(true, ours) / math.log(2)


@pytest.mark.parametrize("k", [0, 1, 2, 300, 999])
@pytest.mark.parametrize("fraction", [-1.0, 0.2, 1.0])
def test_the_hybrid_loss_is_the_noise_error_plus_the_bound_term(k, fraction):
    x, noise = (normal(2, 3, 4, 4) * 0.7).clamp(-1, 1), normal(2, 3, 4, 4, seed=1)
    predicted = noise + 0.1 * normal(2, 3, 4, 4, seed=2)
    output = torch.cat([predicted, torch.full_like(predicted, fraction)], dim=1)
    loss = Objective(DDPM).loss(lambda *_: output, x, noise, torch.full((2,), k / 1000), None)
    expected = (predicted - noise).square().flatten(1).mean(1) + terms(k, fraction, x, noise, predicted).flatten(
        1
    ).mean(1)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3 if k == 0 else 1e-4, atol=1e-6)


def test_the_bound_term_has_no_gradient_in_the_prediction():
    x, noise = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    t = torch.tensor([0.3, 0.8])
    alone = normal(2, 3, 4, 4, seed=2).requires_grad_()
    Objective(DDPM).loss(lambda *_: alone, x, noise, t, None).sum().backward()
    output = torch.cat([alone.detach(), normal(2, 3, 4, 4, seed=3)], dim=1).requires_grad_()
    Objective(DDPM).loss(lambda *_: output, x, noise, t, None).sum().backward()
    assert torch.equal(output.grad[:, :3], alone.grad)
    assert output.grad[:, 3:].abs().min() > 0


def test_the_variance_fraction_has_no_gradient_on_the_flow_path():
    x, noise, t = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), torch.tensor([0.3, 0.8])
    objective, output = Objective(DiffusionConfig()), normal(2, 6, 4, 4, seed=2)
    loss = objective.loss(lambda *_: output, x, noise, t, None)
    assert torch.equal(loss, objective.loss(lambda *_: output[:, :3], x, noise, t, None))


@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_the_denoising_error_ignores_the_variance_fraction(path):
    x, noise, output = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), normal(2, 6, 4, 4, seed=2)
    objective = Objective(DiffusionConfig(path=path, predict="image"))
    whole, _ = objective.denoising_error(lambda *_: output, x, noise, 0.5, None)
    torch.testing.assert_close(whole, (output[:, :3] - x).square().flatten(1).mean(1))


# ----------------------------------------------------------------------------------------- sampler


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("learned", [True, False])
def test_an_ancestral_step_equals_that_of_diffusers(spacing, learned):
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False,
        timestep_spacing=spacing,
        variance_type="learned_range" if learned else "fixed_large",
    )
    scheduler.set_timesteps(50)
    steps = scheduler.timesteps.tolist()
    x, predicted, fraction = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2).tanh()
    output = torch.cat([predicted, fraction], dim=1) if learned else predicted
    for number in (0, 1, 30, 48):
        k, j = steps[number : number + 2]
        theirs = scheduler.step(output, k, x, generator=torch.Generator().manual_seed(5))
        noise = normal(2, 3, 4, 4, seed=5)
        ours = ancestral(theirs.pred_original_sample, fraction if learned else None, x, k, j, noise)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-4, atol=1e-4)
    last = ancestral(x, fraction, x, steps[-1], -1, noise)
    assert torch.equal(last, x)  # no noise goes into what comes out


def test_the_posterior_follows_from_bayes_rule():
    """q(x_j | x_k, x) is proportional to q(x_k | x_j) q(x_j | x): precisions add."""
    scheduler = diffusers.DDPMScheduler()
    kept = scheduler.alphas_cumprod.double()
    for k, j in ((999, 998), (500, 480), (1, 0)):
        at = posterior(torch.tensor(k), torch.tensor(j))
        forward, prior = 1 - kept[k] / kept[j], 1 - kept[j]
        precision = (kept[k] / kept[j]) / forward + 1 / prior
        assert at.log_small.item() == pytest.approx(-math.log(precision), rel=1e-3)
        assert at.log_large.item() == pytest.approx(math.log(forward), rel=1e-3)
        assert at.image.item() == pytest.approx((kept[j].sqrt() / prior / precision).item(), rel=1e-3)
        assert at.noisy.item() == pytest.approx(((kept[k] / kept[j]).sqrt() / forward / precision).item(), rel=1e-3)


def test_ancestral_samples_have_the_distribution_of_the_data():
    """Images from N(m, s^2): with the best prediction and variance, samples have mean m and deviation s."""
    mean, std = 0.4, 0.5
    path = Objective(DDPM).path

    def ideal(x_t, t, y):
        a, b = (value[:, None, None, None] for value in path.coefficients(t))
        gain = b / (a**2 * std**2 + b**2)
        return torch.cat([gain * (x_t - a * mean), torch.ones_like(x_t)], dim=1)  # the largest variance is near right

    draw = torch.Generator().manual_seed(0)
    how = SampleConfig(sampler="ddpm", steps=250)
    images = denoise(ideal, DDPM, how, lambda: torch.randn(64, 1, 16, 16, generator=draw), None)
    assert images.mean().item() == pytest.approx(mean, abs=0.02)
    assert images.std().item() == pytest.approx(std, abs=0.02)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
def test_other_samplers_ignore_the_variance_fraction(sampler):
    noise, how = normal(2, 3, 4, 4), SampleConfig(sampler=sampler, steps=10)
    with_fraction = denoise(lambda x, t, y: torch.cat([x.tanh(), x], dim=1), DDPM, how, noise, None)
    assert torch.equal(with_fraction, denoise(lambda x, t, y: x.tanh(), DDPM, how, noise, None))


def test_guidance_leaves_the_variance_and_unguided_channels_unchanged():
    def predict(x, t, y):
        return y.float()[:, None, None, None].expand(-1, 8, 2, 2).clone()

    x, y, t = torch.zeros(2, 4, 2, 2), torch.tensor([1, 2]), torch.full((2,), 0.5)
    for channels, steered in ((None, 4), (3, 3), (1, 1)):
        how = SampleConfig(guidance=3.0, guidance_channels=channels)
        out = guided(predict, null=5, how=how)(x, t, y)[:, :, 0, 0]
        assert out[0].tolist() == [5 + 3 * (1 - 5)] * steered + [1] * (8 - steered)


def test_a_sample_of_sampler_ddpm_does_not_depend_on_its_batch(config):
    model = perturbed(NestedDiT(config.model))
    together = sample(model, config, 10)
    for asked in ([5], [9, 2], [7, 8]):
        drawn = torch.cat([images for _, images in sample_batches(model, config, asked)])
        assert torch.equal(drawn, together[asked])
    other = to_pixels(sample(model, config, 10, seed=1)).astype(int)
    assert np.abs(to_pixels(together).astype(int) - other).max() > 1


def test_sampler_ddpm_without_a_noise_source_is_refused():
    with pytest.raises(ValueError, match="pass a function, such as numbered_noise"):
        denoise(lambda x, t, y: x, DDPM, SampleConfig(sampler="ddpm"), normal(1, 1, 2, 2), None)


def test_a_run_learns_its_variance(config, tmp_path):
    """Training changes the head's rows for the variance fraction, which start at zero."""
    run = with_train(config, steps=6, checkpoint_every=6)
    kinds = [fact.kind for fact in train(run, tmp_path / "run")]
    assert kinds.count("step") == 6
    saved = Checkpoint.open(tmp_path / "run")
    model = saved.model(torch.device("cpu"))
    rows = model.outer_head.final.linear.weight.view(16, 6, -1)
    assert rows[:, 3:].abs().max() > 0
    assert sample(model, run, 2).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["sample.sampler=ddpm"], "needs diffusion.path=ddpm"),
        (["diffusion.path=ddpm", "sample.sampler=ddpm", "sample.steps=1"], "at least 2 steps"),
        (["sample.guidance_channels=4"], "at most model.channels: got 4 for 3"),
        (["diffusion.path=ddpm", "sample.sampler=ddim", "sample.spacing=linspace"], "does not fit sampler ddim"),
    ],
)
def test_incompatible_keys_of_learned_variance_are_refused(run_config, settings, part):
    settings = [*settings, *(["sample.steps=50"] if not any("steps" in s for s in settings) else [])]
    with pytest.raises(UserError, match=part):
        override(run_config, settings)
