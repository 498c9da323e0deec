"""Completions of a causal language model: token ids of prompts, tokens that end a completion, sampling in batches.

What is generated here is a measurement of a model: its own generation_config.json, with penalties, filters, beams or a
cache that is off, has no say in it, except for the tokens with which it ends a sequence.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch

# What one call of generate may hold: its cache grows with the tokens, its logits with sequences x vocabulary.
_MAX_TOKENS, _MAX_LOGITS, _MAX_SEQUENCES = 32_768, 1 << 24, 1024
_GPU_FACTOR = 8  # times as much

# Called after every batch with: sequences done, sequences in all, tokens generated so far.
OnProgress = Callable[[int, int, int], None]


class Completions(NamedTuple):
    """Completions of each prompt.

    Attributes:
        texts: [p g], up to the end of the completion.
        truncated: [p g] whether the token limit came before an end.
        num_tokens: generated, end tokens included.
    """

    texts: list[list[str]]
    truncated: list[list[bool]]
    num_tokens: int


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block, and restore the random state of every device after it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode inside the block, and back into its own mode after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@lru_cache(maxsize=4)
def line_break_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The ids of all tokens whose text contains a line break; byte-pair vocabularies have hundreds."""
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return tuple(i for i, text in enumerate(texts) if "\n" in text and i not in special)


def end_tokens(tokenizer: Any, model: Any) -> list[int]:
    """The ids with which a model ends a sequence: the tokenizer's, then those of its generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])]
    return [i for i in dict.fromkeys(ids) if i is not None]


@contextmanager
def without_settings(model: Any) -> Iterator[None]:
    """Empty the generation config of a model, and of the models that it wraps, inside the block.

    Without this, transformers fills every field that a call leaves open from the model's own config.
    """
    from transformers import GenerationConfig

    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    configs = [module.generation_config for module in owners]
    try:
        for module in owners:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, config in zip(owners, configs, strict=True):
            module.generation_config = config


def generate(model: Any, settings: dict[str, Any], **inputs: Any) -> Any:
    """What ``model.generate`` returns under these settings alone, whatever the model's own are.

    Args:
        model: causal.
        settings: fields of transformers' ``GenerationConfig``; one that is not given has its neutral value.
        inputs: all other arguments of ``generate``.
    """
    from transformers import GenerationConfig

    # top_k has the only default that is not neutral; it is set where there is sampling.
    neutral = {"use_cache": True, **({"top_k": 0, "top_p": 1.0} if settings.get("do_sample") else {})}
    with without_settings(model):
        return model.generate(generation_config=GenerationConfig(**neutral | settings), **inputs)


def context_limit(model: Any) -> int | None:
    """The number of positions that a model can tell apart, by its config; None if the config names no limit.

    A factor by which rotary positions are stretched counts.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit <= 0:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = [rope, *(values for values in rope.values() if isinstance(values, dict))]
    stretched = [(r.get("original_max_position_embeddings") or limit) * (r.get("factor") or 1) for r in by_kind]
    return int(max(limit, *stretched))


def check_lengths(ids: Sequence[Sequence[int]], limit: int | None, room: int = 1) -> None:
    """Refuse prompts that leave too little of the model's context.

    Args:
        ids: token ids of the prompts.
        limit: of :func:`context_limit`.
        room: tokens that must fit after a prompt.

    Raises:
        ValueError: a prompt that is too long.

    Example:
        >>> check_lengths([[5, 6, 7]], 4)
    """
    lengths = [len(prompt) for prompt in ids]
    longest = max(lengths, default=0)
    if limit is not None and lengths and longest + room > limit:
        raise ValueError(
            f"prompt {lengths.index(longest) + 1} of {len(ids)} has {longest} tokens, and the model's context "
            f"is {limit} (max_position_embeddings), too few for {room} more; shorten the prompt, leave it out, or "
            "name a model with a longer context"
        )


def encode(tokenizer: Any, prompts: Sequence[Any], limit: int | None = None) -> list[list[int]]:
    """The token ids of prompts.

    Args:
        tokenizer: of the model.
        prompts: texts or conversations.
        limit: the model's context, :func:`context_limit`; None checks nothing.

    Raises:
        ValueError: a prompt that fills the context.
    """
    if prompts and not isinstance(prompts[0], str):
        encoded = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        ids = encoded["input_ids"]
    else:
        ids = tokenizer(list(prompts))["input_ids"]
    check_lengths(ids, limit)
    return ids


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    num: int,
    max_tokens: int,
    temperature: float | None = 1.0,
    stop: Sequence[int] = (),
    progress: OnProgress | None = None,
) -> Completions:
    """``num`` completions of each prompt, in batches small enough for a machine without a GPU.

    The model's own generation settings have no effect but for its end tokens. A completion that may outgrow the
    model's context warns.

    Args:
        model: causal, on its device.
        tokenizer: its tokenizer.
        prompts: p texts or conversations.
        num: completions of each.
        max_tokens: token limit of a completion.
        temperature: of sampling; None is greedy.
        stop: ids of tokens that end a completion, besides the end of the sequence.
        progress: called after every batch.

    Raises:
        ValueError: a prompt that fills the model's context.
    """
    limit = context_limit(model)
    encoded_prompts = encode(tokenizer, prompts, limit)
    _warn_of_length(encoded_prompts, max_tokens, limit)
    ids = [prompt for prompt in encoded_prompts for _ in range(num)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    end = list(dict.fromkeys([*end_tokens(tokenizer, model), *stop]))
    settings: dict[str, Any] = {"max_new_tokens": max_tokens, "eos_token_id": end}
    settings |= {"pad_token_id": tokenizer.pad_token_id, "do_sample": temperature is not None}
    settings |= {} if temperature is None else {"temperature": temperature}
    texts, truncated, num_tokens, done = [""] * len(ids), [False] * len(ids), 0, 0
    stopping = torch.tensor(end, device=model.device)
    while done < len(order):
        batch = order[done : done + _batch_size(model, ids, order, done, max_tokens, num)]
        encoded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, padding_side="left", return_tensors="pt")
        encoded = encoded.to(model.device)
        cache = _prompt_cache(model, encoded, [i // num for i in batch])
        out = generate(model, settings, **encoded, **cache)[:, encoded["input_ids"].shape[1] :]
        ended = torch.isin(out, stopping)
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1])
        num_tokens += int(lengths.sum())
        for i, row, length, whole in zip(batch, out, lengths.tolist(), ended.any(1).tolist(), strict=True):
            texts[i] = tokenizer.decode(row[:length], skip_special_tokens=True)
            truncated[i] = not whole
        done += len(batch)
        if progress is not None:
            progress(done, len(order), num_tokens)
    groups = range(0, len(texts), num)
    return Completions([texts[i : i + num] for i in groups], [truncated[i : i + num] for i in groups], num_tokens)


def _warn_of_length(ids: list[list[int]], max_tokens: int, limit: int | None) -> None:
    longest = max(map(len, ids), default=0)
    if limit is not None and longest + max_tokens > limit:
        warnings.warn(
            f"a prompt of {longest} tokens and a completion of {max_tokens} exceed the model's context of {limit} "
            f"(max_position_embeddings), beyond which it knows no positions; allow {limit - longest} tokens, or "
            "shorten the prompts",
            stacklevel=3,
        )


def _prompt_cache(model: Any, encoded: dict[str, Any], prompt_of: list[int]) -> dict[str, Any]:
    """A cache for which each prompt was read once, whatever its number of samples; all but the prompt's last token.

    Empty if there is nothing to save, and for models whose decoder has no such cache.

    Args:
        model: causal.
        encoded: ``input_ids`` and ``attention_mask``, [b s], padded on the left.
        prompt_of: [b] the number of each row's prompt; rows of one prompt are adjacent.
    """
    _, counts = torch.unique_consecutive(torch.tensor(prompt_of, device=model.device), return_counts=True)
    if len(counts) == len(prompt_of) or encoded["input_ids"].shape[1] == 1:
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


def _batch_size(model: Any, ids: list[list[int]], order: list[int], done: int, max_tokens: int, num: int) -> int:
    """Sequences of the next batch; whole prompts if the samples of a prompt fit."""
    scale = _GPU_FACTOR if model.device.type == "cuda" else 1
    size = max(1, min(_MAX_SEQUENCES, scale * _MAX_LOGITS // model.config.get_text_config().vocab_size))
    longest = 0
    for taken, i in enumerate(order[done : done + size]):
        longest = max(longest, len(ids[i]) + max_tokens)
        if (taken + 1) * longest > scale * _MAX_TOKENS:
            size = max(1, taken)
            break
    return size // num * num or size
