"""Statistics of sampled answers and of runs: unbiased pass@k, voting, intervals, robust means. Numpy only.

Which interval: over prompts, :func:`proportion_interval` and :func:`paired_interval`; over runs, :func:`mean_interval`
and :func:`improvement_interval`. What says 95 % holds the truth in 93 % or more of the experiments of
``tests/runs/test_statistics.py``.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

Numbers = float | int | np.number | Sequence[float | int | np.number] | np.ndarray

# Two values give an interval 13 standard errors to each side, and only if they are normal.
MIN_VALUES = 3
# Squared deviations that are added to those of n prompts, so that prompts which agree by luck do not read as certain:
# of chances, those of one more prompt never solved and one always solved; of differences, a fifth of that.
_UNSEEN, _UNSEEN_PAIRED = 0.5, 0.1
# Nodes and weights on [−1, 1]: the angle of a t value never leaves [0, π/2], on which these are exact to 12 digits.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


class Interval(NamedTuple):
    """The ends of a confidence interval, in the unit of the values."""

    low: float
    high: float


def pass_at_k(num_samples: Numbers, num_correct: Numbers, k: Numbers) -> float | np.ndarray:
    """Estimate without bias the chance that at least one of k samples is right.

    ``1 − C(n − c, k) / C(n, k) = 1 − Π_{j<k} (n − c − j) / (n − j)``

    This draws k of the n samples without replacement; drawing with replacement would read low: 0.656 instead of 1 for
    8 of 8 samples of which one is right. The product neither overflows nor cancels.

    Args:
        num_samples: n samples of each prompt; a number or an array, as the other two, which broadcast.
        num_correct: c of them right.
        k: attempts.

    Returns:
        Chances in [0, 1]: a float if all three are numbers, else an array. Average over prompts yourself.

    Raises:
        ValueError: not integers; k outside [1, n]; c outside [0, n].

    Chen et al. (arXiv:2107.03374).

    >>> round(pass_at_k(4, 2, 2), 4)  # 1 − 1/6
    0.8333
    >>> pass_at_k(8, np.array([0, 1, 8]), 8)
    array([0., 1., 1.])
    """
    n, c, k = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_correct), np.asarray(k))
    if not all(np.issubdtype(x.dtype, np.integer) for x in (n, c, k)):
        raise ValueError(
            f"counts and k must be integers, got {n.dtype}, {c.dtype}, {k.dtype}; convert with astype(int)"
        )
    if ((c < 0) | (c > n)).any():
        raise ValueError(f"num_correct must be in [0, num_samples], got {c.tolist()} of {n.tolist()}; swap them?")
    if ((k < 1) | (k > n)).any():
        raise ValueError(f"k must be in [1, num_samples], got {k.tolist()} with {n.tolist()}; draw more, or lower k")
    missed = np.ones(n.shape)
    for j in range(int(k.max(initial=0))):
        missed *= np.where(j < k, np.maximum(n - c - j, 0) / np.maximum(n - j, 1), 1.0)
    chance = 1.0 - missed
    return float(chance) if chance.ndim == 0 else chance


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """Choose the most frequent answer.

    ``argmax_a #{i : answer_i = a}``

    Args:
        answers: the answers to one prompt, normalised; ``None`` for a response without an answer, which does not vote.

    Returns:
        The winner, of equals the first; ``None`` without a vote.

    Self-consistency (arXiv:2203.11171).

    >>> majority_vote(["7", "8", "8", None, "7", "8"])
    '8'
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__, default=None)


def proportion_interval(values: Numbers, confidence: float = 0.95) -> Interval | None:
    """Bound the mean over prompts of numbers in [0, 1]: right or wrong, pass@k, shares of right samples.

    ``{μ : (m − μ)² <= t² φ μ (1 − μ) / n},  φ = (Σ (x − m)² + ½) / (n m (1 − m) + ½)``

    Wilson's score interval for n/φ prompts. The design effect φ is 1 for values of 0 and 1, and smaller for values that
    spread less. The ½ is the spread of one more prompt never solved and one always solved: without it, twenty pass@8
    near 1 that happen to lack a hard prompt would bound the mean too closely.

    The interval stays inside [0, 1] and has a width even if all values are equal. It covers least, 90 %, where a single
    miss among all prompts is itself unlikely.

    Args:
        values: [p] one number in [0, 1] a prompt.
        confidence: how often such an interval holds the mean over all prompts of the kind, in (0, 1).

    Returns:
        The interval, or ``None`` for fewer than 3 values.

    Raises:
        ValueError: values that are not one-dimensional or not in [0, 1]; confidence outside (0, 1).

    Wilson (1927); an effective number of prompts with a t quantile as Korn and Graubard (1998); the ½ is ours.

    >>> low, high = proportion_interval([0.0] * 20)
    >>> round(low, 3), round(high, 3)
    (0.0, 0.18)
    """
    values = _checked(values, confidence, shares=True)
    if values.size < MIN_VALUES:
        return None
    n, mean = values.size, float(values.mean())
    effect = (float(((values - mean) ** 2).sum()) + _UNSEEN) / (n * mean * (1 - mean) + _UNSEEN)
    shrink = _t_quantile(confidence, float(n - 1)) ** 2 * effect / n
    centre = (mean + shrink / 2) / (1 + shrink)
    half = math.sqrt(shrink * mean * (1 - mean) + shrink**2 / 4) / (1 + shrink)
    # The minima and maxima undo rounding where all values are 0 or 1.
    return Interval(max(min(centre - half, mean), 0.0), min(max(centre + half, mean), 1.0))


def paired_interval(ours: Numbers, theirs: Numbers, confidence: float = 0.95) -> Interval | None:
    """Bound the mean difference of two policies on the same prompts, of numbers in [0, 1] each.

    ``{δ : (d − δ)² <= t² φ (2q + δ (1 − δ)) / n}``, d the mean of ``ours − theirs``

    Tango's score interval, q the likeliest share of prompts that only theirs solves if the true difference is δ. What
    ours and theirs gain over one another replaces the counts of discordant prompts, and φ as in
    :func:`proportion_interval` corrects for differences that spread less than those of 0 and ±1. The interval has a
    width even if the policies agree on every prompt: 0 of 20 differ allows up to 0.18 to each side.

    It holds for these two policies. With several seeds of each, give the mean difference of every seed to
    :func:`mean_interval`: it bounds the difference of the methods.

    Args:
        ours: [p] one number in [0, 1] a prompt.
        theirs: [p] the other policy's, of the same prompts in the same order.
        confidence: how often such an interval holds the mean difference over all prompts of the kind, in (0, 1).

    Returns:
        The interval, inside [−1, 1] and above 0 where ours is better, or ``None`` for fewer than 3 prompts.

    Raises:
        ValueError: values that are not one-dimensional, not in [0, 1] or not of the same prompts; confidence outside
            (0, 1).

    Tango (1998); φ is ours.

    >>> low, high = paired_interval([1.0] * 20, [1.0] * 20)
    >>> round(low, 3), round(high, 3)
    (-0.18, 0.18)
    """
    ours, theirs = (_checked(values, confidence, shares=True) for values in (ours, theirs))
    if ours.size != theirs.size:
        raise ValueError(f"both need values of the same prompts, got {ours.size} and {theirs.size}; pair them")
    if ours.size < MIN_VALUES:
        return None
    gaps = ours - theirs
    n, mean = gaps.size, float(gaps.mean())
    spread = float(((gaps - mean) ** 2).sum())
    effect = (spread + _UNSEEN_PAIRED) / (float(np.abs(gaps).sum()) - n * mean**2 + _UNSEEN_PAIRED)
    gained, lost = (float(np.maximum(sign * gaps, 0).sum()) / effect for sign in (1, -1))
    t = _t_quantile(confidence, float(n - 1))
    return Interval(-_tango_upper(lost, gained, n / effect, t), _tango_upper(gained, lost, n / effect, t))


def _tango_upper(gained: float, lost: float, num: float, t: float) -> float:
    """The largest difference of two paired shares that a score test does not reject, by bisection.

    Args:
        gained: prompts that ours solves and theirs does not; may be fractional, as the other two.
        lost: the reverse.
        num: prompts.
        t: quantile of the test.
    """
    mean = (gained - lost) / num
    low, high = mean, 1.0
    for _ in range(50):
        gap = (low + high) / 2
        linear = (2 * num - gained + lost) * gap - gained - lost
        only_theirs = (math.sqrt(max(linear**2 + 8 * num * lost * gap * (1 - gap), 0.0)) - linear) / (4 * num)
        rejected = num * (gap - mean) ** 2 > t**2 * (2 * only_theirs + gap * (1 - gap))
        low, high = (low, gap) if rejected else (gap, high)
    return high


def mean_interval(
    *tasks: Numbers, confidence: float = 0.95, bounds: tuple[float | int, float | int] = (-math.inf, math.inf)
) -> Interval | None:
    """Bound a mean over runs by Student's t; of several tasks, the mean over tasks of their means over runs.

    ``mean_k m_k ± t_ν √(Σ_k v_k) / K,  v_k = s_k² / n_k,  ν = (Σ v_k)² / Σ (v_k² / (n_k − 1))``

    It covers as it says where runs scatter like a normal variable, and 93 % where they are mildly skewed. Paired runs
    are better compared by the interval of their differences than by two intervals.

    Args:
        *tasks: by task, [n] one number per run; of a single task, one argument.
        confidence: how often such an interval holds the mean over all seeds, in (0, 1).
        bounds: the smallest and the largest mean there can be; the interval is cut to them.

    Returns:
        The interval in the unit of the values; ``None`` if a task has fewer than 3 values, or if the values of every
        task are equal: no spread can be read from those.

    Raises:
        ValueError: no task; values that are not one-dimensional or not finite; confidence outside (0, 1).

    Student (1908), Satterthwaite (1946).

    >>> mean_interval([1.0, 2.0, 3.0])  # 2 ± 4.303 / √3
    Interval(low=-0.4841, high=4.4841)
    """
    if not tasks:
        raise ValueError("tasks must hold the values of at least one task, got none; give one list per task")
    arrays = [_checked(values, confidence) for values in tasks]
    if min(values.size for values in arrays) < MIN_VALUES:
        return None
    errors = [float(values.var(ddof=1)) / values.size for values in arrays]
    # Equal values leave a rounding error of their mean.
    if all(np.ptp(values) == 0 for values in arrays):
        return None
    freedom = sum(errors) ** 2 / sum(e**2 / (values.size - 1) for e, values in zip(errors, arrays, strict=True))
    half = _t_quantile(confidence, freedom) * math.sqrt(sum(errors)) / len(arrays)
    mean = sum(float(values.mean()) for values in arrays) / len(arrays)
    # A mean outside of the bounds by rounding stays inside the interval.
    return Interval(max(mean - half, min(mean, float(bounds[0]))), min(mean + half, max(mean, float(bounds[1]))))


def _checked(values: Numbers, confidence: float, shares: bool = False) -> np.ndarray:
    """Values as a vector of finite floats, in [0, 1] if they are shares; else ValueError."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}; 0.95 is common")
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"values must be one-dimensional, got shape {values.shape}; give one number per prompt or run")
    if not np.isfinite(values).all():
        raise ValueError(f"values must be finite, got {int((~np.isfinite(values)).sum())} that are not; drop them")
    if shares and ((values < 0) | (values > 1)).any():
        got = f"{values.min():g}..{values.max():g}"
        raise ValueError(f"values must be in [0, 1], got {got}; divide counts by their largest value")
    return values


@lru_cache(maxsize=1024)
def _t_quantile(confidence: float, freedom: float) -> float:
    """The t that holds the middle ``confidence`` of Student's distribution with ``freedom`` > 0 degrees of freedom.

    With ``t = √ν tan θ`` the density of θ is proportional to ``cos^{ν−1} θ``; its integral from 0 is concave, so
    Newton's steps from 0 rise to the root.
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    angle, step = 0.0, 1.0
    while step > 1e-14:
        cosines = np.cos(angle / 2 * (_NODES + 1)) ** (freedom - 1)
        area = scale * angle / 2 * float(_WEIGHTS @ cosines)
        step = (confidence / 2 - area) / (scale * math.cos(angle) ** (freedom - 1))
        angle += step
    return math.sqrt(freedom) * math.tan(angle)


def interquartile_mean(values: Numbers) -> float:
    """Average the middle half: a mean that one lucky or broken run does not move.

    The ``⌊n/4⌋`` lowest and as many highest values are left out: of five, one at each end; of three, none.

    Args:
        values: [n] one number per run.

    Returns:
        The mean of the rest, in the unit of the values.

    Raises:
        ValueError: no value.

    Agarwal et al. (arXiv:2108.13264).

    >>> interquartile_mean([0.0, 1.0, 2.0, 3.0, 100.0])
    2.0
    """
    ordered = np.sort(np.asarray(values, np.float64).ravel())
    if ordered.size == 0:
        raise ValueError("values must hold at least one number, got none; run more seeds")
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def probability_of_improvement(runs: Sequence[Numbers], baseline: Sequence[Numbers]) -> float:
    """The probability that a run of one method beats a run of another on the same task, averaged over tasks.

    ``mean_task mean_{i,j} [x_i > y_j] + ½[x_i = y_j]``

    Args:
        runs: by task, [n] scores, larger better.
        baseline: by task, in the same order, [m] scores of the other.

    Returns:
        A number in [0, 1]; ½ is no difference.

    Raises:
        ValueError: no task, another number of tasks, or a task without runs.

    Agarwal et al. (arXiv:2108.13264), after Mann and Whitney.

    >>> probability_of_improvement([[3.0, 1.0]], [[2.0, 1.0]])  # wins 2 of 4, ties 1
    0.625
    """
    if not len(runs) or len(runs) != len(baseline):
        raise ValueError(f"both need scores of the same tasks, got {len(runs)} and {len(baseline)} tasks")
    chances = []
    for ours, theirs in zip(runs, baseline, strict=True):
        x, y = np.asarray(ours, np.float64)[:, None], np.asarray(theirs, np.float64)[None, :]
        if x.size == 0 or y.size == 0:
            raise ValueError("a task has no runs; leave it out")
        chances.append(float(((x > y) + 0.5 * (x == y)).mean()))
    return sum(chances) / len(chances)


def improvement_interval(
    runs: Sequence[Numbers], baseline: Sequence[Numbers], confidence: float = 0.95
) -> Interval | None:
    """Bound the probability of improvement by inverting the exact rank test.

    The interval holds every θ under which at least as many wins, and at most as many, are both likelier than
    ``(1 − confidence) / 2``. Wins are counted under Lehmann's alternatives: from the top, the next rank is ours with
    probability ``ω i / (ω i + j)``, with i runs of ours and j of theirs left and ``ω = θ / (1 − θ)``; or the same of
    theirs from the bottom; the mean of both.

    θ = ½ makes every order of the runs equally likely, so the interval leaves out ½ exactly where the two-sided
    Mann-Whitney test rejects. Three runs against three never do at 95 %; five against five do from 23 wins of 25. Over
    tasks wins are added as if θ were the same on each, which widens the interval where it is not.

    Args:
        runs: by task, [n] scores, larger better.
        baseline: by task, in the same order, [m] scores of the other.
        confidence: how often such an interval holds the probability, in (0, 1).

    Returns:
        The interval, inside [0, 1], or ``None`` if a task has fewer than 3 runs of either.

    Raises:
        ValueError: as :func:`probability_of_improvement`; scores that are not one-dimensional or not finite;
            confidence outside (0, 1).

    Clopper and Pearson (1934), on the ranks of Lehmann (1953); the combination is ours.

    >>> low, high = improvement_interval([[7.0, 8.0, 9.0]], [[1.0, 2.0, 3.0]])
    >>> round(low, 3), high  # nine wins of nine do not exclude ½
    (0.413, 1.0)
    """
    chance = probability_of_improvement(runs, baseline)
    ours, theirs = ([_checked(task, confidence) for task in group] for group in (runs, baseline))
    sizes = [(x.size, y.size) for x, y in zip(ours, theirs, strict=True)]
    if min(map(min, sizes)) < MIN_VALUES:
        return None
    tail = (1 - confidence) / 2
    return Interval(_least_chance(chance, sizes, tail), 1 - _least_chance(1 - chance, sizes, tail))


def _least_chance(chance: float, sizes: Sequence[tuple[int, int]], tail: float) -> float:
    """The smallest θ under which wins as many as observed are likelier than ``tail``, by bisection."""
    # Wins of a task count in units of which all tasks have the same number; a half win is rounded to the safe side.
    unit = math.lcm(*(ours * theirs for ours, theirs in sizes))
    wins = math.floor(chance * unit * len(sizes) + 1e-6)
    low, high = 0.0, 1.0 if wins else 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        by_size = {pair: _wins(middle, *pair) for pair in set(sizes)}
        total = np.ones(1)
        for ours, theirs in sizes:
            fewer, total = total, np.zeros(total.size + unit)
            for won, share in enumerate(by_size[ours, theirs]):
                start = won * unit // (ours * theirs)
                total[start : start + fewer.size] += share * fewer
        low, high = (low, middle) if total[wins:].sum() > tail else (middle, high)
    return low


def _wins(chance: float, ours: int, theirs: int) -> np.ndarray:
    """[ours · theirs + 1] the distribution of the number of won pairs, under Lehmann's alternatives."""
    odds = chance / (1 - chance)
    return (_race(odds, ours, theirs) + _race(odds, theirs, ours)) / 2


def _race(odds: float, first: int, second: int) -> np.ndarray:
    """[first · second + 1] the distribution of pairs (i, j) with i of the first drawn before j of the second."""
    row = [np.ones(1)] * (second + 1)  # by what is left of the second, with none left of the first
    for i in range(1, first + 1):
        above, row = row, [np.ones(1)]
        for j in range(1, second + 1):
            share = odds * i / (odds * i + j)
            before = np.zeros(i * j + 1)
            before[j:] += share * above[j]
            before[: i * (j - 1) + 1] += (1 - share) * row[j - 1]
            row.append(before)
    return row[second]
