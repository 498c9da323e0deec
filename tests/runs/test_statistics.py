"""pass@k against enumeration, intervals by how often they hold the truth, and the rest by hand."""

import math
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isentropic.runs.statistics import (
    improvement_interval,
    interquartile_mean,
    majority_vote,
    mean_interval,
    paired_interval,
    pass_at_k,
    probability_of_improvement,
    proportion_interval,
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
    with pytest.raises(ValueError, match="draw more, or lower k"):
        pass_at_k(np.array([4, 2]), np.array([1, 1]), 3)


def test_majority_vote():
    assert majority_vote(["1", "2", "2"]) == "2"
    assert majority_vote(["2", "1", "1", "2"]) == "2"  # of equals the first
    assert majority_vote([None, None, "3"]) == "3"
    assert majority_vote([None]) is None
    assert majority_vote([]) is None


def coverage(intervals, truth):
    """The share of intervals that hold the truth, and their mean width."""
    low, high = np.array(intervals).T
    return np.mean((low <= truth) & (truth <= high)), np.mean(high - low)


def test_a_proportion_interval_is_wilsons_with_a_t_quantile():
    # 5 of 20, t_19 = 2.0930: centre (0.25 + t²/40) / (1 + t²/20), half t √(0.25·0.75/20 + t²/1600) / (1 + t²/20).
    assert proportion_interval([1] * 5 + [0] * 15) == (
        pytest.approx(0.105954, abs=2e-6),
        pytest.approx(0.483886, abs=2e-6),
    )
    # All wrong or all right: t² / (20 + t²), never 0 to 0 or 1 to 1.
    assert proportion_interval([0.0] * 20) == (0.0, pytest.approx(4.38075 / 24.38075, abs=1e-6))
    assert proportion_interval([1.0] * 20) == (pytest.approx(20 / 24.38075, abs=1e-6), 1.0)
    # Spread that is four times smaller in every value: φ = (Σ (x − m)² + ½) / (n m (1 − m) + ½).
    low, high = proportion_interval([0.25] * 50 + [0.75] * 50)
    effect, t = (100 / 16 + 0.5) / (25 + 0.5), 1.98422
    assert (high - low) / 2 == pytest.approx(t * math.sqrt(effect / 400 / (1 + t**2 * effect / 100)), rel=1e-4)
    assert (low + high) / 2 == pytest.approx(0.5)
    narrow = proportion_interval([0.25] * 50 + [0.75] * 50, confidence=0.5)
    assert low < narrow.low < 0.5 < narrow.high < high
    assert proportion_interval([0.2, 0.2, 0.2]).low < 0.2 < proportion_interval([0.2, 0.2, 0.2]).high
    assert proportion_interval([]) is None
    assert proportion_interval([0.0, 1.0]) is None


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.5, 0.95, 0.98])
@pytest.mark.parametrize("num", [20, 180])
def test_proportion_intervals_of_right_and_wrong_cover(num, rate):
    # Exactly: the sum over counts. Twenty prompts have 21 counts, so that no interval covers 93 to 97 % at every rate.
    chances = [math.comb(num, c) * rate**c * (1 - rate) ** (num - c) for c in range(num + 1)]
    intervals = [proportion_interval([1] * c + [0] * (num - c)) for c in range(num + 1)]
    covered = sum(p for p, (low, high) in zip(chances, intervals, strict=True) if low <= rate <= high)
    assert 0.93 <= covered <= (0.99 if num == 20 else 0.975)


def difficulties(rng, concentration, k, score, shape):
    """Beta-distributed chances of prompts, of a sum of parameters and a mean pass@k."""
    low, high = 0.0, 1.0
    for _ in range(60):
        mean = (low + high) / 2
        a, b = concentration * mean, concentration * (1 - mean)
        missed = math.prod((b + j) / (a + b + j) for j in range(k))
        low, high = (mean, high) if 1 - missed < score else (low, mean)
    return rng.beta(a, b, shape)


@pytest.mark.parametrize("concentration", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("num", "score"), [(20, 0.9), (20, 0.98), (180, 0.9), (180, 0.98), (180, 0.995)])
def test_proportion_intervals_of_pass_at_8_near_1_cover(num, score, concentration):
    rng = np.random.default_rng(0)
    right = rng.binomial(16, difficulties(rng, concentration, 8, score, (1000, num)))
    covered, width = coverage([proportion_interval(pass_at_k(16, c, 8)) for c in right], score)
    # Where fewer than three or four prompts are missed, the mean has few values and coverage jumps, as with 0 and 1.
    few = num * (1 - score) < 3
    assert 0.93 <= covered <= (0.99 if few else 0.975)
    # At most one and a half times as wide as an interval that knew the spread.
    known = pass_at_k(16, right, 8).std()
    assert width < 1.5 * 2 * 2.1 * known / math.sqrt(num) or few


def test_interval_errors():
    for interval in (proportion_interval, mean_interval, lambda *a, **k: paired_interval(*a, [0.0, 0.0, 0.0], **k)):
        with pytest.raises(ValueError, match="must be finite, got 1 that are not"):
            interval([1.0, math.nan, 0.0])
        with pytest.raises(ValueError, match=r"one-dimensional, got shape \(2, 2\)"):
            interval(np.zeros((2, 2)))
        for confidence in (0.0, 1.0, 95.0):
            with pytest.raises(ValueError, match=rf"confidence must be in \(0, 1\), got {confidence}"):
                interval([1.0, 0.0, 1.0], confidence=confidence)
    for wrong in ([0.0, 0.5, 1.1], [0.0, -0.1, 1.0]):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            proportion_interval(wrong)
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            paired_interval([0.0, 0.0, 0.0], wrong)
    with pytest.raises(ValueError, match="same prompts, got 3 and 4"):
        paired_interval([0, 0, 0], [0, 0, 0, 1])
    with pytest.raises(ValueError, match="at least one task, got none"):
        mean_interval()


def test_a_paired_interval_is_tangos():
    # Of equal policies the bound solves n δ² = t² δ (1 − δ), t_11 = 2.200985.
    low, high = paired_interval([1.0] * 12, [1.0] * 12)
    t = 2.200985
    assert (-low, high) == (pytest.approx(t**2 / (12 + t**2)), pytest.approx(t**2 / (12 + t**2)))
    num = 40_000
    ours = np.arange(num) < num * 0.3
    theirs = (num * 0.25 <= np.arange(num)) & (np.arange(num) < num * 0.45)
    gap = 0.25 - 0.15
    half = 1.96004 * math.sqrt((0.25 + 0.15 - gap**2) / num)
    assert paired_interval(ours, theirs) == (pytest.approx(gap - half, abs=1e-4), pytest.approx(gap + half, abs=1e-4))
    swapped = paired_interval(theirs, ours)
    assert (-swapped.high, -swapped.low) == pytest.approx(paired_interval(ours, theirs))
    assert paired_interval([1.0, 0.0], [0.0, 0.0]) is None
    # Of values between 0 and 1 the interval is as wide as their differences are: here as Student's t.
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(400), rng.random(400)
    half = 1.96592 * (ours - theirs).std(ddof=1) / 20
    low, high = paired_interval(ours, theirs)
    assert (high - low) / 2 == pytest.approx(half, rel=0.02)
    assert (high + low) / 2 == pytest.approx((ours - theirs).mean(), abs=0.002)


@pytest.mark.parametrize("flips", [(0.0, 0.0), (0.01, 0.01), (0.02, 0.0), (0.05, 0.01), (0.1, 0.1), (0.5, 0.1)])
@pytest.mark.parametrize("num", [20, 180])
def test_paired_intervals_of_right_and_wrong_cover(num, flips):
    gained, lost = flips
    counts = np.random.default_rng(0).multinomial(num, [gained, lost, 1 - gained - lost], size=4000)
    seen, times = np.unique(counts[:, :2], axis=0, return_counts=True)
    covered = 0
    for (b, c), number in zip(seen.tolist(), times.tolist(), strict=True):
        low, high = paired_interval([1] * b + [0] * (num - b), [0] * b + [1] * c + [0] * (num - b - c))
        assert low < (b - c) / num < high
        covered += number * (low <= gained - lost <= high)
    # Discrete as long as few prompts flip.
    assert 0.93 <= covered / 4000 <= (0.97 if num * (gained + lost) > 30 else 1.0)


@pytest.mark.parametrize(("k", "concentration", "score"), [(1, 1.0, 0.5), (1, 4.0, 0.9), (8, 4.0, 0.9), (8, 1.0, 0.98)])
@pytest.mark.parametrize("power", [1.0, 1.3])
@pytest.mark.parametrize("num", [20, 180])
def test_paired_intervals_of_pass_at_k_cover(num, k, concentration, score, power):
    # Theirs solves a prompt with the chance of ours to a power: the same policy, or a slightly worse one.
    rng = np.random.default_rng(0)
    ours = difficulties(rng, concentration, k, score, (800, num))
    exact = difficulties(rng, concentration, k, score, 300_000)
    truth = np.mean((1 - exact**power) ** k - (1 - exact) ** k)
    pairs = zip(rng.binomial(16, ours), rng.binomial(16, ours**power), strict=True)
    intervals = [paired_interval(pass_at_k(16, a, k), pass_at_k(16, b, k)) for a, b in pairs]
    # Twenty prompts, or misses as rare as with pass@8 of 0.98, leave few differences that are not 0.
    discrete = num == 20 or score == 0.98
    assert 0.93 <= coverage(intervals, truth)[0] <= (1.0 if discrete else 0.97)


@pytest.mark.parametrize(
    ("num", "t"), [(3, 4.30265), (4, 3.18245), (5, 2.77645), (8, 2.36462), (10, 2.26216), (30, 2.04523)]
)
def test_a_mean_interval_has_the_quantiles_of_the_tables(num, t):
    values = np.random.default_rng(num).normal(3.0, 2.0, num)
    half = t * values.std(ddof=1) / math.sqrt(num)
    assert mean_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), rel=2e-5)


def test_a_mean_interval_at_other_confidences_and_over_tasks():
    low, high = mean_interval([0.0, 1.0, 2.0], confidence=0.99)  # t_2 = 9.92484
    assert (low, high) == (pytest.approx(1 - 9.92484 / math.sqrt(3)), pytest.approx(1 + 9.92484 / math.sqrt(3)))
    assert mean_interval([0.0, 1.0, 2.0], bounds=(0, 2)) == (0.0, 2.0)
    assert mean_interval([-1e-9, -2e-9, -3e-9], bounds=(0.0, 2.0)).low == pytest.approx(-2e-9)
    large = np.random.default_rng(0).normal(size=100_000)
    assert mean_interval(large, confidence=0.5)[1] - large.mean() == pytest.approx(0.67449 / math.sqrt(1e5), rel=5e-3)
    # Two tasks of equal variance 1/3 each: ν = 4, t = 2.77645, half = t √(2/3) / 2.
    low, high = mean_interval([0.0, 1.0, 2.0], [10.0, 11.0, 12.0])
    half = 2.77645 * math.sqrt(2 / 3) / 2
    assert (low, high) == (pytest.approx(6 - half, abs=1e-4), pytest.approx(6 + half, abs=1e-4))
    # One task without spread adds none, and leaves the degrees of freedom of the other.
    low, high = mean_interval([0.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0])
    assert (high - low) / 2 == pytest.approx(4.30265 / math.sqrt(3) / 2, rel=1e-5)
    assert mean_interval([1.0, 2.0]) is None
    assert mean_interval([1.0, 2.0, 3.0], [1.0, 2.0]) is None
    assert mean_interval([0.1, 0.1, 0.1]) is None
    assert mean_interval([0.1, 0.1, 0.1], [0.7, 0.7, 0.7]) is None


@pytest.mark.parametrize("num", [3, 5, 8])
def test_mean_intervals_cover(num):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(2000, num))
    assert 0.94 <= coverage([mean_interval(x) for x in normal], 0.0)[0] <= 0.96
    skewed = np.exp(0.3 * normal)  # skewness 0.95
    assert 0.93 <= coverage([mean_interval(x) for x in skewed], math.exp(0.045))[0] <= 0.96
    # Means over three tasks, of equal and of very different spread; of three runs each, 97 and 94 %.
    for scales in ((1.0, 1.0, 1.0), (1.0, 3.0, 9.0)):
        tasks = rng.normal(size=(800, 3, num)) * np.array(scales)[:, None]
        assert 0.93 <= coverage([mean_interval(*x) for x in tasks], 0.0)[0] <= 0.98


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


def test_an_improvement_interval_excludes_a_half_where_the_rank_test_rejects():
    def ours_from(wins, num):
        """Scores of which as many pairs with 0, 1, 2, ... are won, no ties."""
        scores = []
        for _ in range(num):
            scores.append(min(wins, num) - 0.5)
            wins -= min(wins, num)
        return scores

    for num, needed in ((3, 10), (4, 16), (5, 23), (6, 31), (8, 51)):  # tables of U, two-sided 5 %
        for wins in (needed - 1, needed):
            if wins > num * num:
                continue
            ours, theirs = [ours_from(wins, num)], [list(range(num))]
            assert probability_of_improvement(ours, theirs) == wins / num**2
            low, high = improvement_interval(ours, theirs)
            assert (low > 0.5) == (wins >= needed)
            assert improvement_interval(theirs, ours) == (pytest.approx(1 - high), pytest.approx(1 - low))
    # Two tasks of three runs, all won: one of 20 × 20 orders. One task: one of 20, at either end.
    all_won = [[7.0, 8.0, 9.0]] * 2, [[1.0, 2.0, 3.0]] * 2
    assert improvement_interval(*all_won).low > 0.5
    assert improvement_interval([[7.0, 8.0, 9.0]], [[1.0, 2.0, 3.0]]).low == pytest.approx(0.41276, abs=1e-4)


def test_an_improvement_interval_inverts_the_distribution_of_ranks():
    # Three of ours against four of theirs, all won; by hand: from the top ω3/(ω3 + 4) ω2/(ω2 + 4) ω/(ω + 4), from the
    # bottom the same with the numbers swapped; their mean is 0.025 at the lower end.
    low, high = improvement_interval([[5.0, 6.0, 7.0]], [[1.0, 2.0, 3.0, 4.0]])
    odds = low / (1 - low)
    top = math.prod(odds * i / (odds * i + 4) for i in (1, 2, 3))
    bottom = math.prod(odds * j / (odds * j + 3) for j in (1, 2, 3, 4))
    assert (top + bottom) / 2 == pytest.approx(0.025, abs=1e-6)
    assert high == 1.0
    # A tie counts half and is rounded to the safe side: between the intervals of none and one more win.
    (fewer, _), (tied, upper), (_, more) = (
        improvement_interval([[0.5, x, 2.5]], [[0.0, 1.0, 2.0]]) for x in (0.9, 1.0, 1.1)
    )
    assert (tied, upper) == (fewer, more)
    # Tasks of different numbers of runs.
    low, high = improvement_interval([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0, 4.5]], [[2.5, 0.5, 0.1], [3.0, 2.0, 4.2]])
    assert (
        0
        < low
        < probability_of_improvement([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0, 4.5]], [[2.5, 0.5, 0.1], [3.0, 2.0, 4.2]])
    )
    assert high < 1
    assert improvement_interval([[1.0, 2.0]], [[1.0, 2.0, 3.0]]) is None
    with pytest.raises(ValueError, match="a task has no runs"):
        improvement_interval([[]], [[1.0]])
    with pytest.raises(ValueError, match="must be finite"):
        improvement_interval([[1.0, 2.0, math.nan]], [[1.0, 2.0, 3.0]])


@pytest.mark.parametrize("chance", [0.5, 0.7, 0.9])
@pytest.mark.parametrize(("num", "tasks"), [(3, 1), (5, 1), (3, 4)])
def test_improvement_intervals_cover(num, tasks, chance):
    # Normal scores; wins are whole numbers, 0 to 9 of three runs against three, so coverage cannot be 93 to 97 %.
    rng = np.random.default_rng(0)
    ours = rng.normal(math.sqrt(2) * NormalDist().inv_cdf(chance), 1.0, (4000, tasks, num))
    theirs = rng.normal(size=(4000, tasks, num))
    wins = (ours[..., :, None] > theirs[..., None, :]).sum((1, 2, 3))
    covered = 0
    for number in np.unique(wins):
        (first, *_), times = np.flatnonzero(wins == number), int((wins == number).sum())
        low, high = improvement_interval(list(ours[first]), list(theirs[first]))
        assert low < number / (tasks * num * num) < high or number in (0, tasks * num * num)
        covered += times * (low <= chance <= high)
    assert covered / 4000 >= 0.93
    assert covered / 4000 <= 0.995 or (num, tasks) == (3, 1)
