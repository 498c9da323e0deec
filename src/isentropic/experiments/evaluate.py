"""Evaluation on held-out prompts: a model during its run, and models and runs side by side (`isentropic eval`)."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models import cache_root
from ..models.candidates import Candidate
from ..models.episodes import Sampling, count_wins, limited
from ..models.generation import OnProgress, evaluating, line_break_tokens, sample, seeded
from ..models.loading import load_tokenizer, load_weights, suit_threads
from ..runs.record import append_row, plain, read_rows
from ..runs.statistics import majority_vote, pass_at_k, proportion_interval
from ..tasks import Task, load_task
from ..tasks.checks import constant_line
from ..tasks.environments import EnvironmentTask
from .config import ConfigError, EvalSettings, config_errors
from .terminal import Progress

PART = 64  # prompts that are sampled together, and kept once they are counted


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


class Counts(NamedTuple):
    """What was counted of the samples of some prompts.

    Attributes:
        correct, distinct, truncated: by prompt: right samples, distinct right answers, samples cut at the limit.
        majority: by prompt, whether the most frequent answer is right; empty for episodes, which have no vote.
        num_tokens: generated.
    """

    correct: list[int]
    distinct: list[int]
    truncated: list[int]
    majority: list[bool]
    num_tokens: int

    def and_then(self, other: Counts) -> Counts:
        """These prompts, and after them others."""
        return Counts(
            self.correct + other.correct,
            self.distinct + other.distinct,
            self.truncated + other.truncated,
            self.majority + other.majority,
            self.num_tokens + other.num_tokens,
        )


class Parts:
    """The parts of an evaluation that are done, in a file, so that one that was killed continues.

    Args:
        path: JSON lines; None keeps nothing.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.done = {row["part"]: Counts(**row["counts"]) for row in read_rows(path)} if path else {}

    def __call__(self, part: str, count: Callable[[], Counts]) -> Counts:
        """The counts of a part, counted now if they are not known."""
        if part not in self.done:
            self.done[part] = count()
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                append_row(self.path, {"part": part, "counts": self.done[part]._asdict()})
        return self.done[part]

    def forget(self) -> None:
        """Delete the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    k: int,
    *,
    rows: Sequence[dict[str, Any]],
    temperature: float,
    others: Sequence[float] = (),
    seed: int,
    max_tokens: int | None = None,
    progress: OnProgress | None = None,
    parts: Parts | None = None,
) -> dict[str, Any]:
    """Answer held-out prompts, or play held-out episodes, greedily and by sampling: a row of evaluations.jsonl.

    Args:
        model: causal, on its device.
        tokenizer: its tokenizer.
        task: the task, whose verifier judges.
        k: samples per prompt at each temperature.
        rows: prompts.
        temperature: of sampling, whose figures are the row's own.
        others: further temperatures, whose figures are under ``at`` by temperature.
        seed: of sampling.
        max_tokens: limit of a completion; None is the task's.
        progress: called after every batch of completions, with numbers of all that was not finished before.
        parts: finished parts of the same evaluation.
    """
    parts = parts or Parts()
    others = [t for t in dict.fromkeys(others) if t != temperature]
    cuts = {start: list(rows[start : start + PART]) for start in range(0, len(rows), PART)}
    nums: dict[float | None, int] = {**dict.fromkeys((temperature, *others), k), None: 1}
    sizes = {(t, start): num * len(part) for t, num in nums.items() for start, part in cuts.items()}
    total = sum(num for place, num in sizes.items() if _part_name(*place) not in parts.done)
    done = tokens = 0

    def shifted(n: int, _: int, new: int) -> None:
        if progress is not None:
            progress(done + n, total, tokens + new)

    def count(at: float | None) -> Counts:
        nonlocal done, tokens
        counts = Counts([], [], [], [], 0)
        for start, part in cuts.items():
            name = _part_name(at, start)
            known = name in parts.done
            job = partial(_count, model, tokenizer, task, part, nums[at], at, seed + start, max_tokens, shifted)
            counted = parts(name, job)
            counts = counts.and_then(counted)
            if not known:
                done, tokens = done + sizes[at, start], tokens + counted.num_tokens
        return counts

    prompts = [_prompt_text(row["prompt"]) for row in rows]
    if isinstance(task, EnvironmentTask):
        prompts = [str(row.get("seed", row["prompt"])) for row in rows]
    sampled = {t: _figures(k, count(t)) for t in (temperature, *others)}
    greedy = count(None)
    return {
        "task": task.name,
        "k": k,
        "temperature": temperature,
        **sampled[temperature],
        "prompts": prompts,
        "num_samples": [k] * len(prompts),
        "greedy": sum(greedy.correct) / len(prompts),
        "greedy_correct": greedy.correct,
        "at": {f"{t:g}": sampled[t] for t in sorted(others, reverse=True)},
    }


def _part_name(temperature: float | None, start: int) -> str:
    return f"{'greedy' if temperature is None else temperature} {start}"


def _count(
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: list[dict[str, Any]],
    num: int,
    temperature: float | None,
    seed: int,
    max_tokens: int | None,
    progress: OnProgress,
) -> Counts:
    """Sample ``num`` answers to each row, or play it as often, and count."""
    if isinstance(task, EnvironmentTask):
        sampling, played = Sampling(temperature or 0.0), limited(task, max_tokens)
        with evaluating(model), seeded(seed):
            wins = count_wins(model, tokenizer, played, rows, num, sampling, progress=progress)
        return Counts(wins.correct, wins.distinct, wins.truncated, [], wins.num_tokens)
    stop = line_break_tokens(tokenizer) if task.stop == "\n" else []
    limit = max_tokens or task.max_completion_length
    with evaluating(model), seeded(seed):
        prompts = [row["prompt"] for row in rows]
        completions = sample(model, tokenizer, prompts, num, limit, temperature, stop, progress)
    judged = [_judge(task, row, texts) for row, texts in zip(rows, completions.texts, strict=True)]
    truncated = [sum(cut) for cut in completions.truncated]
    correct, distinct, majority = (list(column) for column in zip(*judged, strict=True))
    return Counts(correct, distinct, truncated, majority, completions.num_tokens)


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
    # An empty answer does not vote.
    winner = majority_vote([answer or None for answer in answers])
    majority = any(is_right and answer == winner for answer, is_right in zip(answers, right, strict=True))
    return _Judged(sum(right), len(right_answers), majority)


def _figures(k: int, counts: Counts) -> dict[str, Any]:
    """The figures at one temperature, and its counts by prompt."""
    num = len(counts.correct)
    figures: dict[str, Any] = {}
    for size in sorted({1, *(2**i for i in range(1, 10) if 2**i < k), k}):
        figures[f"pass@{size}"] = float(np.mean(pass_at_k([k] * num, counts.correct, size)))
    figures |= {"distinct": sum(counts.distinct) / num}
    figures |= {"majority": sum(counts.majority) / num} if counts.majority else {}
    return {
        **figures,
        "truncated_frac": sum(counts.truncated) / (num * k),
        "num_tokens": counts.num_tokens,
        "num_correct": counts.correct,
        "num_distinct": counts.distinct,
        "num_truncated": counts.truncated,
    }


def _prompt_text(prompt: Any) -> str:
    """A prompt as text: of a conversation, its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))


def intervals(figures: dict[str, Any]) -> dict[str, list[float] | None]:
    """The 95 % interval of every pass@k over prompts.

    Args:
        figures: of :func:`evaluate`.
    """
    by_name: dict[str, list[float] | None] = {}
    for name in (name for name in figures if name.startswith("pass@")):
        chances = pass_at_k(figures["num_samples"], figures["num_correct"], int(name.partition("@")[2]))
        interval = proportion_interval(np.asarray(chances))
        by_name[name] = None if interval is None else [interval.low, interval.high]
    return by_name


def evaluate_models(
    settings: EvalSettings, models: Sequence[Candidate], out: str | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Evaluate models side by side; returns a row for each. All is checked before the first model is loaded.

    What is done is kept in the cache until the last model is done, so that an evaluation that was killed continues.

    Args:
        settings: task, samples, prompts.
        models: to evaluate.
        out: a JSONL file to which a row for each model is appended.
        say: called with lines of progress.

    Raises:
        ConfigError: anything that cannot work.
    """
    task = load_task(settings.task).with_system_prompt(settings.system_prompt)
    with config_errors():
        rows = task.heldout()
        tokenizers = []
        for model in models:
            tokenizers.append(load_tokenizer(model.resolve()))
            check_prompts(task, tokenizers[-1], model.name)
    if line := constant_line(task, rows):
        say(line)
    evaluated, threads = [], torch.get_num_threads()
    all_parts = [Parts(_parts_path(model, settings, rows)) for model in models]
    interrupted = any(parts.done for parts in all_parts)
    for model, tokenizer, parts in zip(models, tokenizers, all_parts, strict=True):
        if parts.done:
            say(f"{model.name}: continuing an evaluation that was interrupted; {len(parts.done)} parts are done")
        try:
            evaluated.append(_evaluate_model(model, tokenizer, task, settings, rows, parts, say))
        finally:
            torch.set_num_threads(threads)
    if out:
        _append(Path(out), evaluated, interrupted)
    for parts in all_parts:
        parts.forget()
    return evaluated


def _append(out: Path, rows: list[dict[str, Any]], interrupted: bool) -> None:
    """Append rows to a file; after an interruption without those that were written just before it."""

    def figures(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in plain(row).items() if name != "tokens_per_second"}

    written = [figures(row) for row in read_rows(out)] if interrupted else []
    for row in rows:
        if figures(row) not in written:
            append_row(out, row)


def _parts_path(model: Candidate, settings: EvalSettings, rows: list[dict[str, Any]]) -> Path:
    """The file of an evaluation's parts: another one for other weights, settings, prompts or code of the task."""
    folder = Path(model.resolve())
    weights = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors"))
    source = Path(settings.task.partition(":")[0])
    code = source.read_text(encoding="utf-8") if source.suffix == ".py" and source.is_file() else ""
    key = json.dumps([str(folder), model.dtype, weights, settings, rows[: settings.limit], code], default=str)
    return cache_root() / "eval" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"


def _evaluate_model(
    candidate: Candidate,
    tokenizer: Any,
    task: Task,
    settings: EvalSettings,
    rows: list[dict[str, Any]],
    parts: Parts,
    say: Callable[[str], None],
) -> dict[str, Any]:
    with config_errors():
        model = load_weights(candidate.resolve(), candidate.dtype)
    suit_threads(model)
    if torch.cuda.is_available():
        model.to("cuda")
    progress = Progress(candidate.name, say)
    row = {
        "model": candidate.name,
        "step": candidate.step,
        "dtype": str(model.dtype).removeprefix("torch."),
        **evaluate(
            model,
            tokenizer,
            task,
            settings.k,
            rows=rows[: settings.limit],
            temperature=settings.temperature,
            others=settings.temperatures,
            seed=settings.seed,
            max_tokens=settings.max_tokens,
            progress=progress,
            parts=parts,
        ),
        "tokens_per_second": progress.speed,
        "seed": settings.seed,
        "max_tokens": settings.max_tokens,
    }
    row["intervals"] = intervals(row)
    del model
    gc.collect()
    return row
