"""Runs side by side: what each came to, how sure that is, and who beats whom. Reads run directories and results files.

A finished run is one line: its settings, its figures, its evaluations and its curves, so that a table and a picture
can be made again without the run. Lines of the same settings but for task and seed are one cell.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..recipes.compose import Recipe
from ..runs.record import Record, plain, versions, write_json
from ..runs.statistics import (
    MIN_VALUES,
    Interval,
    interquartile_mean,
    probability_of_improvement,
    stratified_interval,
)
from .config import RunConfig, as_dict

# figure: (title, what it is); larger is better for SCORES.
FIGURES = {
    "entropy/error": ("H error", "RMS of (H − H*)/H* after 20 steps"),
    "entropy/mean": ("mean H", "nats a token, mean over all optimizer steps after 20: cumulative entropy a step"),
    "entropy/end": ("final H", "nats a token, mean over the last tenth of the steps"),
    "reward/end": ("reward", "on training prompts, mean over the last tenth of the steps"),
    "pass@1": ("pass@1", "held-out prompts, unbiased"),
    "pass@4": ("pass@4", "held-out prompts, unbiased"),
    "pass@K": ("pass@K", "held-out prompts, unbiased, K the most samples that were taken"),
    "distinct": ("distinct", "different right answers among the samples of a held-out prompt"),
    "steps": ("steps", "optimizer steps"),
    "seconds": ("seconds", "wall clock of the whole run, evaluations included"),
}
SCORES = ("pass@1", "pass@K", "distinct")
_CURVE_POINTS = 50
# What does not change a run's numbers, and what tells runs of one cell apart.
_ELSEWHERE = ("out", "device", "save_every", "keep", "seed", "task", "audit")


def _most(lines: Sequence[dict[str, Any]]) -> str:
    """The name of pass@K, K the most samples that runs were evaluated with."""
    found = [int(key[5:]) for line in lines for key in line["figures"] if key.startswith("pass@")]
    return f"pass@{max(found, default=1)}"


def _columns(names: Iterable[str], most: str) -> list[str]:
    """Figures by name, each once: where pass@K is one of the named ones, that one stands for both."""
    return list(dict.fromkeys(most if f == "pass@K" and most in FIGURES else f for f in names))


def fingerprint(config: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Eight characters that change with any setting that matters, and not with the seed, the task or the directory.

    Args:
        config: the resolved settings that are not at their default.
        recipe: the fields of the recipe that are not at their default.

    Example:
        >>> fingerprint({"steps": 40, "seed": 1}, {}) == fingerprint({"seed": 2, "steps": 40}, {})
        True
    """
    kept = {k: v for k, v in config.items() if k not in _ELSEWHERE}
    told = {k: v for k, v in recipe.items() if k not in ("formula", "source")}
    return hashlib.sha256(json.dumps([plain(kept), plain(told)], sort_keys=True).encode()).hexdigest()[:8]


def changed(config: dict[str, Any], recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a config and a recipe set otherwise than by default."""
    usual = as_dict(RunConfig())
    blank = plain(asdict(Recipe("", "")))
    return (
        {k: v for k, v in config.items() if k not in usual or v != usual[k]},
        {k: v for k, v in plain(recipe).items() if k not in blank or v != blank[k]},
    )


def line_of(record: Record, name: str | None = None) -> dict[str, Any]:
    """The line of a finished run.

    Args:
        record: its directory.
        name: of the cell; by default the recipe's.

    Raises:
        ValueError: not a run directory, or a run that has not ended.
    """
    header = record.header()
    path = record.path / "summary.json"
    if not path.is_file():
        raise ValueError(f"{record.path} has not ended: it has no summary.json; go on with it by `train --resume`")
    summary = json.loads(path.read_text(encoding="utf-8"))
    rows, evaluations = record.rows("metrics"), record.rows("evaluations")
    config, recipe = changed(header["config"], header["recipe"])
    last = summary.get("end") or summary.get("start") or {}
    figures = {key: summary.get(key) for key in ("entropy/mean", "entropy/end", "reward/end", "steps", "samples")}
    figures |= {"entropy/error": summary.get("entropy/rms_error"), "seconds": _seconds(rows, summary)} | last
    line = {
        "cell": name or str(header["config"].get("recipe")),
        "task": str(header.get("task")),
        "seed": header["seed"],
        "fingerprint": fingerprint(config, recipe),
        "figures": figures,
        "start": summary.get("start") or {},
        "entropy_start": summary.get("entropy/start"),
        "target": summary.get("entropy/target"),
        "evaluations": [
            {k: v for k, v in row.items() if k.startswith("pass@") or k in ("step", "task", "k", "distinct")}
            for row in evaluations
        ],
        "curve": _curve(rows),
        "settings": {k: v for k, v in config.items() if k != "out"},
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
    }
    return plain(line | ({"stopped": summary["stopped"]} if summary.get("stopped") else {}))


def _seconds(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> float:
    """Wall clock of all the processes that a resumed run has had."""
    total, before = 0.0, 0.0
    for row in rows:
        if row["seconds"] < before:
            total += before
        before = row["seconds"]
    return round(total + max(before, summary["seconds"]), 1)


def _curve(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Means over equal parts of the run, few enough to keep."""
    parts = [part for part in np.array_split(np.arange(len(rows)), min(_CURVE_POINTS, len(rows))) if len(part)]

    def mean(key: str) -> list[float | None]:
        found = [[rows[i][key] for i in part if rows[i].get(key) is not None] for part in parts]
        return [round(float(np.mean(values)), 5) if values else None for values in found]

    steps = [rows[part[-1]]["step"] for part in parts]
    return {"step": steps, "entropy": mean("entropy/mean"), "reward": mean("reward/mean"), "knob": mean("knob/value")}


def name_cells(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines whose cells have a name each: where one name stands for several settings, what differs is added."""
    lines = list(lines)
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        by_name.setdefault(line["cell"], {})[line["fingerprint"]] = line["settings"]
    found = []
    for line in lines:
        variants = by_name[line["cell"]]
        keys = {k for s in variants.values() for k in s if k not in _ELSEWHERE}
        told = [k for k in sorted(keys) if len({json.dumps(s.get(k), sort_keys=True) for s in variants.values()}) > 1]
        more = " ".join(f"{k}={line['settings'].get(k, 'default')}" for k in told)
        found.append({**line, "cell": f"{line['cell']} {more}".strip()})
    return found


class Estimate(NamedTuple):
    """A figure of a cell over its runs; the interval is None for fewer than 3 seeds."""

    mean: float
    middle: float
    interval: Interval | None
    num: int


class Comparison(NamedTuple):
    """What ``compare`` found.

    Attributes:
        cells: by cell, by figure.
        better: by cell, by score: the probability of improvement over the baseline and its interval.
        baseline: a cell's name, or None.
        tasks: on which the runs were made.
        seeds: by cell, the smallest number of seeds on a task.
        most: what pass@K is.
        notes: what a reader must know before believing a figure: runs that stopped early, tasks that a cell lacks,
            cells that saw more answers than others.
    """

    cells: dict[str, dict[str, Estimate]]
    better: dict[str, dict[str, tuple[float, Interval | None]]]
    baseline: str | None
    tasks: list[str]
    seeds: dict[str, int]
    most: str
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """The same as nested dicts with names."""
        cells = {name: {f: e._asdict() for f, e in cell.items()} for name, cell in self.cells.items()}
        better = {
            name: {f: {"probability": value, "interval": interval} for f, (value, interval) in row.items()}
            for name, row in self.better.items()
        }
        return {**self._asdict(), "cells": cells, "better": better}


def _mean(tasks: Sequence[Any]) -> float:
    return float(np.mean([np.mean(task) for task in tasks]))


def compare(lines: Sequence[dict[str, Any]], baseline: str | None = None) -> Comparison:
    """Aggregate lines by cell; every task weighs the same.

    Raises:
        ValueError: no line; a baseline that is no cell; two runs of one cell, task and seed, no sample of two.
    """
    if not lines:
        raise ValueError("nothing to compare: no run has ended; run the grid, or name directories of runs that ended")
    names = list(dict.fromkeys(line["cell"] for line in lines))
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline must be one of {', '.join(names)}; got {baseline!r}")
    tasks, most = list(dict.fromkeys(line["task"] for line in lines)), _most(lines)
    runs = Counter((line["cell"], line["task"], line["seed"]) for line in lines)
    (name, task, seed), num = runs.most_common(1)[0]
    if num > 1:
        raise ValueError(f"{name} on {task} has {num} runs of seed {seed}, which count once; leave the others out")

    def scores(name: str, figure: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for line in lines:
            value = line["figures"].get(most if figure == "pass@K" else figure)
            if line["cell"] == name and value is not None:
                found.setdefault(line["task"], []).append(value)
        return found

    cells: dict[str, dict[str, Estimate]] = {}
    better: dict[str, dict[str, tuple[float, Interval | None]]] = {}
    seeds = {}
    for name in names:
        cells[name], better[name] = {}, {}
        seeds[name] = min(sum(x["cell"] == name and x["task"] == task for x in lines) or 10**9 for task in tasks)
        for figure in _columns(FIGURES, most):
            by_task = list(scores(name, figure).values())
            if by_task:
                every = [value for task in by_task for value in task]
                cells[name][figure] = Estimate(
                    _mean(by_task), interquartile_mean(every), stratified_interval(_mean, by_task), len(every)
                )
        if baseline is None or name == baseline:
            continue
        for figure in _columns(SCORES, most):
            ours, theirs = scores(name, figure), scores(baseline, figure)
            shared = [task for task in ours if task in theirs]
            if shared:
                pair = [ours[task] for task in shared], [theirs[task] for task in shared]
                interval = stratified_interval(probability_of_improvement, *pair)
                better[name][figure] = (probability_of_improvement(*pair), interval)
    return Comparison(cells, better, baseline, tasks, seeds, most, _notes(lines, names, tasks))


def _notes(lines: Sequence[dict[str, Any]], names: Sequence[str], tasks: Sequence[str]) -> list[str]:
    early = [f"{x['cell']} on {x['task']}, seed {x['seed']}: {x['stopped']}" for x in lines if x.get("stopped")]
    lacks = [(name, set(tasks) - {x["task"] for x in lines if x["cell"] == name}) for name in names]
    lacks = [f"{name} ({', '.join(sorted(missing))})" for name, missing in lacks if missing]
    seen = {name: [x["figures"].get("samples") for x in lines if x["cell"] == name] for name in names}
    seen = {name: max(found) for name, found in seen.items() if None not in found}
    answers = [f"{name} {num:,}" for name, num in seen.items()] if len(set(seen.values())) > 1 else []
    told = (
        ("Stopped early, and counted as it stood: ", early),
        ("Not run on every task, so no fair mean: ", lacks),
        ("Not the same number of generated answers: ", answers),
    )
    return [head + "; ".join(found) + "." for head, found in told if found]


def _shown(figure: str, value: float, interval: Interval | None) -> str:
    digits = 0 if figure in ("steps", "seconds") else 2 if figure == "distinct" else 3
    text = f"{value:.{digits}f}"
    return (
        text if interval is None or digits == 0 else f"{text} ({interval.low:.{digits}f}..{interval.high:.{digits}f})"
    )


def render(found: Comparison, markdown: bool = False) -> str:
    """The tables as text, aligned for a terminal or as Markdown."""
    figures = [f for f in _columns(FIGURES, found.most) if any(f in cell for cell in found.cells.values())]
    names = {f: found.most if f == "pass@K" else FIGURES[f][0] for f in FIGURES}
    head = ["cell", "seeds", *(names[f] for f in figures)]
    rows = [
        [name, str(found.seeds[name])]
        + [_shown(f, cell[f].mean, cell[f].interval) if f in cell else "-" for f in figures]
        for name, cell in found.cells.items()
    ]
    parts = [_table(head, rows, markdown)]
    scores = [f for f in _columns(SCORES, found.most) if f in figures]
    if scores:
        beats = [f for f in scores if any(f in row for row in found.better.values())]
        head = ["cell", *(f"P({names[f]} better)" for f in beats), *(f"IQM {names[f]}" for f in scores)]
        rows = [
            [name]
            + [_shown(f, *found.better[name][f]) if f in found.better.get(name, {}) else "-" for f in beats]
            + [_shown(f, cell[f].middle, None) if f in cell else "-" for f in scores]
            for name, cell in found.cells.items()
        ]
        title = f"Probability that a run beats one of {found.baseline}, and interquartile means:"
        parts += [title if beats else "Interquartile means:", _table(head, rows, markdown)]
    parts.append("Tasks: " + ", ".join(found.tasks) + ". Mean over runs (95 % interval, bootstrap stratified by task).")
    parts += found.notes
    few = sorted(name for name, num in found.seeds.items() if num < MIN_VALUES)
    if few:
        parts.append(f"No interval where there are fewer than {MIN_VALUES} seeds: {', '.join(few)}.")
    return "\n\n".join(parts)


def _table(head: list[str], rows: list[list[str]], markdown: bool) -> str:
    if markdown:
        return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows])


def write(found: Comparison, lines: Sequence[dict[str, Any]], folder: Path) -> None:
    """compare.csv, a row a run; compare.json, the estimates."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        names = [found.most if f == "pass@K" else f for f in _columns(FIGURES, found.most)]
        out.writerow(["cell", "task", "seed", *names])
        for line in lines:
            out.writerow([line["cell"], line["task"], line["seed"], *(line["figures"].get(f) for f in names)])
    write_json(folder / "compare.json", found.as_json())
