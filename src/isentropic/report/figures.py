"""Figures as plain plotly JSON: one quantity a figure, colour and dash by run, and colours that follow the theme.

A string that begins with ``@`` is a colour of the page's theme (``@ink``, ``@muted``, ``@grid``, ``@band``), filled in
when the figure is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..runs.labels import METRICS
from ..runs.record import is_number
from .html import Html, el, visible
from .runs import Run

Trace = dict[str, Any]
MAX_POINTS = 2000
BAND = 0.05  # share of the target
SURPRISED = 4.0  # nats at which a token is shaded in full
_RAW = 4  # runs up to which the unsmoothed line is drawn too
_POINTS, _WIDTH, _HEIGHT = 400, 1000, 400  # of a sketch


class Figure(NamedTuple):
    """A caption and plotly's traces and layout; ``wide`` takes the whole row."""

    caption: str
    traces: list[Trace]
    layout: dict[str, Any]
    wide: bool = False


class Panel(NamedTuple):
    """A question, how to read its answer, and the answer: figures, then markup."""

    id: str
    question: str
    note: str
    figures: list[Figure]
    body: Html = Html("")


def rounded(values: Sequence[float]) -> list[float]:
    """Values to five digits: a screen resolves no more."""
    return [float(f"{value:.5g}") if isinstance(value, float) else value for value in values]


def thin(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most about ``limit`` points: the lowest and the highest of every stretch, so that no spike is lost.

    Example:
        >>> thin(range(8), [0, 9, 0, 0, 0, 0, -9, 0], limit=4)
        ([0, 1, 4, 6], [0, 9, 0, -9])
    """
    if len(x) <= limit:
        return list(x), list(y)
    size = math.ceil(len(x) / (limit // 2))
    kept: list[int] = []
    for start in range(0, len(x), size):
        span = range(start, min(start + size, len(x)))
        kept += sorted({min(span, key=y.__getitem__), max(span, key=y.__getitem__)})
    return [x[i] for i in kept], [y[i] for i in kept]


def smooth(values: Sequence[float], share: float = 0.1) -> list[float]:
    """An exponential mean, without bias at its start.

    Example:
        >>> smooth([1.0, 1.0, 1.0])
        [1.0, 1.0, 1.0]
    """
    level = weight = 0.0
    means = []
    for value in values:
        level += share * (value - level)
        weight += share * (1 - weight)
        means.append(level / weight)
    return means


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def unit(values: Iterable[float]) -> tuple[float, str]:
    """What to multiply small values by, so that an axis needs no exponents, and how to write the unit of the product.

    Args:
        values: of one axis.

    Returns:
        A factor, and what stands before the name of the unit; 1 and nothing if the largest is 0.01 or more.

    Example:
        >>> unit([0.5, 2e-5]), unit([2e-5, -4e-5]), unit([])
        ((1.0, ''), (1000000.0, '10⁻⁶ '), (1.0, ''))
    """
    largest = max((abs(value) for value in values if is_number(value)), default=0.0)
    if not 0 < largest < 0.01:
        return 1.0, ""
    power = -3 * math.floor(math.log10(largest) / 3)
    return 10.0**power, f"10{str(-power).translate(_SUPERSCRIPTS)} "


def readable(figure: Figure, axis: str = "y") -> Figure:
    """A figure of small quantities with an axis without exponents: values in thousandths, say, and the caption says so.

    Args:
        figure: whose caption, and title of the axis if it has one, hold the word ``nats`` for the unit.
        axis: along which the quantity lies.
    """
    factor, prefix = unit(value for trace in figure.traces for value in trace[axis])
    if not prefix:
        return figure
    scaled = [{**trace, axis: rounded([value * factor for value in trace[axis]])} for trace in figure.traces]
    return figure._replace(traces=scaled, caption=figure.caption.replace("nats", f"{prefix}nats", 1))


def shade(nats: float) -> float:
    """How strongly a token is shaded by its surprisal, from 0 to 1.

    Example:
        >>> shade(1.0), shade(9.0)
        (0.25, 1.0)
    """
    return min(max(nats / SURPRISED, 0.0), 1.0)


def budget(runs: Sequence[Run]) -> int:
    """Points a line: fewer if there are many runs, so that the page stays small."""
    return max(200, MAX_POINTS // max(1, len(runs) // 3))


def line(run: Run, x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS, **more: Any) -> Trace:
    """A line in the colour and dash of its run.

    Args:
        run: whose line it is.
        x, y: as many of each.
        limit: points, about.
        more: further fields of plotly's trace; ``line`` is added to the style of the run.

    Returns:
        A trace of plotly.
    """
    x, y = thin(x, y, limit)
    style = {"color": run.colour, "dash": run.dash, "width": 2, **more.pop("line", {})}
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plain(run.label),
        "x": list(x),
        "y": rounded(y),
        "line": style,
        "meta": {"run": run.label},
        **more,
    }


def over_steps(runs: Sequence[Run], name: str, **axis: Any) -> Figure | None:
    """A metric against step, a line per run, smoothed if it is long; None if no run has it.

    Args:
        runs: in order of the page.
        name: a field of metrics.jsonl with a caption in ``METRICS``.
        axis: further settings of plotly's y axis.
    """
    traces: list[Trace] = []
    for run in runs:
        x, y = run.column(name)
        if not x:
            continue
        if len(x) < 30:
            traces.append(line(run, x, y, budget(runs)))
        elif len(runs) <= _RAW:
            traces.append(line(run, x, y, budget(runs), opacity=0.35, line={"width": 1, "dash": "solid"}))
            traces.append(line(run, x, smooth(y), budget(runs), hoverinfo="skip"))
        else:
            traces.append(line(run, x, smooth(y), budget(runs)))
    if not traces:
        return None
    if METRICS[name].startswith("Share"):
        axis |= {"tickformat": ".2~%"}
    return readable(Figure(METRICS[name], traces, step_layout(runs, yaxis=axis)))


def collect(runs: Sequence[Run], *names: str, **axis: Any) -> list[Figure]:
    """A figure for each of these metrics that a run has."""
    figures = [over_steps(runs, name, **axis) for name in names]
    return [figure for figure in figures if figure is not None]


def marks(runs: Sequence[Run]) -> dict[str, Any]:
    """Lines and names at the steps at which a run's task changes."""
    switches = dict.fromkeys((step, task) for run in runs for step, task in run.switches())
    shapes = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": step - 0.5, "x1": step - 0.5, "y0": 0, "y1": 1}
        | {"line": {"color": "@ink", "width": 1, "dash": "dot"}}
        for step, _ in switches
    ]
    notes = [
        {"xref": "x", "yref": "paper", "x": step - 0.5, "y": 1, "xanchor": "left", "yanchor": "top", "xshift": 3}
        | {"text": plain(f"switch to {task}"), "showarrow": False, "font": {"size": 11, "color": "@ink"}}
        for step, task in switches
    ]
    return {"shapes": shapes, "annotations": notes}


def plain(text: str) -> str:
    """Text for plotly, which interprets a few tags in labels: none is left.

    Example:
        >>> plain("<b>x</b>")
        '&lt;b&gt;x&lt;/b&gt;'
    """
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def step_layout(runs: Sequence[Run], **more: Any) -> dict[str, Any]:
    """The layout of a figure over optimizer steps."""
    last = max((run.metrics[-1]["step"] for run in runs if run.metrics), default=1)
    axis = {"title": {"text": "optimizer step"}, "range": [0, last]}
    return layout(xaxis=axis, hovermode="x unified", **marks(runs), **more)


def layout(**more: Any) -> dict[str, Any]:
    """The layout that figures share: plain axes, no title (the page has it), colours of the theme.

    Args:
        more: plotly's fields, which are merged into these.

    Example:
        >>> layout(yaxis={"range": [0, 1]})["yaxis"]["range"]
        [0, 1]
    """
    plain_axis = {
        "gridcolor": "@grid",
        "zerolinecolor": "@grid",
        "linecolor": "@muted",
        "automargin": True,
        "exponentformat": "power",
    }
    base: dict[str, Any] = {
        "margin": {"l": 44, "r": 18, "t": 8, "b": 36},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "@ink"},
        "hoverlabel": {"bgcolor": "@card", "bordercolor": "@muted", "font": {"color": "@ink"}, "namelength": 40},
        "showlegend": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
        "xaxis": plain_axis,
        "yaxis": plain_axis,
        "hovermode": "closest",
        "dragmode": "zoom",
        "uirevision": "kept",
    }
    for axis in ("xaxis", "yaxis"):
        title = more.get(axis, {}).get("title")
        more |= {axis: more[axis] | {"title": title | {"font": {"size": 12}}}} if title else {}
    for key, value in more.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) and isinstance(value, dict) else value
    return base


def sketch(figure: Figure) -> Html:
    """Every line of the figure as plain SVG, without axes, for the time until plotly has been read and draws it.

    Example:
        >>> line = {"x": [0, 1], "y": [1.0, 3.0], "line": {"color": "@c0", "width": 2}}
        >>> sketch(Figure("", [line], {"xaxis": {"range": [0, 2]}, "yaxis": {"rangemode": "tozero"}}))
        '<svg ...><polyline points="0,273 500,19" fill="none" stroke="var(--c0)" ...></polyline></svg>'
    """
    lines = [trace for trace in figure.traces if trace.get("line", {}).get("width") and len(trace["x"]) > 1]
    values = [value for trace in lines for value in trace["y"] if is_number(value)]
    if not values:
        return Html("")
    floor = 0.0 if figure.layout["yaxis"].get("rangemode") == "tozero" else min(values)
    margin = 0.05 * (max(values) - floor) or 1.0
    low, high = floor if floor == 0 else floor - margin, max(values) + margin
    first, last = figure.layout["xaxis"]["range"]
    polylines = []
    for trace in lines:
        known = [(x, y) for x, y in zip(trace["x"], trace["y"], strict=True) if is_number(y)]
        points = " ".join(
            f"{(x - first) / ((last - first) or 1) * _WIDTH:.0f},{(high - y) / (high - low) * _HEIGHT:.0f}"
            for x, y in zip(*thin([x for x, _ in known], [y for _, y in known], _POINTS), strict=True)
        )
        look = {"stroke": f"var(--{trace['line']['color'][1:]})", "stroke_width": trace["line"]["width"]}
        look["stroke_dasharray"] = None if trace["line"].get("dash", "solid") == "solid" else "4 3"
        polylines.append(
            el(
                "polyline",
                points=points,
                fill="none",
                **look,
                opacity=trace.get("opacity"),
                vector_effect="non-scaling-stroke",
            )
        )
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    return el("svg", polylines, viewBox=box, preserveAspectRatio="none", class_="sketch", aria_hidden="true")
