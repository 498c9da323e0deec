"""Episodes of many turns: the policy writes a line, the environment answers, and so on.

Tokens are only ever appended. What the policy wrote stays the very ids that it sampled, each observation is tokenized
once and appended to them, so the log-probs of a turn belong to the prefix that training scores. ``Episode.mask`` is 1
for sampled tokens and 0 for the environment's.

Episodes that have not ended act together, with the model's own ``generate``, on one growing batch with one cache. How
they sample is said by the caller alone: the model's generation_config.json has no say, except for its end tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from .generation import OnProgress, check_lengths, context_limit, end_tokens, generate, line_break_tokens


@dataclass
class Episode:
    """One episode, in tokens and in figures.

    Attributes:
        prompt_ids: what the policy read before its first action.
        ids, mask, logp: the tokens after it; 1 if the policy sampled the token; its log-prob at the sampling
            temperature (0 for the environment's).
        actions: what the policy wrote, line by line.
        total: the sum of the rewards.
        done: whether the environment ended it; otherwise turns or tokens ran out.
    """

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    total: float = 0.0
    done: bool = False

    def append_action(self, ids: list[int], logp: list[float]) -> None:
        """Append what the policy sampled."""
        self.ids += ids
        self.mask += [1] * len(ids)
        self.logp += logp

    def append_observation(self, ids: list[int]) -> None:
        """Append what the environment answered."""
        self.ids += ids
        self.mask += [0] * len(ids)
        self.logp += [0.0] * len(ids)


# What a line of an episode is made of: its log-probs and its end depend on them.
_OWN = frozenset(
    {"max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "num_beams", "num_return_sequences"}
    | {"use_cache", "past_key_values", "return_dict_in_generate", "output_scores"}
)


class Sampling(NamedTuple):
    """How actions are sampled: temperature (0 is greedy), and further fields of a generation config.

    Nothing else has an effect: what is not named here is neutral, and not the model's own setting.
    """

    temperature: float = 1.0
    generation_kwargs: dict[str, Any] = {}  # noqa: RUF012  (read only)


DEFAULT_SAMPLING = Sampling()


class _LiveBatch:
    """The episodes that have not ended, as one batch that grows to the right.

    Rows differ in length, so an appended block has holes: positions that the attention mask leaves out, left of the
    real tokens, since ``generate`` continues from the last column. Positions count real tokens alone.
    """

    def __init__(self, model: Any, prompts: list[list[int]], pad: int):
        self.model, self.pad, self.device = model, pad, model.device
        self.ids, self.real = self._block(prompts)
        self.cache: Any = None

    def _block(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(r)) + r for r in rows], device=self.device)
        real = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.device)
        return ids.view(len(rows), width), real.view(len(rows), width)

    def act(self, limit: int, stop: list[int], sampling: Sampling) -> list[tuple[list[int], list[float]]]:
        """A line for each episode: its ids, and their log-probs."""
        temperature = sampling.temperature
        settings = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        settings |= sampling.generation_kwargs
        settings |= {"max_new_tokens": limit, "eos_token_id": stop, "pad_token_id": self.pad}
        settings |= {"return_dict_in_generate": True, "output_scores": True}
        inputs = {"input_ids": self.ids, "attention_mask": self.real, "past_key_values": self.cache}
        out = generate(self.model, settings, **inputs)
        new = out.sequences[:, self.ids.shape[1] :]
        scores = torch.stack(out.scores, 1).float()
        logp = scores.log_softmax(-1).gather(-1, new[..., None])[..., 0]
        ended = torch.isin(new, torch.tensor(stop, device=new.device)).long()
        inside = (ended.cumsum(1) - ended == 0).long()
        self.ids, self.real = out.sequences, torch.cat([self.real, inside], 1)
        self.cache = out.past_key_values if _can_drop_rows(out.past_key_values) else None
        lengths = inside.sum(1).tolist()
        rows = zip(new.tolist(), logp.tolist(), lengths, strict=True)
        return [(ids[:n], p[:n]) for ids, p, n in rows]

    def keep(self, rows: list[int], replies: list[list[int]]) -> None:
        """Keep some rows, and append the answers of their environments."""
        index = torch.tensor(rows, device=self.device)
        ids, real = self._block(replies)
        self.ids = torch.cat([self.ids[index], ids], 1)
        self.real = torch.cat([self.real[index], real], 1)
        if self.cache is not None:
            self.cache.batch_select_indices(index)


def _can_drop_rows(cache: Any) -> bool:
    """Whether rows can be taken out of a cache that has holes: true for plain layers of keys and values."""
    layers = getattr(cache, "layers", None)
    return bool(layers) and all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def play(
    model: Any,
    tokenizer: Any,
    task: Any,
    rows: list[dict[str, Any]],
    sampling: Sampling = DEFAULT_SAMPLING,
    pool: list[Any] | None = None,
) -> list[Episode]:
    """Play one episode for each row.

    An episode is cut short where turns, the task's token limit, or the model's context run out.

    Args:
        model: a causal language model with ``generate``.
        tokenizer: its tokenizer; it needs a pad token.
        task: an ``EnvironmentTask``, or an object with its ``make``, ``opening``, ``reply`` and limits.
        rows: columns for ``reset``; a row that occurs g times is played g times.
        sampling: how actions are sampled.
        pool: environments to reuse; more are created, and added, as they are needed.

    Raises:
        ValueError: a prompt that is a conversation, or that leaves no space for a line in the model's context; a
            setting of ``sampling`` that episodes make themselves.
    """
    if own := sorted(_OWN & sampling.generation_kwargs.keys()):
        raise ValueError(
            f"generation_kwargs: got {', '.join(own)}, which an episode sets itself; leave it out, and set the "
            "tokens of a line by the task's max_action_tokens"
        )
    pool = [] if pool is None else pool
    at_once = task.parallel or len(rows)
    stop, episodes = [*end_tokens(tokenizer, model), *line_break_tokens(tokenizer)], []
    for first in range(0, len(rows), at_once):
        batch = rows[first : first + at_once]
        while len(pool) < len(batch):
            pool.append(task.make())
        episodes += _play(model, tokenizer, task, batch, sampling, pool, stop)
    return episodes


@torch.no_grad()
def _play(
    model: Any,
    tokenizer: Any,
    task: Any,
    rows: list[dict[str, Any]],
    sampling: Sampling,
    pool: list[Any],
    stop: list[int],
) -> list[Episode]:
    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    episodes = [Episode(_opening(tokenizer, task, row, env)) for row, env in zip(rows, pool, strict=False)]
    context = context_limit(model)
    check_lengths([e.prompt_ids for e in episodes], context, room=task.max_action_tokens)
    batch, alive = _LiveBatch(model, [e.prompt_ids for e in episodes], tokenizer.pad_token_id), list(range(len(rows)))
    for turn in range(task.max_turns):
        lines = batch.act(task.max_action_tokens, stop, sampling)
        kept, replies, still_alive = [], [], []
        for place, (number, (ids, logp)) in enumerate(zip(alive, lines, strict=True)):
            episode = episodes[number]
            episode.append_action(ids, logp)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            action = text.strip().split("\n")[0].strip()
            observation, reward, episode.done = pool[number].step(action)
            episode.actions.append(action)
            episode.total += float(reward)
            if episode.done:
                # An end that is not the policy's: by it TRL knows that the episode is complete.
                episode.append_observation([tokenizer.eos_token_id])
                continue
            reply = tokens(("" if "\n" in text else "\n") + task.reply(observation))
            room = task.max_completion_length
            room = room if context is None else min(room, context - len(episode.prompt_ids))
            left = room - len(episode.ids) - len(reply)
            if turn + 1 < task.max_turns and left >= task.max_action_tokens + 1:
                episode.append_observation(reply)
                kept, replies, still_alive = [*kept, place], [*replies, reply], [*still_alive, number]
        alive = still_alive
        if not alive:
            break
        batch.keep(kept, replies)
    return episodes


def _opening(tokenizer: Any, task: Any, row: dict[str, Any], environment: Any) -> list[int]:
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        raise ValueError(
            f"task {task.name!r}: the prompt of an environment must be text, got {type(prompt).__name__}; turns are "
            "lines of one text, without a chat template"
        )
    return tokenizer(task.opening(prompt, environment.reset(**row)))["input_ids"]


class Wins(NamedTuple):
    """Counts for each row: episodes won, how many of those differ in their actions, and how many were cut short.

    ``num_tokens`` are those that the policy wrote.
    """

    correct: list[int]
    distinct: list[int]
    truncated: list[int]
    num_tokens: int


def limited(task: Any, max_tokens: int | None) -> Any:
    """The task with another token limit of an episode, or itself if there is none."""
    return replace(task, max_completion_length=max_tokens) if max_tokens else task


def count_wins(
    model: Any,
    tokenizer: Any,
    task: Any,
    rows: list[dict[str, Any]],
    num: int,
    sampling: Sampling = DEFAULT_SAMPLING,
    batch: int = 256,
    progress: OnProgress | None = None,
) -> Wins:
    """Play every row ``num`` times, ``batch`` episodes at once, and count.

    Args:
        model, tokenizer, task, sampling: as for :func:`play`.
        rows: p rows.
        num: episodes of each row.
        batch: episodes played at once.
        progress: called after every batch.
    """
    pool: list[Any] = []
    counts, rows_per_batch = Wins([], [], [], 0), max(1, batch // num)
    for start in range(0, len(rows), rows_per_batch):
        repeated = [row for row in rows[start : start + rows_per_batch] for _ in range(num)]
        episodes = play(model, tokenizer, task, repeated, sampling, pool)
        for i in range(0, len(episodes), num):
            group = episodes[i : i + num]
            won = ["\n".join(e.actions) for e in group if e.total >= task.win_at]
            counts.correct.append(len(won))
            counts.distinct.append(len({task.normalise(text) for text in won}))
            counts.truncated.append(sum(not e.done for e in group))
        counts = counts._replace(num_tokens=counts.num_tokens + sum(sum(e.mask) for e in episodes))
        if progress is not None:
            progress(len(counts.correct) * num, len(rows) * num, counts.num_tokens)
    return counts


def figures(episodes: Iterable[Episode], win_at: float) -> dict[str, float]:
    """The figures of a batch of episodes, for metrics.jsonl.

    Example:
        >>> won = Episode([1], [5, 6], [1, 0], [-0.1, 0.0], ["go"], total=1.0, done=True)
        >>> lost = Episode([1], [5, 5, 5], [1, 0, 1], [-0.1, 0.0, -0.1], ["go", "go"])
        >>> figures([won, lost], win_at=1.0)
        {'episode/win_frac': 0.5, 'episode/turns': 1.5, 'episode/truncated_frac': 0.5, 'episode/return': 0.5}
    """
    episodes = list(episodes)
    num = max(len(episodes), 1)
    return {
        "episode/win_frac": sum(e.total >= win_at for e in episodes) / num,
        "episode/turns": sum(len(e.actions) for e in episodes) / num,
        "episode/truncated_frac": sum(not e.done for e in episodes) / num,
        "episode/return": sum(e.total for e in episodes) / num,
    }
