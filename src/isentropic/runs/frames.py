"""The rows of run directories as pandas tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..control.names import choose
from .record import Record

if TYPE_CHECKING:
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
    return _pandas().concat(frames, ignore_index=True)


def _record(run: Record | str | Path) -> Record:
    return run if isinstance(run, Record) else Record(run)


def _table(run: Record | str | Path, name: str) -> DataFrame:
    record = _record(run)
    record.header()
    rows = [{key: _encodable(value) for key, value in row.items()} for row in record.rows(name)]
    return _pandas().DataFrame(rows)


def _encodable(value: Any) -> Any:
    """Text without lone halves of surrogate pairs, which pandas cannot store."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise ImportError("tables of runs need pandas, which is not installed; pip install pandas") from None
    return pandas
