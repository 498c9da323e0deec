"""The lines of a figure as plain SVG, in the place where plotly will draw it once its script has been read."""

from __future__ import annotations

from .figures import Figure, thin
from .html import Html, el
from .runs import is_number

_POINTS = 400
_WIDTH, _HEIGHT = 1000, 400


def sketch(figure: Figure) -> Html:
    """Every line of the figure, without axes.

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
