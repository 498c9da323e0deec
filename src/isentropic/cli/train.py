"""`isentropic train` and `isentropic audit`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from ..experiments.config import ConfigError, RunConfig, as_dict, config_errors, load, recipe_of, total_steps
from ..experiments.devices import check_device
from ..experiments.hub import check_hub
from ..models import resolve_model
from ..runs.record import Record
from ..runs.text import show
from ..tasks import KINDS
from .parser import PROG, add_command, add_settings, heavy, settings_of


def add_to(commands: Any) -> None:
    """Add the commands."""
    parser = add_command(commands, "train", train, "train a model with its entropy under control")
    parser.add_argument("config", nargs="?", help="TOML file; its keys are the flags' names with underscores")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint of --out")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the resolved config, stop")
    parser.add_argument("--rebuild", action="store_true", help="build the embedded model again")
    add_settings(parser)
    help = "find errors of log-probs, ratios and entropy caused by precision or sampling, before training"
    parser = add_command(commands, "audit", audit, help)
    parser.add_argument("config", nargs="?", help="TOML file, as for train")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_settings(parser, leave_out=("out", "audit"))


def train(args: dict[str, Any]) -> int:
    """Run a config, and print the closing table."""
    resume, dry_run, rebuild = (args.pop(name) for name in ("resume", "dry_run", "rebuild"))
    path = args.pop("config")
    base = _settings_to_resume(args.get("out"), path) if resume else None
    config = load(path, settings_of(args), base)
    if dry_run:
        return _dry_run(config if resume else _with_out(config))
    check_device(config.device)
    if config.push_to_hub is not None:
        check_hub(config.push_to_hub)
    with _claimed(config, resume) as config:
        return _train(config, resume, rebuild)


def _train(config: RunConfig, resume: bool, rebuild: bool) -> int:
    if config.model == "smollm2":
        with config_errors():  # it has to be fetched before; say so before anything heavy is imported
            resolve_model(config.model)
    experiment = heavy("experiments.train")
    heavy("models.loading").quiet()
    try:
        resolve_model(config.model, rebuild=rebuild)
        summary = experiment.train(config, resume, write_report=_write_report)
    except KeyboardInterrupt:
        if not Record(str(config.out)).begun():
            raise
        show(f"stopped; resume with: {PROG} train --out {config.out} --resume", sys.stderr)
        return 130
    from ..runs.summary import closing_table

    show(closing_table(summary, str(config.out)))
    return 1 if summary.get("stopped") else 0


def _write_report(record: Record) -> Path:
    from ..report import write

    return write([record.path], record.path / "report.html")


def audit(args: dict[str, Any]) -> int:
    """Audit a config's trainer, and print the report."""
    as_json, path = args.pop("json"), args.pop("config")
    config = load(path, settings_of(args))
    experiment = heavy("experiments.train")
    heavy("models.loading").quiet()
    report = experiment.audit(config)
    show(report.json() if as_json else report.text())
    return 1 if report.serious else 0


def _settings_to_resume(out: str | None, path: str | None) -> dict[str, Any] | None:
    """The settings of a run directory, by default the latest one under runs/; None if there is no run."""
    if path is not None and out is None:
        raise ConfigError("--resume and a file: name the run directory too, by --out, or leave the file out")
    if out is None:
        runs = sorted(Path("runs").glob("*/run.json"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise ConfigError("--resume: no run under runs/; name its directory with --out")
        out = str(runs[-1].parent)
    record = Record(out)
    _refuse_strangers(record)
    if not record.begun():
        return None
    with config_errors("--resume: "):
        settings = record.header().get("config")
        if not isinstance(settings, dict):
            raise ValueError(f"{out} has no settings in its run.json; name another run directory")
        return {**settings, "out": out}


def _refuse_strangers(record: Record) -> None:
    if record.path.exists() and not record.path.is_dir():
        raise ConfigError(f"--out: {record.path} is a file; name a directory that is new or empty")
    if strangers := record.strangers():
        raise ConfigError(
            f"--out: {record.path} holds no run but has other files, such as {strangers[0]}; "
            "name a directory that is new or empty"
        )


def _free(config: RunConfig) -> None:
    """Refuse a directory that holds a run, or anything else."""
    if Record(str(config.out)).begun():
        raise ConfigError(f"--out: {config.out} already holds a run; continue it by --resume, or name another")
    _refuse_strangers(Record(str(config.out)))


@contextmanager
def _claimed(config: RunConfig, resume: bool) -> Iterator[RunConfig]:
    """The config with its run directory, whose lock is held from here on: two runs may start within a second."""
    if os.environ.get("RANK", "0") != "0":  # the main process answers for the directory
        yield config if config.out is not None else _with_out(config)
        return
    from ..runs.lock import held  # locks of files are not everywhere, and the other commands need none

    with ExitStack() as stack:
        for number in count(1):
            named = config if config.out is not None else replace(config, out=_default_out(config, number))
            if config.out is None and not _is_free(str(named.out)):
                continue
            _refuse_strangers(Record(str(named.out)))
            try:
                stack.enter_context(held(str(named.out)))
            except ValueError as error:
                if config.out is None:
                    continue
                raise ConfigError(f"--out: {error}") from None
            except OSError as error:
                raise ConfigError(f"--out: {named.out} cannot be made: {error.strerror}; name another") from None
            if not resume:
                _free(named)
            yield named
            return


def _with_out(config: RunConfig) -> RunConfig:
    """The config with a run directory that has no run in it."""
    if config.out is not None:
        _free(config)
        return config
    names = (_default_out(config, number) for number in count(1))
    return replace(config, out=next(name for name in names if _is_free(name)))


def _default_out(config: RunConfig, number: int) -> str:
    tasks = "-then-".join(map(short_name, (config.task, *config.then)))
    stem = f"runs/{tasks}-{Path(config.recipe).name.replace(':', '-')}-s{config.seed}"
    return stem if number == 1 else f"{stem}-{number}"


def _is_free(out: str) -> bool:
    record = Record(out)
    return not record.begun() and not record.strangers()


def short_name(task: str) -> str:
    """The name of a task in the name of a run directory: `rg:chain_sum:max_terms=2` -> `rg-chain_sum`.

    Example:
        >>> short_name("my_tasks:spelling"), short_name("file:rows/a.jsonl:verifier=math")
        ('spelling', 'file-a')
        >>> short_name("mix:expr@1+gsm8k@2"), short_name("expr:need=last,product")
        ('mix-expr-gsm8k', 'expr-last-product')
    """
    kind, _, rest = task.partition(":")
    if kind not in KINDS:
        return task.split(":")[-1]
    if kind == "mix":
        members = re.findall(r"(.+?)@[0-9.]+(?:\+|$)", rest)
        return "-".join(["mix", *map(short_name, members)])
    word = rest.split(":")[0]
    if kind == "expr" and word:
        return f"expr-{re.sub('[^a-z0-9.]+', '-', word.removeprefix('need='))}"
    return kind if not word or "=" in word else f"{kind}-{Path(word).stem}"


def _dry_run(config: RunConfig) -> int:
    recipe = recipe_of(config)
    width = max(len(key) for key in as_dict(config))
    for key, value in as_dict(config).items():
        show(f"{key:{width}}  {value}")
    show(f"\n{config.recipe}: {recipe.formula}")
    print(f"knob {recipe.knob or 'none'}, controller {recipe.controller}, target {recipe.target}")
    steps = total_steps(config)
    print(
        f"{steps} optimizer steps of {config.prompts * config.generations // config.updates} completions; "
        f"{-(-steps // config.updates) * config.prompts * config.generations} completions in all"
    )
    return 0
