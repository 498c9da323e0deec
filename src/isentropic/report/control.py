"""Panels on what was controlled: entropy and reward, their path, and the knob."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..control.targets import parse_level
from ..runs.moves import phase_lines
from ..runs.summary import SETTLED
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
# Offsets of the name of a path from its end, in pixels; they differ, since paths may end at the same place.
_ARROWS = ((50, -24), (-50, -24), (60, 8), (-60, 8), (50, 34), (-50, 34))
# Blue to orange over grey: colour-blind eyes can distinguish its ends, and it is visible on white and on black.
_SCALE = [[0, "#2f7fd1"], [0.5, "#9a8f9a"], [1, "#e69f00"]]


def hold(runs: Sequence[Run]) -> Panel | None:
    """Entropy with its target band, and reward."""
    entropy = over_steps(runs, "entropy/mean", rangemode="tozero")
    rewards = collect(runs, "reward/mean")
    if entropy is None:
        return Panel("hold", "Does reward rise?", _note(runs, False), rewards) if rewards else None
    targets = [trace for run in _first_of_groups(runs) for trace in _target(run, len(runs))]
    question = "Does entropy hold, and does reward rise?" if targets else "Where do entropy and reward go?"
    figure = Figure(entropy.caption, _once(targets) + entropy.traces, entropy.layout)
    note = _note(runs, bool(targets))
    if targets and any(map(_floor, runs)):
        note += " An automatic target or a floor is held from below: entropy above it is left alone."
    if len(runs) == 1 and (found := phase_lines(runs[0].metrics)):
        note += f" Why it moved: {'; '.join(found)}."
    return Panel("hold", question, note, [figure, *rewards])


def _note(runs: Sequence[Run], target: bool) -> str:
    note = "Thick: smoothed; thin: every step." if len(runs) <= 4 else "Smoothed over about ten steps."
    if target:
        note += f" Dotted: the target; shaded: its band, or {BAND:.0%} on either side of a single level."
    return note


def _first_of_groups(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.member == 0]


def _floor(run: Run) -> bool:
    """Whether the run's target works one way."""
    recipe = run.header["recipe"]
    text = str(recipe.get("target"))
    both = "settle=" in text or recipe.get("knob_low") is not None
    return text.split(":")[0] in ("auto", "floor") and not both


def _once(traces: list[Trace]) -> list[Trace]:
    """Traces without those that repeat another: runs with the same target need it drawn once."""
    by_look: dict[Any, Trace] = {}
    for trace in traces:
        by_look.setdefault((trace["y"][0], trace["y"][-1], trace.get("fill"), trace["line"]["width"]), trace)
    return list(by_look.values())


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
        line(run, x, y, line=style) | {"name": plain(label), **_reasons(run)},
    ]


def _reasons(run: Run) -> dict[str, Any]:
    """Why an automatic target was where it was, shown where one points at it."""
    why = [row.get("entropy/target_why", "") for row in run.rows_with("entropy/target")]
    return {"text": [plain(text) for text in why], "hovertemplate": "%{y:.3f}<br>%{text}"} if any(why) else {}


def _edges(run: Run) -> tuple[list[float], list[float]] | None:
    """The edges of a target that is itself a band; levels by share need the first entropy that was read."""
    kind, *levels = str(run.header["recipe"].get("target")).split(":")
    x, start = len(run.column("entropy/target")[0]), run.column("entropy/mean")[1]
    if kind != "band" or len(levels) != 2 or not start:
        return None
    low, high = (level.amount * (start[0] if level.of_initial else 1.0) for level in map(parse_level, levels))
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
        xaxis={"title": {"text": "entropy, nats per token"}, "range": _range(traces, "x")},
        yaxis={"title": {"text": "mean reward"}, "range": _range(traces, "y")},
        coloraxis={"colorscale": _SCALE, "cmin": 1, "cmax": last, "colorbar": bar},
        annotations=[note | {"arrowcolor": "@muted", "font": {"size": 11}} for note in notes],
    )
    note = "One path per run, smoothed, from its first step (large, blue) to its last (large, orange). "
    note += "Upwards is learning; leftwards is spent entropy."
    figure = Figure("Reward against entropy", traces, look, True)
    return Panel("phase", "What did reward cost in entropy?", note, [figure])


def _range(traces: Sequence[Trace], axis: str) -> list[float]:
    """The span of the paths and a margin: labels outside of it would widen it on a narrow page."""
    values = [value for trace in traces for value in trace[axis]]
    margin = 0.1 * (max(values) - min(values)) or 0.1
    return [min(values) - margin, max(values) + margin]


def knob(runs: Sequence[Run]) -> Panel | None:
    """The knob, a figure for every kind of knob, and the steps at which it was at a bound."""
    figures = []
    by_knob: dict[str, list[Run]] = {}
    for run in runs:
        by_knob.setdefault(str(run.header["recipe"].get("knob") or "knob"), []).append(run)
    for name, with_knob in by_knob.items():
        traces = [trace for run in with_knob for trace in _knob(run, len(runs))]
        if traces:
            figures.append(Figure(f"Knob: {name}", traces, step_layout(with_knob), len(by_knob) == 1))
    figures += collect(runs, "predict/knob", "predict/gain")
    if not figures:
        return None
    shares = [(run, run.summary["knob/saturated"]) for run in runs]
    at = [f"{run.label}: {share:.0%}" for run, share in shares if share is not None]
    note = "What the controller set at each step. Crosses: steps at which it was at a bound and could do no more."
    note += f" Share of steps at a bound after step {SETTLED}: {'; '.join(at)}." if at else ""
    return Panel("knob", "How hard did the controller have to work?", note, figures)


def _knob(run: Run, num_runs: int) -> list[Trace]:
    x, y = run.column("knob/value")
    if not x:
        return []
    bound = [(r["step"], r["knob/value"]) for r in run.rows_with("knob/value", "knob/saturated") if r["knob/saturated"]]
    traces = [line(run, x, y, line={"width": 1.5})]
    if bound:
        steps, values = thin([a for a, _ in bound], [b for _, b in bound], 400)
        colour = "@ink" if num_runs == 1 else run.colour
        cross = {"symbol": "x-thin-open", "size": 7, "color": colour, "line": {"width": 1.5, "color": colour}}
        traces.append(line(run, steps, values) | {"mode": "markers", "marker": cross, "hovertemplate": "at a bound"})
        traces[-1]["name"] = plain(f"{run.label}, at a bound")
    return traces
