"""The page around the panels: one HTML document that asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from ..runs.record import is_number
from ..runs.text import duration
from .about import swatch
from .bundle import cut
from .figures import Figure, Panel, sketch
from .html import Html, data, el, number, table
from .runs import Run

PLOTLY_PATH = "/plotly.js"


@cache
def plotly_js() -> str:
    """Plotly's own script, cut to the figures of the page.

    Raises:
        ImportError: plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ImportError("the report needs plotly, which is not installed; pip install 'isentropic[report]'") from None
    return cut(get_plotlyjs())


def _asset(name: str) -> str:
    return (files("isentropic.report") / name).read_text(encoding="utf-8")


def document(
    runs: Sequence[Run], keys: Html, panels: Sequence[Panel], live: str | None, title: str | None = None
) -> str:
    """The page as text.

    Args:
        runs: what it shows.
        keys: the numbers of the first screen.
        panels: in order.
        live: see :func:`isentropic.report.render`.
        title: of the page; by default the run's name, or how many there are.

    Returns:
        A whole HTML document.

    Raises:
        ImportError: plotly is missing.
    """
    script, style = _asset("page.js"), _asset("page.css")
    plotly = plotly_js()
    names = " · ".join(dict.fromkeys(run.label for run in runs[:4])) or title
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_policy(script, plotly, live)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{names} – isentropic"),
        el("style", Html(style)),
    )
    main = el("main", _first(runs, keys, title), [_section(panel) for panel in panels], id="main", tabindex="-1")
    embedded = el("script", src=PLOTLY_PATH) if live else el("script", Html(plotly))
    body = el(
        "body",
        el("a", "Skip to the panels", href="#main", class_="skip"),
        _header(runs, panels),
        main,
        el("footer", "Made by isentropic from the run directory alone."),
        embedded,
        el("script", Html(script)),
        data_live=live,
    )
    return "<!doctype html>\n" + el("html", head, body, lang="en") + "\n"


def _policy(script: str, plotly: str, live: str | None) -> str:
    """Only our two scripts run, and nothing is fetched: what a run wrote is never executed, whatever it holds."""
    allowed = [_hash(script), "'self'" if live else _hash(plotly)]
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src {' '.join(allowed)}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _header(runs: Sequence[Run], panels: Sequence[Panel]) -> Html:
    links = [el("a", _short(panel), href=f"#{panel.id}") for panel in panels]
    boxes = [
        el(
            "label",
            el("input", type="checkbox", checked=True, value=run.label, class_="toggle"),
            swatch(run),
            " ",
            run.label,
        )
        for run in runs
    ]
    toggles = el("fieldset", el("legend", "Runs shown"), boxes, class_="runs") if len(runs) > 1 else None
    return el("header", el("nav", links, aria_label="Panels"), toggles)


_SHORT = {
    "statistics": "statistics",
    "what": "runs",
    "curves": "curves",
    "temperatures": "frontier",
    "single": "single runs",
    "hold": "entropy and reward",
    "phase": "path",
    "knob": "knob",
    "sequence": "tasks",
    "frontier": "any temperature",
    "passk": "pass@k",
    "distinct": "diversity",
    "quadrants": "tokens",
    "places": "places",
    "predicted": "prediction",
    "clip": "clips",
    "cov": "covariance",
    "length": "length",
    "samples": "samples",
    "precision": "precision",
    "config": "config",
}


def _short(panel: Panel) -> str:
    return _SHORT[panel.id]


def _first(runs: Sequence[Run], keys: Html, title: str | None) -> Html:
    """The first screen: which run, how far it is, and its numbers."""
    if title is None and len(runs) == 1:
        run = runs[0]
        recipe = run.header["recipe"]
        heading = el("h1", run.label, el("small", f" on {run.task}"))
        control = [f"{name} {recipe[name]}" for name in ("knob", "controller", "target") if recipe.get(name)]
        facts = [str(run.header.get("model") or ""), f"seed {run.header.get('seed')}", *control, _progress(run)]
        lines = el("p", " · ".join(fact for fact in facts if fact), class_="facts")
        formula = el("p", str(recipe["formula"]), class_="formula") if recipe.get("formula") else None
        return el("section", heading, lines, formula, keys, id="top", class_="top", data_live_part="top")
    heading = el("h1", title or f"{len(runs)} runs side by side")
    running = [f"{run.label}: {_progress(run)}" for run in runs if not run.ended]
    lines = el("p", " · ".join(running), class_="facts") if running else None
    return el("section", heading, lines, keys, id="top", class_="top", data_live_part="top")


def _progress(run: Run) -> str:
    done = run.summary["steps"]
    seconds = run.column("seconds")[1]
    took = f" in {duration(seconds[-1])}" if seconds else ""
    return f"{done} steps{took}" if run.ended or not run.steps else f"step {done} of {run.steps}{took}"


def _section(panel: Panel) -> Html:
    narrow = [i for i, figure in enumerate(panel.figures) if not figure.wide]
    # The last of an odd number has the row to itself.
    wide = {*range(len(panel.figures))} - {*narrow} | ({narrow[-1]} if len(narrow) % 2 else set())
    figures = [
        _figure(f"{panel.id}-{i}", figure, i in wide, panel.id == "hold") for i, figure in enumerate(panel.figures)
    ]
    return el(
        "section",
        el("h2", el("a", panel.question, href=f"#{panel.id}")),
        el("p", panel.note, class_="note"),
        el("div", figures, class_="grid") if figures else None,
        el("div", panel.body, data_live_part=f"{panel.id}-body"),
        _numbers(panel),
        id=panel.id,
        class_="panel",
        tabindex="-1",
    )


def _figure(name: str, figure: Figure, wide: bool, at_once: bool) -> Html:
    return el(
        "figure",
        el("figcaption", figure.caption, id=f"{name}-caption"),
        el(
            "div",
            sketch(figure) if at_once else None,
            class_="plot",
            tabindex="0",
            role="group",
            aria_roledescription="figure; the arrow keys read it point by point",
            aria_labelledby=f"{name}-caption",
        ),
        el("script", data({"data": figure.traces, "layout": figure.layout}), type="application/json"),
        id=name,
        class_="figure wide" if wide else "figure",
    )


def _numbers(panel: Panel) -> Html | None:
    """The lines of a panel as numbers, for readers who cannot see a plot or prefer a table."""
    rows: list[list[Any]] = []
    for figure in panel.figures:
        for trace in figure.traces:
            y = [value for value in trace.get("y", []) if is_number(value)]
            if trace.get("orientation") == "h" or not trace.get("name") or not y:
                continue
            if trace.get("opacity") or trace.get("line", {}).get("width") == 0:
                continue
            rows.append(
                [figure.caption, Html(trace["name"]), *map(number, (y[0], y[len(y) // 2], y[-1], min(y), max(y)))]
            )
    if not rows:
        return None
    head = ["figure", "line", "first", "middle", "last", "lowest", "highest"]
    numbers = el("div", table(head, rows, class_="wordy"), data_live_part=f"{panel.id}-numbers")
    return el("details", el("summary", "The same in numbers"), numbers)
