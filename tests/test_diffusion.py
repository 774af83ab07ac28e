"""Paths, conversions, losses and samplers against closed forms."""

from __future__ import annotations

import diffusers
import pytest
import torch

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DiffusionConfig, SampleConfig
from dit_in_dit.diffusion.objective import (
    LOSS_WEIGHTS,
    TIME_DISTRIBUTIONS,
    Objective,
    draw_time,
    high_frequencies,
    min_snr,
)
from dit_in_dit.diffusion.path import PATHS, QUANTITIES, Ddpm, Flow, convert, make_path, prediction_coefficients
from dit_in_dit.diffusion.samplers import denoise, guided

KINDS = ("velocity", "image", "noise")


def shaped(t: torch.Tensor) -> torch.Tensor:
    return t[:, None, None, None]


@pytest.mark.parametrize("name", ["flow", "ddpm"])
@pytest.mark.parametrize("given", KINDS)
@pytest.mark.parametrize("wanted", KINDS)
def test_any_prediction_converts_to_any_other_quantity(name, given, wanted):
    path = make_path(DiffusionConfig(path=name))
    t = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)
    x, e = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    a, b = path.coefficients(shaped(t))
    truth = {kind: u * x + w * e for kind in KINDS for u, w in [prediction_coefficients(path, kind, a, b)]}
    out = convert(path, truth[given], a * x + b * e, t, given=given, wanted=wanted)
    torch.testing.assert_close(out, truth[wanted], rtol=1e-6, atol=1e-6)


def test_the_ddpm_path_is_the_schedule_of_diffusers():
    scheduler = diffusers.DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    a, b = Ddpm().coefficients(torch.arange(1000) / 1000)
    torch.testing.assert_close(a**2, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(a**2 + b**2, torch.ones(1000))


def test_the_flow_path_is_a_straight_line_from_image_to_noise():
    objective = Objective(DiffusionConfig())
    x, e = torch.randn(2, 3, 1, 2, 2)
    assert torch.equal(objective.noisy(x, e, torch.zeros(3)), x)
    assert torch.equal(objective.noisy(x, e, torch.ones(3)), e)
    torch.testing.assert_close(objective.noisy(x, e, torch.full((3,), 0.25)), 0.75 * x + 0.25 * e)


@pytest.mark.parametrize("name", ["flow", "ddpm"])
@pytest.mark.parametrize("predict", KINDS)
@pytest.mark.parametrize("weight", KINDS)
def test_a_weighted_loss_equals_the_error_of_the_other_quantity(name, predict, weight):
    """The loss weighted for a quantity equals the squared error of the prediction converted to it."""
    objective = Objective(DiffusionConfig(path=name, predict=predict, weight=weight))
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    x, e, wrong = torch.randn(3, 2, 3, 2, 2, dtype=torch.float64)
    x_t = objective.noisy(x, e, t)
    a, b = objective.path.coefficients(shaped(t))
    u, w = prediction_coefficients(objective.path, weight, a, b)
    converted = convert(objective.path, wrong, x_t, t, given=predict, wanted=weight)
    expected = (converted - (u * x + w * e)).square().flatten(1).mean(1)
    loss = objective.loss(lambda *_: wrong, x, e, t, None)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


def test_min_snr_weights_are_those_of_the_paper():
    """Hang et al. 2023, section 3.4: min(SNR, 5) for images, min(SNR, 5) / SNR for noise."""
    t = torch.tensor([0.1, 0.5, 0.8])
    snr = ((1 - t) / t) ** 2
    for predict, expected in (("image", snr.clamp(max=5)), ("noise", snr.clamp(max=5) / snr)):
        torch.testing.assert_close(Objective(DiffusionConfig(predict=predict, weight="min_snr")).weight(t), expected)


@pytest.mark.parametrize("path", ["flow", "ddpm"])
@pytest.mark.parametrize("predict", KINDS)
def test_a_loss_on_the_prediction_has_weight_one(path, predict):
    t = torch.arange(1000) / 1000
    weights = Objective(DiffusionConfig(path=path, predict=predict, weight=predict)).weight(t)
    assert torch.equal(weights, torch.ones(1000))


def test_min_snr_holds_at_both_ends_of_the_ddpm_path():
    t = torch.arange(1000) / 1000
    for predict, ends in (("noise", (5e-4, 1.0)), ("image", (5.0, 4.036e-5)), ("velocity", (5e-4, 4.036e-5))):
        weights = Objective(DiffusionConfig(path="ddpm", predict=predict, weight="min_snr")).weight(t)
        assert weights[[0, -1]].tolist() == pytest.approx(ends, rel=0.02)


@pytest.mark.parametrize("path", ["flow", "ddpm"])
@pytest.mark.parametrize("predict", KINDS)
@pytest.mark.parametrize("weight", ["prediction", *KINDS, "min_snr"])
def test_loss_weights_are_finite_at_both_ends_of_the_path(path, predict, weight):
    weights = Objective(DiffusionConfig(path=path, predict=predict, weight=weight)).weight(torch.tensor([0.0, 1.0]))
    assert weights.isfinite().all()
    assert weights.max() <= 500


def test_min_snr_works_for_a_registered_prediction(monkeypatch):
    t = torch.linspace(0.1, 0.9, 9)
    for kind in KINDS:
        monkeypatch.setitem(QUANTITIES, "mine", QUANTITIES[kind])
        for path in (make_path(DiffusionConfig()), make_path(DiffusionConfig(path="ddpm"))):
            torch.testing.assert_close(min_snr(path, "mine", t), min_snr(path, kind, t))


def test_registered_paths_predictions_weights_and_times_are_looked_up_on_use(monkeypatch):
    """A user's entry in a table takes effect immediately."""

    class Curved(Flow):
        def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (1 - t) ** 2, t

    config, x, noise = DiffusionConfig(weight="image"), torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    monkeypatch.setitem(PATHS, "flow", Curved)
    monkeypatch.setitem(QUANTITIES, "velocity", lambda path, a, b: (2 * torch.ones_like(a), torch.ones_like(b)))
    monkeypatch.setitem(LOSS_WEIGHTS, "image", lambda path, predict, t: 10 * t)
    monkeypatch.setitem(TIME_DISTRIBUTIONS, "uniform", lambda uniform, config: uniform / 2)
    objective = Objective(config)
    t = draw_time(objective.path, torch.tensor([0.2, 1.0]), config)
    assert t.tolist() == pytest.approx([0.1, 0.5])
    seen = []
    loss = objective.loss(lambda x_t, t, y: seen.append(x_t) or torch.zeros_like(x_t), x, noise, t, None)
    assert seen[0].flatten(1)[:, 0].tolist() == pytest.approx([0.81 + 0.3, 0.25 + 1.5])
    assert loss.tolist() == pytest.approx([25, 125])  # 10 t (2 x + e)^2


def test_times_follow_their_distribution():
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    path = make_path(DiffusionConfig())
    torch.testing.assert_close(draw_time(path, uniform, DiffusionConfig()), uniform.float())
    config = DiffusionConfig(time="logit_normal", time_mean=0.8, time_std=0.6)
    logits = torch.logit(draw_time(path, uniform, config).double())
    assert logits.mean().item() == pytest.approx(0.8, abs=1e-3)
    assert logits.std().item() == pytest.approx(0.6, abs=1e-3)
    steps = draw_time(Ddpm(), uniform, DiffusionConfig(path="ddpm")) * 1000
    assert torch.equal(steps.round().unique(), torch.arange(1000.0))


def test_high_frequency_error_is_what_average_pooling_removes():
    x = torch.randn(2, 3, 6, 5)
    flat = x[..., :1, :1].expand(2, 3, 6, 5)
    assert high_frequencies(flat).abs().max() < 1e-6
    checkers = torch.tensor([[1.0, -1], [-1, 1]]).repeat(3, 3)[None, None]
    torch.testing.assert_close(high_frequencies(checkers), checkers)
    low = torch.nn.functional.interpolate(torch.randn(1, 1, 3, 3), scale_factor=2)
    assert high_frequencies(low).abs().max() < 1e-6


def test_denoising_error_of_the_truth_is_zero():
    objective = Objective(DiffusionConfig(predict="velocity"))
    x, e = torch.randn(2, 4, 3, 4, 4)
    whole, high = objective.denoising_error(lambda *_: e - x, x, e, 0.3, None)
    assert max(whole.max(), high.max()) < 1e-10


SAMPLERS = [
    *(("flow", sampler, 60) for sampler in ("euler", "heun", "ddim", "dpm++", "unipc")),
    *(("ddpm", sampler, 100) for sampler in ("ddim", "dpm++", "unipc")),
]


@pytest.mark.parametrize(("name", "sampler", "steps"), SAMPLERS)
@pytest.mark.parametrize("predict", KINDS)
def test_samplers_solve_the_closed_form_gaussian(name, sampler, steps, predict):
    """For images from N(m, s^2), the best prediction is known, and from noise e the sample is m + s e."""
    mean, std = 0.4, 0.5
    config = DiffusionConfig(path=name, predict=predict)
    path = make_path(config)

    def ideal(x_t, t, y):
        a, b = path.coefficients(shaped(t))
        gain = std**2 * a / (a**2 * std**2 + b**2)
        image = mean + gain * (x_t - a * mean)
        return convert(path, image, x_t, t, given="image", wanted=predict)

    noise = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    images = denoise(ideal, config, SampleConfig(sampler=sampler, steps=steps), noise, None)
    a, b = path.coefficients(torch.tensor(0.999 if name == "ddpm" else 1.0))
    expected = mean + std * (noise - a * mean) / (a**2 * std**2 + b**2).sqrt()
    assert (images - expected).abs().max() < (0.12 if sampler in {"euler", "ddim"} else 0.03)  # by sampler order


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 999, 1000])
def test_flow_samplers_take_any_number_of_steps(sampler, steps):
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    config, how = DiffusionConfig(predict="image"), SampleConfig(sampler=sampler, steps=steps)
    out = denoise(lambda x, t, y: torch.full_like(x, 0.3), config, how, noise, None)
    torch.testing.assert_close(out, torch.full_like(out, 0.3), atol=1e-3, rtol=0)


def test_unknown_pairs_of_path_and_sampler_are_refused():
    config = DiffusionConfig(path="ddpm")
    with pytest.raises(UserError, match="needs diffusion"):
        denoise(lambda x, t, y: x, config, SampleConfig(sampler="heun"), torch.zeros(1, 1, 2, 2), None)


def test_guidance_extrapolates_from_the_null_class_within_its_interval():
    def predict(x, t, y):
        return y.float()[:, None, None, None].expand_as(x)

    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([1, 2])
    how = SampleConfig(guidance=3.0, interval=(0.3, 0.6))
    steered = guided(predict, null=5, how=how)
    inside, outside = steered(x, torch.full((2,), 0.5), y), steered(x, torch.full((2,), 0.7), y)
    assert inside[:, 0, 0, 0].tolist() == [5 + 3 * (1 - 5), 5 + 3 * (2 - 5)]
    assert outside[:, 0, 0, 0].tolist() == [1, 2]
    assert guided(predict, null=5, how=SampleConfig(guidance=1.0)) is predict
