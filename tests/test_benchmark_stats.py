"""Statistics over runs against scipy, rliable's own metrics and numbers that can be worked out by hand."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmark import stats

metrics = pytest.importorskip("rliable.metrics", reason="pip install -r requirements-benchmark.txt")


def test_interquartile_mean():
    """The mean of what is left without the lowest and the highest quarter."""
    scores = np.random.default_rng(0).permutation(np.arange(8.0)).reshape(4, 2)
    assert stats.iqm(scores) == [3.5] and stats.iqm(scores[:, :1] * 0 + 2) == [2]
    assert stats.iqm(np.array([[0.0], [1.0], [5.0]])) == [2]  # three have no quarter: the mean
    curves = np.random.default_rng(1).normal(size=(12, 3, 5))
    np.testing.assert_allclose(stats.iqm(curves), scipy_stats.trim_mean(curves.reshape(36, 5), 0.25, axis=0))
    assert stats.iqm(curves[..., 0]) == pytest.approx(metrics.aggregate_iqm(curves[..., 0]))


def test_probability_of_improvement():
    x, y = np.array([[1.0, 5.0], [2.0, 5.0]]), np.array([[0.0, 5.0], [1.0, 6.0], [3.0, 4.0]])
    # map 1: 1 beats 0, ties with 1; 2 beats 0 and 1: 3.5 of 6; map 2: each 5 ties with 5 and beats 4: 3 of 6
    assert stats.improvement(x, y) == pytest.approx([(3.5 / 6 + 3 / 6) / 2])
    assert stats.improvement(x, y) == pytest.approx(metrics.probability_of_improvement(x, y))


def test_intervals_are_scipys():
    """One map: the percentile bootstrap of scipy, up to the noise of 2000 samples."""
    values = np.random.default_rng(2).normal(size=15)
    mean, limits = stats.estimate(lambda scores: scores.mean((0, 1), keepdims=True)[0], values[:, None])
    again = stats.estimate(lambda scores: scores.mean((0, 1), keepdims=True)[0], values[:, None])
    theirs = scipy_stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=3)
    assert mean == pytest.approx(values.mean()) and np.array_equal(again[1], limits)  # the seed is fixed
    np.testing.assert_allclose(limits[:, 0], list(theirs.confidence_interval), atol=0.05)


def test_strata_are_maps():
    """Runs are resampled within a map: maps whose runs are all alike leave no doubt, however far apart."""
    scores = np.array([[0.0, 1.0]] * 5)
    assert stats.between(stats.iqm, scores) == "0.50 [0.50, 0.50]"
    assert stats.between(stats.improvement, scores + 1, scores) == "1.00 [1.00, 1.00]"
    _, limits = stats.estimate(stats.iqm, np.random.default_rng(4).normal(size=(5, 2, 7)))
    assert limits.shape == (2, 7) and (limits[0] < limits[1]).all()


def test_maps_of_unlike_numbers_of_runs():
    """Each map counts alike, and numbers and intervals are rliable's where all have as many runs."""
    x, y = [np.array([1.0, 2.0]), np.array([5.0])], [np.array([0.0, 1.0, 3.0]), np.array([5.0, 6.0, 4.0])]
    value, limits = stats.estimate(stats.improvement, x, y)
    assert value == pytest.approx([(3.5 / 6 + 1.5 / 3) / 2]) and limits[0] < value < limits[1]
    assert stats.even(x).tolist() == [[1, 5], [2, 5]]
    full = np.random.default_rng(5).normal(size=(8, 3))
    (ours, our_limits), (theirs, their_limits) = (stats.estimate(stats.iqm, z) for z in (list(full.T), full))
    assert ours == theirs
    np.testing.assert_allclose(our_limits, their_limits, atol=0.1)
    assert stats.between(stats.iqm, [np.array([]), np.array([1.0])]) == "-"
    assert stats.between(stats.iqm, [np.array([2.0]), np.array([1.0])]) == "1.50"


def test_cells():
    assert stats.iqm_of([0.25]) == "0.25" and stats.iqm_of([]) == "-"  # a single run has no interval
    assert stats.iqm_of([2.0, 2.0, 2.0], digits=1) == "2.0 [2.0, 2.0]"


def test_profile_counts_runs_above_a_level():
    shares, limits = stats.profile({"a": np.array([[0.2, 0.9], [0.5, 1.0]])}, np.array([0.0, 0.5, 0.95]))
    assert shares["a"].tolist() == [1.0, 0.5, 0.25] and limits["a"].shape == (2, 3)
    assert limits["a"][:, 0].tolist() == [1, 1] and limits["a"][0, 2] < 0.25 < limits["a"][1, 2]


def test_wilsons_interval():
    """Wilson 1927 in its textbook form, and two values of published tables."""
    assert stats.wilson(50, 50) == pytest.approx((0.9287, 1.0), abs=1e-4)
    assert stats.wilson(0, 50) == pytest.approx((0.0, 0.0713), abs=1e-4)
    rate, n, z = 7 / 20, 20, scipy_stats.norm.ppf(0.975)
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    assert stats.wilson(7, 20) == pytest.approx((middle - half, middle + half))
    assert stats.success_rate([True] * 7 + [False] * 13) == "7 of 20 (18 to 57%)"


def test_intervals_of_unlike_numbers_are_those_of_rliable_where_they_are_alike():
    full = np.random.default_rng(5).normal(size=(8, 3))
    (_, ours), (_, theirs) = (stats.estimate(stats.iqm, scores) for scores in (list(full.T), full))
    np.testing.assert_allclose(ours, theirs, atol=0.04)


def test_a_map_is_resampled_as_often_as_it_has_runs():
    # of 0 and 2 both draws are 0 in a quarter of the samples, and both 2 in another
    value, limits = stats.estimate(
        lambda scores: scores.mean(keepdims=True)[0], [np.array([0.0, 2.0]), np.zeros(8)]
    )
    assert value == [0.5] and limits.ravel().tolist() == [0, 1]


def test_an_interval_where_one_map_has_one_run():
    assert stats.between(stats.iqm, [np.array([2.0]), np.array([1.0, 3.0])]) == "2.00 [1.50, 2.50]"


def test_profiles_are_the_same_each_time():
    scores, levels = {"a": np.random.default_rng(6).normal(size=(41, 3))}, np.linspace(-1, 1, 9)
    first, again = (stats.profile(scores, levels)[1]["a"] for _ in range(2))
    assert np.array_equal(first, again)
