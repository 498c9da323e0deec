"""Panels on why entropy moved: prediction against measurement, attribution, clips, and cov(A, log π)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

from ..runs.calibration import BLOCK, Calibration, block_changes, calibrate, distrust
from ..runs.explain import top_tokens
from ..runs.labels import CLIP_STATES, FORMS, POSITIONS, QUADRANTS, SIGNS
from ..runs.record import is_number
from .figures import Figure, Panel, Trace, collect, layout, line, plain, readable, rounded, smooth, step_layout, unit
from .html import Html, el, table
from .runs import Run

# Colour and hatch of each quadrant, in the order of the bars; they and the bonus sum to the predicted change.
_LOOKS = {
    "likely_up": ("@c0", ""),
    "rare_down": ("@c4", "/"),
    "rare_up": ("@c5", "x"),
    "likely_down": ("@c1", "\\"),
    "bonus": ("@c2", "."),
}
_HATCHES = ("", "/", "x", ".", "\\", "+")  # of recipes side by side
_BINS = 25
_LABEL_WIDTH = 22  # characters


def predicted(runs: Sequence[Run]) -> Panel | None:
    """Predicted against measured change of entropy: added up over the run, and from block to block."""
    fits = [(run, calibration) for run in runs if (calibration := calibrate(run.metrics)) is not None]
    if not fits:
        return None
    calibrated = [run for run, _ in fits]
    sums = [trace for run, calibration in fits for trace in _sums(run, calibration)]
    note = (
        "Predictions are first order in the logits, at the learning rate; how much further the optimizer moves the "
        f"logits is the calibration slope: of measured on predicted changes from one block of {BLOCK} steps to the "
        "next, by least squares. The drift is what entropy moves beside it. Change since the start: measured (solid, "
        "smoothed), and predictions times slope plus drift, added up (dotted), each prediction counting for the steps "
        "until the next. Changes per step, between blocks: a mark for each pair of neighbours, and the line of the fit."
    )
    figures = [
        Figure("Change of entropy since the start, nats per token", sums, step_layout(calibrated)),
        _scatter(fits),
    ]
    return Panel("predicted", "Was the change of entropy predicted?", note, figures, _calibrations(calibrated))


def _doubts(runs: Sequence[Run]) -> str:
    """A warning before the attribution of runs whose predictions are not to be trusted."""
    doubts = [f"{run.label}: {doubt}" for run in runs if (doubt := distrust(calibrate(run.metrics))) is not None]
    return f"Do not trust the attribution of {'; '.join(doubts)}. " if doubts else ""


def _calibrations(runs: Sequence[Run]) -> Html:
    """Slope, drift and correlation, as `isentropic explain` has them; of every form for a single run."""
    rows = []
    for run in runs:
        for form in FORMS if len(runs) == 1 else ("change",):
            calibration = calibrate(run.metrics, f"predict/{form}")
            if calibration is not None:
                drift, correlation = f"{1000 * calibration.drift:+.2f}", f"{calibration.correlation:.2f}"
                figures = map(_minus, (calibration.factor, drift, correlation))
                rows.append([run.label, FORMS[form], *figures, calibration.blocks])
    head = ["run", "prediction", "slope", "drift per step, 10⁻³ nats", "correlation", "pairs of blocks"]
    return table(head, rows, class_="cards")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _sums(run: Run, calibration: Calibration) -> list[Trace]:
    x, entropy = run.column("entropy/mean")
    level = smooth(entropy)
    steps, change = run.column("predict/change")
    total = [level[x.index(steps[0])] - entropy[0] if steps[0] in x else 0.0]
    for i, value in enumerate(change[:-1]):
        total.append(total[-1] + (calibration.slope * value + calibration.drift) * (steps[i + 1] - steps[i]))
    measured, added = (plain(f"{run.label}, {word}") for word in ("measured", "predicted × slope + drift"))
    return [
        line(run, x, [v - entropy[0] for v in level], line={"dash": "solid"}) | {"name": measured},
        line(run, steps, total, line={"dash": "dot"}) | {"name": added},
    ]


def _scatter(fits: Sequence[tuple[Run, Calibration]]) -> Figure:
    traces: list[Trace] = []
    for run, calibration in fits:
        x, y = zip(*sorted((p / BLOCK, m / BLOCK) for p, m in block_changes(run.metrics)), strict=True)
        dots = {"symbol": run.symbol, "size": 7, "color": run.colour}
        traces.append(line(run, x, y) | {"mode": "markers", "marker": dots})
        traces[-1] |= {"x": rounded(traces[-1]["x"]), "hovertemplate": "predicted %{x:.3g}<br>measured %{y:.3g}"}
        ends = rounded([x[0], x[-1]])
        fitted = [calibration.slope * v + calibration.drift for v in ends]
        style = {"width": 1.5, "dash": "solid"}
        traces.append(line(run, ends, fitted, line=style, hoverinfo="skip", opacity=0.6))
    titles = {}
    for axis, word in (("x", "predicted"), ("y", "measured")):
        factor, prefix = unit(value for trace in traces for value in trace[axis])
        titles[axis] = f"{word}, {prefix}nats per token"
        traces = [{**trace, axis: rounded([value * factor for value in trace[axis]])} for trace in traces]
    look = layout(xaxis={"title": {"text": titles["x"]}, "nticks": 6}, yaxis={"title": {"text": titles["y"]}})
    return Figure(f"Change of entropy per step, from one block of {BLOCK} steps to the next", traces, look)


def quadrants(runs: Sequence[Run]) -> Panel | None:
    """The predicted change split by likely or rare and up or down: over time for one run, on average for several."""
    split = [run for run in runs if any(run.column(f"predict/{name}")[0] for name in QUADRANTS)]
    if not split:
        return None
    figures = [_over_time(split[0])] if len(split) == 1 else [_on_average(split)]
    note = (
        "Likely: surprisal below the entropy of its row; up: training raises its probability. A likely token pushed "
        "up and a rare one pushed down lower entropy; the other two raise it. Bars add up to the predicted change."
    )
    return Panel("quadrants", "Which tokens move entropy?", _doubts(split) + note, figures, _top_tokens(split))


def _over_time(run: Run) -> Figure:
    rows = [row for row in run.metrics if any(is_number(row.get(f"predict/{name}")) for name in QUADRANTS)]
    size = max(1, math.ceil(len(rows) / _BINS))
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    x = [sum(row["step"] for row in group) / len(group) for group in groups]
    traces: list[Trace] = []
    for name, look in _LOOKS.items():
        y = [_mean(row.get(f"predict/{name}") for row in group) for group in groups]
        if any(y):
            ends = {"x": rounded(x), "y": rounded([v or 0.0 for v in y])}
            traces.append(_bar(QUADRANTS[name], *look) | ends)
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
    axes = step_layout([run], barmode="relative", bargap=0.1, showlegend=True)
    return readable(Figure("Predicted change, nats per token and step", traces, axes, True))


def _on_average(runs: Sequence[Run]) -> Figure:
    traces: list[Trace] = []
    for name, look in _LOOKS.items():
        means = [_mean(run.column(f"predict/{name}")[1]) for run in runs]
        if any(means):
            bar = {"orientation": "h", "y": [plain(r.label) for r in runs], "x": rounded([v or 0.0 for v in means])}
            traces.append(_bar(QUADRANTS[name], *look) | bar)
    axes = layout(barmode="relative", showlegend=True, yaxis={"autorange": "reversed"}, hovermode="y unified")
    axes["xaxis"] = {**axes["xaxis"], "nticks": 6}
    return readable(Figure("Mean predicted change, nats per token and step", traces, axes, True), "x")


def _bar(name: str, colour: str, hatch: str) -> Trace:
    pattern = {"shape": hatch, "solidity": 0.25, "fgcolor": "@card", "fillmode": "overlay"}
    return {"type": "bar", "name": name, "marker": {"color": colour, "pattern": pattern, "line": {"width": 0}}}


def _mean(values: Iterable[Any]) -> float | None:
    numbers = [value for value in values if is_number(value)]
    return sum(numbers) / len(numbers) if numbers else None


def _top_tokens(runs: Sequence[Run]) -> Html:
    """The tokens that moved entropy most, over the whole run."""
    tables = []
    for run in runs:
        rows = [
            [el("code", repr(str(token["text"]))), _minus(f"{token['change']:+.2e}"), token["count"]]
            for token in top_tokens(run.metrics)
        ]
        if rows:
            tokens = table(["token", "predicted change in sum", "times"], rows)
            tables.append(el("details", el("summary", f"Single tokens that moved it most: {run.label}"), tokens))
    return Html("".join(tables))


def places(runs: Sequence[Run]) -> Panel | None:
    """The predicted change by the sign of the sample's advantage and by the place in the answer."""
    candidates = [
        _by_class(runs, POSITIONS, "By place in the answer: first to last eighth"),
        _by_class(runs, SIGNS, "By the sign of the sample's advantage"),
    ]
    figures = [figure for figure in candidates if figure is not None]
    if not figures:
        return None
    note = "Mean predicted change of entropy; above zero it raises entropy."
    return Panel("places", "Which samples, and where in the answer?", note, figures)


def _by_class(runs: Sequence[Run], labels: Mapping[str, str], caption: str) -> Figure | None:
    """Mean of each field of a split, a bar a run; along the y axis if their names are long."""
    across = max(map(len, labels.values())) > _LABEL_WIDTH
    traces: list[Trace] = []
    for run in runs:
        means = {label: _mean(run.column(f"predict/{name}")[1]) for name, label in labels.items()}
        y = [value for value in means.values() if value is not None]
        if y:
            x = ["<br>".join(wrap(label, _LABEL_WIDTH)) for label, value in means.items() if value is not None]
            bar = _bar(plain(run.label), run.colour, _HATCHES[run.group % len(_HATCHES)])
            ends = {"x": rounded(y), "y": x, "orientation": "h"} if across else {"x": x, "y": rounded(y)}
            traces.append(bar | ends | {"meta": {"run": run.label}})
    if not traces:
        return None
    names_at, values_at = ("yaxis", "xaxis") if across else ("xaxis", "yaxis")
    look = layout(barmode="group", hovermode="y unified" if across else "x unified")
    # A name such as 1/8 would be read as a date.
    look[names_at] = {**look[names_at], "type": "category", "autorange": "reversed" if across else True}
    look[values_at] = {**look[values_at], "nticks": 4 if across else 6}
    return readable(Figure(f"{caption}, nats per token and step", traces, look), "x" if across else "y")


def clip(runs: Sequence[Run]) -> Panel | None:
    """How many tokens the clip bounds, and what that does to entropy."""
    shares = ("clip/low_frac", "clip/high_frac", "ratio/outside_frac", "theorem2/violated_frac")
    figures = collect(runs, *shares, rangemode="tozero")
    moved = _by_class(runs, CLIP_STATES, "Predicted change of entropy by clip state")
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
    """cov(A, log π): what drives entropy down."""
    figures = collect(runs, "cov/adv_logp")
    if not figures:
        return None
    note = "Above zero the tokens that are rewarded are those already likely: training then lowers entropy."
    return Panel("cov", "Does reward favour what is likely already?", note, [figures[0]._replace(wide=True)])
