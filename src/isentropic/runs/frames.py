"""Runs in a notebook: their rows as pandas tables, their settings and figures, and their main curves as one figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..control.names import choose
from .frontier import points
from .labels import METRICS
from .record import Record, is_number
from .summary import counted, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

TABLES = ("metrics", "samples", "evaluations")


def metrics(run: Record | str | Path) -> DataFrame:
    """metrics.jsonl as a table: a row per optimizer step, a column per field.

    Args:
        run: a run directory; its fields and their units are in :mod:`isentropic.runs.record`.

    Returns:
        Rows in order of steps; what a step does not hold is missing (NaN).

    Raises:
        ValueError: not a run directory.
        ImportError: pandas is missing.

    Example:
        >>> import tempfile
        >>> run = Record(tempfile.mkdtemp())
        >>> run.start(config={}, recipe={}, seed=0)
        >>> run.append("metrics", {"step": 1, "entropy/mean": 1.5}, {"step": 2, "entropy/mean": 0.5})
        >>> metrics(run)
           step  entropy/mean
        0     1           1.5
        1     2           0.5
    """
    return _table(run, "metrics")


def evaluations(run: Record | str | Path) -> DataFrame:
    """evaluations.jsonl as a table: a row per evaluation; counts by prompt are lists. See :func:`metrics`."""
    return _table(run, "evaluations")


def samples(run: Record | str | Path) -> DataFrame:
    """samples.jsonl as a table: a row per completion; tokens, surprisal and entropy are lists. See :func:`metrics`."""
    return _table(run, "samples")


def join(runs: Iterable[Record | str | Path], table: str = "metrics") -> DataFrame:
    """One table of several runs, one below another.

    Args:
        runs: run directories.
        table: ``metrics``, ``samples`` or ``evaluations``.

    Returns:
        The rows of every run in the order given, after three columns that say which run a row is from: ``run`` (name
        of its directory, or the whole path if two directories have the same name), ``recipe`` and ``seed``.

    Raises:
        ValueError: no run, one that is not a run directory, or another table.
        ImportError: pandas is missing.

    Example:
        >>> import tempfile
        >>> runs = [Record(tempfile.mkdtemp()) for _ in range(2)]
        >>> for seed, run in enumerate(runs):
        ...     run.start(config={"recipe": "grpo"}, recipe={}, seed=seed)
        ...     run.append("metrics", {"step": 1, "entropy/mean": 1.5 - seed})
        >>> join(runs)[["recipe", "seed", "step", "entropy/mean"]]
          recipe  seed  step  entropy/mean
        0   grpo     0     1           1.5
        1   grpo     1     1           0.5
        >>> join(runs).groupby("recipe")["entropy/mean"].mean().to_dict()
        {'grpo': 1.0}
    """
    choose("table", table, TABLES)
    records = [_record(run) for run in runs]
    if not records:
        raise ValueError("join needs at least one run directory, got none; name the directories of `train --out`")
    names = [record.path.resolve().name for record in records]
    unique = len(set(names)) == len(names)
    frames = []
    for name, record in zip(names, records, strict=True):
        header, frame = record.header(), _table(record, table)
        columns = {
            "run": name if unique else str(record.path),
            "recipe": header.get("config", {}).get("recipe"),
            "seed": header.get("seed"),
        }
        for place, (column, value) in enumerate(columns.items()):
            frame.insert(place, column, value)
        frames.append(frame)
    return pandas_module().concat(frames, ignore_index=True)


def _record(run: Record | str | Path) -> Record:
    return run if isinstance(run, Record) else Record(run)


def _table(run: Record | str | Path, name: str) -> DataFrame:
    record = _record(run)
    record.header()
    rows = [{key: _encodable(value) for key, value in row.items()} for row in record.rows(name)]
    return pandas_module().DataFrame(rows)


def _encodable(value: Any) -> Any:
    """Text without lone halves of surrogate pairs, which pandas cannot store."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def pandas_module() -> Any:
    """pandas, imported.

    Raises:
        ImportError: it is missing.
    """
    try:
        import pandas
    except ImportError:
        raise ImportError(
            "tables of runs need pandas, which is not installed; pip install 'isentropic[notebook]'"
        ) from None
    return pandas


class Run:
    """A run directory, loaded; files are read once, when they are first asked for.

    Attributes:
        path: the directory.
        header: run.json.
        config: the settings, resolved.
        recipe: the fields of the recipe.
        summary: the closing figures, see :func:`isentropic.runs.summary.summary`; of the rows so far if it has not
            ended.
        ended: whether it has ended.
        metrics, evaluations, samples: pandas tables, see :func:`metrics`.
    """

    def __init__(self, record: Record):
        self.path, self.header = record.path, record.header()
        self._record = record

    @property
    def config(self) -> dict[str, Any]:
        """The settings, resolved."""
        return self.header.get("config") or {}

    @property
    def recipe(self) -> dict[str, Any]:
        """The fields of the recipe."""
        return self.header.get("recipe") or {}

    @property
    def ended(self) -> bool:
        """Whether summary.json is written."""
        return (self.path / "summary.json").is_file()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The closing figures."""
        if self.ended:
            return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        return summary(self._rows, self._record.rows("evaluations"))

    @cached_property
    def metrics(self) -> DataFrame:
        """A row per optimizer step."""
        return metrics(self._record)

    @cached_property
    def evaluations(self) -> DataFrame:
        """A row per evaluation."""
        return evaluations(self._record)

    @cached_property
    def samples(self) -> DataFrame:
        """A row per completion that was kept."""
        return samples(self._record)

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in self._record.rows("metrics") if is_number(row.get("step"))]

    @cached_property
    def _evaluations(self) -> list[dict[str, Any]]:
        """The evaluations on the last task."""
        rows = [row for row in self._record.rows("evaluations") if counted(row)]
        return [row for row in rows if row.get("task") == rows[-1].get("task")]

    def __repr__(self) -> str:
        last = self._rows[-1] if self._rows else {}
        named = (self.config.get("recipe"), self.header.get("task"))
        about = " on ".join(text if len(text) <= 30 else f"{text[:29]}…" for text in map(str, filter(None, named)))
        state = f"{'ended after' if self.ended else 'at'} step {last.get('step', 0)}"
        shown = [
            f"{name} {last[key]:.3g}"
            for name, key in (("entropy", "entropy/mean"), ("target", "entropy/target"), ("reward", "reward/mean"))
            if is_number(last.get(key))
        ]
        return f"<Run {self.path.resolve().name}: {', '.join(text for text in (about, state, *shown) if text)}>"

    def plot(self, *others: Run) -> Figure:
        """Draw entropy against its target, the knob, the reward, and the frontier over temperature.

        A panel without data is left out. The frontier is that of the last task: pass@1 against distinct correct
        answers, a point for each sampling temperature, before training (dotted) and after the last step.

        Args:
            *others: runs to draw beside this one.

        Returns:
            The figure. The last value of a notebook's cell is shown; ``savefig`` writes a file.

        Raises:
            ImportError: matplotlib is missing.
        """
        plt, runs = _pyplot(), [self, *others]
        panels = [panel for panel in (_entropy, _knob, _reward, _frontier) if any(panel(run, None, "") for run in runs)]
        num = max(1, len(panels))
        figure, axes = plt.subplots(1, num, figsize=(3.6 * num, 3.0), squeeze=False, layout="constrained")
        for panel, ax in zip(panels, axes[0], strict=False):
            for number, run in enumerate(runs):
                panel(run, ax, f"C{number}")
            ax.grid(alpha=0.25)
        handles = [plt.Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(_names(runs))]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 4), frameon=False)
        plt.close(figure)  # a notebook would show it twice
        return figure


def load_run(path: str | Path) -> Run:
    """Load a run directory; the run need not have ended.

    Args:
        path: the directory of ``isentropic train --out``, or ``output_dir`` of a trainer.

    Raises:
        ValueError: not a run directory.

    Example:
        >>> import tempfile
        >>> record = Record(tempfile.mkdtemp())
        >>> record.start(config={"recipe": "grpo", "steps": 4}, recipe={}, seed=0, task="expr")
        >>> record.append("metrics", {"step": 1, "entropy/mean": 1.5}, {"step": 2, "entropy/mean": 0.5})
        >>> run = load_run(record.path)
        >>> run.summary["entropy/start"], run.ended
        (1.5, False)
        >>> run
        <Run ...: grpo on expr, at step 2, entropy 0.5>
    """
    return Run(Record(path))


def _names(runs: Sequence[Run]) -> list[str]:
    """Names of directories, or whole paths if two are the same."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


# A panel draws a run on its axes, and says whether the run has data for it; without axes it only says so.


def _curve(run: Run, ax: Axes | None, key: str, **style: Any) -> bool:
    pairs = [(row["step"], row[key]) for row in run._rows if is_number(row.get(key))]
    if pairs and ax is not None:
        ax.plot(*zip(*pairs, strict=True), **style)
        ax.set_xlabel("optimizer step")
    return bool(pairs)


def _entropy(run: Run, ax: Axes | None, colour: str) -> bool:
    if ax is not None:
        ax.set_title(METRICS["entropy/mean"], fontsize=9)
        _curve(run, ax, "entropy/target", color=colour, linestyle="--", linewidth=1)
    return _curve(run, ax, "entropy/mean", color=colour, linewidth=1)


def _knob(run: Run, ax: Axes | None, colour: str) -> bool:
    if ax is not None and run.recipe.get("knob"):
        known = [name for name in ax.get_title().removeprefix("Knob: ").split(", ") if name]
        ax.set_title(f"Knob: {', '.join(dict.fromkeys([*known, run.recipe['knob']]))}", fontsize=9)
    return _curve(run, ax, "knob/value", color=colour, linewidth=1)


def _reward(run: Run, ax: Axes | None, colour: str) -> bool:
    if ax is not None:
        ax.set_title(METRICS["reward/mean"], fontsize=9)
    return _curve(run, ax, "reward/mean", color=colour, linewidth=1)


def _frontier(run: Run, ax: Axes | None, colour: str) -> bool:
    rows = [row for row in run._evaluations if row.get("at")]
    if rows and ax is not None:
        ax.set_title(f"Distinct correct answers of {rows[-1]['k']}, by temperature", fontsize=9)
        ax.set_xlabel("pass@1")
        for row, style in ((rows[0], ":"), (rows[-1], "-"))[len(rows) == 1 :]:
            path = points(row)
            ax.plot([p.accuracy for p in path], [p.distinct for p in path], f"o{style}", color=colour, markersize=3)
        for p in path:
            name = f"{p.temperature:g}" if p.temperature else "greedy"
            ax.annotate(name, (p.accuracy, p.distinct), xytext=(3, 3), textcoords="offset points", fontsize=7)
    return bool(rows)


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError(
            "plots of runs need matplotlib, which is not installed; pip install 'isentropic[notebook]'"
        ) from None
    return plt
