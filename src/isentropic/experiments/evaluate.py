"""Sampling and counting: how good a model is on a task, during a run and beside it."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from ..engines.trl.rollout import Sampling, Wins, limited, wins
from ..engines.trl.stop import ends, line_breaks
from ..runs.statistics import bootstrap_interval, majority_vote, pass_at_k
from ..tasks import Task
from ..tasks.environments import EnvironmentTask
from .config import ConfigError

# What one call of generate may hold: its cache grows with the tokens, its logits with sequences x vocabulary.
_TOKENS, _LOGITS, _SEQUENCES = 32_768, 1 << 24, 1024
_ON_GPU = 8  # times as much


class Sampled(NamedTuple):
    """Completions of each prompt.

    Attributes:
        texts: [p g], without what follows the end.
        truncated: [p g] whether the limit of tokens came before an end.
        num_tokens: generated, ends included.
    """

    texts: list[list[str]]
    truncated: list[list[bool]]
    num_tokens: int


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Sampling for an evaluation leaves the training run's random state alone."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def check_prompts(task: Task, tokenizer: Any, model: str) -> None:
    """Refuse conversations where the tokenizer has no chat template, and prompts of two forms.

    Raises:
        ConfigError: such a task, with the remedy.
    """
    try:
        rows = task.heldout()
    except ValueError as error:
        raise ConfigError(str(error)) from None
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


def encode(tokenizer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """The token ids of prompts, which are texts or conversations."""
    if prompts and not isinstance(prompts[0], str):
        made = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True)
        return made["input_ids"]
    return tokenizer(list(prompts))["input_ids"]


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    num: int,
    max_tokens: int,
    temperature: float | None = 1.0,
    stop: Sequence[int] = (),
    progress: Callable[[int, int, int], None] | None = None,
) -> Sampled:
    """``num`` completions of each prompt, in calls small enough for a machine without a GPU.

    Args:
        model: causal, on its device.
        tokenizer: of it.
        prompts: p texts or conversations.
        num: completions of each.
        max_tokens: limit of a completion.
        temperature: of sampling; None is greedy.
        stop: ids of tokens that end a completion, besides the end of the sequence.
        progress: called after every call with sequences done, sequences in all, tokens generated.
    """
    ids = [each for each in encode(tokenizer, prompts) for _ in range(num)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    end = list(dict.fromkeys([*ends(tokenizer, model), *stop]))
    draw = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    texts, truncated, num_tokens, done = [""] * len(ids), [False] * len(ids), 0, 0
    stopping = torch.tensor(end, device=model.device)
    while done < len(order):
        chunk = order[done : done + _per_call(model, ids, order, done, max_tokens, num)]
        encoded = tokenizer.pad({"input_ids": [ids[i] for i in chunk]}, padding_side="left", return_tensors="pt")
        encoded = encoded.to(model.device)
        out = model.generate(
            **encoded,
            **_read_once(model, encoded, [i // num for i in chunk]),
            top_k=0 if temperature is not None else None,
            top_p=1.0 if temperature is not None else None,
            max_new_tokens=max_tokens,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            **draw,
        )[:, encoded["input_ids"].shape[1] :]
        ended = torch.isin(out, stopping)
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1])
        num_tokens += int(lengths.sum())
        for i, row, length, whole in zip(chunk, out, lengths.tolist(), ended.any(1).tolist(), strict=True):
            texts[i] = tokenizer.decode(row[:length], skip_special_tokens=True)
            truncated[i] = not whole
        done += len(chunk)
        if progress is not None:
            progress(done, len(order), num_tokens)
    groups = range(0, len(texts), num)
    return Sampled([texts[i : i + num] for i in groups], [truncated[i : i + num] for i in groups], num_tokens)


def _read_once(model: Any, encoded: dict[str, Any], owners: list[int]) -> dict[str, Any]:
    """A cache in which each prompt was read once, whatever its number of samples; all but its last token.

    Empty where there is nothing to save, and for models whose decoder has no such cache.

    Args:
        model: causal.
        encoded: ``input_ids`` and ``attention_mask``, [b s], padded on the left.
        owners: b, whose samples the rows are; those of one prompt follow one another.
    """
    _, counts = torch.unique_consecutive(torch.tensor(owners, device=model.device), return_counts=True)
    if len(counts) == len(owners) or encoded["input_ids"].shape[1] == 1:
        return {}
    decoder = model.get_decoder()
    if not {"past_key_values", "position_ids"} <= inspect.signature(decoder.forward).parameters.keys():
        return {}
    first = counts.cumsum(0) - counts
    mask = encoded["attention_mask"][first, :-1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = encoded["input_ids"][first, :-1]
    cache = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    cache.batch_repeat_interleave(counts)
    return {"past_key_values": cache}


def _per_call(model: Any, ids: list[list[int]], order: list[int], done: int, max_tokens: int, num: int) -> int:
    """Sequences of the next call; whole prompts where a prompt's samples fit."""
    scale = _ON_GPU if model.device.type == "cuda" else 1
    room = max(1, min(_SEQUENCES, scale * _LOGITS // model.config.get_text_config().vocab_size))
    longest = 0
    for taken, i in enumerate(order[done : done + room]):
        longest = max(longest, len(ids[i]) + max_tokens)
        if (taken + 1) * longest > scale * _TOKENS:
            room = max(1, taken)
            break
    return room // num * num or room


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
    progress: Callable[[int, int, int], None] | None = None,
) -> dict[str, Any]:
    """Sample held-out prompts and count: the figures of a row of evaluations.jsonl.

    Args:
        model, tokenizer: as sample has them.
        task: who judges.
        k: samples a prompt.
        rows: prompts.
        temperature: of sampling; None is greedy.
        seed: of sampling.
        max_tokens: limit of a completion; None is the task's.
        progress: as sample has it.
    """
    if isinstance(task, EnvironmentTask):
        return _played(model, tokenizer, limited(task, max_tokens), k, rows, temperature, seed, progress)
    was_training = model.training
    model.eval()
    limit = max_tokens or task.max_completion_length
    stop = line_breaks(tokenizer) if task.stop == "\n" else []
    with own_randomness(seed):
        prompts = [row["prompt"] for row in rows]
        got = sample(model, tokenizer, prompts, k, limit, temperature, stop, progress)
    model.train(was_training)
    correct, distinct, majority = [], [], []
    for row, group in zip(rows, got.texts, strict=True):
        columns = {name: [value] * len(group) for name, value in row.items() if name != "prompt"}
        marks = [bool(r) for r in task.reward(group, prompts=[row["prompt"]] * len(group), **columns)]
        answers = [task.normalise(task.cut(text)) for text in group]
        correct.append(sum(marks))
        distinct.append(len({a for a, right in zip(answers, marks, strict=True) if right}))
        winner = majority_vote([a or None for a in answers])
        majority.append(any(right and a == winner for a, right in zip(answers, marks, strict=True)))
    truncated = [sum(each) for each in got.truncated]
    asked = [shown(row["prompt"]) for row in rows]
    row = _row(task, k, temperature, Wins(correct, distinct, truncated, got.num_tokens), asked)
    return {**row, "majority": sum(majority) / len(rows)}


def _played(
    model: Any,
    tokenizer: Any,
    task: EnvironmentTask,
    k: int,
    rows: Sequence[dict[str, Any]],
    temperature: float | None,
    seed: int,
    progress: Callable[[int, int, int], None] | None,
) -> dict[str, Any]:
    """The figures of episodes: a win is right, and there is nothing to vote on."""
    was_training = model.training
    model.eval()
    with own_randomness(seed):
        found = wins(model, tokenizer, task, list(rows), k, Sampling(temperature or 0.0), progress=progress)
    model.train(was_training)
    return _row(task, k, temperature, found, [str(row.get("seed", row["prompt"])) for row in rows])


def _row(task: Task, k: int, temperature: float | None, found: Wins, asked: list[str]) -> dict[str, Any]:
    """A row of evaluations.jsonl from its counts by prompt."""
    num = len(asked)
    result: dict[str, Any] = {"task": task.name, "k": k, "temperature": temperature or 0.0}
    for each in sorted({1, *(2**i for i in range(1, 10) if 2**i < k), k}):
        result[f"pass@{each}"] = float(np.mean(pass_at_k([k] * num, found.correct, each)))
    return {
        **result,
        "distinct": sum(found.distinct) / num,
        "truncated_frac": sum(found.truncated) / (num * k),
        "num_tokens": found.num_tokens,
        "prompts": asked,
        "num_samples": [k] * num,
        "num_correct": found.correct,
        "num_distinct": found.distinct,
        "num_truncated": found.truncated,
    }


def shown(prompt: Any) -> str:
    """A prompt as text: what the last message of a conversation says."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))


def intervals(row: dict[str, Any]) -> dict[str, list[float] | None]:
    """The 95 % interval of every pass@k, over prompts.

    Args:
        row: of :func:`evaluate`.
    """
    found: dict[str, list[float] | None] = {}
    for name in (name for name in row if name.startswith("pass@")):
        chances = pass_at_k(row["num_samples"], row["num_correct"], int(name.partition("@")[2]))
        interval = bootstrap_interval(np.asarray(chances))
        found[name] = None if interval is None else [interval.low, interval.high]
    return found


class Progress:
    """A line now and then: what is sampled, at which speed, and how long it will take."""

    def __init__(self, title: str, say: Callable[[str], None], every: float = 20.0):
        self.title, self.say, self.every = title, say, every
        self.began = self.told = time.monotonic()
        self.speed = 0.0  # tokens a second

    def __call__(self, done: int, num: int, tokens: int) -> None:
        now = time.monotonic()
        self.speed = round(tokens / max(now - self.began, 1e-9), 1)
        if now - self.told < self.every and done < num:
            return
        self.told, spent = now, max(now - self.began, 1e-9)
        left = math.ceil(spent / done * (num - done))
        self.say(
            f"{self.title}: {done}/{num} completions, {tokens / spent:.0f} tokens/s, eta {left // 60}:{left % 60:02d}"
        )
