"""Key numbers, precision findings, and what was run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..runs.record import is_number
from ..runs.summary import SETTLED
from .answers import ks_of
from .figures import Panel, collect
from .html import Html, el, number, table
from .runs import Audit, Run

_FORM = "{:.3f}"
_SIGNS = {"serious": "✖", "warning": "▲", "note": "●"}


class Key(NamedTuple):
    """A number at the end, the one it is compared with, and how to write them."""

    name: str
    value: Callable[[Run], float | None]
    against: Callable[[Run], str]
    form: str = _FORM


def _figure(run: Run, name: str) -> float | None:
    value = run.summary[name]
    return value if is_number(value) else None


def _written(value: float, form: str = _FORM) -> str:
    """A value in its form; one of 10 or more with as many digits as a person reads."""
    return number(value) if form == _FORM and abs(value) >= 10 else form.format(value)


def _from(value: float | None, form: str = _FORM) -> str:
    return "" if value is None else f"from {_written(value, form)}"


def _entropy_against(run: Run) -> str:
    target = _figure(run, "entropy/target")
    notes = ["" if target is None else f"target {_written(target)}", _from(_figure(run, "entropy/start"))]
    return ", ".join(note for note in notes if note)


def _score(run: Run, stage: str, name: str) -> float | None:
    """A score of the last task, at ``start`` or ``end``; a run that was evaluated once so far ends there."""
    first, last = run.summary.get("start"), run.summary.get("end")
    row = (last or first) if stage == "end" else (first if last else None)
    value = (row or {}).get(name)
    return value if is_number(value) else None


def _score_key(title: str, name: str, form: str = _FORM) -> Key:
    return Key(title, lambda run: _score(run, "end", name), lambda run: _from(_score(run, "start", name), form), form)


def keys(runs: Sequence[Run]) -> list[Key]:
    """The numbers of the first screen, at most six; those that no run has are left out."""
    most = max((ks_of(row)[-1] for run in runs for row in run.evaluations if ks_of(row)), default=1)
    candidates = [
        Key("entropy, nats per token", lambda run: _figure(run, "entropy/end"), _entropy_against),
        Key(
            "RMS error to target",
            lambda run: _figure(run, "entropy/rms_error"),
            lambda _: f"after step {SETTLED}",
            "{:.1%}",
        ),
        Key("reward", lambda run: _figure(run, "reward/end"), lambda run: _from(_figure(run, "reward/start"))),
        _score_key("greedy, held-out", "greedy"),
        _score_key("best pass@1, held-out", "best_pass@1"),
        *(_score_key(f"pass@{k}, held-out", f"pass@{k}") for k in sorted({1, most})),
        _score_key("distinct right answers", "distinct", "{:.2f}"),
    ]
    known = [key for key in candidates if any(key.value(run) is not None for run in runs)]
    # pass@k at one temperature says less than pass@1 at the best one, and has a panel.
    has_best = any(key.name.startswith("best") for key in known)
    return [key for key in known if not (has_best and key.name.startswith("pass@"))]


def key_numbers(runs: Sequence[Run]) -> Html:
    """Cards for one run, a table for several."""
    columns = keys(runs)
    if len(runs) == 1:
        run = runs[0]
        cards = [
            el("div", el("dt", key.name), el("dd", _value(key, run), el("small", key.against(run) or "\u00a0")))
            for key in columns
        ]
        return el("dl", cards, class_="keys") if cards else Html("")
    head = ["run", *[key.name for key in columns], "steps"]
    rows = [
        [
            el("span", swatch(run), " ", run.label),
            *[
                el("span", _value(key, run), el("small", key.against(run) if key.value(run) is not None else ""))
                for key in columns
            ],
            run.summary["steps"],
        ]
        for run in runs
    ]
    return table(head, rows, class_="compare")


def _value(key: Key, run: Run) -> str:
    value = key.value(run)
    return "–" if value is None else _written(value, key.form)


def swatch(run: Run) -> Html:
    """The line of a run in its colour and dash, small."""
    gaps = {"solid": None, "dash": "6 3", "dot": "2 3", "dashdot": "6 3 2 3", "longdash": "9 4"}
    style = el(
        "line",
        x1=0,
        y1=5,
        x2=24,
        y2=5,
        stroke=f"var(--{run.colour[1:]})",
        stroke_width=3,
        stroke_dasharray=gaps.get(run.dash, "9 4 2 4"),
    )
    return el("svg", style, viewBox="0 0 24 10", width=24, height=10, aria_hidden="true")


def precision(runs: Sequence[Run]) -> Panel | None:
    """What the audit found, and how far the engine's figures are from those of an fp32 head."""
    figures = collect(runs, "numerics/logp_rms", "numerics/entropy_bias")
    audited = [el("h3", run.label) * (len(runs) > 1) + _audit(run.audit) for run in runs if run.audit is not None]
    if not figures and not audited:
        return None
    note = "What the audit of dtypes, casts and sampling found, worst first, and what to do about it."
    return Panel("precision", "Can the numbers be trusted?", note, figures, Html("".join(audited)))


def _audit(audit: Audit) -> Html:
    head = ["severity", "what", "where", "effect", "remedy"]
    rows = []
    for finding in audit.findings:
        severity = str(finding.get("severity", "note"))
        sign = el("span", f"{_SIGNS.get(severity, '●')} {severity}", class_=f"severity {severity}")
        rows.append([sign, *[str(finding.get(key) or "") for key in head[1:]]])
    findings = table(head, rows, class_="wordy cards") if rows else el("p", "✔ The audit found nothing.", class_="good")
    checked = [[name, _text(value)] for name, value in audit.checked.items()]
    measured = [[f"{name}, nats", value] for name, value in audit.figures.items() if is_number(value)]
    if not checked and not measured:
        return findings
    results = table(["checked", "result"], [*checked, *measured], class_="wordy")
    return Html(findings + el("details", el("summary", "What was checked"), results))


_SECTIONS = {"settings": "config", "recipe": "recipe", "versions": "versions", "machine": "machine"}


def config(runs: Sequence[Run]) -> Panel:
    """Settings and versions; for several runs those that differ come first."""
    sections: list[Html] = []
    settings = [{f"{field}.{k}": v for field in _SECTIONS.values() for k, v in _items(run, field)} for run in runs]
    head = ["", *[el("span", swatch(run), " ", run.label) if len(runs) > 1 else "value" for run in runs]]
    if len(runs) > 1:
        names = list(dict.fromkeys(name for values in settings for name in values))
        differ = [name for name in names if len({_text(values.get(name)) for values in settings}) > 1]
        differ = [name for name in differ if name != "config.out"]
        rows = [[name.replace(".", ": ", 1), *[_text(values.get(name)) for values in settings]] for name in differ]
        same = el("p", "Only the directory differs.")
        sections.append(table(head, rows, class_="wordy") if rows else same)
    for title, field in _SECTIONS.items():
        names = list(dict.fromkeys(key for run in runs for key, _ in _items(run, field)))
        rows = [[name, *[_text(values.get(f"{field}.{name}")) for values in settings]] for name in names]
        if rows:
            sections.append(el("details", el("summary", title), table(head, rows, class_="wordy")))
    rows = [[run.label, str(run.path), str(run.header.get("created", "")), _command(run)] for run in runs]
    origin = table(["run", "directory", "started", "command"], rows)
    sections.append(el("details", el("summary", "directory, date and command"), origin))
    note = "What differs between the runs, then everything." if len(runs) > 1 else "Everything that decides the result."
    return Panel("config", "What exactly was run?", note, [], Html("".join(sections)))


def _items(run: Run, field: str) -> list[tuple[str, Any]]:
    values = run.header.get(field)
    return list(values.items()) if isinstance(values, dict) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value, ensure_ascii=False)


def _command(run: Run) -> str:
    command = run.header.get("command")
    return " ".join(map(str, command)) if isinstance(command, list) else ""
