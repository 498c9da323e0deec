"""Evaluation on held-out prompts: a model during its run, and models and runs side by side (`isentropic eval`)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.candidates import Candidate
from ..models.episodes import Sampling, Wins, count_wins, limited
from ..models.generation import OnProgress, evaluating, line_break_tokens, sample, seeded
from ..models.loading import load_tokenizer, load_weights, suit_threads
from ..runs.record import append_row
from ..runs.statistics import bootstrap_interval, majority_vote, pass_at_k
from ..tasks import Task, load_task
from ..tasks.checks import constant_line
from ..tasks.environments import EnvironmentTask
from .config import ConfigError, EvalSettings, config_errors
from .terminal import Progress


def check_prompts(task: Task, tokenizer: Any, model: str) -> None:
    """Refuse conversations if the tokenizer has no chat template, and prompts of two forms.

    Raises:
        ConfigError: such a task, with the remedy.
    """
    with config_errors():
        rows = task.heldout()
    forms = {isinstance(row["prompt"], str) for row in rows}
    if len(forms) > 1:
        raise ConfigError(
            f"task {task.name!r} mixes texts and conversations; choose one form of prompt for all its rows"
        )
    if False in forms and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"task {task.name!r} asks by conversations, and the tokenizer of {model!r} has no chat template; "
            "name an instruct model, or ask by texts: prompt=plain, prompt=few-shot or format=plain in the task's name"
        )


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    k: int,
    *,
    rows: Sequence[dict[str, Any]],
    temperature: float | None,
    seed: int,
    max_tokens: int | None = None,
    progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Sample answers to held-out prompts, or play held-out episodes, and count: the figures of evaluations.jsonl.

    Args:
        model: causal, on its device.
        tokenizer: its tokenizer.
        task: the task, whose verifier judges.
        k: samples a prompt.
        rows: prompts.
        temperature: of sampling; None is greedy.
        seed: of sampling.
        max_tokens: limit of a completion; None is the task's.
        progress: called after every batch of completions.
    """
    if isinstance(task, EnvironmentTask):
        sampling = Sampling(temperature or 0.0)
        with evaluating(model), seeded(seed):
            counts = count_wins(model, tokenizer, limited(task, max_tokens), list(rows), k, sampling, progress=progress)
        return _figures(task, k, temperature, counts, [str(row.get("seed", row["prompt"])) for row in rows])
    limit = max_tokens or task.max_completion_length
    stop = line_break_tokens(tokenizer) if task.stop == "\n" else []
    prompts = [row["prompt"] for row in rows]
    with evaluating(model), seeded(seed):
        completions = sample(model, tokenizer, prompts, k, limit, temperature, stop, progress)
    judged = [_judge(task, row, texts) for row, texts in zip(rows, completions.texts, strict=True)]
    truncated = [sum(cut) for cut in completions.truncated]
    counts = Wins([j.correct for j in judged], [j.distinct for j in judged], truncated, completions.num_tokens)
    figures = _figures(task, k, temperature, counts, [_prompt_text(prompt) for prompt in prompts])
    return {**figures, "majority": sum(j.majority for j in judged) / len(rows)}


class _Judged(NamedTuple):
    """Counts of a prompt's answers, and whether the most frequent one is right."""

    correct: int
    distinct: int
    majority: bool


def _judge(task: Task, row: dict[str, Any], texts: list[str]) -> _Judged:
    columns = {name: [value] * len(texts) for name, value in row.items() if name != "prompt"}
    right = [bool(r) for r in task.reward(texts, prompts=[row["prompt"]] * len(texts), **columns)]
    answers = [task.normalise(task.cut(text)) for text in texts]
    right_answers = {answer for answer, is_right in zip(answers, right, strict=True) if is_right}
    # An empty answer is no vote.
    winner = majority_vote([answer or None for answer in answers])
    majority = any(is_right and answer == winner for answer, is_right in zip(answers, right, strict=True))
    return _Judged(sum(right), len(right_answers), majority)


def _figures(task: Task, k: int, temperature: float | None, counts: Wins, prompts: list[str]) -> dict[str, Any]:
    """A row of evaluations.jsonl, from its counts by prompt."""
    num = len(prompts)
    figures: dict[str, Any] = {"task": task.name, "k": k, "temperature": temperature or 0.0}
    for size in sorted({1, *(2**i for i in range(1, 10) if 2**i < k), k}):
        figures[f"pass@{size}"] = float(np.mean(pass_at_k([k] * num, counts.correct, size)))
    return {
        **figures,
        "distinct": sum(counts.distinct) / num,
        "truncated_frac": sum(counts.truncated) / (num * k),
        "num_tokens": counts.num_tokens,
        "prompts": prompts,
        "num_samples": [k] * num,
        "num_correct": counts.correct,
        "num_distinct": counts.distinct,
        "num_truncated": counts.truncated,
    }


def _prompt_text(prompt: Any) -> str:
    """A prompt as text: of a conversation, its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))


def intervals(figures: dict[str, Any]) -> dict[str, list[float] | None]:
    """The 95 % interval of every pass@k, by bootstrap over prompts.

    Args:
        figures: of :func:`evaluate`.
    """
    by_name: dict[str, list[float] | None] = {}
    for name in (name for name in figures if name.startswith("pass@")):
        chances = pass_at_k(figures["num_samples"], figures["num_correct"], int(name.partition("@")[2]))
        interval = bootstrap_interval(np.asarray(chances))
        by_name[name] = None if interval is None else [interval.low, interval.high]
    return by_name


def evaluate_models(
    settings: EvalSettings, models: Sequence[Candidate], out: str | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Evaluate models side by side; returns a row for each. All is checked before the first model is loaded.

    Args:
        settings: task, samples, prompts.
        models: to evaluate.
        out: a JSONL file to which a row for each model is appended.
        say: called with lines of progress.

    Raises:
        ConfigError: anything that cannot work.
    """
    task = load_task(settings.task)
    with config_errors():
        rows = task.heldout()
        tokenizers = []
        for model in models:
            tokenizers.append(load_tokenizer(model.resolve()))
            check_prompts(task, tokenizers[-1], model.name)
    if line := constant_line(task, rows):
        say(line)
    evaluated = []
    threads = torch.get_num_threads()
    for model, tokenizer in zip(models, tokenizers, strict=True):
        try:
            evaluated.append(_evaluate_model(model, tokenizer, task, settings, rows, say))
        finally:
            torch.set_num_threads(threads)
        if out:
            append_row(Path(out), evaluated[-1])
    return evaluated


def _evaluate_model(
    candidate: Candidate,
    tokenizer: Any,
    task: Task,
    settings: EvalSettings,
    rows: list[dict[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    with config_errors():
        model = load_weights(candidate.resolve(), candidate.dtype)
    suit_threads(model)
    if torch.cuda.is_available():
        model.to("cuda")
    row: dict[str, Any] = {
        "model": candidate.name,
        "step": candidate.step,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    shared: dict[str, Any] = {"seed": settings.seed, "max_tokens": settings.max_tokens}
    progress = Progress(candidate.name, say)
    row |= evaluate(
        model,
        tokenizer,
        task,
        settings.k,
        rows=rows[: settings.limit],
        temperature=settings.temperature,
        progress=progress,
        **shared,
    )
    row["tokens_per_second"] = progress.speed
    if settings.greedy_limit:
        greedy_rows, progress = rows[: settings.greedy_limit], Progress(f"{candidate.name}, greedy", say)
        greedy = evaluate(model, tokenizer, task, 1, rows=greedy_rows, temperature=None, progress=progress, **shared)
        row |= {
            "greedy": greedy["pass@1"],
            "greedy_prompts": len(greedy_rows),
            "greedy_truncated": greedy["truncated_frac"],
            "greedy_correct": greedy["num_correct"],
        }
    row |= {"intervals": intervals(row), **shared}
    del model
    gc.collect()
    return row
