"""The page of `isentropic compare`: tables with intervals, what each run is, bands over seeds, and the frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..runs.frontier import frontier, points
from ..runs.record import is_number
from .figures import Figure, Panel, Trace, layout, line, plain, rounded, step_layout
from .html import Html, el, table
from .runs import Run, read

# Fields of the curves of a line, and their captions.
_CURVES = {
    "entropy": "Entropy, nats per token",
    "reward": "Mean reward of the training prompts",
    "knob": "Knob",
}
_FLOORS = 60  # accuracies at which a frontier is drawn
MAX_CELLS = 8  # with figures; the tables hold all
_PER_RUN = ("seed", "task", "out", "recipe")


class Compared(NamedTuple):
    """What `isentropic compare` found.

    Attributes:
        lines: a dict for each finished run, as a results file holds it.
        tables: title, heads and rows of the estimates, each with its interval in brackets.
        remarks: what the tables are of, and what makes them unfair.
        runs: by cell, the run directory that the panels of single runs show; a cell may have none.
    """

    lines: Sequence[dict[str, Any]]
    tables: Sequence[tuple[str, list[str], list[list[str]]]]
    remarks: Sequence[str]
    runs: Mapping[str, Path]

    @property
    def cells(self) -> list[str]:
        """Names of the cells, in order of their lines."""
        return list(dict.fromkeys(str(x["cell"]) for x in self.lines))


def read_cells(compared: Compared) -> list[Run]:
    """One run of each cell, of eight cells at most, under the name and in the colour of its cell."""
    shown = {cell: compared.runs[cell] for cell in compared.cells[:MAX_CELLS] if cell in compared.runs}
    by_path = {run.path: run for run in (read(shown.values()) if shown else [])}
    runs = [(cell, by_path[path.resolve()]) for cell, path in shown.items()]
    return [replace(run, label=cell, group=i, member=0) for i, (cell, run) in enumerate(runs)]


def panels(compared: Compared, runs: Sequence[Run]) -> list[Panel]:
    """The panels of the comparison, which come before those of single runs."""
    looks = {run.label: run for run in runs}
    candidates = [_statistics(compared), _what(compared, looks), _curves(compared, looks), _frontiers(compared, looks)]
    return [panel for panel in candidates if panel is not None]


def _statistics(compared: Compared) -> Panel:
    body = []
    for title, head, rows in compared.tables:
        cells = [[row[0], *(_estimate(text) for text in row[1:])] for row in rows]
        body += [el("h3", title.rstrip(":")) if title else "", table(head, cells, class_="compare cards")]
    body += [el("p", remark, class_="note") for remark in compared.remarks]
    note = "A row is a cell: runs with the same settings but for seed and task. Below each mean, its 95% interval."
    return Panel("statistics", "Which is better, and how sure is that?", note, [], Html("".join(map(str, body))))


def _estimate(text: str) -> Html:
    """An estimate with its interval below it: both have the digits of the console's table."""
    mean, bracket, ends = text.partition(" (")
    interval = ends.rstrip(")").replace("..", " to ") if bracket else ""
    return el("span", mean.replace("-", "−") if mean != "-" else "–", el("small", interval.replace("-", "−")))


def _what(compared: Compared, looks: Mapping[str, Run]) -> Panel:
    """Recipe, control, differing settings and runs of each cell; then every run."""
    settings = {cell: _settings(next(x for x in compared.lines if x["cell"] == cell)) for cell in compared.cells}
    shared = [text for text in next(iter(settings.values())) if all(text in texts for texts in settings.values())]
    cells, single = [], []
    for cell in compared.cells:
        lines = [x for x in compared.lines if x["cell"] == cell]
        recipe = looks[cell].header["recipe"] if cell in looks else {}
        control = [f"{name} {recipe[name]}" for name in ("knob", "controller", "target") if recipe.get("knob")]
        own = [text for text in settings[cell] if text not in shared]
        config = looks[cell].header["config"] if cell in looks else lines[0].get("settings") or {}
        name = str(config.get("recipe") or cell)
        formula = el("small", recipe["formula"]) if recipe.get("formula") else None
        tasks, seeds = (list(dict.fromkeys(str(x[name]) for x in lines)) for name in ("task", "seed"))
        runs = f"{len(lines)}: {', '.join(tasks)}; seed {', '.join(seeds)}"
        row = [cell, el("span", name, formula), ", ".join(control) or "none", ", ".join(own) or "none", runs]
        cells.append(row)
        for x in lines:
            counts = [x["figures"].get(figure) for figure in ("steps", "samples")]
            single.append([cell, x["task"], x["seed"], *counts, x.get("date"), str(x.get("stopped") or "ended")])
    head = ["cell", "recipe", "control", "settings of its own", "runs"]
    runs_head = ["cell", "task", "seed", "steps", "generated answers", "date", "state"]
    each = [["–" if value is None else value for value in row] for row in single]
    body = table(head, cells, class_="wordy cards") + el(
        "details", el("summary", f"All {len(single)} runs"), table(runs_head, each, class_="cards")
    )
    note = f"Settings of all of them other than the defaults: {', '.join(shared) or 'none'}."
    return Panel("what", "What is each run?", note, [], Html(body))


def _settings(x: dict[str, Any]) -> list[str]:
    """The settings of a line that differ from their defaults, as texts."""
    settings = x.get("settings") or {}
    return [f"{k} = {v}" for k, v in settings.items() if k not in _PER_RUN and v not in ({}, None)]


def _curves(compared: Compared, looks: Mapping[str, Run]) -> Panel | None:
    figures = []
    for name, caption in _CURVES.items():
        for task in _tasks(compared):
            traces = [t for cell in looks for t in _band(_lines(compared, cell, task), name, looks[cell])]
            if traces:
                where = f", {task}" if len(_tasks(compared)) > 1 else ""
                axes = step_layout([*looks.values()], yaxis={} if name == "knob" else {"rangemode": "tozero"})
                figures.append(Figure(f"{caption}{where}", traces, axes))
    if not figures:
        return None
    note = "Lines: means over seeds. Bands: from the lowest to the highest seed. A run that stopped early ends there."
    return Panel("curves", "How did they get there?", note, figures)


def _tasks(compared: Compared) -> list[str]:
    return list(dict.fromkeys(str(x["task"]) for x in compared.lines))


def _lines(compared: Compared, cell: str, task: str) -> list[dict[str, Any]]:
    return [x for x in compared.lines if x["cell"] == cell and str(x["task"]) == task]


def _band(lines: Sequence[dict[str, Any]], name: str, run: Run) -> list[Trace]:
    """The mean of a curve over seeds, and the band that holds every seed; of one seed the curve alone."""
    curves = []
    for x in lines:
        curve = x.get("curve") or {}
        pairs = [(s, v) for s, v in zip(curve.get("step", []), curve.get(name, []), strict=False) if is_number(v)]
        if len(pairs) > 1:
            curves.append(list(zip(*pairs, strict=True)))
    if not curves:
        return []
    steps = max((curve[0] for curve in curves), key=len)
    # A seed counts for the steps it took: beyond its ends it has no value.
    values = np.array([np.interp(steps, *curve, left=np.nan, right=np.nan) for curve in curves])
    mean = line(run, steps, np.nanmean(values, 0).tolist())
    if len(curves) == 1:
        return [mean]
    edge = {"hoverinfo": "skip", "line": {"width": 0, "dash": "solid"}}
    low, high = (line(run, steps, f(values, 0).tolist(), limit=10**6, **edge) for f in (np.nanmin, np.nanmax))
    return [low, high | {"fill": "tonexty", "fillcolor": run.shade}, mean]


def _frontiers(compared: Compared, looks: Mapping[str, Run]) -> Panel | None:
    figures = []
    for task in _tasks(compared):
        traces: list[Trace] = []
        k = None
        for cell, run in looks.items():
            rows = [row for x in _lines(compared, cell, task) if (row := _evaluation(x)) is not None]
            if rows:
                k = rows[0]["k"]
                traces += _frontier(rows, run, labelled=not traces)
        if traces:
            # Below the least accurate temperature every frontier is level.
            left = min(min(trace["x"]) for trace in traces if "markers" in trace["mode"])
            axis = {"range": [max(0.0, left - 0.1), 1.03], "title": {"text": "pass@1 of at least"}}
            axes = layout(xaxis=axis, yaxis={"rangemode": "tozero"})
            figures.append(
                Figure(f"Most distinct right answers among {k}, held-out prompts of {task}", traces, axes, True)
            )
    if not figures:
        return None
    note = (
        "How many distinct right answers each gives at a pass@1 of at least that on the axis, at the temperature that "
        "suits it best: means over seeds at the end of training, as far as all seeds reach. Marks: the sampling "
        "temperatures, with numbers on the first cell; the star: greedy. Up and to the right is better."
    )
    return Panel("temperatures", "What can they do at any temperature?", note, figures)


def _evaluation(x: dict[str, Any]) -> dict[str, Any] | None:
    """The last evaluation of a line with figures at more than one temperature, as a row of evaluations.jsonl."""
    rows = [row for row in x.get("evaluations") or [] if isinstance(row.get("at"), dict) and row["at"]]
    row: dict[str, Any] = {"temperature": 1.0, **(rows[-1] if rows else {})}
    names = ("pass@1", f"pass@{row.get('k')}", "distinct")
    others: dict[str, Any] = rows[-1]["at"] if rows else {}
    counts = [row, *others.values()]
    return row if rows and all(is_number(c.get(name)) for c in counts for name in names) else None


def _frontier(rows: Sequence[dict[str, Any]], run: Run, labelled: bool) -> list[Trace]:
    """The frontier of a cell, the mean of its seeds' at every accuracy that all of them reach, and the temperatures."""
    reach = min(max(point.accuracy for point in points(row)) for row in rows)
    floors = [reach * i / (_FLOORS - 1) for i in range(_FLOORS)]
    reached = [[f.distinct for row in rows if (f := frontier(row, floor - 1e-9)) is not None] for floor in floors]
    curve = line(run, rounded(floors), [sum(values) / len(values) for values in reached])
    curve["hovertemplate"] = "pass@1 ≥ %{x:.3f}: %{y:.2f} different"
    by_temperature: dict[float, list[Any]] = {}
    for row in rows:
        for point in points(row):
            by_temperature.setdefault(point.temperature, []).append(point)
    means = {t: np.mean([[p.accuracy, p.distinct] for p in group], 0).tolist() for t, group in by_temperature.items()}
    marks = line(run, [x for x, _ in means.values()], [y for _, y in means.values()])
    symbols = [run.symbol if t else "star" for t in means]
    marks |= {
        "mode": "markers+text" if labelled else "markers",
        "text": [f"{t:g}" if t else "" for t in means],
        "textposition": "bottom center",
        "textfont": {"size": 10, "color": "@muted"},
        "marker": {"size": [8 if t else 12 for t in means], "color": run.colour, "symbol": symbols},
        "name": plain(f"{run.label}, by temperature"),
        "customdata": [f"temperature {t:g}" if t else "greedy" for t in means],
        "hovertemplate": "%{customdata}: pass@1 %{x:.3f}, %{y:.2f} different",
        "cliponaxis": False,
    }
    return [curve, marks]
