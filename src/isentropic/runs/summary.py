"""The closing figures of a run: one definition for summary.json, the closing table and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .frontier import best_step, best_temperature
from .record import is_number

SETTLED = 20  # optimizer steps before the entropy error counts
NOT_KNOWN = "–"
_MOST_TASKS = 3  # in the closing table; a longer sequence is cut to its first and last tasks
_TASK_WIDTH = 40

Row = dict[str, Any]


def summary(rows: Sequence[Row], evaluations: Sequence[Row] = (), seconds: float | None = None) -> dict[str, Any]:
    """Sum a run up in a few figures.

    The end of a run is its last tenth, at least one step; the target error is the root mean square of
    ``entropy/error`` over the steps after the first 20.

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
        >>> rows = [{"step": t, "entropy/mean": 1.1, "entropy/error": 0.1, "reward/mean": t / 40} for t in steps]
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
        "knob/saturated": steps_at_bound(rows),
        "reward/start": first.get("reward/mean"),
        "reward/end": _mean(tail, "reward/mean"),
    }
    return figures | _evaluated(evaluations)


def steps_at_bound(rows: Sequence[Row]) -> float | None:
    """The share of the steps after the first 20 at which the knob was at a bound: the one count that every view shows.

    Args:
        rows: of metrics.jsonl.

    Example:
        >>> steps_at_bound([{"step": t, "knob/saturated": int(t < 22)} for t in range(1, 25)])
        0.25
    """
    return _mean([row for row in rows if row["step"] > SETTLED], "knob/saturated")


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if is_number(row.get(name))]
    return sum(values) / len(values) if values else None


def _target_error(rows: Sequence[Row]) -> float | None:
    """RMS relative error over the settled steps with a target."""
    errors = [row["entropy/error"] for row in rows if row["step"] > SETTLED and is_number(row.get("entropy/error"))]
    return math.sqrt(math.fsum(error * error for error in errors) / len(errors)) if errors else None


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


def closing_table(summary: dict[str, Any], out: str | None = None) -> str:
    """The table at the end of a run, in less than 20 lines of at most 100 columns, but for long paths.

    Args:
        summary: as summary.json holds it.
        out: the run directory, for a last line that names it.
    """

    def row(name: str, start: Any = None, target: Any = None, end: Any = None) -> list[str]:
        return [name, *("" if x is None else x if isinstance(x, str) else f"{x:.3f}" for x in (start, target, end))]

    rows = [row(f"{summary['steps']} steps, {summary['seconds']:.0f} seconds", "start", "target", "end")]
    rows.append(
        row("entropy (nats per token)", summary["entropy/start"], summary["entropy/target"], summary["entropy/end"])
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
    return "\n".join([*lines, *([] if out is None else [f"run directory: {out}"])])


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
        figures = [f"{scores[n]:.{2 if n == 'distinct' else 3}f}" if n in scores else NOT_KNOWN for n in names]
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
