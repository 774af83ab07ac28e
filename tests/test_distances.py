"""Feature distances, tested against closed forms, brute force and torchmetrics; and files of statistics."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from dit_in_dit.config.errors import UserError
from dit_in_dit.metrics import feature_distances
from dit_in_dit.metrics.feature_distances import (
    Moments,
    density_coverage,
    feature_moments,
    frechet,
    frechet_name,
    inception_score,
    kernel_distance,
    precision_recall,
    read_reference,
)
from dit_in_dit.metrics.feature_networks import open_network


def normal(count: int, dimension: int, seed: int = 0, *, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Rows of correlated normal numbers, float32 as features are."""
    draw = np.random.default_rng(seed)
    mix = np.random.default_rng(9).normal(size=(dimension, dimension))
    return (shift + scale * draw.normal(size=(count, dimension)) @ mix).astype(np.float32)


def of(*sets: np.ndarray) -> list[Moments]:
    return [feature_moments([rows]) for rows in sets]


class Colours(nn.Module):
    """Twelve features of an image (N, 3, 6, 6), in place of Inception's in torchmetrics."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(108, 12)
        nn.init.normal_(self.project.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.project(images.double().flatten(1).to(self.project.weight) / 255))


# Moments


def test_moments_equal_those_of_numpy():
    rows = normal(1300, 7)
    found = feature_moments(np.array_split(rows, 5))
    assert found.count == 1300
    np.testing.assert_allclose(found.mean, rows.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-11)


@pytest.mark.parametrize("chunk", [1, 10, 20, 511, 1299])
def test_the_chunk_size_changes_no_bit_of_the_moments(chunk):
    rows = normal(1300, 7)
    whole, parts = feature_moments([rows]), feature_moments(rows[i : i + chunk] for i in range(0, 1300, chunk))
    np.testing.assert_array_equal(whole.mean, parts.mean)
    np.testing.assert_array_equal(whole.covariance, parts.covariance)


def test_a_large_mean_leaves_the_covariance_exact():
    rows = np.random.default_rng(0).integers(-4, 5, (900, 5)).astype(np.float64)
    near, far = (
        feature_moments([rows]),
        feature_moments([rows + 2.0**40]),
    )  # this sum is exact in float64: only the sums of the moments could lose digits
    np.testing.assert_allclose(far.covariance, near.covariance, rtol=1e-12, atol=1e-12)


def test_one_image_has_no_covariance():
    with pytest.raises(UserError, match="at least 2 images: got 1"):
        feature_moments([np.ones((1, 3))])


# Frechet distance


def test_frechet_equals_the_closed_form_in_one_dimension():
    a, b = Moments(None, np.array([1.0]), np.array([[4.0]])), Moments(None, np.array([4.0]), np.array([[25.0]]))
    assert frechet(a, b) == pytest.approx(3**2 + (2 - 5) ** 2, rel=1e-14)


def test_frechet_equals_the_closed_form_for_gaussians_that_share_axes():
    draw = np.random.default_rng(1)
    axes, _ = np.linalg.qr(draw.normal(size=(30, 30)))
    first, second = draw.uniform(0.1, 3, (2, 30))  # deviations along the axes
    shift = draw.normal(size=30)
    a = Moments(None, np.zeros(30), axes * first**2 @ axes.T)
    b = Moments(None, shift, axes * second**2 @ axes.T)
    assert frechet(a, b) == pytest.approx(shift @ shift + np.square(first - second).sum(), rel=1e-12)


def test_frechet_equals_the_closed_form_for_gaussians_without_a_shared_axis():
    """In two dimensions tr (S1 S2)^1/2 = (tr S1 S2 + 2 (det S1 S2)^1/2)^1/2 (Cayley-Hamilton)."""
    first, second = np.array([[2.0, 0.3], [0.3, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    root = np.sqrt(np.trace(first @ second) + 2 * np.sqrt(np.linalg.det(first) * np.linalg.det(second)))
    a, b = Moments(None, np.zeros(2), first), Moments(None, np.zeros(2), second)
    assert frechet(a, b) == pytest.approx(np.trace(first) + np.trace(second) - 2 * root, rel=1e-12)


def test_frechet_equals_torchmetrics_on_the_same_features():
    network, draw = Colours(), torch.Generator().manual_seed(2)
    real = torch.randint(0, 200, (300, 3, 6, 6), generator=draw, dtype=torch.uint8)
    made = torch.randint(30, 256, (250, 3, 6, 6), generator=draw, dtype=torch.uint8)
    theirs = FrechetInceptionDistance(network, input_img_size=(3, 6, 6)).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(made, real=False)
    with torch.no_grad():
        mine = frechet(*of(*(network(images).numpy() for images in (real, made))))
    assert mine == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert mine > 0.1


@pytest.mark.parametrize(("first", "second"), [(20, 30), (20, 300), (300, 20)])
def test_frechet_is_exact_with_fewer_images_than_dimensions(first, second):
    """With fewer images than dimensions, tr (S1 S2)^1/2 is the sum of the singular values of products of the images."""
    a, b = normal(first, 100, 1), normal(second, 100, 2, shift=0.3)
    rows = [(x - x.mean(0, dtype=np.float64)) / np.sqrt(len(x) - 1) for x in (a, b)]
    apart = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    shared = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()
    expected = apart @ apart + sum(np.square(x).sum() for x in rows) - 2 * shared
    assert frechet(*of(a, b)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("count", [20, 400])
def test_the_same_images_have_distance_zero(count):
    found = of(normal(count, 60))[0]
    assert frechet(found, found) <= 1e-12 * np.trace(found.covariance)


def test_frechet_is_symmetric_and_grows_with_shift_and_spread():
    base = of(normal(500, 20))[0]
    for kind in ("shift", "scale"):
        sets = [of(normal(500, 20, 1, **{kind: value}))[0] for value in (1.0, 1.5, 2.0, 3.0)]
        found = [frechet(base, other) for other in sets]
        assert found == sorted(found)
        assert found[-1] > 2 * found[0]
        assert frechet(sets[-1], base) == pytest.approx(found[-1], rel=1e-12)


def test_frechet_of_features_with_different_dimensions_is_refused():
    with pytest.raises(UserError, match="got 3 and 4 dimensions"):
        frechet(*of(normal(9, 3), normal(9, 4)))


def test_a_frechet_distance_is_called_fid_from_2048_images_on():
    assert frechet_name("inception", "pool", 2048) == "FID"
    assert frechet_name("inception", "spatial", 50_000) == "sFID"
    assert frechet_name("dinov2", "pool", 50_000) == "FD-DINOv2"
    assert frechet_name("inception", "pool", 2047) == "Frechet distance (N=2047)"
    few = [frechet_name(*kind, 9) for kind in feature_distances.DISTANCE_NAMES]
    assert len(set(few)) == 3
    assert not any("FID" in name or "FD" in name for name in few)


# Kernel distance


def test_the_kernel_distance_of_whole_sets_equals_torchmetrics():
    real, made = normal(60, 8), normal(60, 8, 1, shift=3)
    mean, deviation = kernel_distance(real, made, subsets=3, size=60)  # every subset is the whole set
    expected = poly_mmd(*(torch.from_numpy(rows).double() for rows in (real, made)))
    assert mean == pytest.approx(float(expected), rel=1e-12)
    assert 0 <= deviation < 1e-10 * mean


def test_the_kernel_distance_of_one_distribution_is_zero_within_its_deviation():
    rows = normal(4000, 6)
    mean, deviation = kernel_distance(rows[:2000], rows[2000:], subsets=50, size=200)
    assert abs(mean) < 3 * deviation  # the subsets overlap: they are far from independent
    assert mean < 0.02 * kernel_distance(rows[:2000], normal(2000, 6, 1, shift=2), subsets=5, size=200)[0]


def test_kernel_subsets_depend_only_on_the_seed():
    real, made = normal(300, 6), normal(300, 6, 1)
    once, again, other = (kernel_distance(real, made, subsets=4, size=50, seed=seed) for seed in (0, 0, 1))
    assert once == again != other


def test_too_few_images_for_a_kernel_subset_are_refused():
    with pytest.raises(UserError, match="got 9 real and 50 generated"):
        kernel_distance(normal(9, 3), normal(50, 3), size=10)


# Neighbours


def brute(real: np.ndarray, made: np.ndarray, k: int) -> dict[str, float]:
    """Precision, recall, density and coverage by their definitions, on whole matrices of distances."""
    apart = cdist(real.astype(np.float64), made.astype(np.float64))
    around_real = np.sort(cdist(real, real), 1)[:, k, None]  # place 0 is the image itself
    around_made = np.sort(cdist(made, made), 1)[:, k]
    inside = apart < around_real
    return {
        "precision": (apart <= around_real).any(0).mean(),
        "recall": (apart <= around_made).any(1).mean(),
        "density": inside.sum() / (k * len(made)),
        "coverage": inside.any(1).mean(),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [1, 700, 2**23])
def test_neighbour_metrics_equal_brute_force_at_any_block_size(monkeypatch, k, block):
    monkeypatch.setattr(feature_distances, "BLOCK", block)
    real, made = normal(90, 5), normal(70, 5, 1, shift=0.8, scale=0.7)
    expected = brute(real, made, k)
    assert precision_recall(real, made, k) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-12)
    assert density_coverage(real, made, k) == pytest.approx((expected["density"], expected["coverage"]), abs=1e-12)
    assert 0.05 < expected["recall"] < 0.95  # not 0 or 1, where wrong formulas would agree too


def test_copies_of_the_real_images_score_exactly_one():
    real = normal(200, 16, shift=50)  # large norms: the worst case for the expanded square
    assert precision_recall(real, real[::-1]) == (1, 1)
    assert density_coverage(real, real[::-1]) == (1, 1)


def test_precision_and_recall_are_exact_if_every_radius_is_zero():
    real = np.repeat(normal(10, 16, shift=50), 5, axis=0)  # five copies of each row: every radius is zero
    assert precision_recall(real, real[5:]) == (1, 0.9)  # one row of ten is missing
    assert precision_recall(real, real + 1e-2)[0] == 0


def test_collapse_lowers_recall_and_coverage_but_noise_lowers_precision_and_density():
    real = normal(400, 4)
    same, collapsed, noisy = normal(400, 4, 1), normal(400, 4, 1, scale=0.1), normal(400, 4, 1, scale=4)
    (p, r), (p_collapsed, r_collapsed), (p_noisy, _) = (precision_recall(real, x) for x in (same, collapsed, noisy))
    (d, c), (_, c_collapsed), (d_noisy, _) = (density_coverage(real, x) for x in (same, collapsed, noisy))
    assert p_noisy < 0.7 * p
    assert d_noisy < 0.7 * d
    assert r_collapsed < 0.3 * r
    assert c_collapsed < 0.3 * c
    assert p_collapsed > 0.98
    assert d == pytest.approx(1, abs=0.15)  # the expected density of equal distributions


def test_too_few_images_for_neighbours_are_refused():
    with pytest.raises(UserError, match="more than 3 images: got 3"):
        precision_recall(normal(3, 2), normal(9, 2))


# Inception Score


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
def test_the_inception_score_of_one_split_equals_torchmetrics():
    logits = 3 * normal(200, 11)
    theirs = InceptionScore(nn.Flatten(), splits=1)
    theirs.update(torch.from_numpy(logits))
    assert inception_score(logits, splits=1)[0] == pytest.approx(float(theirs.compute()[0]), rel=1e-5)  # in float32


def test_the_inception_score_of_certain_balanced_predictions_is_the_number_of_classes():
    sure = 100 * np.eye(8)[np.arange(8000) // 1000]  # sorted by class: unshuffled splits would have one class each
    mean, deviation = inception_score(sure, splits=10)
    assert 7.7 < mean < 8
    assert deviation < 0.1
    assert inception_score(np.ones((50, 8)), splits=5) == pytest.approx((1, 0))


def test_too_few_images_for_the_splits_are_refused():
    with pytest.raises(UserError, match="at least 10 images"):
        inception_score(np.ones((9, 3)))


# Files of statistics


def layout(path: Path, **changes) -> Path:
    """A file of ADM's layout with small dimensions."""
    pool, spatial = of(normal(50, 6), normal(50, 4, shift=1))
    arrays = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    arrays["arr_0"] = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})
    return path


def test_statistics_in_adms_layout_are_read_unchanged(tmp_path):
    path = layout(tmp_path / "reference.npz")
    found = read_reference(path)
    pool, spatial = of(normal(50, 6), normal(50, 4, shift=1))
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for kind, expected in (("pool", pool), ("spatial", spatial)):
        np.testing.assert_array_equal(found.moments[kind].mean, expected.mean)
        np.testing.assert_array_equal(found.moments[kind].covariance, expected.covariance)
        assert found.moments[kind].count is None


def test_single_precision_statistics_are_converted_to_double(tmp_path):
    pool = of(normal(50, 6))[0]
    path = layout(tmp_path / "r.npz", mu=pool.mean.astype(np.float32), sigma=pool.covariance.astype(np.float32))
    found = read_reference(path).moments["pool"]
    assert found.covariance.dtype == np.float64
    assert frechet(found, pool) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu_s": None}, "it lacks mu_s"),
        ({"mu": None, "sigma": None}, "it lacks mu, sigma"),
        ({"sigma": np.eye(5)}, r"sigma must be \(d, d\)"),
        ({"mu": np.zeros((6, 1))}, r"sigma must be \(d, d\)"),
        ({"sigma_s": np.full((4, 4), np.nan)}, "sigma_s and its mean must be finite"),
        ({"sigma": np.triu(np.ones((6, 6)))}, "sigma must be symmetric"),
        ({"mu": np.arange(6)}, "must be floats"),
        ({"mu": np.array([None] * 6)}, "cannot read"),  # a pickle inside
    ],
)
def test_statistics_that_do_not_fit_give_a_one_line_error(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        read_reference(layout(tmp_path / "reference.npz", **changes))
    assert "\n" not in str(error.value)


def test_files_without_statistics_give_a_one_line_error(tmp_path):
    good = layout(tmp_path / "good.npz").read_bytes()
    bad = {"text.npz": b"hello", "empty.npz": b"", "cut.npz": good[: len(good) // 2], "half.npz": good[:300]}
    bad["flip.npz"] = good[:200] + bytes([good[200] ^ 255]) + good[201:]
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "single.npy", np.ones(3))
    for path in [*(tmp_path / name for name in bad), tmp_path / "single.npy", tmp_path / "absent.npz", tmp_path]:
        with pytest.raises(UserError) as error:
            read_reference(path)
        assert path.name in str(error.value)
        assert "\n" not in str(error.value)


# Feature networks, where they are not installed


def test_a_missing_package_gives_a_one_line_error(monkeypatch, tmp_path):
    for name in ("torch_fidelity", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"torch-fidelity is missing: pip install 'dit-in-dit\[eval\]'"):
        open_network("inception", None, torch.device("cpu"))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="transformers is missing"):
        open_network("dinov2", tmp_path, torch.device("cpu"))
