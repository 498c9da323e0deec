"""`isentropic eval`: models and runs side by side on one task. All is checked before the first model is loaded."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models import resolve_model
from ..models.candidates import Candidate
from ..runs.record import plain
from ..tasks import Task, load_task
from ..tasks.checks import constant_line
from .config import ConfigError
from .evaluate import Progress, check_prompts, evaluate, intervals
from .train import load_tokenizer, load_weights, suit_threads

# Beside pass@k: share right of greedy answers and of majority votes, mean different right answers of k, and so on.
FIGURES = (
    "distinct",
    "majority",
    "greedy",
    "greedy_prompts",
    "truncated_frac",
    "greedy_truncated",
    "tokens_per_second",
)


def eval_models(
    chosen: dict[str, Any], found: Sequence[Candidate], out: str | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Evaluate what the command line names; returns a row for each.

    Args:
        chosen: as `config.eval_settings` has it.
        found: what is evaluated.
        out: a JSONL file that gains a row a model.
        say: for progress.

    Raises:
        ConfigError: anything that cannot work, before the first model is loaded.
    """
    task = load_task(chosen["task"])
    try:
        rows = task.heldout()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    settings = {name: chosen[name] for name in ("k", "temperature", "seed", "max_tokens")}
    settings["rows"] = rows[: chosen["limit"]]
    greedy = rows[: chosen["greedy_limit"]] if chosen["greedy_limit"] else []
    tokenizers = []
    for each in found:
        tokenizers.append(load_tokenizer(resolve_model("tiny") if each.path == "tiny" else each.path))
        check_prompts(task, tokenizers[-1], each.name)
    if line := constant_line(task, rows):
        say(line)
    made = []
    threads = torch.get_num_threads()
    for each, tokenizer in zip(found, tokenizers, strict=True):
        try:
            made.append(_one(each, tokenizer, task, settings, greedy, say))
        finally:
            torch.set_num_threads(threads)
        if out:
            path = Path(out)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(made[-1]), ensure_ascii=False) + "\n")
    return made


def _one(
    each: Candidate, tokenizer: Any, task: Task, settings: dict[str, Any], greedy: list[Any], say: Callable[[str], None]
) -> dict[str, Any]:
    model = load_weights(resolve_model("tiny") if each.path == "tiny" else each.path, each.dtype)
    suit_threads(model)
    if torch.cuda.is_available():
        model.to("cuda")
    row: dict[str, Any] = {"model": each.name, "step": each.step, "dtype": str(model.dtype).removeprefix("torch.")}
    progress = Progress(each.name, say)
    row |= evaluate(model, tokenizer, task, progress=progress, **settings)
    row["tokens_per_second"] = progress.speed
    if greedy:
        one: dict[str, Any] = {**settings, "k": 1, "temperature": None, "rows": greedy}
        best = evaluate(model, tokenizer, task, progress=Progress(f"{each.name}, greedy", say), **one)
        row |= {
            "greedy": best["pass@1"],
            "greedy_prompts": len(greedy),
            "greedy_truncated": best["truncated_frac"],
            "greedy_correct": best["num_correct"],
        }
    row |= {"intervals": intervals(row), "seed": settings["seed"], "max_tokens": settings["max_tokens"]}
    del model
    gc.collect()
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of models as columns, figures below one another."""
    first = rows[0]
    figures = [*(name for name in first if name.startswith("pass@")), *(name for name in FIGURES if name in first)]
    lines = [["model", *(_called(row) for row in rows)]]
    lines += [[name, *(_cell(row, name) for row in rows)] for name in figures]
    if len(rows) == 1:
        # A word and a value a line, as short as it was asked.
        head = [["task", first["task"]], ["prompts", str(len(first["prompts"]))], ["k", str(first["k"])]]
        lines = [lines[0], *head, *lines[1:]]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:{width}}  {value}" for name, value in lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [f"task {first['task']}, {len(first['prompts'])} prompts, k = {first['k']}"]
    text += ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, "(95 % interval, bootstrap over prompts)"] if any(first["intervals"].values()) else text)


def _called(row: dict[str, Any]) -> str:
    return row["model"] if row["step"] is None else f"{row['model']} step {row['step']}"


def _cell(row: dict[str, Any], name: str) -> str:
    text = f"{row[name]:.0f}" if name in ("tokens_per_second", "greedy_prompts") else f"{row[name]:.3f}"
    interval = row["intervals"].get(name)
    return f"{text} ({interval[0]:.3f}..{interval[1]:.3f})" if interval else text


def quiet_say(text: str) -> None:
    """Progress goes to stderr, so that what is printed can be piped."""
    print(text, file=sys.stderr, flush=True)
