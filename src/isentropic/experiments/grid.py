"""Many runs: recipes × tasks × seeds, a process a run, one thread each; finished cells stay finished.

A grid is a TOML file or a few flags. Every run is `isentropic train` in a process and a directory of its own; when it
ends, its line goes into the results file. A cell with a line is never run again, a killed one goes on from its
checkpoint. The results file may lie under version control: the grid goes on from there on any machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..runs.record import Record, read_rows
from .compare import changed, fingerprint, line_of
from .config import ConfigError, RunConfig, as_dict, load, recipe_of, suggest, total_steps

KEYS = ("out", "results", "baseline", "jobs", "tasks", "seeds", "recipes", "settings", "cells")
_LISTS = {"tasks": str, "seeds": int, "recipes": str}
_STATUS_EVERY = 30.0  # seconds between two status lines where the output is no terminal


class Cell(NamedTuple):
    """One run of a grid.

    Attributes:
        name, task, seed: what it is.
        config: its settings, checked.
        print: the fingerprint of what it is made of.
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

    def is_of(self, line: dict[str, Any]) -> bool:
        """Is this the line of this cell?"""
        return (line["task"], line["seed"], line["fingerprint"]) == (self.task, self.seed, self.print)


@dataclass(frozen=True)
class Grid:
    """What to run and where the results go."""

    cells: list[Cell]
    out: Path
    results: Path
    baseline: str | None = None
    jobs: int = 1

    def lines(self) -> list[dict[str, Any]]:
        """The finished cells, in the order of the grid; a cell under another name before carries the grid's."""
        known = list(read_rows(self.results))
        found = []
        for cell in self.cells:
            line = next((line for line in known if cell.is_of(line)), None)
            if line is not None:
                found.append({**line, "cell": cell.name})
        return found

    def missing(self) -> list[Cell]:
        """The cells without a line."""
        known = list(read_rows(self.results))
        return [cell for cell in self.cells if not any(cell.is_of(line) for line in known)]


def load_grid(path: str | None, flags: dict[str, Any]) -> Grid:
    """A grid from a TOML file, then the flags over it; every cell is checked before any runs.

    Args:
        path: the file, or None.
        flags: ``out``, ``results``, ``baseline``, ``jobs``, ``tasks``, ``seeds``, ``recipes`` as in the file, and
            ``settings``, a dict of settings of `train` over the file's.

    Raises:
        ConfigError: anything that cannot work.
    """
    where = f"{path}: " if path else ""
    values = _read(Path(path)) if path else {}
    settings = {**values.get("settings", {}), **flags.pop("settings", {})}
    if flags.get("recipes"):  # a choice among the file's cells, or recipes of their own
        wanted = flags.pop("recipes")
        known = {**{r: {"recipe": r} for r in values.get("recipes", [])}, **values.get("cells", {})}
        values = {**values, "recipes": [], "cells": {name: known.get(name, {"recipe": name}) for name in wanted}}
        if values.get("baseline") in known and values["baseline"] not in wanted:
            values["baseline"] = None
    values |= {k: v for k, v in flags.items() if v is not None}
    for key, kind in _LISTS.items():
        got = values.get(key, [])
        if not isinstance(got, list) or not all(type(x) is kind for x in got):
            raise ConfigError(f"{where}{key}: got {got!r}, must be a list of {kind.__name__}")
    named = {name: {"recipe": name} for name in values.get("recipes", [])} | dict(values.get("cells", {}))
    if not named:
        raise ConfigError(f"{where}recipes: got none; name recipes, or cells with their settings")
    baseline = values.get("baseline")
    if baseline is not None and baseline not in named:
        raise ConfigError(f"{where}baseline: got {baseline!r}{suggest(str(baseline), list(named))}; it must be a cell")
    jobs = values.get("jobs") or os.cpu_count() or 1
    if not isinstance(jobs, int) or jobs < 1:
        raise ConfigError(f"{where}jobs: got {jobs!r}, must be at least 1 process")
    out = Path(str(values.get("out") or f"runs/{Path(path).stem if path else 'compare'}"))
    cells = [
        _cell(where, name, task, seed, {**settings, **cell})
        for seed in values.get("seeds") or [0]
        for name, cell in named.items()
        for task in values.get("tasks") or [RunConfig.task]
    ]
    results = Path(str(values.get("results") or out / "results.jsonl"))
    return Grid(_unlike(where, cells), out, results, baseline, jobs)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a TOML file of a grid, or run directories") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for key in values:
        if key not in KEYS:
            raise ConfigError(f"{path}: unknown key {key!r}{suggest(key, list(KEYS))}; allowed: {', '.join(KEYS)}")
    for key in ("settings", "cells"):
        if not isinstance(values.get(key, {}), dict):
            raise ConfigError(f"{path}: {key}: got {values[key]!r}, must be a table")
    for name, cell in values.get("cells", {}).items():
        if not isinstance(cell, dict):
            raise ConfigError(f"{path}: cells.{name}: got {cell!r}, must be a table of settings")
    return values


def _cell(where: str, name: str, task: str, seed: int, settings: dict[str, Any]) -> Cell:
    known = list(as_dict(RunConfig()))
    for key in settings:
        if key not in known or key in ("out", "seed", "task"):
            allowed = ", ".join(k for k in known if k not in ("out", "seed", "task"))
            raise ConfigError(f"{where}{name}: unknown setting {key!r}{suggest(key, known)}; allowed: {allowed}")
    try:
        config = load(None, {**settings, "task": task, "seed": seed})
        told, recipe = changed(as_dict(config), asdict(recipe_of(config)))
    except ConfigError as error:
        raise ConfigError(f"{where}{name}: {error}") from None
    return Cell(name, task, seed, config, fingerprint(told, recipe))


def _unlike(where: str, cells: list[Cell]) -> list[Cell]:
    seen: dict[Any, Cell] = {}
    for cell in cells:
        twin = seen.setdefault((cell.task, cell.seed, cell.print), cell)
        if twin is not cell:
            raise ConfigError(f"{where}cells {twin.name} and {cell.name} are the same run; leave one out")
    return cells


def run(grid: Grid, say: Callable[[str], None] = print) -> list[str]:
    """Run what has no line yet; returns what went wrong, a line a failed cell.

    Raises:
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM; the runs under way saved a checkpoint first.
    """
    missing = grid.missing()
    if not missing:
        return []
    grid.out.mkdir(parents=True, exist_ok=True)
    with _alone(grid.out, say) as lock, _terminated():
        for model in dict.fromkeys(cell.config.model for cell in missing):
            from ..models import resolve_model

            resolve_model(model)
        return _Runner(grid, missing, lock, say).run()


@contextlib.contextmanager
def _alone(out: Path, say: Callable[[str], None], patience: float = 60.0) -> Iterator[int]:
    """One grid a directory: the lock is inherited by the runs, and held until the last of them has ended."""
    with (out / ".lock").open("w") as file:
        for turn in range(int(patience)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if turn == 0:
                    say(f"waiting for runs in {out} that are still ending")
                time.sleep(1)
        else:
            raise ConfigError(f"--out: another comparison works in {out}; wait for it, or name another directory")
        yield file.fileno()


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM is a Ctrl-C."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _die_with_parent() -> None:
    """Where the system can: a run whose comparison was killed outright is asked to stop, and saves a checkpoint."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class _Runner:
    """The processes under way, and how far they are."""

    def __init__(self, grid: Grid, missing: list[Cell], lock: int, say: Callable[[str], None]):
        self.grid, self.waiting, self.lock, self.say = grid, list(missing), lock, say
        self.running: dict[subprocess.Popen[bytes], Cell] = {}
        self.total, self.ended, self.failed = len(missing), 0, list[str]()
        self.began = self.told = time.monotonic()
        self.todo = sum(total_steps(cell.config) for cell in missing) - sum(self.step(cell) for cell in missing)
        self.left = self.todo

    def step(self, cell: Cell) -> int:
        """Optimizer steps that a cell has done."""
        path = cell.folder(self.grid.out) / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            tail = file.read().decode(errors="replace").splitlines()
        for text in reversed(tail):
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                return int(json.loads(text)["step"])
        return 0

    def run(self) -> list[str]:
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.grid.jobs:
                    self.start(self.waiting.pop(0))
                time.sleep(0.2)
                for process in [p for p in self.running if p.poll() is not None]:
                    self.finish(process)
                self.status()
        except KeyboardInterrupt:
            self.stop()
            raise
        return self.failed

    def start(self, cell: Cell) -> None:
        folder = cell.folder(self.grid.out)
        if (folder / "summary.json").exists():
            self.write(cell)
            return
        command = [sys.executable, "-m", "isentropic.cli", "train"]
        if (folder / "run.json").exists():
            command += ["--resume"]
        else:
            folder.mkdir(parents=True, exist_ok=True)
            import tomli_w

            settings = {k: v for k, v in as_dict(cell.config).items() if v is not None and k != "out"}
            (folder / "cell.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
            command.append(str(folder / "cell.toml"))
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [*command, "--out", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
                pass_fds=(self.lock,),
                preexec_fn=_die_with_parent,
            )
        self.running[process] = cell

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        cell = self.running.pop(process)
        folder = cell.folder(self.grid.out)
        if (folder / "summary.json").exists():
            self.write(cell)
            return
        self.ended += 1
        words = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        self.failed.append(f"{cell.name}, {cell.task}, seed {cell.seed}: {words[-1] if words else 'no output'}")
        self.say(f"failed: {self.failed[-1]} (exit code {process.returncode}; {folder / 'log.txt'})")

    def write(self, cell: Cell) -> None:
        """The cell's line, and a word about it."""
        self.ended += 1
        line = line_of(Record(cell.folder(self.grid.out)), cell.name)
        # The cell's own mark: a file that a user's recipe lies in may print another path elsewhere.
        line |= {"fingerprint": cell.print}
        self.grid.results.parent.mkdir(parents=True, exist_ok=True)
        with self.grid.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        figures = line["figures"]
        shown = [f"{k} {figures[k]:.3f}" for k in ("entropy/end", "reward/end", "pass@1") if figures.get(k) is not None]
        stopped = f"; stopped: {line['stopped']}" if line.get("stopped") else ""
        self.say(
            f"[{self.ended}/{self.total}] {cell.name}, {cell.task}, seed {cell.seed}: {', '.join(shown)}, "
            f"{figures['seconds']:.0f} s{stopped}; {self.eta()}"
        )

    def eta(self) -> str:
        """Time left for the whole grid, from the optimizer steps of this session."""
        open_cells = [*self.running.values(), *self.waiting]
        self.left = sum(total_steps(cell.config) - self.step(cell) for cell in open_cells)
        done = self.todo - self.left
        if done <= 0:
            return f"{self.left} optimizer steps left"
        seconds = (time.monotonic() - self.began) / done * self.left
        return f"eta {int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"

    def status(self) -> None:
        every = 1.0 if sys.stderr.isatty() else _STATUS_EVERY
        if time.monotonic() - self.told < every:
            return
        self.told = time.monotonic()
        under_way = ", ".join(
            f"{c.name} s{c.seed} {self.step(c)}/{total_steps(c.config)}" for c in self.running.values()
        )
        text = f"{self.ended}/{self.total} runs, {self.eta()}: {under_way}"
        if sys.stderr.isatty():
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            print(f"\r\x1b[K{text[:width]}\r", end="", file=sys.stderr, flush=True)
        else:
            self.say(text)

    def stop(self) -> None:
        """Ask every run to save and stop, and wait for it; a second Ctrl-C ends them at once."""
        self.say("stopping: the runs under way save a checkpoint; press Ctrl-C again to end them at once")
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        try:
            for process in self.running:
                process.wait()
        except KeyboardInterrupt:
            for process in self.running:
                process.kill()
            raise
