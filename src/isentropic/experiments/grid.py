"""Grids of runs: recipes × tasks × seeds, one process and one thread a run; finished cells never run again.

A grid is a TOML file or a few flags. Every run is `isentropic train` in a process and a directory of its own; when it
ends, its line is appended to the results file. A cell with a line is never run again, and an interrupted one resumes
from its checkpoint. The results file may be under version control: the grid then continues from it on any machine.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..control.names import suggest
from ..runs.record import read_rows
from ..runs.text import show
from .config import ConfigError, RunConfig, as_dict, config_errors, load, read_toml, recipe_of
from .devices import check_device
from .lines import changed, fingerprint
from .origin import differs, origin
from .processes import Processes, exclusive, interrupted_by_sigterm

KEYS = ("out", "results", "baseline", "jobs", "tasks", "seeds", "recipes", "settings", "cells")
_LISTS = {"tasks": str, "seeds": int, "recipes": str}
_OF_THE_GRID = ("out", "seed", "task")  # settings that the grid decides


class Cell(NamedTuple):
    """One run of a grid.

    Attributes:
        name, task, seed: of the run; the task as the grid names it, which may be a sequence.
        config: its settings, checked.
        print: its fingerprint, which changes with any setting that matters.
    """

    name: str
    task: str
    seed: int
    config: RunConfig
    print: str

    def folder(self, out: Path) -> Path:
        """The run directory."""
        name = re.sub(r"[^\w.@+-]+", "-", f"{self.name}-{self.task}").strip("-")
        return out / f"{name}-s{self.seed}-{self.print}"

    def matches(self, line: dict[str, Any]) -> bool:
        """Whether a line of the results file is this cell's."""
        known = (line.get("task"), line.get("seed"), line.get("fingerprint"))
        return known == (self.config.task, self.seed, self.print)


@dataclass(frozen=True)
class Grid:
    """The runs of a grid, and the place of its results.

    Attributes:
        cells: in the order in which they run.
        out: directory of the run directories.
        results: the results file, JSON lines, compressed if its name ends in ``.gz``.
        baseline: a cell's name, or None.
        jobs: processes at a time.
    """

    cells: list[Cell]
    out: Path
    results: Path
    baseline: str | None = None
    jobs: int = 1

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the finished cells, in the order of the grid and under the grid's names of cells and tasks."""
        results = list(read_rows(self.results))
        lines = []
        for cell in self.cells:
            line = next((line for line in results if cell.matches(line)), None)
            if line is not None:
                lines.append({**line, "cell": cell.name, "task": cell.task})
        return lines

    def refuse_stale(self, origins: Callable[[Mapping[str, Any]], dict[str, Any]] = origin) -> None:
        """Refuse lines of these cells whose numbers have another origin than a run of today would have.

        Args:
            origins: config -> the origin of its numbers.

        Raises:
            ConfigError: such lines, their number, and by what they differ.
        """
        stale: dict[str, int] = {}
        lines = list(read_rows(self.results))
        for cell in self.cells:
            found = [line for line in lines if cell.matches(line)]
            word = differs(found[0].get("origin"), origins(as_dict(cell.config))) if found else None
            if word is not None:
                stale[word] = stale.get(word, 0) + 1
        if stale:
            words = "; ".join(f"{num} {word}" for word, num in stale.items())
            raise ConfigError(
                f"{self.results}: {sum(stale.values())} of {len(self.cells)} runs have a line that new runs may not "
                f"be compared with: {words}; name another results file, delete those lines, or tabulate them "
                "as they are by --only-table"
            )

    def missing(self) -> list[Cell]:
        """The cells without a line."""
        results = list(read_rows(self.results))
        return [cell for cell in self.cells if not any(cell.matches(line) for line in results)]


def load_grid(path: str | None, flags: dict[str, Any]) -> Grid:
    """A grid from a TOML file and flags, which take precedence; every cell is checked before any runs.

    Args:
        path: the file, or None.
        flags: ``out``, ``results``, ``baseline``, ``jobs``, ``tasks``, ``seeds``, ``recipes`` as in the file, and
            ``settings``, a dict of settings of `train`.

    Raises:
        ConfigError: anything that cannot work.
    """
    where = f"{path}: " if path else ""
    values = _read(Path(path)) if path else {}
    settings = {**values.get("settings", {}), **flags.get("settings", {})}
    if flags.get("recipes"):
        values = _with_recipes(values, flags["recipes"])
    values |= {k: v for k, v in flags.items() if v is not None and k not in ("settings", "recipes")}
    for key, kind in _LISTS.items():
        got = values.get(key, [])
        if not isinstance(got, list) or not all(type(x) is kind for x in got):
            raise ConfigError(f"{where}{key}: got {got!r}, must be a list of {kind.__name__}")
    named = {name: {"recipe": name} for name in values.get("recipes", [])} | dict(values.get("cells", {}))
    if not named:
        raise ConfigError(f"{where}recipes: got none; name recipes, or cells with their settings")
    baseline = values.get("baseline")
    if baseline is not None and baseline not in named:
        raise ConfigError(f"{where}baseline: got {baseline!r}{suggest(baseline, named)}; it must be a cell")
    jobs = values.get("jobs", os.cpu_count() or 1)
    if type(jobs) is not int or jobs < 1:
        raise ConfigError(f"{where}jobs: got {jobs!r}, must be at least 1 process")
    out = Path(str(values.get("out") or f"runs/{Path(path).stem if path else 'compare'}"))
    cells = [
        _cell(where, name, task, seed, {**settings, **cell})
        for seed in values.get("seeds") or [0]
        for name, cell in named.items()
        for task in values.get("tasks") or [RunConfig.task]
    ]
    _refuse_equal_cells(where, cells)
    return Grid(cells, out, Path(str(values.get("results") or out / "results.jsonl")), baseline, jobs)


def _read(path: Path) -> dict[str, Any]:
    values = read_toml(path, "name a TOML file of a grid, or run directories")
    for key in values:
        if key not in KEYS:
            raise ConfigError(f"{path}: unknown key {key!r}{suggest(key, KEYS)}; allowed: {', '.join(KEYS)}")
    for key in ("settings", "cells"):
        if not isinstance(values.get(key, {}), dict):
            raise ConfigError(f"{path}: {key}: got {values[key]!r}, must be a table")
    for name, cell in values.get("cells", {}).items():
        if not isinstance(cell, dict):
            raise ConfigError(f"{path}: cells.{name}: got {cell!r}, must be a table of settings")
    return values


def _with_recipes(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A grid file with a choice among its cells, or with other recipes."""
    known = {**{r: {"recipe": r} for r in values.get("recipes", [])}, **values.get("cells", {})}
    values = {**values, "recipes": [], "cells": {name: known.get(name, {"recipe": name}) for name in names}}
    if values.get("baseline") in known and values["baseline"] not in names:
        values["baseline"] = None
    return values


def _cell(where: str, name: str, task: str, seed: int, settings: dict[str, Any]) -> Cell:
    allowed = [key for key in as_dict(RunConfig()) if key not in _OF_THE_GRID]
    for key in settings:
        if key not in allowed:
            raise ConfigError(
                f"{where}{name}: unknown setting {key!r}{suggest(key, allowed)}; allowed: {', '.join(allowed)}"
            )
    with config_errors(f"{where}{name}: "):
        config = load(None, {**settings, "task": task, "seed": seed})
        recipe = recipe_of(config)
    return Cell(name, task, seed, config, fingerprint(*changed(as_dict(config), recipe.as_dict())))


def _refuse_equal_cells(where: str, cells: Sequence[Cell]) -> None:
    seen: dict[Any, Cell] = {}
    for cell in cells:
        other = seen.setdefault((cell.config.task, cell.seed, cell.print), cell)
        if other is not cell:
            raise ConfigError(f"{where}cells {other.name} and {cell.name} are the same run; leave one out")


def settings_from(pairs: Sequence[str]) -> dict[str, Any]:
    """Settings from texts KEY=VALUE; a value is read as TOML if it is TOML, and as text otherwise.

    ``recipe.OPTION=VALUE`` is an entry of ``recipe_options``.

    Raises:
        ConfigError: a text without an equals sign.

    Example:
        >>> settings_from(["steps=40", "learning-rate=1e-3", "target=75%"])
        {'steps': 40, 'learning_rate': 0.001, 'target': '75%'}
        >>> settings_from(["recipe.cov_low=2", "recipe.cov_high=3"])
        {'recipe_options': {'cov_low': 2, 'cov_high': 3}}
    """
    settings: dict[str, Any] = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set: got {text!r}, must be KEY=VALUE, for example steps=40")
        key = key.replace("-", "_")
        place = settings.setdefault("recipe_options", {}) if key.startswith("recipe.") else settings
        try:
            place[key.removeprefix("recipe.")] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            place[key.removeprefix("recipe.")] = value
    return settings


def run(grid: Grid, say: Callable[[str], None] = show) -> list[str]:
    """Run the cells without a line; returns the errors, a line for each failed cell.

    Raises:
        ConfigError: another comparison works in the same directory, or a cell's device is not there.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM; the current runs saved a checkpoint first.
    """
    missing = grid.missing()
    if not missing:
        return []
    for cell in missing:
        check_device(cell.config.device)
    known = cache(lambda text: origin(json.loads(text)))
    with config_errors():
        grid.refuse_stale(lambda config: known(json.dumps({k: config[k] for k in ("model", "task", "then")})))
    grid.out.mkdir(parents=True, exist_ok=True)
    with exclusive(grid.out, say) as lock, interrupted_by_sigterm():
        for model in dict.fromkeys(cell.config.model for cell in missing):
            from ..models import resolve_model

            resolve_model(model)
        return Processes(grid.out, grid.results, missing, grid.jobs, lock, say).run()
