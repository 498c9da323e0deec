"""A finished run as one line of a results file: its settings, figures, evaluations and curves.

A table and a plot can be made of lines without the run directories. Lines with the same settings except task and seed
are one cell.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..control.names import choose
from ..recipes import Recipe
from ..runs.explain import readable
from ..runs.frames import pandas_module
from ..runs.frontier import by_temperature
from ..runs.record import Record, is_number, plain, read_rows, versions
from ..runs.summary import counted, scores
from .config import RunConfig, as_dict

if TYPE_CHECKING:
    from pandas import DataFrame

_CURVE_POINTS = 50
_COUNT = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # a count of samples in one character
# Settings that do not change a run's numbers, and those that distinguish the runs of a cell.
_IGNORED = ("out", "device", "save_every", "keep", "seed", "task", "audit", "report_to", "push_to_hub")


def fingerprint(config: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Eight characters that change with any setting that matters, and not with the seed, the task or the directory.

    Args:
        config: the resolved settings that differ from their defaults.
        recipe: the fields of the recipe that differ from their defaults.

    Example:
        >>> fingerprint({"steps": 40, "seed": 1}, {}) == fingerprint({"seed": 2, "steps": 40}, {})
        True
    """
    settings = {k: v for k, v in config.items() if k not in _IGNORED}
    algorithm = {k: v for k, v in recipe.items() if k not in ("formula", "source")}
    text = json.dumps([plain(settings), plain(algorithm)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def changed(config: dict[str, Any], recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a config and the fields of a recipe that differ from their defaults.

    Args:
        config: as run.json holds it.
        recipe: as run.json holds it.
    """
    default_config = as_dict(RunConfig())
    default_recipe = plain(Recipe("", "").as_dict())
    return (
        {k: v for k, v in config.items() if k not in default_config or v != default_config[k]},
        {k: v for k, v in plain(recipe).items() if k not in default_recipe or v != default_recipe[k]},
    )


def line_of(record: Record, name: str | None = None) -> dict[str, Any]:
    """The line of a finished run.

    Args:
        record: its directory.
        name: of the cell; by default the recipe's.

    Raises:
        ValueError: not a run directory, a run that has not ended, or one whose files are damaged.
    """
    header = record.header()
    if not (isinstance(header.get("config"), dict) and isinstance(header.get("recipe"), dict)):
        raise ValueError(f"{record.path / 'run.json'} holds no settings and recipe; name another run directory")
    path = record.path / "summary.json"
    if not path.is_file():
        raise ValueError(f"{record.path} has not ended: it has no summary.json; continue it by `train --resume`")
    summary = _read_summary(path)
    rows, evaluations = readable(record.rows("metrics")), record.rows("evaluations")
    config, recipe = changed(header["config"], header["recipe"])
    scores = {k: v for k, v in (summary.get("end") or summary.get("start") or {}).items() if is_number(v)}
    figures = {key: summary.get(key) for key in ("entropy/mean", "entropy/end", "reward/end", "steps", "samples")}
    figures |= {"entropy/error": summary.get("entropy/rms_error"), "seconds": _seconds(rows, summary)} | scores
    line = {
        "cell": name or str(header["config"].get("recipe")),
        "task": str(header.get("task")),
        "seed": header["seed"] if is_number(header.get("seed")) else None,
        "fingerprint": fingerprint(config, recipe),
        "figures": figures,
        "start": summary.get("start") or {},
        "entropy_start": summary.get("entropy/start"),
        "target": summary.get("entropy/target"),
        "evaluations": _evaluations(evaluations),
        "curve": _curve(rows),
        "settings": {k: v for k, v in config.items() if k != "out"},
        "origin": header.get("origin"),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
    }
    line |= {"best": summary["best"]} if summary.get("best") else {}
    return plain(line | ({"stopped": summary["stopped"]} if summary.get("stopped") else {}))


def _evaluations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The scores of every evaluation, and of the last one of each task the counts by prompt, a character each."""
    last = {row.get("task"): i for i, row in enumerate(rows)}
    lines = []
    for i, row in enumerate(rows):
        lines.append({key: row.get(key) for key in ("task", "k", "temperature")} | scores(row))
        if last[row.get("task")] == i and counted(row) and max(row["num_samples"]) < len(_COUNT):
            sampled = {
                f"{t:g}": [_packed(counts["num_correct"]), _packed(counts["num_distinct"])]
                for t, counts in by_temperature(row).items()
            }
            lines[-1]["counts"] = sampled | {"greedy": _packed(row.get("greedy_correct") or [])}
    return lines


def _packed(counts: Sequence[int]) -> str:
    return "".join(_COUNT[n] for n in counts)


def unpacked(text: str) -> list[int]:
    """The counts by prompt of a line's evaluation.

    Example:
        >>> unpacked("0fz")
        [0, 15, 35]
    """
    return [_COUNT.index(c) for c in text]


def last_row(line: dict[str, Any]) -> dict[str, Any]:
    """The last evaluation of a line as the row that it was, as far as the line holds it."""
    temperature = line["settings"].get("temperature", RunConfig.temperature)
    row = {"temperature": temperature, **(line.get("evaluations") or [{}])[-1]}
    counts = {t: unpacked(packed[0]) for t, packed in row.get("counts", {}).items() if t != "greedy"}
    if own := counts.get(f"{temperature:g}"):
        row |= {"num_correct": own, "num_samples": [row["k"]] * len(own)}
        row["greedy_correct"] = unpacked(row["counts"].get("greedy", ""))
        row["at"] = {t: {**row.get("at", {})[t], "num_correct": counts[t]} for t in row.get("at", {}) if t in counts}
    return row


def _read_summary(path: Path) -> dict[str, Any]:
    """summary.json: numbers, two evaluations, and texts; a field of another kind is left out."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; leave this run out") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{path} holds no object; leave this run out")
    kinds = {"start": dict, "end": dict, "best": dict, "before": dict, "stopped": str, "task": str}
    return {k: v for k, v in summary.items() if (isinstance(v, kinds[k]) if k in kinds else is_number(v))}


def _seconds(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> float:
    """Wall clock of all processes of a run: of a resumed one, the seconds start again at 0."""
    total, last = 0.0, 0.0
    for seconds in (row["seconds"] for row in rows if "seconds" in row):
        if seconds < last:
            total += last
        last = seconds
    return round(total + max(last, summary.get("seconds", 0.0)), 1)


def _curve(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Means over equal segments of the run, few enough to keep in a results file."""
    split = np.array_split(np.arange(len(rows)), min(_CURVE_POINTS, len(rows)))
    segments = [segment for segment in split if len(segment)]

    def mean(key: str) -> list[float | None]:
        values = [[rows[i][key] for i in segment if rows[i].get(key) is not None] for segment in segments]
        return [round(float(np.mean(numbers)), 5) if numbers else None for numbers in values]

    steps = [rows[segment[-1]]["step"] for segment in segments]
    return {"step": steps, "entropy": mean("entropy/mean"), "reward": mean("reward/mean"), "knob": mean("knob/value")}


def name_cells(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines whose cells have different names: to a name with several settings, the settings that differ are added."""
    lines = list(lines)
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        by_name.setdefault(line["cell"], {})[line["fingerprint"]] = line["settings"]
    named = []
    for line in lines:
        variants = by_name[line["cell"]].values()
        keys = sorted({k for settings in variants for k in settings if k not in _IGNORED})
        differing = [k for k in keys if len({json.dumps(s.get(k), sort_keys=True) for s in variants}) > 1]
        suffix = " ".join(f"{k}={line['settings'].get(k, 'default')}" for k in differing)
        named.append({**line, "cell": f"{line['cell']} {suffix}".strip()})
    return named


def load_runs(path: str | Path, table: str = "figures") -> DataFrame:
    """The finished runs of a grid as one tidy table.

    Args:
        path: the output directory of `isentropic compare`, any directory of run directories, or a results file,
            ``.jsonl`` or ``.jsonl.gz``.
        table: ``figures``, a row per run: the closing figures, and under ``config/`` the settings that differ;
            ``evaluations``, a row per evaluation and sampling temperature, greedy answers at temperature 0; or
            ``curves``, a row per segment of a run, at most 50 of them: entropy (nats per token), reward and knob.

    Returns:
        Rows in the order of the runs, after the columns ``cell``, ``recipe``, ``task`` and ``seed``. Runs that have not
        ended are left out.

    Raises:
        ValueError: nothing there has ended, or another table.
        ImportError: pandas is missing.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "results.jsonl"
        >>> line = {"cell": "grpo", "task": "expr", "settings": {"recipe": "grpo"}, "figures": {"pass@1": 0.5}}
        >>> _ = path.write_text("".join(json.dumps({**line, "seed": seed}) + "\\n" for seed in (0, 1)))
        >>> load_runs(path)[["cell", "seed", "pass@1"]]
           cell  seed  pass@1
        0  grpo     0     0.5
        1  grpo     1     0.5
    """
    rows_of = {"figures": _figure_rows, "evaluations": _evaluation_rows, "curves": _curve_rows}
    choose("table", table, rows_of)
    lines = _lines_at(Path(path))
    if not lines:
        raise ValueError(f"no run has ended in {path}; name a directory of run directories, or a results file")
    settings = [line.get("settings") or {} for line in lines]
    keys = sorted({key for given in settings for key in given if key not in (*_IGNORED, "recipe")})
    differing = [k for k in keys if len({json.dumps(given.get(k), sort_keys=True) for given in settings}) > 1]
    default = as_dict(RunConfig())
    rows = []
    for line, given in zip(lines, settings, strict=True):
        run = {"cell": line["cell"], "recipe": given.get("recipe", RunConfig.recipe)}
        run |= {"task": line.get("task"), "seed": line.get("seed")}
        run |= {f"config/{key}": given.get(key, default.get(key)) for key in differing}
        rows += [run | row for row in rows_of[table](line)]
    return pandas_module().DataFrame(rows)


def _lines_at(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file, or of the ended runs in a directory."""
    if not path.is_dir():
        return [line for line in read_rows(path) if "cell" in line]
    ended = sorted(found.parent for found in [path / "summary.json", *path.glob("*/summary.json")] if found.is_file())
    return name_cells(line_of(Record(run)) for run in ended if Record(run).begun())


def _figure_rows(line: dict[str, Any]) -> list[dict[str, Any]]:
    more = {"entropy/start": line.get("entropy_start"), "entropy/target": line.get("target")}
    return [{**(line.get("figures") or {}), **more, "stopped": line.get("stopped")}]


def _evaluation_rows(line: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in line.get("evaluations") or []:
        about = {"evaluated": row.get("task"), "step": row.get("step")}
        for temperature, counts in by_temperature(row).items():
            figures = {
                k: v for k, v in counts.items() if is_number(v) and k.startswith(("pass@", "distinct", "majority"))
            }
            rows.append({**about, "temperature": temperature, **figures})
        if is_number(row.get("greedy")):
            rows.append({**about, "temperature": 0.0, "pass@1": row["greedy"]})
    return rows


def _curve_rows(line: dict[str, Any]) -> list[dict[str, Any]]:
    curve = line.get("curve") or {}
    return [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]
