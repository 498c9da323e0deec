"""Supervised warm-up on demonstrations, so that reinforcement learning starts from a policy that wins now and then.

A policy that never wins learns nothing from rewards. Here it imitates, on the training rows, an expert with noise:
cross-entropy of the tokens that the policy would have to write, given everything before them, in the text and token
layout of the episodes that it plays afterwards. The noise is imitated too: it shows states beside the expert's path and
how to return from them, and it keeps the policy from memorizing rows. Several tasks may be shown together, to a model
that is to be trained on them one after the other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runs.statistics import proportion_interval
from ..runs.text import duration
from ..tasks.environments import EnvironmentTask, demonstrate
from .episodes import count_wins
from .generation import seeded
from .words import word_model

IGNORED = -100
LOG_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class WarmUp:
    """Settings of the warm-up.

    Args:
        steps, batch: optimizer steps, and demonstrations in each.
        learning_rate: of AdamW at its peak; it rises over a tenth of the steps and falls linearly to 0.
        noise: share of actions in [0, 1) that are drawn from the possible ones in place of the expert's.
        variants: demonstrations of each row, each with its own noise; those that do not win are left out.
        rows: how many training rows of each task are used, from the first; None for all. A small model may memorize
            them, and rewards have most to teach on the rows that were left out.
        seed: of noise and order.
    """

    steps: int = 200
    batch: int = 16
    learning_rate: float = 3e-3
    noise: float = 0.3
    variants: int = 16
    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "learning_rate", "variants"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be a share in [0, 1), got {self.noise}; at 1 there is no expert")


def encode(tokenizer: Any, turns: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Token ids of a demonstration, and their labels: each text tokenized on its own, as in an episode.

    Example:
        >>> from isentropic.models.words import word_tokenizer
        >>> encode(word_tokenizer(["go", "up"]), [("up\\n>", False), ("go up\\n", True)])
        ([47, 3, 33, 46, 47, 3], [-100, -100, -100, 46, 47, 3])
    """
    ids: list[int] = []
    labels: list[int] = []
    for i, (text, is_action) in enumerate(turns):
        new = tokenizer(text, add_special_tokens=i == 0)["input_ids"]
        ids += new
        labels += new if is_action else [IGNORED] * len(new)
    return ids, labels


def demonstrations(
    tasks: Sequence[EnvironmentTask], tokenizer: Any, settings: WarmUp
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of every training row, played by its environment's advice with noise; won episodes only.

    Raises:
        ValueError: the advice wins nothing in one of the tasks, or there is none.
    """
    encoded = []
    variants = settings.variants if settings.noise else 1
    for task in tasks:
        environment, before = task.make(), len(encoded)
        for row in task.train(settings.seed)[: settings.rows]:
            for i in range(variants):
                turns, total = demonstrate(task, row, environment, settings.noise, settings.seed * variants + i)
                if total >= task.win_at:
                    encoded.append(encode(tokenizer, turns))
        if len(encoded) == before:
            raise ValueError(
                f"task {task.name!r}: its advice wins no training row within {task.max_turns} turns; allow more turns, "
                "or less noise"
            )
    return encoded


def warm_up(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[EnvironmentTask],
    settings: WarmUp = WarmUp(),
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train a model in place.

    Args:
        model: a causal language model; all its weights are trained.
        tokenizer: its tokenizer.
        tasks: environments that give advice; every demonstration of any of them is drawn as often.
        settings: of the warm-up.
        say: called with a line of progress every few seconds.

    Returns:
        ``loss``, mean nats per token of the last tenth of the steps; ``demonstrations``; ``seconds``.

    Raises:
        ValueError: no demonstration of a task wins.
    """
    encoded = demonstrations(tasks, tokenizer, settings)
    draw = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    started = last = time.monotonic()
    losses: list[float] = []
    model.train()
    for step in range(settings.steps):
        batch = [encoded[i] for i in torch.randint(len(encoded), (settings.batch,), generator=draw).tolist()]
        ids, real, labels = _padded(batch, tokenizer.pad_token_id, model.device)
        loss = model(input_ids=ids, attention_mask=real, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pace = min(1.0, 10 * (step + 1) / settings.steps) * (1 - step / settings.steps)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * pace
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if time.monotonic() - last > LOG_EVERY:
            last = time.monotonic()
            left = (last - started) / (step + 1) * (settings.steps - step - 1)
            say(f"warm-up step {step + 1}/{settings.steps}  loss {losses[-1]:.3f} nats per token  eta {duration(left)}")
    model.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return {"loss": sum(tail) / len(tail), "demonstrations": len(encoded), "seconds": time.monotonic() - started}


def _padded(batch: list[tuple[list[int], list[int]]], pad: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels, [b s], padded on the right."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([x + [pad] * (width - len(x)) for x, _ in batch], device=device)
    labels = torch.tensor([y + [IGNORED] * (width - len(y)) for _, y in batch], device=device)
    real = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x, _ in batch], device=device)
    return ids, real, labels


def win_rate(model: Any, tokenizer: Any, task: EnvironmentTask, num: int, seed: int = 0) -> list[float]:
    """The share of ``num`` episodes won, at temperature 1, for each held-out row."""
    with seeded(seed):
        wins = count_wins(model, tokenizer, task, task.heldout(), num)
    return [won / num for won in wins.correct]


def _mean_share(shares: list[float]) -> dict[str, Any]:
    return {"win_frac": sum(shares) / len(shares), "interval": proportion_interval(shares)}


def make(
    tasks: Sequence[Any],
    out: str | Path,
    settings: WarmUp = WarmUp(),
    start: tuple[Any, Any] | None = None,
    num: int = 4,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Warm a model up, count how often it wins, and save it as a model directory for ``train --model``.

    Args:
        tasks: one or more environments that give advice.
        out: the directory; warmup.json in it holds settings and figures.
        settings: of the warm-up.
        start: model and tokenizer to start from; None creates a model of the tasks' words, with random weights.
        num: episodes of each held-out row; 0 for none.
        say: called with a line of progress every few seconds.

    Returns:
        ``loss``, ``demonstrations``, ``seconds``, and if episodes were played ``win_frac`` with its ``interval`` over
        rows (95 %; None for fewer than 3), of all tasks together, and in ``by_task`` of each by its name.

    Raises:
        ValueError: a task that is not an environment, or one without advice.
    """
    for task in tasks:
        if not isinstance(task, EnvironmentTask):
            raise ValueError(f"task {task.name!r} is answered, not played; warm-up needs an environment")
    model, tokenizer = start or word_model(tasks, seed=settings.seed)
    figures: dict[str, Any] = warm_up(model, tokenizer, tasks, settings, say)
    if num:
        shares = {task.name: win_rate(model, tokenizer, task, num, settings.seed) for task in tasks}
        figures |= _mean_share([share for values in shares.values() for share in values])
        figures["by_task"] = {name: _mean_share(values) for name, values in shares.items()}
    folder = Path(out)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    header = {"task": " and ".join(task.name for task in tasks), "settings": asdict(settings), "figures": figures}
    (folder / "warmup.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return figures
