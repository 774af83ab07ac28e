"""Metrics without a network, tested on known corruptions, spectra and neighbours."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_in_dit.config import presets
from dit_in_dit.data.formats.mosaic import Mosaic
from dit_in_dit.data.sources import open_source
from dit_in_dit.data.summary import nearest, thumbnails
from dit_in_dit.metrics import wasserstein
from dit_in_dit.metrics.detail import detail, detail_scores
from dit_in_dit.metrics.memorization import neighbours
from dit_in_dit.metrics.pixels import Seams, Spectrum, channel_moments, compare_moments, score
from dit_in_dit.metrics.score import ReferenceHalves, bootstrap_weights
from dit_in_dit.reporting.images import to_floats, to_pixels

COUNT = 128
CORRUPTIONS = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "corruptions.py"))["CORRUPTIONS"]


@pytest.fixture(scope="module")
def emoji():
    """Real emoji, uint8 (480, 32, 32, 3), in a random order."""
    config = presets.get("emoji")
    source = open_source(config.data, config.model)
    order = np.random.default_rng(1).permutation(source.train_size)[: 3 * COUNT]
    return to_pixels(torch.from_numpy(np.stack([source.train(int(i))[0] for i in order])))


@pytest.fixture(scope="module")
def clean(emoji):
    """Scores of real images against other real images."""
    return score(to_floats(emoji[:COUNT]), to_floats(emoji[COUNT:]), (8, 2))


@pytest.fixture(scope="module")
def answers(emoji, clean):
    """Scores of corrupted real images, by corruption, from strength 0 up."""
    strengths = {
        "blur": (0.6, 1.2, 2.0), "noise": (0.05, 0.1, 0.2), "jpeg": (0.5, 0.8, 0.95),
        "grid": (0.02, 0.04, 0.08), "colour": (0.05, 0.1, 0.2),
    }  # fmt: skip
    real = to_floats(emoji[COUNT:])
    return {
        name: [clean, *(score(to_floats(CORRUPTIONS[name](emoji[:COUNT], s)), real, (8, 2)) for s in row)]
        for name, row in strengths.items()
    }


def sizes(found, name):
    """The metric at each strength, divided by the score of real images against real images."""
    return [abs(f[name].value) / found[0][name].floor for f in found]


def test_real_images_against_real_ones_score_the_floor(clean):
    multiples = [abs(s.value) / s.floor for s in clean.values()]
    assert max(multiples) < 3.5
    assert 0.5 < np.median(multiples) < 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("corruption", "metric"),
    [
        ("blur", "swd.32"), ("blur", "swd.16"), ("blur", "spectrum"), ("blur", "spectrum.1/4"),
        ("noise", "swd.32"), ("noise", "spectrum"), ("noise", "spectrum.1/4"),
        ("jpeg", "swd.32"), ("jpeg", "spectrum.1/4"), ("jpeg", "spectrum"),
        ("grid", "seam.8"), ("grid", "seam.2"),
        ("colour", "moments.mean"), ("colour", "swd.8"),
    ],
)  # fmt: skip
def test_a_metric_grows_with_its_corruption(answers, corruption, metric):
    multiples = sizes(answers[corruption], metric)
    assert multiples[1:] == sorted(multiples[1:])
    assert multiples[-1] > 3 > multiples[0] / 1.2


@pytest.mark.slow
def test_blur_lowers_the_finest_octave_and_noise_raises_it(answers):
    assert answers["blur"][-1]["spectrum.1/4"].high < 0 < answers["noise"][-1]["spectrum.1/4"].low


@pytest.mark.slow
def test_blur_hurts_the_finest_level_of_the_pyramid_most(answers):
    for step in (1, 2, 3):
        levels = [sizes(answers["blur"], f"swd.{side}")[step] for side in (32, 16, 8)]
        assert levels[0] == max(levels)
        assert levels[0] > 2 * levels[2]


@pytest.mark.slow
def test_a_patch_grid_raises_seam_scores_more_than_other_scores(answers):
    multiples = {name: sizes(answers["grid"], name)[3] for name in answers["grid"][0]}
    others = {name: size for name, size in multiples.items() if not name.startswith("seam")}
    assert multiples["seam.8"] > 5
    assert multiples["seam.8"] > 2 * max(others.values())


def test_scores_do_not_depend_on_earlier_random_numbers(emoji):
    small = to_floats(emoji[:8]), to_floats(emoji[8:24])
    first = score(*small, (8,))
    np.random.default_rng().random(5)
    assert score(*small, (8,)) == first


def test_images_equal_to_the_reference_half_are_at_distance_zero(emoji):
    real = to_floats(emoji[: 2 * COUNT])
    half = real[ReferenceHalves.of(len(real)).first[0]]
    found = score(half, real, (8,))
    assert all(abs(found[name].value) < 1e-6 for name in found if not name.startswith("swd"))


def test_pyramid_levels_add_up_to_the_image(emoji):
    images = to_floats(emoji[:4])
    levels = wasserstein.laplacian_pyramid(images)
    total = levels[-1]
    for level in reversed(levels[:-1]):
        total = wasserstein.enlarge(total) + level
    assert [level.shape[-1] for level in levels] == [32, 16, 8]
    np.testing.assert_allclose(total, images, atol=1e-5)


def test_the_one_dimensional_wasserstein_distance_equals_that_of_scipy():
    from scipy.stats import wasserstein_distance

    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(1, 6, 4)).astype(np.float32), draw.normal(1, 2, size=(1, 6, 4)).astype(np.float32)
    again = next(iter(wasserstein.resampled_wasserstein(a, b)))
    u, v = next(bootstrap_weights(6))
    expected = wasserstein_distance(a.ravel(), b.ravel(), np.repeat(u, 4), np.repeat(v, 4))
    assert again == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
def test_a_wave_has_its_power_at_its_own_frequency(size):
    y, x = np.mgrid[: size[0], : size[1]]
    wave = np.cos(2 * np.pi * x / 4)[None, None].astype(np.float32) + 0 * y.astype(np.float32)
    spectrum = Spectrum(*size)
    assert spectrum.frequency[np.argmax(spectrum(wave)[0])] == pytest.approx(1 / 4, abs=spectrum.step / 2)


def test_doubled_amplitude_raises_the_spectrum_by_six_decibels():
    draw = np.random.default_rng(0).normal(size=(5, 3, 16, 16)).astype(np.float32)
    spectrum = Spectrum(16, 16)
    found = spectrum.compare(spectrum(2 * draw).mean(0), spectrum(draw).mean(0))
    np.testing.assert_allclose(list(found.values()), 20 * np.log10(2), rtol=1e-6)


def test_moments_equal_those_of_scipy():
    from scipy.stats import kurtosis, skew

    a, b = (np.random.default_rng(s).gamma(2, size=(7, 3, 8, 8)).astype(np.float32) for s in (0, 1))
    found = compare_moments(channel_moments(a).mean(0), channel_moments(b).mean(0))
    flat = [x.transpose(1, 0, 2, 3).reshape(3, -1).astype(float) for x in (a, b)]
    for name, function in (("mean", np.mean), ("deviation", np.std), ("skewness", skew)):
        expected = np.max(np.abs(function(flat[0], axis=1) - function(flat[1], axis=1)))
        assert found[f"moments.{name}"] == pytest.approx(expected, rel=1e-5)
    tails = [kurtosis(x, axis=1, fisher=False) for x in flat]
    assert found["moments.kurtosis"] == pytest.approx(np.max(np.abs(tails[0] - tails[1])), rel=1e-5)
    correlations = [np.corrcoef(x)[np.triu_indices(3, 1)] for x in flat]
    assert found["moments.correlation"] == pytest.approx(np.max(np.abs(correlations[0] - correlations[1])), rel=1e-4)


def test_seams_are_found_at_their_own_period_and_place():
    draw = np.random.default_rng(0).normal(size=(50, 1, 24, 16)).astype(np.float32)
    stepped = draw + 2 * (np.arange(16) // 4 % 2)[None, None, None]  # a jump in value across the border every 4 columns
    seams = Seams(4)
    deviation = seams.deviation(seams(stepped).mean(0), seams(draw).mean(0))
    assert np.argmax(deviation[1]) == 3
    assert deviation[1, 3] > 5 * np.abs(deviation[0]).max()


def test_seams_within_patches_leave_out_the_borders_of_patches():
    draw = np.random.default_rng(0).normal(size=(20, 1, 16, 16)).astype(np.float32)
    stepped = draw + 2 * (np.arange(16) // 8 % 2)[None, None, None]
    inside, plain = Seams(2, skip=8), Seams(2)
    assert np.abs(inside.deviation(inside(stepped).mean(0), inside(draw).mean(0))).max() < 1e-6
    assert np.abs(plain.deviation(plain(stepped).mean(0), plain(draw).mean(0))).max() > 0.05


def test_images_of_one_colour_give_finite_scores():
    flat = np.zeros((4, 3, 16, 16), np.float32)
    found = score(flat, np.concatenate([flat, flat]), (4,))
    assert all(np.isfinite(s.value) for s in found.values())


def test_odd_and_tiny_sizes_are_measured():
    draw = np.random.default_rng(0)
    found = score(draw.random((4, 1, 9, 15), np.float32), draw.random((8, 1, 9, 15), np.float32), (3,))
    assert {"swd.9", "spectrum", "seam.3"} <= found.keys()
    assert "moments.correlation" not in found  # needs more than one channel


# --------------------------------------------------------------------------------------------- neighbours


def test_nearest_rows_equal_brute_force():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 6, generator=draw), torch.randn(30, 6, generator=draw)
    distance, number = nearest(a, b)
    table = torch.cdist(a.double(), b.double()) / 6**0.5
    np.testing.assert_allclose(distance, table.min(1).values, rtol=1e-6)
    assert (number == table.argmin(1).numpy()).all()
    alone, _ = nearest(a, a, itself=True)
    assert (alone > 0).all()


@pytest.fixture(scope="module")
def sets():
    """Thumbnails of emoji: training, and held-out ones of families that training does not have."""
    config = presets.get("emoji")
    source = open_source(config.data, config.model)
    train = np.stack([source.train(i)[0] for i in range(source.train_size)])
    held = np.stack([source.held_out(i)[0] for i in range(source.held_out_size)])
    return thumbnails(to_pixels(torch.from_numpy(train))), thumbnails(to_pixels(torch.from_numpy(held)))


def test_copied_training_images_give_a_warning(sets):
    train, held = sets
    half = len(held) // 2
    copies = train[::20][:half] + 0.02 * torch.randn(half, *train.shape[1:], generator=torch.Generator().manual_seed(0))
    found = neighbours(copies, train, held)
    assert found.scores()["memorised"].value > 0.95
    assert any("MEMORISING" in warning for warning in found.warnings(guided=True))


def test_mirrored_copies_are_found_if_training_showed_mirror_images(sets):
    train, held = sets
    half = len(held) // 2
    copies = train[::20][:half].flip(-1)
    unaware, aware = (neighbours(copies, train, held, mirrored=mirrored) for mirrored in (False, True))
    assert unaware.scores()["memorised"].value < 0.5
    assert aware.scores()["memorised"].value > 0.95
    assert (aware.train == 0).all()
    assert aware.too_near_train <= unaware.too_near_train  # mirror images of unseen images are compared too


def test_ten_percent_of_copies_give_a_memorising_warning(sets):
    train, held = sets
    mixed = torch.cat([held[:270], train[::100][:30]])
    assert any("MEMORISING" in warning for warning in neighbours(mixed, train, held).warnings(guided=True))


def test_held_out_images_give_no_memorising_warning(sets):
    train, held = sets
    half = len(held) // 2
    assert not any(
        "MEMORISING" in warning for warning in neighbours(held[:half], train, held[half:]).warnings(guided=True)
    )


def test_copies_of_one_image_give_a_repeating_warning(sets):
    train, held = sets
    found = neighbours(held[:10].repeat(10, 1, 1, 1), train, held)
    assert any("REPEATING" in warning for warning in found.warnings(guided=True))


# ------------------------------------------------------------------------------------- mosaic's detail


def test_true_mosaics_have_all_their_detail_and_others_have_none():
    mosaic = Mosaic((32, 32))
    truths, images = [mosaic.truth(i) for i in range(24)], [mosaic.image(i)[0] for i in range(24)]
    real = [detail(mosaic, t, x) for t, x in zip(truths, images, strict=True)]
    wrong = [detail(mosaic, t, x) for t, x in zip(truths, images[1:] + images[:1], strict=True)]
    found, foreign = detail_scores(real, real), detail_scores(wrong, real)
    assert all(s.value > 0.95 and s.value == s.floor for s in found.values())
    assert foreign["detail.period"].value < 0.4
    assert foreign["detail.direction"].value < 0.4
    assert abs(foreign["detail.contrast"].value) < 0.1
    assert foreign["detail.layout"].value < 0.6


def test_blur_removes_contrast_then_texture_then_layout_of_mosaics():
    from scipy.ndimage import gaussian_filter

    mosaic = Mosaic((32, 32))
    truths, images = [mosaic.truth(i) for i in range(24)], [mosaic.image(i)[0] for i in range(24)]
    real = [detail(mosaic, t, x) for t, x in zip(truths, images, strict=True)]
    steps = [
        detail_scores(
            [detail(mosaic, t, gaussian_filter(x, (0, s, s))) for t, x in zip(truths, images, strict=True)], real
        )
        for s in (0.5, 1.0, 2.0)
    ]
    for name in ("detail.contrast", "detail.period", "detail.layout"):
        values = [step[name].value for step in steps]
        assert values == sorted(values, reverse=True)
    assert steps[0]["detail.contrast"].value < 0.85 < steps[0]["detail.period"].value


def test_contrast_is_the_share_of_the_true_amplitude():
    mosaic = Mosaic((32, 32))
    truth, image = mosaic.truth(5), mosaic.image(5)[0]
    flat = image.copy()
    for number, region in enumerate(truth.regions):
        middle = np.mean(region.colours, axis=0)[:, None]
        owner = pixels_of(mosaic, truth, number)
        flat[:, owner] = middle + 0.5 * (image[:, owner] - middle)
    found = detail(mosaic, truth, flat)
    np.testing.assert_allclose(found.contrast, 0.5, atol=0.02)


def pixels_of(mosaic, truth, number):
    """Mask of the pixels that show only this region."""
    from dit_in_dit.metrics.detail import region_map

    return region_map(mosaic, truth) == number
