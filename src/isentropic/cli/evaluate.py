"""`isentropic eval`: models and runs side by side on held-out prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..experiments.config import ConfigError, config_errors, eval_settings
from ..models.candidates import candidates
from ..runs.checkpoints import damage
from ..runs.text import as_json, show
from .failures import check_file
from .parser import add_command, heavy


def add_to(commands: Any) -> None:
    """Add the command."""
    help = "what models and runs can do at any temperature, side by side on held-out prompts"
    parser = add_command(commands, "eval", evaluate, help)
    parser.add_argument(
        "models", nargs="+", metavar="MODEL | RUN", help="run directories, model directories, names, hub ids"
    )
    parser.add_argument("--task", help="the task [the first run's]")
    parser.add_argument("--step", type=int, help="of a run: the checkpoint after this optimizer step [the last]")
    parser.add_argument("--k", type=int, help="samples per prompt [the first run's, or 16]")
    parser.add_argument("--limit", type=int, help="number of prompts, from the first on [the first run's, or 180]")
    parser.add_argument("--seed", type=int, help="of sampling [the first run's, or 0]")
    parser.add_argument("--temperature", type=float, help="of sampling [the first run's, or 1]")
    parser.add_argument(
        "--also",
        type=float,
        nargs="+",
        metavar="T",
        help="further sampling temperatures [the first run's, or 1.5 0.6 0.3]",
    )
    parser.add_argument(
        "--at-least",
        type=float,
        nargs="+",
        metavar="P",
        help="pass@1 at which the frontier is printed [99, 95 and 90 %% of the first model's best]",
    )
    parser.add_argument(
        "--max-completion-length", type=int, help="token limit of a completion [the run's, or the task's]"
    )
    parser.add_argument("--system-prompt", help="system message of every prompt [the first run's]")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights [the run's, or as they were saved]"
    )
    parser.add_argument("--out", help="append a row per model, with the counts by prompt, to this JSONL file")
    parser.add_argument("--json", action="store_true", help="print the rows, with the frontiers, as JSON")


def evaluate(args: dict[str, Any]) -> int:
    """Evaluate the models, and print a table or JSON."""
    with config_errors():
        models = candidates(args["models"], args["step"], args["dtype"])
    for model in models:
        if model.config is not None and (problem := damage(Path(model.path))):
            raise ConfigError(f"{model.path} is damaged: {problem}; name an earlier one by --step")
    wrong = next((p for p in args["at_least"] or () if not 0 < p <= 1), None)
    if wrong is not None:
        raise ConfigError(f"--at-least: got {wrong:g}, must be > 0 and at most 1; write 80 % as 0.8")
    if args["out"]:
        check_file("--out", args["out"])
    settings = eval_settings(args, [model.config for model in models if model.config is not None])
    experiment = heavy("experiments.evaluate")
    heavy("models.loading").quiet()
    rows = experiment.evaluate_models(settings, models, args["out"], _print_progress)
    from ..experiments.terminal import at_best, evaluation_table, floors

    if args["json"]:
        at_least = args["at_least"] or floors(rows[0])
        print(as_json([row | at_best(row, at_least) for row in rows]))
    else:
        show(evaluation_table(rows, args["at_least"] or ()))
    return 0


def _print_progress(text: str) -> None:
    """Progress goes to stderr, so that the result can be piped."""
    show(text, sys.stderr)
