"""Panels on why entropy moved: prediction against measurement, attribution, clips, and cov(A, log π)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .figures import Figure, Panel, Trace, collect, layout, line, plain, rounded, smooth, step_layout
from .html import Html, el, number, table
from .runs import Run, is_number

FORMS = {
    "predict/change": "exact form",
    "predict/change_simple": "without moments",
    "predict/change_natural": "of a natural-gradient step",
}
# Name, meaning, colour and hatch; the first four and the bonus sum to the predicted change.
QUADRANTS = {
    "predict/likely_up": ("likely tokens, pushed up", "@c0", ""),
    "predict/rare_down": ("rare tokens, pushed down", "@c4", "/"),
    "predict/rare_up": ("rare tokens, pushed up", "@c5", "x"),
    "predict/likely_down": ("likely tokens, pushed down", "@c1", "\\"),
    "predict/bonus": ("entropy term", "@c2", "."),
}
SIGNS = {"predict/positive": "A > 0", "predict/negative": "A < 0", "predict/neutral": "A = 0"}
CLIPS = {
    "predict/unclipped": "not clipped",
    "predict/clipped_low": "clipped low",
    "predict/clipped_high": "clipped high",
    "predict/removed_low": "removed by the lower bound",
    "predict/removed_high": "removed by the upper bound",
}
EIGHTHS = {f"predict/position_{i}": f"{i}/8" for i in range(1, 9)}
_BINS = 25
_WINDOW = 10  # steps
_TOP = 12


class Fit(NamedTuple):
    """Measured on predicted changes through the origin, and how many pairs there were."""

    slope: float
    error: float
    correlation: float
    pairs: int


def pairs(run: Run, name: str) -> list[tuple[float, float]]:
    """Predicted and measured change of every step where both are known: H(t+1) − H(t) follows step t's update."""
    known = {row["step"]: row for row in run.rows_with("entropy/mean")}
    return [
        (row[name], known[row["step"] + 1]["entropy/mean"] - row["entropy/mean"])
        for row in run.rows_with("entropy/mean", name)
        if row["step"] + 1 in known
    ]


def fit(found: Sequence[tuple[float, float]]) -> Fit | None:
    """Least squares through the origin; None below three pairs or where no change was predicted.

    Example:
        >>> fit([(1.0, 2.0), (2.0, 4.0), (-1.0, -2.0)])
        Fit(slope=2.0, error=0.0, correlation=1.0, pairs=3)
    """
    square = sum(x * x for x, _ in found)
    if len(found) < 3 or square == 0:
        return None
    slope = sum(x * y for x, y in found) / square
    error = math.sqrt(sum((y - slope * x) ** 2 for x, y in found) / (len(found) - 1) / square)
    mx, my = (sum(column) / len(found) for column in zip(*found, strict=True))
    spread = math.sqrt(sum((x - mx) ** 2 for x, _ in found) * sum((y - my) ** 2 for _, y in found))
    correlation = sum((x - mx) * (y - my) for x, y in found) / spread if spread else 0.0
    return Fit(slope, error, round(correlation, 12), len(found))


def windows(found: Sequence[tuple[float, float]], size: int = _WINDOW) -> list[tuple[float, float]]:
    """Means of neighbouring pairs: the noise of single readings nearly cancels between one step and the next.

    Example:
        >>> windows([(1.0, 3.0), (3.0, 5.0), (9.0, 9.0)], size=2)
        [(2.0, 4.0)]
    """
    starts = range(0, len(found) - size + 1, size)
    return [(_mean_of(found[i : i + size], 0), _mean_of(found[i : i + size], 1)) for i in starts]


def _mean_of(found: Sequence[tuple[float, float]], place: int) -> float:
    return sum(pair[place] for pair in found) / len(found)


def predicted(runs: Sequence[Run]) -> Panel | None:
    """Predicted against measured change of entropy: summed over the run, and step by step."""
    fits = [(run, fit(pairs(run, "predict/change"))) for run in runs]
    mine = [(run, found) for run, found in fits if found is not None]
    if not mine:
        return None
    sums = [trace for run, found in mine for trace in _sums(run, found.slope)]
    shown = [run for run, _ in mine]
    note = (
        "Predictions are first order in the logits, at the learning rate; how much farther the optimizer moves the "
        "logits is the calibration slope: of measured on predicted changes of single steps, through the origin, with "
        "its standard error. Change since the start: measured (solid, smoothed), and predictions added up and scaled "
        "by the slope (dotted), each standing for the steps until the next. Single steps: averaged over neighbours in "
        "size, since one reading is noisy; the line has the slope."
    )
    figures = [
        Figure("Change of entropy since the start, nats a token", sums, step_layout(shown)),
        _scatter(mine),
    ]
    return Panel("predicted", "Was the change of entropy foreseen?", note, figures, _calibration(shown))


def _calibration(runs: Sequence[Run]) -> Html:
    """Slope and correlations: of every form for one run, of the main one for several."""
    rows = []
    for run in runs:
        for name, form in FORMS.items() if len(runs) == 1 else [("predict/change", FORMS["predict/change"])]:
            found, smoothed = fit(pairs(run, name)), fit(windows(pairs(run, name)))
            if found is not None:
                slope = f"{number(found.slope)} ± {number(found.error)}"
                over = f"{smoothed.correlation:.2f}" if smoothed else "–"
                rows.append([run.label, form, slope, f"{found.correlation:.2f}", over, found.pairs])
    head = ["run", "prediction", "calibration slope", "correlation", f"over windows of {_WINDOW}", "steps"]
    return table(head, rows, class_="cards")


def _sums(run: Run, slope: float) -> list[Trace]:
    x, entropy = run.column("entropy/mean")
    level = smooth(entropy)
    steps, change = run.column("predict/change")
    total = [level[x.index(steps[0])] - entropy[0] if steps[0] in x else 0.0]
    for i, value in enumerate(change[:-1]):
        total.append(total[-1] + slope * value * (steps[i + 1] - steps[i]))
    measured, added = (plain(f"{run.label}, {word}") for word in ("measured", "predicted × slope"))
    return [
        line(run, x, [v - entropy[0] for v in level], line={"dash": "solid"}) | {"name": measured},
        line(run, steps, total, line={"dash": "dot"}) | {"name": added},
    ]


def _scatter(fits: Sequence[tuple[Run, Fit]]) -> Figure:
    traces: list[Trace] = []
    for run, found in fits:
        known = sorted(pairs(run, "predict/change"))
        size = max(1, math.ceil(len(known) / _BINS))
        bins = [known[i : i + size] for i in range(0, len(known), size)]
        x, y = ([_mean_of(b, place) for b in bins] for place in (0, 1))
        error = [_error_of_mean([pair[1] for pair in b]) for b in bins]
        bars = {"type": "data", "array": rounded(error), "thickness": 1, "width": 0, "color": run.colour}
        dots = {"symbol": run.symbol, "size": 7, "color": run.colour}
        traces.append(line(run, rounded(x), y) | {"mode": "markers", "marker": dots, "error_y": bars})
        traces[-1]["hovertemplate"] = "predicted %{x:.2e}<br>measured %{y:.2e}"
        style = {"width": 1.5, "dash": "solid"}
        ends = rounded([x[0], x[-1]])
        traces.append(line(run, ends, [found.slope * v for v in ends], line=style, hoverinfo="skip", opacity=0.6))
    look = layout(
        xaxis={"title": {"text": "predicted change"}, "nticks": 6},
        yaxis={"title": {"text": "measured change"}},
    )
    return Figure("Changes of single steps, nats a token", traces, look)


def _error_of_mean(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def quadrants(runs: Sequence[Run]) -> Panel | None:
    """The predicted change split by likely or rare and up or down: over time for one run, in sum for several."""
    mine = [run for run in runs if any(run.column(name)[0] for name in QUADRANTS)]
    if not mine:
        return None
    figures = [_over_time(mine[0])] if len(mine) == 1 else [_in_sum(mine)]
    note = (
        "Likely: surprisal below the entropy of its place; up: training raises its probability. A likely token pushed "
        "up and a rare one pushed down lower entropy; the other two raise it. Bars add up to the predicted change."
    )
    return Panel("quadrants", "Which tokens move entropy?", note, figures, _top_tokens(mine))


def _over_time(run: Run) -> Figure:
    rows = [row for row in run.metrics if any(is_number(row.get(name)) for name in QUADRANTS)]
    size = max(1, math.ceil(len(rows) / _BINS))
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    x = [sum(row["step"] for row in group) / len(group) for group in groups]
    traces: list[Trace] = []
    for name, (meaning, colour, hatch) in QUADRANTS.items():
        y = [_mean(row.get(name) for row in group) for group in groups]
        if any(y):
            traces.append(_bar(meaning, colour, hatch) | {"x": rounded(x), "y": rounded([v or 0.0 for v in y])})
    change = [_mean(row.get("predict/change") for row in group) for group in groups]
    if any(value is not None for value in change):
        total = {
            "type": "scatter",
            "mode": "lines",
            "name": "sum",
            "x": rounded(x),
            "y": rounded([v or 0.0 for v in change]),
        }
        traces.append(total | {"line": {"color": "@ink", "width": 2}})
    look = step_layout([run], barmode="relative", bargap=0.1, showlegend=True)
    return Figure("Predicted change a step, nats a token", traces, look, True)


def _in_sum(runs: Sequence[Run]) -> Figure:
    traces: list[Trace] = []
    for name, (meaning, colour, hatch) in QUADRANTS.items():
        sums = [_mean(run.column(name)[1]) for run in runs]
        if any(sums):
            bar = {"orientation": "h", "y": [plain(r.label) for r in runs], "x": rounded([v or 0.0 for v in sums])}
            traces.append(_bar(meaning, colour, hatch) | bar)
    look = layout(barmode="relative", showlegend=True, yaxis={"autorange": "reversed"}, hovermode="y unified")
    look["xaxis"] = {**look["xaxis"], "nticks": 6}
    return Figure("Mean predicted change a step, nats a token", traces, look, True)


def _bar(name: str, colour: str, hatch: str) -> Trace:
    pattern = {"shape": hatch, "solidity": 0.25, "fgcolor": "@card", "fillmode": "overlay"}
    return {"type": "bar", "name": name, "marker": {"color": colour, "pattern": pattern, "line": {"width": 0}}}


def _mean(values: object) -> float | None:
    known = [value for value in values if is_number(value)]  # type: ignore[attr-defined]
    return sum(known) / len(known) if known else None


def _top_tokens(runs: Sequence[Run]) -> Html:
    """The tokens that moved entropy most, over the whole run."""
    tables = []
    for run in runs:
        sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row in run.metrics:
            for entry in row.get("predict/top_tokens") or []:
                if isinstance(entry, list) and len(entry) == 3 and is_number(entry[1]) and is_number(entry[2]):
                    sums[str(entry[0])][0] += entry[1]
                    sums[str(entry[0])][1] += entry[2]
        top = sorted(sums.items(), key=lambda item: -abs(item[1][0]))[:_TOP]
        if top:
            rows = [
                [el("code", repr(token)), f"{change:+.2e}".replace("-", "−"), int(count)]
                for token, (change, count) in top
            ]
            shown = table(["token", "predicted change in sum", "times"], rows)
            tables.append(el("details", el("summary", f"Single tokens that moved it most: {run.label}"), shown))
    return Html("".join(tables))


def where(runs: Sequence[Run]) -> Panel | None:
    """The predicted change by the sample's sign and by the place in the answer."""
    figures = [
        _by_class(runs, EIGHTHS, "By place in the answer: first to last eighth"),
        _by_class(runs, SIGNS, "By the sign of the sample's advantage"),
    ]
    found = [figure for figure in figures if figure is not None]
    if not found:
        return None
    note = "Mean predicted change of entropy a step, nats a token; above zero it raises entropy."
    return Panel("where", "Which samples, and where in the answer?", note, found)


def _by_class(runs: Sequence[Run], names: Mapping[str, str], caption: str, across: bool = False) -> Figure | None:
    traces: list[Trace] = []
    hatches = ("", "/", "x", ".", "\\", "+")
    for run in runs:
        means = {label: _mean(run.column(name)[1]) for name, label in names.items()}
        y = [value for value in means.values() if value is not None]
        if y:
            x = [label for label, value in means.items() if value is not None]
            bar = _bar(plain(run.label), run.colour, hatches[run.group % len(hatches)])
            ends = {"x": rounded(y), "y": x, "orientation": "h"} if across else {"x": x, "y": rounded(y)}
            traces.append(bar | ends | {"meta": {"run": run.label}})
    if not traces:
        return None
    names_at, values_at = ("yaxis", "xaxis") if across else ("xaxis", "yaxis")
    look = layout(barmode="group", hovermode="y unified" if across else "x unified")
    # A name such as 1/8 would be read as a date.
    look[names_at] = {**look[names_at], "type": "category", "autorange": "reversed" if across else True}
    look[values_at] = {**look[values_at], "nticks": 4 if across else 6}
    return Figure(caption, traces, look)


def clip(runs: Sequence[Run]) -> Panel | None:
    """How many tokens the clip bounds, and what that does to entropy."""
    figures = collect(
        runs,
        ("clip/low_frac", "Share of tokens stopped by the lower bound (A < 0)"),
        ("clip/high_frac", "Share of tokens stopped by the upper bound (A > 0)"),
        ("ratio/outside_frac", "Share of ratios outside the bounds"),
        ("theorem2/violated_frac", "Share of places outside the entropy bounds of Theorem 2"),
        rangemode="tozero",
    )
    moved = _by_class(runs, CLIPS, "Predicted change of entropy by clip state, nats a token a step", across=True)
    if moved is not None:
        figures.append(moved)
    if not figures:
        return None
    note = (
        "The lower bound stops tokens of wrong answers from being pushed further down, the upper one those of right "
        "answers from rising further."
    )
    return Panel("clip", "Who is clipped?", note, figures)


def covariance(runs: Sequence[Run]) -> Panel | None:
    """cov(A, log π): the driver of entropy's fall."""
    figures = collect(runs, ("cov/adv_logp", "cov(A, log π), nats"))
    if not figures:
        return None
    note = "Above zero the tokens that are rewarded are those already likely: training then lowers entropy."
    return Panel("cov", "Does reward favour what is likely already?", note, [figures[0]._replace(wide=True)])
