"""`isentropic compare`: run a grid, or compare runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..experiments.config import ConfigError, config_errors, total_steps
from ..runs.record import Record
from ..runs.text import as_json, show
from .failures import check_file, make_folder
from .parser import add_command


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "compare",
        compare,
        "run recipes x tasks x seeds, or compare runs",
        "Run the missing cells of a grid, then print which method is better and how sure that is. Finished cells never "
        "run again.",
    )
    parser.add_argument("paths", nargs="*", metavar="GRID.toml | RUN", help="a grid, or directories of finished runs")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="recipes, or some of the grid's cells")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks [the grid's, or expr]")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="seeds [the grid's, or 0]")
    parser.add_argument("--set", nargs="+", metavar="KEY=VALUE", default=[], help="settings of train for every run")
    parser.add_argument("--baseline", help="a cell; the others' probability of improvement over it is printed")
    parser.add_argument("--jobs", type=int, help="runs at a time, one thread each [one per core]")
    parser.add_argument("--out", help="directory of the run directories [runs/GRID]")
    parser.add_argument(
        "--results", help="file with a line per finished run, compressed if it ends in .gz [OUT/results.jsonl]"
    )
    parser.add_argument("--only-table", action="store_true", help="run nothing: tabulate the finished runs")
    parser.add_argument("--dry-run", action="store_true", help="check every cell, list them, stop")
    parser.add_argument("--json", action="store_true", help="print the estimates as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")


class _Results(NamedTuple):
    """Finished runs: their lines, a directory of each cell, the output directory, the baseline, the errors."""

    lines: list[dict[str, Any]]
    runs: dict[str, Path]
    folder: Path | None
    baseline: str | None
    failed: list[str]


def compare(args: dict[str, Any]) -> int:
    """Run a grid if one is named, and print the tables."""
    from ..experiments import compare as comparisons

    with config_errors():
        results = _of_runs(args) if _names_runs(args["paths"]) else _of_grid(args)
        if results is None:
            return 0
        comparison = comparisons.compare(results.lines, results.baseline)
    if results.folder is not None:
        comparisons.write(comparison, results.lines, results.folder)
        if not args["only_table"]:
            _write_report(comparison, results, results.folder / "report.html")
    if args["json"]:
        print(as_json(comparison.as_json()))
    else:
        show(comparisons.render(comparison, args["markdown"]))
    return 1 if results.failed else 0


def _names_runs(paths: Sequence[str]) -> bool:
    """Whether the arguments are run directories, and not one grid."""
    if len(paths) > 1 and not any(Path(path).is_dir() for path in paths):
        raise ConfigError(
            f"compare takes one grid, or directories of runs, got {' '.join(paths)}; leave the others out"
        )
    return bool(paths) and (len(paths) > 1 or not paths[0].endswith(".toml"))


def _of_runs(args: dict[str, Any]) -> _Results:
    """The results of run directories."""
    from ..experiments.lines import line_of, name_cells

    unused = [name for name in ("recipes", "tasks", "seeds", "set", "jobs", "results") if args[name]]
    if unused:
        raise ConfigError(f"--{unused[0]} belongs to a grid, got run directories; leave one of them out")
    runs = _run_directories(args["paths"])
    lines = name_cells(line_of(Record(path)) for path in runs)
    if args["out"]:
        make_folder("--out", args["out"])
    by_cell = {line["cell"]: path for line, path in reversed(list(zip(lines, runs, strict=True)))}
    return _Results(lines, by_cell, Path(args["out"]) if args["out"] else None, args["baseline"], [])


def _of_grid(args: dict[str, Any]) -> _Results | None:
    """The results of a grid, after its missing cells have run; None after a dry run."""
    from ..experiments.grid import load_grid, run, settings_from

    names = ("out", "results", "baseline", "jobs", "tasks", "seeds", "recipes")
    flags = {**{name: args[name] for name in names}, "settings": settings_from(args["set"])}
    grid = load_grid(args["paths"][0] if args["paths"] else None, flags)
    if args["dry_run"]:
        _print_cells(grid)
        return None
    failed: list[str] = []
    if not args["only_table"]:
        check_file("--results", grid.results)
        make_folder("--out", grid.out)
        failed = run(grid, say=_say)
    lines = grid.lines()
    first_runs = {cell.name: cell.folder(grid.out) for cell in reversed(grid.cells)}
    runs = {name: path for name, path in first_runs.items() if (path / "summary.json").exists()}
    baseline = grid.baseline if grid.baseline in {line["cell"] for line in lines} else None
    return _Results(lines, runs, grid.out, baseline, failed)


def _write_report(comparison: Any, results: _Results, out: Path) -> None:
    """Write the page of a comparison; an error in it does not fail the comparison."""
    from ..experiments.compare import remarks, tables
    from ..report import Compared, write_comparison

    try:
        found = Compared(results.lines, tables(comparison), remarks(comparison), results.runs)
        _say(f"report: {write_comparison(found, out)}")
    except Exception as error:
        _say(f"no report: {error}")


def _say(text: str) -> None:
    """Progress goes to stderr, so that the tables can be piped."""
    show(text, sys.stderr)


def _run_directories(paths: Sequence[str]) -> list[Path]:
    """The run directories that are named, or those inside a directory that is not one; each once.

    What lies beside them, such as the tables of an earlier comparison, is skipped with a word.
    """
    runs: list[Path] = []
    strays: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(child.parent for child in path.glob("*/run.json"))
        if (path / "run.json").exists() or not path.exists():
            runs.append(path)  # one that does not exist is refused when it is read
        else:
            runs += inside
            strays += [] if inside else [path]
    if not runs:
        raise ConfigError(f"no run directory among {' '.join(paths)}: none has a run.json; name those of `train --out`")
    for path in strays:
        _say(f"skipped {path}: not a run directory")
    return list({path.resolve(): path for path in runs}.values())


def _print_cells(grid: Any) -> None:
    missing = {id(cell) for cell in grid.missing()}
    width = max(len(cell.name) for cell in grid.cells)
    for cell in grid.cells:
        state = "to run" if id(cell) in missing else "done"
        text = f"{cell.name:{width}}  {cell.task}  seed {cell.seed}  {total_steps(cell.config)} steps  {state}"
        show(text)
    print(f"{len(missing)} of {len(grid.cells)} runs to do, {grid.jobs} at a time; results in {grid.results}")
