"""What one policy can do at any sampling temperature: accuracy against variety, and the temperature that suits it best.

A user chooses the temperature, and can lower it for a policy with high entropy or raise it for a collapsed one,
so two policies are compared by what each does best, not at the temperature of training. Numpy only.

A row is one of evaluations.jsonl: counts by prompt at the temperature of training, under ``at`` the same for every
other temperature, and ``greedy_correct``. Greedy answers are the temperature 0, at which one answer is all there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from .statistics import pass_at_k

Row = Mapping[str, Any]


class Point(NamedTuple):
    """A policy at one temperature, means over prompts.

    Attributes:
        temperature: of sampling; 0 is greedy.
        accuracy: pass@1, a share.
        search: pass@k, k the number of samples, a share.
        distinct: distinct right answers among the k samples.
        majority: share of prompts whose most frequent answer is right; None for episodes, which have no vote.
    """

    temperature: float
    accuracy: float
    search: float
    distinct: float
    majority: float | None = None


def by_temperature(row: Row) -> dict[float, Row]:
    """The counts of a row by sampling temperature, from high to low."""
    sampled = {float(row.get("temperature", 1.0)): row}
    sampled |= {float(name): counts for name, counts in (row.get("at") or {}).items()}
    return dict(sorted(sampled.items(), reverse=True))


def points(row: Row) -> list[Point]:
    """The policy at every temperature, from high to low; greedy last, if the row has it.

    Example:
        >>> row = {"temperature": 1.0, "k": 4, "pass@1": 0.5, "pass@4": 1.0, "distinct": 2.0, "greedy": 0.75}
        >>> [point.accuracy for point in points(row)]
        [0.5, 0.75]
    """
    name = f"pass@{row['k']}"
    sampled = [Point(t, c["pass@1"], c[name], c["distinct"], c.get("majority")) for t, c in by_temperature(row).items()]
    greedy = row.get("greedy")
    return sampled if greedy is None else [*sampled, Point(0.0, greedy, greedy, greedy, greedy)]


class Frontier(NamedTuple):
    """The best that a policy does at an accuracy no lower than a given one.

    Attributes:
        distinct: distinct right answers among the k samples.
        search: pass@k.
    """

    distinct: float
    search: float


def frontier(row: Row, at_least: float) -> Frontier | None:
    """The most distinct right answers, and the best pass@k, at a pass@1 of at least ``at_least``.

    Between two neighbouring temperatures a user may draw one of the two for each prompt, at random, which is linear in
    all three figures: so the frontier is exact at any accuracy, and not only at those that were measured.

    Args:
        row: an evaluation.
        at_least: the pass@1 asked for, a share.

    Returns:
        None if the policy has no such accuracy at any temperature.

    Example:
        >>> hot = {"pass@1": 0.5, "pass@4": 1.0, "distinct": 3.0}
        >>> row = {"temperature": 1.0, "k": 4, **hot, "at": {"0.5": {"pass@1": 0.9, "pass@4": 0.9, "distinct": 1.0}}}
        >>> frontier(row, 0.7), frontier(row, 0.95)  # halfway between the two
        (Frontier(distinct=2.0, search=0.95), None)
    """
    path = points(row)
    reached = [Frontier(p.distinct, p.search) for p in path if p.accuracy >= at_least]
    for a, b in pairwise(path):
        if (a.accuracy - at_least) * (b.accuracy - at_least) < 0:
            share = (at_least - b.accuracy) / (a.accuracy - b.accuracy)
            mixed = (share * x + (1 - share) * y for x, y in ((a.distinct, b.distinct), (a.search, b.search)))
            reached.append(Frontier(*mixed))
    if not reached:
        return None
    return Frontier(max(f.distinct for f in reached), max(f.search for f in reached))


class Best(NamedTuple):
    """A policy at its own best temperature.

    Attributes:
        accuracy: pass@1.
        temperatures: chosen on the even prompts, and on the odd ones.
    """

    accuracy: float
    temperatures: tuple[float, float]


def best_temperature(row: Row) -> Best:
    """pass@1 at the temperature that suits a policy best: chosen on one half of the prompts and scored on the other.

    Both halves take both parts, and the mean over all prompts is returned, so that the choice flatters nobody.

    Args:
        row: an evaluation with its counts by prompt.

    Example:
        >>> row = {"temperature": 1.0, "k": 2, "num_samples": [2] * 4, "num_correct": [1, 2, 1, 2]}
        >>> best_temperature({**row, "at": {"0.5": {"num_correct": [2, 0, 2, 0]}}})
        Best(accuracy=0.25, temperatures=(0.5, 1.0))
    """
    shares = {t: np.array(c["num_correct"]) / np.array(row["num_samples"]) for t, c in by_temperature(row).items()}
    num = len(row["num_samples"])
    halves = np.arange(num) % 2 == 0, np.arange(num) % 2 == 1
    total, chosen = 0.0, []
    for mine, other in (halves, halves[::-1]):
        temperature = max(shares, key=lambda t: shares[t][mine].mean() if mine.any() else 0.0)
        chosen.append(temperature)
        total += float(shares[temperature][other].sum())
    return Best(total / num, (chosen[0], chosen[1]))


class BestStep(NamedTuple):
    """The best evaluation of a run, for a user who stops early.

    Attributes:
        step: optimizer steps done.
        greedy, accuracy, distinct, search: on the prompts that had no part in the choice: greedy accuracy, and pass@1,
            distinct right answers and pass@k at the temperature that was chosen with the step.
    """

    step: int
    greedy: float | None
    accuracy: float
    distinct: float
    search: float


def best_step(rows: Sequence[Row]) -> BestStep | None:
    """Choose step and temperature by pass@1 on the even prompts, and score the choice on the odd ones.

    Args:
        rows: evaluations of one task along a run, in order, with their counts by prompt; of equals the first is chosen.

    Returns:
        None without a row, or if there is one prompt alone.
    """
    best, chosen = -1.0, None
    for row in rows:
        num = np.array(row["num_samples"])
        for temperature, counts in by_temperature(row).items():
            accuracy = float((np.array(counts["num_correct"]) / num)[0::2].mean())
            if accuracy > best:
                best, chosen = accuracy, (row, temperature)
    if chosen is None or len(chosen[0]["num_samples"]) < 2:
        return None
    row, temperature = chosen
    counts, num = by_temperature(row)[temperature], np.array(row["num_samples"])[1::2]
    correct = np.array(counts["num_correct"])[1::2]
    greedy = row.get("greedy_correct")
    return BestStep(
        step=int(row["step"]),
        greedy=None if greedy is None else float(np.mean(greedy[1::2])),
        accuracy=float((correct / num).mean()),
        distinct=float(np.mean(counts["num_distinct"][1::2])),
        search=float(np.mean(pass_at_k(num, correct, num))),
    )
