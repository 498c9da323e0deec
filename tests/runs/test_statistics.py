"""pass@k against enumeration, and the rest by hand."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isentropic.runs.statistics import (
    Interval,
    bootstrap_interval,
    interquartile_mean,
    majority_vote,
    pass_at_k,
    probability_of_improvement,
    rms_relative_error,
    stratified_interval,
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_success(data, n):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(64, 3, 16), (1000, 1, 500), (10_000, 7, 5000), (100_000, 20, 1000)])
def test_pass_at_k_is_stable(n, c, k):
    exact = 1 - math.comb(n - c, k) / math.comb(n, k) if n <= 1000 else None
    if exact is None:  # integers as wide as these do not divide into a float, their ratio does
        exact = 1 - math.prod((n - k - i) / (n - i) for i in range(c))
    assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-9)


def test_pass_at_k_limits():
    assert pass_at_k(8, 1, 8) == 1.0  # 0.656 if drawn with replacement
    assert pass_at_k(8, 0, 8) == 0.0
    assert pass_at_k(8, 8, 1) == 1.0
    for c in range(9):
        assert pass_at_k(8, c, 1) == pytest.approx(c / 8)
    curve = [pass_at_k(32, 2, k) for k in range(1, 33)]
    assert curve == sorted(curve)


def test_pass_at_k_broadcasts():
    correct = np.array([0, 1, 2])
    assert pass_at_k(4, correct, 2).tolist() == pytest.approx([0, 1 / 2, 5 / 6])
    table = pass_at_k(np.array([4, 4, 8])[:, None], correct[:, None], np.array([1, 2, 4]))
    expected = [[pass_at_k(n, c, k) for k in (1, 2, 4)] for n, c in ((4, 0), (4, 1), (8, 2))]
    assert table.tolist() == expected
    assert isinstance(pass_at_k(4, 2, 2), float)
    assert isinstance(pass_at_k(np.int64(4), 2, 2), float)
    assert pass_at_k(4, [1, 2], 2).shape == (2,)
    assert pass_at_k(4, np.array([], dtype=int), 2).shape == (0,)


def test_pass_at_k_errors():
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k must be in \[1, num_samples\], got {k} with 4"):
            pass_at_k(4, 2, k)
    for c in (-1, 5):
        with pytest.raises(ValueError, match=rf"num_correct must be in \[0, num_samples\], got {c} of 4"):
            pass_at_k(4, c, 1)
    with pytest.raises(ValueError, match="must be integers, got int64, float64, int64"):
        pass_at_k(4, 0.5, 1)
    with pytest.raises(ValueError, match="draw more or lower k"):
        pass_at_k(np.array([4, 2]), np.array([1, 1]), 3)


def test_majority_vote():
    assert majority_vote(["1", "2", "2"]) == "2"
    assert majority_vote(["2", "1", "1", "2"]) == "2"  # of equals the first
    assert majority_vote([None, None, "3"]) == "3"
    assert majority_vote([None]) is None
    assert majority_vote([]) is None


def test_bootstrap_interval():
    values = np.random.default_rng(0).normal(2.0, 1.0, size=400)
    low, high = bootstrap_interval(values, num=5000)
    # The normal interval: mean ± 1.96·sd/√400
    half = 1.96 * values.std() / 20
    assert (low, high) == (
        pytest.approx(values.mean() - half, abs=0.008),
        pytest.approx(values.mean() + half, abs=0.008),
    )
    assert bootstrap_interval(values, num=5000) == (low, high)  # seeded
    assert bootstrap_interval(values, num=5000, seed=1) != (low, high)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow.low < values.mean() < narrow.high < high


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = [bool((i := bootstrap_interval(rng.random(40), num=300)).low <= 0.5 <= i.high) for _ in range(200)]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_bootstrap_interval_degenerate():
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([1.0, 2.0]) is None
    assert bootstrap_interval([1, 1, 1]) == Interval(1.0, 1.0)
    assert bootstrap_interval([0.0, 0.0, 3.0]).low == 0.0


def test_bootstrap_interval_errors():
    with pytest.raises(ValueError, match="must be finite, got 1 that are not"):
        bootstrap_interval([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match=r"one-dimensional, got shape \(2, 2\)"):
        bootstrap_interval(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95"):
        bootstrap_interval([1.0, 2.0, 3.0], confidence=95.0)
    with pytest.raises(ValueError, match="num must be >= 1, got 0"):
        bootstrap_interval([1.0, 2.0, 3.0], num=0)


def test_rms_relative_error():
    assert rms_relative_error([1.0, 2.0], [1.0, 2.0]) == 0.0
    assert rms_relative_error([3.0, 1.0], 2.0) == 0.5
    assert rms_relative_error([1.1, 1.6], [1.0, 2.0]) == pytest.approx(math.sqrt((0.01 + 0.04) / 2))
    assert rms_relative_error(-0.5, -1.0) == 0.5
    with pytest.raises(ValueError, match="at least one reading"):
        rms_relative_error([], 1.0)
    with pytest.raises(ValueError, match="targets must not be 0"):
        rms_relative_error([1.0], 0.0)


def test_interquartile_mean_drops_a_quarter_at_each_end():
    assert interquartile_mean([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -50.0]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    # Twelve numbers: 3 of them at each end, which no other share of 12 and of 8 gives.
    assert interquartile_mean([0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 50.0, 60.0, 70.0]) == pytest.approx(4.0)
    assert interquartile_mean([1.0, 2.0, 6.0]) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="at least one"):
        interquartile_mean([])


def test_probability_of_improvement_is_a_half_of_itself_and_symmetric():
    x, y = [[0.1, 0.5, 0.9]], [[0.2, 0.4, 0.5, 0.6]]
    # 0.1 beats none of y, 0.5 two and ties one, 0.9 all four.
    assert probability_of_improvement(x, y) == pytest.approx((0 + 2.5 + 4) / 12)
    assert probability_of_improvement(x, x) == pytest.approx(0.5)
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1.0)
    assert probability_of_improvement([[1.0]], [[0.0]]) == 1.0
    for runs, baseline in (([[]], [[1.0]]), ([[1.0]], [[]])):
        with pytest.raises(ValueError, match="a task has no runs"):
            probability_of_improvement(runs, baseline)
    with pytest.raises(ValueError, match="1 and 2 tasks"):
        probability_of_improvement(x, [[1.0], [2.0]])
    assert stratified_interval(probability_of_improvement, x, [[0.0, 1.0]]) is None


def test_a_stratified_interval_holds_the_middle_of_the_resampled_statistics():
    rng = np.random.default_rng(3)
    runs = [rng.normal(size=40), rng.normal(size=40)]

    def mean(tasks):
        return float(np.mean([np.mean(task) for task in tasks]))

    # A mean of 80 normal numbers: ±1.96/√80 holds 95 % of it, ±0.67/√80 half of it.
    for confidence, z in ((0.95, 1.96), (0.5, 0.674)):
        low, high = stratified_interval(mean, runs, confidence=confidence)
        spread = z * np.sqrt(sum(task.var() for task in runs) / 160)
        assert (low + high) / 2 == pytest.approx(mean(runs), abs=0.02)
        assert (high - low) / 2 == pytest.approx(spread, rel=0.1)
