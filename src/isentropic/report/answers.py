"""Panels on what the model writes: length, pass@k, distinct answers, tasks in sequence, samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..runs.frontier import by_temperature, points
from ..runs.record import is_number
from ..runs.statistics import Interval, pass_at_k, proportion_interval
from .figures import SURPRISED, Figure, Panel, Trace, collect, layout, line, plain, rounded, shade, step_layout
from .html import Html, el, number
from .runs import Run

_STAGES = {"start": "dot", "middle": "dash", "end": "solid"}
_SAMPLES = 24  # on the whole page
_MAX_TOKENS = 300
_MAX_PROMPT = 600


def length(runs: Sequence[Run]) -> Panel | None:
    """Length of completions, and how many were cut."""
    figures = collect(runs, "length/mean", "length/truncated_frac", rangemode="tozero")
    note = "A completion that is cut at the limit is rarely right, and teaches the model to stop early."
    return Panel("length", "Do answers grow, or run into the limit?", note, figures) if figures else None


def tasks_of(runs: Sequence[Run]) -> list[str]:
    """Tasks that were evaluated, in order of their first evaluation."""
    return list(dict.fromkeys(str(row.get("task")) for run in runs for row in run.evaluations))


def evaluations(run: Run, task: str) -> list[dict[str, Any]]:
    """A run's evaluations on a task, by step."""
    return sorted((row for row in run.evaluations if str(row.get("task")) == task), key=lambda row: row["step"])


def ks_of(row: dict[str, Any]) -> list[int]:
    """The k of an evaluation's pass@k, rising."""
    names = [key.removeprefix("pass@") for key in row if key.startswith("pass@") and is_number(row[key])]
    return sorted(int(name) for name in names if name.isdecimal())


def interval(row: dict[str, Any], k: int) -> Interval | None:
    """95% interval of pass@k over prompts; None without counts by prompt."""
    n, c = row.get("num_samples"), row.get("num_correct")
    if not isinstance(n, list) or not isinstance(c, list) or len(n) != len(c) or not n:
        return None
    if not all(type(a) is int and type(b) is int and 0 <= b <= a and k <= a for a, b in zip(n, c, strict=True)):
        return None
    return proportion_interval(pass_at_k(n, c, k))


def stages(rows: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Start, middle and end of a list of evaluations; of a single one the end, of two start and end.

    Example:
        >>> [(name, row["step"]) for name, row in stages([{"step": 0}, {"step": 4}, {"step": 9}])]
        [('start', 0), ('middle', 4), ('end', 9)]
    """
    if len(rows) < 2:
        return [("end", row) for row in rows]
    centre = (rows[0]["step"] + rows[-1]["step"]) / 2
    inner = min(rows[1:-1], key=lambda row: abs(row["step"] - centre), default=None)
    return [("start", rows[0]), *([("middle", inner)] if inner else []), ("end", rows[-1])]


def pass_at(runs: Sequence[Run]) -> Panel | None:
    """pass@k at start, middle and end, with intervals over prompts; a figure a task."""
    figures = []
    for task in tasks_of(runs):
        traces: list[Trace] = []
        for run in runs:
            for stage, row in stages(evaluations(run, task)):
                if ks_of(row) and (len(runs) <= 3 or stage != "middle"):
                    traces.append(_curve(run, stage, row, len(runs)))
        if traces:
            ks = sorted({x for trace in traces for x in trace["x"]})
            log = {"type": "log", "tickvals": ks, "ticktext": [str(k) for k in ks], "title": {"text": "k, tries"}}
            # A legend of several runs would leave no room for the figure on a phone: the head of the page and the note
            # say which is which.
            look = layout(xaxis=log, yaxis={"range": [0, 1.03]}, showlegend=len(traces) <= len(_STAGES))
            figures.append(Figure(f"pass@k, held-out prompts of {task}", traces, look, wide=True))
    if not figures:
        return None
    note = (
        "The probability that at least one of k answers is right. Dotted with open marks: before training; dashed: the "
        "middle; solid: the end. Bars: 95% over prompts."
    )
    return Panel("passk", "What does it solve, with how many tries?", note, figures)


def _curve(run: Run, stage: str, row: dict[str, Any], num_runs: int) -> Trace:
    ks = ks_of(row)
    y = [row[f"pass@{k}"] for k in ks]
    intervals = [interval(row, k) for k in ks]
    name = f"{stage}, step {row['step']}" if num_runs == 1 else f"{run.label}, {stage}"
    trace = line(run, ks, y, line={"dash": _STAGES[stage], "width": 1 if stage == "start" else 2})
    marker = {"size": 8, "color": run.colour, "symbol": run.symbol + ("-open" if stage == "start" else "")}
    trace |= {"mode": "lines+markers", "marker": marker, "name": plain(name)}
    trace["hovertemplate"] = "pass@%{x}: %{y:.3f}"
    if all(intervals):
        trace["error_y"] = bars(y, [pair for pair in intervals if pair], run.colour)
    return trace


def bars(values: Sequence[float], intervals: Sequence[Interval], colour: str) -> dict[str, Any]:
    """Error bars from values to the ends of their intervals."""
    return {
        "type": "data",
        "symmetric": False,
        "array": rounded([max(0.0, pair.high - y) for y, pair in zip(values, intervals, strict=True)]),
        "arrayminus": rounded([max(0.0, y - pair.low) for y, pair in zip(values, intervals, strict=True)]),
        "thickness": 1,
        "width": 3,
        "color": colour,
    }


def frontier(runs: Sequence[Run]) -> Panel | None:
    """Distinct right answers against pass@1, a point a temperature, before training and at the end; a figure a task."""
    figures = []
    for task in tasks_of(runs):
        traces: list[Trace] = []
        for run in runs:
            rows = [row for row in evaluations(run, task) if _has_temperatures(row)]
            for stage, row in stages(rows):
                if stage != "middle":
                    traces.append(_by_temperature(run, stage, row, len(runs)))
        if traces:
            look = layout(
                xaxis={"range": [0, 1.03], "title": {"text": "pass@1"}},
                yaxis={"rangemode": "tozero"},
                showlegend=len(traces) <= len(_STAGES),
            )
            k = next(row["k"] for run in runs for row in evaluations(run, task) if _has_temperatures(row))
            figures.append(Figure(f"Distinct right answers among {k}, held-out prompts of {task}", traces, look, True))
    if not figures:
        return None
    note = (
        "Each point is a sampling temperature; the star is greedy, which is one answer. Up and to the right is "
        "better. Dotted with open marks: before training; solid: the end."
    )
    return Panel("frontier", "What can it do at any temperature?", note, figures)


def _has_temperatures(row: dict[str, Any]) -> bool:
    """Whether an evaluation has figures at more than one temperature."""
    others = row.get("at")
    if not isinstance(others, dict) or not others or not all(isinstance(counts, dict) for counts in others.values()):
        return False
    names = ("pass@1", f"pass@{row.get('k')}", "distinct")
    return all(is_number(counts.get(name)) for counts in by_temperature(row).values() for name in names)


def _by_temperature(run: Run, stage: str, row: dict[str, Any], num_runs: int) -> Trace:
    path = points(row)
    # Labels of many curves would lie upon one another: of several runs only the first of each colour has them.
    shown = num_runs == 1 or (stage == "end" and run.member == 0)
    labels = [f"temperature {point.temperature:g}" if point.temperature else "greedy" for point in path]
    trace = line(run, [point.accuracy for point in path], [point.distinct for point in path])
    trace["line"] |= {"dash": _STAGES[stage], "width": 1 if stage == "start" else 2}
    opened = "-open" if stage == "start" else ""
    marks = [(run.symbol if point.temperature else "star") + opened for point in path]
    trace |= {
        "mode": "lines+markers+text" if shown else "lines+markers",
        "marker": {"size": [8 if point.temperature else 12 for point in path], "color": run.colour, "symbol": marks},
        "name": plain(f"{stage}, step {row['step']}" if num_runs == 1 else f"{run.label}, {stage}"),
        "text": [f"{point.temperature:g}" if point.temperature else "" for point in path],
        "customdata": labels,
        "textposition": "bottom right" if stage == "start" else "top center",
        "textfont": {"size": 11, "color": "@ink" if stage == "end" else "@muted"},
        "hovertemplate": "%{customdata}: pass@1 %{x:.3f}, %{y:.2f} different",
        "cliponaxis": False,
    }
    return trace


def distinct(runs: Sequence[Run]) -> Panel | None:
    """Distinct right answers among k, at every evaluation."""
    figures = []
    for task in tasks_of(runs):
        traces: list[Trace] = []
        for run in runs:
            rows = [row for row in evaluations(run, task) if is_number(row.get("distinct"))]
            if rows:
                traces.append(_distinct(run, rows))
        if traces:
            look = step_layout(runs, yaxis={"rangemode": "tozero"})
            k = next((row.get("k") for run in runs for row in evaluations(run, task)), None)
            of = f" among {k}" if k else ""
            figures.append(Figure(f"Mean number of distinct right answers{of}: {task}", traces, look, wide=True))
    note = "Answers that differ after normalisation, counted on held-out prompts. Bars: 95% over prompts."
    return Panel("distinct", "How many distinct right answers are there?", note, figures) if figures else None


def _distinct(run: Run, rows: Sequence[dict[str, Any]]) -> Trace:
    y = [row["distinct"] for row in rows]
    trace = line(run, [row["step"] for row in rows], y)
    trace |= {"mode": "lines+markers", "marker": {"size": 8, "symbol": run.symbol, "color": run.colour}}
    trace["cliponaxis"] = False
    intervals = [_distinct_interval(row) for row in rows]
    if all(intervals):
        trace["error_y"] = bars(y, [pair for pair in intervals if pair], run.colour)
    return trace


def _distinct_interval(row: dict[str, Any]) -> Interval | None:
    """95% interval of the mean number of distinct right answers, of k at most; None without counts by prompt."""
    k, counts = row.get("k"), row.get("num_distinct")
    if type(k) is not int or not isinstance(counts, list) or not all(is_number(c) and 0 <= c <= k for c in counts):
        return None
    pair = proportion_interval([c / max(k, 1) for c in counts])
    return pair and Interval(k * pair.low, k * pair.high)


def sequence(runs: Sequence[Run]) -> Panel | None:
    """pass@1 of every task against step, for runs in which tasks followed one another."""
    switched = [run for run in runs if run.switches()]
    tasks = tasks_of(switched)
    if len(tasks) < 2:
        return None
    figures = []
    for task in tasks:
        traces: list[Trace] = []
        for run in switched:
            rows = [row for row in evaluations(run, task) if is_number(row.get("pass@1"))]
            if rows:
                trace = line(run, [row["step"] for row in rows], [row["pass@1"] for row in rows])
                marker = {"size": 8, "symbol": run.symbol, "color": run.colour}
                traces.append(trace | {"mode": "lines+markers", "marker": marker, "cliponaxis": False})
        if traces:
            figures.append(Figure(f"pass@1 of {task}", traces, step_layout(switched, yaxis={"range": [0, 1.03]})))
    note = "Held-out prompts of each task; the dotted line is the step at which training changed to another task."
    return Panel("sequence", "What is kept of a task when the next one starts?", note, figures) if figures else None


def samples(runs: Sequence[Run]) -> Panel | None:
    """A few completions of each run, from its start to its end, shaded by surprisal."""
    num = max(2, _SAMPLES // len(runs))
    tables = [_samples(run, num, i == 0) for i, run in enumerate(runs) if run.samples]
    if not tables:
        return None
    shades = [el("span", f"{nats:g}", class_="token", style=_style(nats)) for nats in (0, 1, 2, 3, SURPRISED)]
    legend = el("p", "surprisal, nats: ", shades, " and more", class_="scale")
    note = "Completions as they were sampled. The stronger the shade of a token, the less the policy expected it."
    return Panel("samples", "What does the model write?", note, [], Html(legend + "".join(tables)))


def _samples(run: Run, num: int, opened: bool) -> Html:
    rows = run.samples
    last = len(rows) - 1
    kept = sorted({round(i * last / max(num - 1, 1)) for i in range(num)}) if len(rows) > num else range(len(rows))
    head = ("step", "reward", "advantage", "prompt", "completion")
    body = [el("tr", [_cell(name, rows[i]) for name in head]) for i in kept]
    content = el(
        "table",
        el("thead", el("tr", [el("th", name, scope="col") for name in head])),
        el("tbody", body),
        class_="samples cards",
    )
    title = el("summary", f"{run.label}: {len(body)} of {len(rows)} samples")
    return el("details", title, el("div", content, class_="scroll", tabindex="0"), open=opened)


def _cell(name: str, row: dict[str, Any]) -> Html:
    value = row.get(name)
    if name == "completion":
        return el("td", _completion(row), data_name=name, class_="text")
    if name == "prompt":
        return el("td", _cut(str(value if value is not None else "")), data_name=name, class_="text")
    return el("td", number(value) if is_number(value) else "–", data_name=name, class_="number")


def _cut(text: str, limit: int = _MAX_PROMPT) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit} more characters)"


def _completion(row: dict[str, Any]) -> list[Any]:
    """Tokens with their shade; the plain completion of a row without tokens."""
    tokens, surprisal = row.get("tokens"), row.get("surprisal")
    entropy = row.get("entropy")
    if not isinstance(tokens, list) or not isinstance(surprisal, list) or len(tokens) != len(surprisal):
        return [_cut(str(row.get("completion") or ""), 4 * _MAX_PROMPT)]
    if not isinstance(entropy, list) or len(entropy) != len(tokens):
        entropy = [None] * len(tokens)
    spans: list[Any] = []
    for token, nats, spread in list(zip(tokens, surprisal, entropy, strict=True))[:_MAX_TOKENS]:
        known = is_number(nats)
        title = f"surprisal {nats:.2f}" if known else "surprisal not known"
        title += f", entropy {spread:.2f}" if is_number(spread) else ""
        text = str(token).replace("\n", "↵\n")
        spans.append(el("span", text, class_="token", style=_style(nats) if known else None, title=title))
    if len(tokens) > _MAX_TOKENS:
        spans.append(f"… ({len(tokens) - _MAX_TOKENS} more tokens)")
    return spans


def _style(nats: float) -> str:
    return f"--s:{shade(nats):.2f}"
