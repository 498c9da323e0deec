"""Key numbers, precision findings, and what was run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..runs.statistics import rms_relative_error
from .answers import evaluations, ks_of, tasks_of
from .figures import Panel, collect
from .html import Html, el, table
from .runs import Audit, Run, is_number

SETTLED = 20  # optimizer steps before the entropy error counts
_SIGNS = {"serious": "✖", "warning": "▲", "note": "●"}


class Key(NamedTuple):
    """A number at the end, the one it is compared with, and how to write them."""

    name: str
    value: Callable[[Run], float | None]
    against: Callable[[Run], str]
    form: str = "{:.3f}"


def tail(run: Run, name: str) -> float | None:
    """The mean of a metric over the last tenth of the run."""
    values = run.column(name)[1]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last) if last else None


def first(run: Run, name: str) -> float | None:
    """The first reading of a metric."""
    values = run.column(name)[1]
    return values[0] if values else None


def error(run: Run) -> float | None:
    """RMS relative distance of entropy from its target once settled."""
    rows = [row for row in run.rows_with("entropy/mean", "entropy/target") if row["entropy/target"]]
    rows = [row for row in rows if row["step"] > SETTLED]
    if not rows:
        return None
    return rms_relative_error([r["entropy/mean"] for r in rows], [r["entropy/target"] for r in rows])


def _evaluated(run: Run, name: str, at: int) -> float | None:
    tasks = tasks_of([run])
    rows = evaluations(run, tasks[-1]) if tasks else []
    value = rows[at].get(name) if rows and (at == -1 or len(rows) > 1) else None
    return value if is_number(value) else None


def _from(run: Run, value: float | None, form: str = "{:.3f}") -> str:
    return "" if value is None else f"from {form.format(value)}"


def _entropy_against(run: Run) -> str:
    target = run.column("entropy/target")[1]
    parts = [f"target {target[-1]:.3f}"] if target else []
    start = first(run, "entropy/mean")
    return ", ".join([*parts, *([f"from {start:.3f}"] if start is not None else [])])


def keys(runs: Sequence[Run]) -> list[Key]:
    """The numbers of the first screen, at most six; those that no run has are left out."""
    tops = [ks_of(row)[-1] for run in runs for row in run.evaluations if ks_of(row)]
    most = max(tops, default=1)
    wanted = [
        Key("entropy, nats a token", lambda r: tail(r, "entropy/mean"), _entropy_against),
        Key("RMS error to target", error, lambda _: f"after step {SETTLED}", "{:.1%}"),
        Key("reward", lambda r: tail(r, "reward/mean"), lambda r: _from(r, first(r, "reward/mean"))),
        Key("pass@1, held-out", lambda r: _evaluated(r, "pass@1", -1), lambda r: _from(r, _evaluated(r, "pass@1", 0))),
        Key(
            f"pass@{most}, held-out",
            lambda r: _evaluated(r, f"pass@{most}", -1),
            lambda r: _from(r, _evaluated(r, f"pass@{most}", 0)),
        ),
        Key(
            "different right answers",
            lambda r: _evaluated(r, "distinct", -1),
            lambda r: _from(r, _evaluated(r, "distinct", 0), "{:.2f}"),
            "{:.2f}",
        ),
    ]
    kept = [key for key in wanted if any(key.value(run) is not None for run in runs)]
    return [key for i, key in enumerate(kept) if key.name not in [k.name for k in kept[:i]]]


def key_numbers(runs: Sequence[Run]) -> Html:
    """Cards for one run, a table for several."""
    found = keys(runs)
    if len(runs) == 1:
        run = runs[0]
        cards = [
            el("div", el("dt", key.name), el("dd", _shown(key, run), el("small", key.against(run) or "\u00a0")))
            for key in found
        ]
        return el("dl", cards, class_="keys") if cards else Html("")
    head = ["run", *[key.name for key in found], "steps"]
    rows = [
        [
            el("span", swatch(run), " ", run.label),
            *[
                el("span", _shown(key, run), el("small", key.against(run) if key.value(run) is not None else ""))
                for key in found
            ],
            run.metrics[-1]["step"] if run.metrics else 0,
        ]
        for run in runs
    ]
    return table(head, rows, class_="compare")


def _shown(key: Key, run: Run) -> str:
    value = key.value(run)
    return "–" if value is None else key.form.format(value)


def swatch(run: Run) -> Html:
    """The line and the marker of a run, small."""
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
    figures = collect(
        runs,
        ("numerics/logp_rms", "RMS difference of log π from that of an fp32 head, nats"),
        ("numerics/entropy_bias", "Mean difference of entropy from that of an fp32 head, nats"),
    )
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
    found = table(head, rows, class_="wordy cards") if rows else el("p", "✔ The audit found nothing.", class_="good")
    checked = [[name, _text(value)] for name, value in audit.checked.items()]
    measured = [[f"{name}, nats", value] for name, value in audit.figures.items() if is_number(value)]
    if not checked and not measured:
        return found
    looked = table(["looked at", "result"], [*checked, *measured], class_="wordy")
    return Html(found + el("details", el("summary", "What was looked at"), looked))


def config(runs: Sequence[Run]) -> Panel:
    """Settings and versions; for several runs what differs comes first."""
    sections = [("settings", "config"), ("recipe", "recipe"), ("versions", "versions"), ("machine", "machine")]
    parts: list[Html] = []
    flat = [{f"{part}.{k}": v for _, part in sections for k, v in _items(run, part)} for run in runs]
    head = ["", *[el("span", swatch(run), " ", run.label) if len(runs) > 1 else "value" for run in runs]]
    if len(runs) > 1:
        names = list(dict.fromkeys(name for found in flat for name in found))
        differ = [name for name in names if len({_text(found.get(name)) for found in flat}) > 1]
        differ = [name for name in differ if name != "config.out"]
        rows = [[name.replace(".", ": ", 1), *[_text(found.get(name)) for found in flat]] for name in differ]
        parts.append(table(head, rows, class_="wordy") if rows else el("p", "Nothing differs but the directory."))
    for title, part in sections:
        names = list(dict.fromkeys(key for run in runs for key, _ in _items(run, part)))
        rows = [[name, *[_text(found.get(f"{part}.{name}")) for found in flat]] for name in names]
        if rows:
            parts.append(el("details", el("summary", title), table(head, rows, class_="wordy")))
    rows = [[run.label, str(run.path), str(run.header.get("created", "")), _command(run)] for run in runs]
    parts.append(el("details", el("summary", "where and when"), table(["run", "directory", "begun", "command"], rows)))
    note = "What differs between the runs, then everything." if len(runs) > 1 else "Everything that decides the result."
    return Panel("config", "What exactly was run?", note, [], Html("".join(parts)))


def _items(run: Run, part: str) -> list[tuple[str, Any]]:
    found = run.header.get(part)
    return list(found.items()) if isinstance(found, dict) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value, ensure_ascii=False)


def _command(run: Run) -> str:
    command = run.header.get("command")
    return " ".join(map(str, command)) if isinstance(command, list) else ""
