"""The text that a run and an evaluation print: a line of progress, the closing table, models side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..runs.clock import duration
from ..runs.frontier import best_temperature, by_temperature, frontier, points
from ..runs.record import is_number
from ..runs.statistics import Interval, paired_interval, proportion_interval
from ..runs.summary import SETTLED

_MOST_TASKS = 3  # in the closing table; a longer sequence is cut to its first and last tasks
_TASK_WIDTH = 40
_FLOORS = (0.99, 0.95, 0.9)  # of the best pass@1
_NOT_KNOWN = "–"


def step_line(step: int, steps: int, seconds_left: float, row: dict[str, Any]) -> str:
    """The line of an optimizer step.

    Args:
        step, steps: done, and in all.
        seconds_left: of training.
        row: of metrics.jsonl, with ``reward``.

    Example:
        >>> step_line(7, 800, 61.0, {"entropy/mean": 0.91, "entropy/target": 1.0, "knob/value": 0.02, "reward": 0.5})
        'step   7/800  eta 1:01  reward 0.500  entropy 0.910 (target 1.000)  knob 0.02'
    """
    width = len(str(steps))
    columns = [f"step {step:{width}d}/{steps}", f"eta {duration(seconds_left)}"]
    if row.get("reward") is not None:
        columns.append(f"reward {row['reward']:.3f}")
    target = row.get("entropy/target")
    against = f" (target {target:.3f})" if target is not None else ""
    columns.append(f"entropy {row['entropy/mean']:.3f}{against}")
    if row.get("knob/value") is not None:
        columns.append(f"knob {row['knob/value']:.3g}" + (" at its bound" if row.get("knob/saturated") else ""))
    return "  ".join(columns)


class Progress:
    """Prints a line every few seconds while completions are sampled: how many, how fast, and the time left.

    Args:
        title: start of the line.
        say: called with the line.
        every: seconds between two lines.

    Attributes:
        speed: tokens a second.
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


def closing_table(summary: dict[str, Any], out: str) -> str:
    """The table at the end of a run, in less than 20 lines of at most 100 columns, but for long paths.

    Args:
        summary: as summary.json holds it.
        out: the run directory.
    """

    def row(name: str, start: Any = None, target: Any = None, end: Any = None) -> list[str]:
        return [name, *("" if x is None else x if isinstance(x, str) else f"{x:.3f}" for x in (start, target, end))]

    rows = [row(f"{summary['steps']} steps, {summary['seconds']:.0f} seconds", "start", "target", "end")]
    rows.append(
        row("entropy (nats a token)", summary["entropy/start"], summary["entropy/target"], summary["entropy/end"])
    )
    if summary["entropy/rms_error"] is not None:
        rows.append(row(f"RMS entropy error after {SETTLED} steps", end=f"{summary['entropy/rms_error']:.1%}"))
    if summary["knob/saturated"]:
        rows.append(row("steps with the knob at its bound", end=f"{summary['knob/saturated']:.0%}"))
    rows.append(row("reward (training prompts)", summary["reward/start"], None, summary["reward/end"]))
    width = max(len(name) for name, *_ in rows)
    lines = ["", *("  ".join([f"{name:{width}}", *(f"{x:>8}" for x in cells)]).rstrip() for name, *cells in rows)]
    lines += _heldout(summary)
    lines += [f"stopped early: {summary['stopped']}"] if summary.get("stopped") else []
    return "\n".join([*lines, f"run directory: {out}"])


def _heldout(summary: dict[str, Any]) -> list[str]:
    """The evaluations of each task at the start, at the switch from it and at the end."""
    moments = [row for row in _moments(summary) if row[2]]
    if not moments:
        return []
    scored = [scores for *_, scores in moments]
    passes = [key for key in scored[-1] if key.startswith("pass@")]
    # Without its own best temperature, as of a run with counts at one temperature alone, pass@1 is shown as it is.
    single = "best_pass@1" if any("best_pass@1" in row for row in scored) else "pass@1"
    titles = {"greedy": "greedy", single: single.replace("best_pass@1", "best pass@1*")}
    titles |= {key: key for key in passes[-1:]} | {"distinct": "distinct"}
    names = [name for name in titles if any(is_number(row.get(name)) for row in scored)]
    cells = [["held-out", "", "step", *(titles[name] for name in names)]]
    for task, moment, scores in moments:
        figures = [f"{scores[n]:.{2 if n == 'distinct' else 3}f}" if n in scores else _NOT_KNOWN for n in names]
        cells.append([task, moment, str(scores.get("step", "")), *figures])
    more = len(summary.get("before", {})) + 1 - _MOST_TASKS
    note = [f"(tasks between the first and the last two, in summary.json: {more})"] if more > 0 else []
    if single in names and single != "pass@1":
        note.append("* temperature chosen on one half of the prompts, scored on the other; the rest as in training")
    return ["", *aligned(cells, left=2), *note]


def _moments(summary: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Task, moment and scores; the task at its first moment only.

    Of more than three tasks the first and the last two, at the start and at the end.
    """
    before = list(summary.get("before", {}).items())
    tasks: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = []
    for i, (name, scored) in enumerate(before):
        shown = [("start", scored[0]), ("end", scored[-1])] if len(scored) > 1 else [("end", scored[0])]
        # With evaluations in between it is not known which is that at the switch.
        if len(scored) == len(before) + 2 and len(before) < _MOST_TASKS:
            shown.insert(1, ("switch", scored[i + 1]))
        tasks.append((_cut(name), shown))
    last = [(moment, summary.get(moment) or {}) for moment in ("start", "end")]
    tasks.append((_cut(summary.get("task") or "last task") if before else "", last))
    tasks = tasks if len(tasks) <= _MOST_TASKS else [tasks[0], *tasks[-2:]]
    return [
        (name if i == 0 else "", moment, scores)
        for name, shown in tasks
        for i, (moment, scores) in enumerate(row for row in shown if row[1])
    ]


def _cut(name: str) -> str:
    return name if len(name) <= _TASK_WIDTH else name[: _TASK_WIDTH - 1] + "…"


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table whose first columns, ``left`` of them, are aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    return ["  ".join(p(x, w) for p, x, w in zip(pad, row, widths, strict=True)).rstrip() for row in rows]


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
        cells.append([_model_name(row), *(f"{f.distinct:.2f}, {f.search:.3f}" if f else _NOT_KNOWN for f in reached)])
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
        figures.append(_NOT_KNOWN if point.majority is None else f"{point.majority:.3f}")
        # One answer a prompt: no search, no variety, no vote.
        figures = figures if point.temperature else [_NOT_KNOWN] * 3
        name = f"{point.temperature:g}" if point.temperature else "greedy"
        cells.append([name, with_interval(point.accuracy, interval), *figures])
    best, by_prompt = best_temperature(row), best_shares(row)
    cells.append(["best", with_interval(best.accuracy, proportion_interval(by_prompt)), "", "", ""])
    *lines, last = aligned(cells)
    low, high = sorted(best.temperatures)
    chosen = f"{low:g}" if low == high else f"{low:g} and {high:g}"
    about = f"{row['dtype']}, {row['truncated_frac']:.1%} truncated at temperature {row['temperature']:g}"
    about += f", {row['tokens_per_second']:.0f} tokens a second"
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
