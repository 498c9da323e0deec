"""The closing figures of a run: one definition for summary.json, the closing table and the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .frontier import best_step, best_temperature
from .record import is_number
from .statistics import rms_relative_error

SETTLED = 20  # optimizer steps before the entropy error counts

Row = dict[str, Any]


def summary(rows: Sequence[Row], evaluations: Sequence[Row] = (), seconds: float | None = None) -> dict[str, Any]:
    """Sum a run up in a few figures.

    The end of a run is its last tenth, at least one step; the target error is
    ``√ mean(((H − target) / target)²)`` over the steps after the first 20.

    Args:
        rows: of metrics.jsonl, in order of steps.
        evaluations: rows of evaluations.jsonl, in the order they were written.
        seconds: how long the run took.

    Returns:
        ``steps``, ``seconds``, ``samples``, ``entropy/start``, ``entropy/target``, ``entropy/end``, ``entropy/mean``
        (over the settled steps, nats per token), ``entropy/rms_error`` and ``knob/saturated`` (shares of 1),
        ``reward/start``, ``reward/end``; None for a figure that the rows do not hold. With evaluations also ``start``
        and ``end``: the step and the scores on the last task, see :func:`scores`; ``best``, if it was evaluated along
        the run, see :func:`isentropic.runs.frontier.best_step`; and, after a sequence of tasks, ``task``, the last
        one's name, and ``before``: the scores of every evaluation of the tasks before it, by name.

    Example:
        >>> steps = range(1, 41)
        >>> rows = [{"step": t, "entropy/mean": 1.1, "entropy/target": 1.0, "reward/mean": t / 40} for t in steps]
        >>> figures = summary(rows)
        >>> figures["steps"], round(figures["entropy/rms_error"], 3), figures["reward/start"], figures["reward/end"]
        (40, 0.1, 0.025, 0.9625)
    """
    first, last = (rows[0], rows[-1]) if rows else ({}, {})
    tail, settled = rows[-max(1, len(rows) // 10) :], rows[SETTLED:]
    figures: dict[str, Any] = {
        "steps": last.get("step", 0),
        "seconds": None if seconds is None else round(seconds, 1),
        "samples": last.get("samples/total"),
        "entropy/start": first.get("entropy/mean"),
        "entropy/target": last.get("entropy/target"),
        "entropy/end": _mean(tail, "entropy/mean"),
        "entropy/mean": _mean(settled or rows, "entropy/mean"),
        "entropy/rms_error": _target_error(rows),
        "knob/saturated": _mean(settled, "knob/saturated"),
        "reward/start": first.get("reward/mean"),
        "reward/end": _mean(tail, "reward/mean"),
    }
    return figures | _evaluated(evaluations)


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if is_number(row.get(name))]
    return sum(values) / len(values) if values else None


def _target_error(rows: Sequence[Row]) -> float | None:
    """RMS relative error over the settled steps with a target; a target of 0 gives no scale and is left out."""
    pairs = [(row.get("entropy/mean"), row.get("entropy/target")) for row in rows if row["step"] > SETTLED]
    pairs = [(value, target) for value, target in pairs if is_number(value) and is_number(target) and target]
    return float(rms_relative_error(*map(list, zip(*pairs, strict=True)))) if pairs else None


def _evaluated(evaluations: Sequence[Row]) -> dict[str, Any]:
    by_task: dict[Any, list[Row]] = {}
    for row in evaluations:
        name = row.get("task") if isinstance(row.get("task"), str) else None
        by_task.setdefault(name, []).append(row)
    if not by_task:
        return {}
    *others, final = ([scores(row) for row in rows] for rows in by_task.values())
    last = [row for row in list(by_task.values())[-1] if row.get("step")]
    ends = dict(zip(("start", "end"), [final[0], final[-1]] if len(final) > 1 else final, strict=False))
    ends |= {"task": list(by_task)[-1]} if others else {}
    best = best_step(last) if len(last) > 1 and all(counted(row) for row in last) else None
    # Of tasks before the last: at the start, at every switch, at the end.
    before = {"before": dict(zip(by_task, others, strict=False))} if others else {}
    return ends | ({} if best is None else {"best": best._asdict()}) | before


def scores(row: Row) -> dict[str, Any]:
    """The figures of an evaluation without its counts by prompt, and pass@1 at the policy's own best temperature."""
    figures = {"step": row.get("step"), **_plain_scores(row)}
    figures |= {"greedy": row["greedy"]} if is_number(row.get("greedy")) else {}
    if isinstance(row.get("at"), dict):
        figures["at"] = {name: _plain_scores(counts) for name, counts in row["at"].items() if isinstance(counts, dict)}
    if counted(row):
        best = best_temperature(row)
        figures |= {"best_pass@1": best.accuracy, "best_temperatures": list(best.temperatures)}
    return figures


def _plain_scores(row: Row) -> dict[str, Any]:
    return {k: v for k, v in row.items() if (k in ("distinct", "majority") or k.startswith("pass@")) and is_number(v)}


def counted(row: Row) -> bool:
    """Whether a row of evaluations.jsonl has its counts by prompt, at every temperature."""
    num = row.get("num_samples")
    others = row.get("at") if isinstance(row.get("at"), dict) else {}
    counts = [row.get("num_correct"), *(c.get("num_correct") for c in (others or {}).values() if isinstance(c, dict))]
    return isinstance(num, list) and bool(num) and all(isinstance(c, list) and len(c) == len(num) for c in counts)
