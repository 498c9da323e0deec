"""Statistics of sampled answers and of runs: unbiased pass@k, voting, intervals, robust means. Numpy only."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Numbers = float | int | np.number | Sequence[float | int | np.number] | np.ndarray

MIN_VALUES = 3


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
        raise ValueError(f"k must be in [1, num_samples], got {k.tolist()} with {n.tolist()}; draw more or lower k")
    missed = np.ones(n.shape)
    for j in range(int(k.max(initial=0))):
        missed *= np.where(j < k, np.maximum(n - c - j, 0) / np.maximum(n - j, 1), 1.0)
    chance = 1.0 - missed
    return float(chance) if chance.ndim == 0 else chance


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """Choose the most frequent answer.

    ``argmax_a #{i : answer_i = a}``

    Args:
        answers: the answers to one prompt, normalised; ``None`` for a response without an answer, which is no vote.

    Returns:
        The winner, of equals the first; ``None`` without a vote.

    Self-consistency (arXiv:2203.11171).

    >>> majority_vote(["7", "8", "8", None, "7", "8"])
    '8'
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__, default=None)


def bootstrap_interval(values: Numbers, confidence: float = 0.95, num: int = 2000, seed: int = 0) -> Interval | None:
    """Bound the mean over prompts by the percentile bootstrap.

    Draw as many prompts as there are, with replacement, ``num`` times; the interval holds the middle ``confidence`` of
    the means.

    Resample prompts, never the samples behind a pass@k: that would bias it. With few prompts and a rate near 0 or 1 the
    interval is too narrow: with 20 prompts and a rate of 0.02, 0.05, 0.95 or 0.98 it covers 31 to 63 %, not 95 %.

    Args:
        values: [p] one number a prompt.
        confidence: share of the means inside, in (0, 1).
        num: resamples.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        The interval in the unit of the values, or ``None`` for fewer than 3 values, from which no spread can be read.

    Raises:
        ValueError: values that are not one-dimensional or not finite; confidence outside (0, 1); num < 1.

    Efron's percentile interval.

    >>> bootstrap_interval([0.5, 0.5, 0.5])
    Interval(low=0.5, high=0.5)
    >>> bootstrap_interval([0.0, 1.0]) is None
    True
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"values must be one-dimensional, got shape {values.shape}; give one number a prompt")
    if not np.isfinite(values).all():
        raise ValueError(f"values must be finite, got {int((~np.isfinite(values)).sum())} that are not; drop them")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}; 0.95 is common")
    if num < 1:
        raise ValueError(f"num must be >= 1, got {num}; 2000 is the default")
    if values.size < MIN_VALUES:
        return None
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(values.size, size=values.size)].mean() for _ in range(num)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def rms_relative_error(values: Numbers, targets: Numbers) -> float:
    """Measure how far a controlled quantity stays from its target.

    ``√ mean(((value − target) / target)²)``

    Args:
        values: readings, of any shape.
        targets: their targets, not 0, in the same unit; broadcast against the readings.

    Returns:
        A dimensionless share: 0.1 is ten per cent off.

    Raises:
        ValueError: no reading; a target of 0.

    >>> rms_relative_error([1.3, 0.6], 1.0)  # √((0.09 + 0.16) / 2)
    0.3535533905932738
    """
    values, targets = np.broadcast_arrays(np.asarray(values, np.float64), np.asarray(targets, np.float64))
    if values.size == 0:
        raise ValueError("values must hold at least one reading, got none; record more steps")
    if (targets == 0).any():
        raise ValueError("targets must not be 0, got a 0; a relative error needs a scale")
    return float(np.sqrt(np.mean(((values - targets) / targets) ** 2)))


def interquartile_mean(values: Numbers) -> float:
    """Average the middle half: a mean that one lucky or broken run does not move.

    The ``⌊n/4⌋`` lowest and as many highest values are left out: of five, one at each end; of three, none.

    Args:
        values: [n] one number a run.

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
    """The chance that a run of one method beats a run of another on the same task, averaged over tasks.

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


def stratified_interval(
    statistic: Callable[..., float],
    *groups: Sequence[Numbers],
    confidence: float = 0.95,
    num: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Bound a statistic of runs by the percentile bootstrap, seeds resampled within each task.

    Args:
        statistic: of one list a group, each by task, to a number.
        *groups: by task, [n] scores; each is resampled on its own.
        confidence: share of the resampled statistics inside, in (0, 1).
        num: resamples.
        seed: of the resampling.

    Returns:
        The interval, or ``None`` if a task of a group has fewer than 3 runs: no spread can be read from those.

    Agarwal et al. (arXiv:2108.13264), stratified bootstrap.

    >>> mean = lambda tasks: float(np.mean([np.mean(task) for task in tasks]))
    >>> stratified_interval(mean, [[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    Interval(low=2.0, high=2.0)
    """
    arrays = [[np.asarray(task, np.float64) for task in group] for group in groups]
    if any(task.size < MIN_VALUES for group in arrays for task in group):
        return None
    rng = np.random.default_rng(seed)
    resampled = [
        statistic(*([task[rng.integers(task.size, size=task.size)] for task in group] for group in arrays))
        for _ in range(num)
    ]
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
