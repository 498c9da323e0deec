"""`isentropic train` and `isentropic audit`."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..experiments.config import ConfigError, RunConfig, as_dict, config_errors, load, recipe_of, total_steps
from ..models import resolve_model
from ..runs.record import Record
from ..tasks import KINDS
from .parser import PROG, add_command, add_settings, heavy


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
    config = load(path, args, base)
    if not resume:
        config = _with_out(config)
    if dry_run:
        return _dry_run(config)
    if config.model == "smollm2":
        with config_errors():  # it has to be fetched before; say so before anything heavy is imported
            resolve_model(config.model)
    experiment = heavy("experiments.train")
    heavy("models.loading").quiet()
    try:
        resolve_model(config.model, rebuild=rebuild)
        summary = experiment.train(config, resume, write_report=_write_report)
    except KeyboardInterrupt:
        if not (Path(str(config.out)) / "run.json").exists():
            raise
        print(f"stopped; resume with: {PROG} train --out {config.out} --resume", file=sys.stderr)
        return 130
    from ..experiments.terminal import closing_table

    print(closing_table(summary, str(config.out)))
    return 1 if summary.get("stopped") else 0


def _write_report(record: Record) -> Path:
    from ..report import write

    return write([record.path], record.path / "report.html")


def audit(args: dict[str, Any]) -> int:
    """Audit a config's trainer, and print the report."""
    as_json, path = args.pop("json"), args.pop("config")
    config = load(path, args)
    experiment = heavy("experiments.train")
    heavy("models.loading").quiet()
    report = experiment.audit(config)
    print(report.json() if as_json else report.text())
    return 1 if report.serious else 0


def _settings_to_resume(out: str | None, path: str | None) -> dict[str, Any]:
    """The settings of a run directory, by default the latest one under runs/."""
    if path is not None:
        raise ConfigError(f"--resume takes the settings of the run directory, got also {path}; leave the file out")
    if out is None:
        runs = sorted(Path("runs").glob("*/run.json"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise ConfigError("--resume: no run under runs/; name its directory with --out")
        out = str(runs[-1].parent)
    with config_errors("--resume: "):
        header = Record(out).header()
    return {**header["config"], "out": out}


def _with_out(config: RunConfig) -> RunConfig:
    """The config with a run directory that has no run in it."""
    if config.out is not None:
        if (Path(config.out) / "run.json").exists():
            raise ConfigError(f"--out: {config.out} already holds a run; continue it by --resume, or name another")
        return config
    stem = f"runs/{short_name(config.task)}-{Path(config.recipe).name.replace(':', '-')}-s{config.seed}"
    number = 1
    while (Path(stem if number == 1 else f"{stem}-{number}") / "run.json").exists():
        number += 1
    return replace(config, out=stem if number == 1 else f"{stem}-{number}")


def short_name(task: str) -> str:
    """The name of a task in the name of a run directory: `rg:chain_sum:max_terms=2` -> `rg-chain_sum`.

    Example:
        >>> short_name("my_tasks:spelling"), short_name("file:rows/a.jsonl:verifier=math")
        ('spelling', 'file-a')
        >>> short_name("mix:expr@1+gsm8k@2")
        'mix-expr-gsm8k'
    """
    kind, _, rest = task.partition(":")
    if kind not in KINDS:
        return task.split(":")[-1]
    if kind == "mix":
        members = re.findall(r"(.+?)@[0-9.]+(?:\+|$)", rest)
        return "-".join(["mix", *map(short_name, members)])
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
