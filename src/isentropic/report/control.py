"""Panels on what was controlled: entropy and reward, their path, and the knob."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..control.targets import Level, parse_level
from .figures import (
    BAND,
    Figure,
    Panel,
    Trace,
    collect,
    layout,
    line,
    over_steps,
    plain,
    rounded,
    smooth,
    step_layout,
    thin,
)
from .runs import Run

_PATH_POINTS = 120
# Where the name of a path's end stands, in pixels from it: apart, since paths may end together.
_ARROWS = ((50, -24), (-50, -24), (60, 8), (-60, 8), (50, 34), (-50, 34))
# Blue to orange over grey: its ends differ to every eye, and it stands on white and on black.
_SCALE = [[0, "#2f7fd1"], [0.5, "#9a8f9a"], [1, "#e69f00"]]


def hold(runs: Sequence[Run]) -> Panel | None:
    """Entropy with its target band, and reward."""
    entropy = over_steps(runs, "entropy/mean", "Entropy, nats a token", rangemode="tozero")
    rewards = collect(runs, ("reward/mean", "Mean reward of the training prompts"))
    if entropy is None:
        return Panel("hold", "Does reward rise?", _note(runs, False), rewards) if rewards else None
    targets = [trace for run in _first_of_groups(runs) for trace in _target(run, len(runs))]
    question = "Does entropy hold, and does reward rise?" if targets else "Where do entropy and reward go?"
    figure = Figure(entropy.caption, _once(targets) + entropy.traces, entropy.layout)
    return Panel("hold", question, _note(runs, bool(targets)), [figure, *rewards])


def _note(runs: Sequence[Run], target: bool) -> str:
    parts = ["Thick: smoothed; thin: every step." if len(runs) <= 4 else "Smoothed over about ten steps."]
    if target:
        parts.append(f"Dotted: the target; shaded: its band, or {BAND:.0%} on either side of a single level.")
    return " ".join(parts)


def _first_of_groups(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.member == 0]


def _once(traces: list[Trace]) -> list[Trace]:
    """Runs that hold the same target need it drawn once."""
    seen: list[Any] = []
    kept = []
    for trace in traces:
        key = trace["y"][0], trace["y"][-1], trace.get("fill"), trace["line"]["width"]
        if key not in seen:
            seen.append(key)
            kept.append(trace)
    return kept


def _target(run: Run, num_runs: int) -> list[Trace]:
    """The target in force, and the band around it."""
    x, y = run.column("entropy/target")
    if not x:
        return []
    colour = "@ink" if num_runs == 1 else run.colour
    edges = _edges(run) or ([v * (1 - BAND) for v in y], [v * (1 + BAND) for v in y])
    none = {"hoverinfo": "skip", "line": {"width": 0, "dash": "solid"}}
    fill = {"fill": "tonexty", "fillcolor": "@band"}
    ends = [x[0], x[-1]] if len(set(y)) == 1 else x
    at = [0, -1] if len(set(y)) == 1 else range(len(x))
    low, high = ([values[i] for i in at] for values in edges)
    style = {"width": 1.5, "dash": "dot", "color": colour}
    label = "target" if num_runs == 1 else f"target of {run.label}"
    return [
        line(run, ends, low, **none),
        line(run, ends, high, **none, **fill),
        line(run, x, y, line=style) | {"name": plain(label)},
    ]


def _edges(run: Run) -> tuple[list[float], list[float]] | None:
    """The edges of a target that is itself a band; levels by share need the first entropy that was read."""
    kind, *levels = str(run.header["recipe"].get("target")).split(":")
    x, start = len(run.column("entropy/target")[0]), run.column("entropy/mean")[1]
    if kind != "band" or len(levels) != 2 or not start:
        return None
    found: list[Level] = [parse_level(level) for level in levels]
    low, high = (level.amount * (start[0] if level.of_initial else 1.0) for level in found)
    return [low] * x, [high] * x


def phase(runs: Sequence[Run]) -> Panel | None:
    """The path of every run in the plane of entropy and reward, coloured by step."""
    last = max((run.metrics[-1]["step"] for run in runs if run.metrics), default=1)
    traces: list[Trace] = []
    notes = []
    for run in runs:
        rows = run.rows_with("entropy/mean", "reward/mean")
        if len(rows) < 2:
            continue
        stride = max(1, len(rows) // _PATH_POINTS)
        kept = sorted({*range(0, len(rows), stride), len(rows) - 1})
        x, y = (smooth([row[name] for row in rows]) for name in ("entropy/mean", "reward/mean"))
        path = line(run, [x[i] for i in kept], [y[i] for i in kept])
        steps = [rows[i]["step"] for i in kept]
        sizes = [11 if i in (kept[0], kept[-1]) else 5 for i in kept]
        dots = {"color": steps, "coloraxis": "coloraxis", "size": sizes, "symbol": run.symbol, "line": {"width": 0}}
        hover = "step %{marker.color}<br>entropy %{x:.3f}<br>reward %{y:.3f}"
        traces.append(path | {"mode": "lines+markers", "x": rounded(path["x"]), "marker": dots, "hovertemplate": hover})
        traces[-1]["line"] = {"color": "@muted" if len(runs) == 1 else run.colour, "width": 1, "dash": run.dash}
        if run.member == 0 and run.group < len(_ARROWS):
            text = run.label if len(runs) > 1 else f"step {steps[-1]}"
            ax, ay = _ARROWS[run.group]
            notes.append({"x": path["x"][-1], "y": path["y"][-1], "text": plain(text), "ax": ax, "ay": ay})
    if not traces:
        return None
    bar = {"thickness": 10, "len": 0.9, "title": {"text": "step", "side": "right"}, "outlinewidth": 0}
    look = layout(
        xaxis={"title": {"text": "entropy, nats a token"}, "range": _range(traces, "x")},
        yaxis={"title": {"text": "mean reward"}, "range": _range(traces, "y")},
        coloraxis={"colorscale": _SCALE, "cmin": 1, "cmax": last, "colorbar": bar},
        annotations=[note | {"arrowcolor": "@muted", "font": {"size": 11}} for note in notes],
    )
    note = (
        "A path a run, smoothed, from its first step (large, blue) to its last (large, orange). Upwards is learning; "
    )
    note += "leftwards is spent entropy."
    return Panel(
        "phase", "What did reward cost in entropy?", note, [Figure("Reward against entropy", traces, look, True)]
    )


def _range(traces: Sequence[Trace], axis: str) -> list[float]:
    """The span of the paths and a margin: labels that stand outside would widen it on a narrow page."""
    values = [value for trace in traces for value in trace[axis]]
    margin = 0.1 * (max(values) - min(values)) or 0.1
    return [min(values) - margin, max(values) + margin]


def knob(runs: Sequence[Run]) -> Panel | None:
    """The knob, a figure for every kind of knob, and where it stood at a bound."""
    figures = []
    names = dict.fromkeys(str(run.header["recipe"].get("knob") or "knob") for run in runs)
    for name in names:
        mine = [run for run in runs if str(run.header["recipe"].get("knob") or "knob") == name]
        traces = [trace for run in mine for trace in _knob(run, len(runs))]
        if traces:
            figures.append(Figure(f"Knob: {name}", traces, step_layout(mine), len(names) == 1))
    figures += collect(
        runs,
        ("predict/knob", "What it adds to entropy, predicted, nats a token a step"),
        ("predict/gain", "Predicted change by a unit of the knob, nats a token a step"),
    )
    if not figures:
        return None
    shares = [(run, run.column("knob/saturated")[1]) for run in runs]
    at = [f"{run.label}: {sum(v) / len(v):.0%}" for run, v in shares if v]
    note = "What the controller turned at each step. Crosses: steps at which it stood at a bound and could do no more."
    note += f" Steps at a bound: {'; '.join(at)}." if at else ""
    return Panel("knob", "How hard did the controller have to work?", note, figures)


def _knob(run: Run, num_runs: int) -> list[Trace]:
    x, y = run.column("knob/value")
    if not x:
        return []
    bound = [(r["step"], r["knob/value"]) for r in run.rows_with("knob/value", "knob/saturated") if r["knob/saturated"]]
    traces = [line(run, x, y, line={"width": 1.5})]
    if bound:
        stay, value = thin([a for a, _ in bound], [b for _, b in bound], 400)
        colour = "@ink" if num_runs == 1 else run.colour
        cross = {"symbol": "x-thin-open", "size": 7, "color": colour, "line": {"width": 1.5, "color": colour}}
        traces.append(line(run, stay, value) | {"mode": "markers", "marker": cross, "hovertemplate": "at a bound"})
        traces[-1]["name"] = plain(f"{run.label}, at a bound")
    return traces
