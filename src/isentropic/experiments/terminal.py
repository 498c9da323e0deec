"""The text that a run and an evaluation print: a line of progress, the closing table, models side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..runs.clock import duration
from ..runs.summary import SETTLED

# Figures of `isentropic eval` besides pass@k.
EVAL_FIGURES = (
    "distinct",
    "majority",
    "greedy",
    "greedy_prompts",
    "truncated_frac",
    "greedy_truncated",
    "tokens_per_second",
)
_WHOLE_NUMBERS = ("tokens_per_second", "greedy_prompts")


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
        if now - self.last < self.every and done < num:
            return
        self.last = now
        left = math.ceil(seconds / done * (num - done))
        self.say(f"{self.title}: {done}/{num} completions, {tokens / seconds:.0f} tokens/s, eta {duration(left)}")


def closing_table(summary: dict[str, Any], out: str) -> str:
    """The table at the end of a run.

    Args:
        summary: as summary.json holds it.
        out: the run directory.
    """

    def row(name: str, start: Any = None, target: Any = None, end: Any = None) -> tuple[str, ...]:
        return name, *("" if x is None else x if isinstance(x, str) else f"{x:.3f}" for x in (start, target, end))

    rows = [row("", "start", "target", "end")]
    rows.append(
        row("entropy (nats a token)", summary["entropy/start"], summary["entropy/target"], summary["entropy/end"])
    )
    if summary["entropy/rms_error"] is not None:
        rows.append(row(f"RMS entropy error after {SETTLED} steps", end=f"{summary['entropy/rms_error']:.1%}"))
    if summary["knob/saturated"]:
        rows.append(row("steps with the knob at its bound", end=f"{summary['knob/saturated']:.0%}"))
    rows.append(row("reward (training prompts)", summary["reward/start"], None, summary["reward/end"]))
    start, end = summary.get("start", {}), summary.get("end", {})
    scores = [key for key in end if key.startswith("pass@")]
    for key in dict.fromkeys([*scores[:1], *scores[-1:]]):
        rows.append(row(f"{key} (held-out)", start.get(key), None, end[key]))
    if end:
        rows.append(row("distinct right answers (held-out)", start.get("distinct"), None, end["distinct"]))
    for name, scored in summary.get("before", {}).items():
        middle = scored[len(scored) // 2]
        rows += [
            row(f"{key}, {name} (start, switch, end)", scored[0][key], f"{middle[key]:.3f}", scored[-1][key])
            for key in (*scores[:1], "distinct")
        ]
    rows.append(row("seconds", end=f"{summary['seconds']:.0f}"))
    width = max(len(name) for name, *_ in rows)
    text = "\n".join(f"{a:{width}}  {b:>8}  {c:>8}  {d:>8}".rstrip() for a, b, c, d in rows)
    stopped = f"\n\nstopped early: {summary['stopped']}" if summary.get("stopped") else ""
    return f"\n{text}{stopped}\n\nrun directory: {out}"


def evaluation_table(rows: Sequence[dict[str, Any]]) -> str:
    """Models as columns, with their figures below one another.

    Args:
        rows: of :func:`isentropic.experiments.evaluate.evaluate_models`.
    """
    first = rows[0]
    figures = [name for name in first if name.startswith("pass@")]
    figures += [name for name in EVAL_FIGURES if name in first]
    lines = [["model", *(_model_name(row) for row in rows)]]
    lines += [[name, *(_cell(row, name) for row in rows)] for name in figures]
    if len(rows) == 1:
        head = [["task", first["task"]], ["prompts", str(len(first["prompts"]))], ["k", str(first["k"])]]
        lines = [lines[0], *head, *lines[1:]]
        width = max(len(name) for name, _ in lines)
        return "\n".join([f"{name:{width}}  {value}" for name, value in lines] + _too_narrow(first))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [f"task {first['task']}, {len(first['prompts'])} prompts, k = {first['k']}"]
    text += ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    note = ["(95 % interval, bootstrap over prompts)"] if any(first["intervals"].values()) else []
    return "\n".join([*text, *note, *_too_narrow(first)])


FEW_PROMPTS = 100


def _too_narrow(row: dict[str, Any]) -> list[str]:
    """What to say of the intervals of few prompts."""
    if len(row["prompts"]) >= FEW_PROMPTS or not any(row["intervals"].values()):
        return []
    return [f"(with {len(row['prompts'])} prompts the intervals of rates near 0 or 1 are too narrow)"]


def _model_name(row: dict[str, Any]) -> str:
    return row["model"] if row["step"] is None else f"{row['model']} step {row['step']}"


def _cell(row: dict[str, Any], name: str) -> str:
    text = f"{row[name]:.0f}" if name in _WHOLE_NUMBERS else f"{row[name]:.3f}"
    interval = row["intervals"].get(name)
    return f"{text} ({interval[0]:.3f}..{interval[1]:.3f})" if interval else text
