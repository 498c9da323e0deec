"""Episodes of many turns behind TRL's ``rollout_func``: the policy writes a line, the environment answers, and so on.

Tokens are only ever appended. What the policy wrote stays the very ids that it sampled, each observation is tokenised
once and put behind them, and so the log-probs of a turn are of the prefix that training scores. ``env_mask`` is 1 for
sampled tokens and 0 for the others, which TRL hands on as ``tool_mask``: loss and entropy leave the others out.

Games that are still alive act together, by the model's own ``generate``, on one growing batch with one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from .stop import ends, line_breaks


@dataclass
class Episode:
    """One episode, in tokens and in figures.

    Attributes:
        prompt_ids: what the policy read before its first action.
        ids, mask, logp: the tokens after it; 1 where the policy sampled the token; its log-prob at the sampling
            temperature (0 for the environment's).
        actions: what the policy wrote, line by line.
        total: the sum of the rewards.
        done: whether the environment ended it; else turns or tokens ran out.
    """

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    total: float = 0.0
    done: bool = False

    def wrote(self, ids: list[int], logp: list[float]) -> None:
        """Append what the policy sampled."""
        self.ids += ids
        self.mask += [1] * len(ids)
        self.logp += logp

    def read(self, ids: list[int]) -> None:
        """Append what the environment said."""
        self.ids += ids
        self.mask += [0] * len(ids)
        self.logp += [0.0] * len(ids)


class Sampling(NamedTuple):
    """How actions are drawn: temperature (0 is greedy), and what else ``generate`` is to be told."""

    temperature: float = 1.0
    more: dict[str, Any] = {}  # noqa: RUF012  (read only)


PLAIN = Sampling()


class _Table:
    """The games that are still alive, as one batch that grows to the right.

    Rows differ in length, so that a block that is appended has holes: positions that the attention mask leaves out,
    left of what is real, since ``generate`` goes on from the last column. Positions count real tokens alone.
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

    def act(self, limit: int, stop: list[int], how: Sampling) -> list[tuple[list[int], list[float]]]:
        """A line of each game: its ids, and their log-probs."""
        drawn = {"temperature": how.temperature, "top_k": 0, "top_p": 1.0} if how.temperature else {}
        out = self.model.generate(
            input_ids=self.ids,
            attention_mask=self.real,
            past_key_values=self.cache,
            max_new_tokens=limit,
            eos_token_id=stop,
            pad_token_id=self.pad,
            do_sample=bool(how.temperature),
            return_dict_in_generate=True,
            output_scores=True,
            **drawn | how.more,
        )
        new = out.sequences[:, self.ids.shape[1] :]
        scores = torch.stack(out.scores, 1).float()
        logp = scores.log_softmax(-1).gather(-1, new[..., None])[..., 0]
        ended = torch.isin(new, torch.tensor(stop, device=new.device)).long()
        inside = (ended.cumsum(1) - ended == 0).long()
        self.ids, self.real = out.sequences, torch.cat([self.real, inside], 1)
        self.cache = out.past_key_values if _droppable(out.past_key_values) else None
        lengths = inside.sum(1).tolist()
        rows = zip(new.tolist(), logp.tolist(), lengths, strict=True)
        return [(ids[:n], p[:n]) for ids, p, n in rows]

    def go_on(self, kept: list[int], replies: list[list[int]]) -> None:
        """Keep some games, and append what their environments said."""
        index = torch.tensor(kept, device=self.device)
        ids, real = self._block(replies)
        self.ids = torch.cat([self.ids[index], ids], 1)
        self.real = torch.cat([self.real[index], real], 1)
        if self.cache is not None:
            self.cache.batch_select_indices(index)


def _droppable(cache: Any) -> bool:
    """Whether rows can be taken out of a cache, and holes are all the same to it: plain layers of keys and values."""
    layers = getattr(cache, "layers", None)
    return bool(layers) and all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def play(
    model: Any,
    tokenizer: Any,
    task: Any,
    rows: list[dict[str, Any]],
    how: Sampling = PLAIN,
    pool: list[Any] | None = None,
) -> list[Episode]:
    """Play one episode a row.

    Args:
        model: a causal language model with ``generate``.
        tokenizer: its tokenizer; it needs a pad token.
        task: an ``EnvironmentTask``, or what has its ``make``, ``opening``, ``reply`` and limits.
        rows: columns for ``reset``; a row that occurs g times is played g times.
        how: the sampling.
        pool: environments to use again; more are made, and added, as they are needed.

    Raises:
        ValueError: a prompt that is a conversation.
    """
    pool = [] if pool is None else pool
    at_once = task.parallel or len(rows)
    stop, episodes = [*ends(tokenizer, model), *line_breaks(tokenizer)], []
    for first in range(0, len(rows), at_once):
        some = rows[first : first + at_once]
        while len(pool) < len(some):
            pool.append(task.make())
        episodes += _play(model, tokenizer, task, some, how, pool, stop)
    return episodes


@torch.no_grad()
def _play(
    model: Any, tokenizer: Any, task: Any, rows: list[dict[str, Any]], how: Sampling, pool: list[Any], stop: list[int]
) -> list[Episode]:
    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    episodes = [Episode(_opening(tokenizer, task, row, env)) for row, env in zip(rows, pool, strict=False)]
    table, alive = _Table(model, [e.prompt_ids for e in episodes], tokenizer.pad_token_id), list(range(len(rows)))
    for turn in range(task.max_turns):
        lines = table.act(task.max_action_tokens, stop, how)
        kept, replies, still = [], [], []
        for place, (number, (ids, logp)) in enumerate(zip(alive, lines, strict=True)):
            episode = episodes[number]
            episode.wrote(ids, logp)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            action = text.strip().split("\n")[0].strip()
            observation, reward, episode.done = pool[number].step(action)
            episode.actions.append(action)
            episode.total += float(reward)
            if episode.done:
                # An end that is not the policy's: TRL tells by it that the episode is whole.
                episode.read([tokenizer.eos_token_id])
                continue
            said = tokens(("" if "\n" in text else "\n") + task.reply(observation))
            room = task.max_completion_length - len(episode.ids) - len(said)
            if turn + 1 < task.max_turns and room >= task.max_action_tokens + 1:
                episode.read(said)
                kept, replies, still = [*kept, place], [*replies, said], [*still, number]
        alive = still
        if not alive:
            break
        table.go_on(kept, replies)
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
    """For each row: episodes won, how many of those differ in their actions, and how many were cut short.

    ``num_tokens`` are those that the policy wrote.
    """

    correct: list[int]
    distinct: list[int]
    truncated: list[int]
    num_tokens: int


def limited(task: Any, max_tokens: int | None) -> Any:
    """The task with another limit of tokens an episode, where there is one."""
    return replace(task, max_completion_length=max_tokens) if max_tokens else task


def wins(
    model: Any,
    tokenizer: Any,
    task: Any,
    rows: list[dict[str, Any]],
    num: int,
    how: Sampling = PLAIN,
    batch: int = 256,
    progress: Callable[[int, int, int], None] | None = None,
) -> Wins:
    """Play every row ``num`` times, ``batch`` episodes at once; ``progress`` gets episodes done, all, and tokens."""
    pool: list[Any] = []
    found, per_call = Wins([], [], [], 0), max(1, batch // num)
    for start in range(0, len(rows), per_call):
        asked = [row for row in rows[start : start + per_call] for _ in range(num)]
        played = play(model, tokenizer, task, asked, how, pool)
        for i in range(0, len(played), num):
            group = played[i : i + num]
            won = ["\n".join(e.actions) for e in group if e.total >= task.win_at]
            found.correct.append(len(won))
            found.distinct.append(len({task.normalise(text) for text in won}))
            found.truncated.append(sum(not e.done for e in group))
        found = found._replace(num_tokens=found.num_tokens + sum(sum(e.mask) for e in played))
        if progress is not None:
            progress(len(found.correct) * num, len(rows) * num, found.num_tokens)
    return found


def figures(episodes: Iterable[Episode], win_at: float) -> dict[str, float]:
    """What a batch of episodes amounts to, for metrics.jsonl.

    Example:
        >>> won = Episode([1], [5, 6], [1, 0], [-0.1, 0.0], ["go"], total=1.0, done=True)
        >>> lost = Episode([1], [5, 5, 5], [1, 0, 1], [-0.1, 0.0, -0.1], ["go", "go"])
        >>> figures([won, lost], win_at=1.0)
        {'episode/win_frac': 0.5, 'episode/turns': 1.5, 'episode/truncated_frac': 0.5, 'episode/return': 0.5}
    """
    played = list(episodes)
    num = max(len(played), 1)
    return {
        "episode/win_frac": sum(e.total >= win_at for e in played) / num,
        "episode/turns": sum(len(e.actions) for e in played) / num,
        "episode/truncated_frac": sum(not e.done for e in played) / num,
        "episode/return": sum(e.total for e in played) / num,
    }


class Rollout:
    """A task's episodes as TRL's ``rollout_func``.

    The rewards reach the reward functions as a column, ``episode_return``, which ``task.reward`` reads::

        IsentropicTrainer(model, task.reward, args=args, train_dataset=rows, rollout_func=Rollout(task), ...)

    TRL hands over prompts alone, repeated for each generation; the rows come from the trainer, which is one of ours.

    Args:
        task: an ``EnvironmentTask``.
    """

    def __init__(self, task: Any):
        self.task = task
        self.pool: list[Any] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Play; returns prompt_ids, completion_ids, logprobs, env_mask, and episode_return.

        Raises:
            ValueError: a trainer that does not say its rows, or one that samples by vLLM.
        """
        rows = getattr(trainer, "rollout_rows", None)
        if rows is None or len(rows) != len(prompts):
            raise ValueError(
                "an episode needs the columns of its row, and TRL's rollout_func is given prompts alone; "
                "use IsentropicTrainer, or put EntropyControlMixin in front of your trainer"
            )
        if trainer.use_vllm:
            raise ValueError("use_vllm has no effect on episodes, which the model itself generates; leave it out")
        with _generating(trainer) as model:
            episodes = play(
                model, trainer._tokenizer, self.task, rows, Sampling(trainer.temperature, _more(trainer)), self.pool
            )
        seen = trainer._metrics["train" if trainer.model.training else "eval"]
        ours = figures(episodes, self.task.win_at)
        device = trainer.accelerator.device
        means = trainer.accelerator.gather(torch.tensor([list(ours.values())], device=device)).mean(0).tolist()
        calls = torch.tensor([sum(len(e.actions) + 1 for e in episodes)], device=device)
        for name, value in zip(ours, means, strict=True):
            seen[name].append(value)
        seen["episode/calls"].append(float(trainer.accelerator.gather(calls).sum()))
        return {
            "prompt_ids": [e.prompt_ids for e in episodes],
            "completion_ids": [e.ids for e in episodes],
            "logprobs": [e.logp for e in episodes],
            "env_mask": [e.mask for e in episodes],
            "episode_return": [e.total for e in episodes],
        }


def _more(trainer: Any) -> dict[str, Any]:
    """The trainer's own sampling, as its ``generate`` would be told."""
    names = ("top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: getattr(trainer.args, name) for name in names}
    return {name: value for name, value in given.items() if value is not None} | (trainer.args.generation_kwargs or {})


@contextmanager
def _generating(trainer: Any) -> Iterator[Any]:
    """The bare model, as TRL has it while it generates."""
    from trl.models import unwrap_model_for_generation

    bare = unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    )
    with bare as model, trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False):
        yield model
