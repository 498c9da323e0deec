"""Runs side by side: their figures with intervals, and the probability that one method beats another.

A finished run is one line of a results file: its settings, figures, evaluations and curves, so that a table and a plot
can be made without the run directory. Lines with the same settings except task and seed are one cell.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..control.names import choose
from ..runs.frontier import frontier
from ..runs.record import is_number, write_json
from ..runs.statistics import (
    MIN_VALUES,
    Interval,
    improvement_interval,
    interquartile_mean,
    mean_interval,
    paired_interval,
    probability_of_improvement,
)
from ..runs.summary import aligned, counted
from .lines import last_row
from .terminal import best_shares, with_interval

# figure: (title, meaning); larger is better for SCORES.
FIGURES = {
    "entropy/error": ("H error", "RMS of (H − H*)/H* after 20 steps"),
    "entropy/mean": ("mean H", "nats per token, mean over all optimizer steps after 20: the mean over training"),
    "entropy/end": ("final H", "nats per token, mean over the last tenth of the steps"),
    "reward/end": ("reward", "on training prompts, mean over the last tenth of the steps"),
    "greedy": ("greedy", "held-out prompts, share of right greedy answers"),
    "best_pass@1": ("best pass@1", "held-out prompts, at the policy's own best temperature"),
    "pass@1": ("pass@1", "held-out prompts, at the temperature of training"),
    "pass@4": ("pass@4", "held-out prompts"),
    "pass@K": ("pass@K", "held-out prompts, K the largest number of samples"),
    "distinct": ("distinct", "distinct right answers among the samples of a held-out prompt"),
    "distinct/equal": (
        "distinct at equal accuracy",
        "the most at any temperature with a pass@1 of at least the baseline's best less 0.02, or 0",
    ),
    "steps": ("steps", "optimizer steps"),
    "seconds": ("seconds", "wall clock of the whole run, evaluations included"),
}
_Row = dict[str, tuple[float, Interval | None]]  # by figure: a value and its interval
SCORES = ("greedy", "best_pass@1", "pass@K", "distinct/equal")
PAIRED = ("greedy", "best_pass@1")  # subtracted run by run
_MARGIN = 0.02  # of pass@1, within which accuracy is equal
_EQUAL = "distinct/equal"
_RUN = ("entropy/error", "entropy/mean", "entropy/end", "reward/end", "steps", "seconds")  # the first table


def _largest_pass(lines: Sequence[dict[str, Any]]) -> str:
    """The name of pass@K, K the largest number of samples that runs were evaluated with."""
    ks = [int(key[5:]) for line in lines for key in line["figures"] if key.startswith("pass@")]
    return f"pass@{max(ks, default=1)}"


def _columns(names: Iterable[str], largest_pass: str) -> list[str]:
    """Figures by name, each once: if pass@K is itself one of FIGURES, it has one column."""
    return list(dict.fromkeys(largest_pass if f == "pass@K" and largest_pass in FIGURES else f for f in names))


class Estimate(NamedTuple):
    """A figure of a cell over its runs: mean, interquartile mean, interval, and runs.

    No interval for fewer than 3 seeds, nor for equal runs.
    """

    mean: float
    middle: float
    interval: Interval | None
    num: int


class Comparison(NamedTuple):
    """The result of :func:`compare`.

    Attributes:
        cells: by cell, by figure.
        better: by cell, by score: the probability of improvement over the baseline and its interval.
        differences: by cell, by score of ``PAIRED``: the mean difference from the baseline's run of the same seed, and
            its interval over seeds, or, of a single one, over prompts.
        floors: by task, the pass@1 that counts as equal to the baseline's.
        baseline: a cell's name, or None.
        tasks: of the runs.
        seeds: by cell, the smallest number of seeds on a task.
        largest_pass: the name of pass@K.
        notes: caveats: runs that stopped early, tasks that a cell lacks, cells with different numbers of answers.
    """

    cells: dict[str, dict[str, Estimate]]
    better: dict[str, _Row]
    differences: dict[str, _Row]
    floors: dict[str, float]
    baseline: str | None
    tasks: list[str]
    seeds: dict[str, int]
    largest_pass: str
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """The same as nested dicts with names."""
        cells = {name: {f: e._asdict() for f, e in cell.items()} for name, cell in self.cells.items()}

        def named(by_cell: dict[str, _Row], name: str) -> dict[str, dict[str, Any]]:
            return {cell: {f: {name: x, "interval": i} for f, (x, i) in row.items()} for cell, row in by_cell.items()}

        better, differences = named(self.better, "probability"), named(self.differences, "mean")
        return {**self._asdict(), "cells": cells, "better": better, "differences": differences}


def _mean_of_tasks(tasks: Sequence[Any]) -> float:
    return float(np.mean([np.mean(task) for task in tasks]))


def compare(lines: Sequence[dict[str, Any]], baseline: str | None = None) -> Comparison:
    """Aggregate lines by cell; every task has the same weight.

    Args:
        lines: of finished runs.
        baseline: the cell with which the others are compared.

    Raises:
        ValueError: no line; a baseline that is not a cell; two runs of one cell, task and seed, which are not a sample
            of two.
    """
    if not lines:
        raise ValueError("nothing to compare: no run has ended; run the grid, or name directories of runs that ended")
    names = list(dict.fromkeys(line["cell"] for line in lines))
    if baseline is not None:
        choose("baseline", baseline, names)
    runs = Counter((line["cell"], line["task"], line["seed"]) for line in lines)
    (name, task, seed), num = runs.most_common(1)[0]
    if num > 1:
        raise ValueError(f"{name} on {task} has {num} runs of seed {seed}, which count once; leave the others out")
    floors = _floors(lines, baseline)
    lines = [_at_equal_accuracy(line, floors) for line in lines]
    tasks, largest = list(dict.fromkeys(line["task"] for line in lines)), _largest_pass(lines)
    others = [name for name in names if baseline is not None and name != baseline]
    return Comparison(
        cells={name: _estimates(lines, name, largest) for name in names},
        better={name: _improvements(lines, name, str(baseline), largest) if name in others else {} for name in names},
        differences={name: _differences(lines, name, str(baseline)) if name in others else {} for name in names},
        floors=floors,
        baseline=baseline,
        tasks=tasks,
        seeds={
            name: min(sum(x["cell"] == name and x["task"] == task for x in lines) or 10**9 for task in tasks)
            for name in names
        },
        largest_pass=largest,
        notes=_notes(lines, names, tasks),
    )


def _floors(lines: Sequence[dict[str, Any]], baseline: str | None) -> dict[str, float]:
    """By task, the baseline's mean best pass@1 less the margin."""
    by_task = {} if baseline is None else _values(lines, baseline, "best_pass@1", "")
    return {task: max(0.0, float(np.mean(values)) - _MARGIN) for task, values in by_task.items()}


def _at_equal_accuracy(line: dict[str, Any], floors: dict[str, float]) -> dict[str, Any]:
    """The line with its distinct right answers at the baseline's accuracy, if its evaluation tells."""
    row = last_row(line)
    if line["task"] not in floors or not {"k", f"pass@{row.get('k')}", "pass@1", "distinct"} <= set(row):
        return line
    reached = frontier(row, floors[line["task"]])
    return {**line, "figures": {**line["figures"], _EQUAL: reached.distinct if reached else 0.0}}


def _by_prompt(line: dict[str, Any], figure: str) -> np.ndarray:
    """[p] a figure of ``PAIRED`` by prompt, in the last evaluation of a line; empty without its counts."""
    row = last_row(line)
    if figure == "greedy":
        return np.array(row.get("greedy_correct") or [], float)
    return best_shares(row) if counted(row) else np.zeros(0)


def _differences(lines: Sequence[dict[str, Any]], cell: str, baseline: str) -> _Row:
    """Mean differences of runs of the same task and seed, by score; every task has the same weight."""
    theirs = {(x["task"], x["seed"]): x for x in lines if x["cell"] == baseline}
    pairs = [(x, theirs[x["task"], x["seed"]]) for x in lines if x["cell"] == cell and (x["task"], x["seed"]) in theirs]
    differences = {}
    for figure in PAIRED:
        both = [pair for pair in pairs if all(is_number(x["figures"].get(figure)) for x in pair)]
        gaps: dict[str, list[float]] = {}
        for x, y in both:
            gaps.setdefault(x["task"], []).append(x["figures"][figure] - y["figures"][figure])
        if len(both) == 1:
            ours, other = (_by_prompt(x, figure) for x in both[0])
            interval = paired_interval(ours, other) if len(ours) == len(other) else None
        else:
            interval = mean_interval(*gaps.values(), bounds=(-1, 1)) if both else None
        if both:
            differences[figure] = (_mean_of_tasks([*gaps.values()]), interval)
    return differences


def _values(lines: Sequence[dict[str, Any]], cell: str, figure: str, largest_pass: str) -> dict[str, list[float]]:
    """The values of a figure in the runs of a cell, by task."""
    by_task: dict[str, list[float]] = {}
    for line in lines:
        value = line["figures"].get(largest_pass if figure == "pass@K" else figure)
        if line["cell"] == cell and value is not None:
            by_task.setdefault(line["task"], []).append(value)
    return by_task


def _estimates(lines: Sequence[dict[str, Any]], cell: str, largest_pass: str) -> dict[str, Estimate]:
    estimates = {}
    for figure in _columns(FIGURES, largest_pass):
        by_task = list(_values(lines, cell, figure, largest_pass).values())
        if by_task:
            pooled = [value for values in by_task for value in values]
            is_share = figure == "greedy" or "pass@" in figure
            bounds = (-np.inf if figure == "reward/end" else 0.0, 1.0 if is_share else np.inf)
            interval = mean_interval(*by_task, bounds=bounds)
            estimates[figure] = Estimate(_mean_of_tasks(by_task), interquartile_mean(pooled), interval, len(pooled))
    return estimates


def _improvements(lines: Sequence[dict[str, Any]], cell: str, baseline: str, largest_pass: str) -> _Row:
    """Probability of improvement over the baseline, by score, on the tasks that both have."""
    improvements = {}
    for figure in _columns(SCORES, largest_pass):
        ours, theirs = (_values(lines, name, figure, largest_pass) for name in (cell, baseline))
        shared = [task for task in ours if task in theirs]
        if shared:
            pair = [ours[task] for task in shared], [theirs[task] for task in shared]
            improvements[figure] = (probability_of_improvement(*pair), improvement_interval(*pair))
    return improvements


def _notes(lines: Sequence[dict[str, Any]], names: Sequence[str], tasks: Sequence[str]) -> list[str]:
    stopped = [f"{x['cell']} on {x['task']}, seed {x['seed']}: {x['stopped']}" for x in lines if x.get("stopped")]
    missing = {name: set(tasks) - {x["task"] for x in lines if x["cell"] == name} for name in names}
    incomplete = [f"{name} ({', '.join(sorted(lacking))})" for name, lacking in missing.items() if lacking]
    samples = {name: [x["figures"].get("samples") for x in lines if x["cell"] == name] for name in names}
    most = {name: max(numbers) for name, numbers in samples.items() if None not in numbers}
    unequal = [f"{name} {num:,}" for name, num in most.items()] if len(set(most.values())) > 1 else []
    unreached = [f"{x['cell']} on {x['task']}, seed {x['seed']}" for x in lines if x["figures"].get(_EQUAL) == 0]
    notes = (
        ("Stopped early, and counted with the figures at that step: ", stopped),
        ("Not run on every task, so no fair mean: ", incomplete),
        ("Not the same number of generated answers: ", unequal),
        ("Not as accurate as the baseline at any temperature, so 0 distinct answers at equal accuracy: ", unreached),
    )
    return [head + "; ".join(items) + "." for head, items in notes if items]


def _formatted(figure: str, value: float, interval: Interval | None, sign: str = "") -> str:
    whole = figure in ("steps", "seconds")
    digits = 0 if whole else 2 if figure.startswith("distinct") else 3
    # A mean of 387 needs no thousandths, and its interval has the digits of the mean.
    digits = max(0, digits - len(str(int(abs(value)))) + 1)
    return with_interval(value, None if whole else interval, sign, digits)


class Table(NamedTuple):
    """A table of :func:`tables`: its title, which may be empty, the heads of its columns, and rows of as many texts."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(comparison: Comparison) -> list[Table]:
    """The estimates as text: runs, held-out figures, and against the baseline; each with its interval in brackets."""
    cells, largest, baseline = comparison.cells, comparison.largest_pass, comparison.baseline
    figures = [f for f in _columns(FIGURES, largest) if any(f in cell for cell in cells.values())]
    titles = {f: largest if f == "pass@K" else FIGURES[f][0] for f in FIGURES}
    means: dict[str, _Row] = {name: {f: (e.mean, e.interval) for f, e in cell.items()} for name, cell in cells.items()}
    middles: dict[str, _Row] = {name: {f: (e.middle, None) for f, e in cell.items()} for name, cell in cells.items()}
    scores = [f for f in _columns(SCORES, largest) if f in figures]

    def columns(
        names: Iterable[str], by_cell: dict[str, _Row], title: str = "{}", sign: str = ""
    ) -> dict[str, dict[str, str]]:
        texts = {f: {n: _formatted(f, *row[f], sign) for n, row in by_cell.items() if f in row} for f in names}
        return {title.format(titles[f]): text for f, text in texts.items() if text}

    seeds = {"seeds": {name: str(num) for name, num in comparison.seeds.items()}}
    run = columns([f for f in figures if f in _RUN], means)
    heldout = columns([f for f in figures if f not in (*_RUN, _EQUAL)], means)
    equal = columns([_EQUAL], means)
    floors = ", ".join(f"{floor:.3f} on {task}" for task, floor in comparison.floors.items())
    reached = f", and distinct answers at a pass@1 of at least {floors}" if equal else ""
    groups = (
        ("", seeds | run if run else {}),
        ("", seeds | heldout if heldout else {}),
        (
            f"Differences from {baseline} by seed{reached}:",
            columns(PAIRED, comparison.differences, "Δ {} (95 %)", "+") | equal,
        ),
        (f"Probability that a run beats one of {baseline}:", columns(scores, comparison.better, "P({} better)")),
        ("Interquartile means:", columns(scores, middles, "IQM {}")),
    )
    found = []
    for title, group in groups:
        named = [name for name in cells if any(name in column for column in group.values())]
        rows = [[name, *(column.get(name, "-") for column in group.values())] for name in named]
        found += [Table(title, ["cell", *group], rows)] if group else []
    return found


def remarks(comparison: Comparison) -> list[str]:
    """What the tables are of, and what makes them unfair."""
    few = sorted(name for name, num in comparison.seeds.items() if num < MIN_VALUES)
    return [
        f"Tasks: {', '.join(comparison.tasks)}. Mean over runs (95 % interval: of means by Student's t, of P by exact "
        "ranks, of Δ over seeds, or over prompts if there is one; none where all runs are equal).",
        *comparison.notes,
        *([f"No interval over runs for fewer than {MIN_VALUES} seeds: {', '.join(few)}."] if few else []),
    ]


def render(comparison: Comparison, markdown: bool = False) -> str:
    """The tables and remarks, aligned for a terminal or as Markdown."""
    sections = []
    for title, head, rows in tables(comparison):
        sections += [title] * bool(title) + [_table(head, rows, markdown)]
    return "\n\n".join([*sections, *remarks(comparison)])


def _table(head: list[str], rows: list[list[str]], markdown: bool) -> str:
    if markdown:
        return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    return "\n".join(aligned([head, *rows], left=len(head)))


def write(comparison: Comparison, lines: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write compare.csv, a row per run, and compare.json, the estimates."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        largest = comparison.largest_pass
        names = [largest if f == "pass@K" else f for f in _columns(FIGURES, largest)]
        out.writerow(["cell", "task", "seed", *names])
        for line in (_at_equal_accuracy(line, comparison.floors) for line in lines):
            out.writerow([line["cell"], line["task"], line["seed"], *(line["figures"].get(f) for f in names)])
    write_json(folder / "compare.json", comparison.as_json())
