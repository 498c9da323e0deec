"""The text that an evaluation prints: a line of progress, models side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..runs.frontier import best_temperature, by_temperature, frontier, points
from ..runs.statistics import Interval, paired_interval, proportion_interval
from ..runs.summary import NOT_KNOWN, aligned
from ..runs.text import duration

_FLOORS = (0.99, 0.95, 0.9)  # of the best pass@1


class Progress:
    """Prints a line every few seconds while completions are sampled: how many, how fast, and the time left.

    Args:
        title: start of the line.
        say: called with the line.
        every: seconds between two lines.

    Attributes:
        speed: tokens per second.
    """

    def __init__(self, title: str, say: Callable[[str], None], every: float = 20.0):
        self.title, self.say, self.every = title, say, every
        self.started = self.last = time.monotonic()
        self.speed = 0.0

    def __call__(self, done: int, num: int, tokens: int) -> None:
        now = time.monotonic()
        seconds = max(now - self.started, 1e-9)
        self.speed = round(tokens / seconds, 1)
        if now - self.last < self.every and (done < num or self.last == self.started):
            return
        self.last = now
        left = math.ceil(seconds / done * (num - done))
        self.say(f"{self.title}: {done}/{num} completions, {tokens / seconds:.0f} tokens/s, eta {duration(left)}")


def best_shares(row: Mapping[str, Any]) -> np.ndarray:
    """[p] shares of right samples at the policy's own best temperature, chosen on the half that a prompt is not in.

    Args:
        row: an evaluation with its counts by prompt.

    Example:
        >>> row = {"temperature": 1.0, "num_samples": [2] * 4, "num_correct": [1, 2, 1, 2]}
        >>> best_shares({**row, "at": {"0.5": {"num_correct": [2, 0, 2, 0]}}}).tolist()
        [0.5, 0.0, 0.5, 0.0]
    """
    of_even, of_odd = best_temperature(row).temperatures
    num, counts = np.array(row["num_samples"]), by_temperature(row)
    even, odd = (np.array(counts[t]["num_correct"]) / num for t in (of_odd, of_even))
    return np.where(np.arange(len(num)) % 2 == 0, even, odd)


def floors(row: Mapping[str, Any]) -> list[float]:
    """The accuracies of a frontier unless others are named: 99, 95 and 90 % of a model's best pass@1."""
    return [share * best_temperature(row).accuracy for share in _FLOORS]


def at_best(row: Mapping[str, Any], at_least: Sequence[float]) -> dict[str, Any]:
    """pass@1 at the policy's own best temperature, and its frontier, for a JSON row.

    Args:
        row: of :func:`isentropic.experiments.evaluate.evaluate_models`.
        at_least: accuracies.

    Returns:
        ``best_pass@1``, ``best_temperatures`` and, by accuracy, ``frontier``; None in it is out of reach.
    """
    best, reached = best_temperature(row), [frontier(row, floor) for floor in at_least]
    return {
        "best_pass@1": best.accuracy,
        "best_temperatures": list(best.temperatures),
        "frontier": [
            {"at_least": p, "distinct": f and f.distinct, f"pass@{row['k']}": f and f.search}
            for p, f in zip(at_least, reached, strict=True)
        ],
    }


def evaluation_table(rows: Sequence[dict[str, Any]], at_least: Sequence[float] = ()) -> str:
    """Each model by temperature, then their frontiers, then differences from the first.

    Args:
        rows: of :func:`isentropic.experiments.evaluate.evaluate_models`.
        at_least: accuracies of the frontier; by default :func:`floors` of the first model.
    """
    first = rows[0]
    text = [f"task {first['task']}, {len(first['prompts'])} prompts, {first['k']} samples each; (95 % intervals)"]
    for row in rows:
        text += ["", *_by_temperature(row)]
    at_least = at_least or floors(first)
    text += ["", f"most distinct right answers of {first['k']}, and best pass@{first['k']}, at any temperature with"]
    cells = [["model", *(f"pass@1 >= {floor:.3f}" for floor in at_least)]]
    for row in rows:
        reached = [frontier(row, floor) for floor in at_least]
        cells.append([_model_name(row), *(f"{f.distinct:.2f}, {f.search:.3f}" if f else NOT_KNOWN for f in reached)])
    text += aligned(cells)
    if len(rows) > 1:
        text += ["", f"difference from {_model_name(first)} on the same prompts"]
        cells = [["model", "greedy", "best pass@1"]]
        cells += [[_model_name(row), *(_gap(*pair) for pair in _pairs(row, first))] for row in rows[1:]]
        text += aligned(cells)
    return "\n".join(text)


def _by_temperature(row: dict[str, Any]) -> list[str]:
    """The table of a model."""
    k, counts = row["k"], by_temperature(row)
    shares = [np.array(c["num_correct"]) / np.array(row["num_samples"]) for c in counts.values()]
    intervals = [proportion_interval(values) for values in [*shares, np.array(row["greedy_correct"])]]
    cells = [["temperature", "pass@1", f"pass@{k}", "distinct", "majority"]]
    for point, interval in zip(points(row), intervals, strict=True):
        figures = [f"{point.search:.3f}", f"{point.distinct:.2f}"]
        figures.append(NOT_KNOWN if point.majority is None else f"{point.majority:.3f}")
        # One answer a prompt: no search, no variety, no vote.
        figures = figures if point.temperature else [NOT_KNOWN] * 3
        name = f"{point.temperature:g}" if point.temperature else "greedy"
        cells.append([name, with_interval(point.accuracy, interval), *figures])
    best, by_prompt = best_temperature(row), best_shares(row)
    cells.append(["best", with_interval(best.accuracy, proportion_interval(by_prompt)), "", "", ""])
    *lines, last = aligned(cells)
    low, high = sorted(best.temperatures)
    chosen = f"{low:g}" if low == high else f"{low:g} and {high:g}"
    about = f"{row['dtype']}, {row['truncated_frac']:.1%} truncated at temperature {row['temperature']:g}"
    about += f", {row['tokens_per_second']:.0f} tokens per second"
    note = f"  at {chosen}: chosen on one half of the prompts, scored on the other"
    return [f"{_model_name(row)}  ({about})", *lines, last + note]


def _pairs(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two models by prompt: greedy, and at the best temperature of each."""
    greedy = np.array(ours["greedy_correct"], float), np.array(theirs["greedy_correct"], float)
    return [greedy, (best_shares(ours), best_shares(theirs))]


def _gap(ours: np.ndarray, theirs: np.ndarray) -> str:
    return with_interval(float((ours - theirs).mean()), paired_interval(ours, theirs), "+")


def with_interval(value: float, interval: Interval | None, sign: str = "", digits: int = 3) -> str:
    """A figure and its interval; ``sign`` is "+" for a difference.

    Example:
        >>> with_interval(0.5, Interval(0.25, 0.75)), with_interval(0.5, None, "+", 1)
        ('0.500 (0.250..0.750)', '+0.5')
    """
    text, *ends = (f"{x:{sign}.{digits}f}" for x in (value, *(interval or ())))
    return f"{text} ({ends[0]}..{ends[1]})" if ends else text


def _model_name(row: dict[str, Any]) -> str:
    return row["model"] if row["step"] is None else f"{row['model']} step {row['step']}"
