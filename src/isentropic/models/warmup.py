"""Supervised warm-up on demonstrations: what gives reinforcement learning something to start from.

A policy that never wins learns nothing from rewards. Here it imitates, on the training rows, one who knows the way and
errs now and then: cross-entropy of the tokens that the policy would have to write, given everything before them, in
the very text and token layout of the episodes that it plays afterwards. Errors are imitated too. They show what the way
alone never shows, how to come back, and what cannot be foretold keeps the policy from learning rows by heart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isentropic.engines.trl.rollout import Sampling, wins
from isentropic.runs.statistics import bootstrap_interval
from isentropic.tasks.environments import EnvironmentTask, demonstrate

IGNORED = -100
SHOWN_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class WarmUp:
    """How to imitate.

    Args:
        steps, batch: optimizer steps, and demonstrations in each.
        learning_rate: of AdamW at its peak; it rises over a tenth of the steps and falls linearly to 0.
        noise: share of actions in [0, 1] that the demonstrator draws from what is possible.
        variants: demonstrations of each row, with noise of their own; those that fail are left out.
        rows: how many training rows are shown, from the first; None for all. A small model may learn what it is shown
            by heart, and the rows that it has not seen are where rewards have most to teach.
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
            raise ValueError(f"noise must be a share in [0, 1), got {self.noise}; at 1 nothing is shown")


def encode(tokenizer: Any, parts: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Token ids of a demonstration, and their labels: each part on its own, as an episode is put together.

    Example:
        >>> from isentropic.models.words import word_tokenizer
        >>> encode(word_tokenizer(["go", "up"]), [("up\\n>", False), ("go up\\n", True)])
        ([47, 3, 33, 46, 47, 3], [-100, -100, -100, 46, 47, 3])
    """
    ids: list[int] = []
    labels: list[int] = []
    for i, (text, is_action) in enumerate(parts):
        new = tokenizer(text, add_special_tokens=i == 0)["input_ids"]
        ids += new
        labels += new if is_action else [IGNORED] * len(new)
    return ids, labels


def demonstrations(task: EnvironmentTask, tokenizer: Any, settings: WarmUp) -> list[tuple[list[int], list[int]]]:
    """Every training row played by its environment's advice, with noise; won episodes alone.

    Raises:
        ValueError: the advice wins nothing, or there is none.
    """
    environment, shown = task.make(), []
    variants = settings.variants if settings.noise else 1
    for row in task.train(settings.seed)[: settings.rows]:
        for i in range(variants):
            parts, total = demonstrate(task, row, environment, settings.noise, settings.seed * variants + i)
            if total >= task.win_at:
                shown.append(encode(tokenizer, parts))
    if not shown:
        raise ValueError(f"task {task.name!r}: its advice wins no training row within {task.max_turns} turns")
    return shown


def warm_up(
    model: Any,
    tokenizer: Any,
    task: EnvironmentTask,
    settings: WarmUp = WarmUp(),
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train a model in place.

    Args:
        model: a causal language model; all its weights are trained.
        tokenizer: its tokenizer.
        task: an environment that gives advice.
        settings: how.
        say: gets a line now and then.

    Returns:
        ``loss``, mean nats a token of the last tenth of the steps; ``demonstrations``; ``seconds``.

    Raises:
        ValueError: nothing to imitate.
    """
    shown = demonstrations(task, tokenizer, settings)
    draw = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    began = last = time.monotonic()
    losses: list[float] = []
    model.train()
    for step in range(settings.steps):
        some = [shown[i] for i in torch.randint(len(shown), (settings.batch,), generator=draw).tolist()]
        ids, real, labels = _batch(some, tokenizer.pad_token_id, model.device)
        loss = model(input_ids=ids, attention_mask=real, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pace = min(1.0, 10 * (step + 1) / settings.steps) * (1 - step / settings.steps)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * pace
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if time.monotonic() - last > SHOWN_EVERY:
            last = time.monotonic()
            left = (last - began) / (step + 1) * (settings.steps - step - 1)
            say(f"warm-up step {step + 1}/{settings.steps}  loss {losses[-1]:.3f} nats a token  eta {left:.0f} s")
    model.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return {"loss": sum(tail) / len(tail), "demonstrations": len(shown), "seconds": time.monotonic() - began}


def _batch(some: list[tuple[list[int], list[int]]], pad: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(ids) for ids, _ in some)
    ids = torch.tensor([x + [pad] * (width - len(x)) for x, _ in some], device=device)
    labels = torch.tensor([y + [IGNORED] * (width - len(y)) for _, y in some], device=device)
    real = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x, _ in some], device=device)
    return ids, real, labels


def win_rate(model: Any, tokenizer: Any, task: EnvironmentTask, num: int, seed: int = 0) -> list[float]:
    """The share of ``num`` episodes won, at temperature 1, for each held-out row."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        found = wins(model, tokenizer, task, task.heldout(), num, Sampling(1.0))
    return [won / num for won in found.correct]


def make(
    task: Any,
    out: str | Path,
    settings: WarmUp = WarmUp(),
    given: tuple[Any, Any] | None = None,
    num: int = 4,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Warm a model up, see how often it wins, and write it as a model directory that ``train --model`` takes.

    Args:
        task: an environment that gives advice.
        out: the directory; warmup.json in it holds settings and figures.
        settings: how to imitate.
        given: model and tokenizer to start from; None makes a model of the task's words, with random weights.
        num: episodes of each held-out row; 0 for none.
        say: gets a line now and then.

    Returns:
        ``loss``, ``demonstrations``, ``seconds``, and where episodes were played ``win_frac`` with its ``interval``
        over rows (bootstrap, 95 %).

    Raises:
        ValueError: a task that is no environment, or one without advice.
    """
    if not isinstance(task, EnvironmentTask):
        raise ValueError(f"task {task.name!r} is answered, not played; warm-up needs an environment")
    if given is None:
        from isentropic.models.words import word_model

        given = word_model(task, seed=settings.seed)
    model, tokenizer = given
    figures: dict[str, Any] = warm_up(model, tokenizer, task, settings, say)
    if num:
        shares = win_rate(model, tokenizer, task, num, settings.seed)
        figures |= {"win_frac": sum(shares) / len(shares), "interval": bootstrap_interval(shares)}
    home = Path(out)
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    facts = {"task": task.name, "settings": asdict(settings), "figures": figures}
    (home / "warmup.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return figures
