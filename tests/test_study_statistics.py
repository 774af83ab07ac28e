"""Statistics over seeds, against scipy's; directions of metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dit_in_dit.metrics.metric import direction, group_metrics, metric_of
from dit_in_dit.study.statistics import Difference, mean_interval, paired_difference, standard_errors

VALUES = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=12)


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_a_mean_has_the_t_interval_of_scipy(values: list[float]):
    found = mean_interval(values)
    error = stats.sem(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), error) if error else (np.mean(values),) * 2
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.mean == pytest.approx(np.mean(values))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=12), st.integers(1, 40))
def test_a_difference_has_the_paired_t_test_of_scipy(pairs: list[tuple[float, float]], comparisons: int):
    a, b = ([round(x, 4) for x in column] for column in zip(*pairs, strict=True))
    found = paired_difference(by_seed(a), by_seed(b), comparisons)
    if found.equal or found.constant:
        assert np.ptp(np.subtract(a, b)) < 1e-9
        return
    test = stats.ttest_rel(a, b)
    alone = test.confidence_interval(0.95)
    together = test.confidence_interval(1 - 0.05 / comparisons)
    assert (found.low, found.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert (found.wide_low, found.wide_high) == (pytest.approx(together.low), pytest.approx(together.high))
    assert found.p == pytest.approx(test.pvalue)
    assert found.marked == (together.low > 0 or together.high < 0)
    assert found.marked == (test.pvalue < 0.05 / comparisons)


def test_only_seeds_that_both_arms_have_are_paired():
    found = paired_difference({0: 1.0, 1: 2.0, 5: 9.0}, {5: 5.0, 1: 1.0, 7: 0.0})
    assert found.seeds == (1, 5)
    assert found.mean == 2.5
    assert found.mean * found.scale == pytest.approx(100 * 2.5 / 3)


def test_percent_is_relative_to_the_absolute_value_of_the_other_mean():
    found = paired_difference({0: -3.0}, {0: -2.0})
    assert found.mean * found.scale == -50
    assert paired_difference({0: 1.0}, {0: 0.0}).scale is None


def test_equal_values_are_no_difference():
    values = {seed: 0.1 * seed for seed in range(5)}
    found = paired_difference(values, dict(values), 7)
    assert found == Difference((0, 1, 2, 3, 4), 0.0, None, equal=True)
    assert not found.marked


def test_rounding_errors_are_no_difference():
    a = {0: 0.1 + 0.2, 1: 0.7}
    assert paired_difference(a, {0: 0.3, 1: 0.7}).equal


def test_constant_differences_have_no_interval_and_no_mark():
    found = paired_difference({0: 0.3, 1: 0.5, 2: 0.8}, {0: 0.2, 1: 0.4, 2: 0.7})
    assert found.constant
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.p, found.marked) == (None, None, False)


def test_one_seed_has_no_interval_and_is_never_marked():
    found = paired_difference({3: 5.0}, {3: 1.0})
    assert (found.mean, found.low, found.wide_low, found.p, found.marked) == (4.0, None, None, None, False)
    assert mean_interval([5.0]).low is None
    assert standard_errors(1) == math.inf


def test_without_a_common_seed_there_is_no_difference():
    found = paired_difference({0: 1.0}, {1: 1.0})
    assert found.seeds == ()
    assert math.isnan(found.mean)
    assert not found.marked


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_never_marked(bad: float):
    found = paired_difference({0: 5.0, 1: bad, 2: 5.1}, {0: 1.0, 1: 1.0, 2: 1.1})
    assert math.isnan(found.mean)
    assert not found.marked
    assert math.isnan(mean_interval([1.0, bad]).mean)
    assert mean_interval([1.0, bad]).low is None


def test_pure_noise_is_marked_in_at_most_one_study_in_twenty():
    """Twelve arms are compared with the same control, so their marks are not independent, and the limit still holds."""
    draw, arms, studies = np.random.default_rng(0), 12, 1000
    marked = 0
    for _ in range(studies):
        control = by_seed(draw.normal(size=4).tolist())
        marked += any(
            paired_difference(by_seed(draw.normal(size=4).tolist()), control, arms).marked for _ in range(arms)
        )
    assert marked / studies < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    assert marked  # the test can fail: something is marked now and then


def test_95_percent_of_intervals_cover_a_planted_difference():
    draw, inside = np.random.default_rng(1), 0
    for _ in range(1000):
        shared = draw.normal(size=3)
        found = paired_difference(by_seed((shared + draw.normal(0.7, 0.2, 3)).tolist()), by_seed(shared.tolist()))
        inside += found.low is not None and found.high is not None and found.low <= 0.7 <= found.high
    assert abs(inside / 1000 - 0.95) < 3 * math.sqrt(0.05 * 0.95 / 1000)


# ------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("held_out.0.2.high", "lower"),
        ("swd.16", "lower"),
        ("spectrum", "lower"),
        ("spectrum.1/8", "zero"),
        ("moments.mean", "lower"),
        ("seam.8", "lower"),
        ("detail.period@0.5", "higher"),
        ("FID", "lower"),
        ("sFID", "lower"),
        ("FD-DINOv2", "lower"),
        ("Frechet distance (DINOv2, N=64)", "lower"),
        ("KID", "zero"),
        ("KID (subsets of 64)", "zero"),
        ("KID deviation", "listed"),
        ("IS", "higher"),
        ("IS deviation", "listed"),
        ("precision", "higher"),
        ("recall", "higher"),
        ("density", "higher"),
        ("coverage", "higher"),
        ("nearest.train", "listed"),
        ("memorised", "listed"),
        ("repeated", "listed"),
        ("of another's making", "listed"),
    ],
)
def test_every_metric_has_its_direction(metric: str, expected: str):
    assert direction(metric) == expected


def test_signed_metrics_are_compared_by_their_absolute_value():
    octave = metric_of("spectrum.1/4")
    assert octave.ranked(-3.0) == 3.0
    assert metric_of("held_out.0.2.high").ranked(-3.0) == -3.0
    assert octave.better(octave.ranked(-1.0) - octave.ranked(2.0))


def test_higher_is_better_only_for_metrics_of_that_direction():
    assert metric_of("precision").better(0.1)
    assert metric_of("FID").better(-0.1)
    assert not metric_of("FID").better(0.1)


def test_metrics_are_grouped_with_the_primary_metric_first():
    names = ["swd.16", "memorised", "seam.8", "swd.8", "held_out.0.2.high", "held_out.0.5.whole", "FID"]
    found = group_metrics(names, "held_out.0.5.whole")
    assert list(found) == ["held_out", "pixels", "standard", "listed"]
    assert found["held_out"] == ["held_out.0.5.whole", "held_out.0.2.high"]
    assert found["pixels"] == ["swd.8", "swd.16", "seam.8"]
    assert next(iter(group_metrics(names, "FID"))) == "standard"
