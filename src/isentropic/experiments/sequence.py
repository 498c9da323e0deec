"""Tasks that follow one another in one run: train on A, then on B, and see what A left behind.

Rows come in order, all of A before the first of B. At the switch the optimizer forgets its moments and the learning
rate starts again, as if B had been begun from A's model; the controller and its target go on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, get_scheduler

from ..engines.trl.rollout import Rollout
from ..engines.trl.stop import limit_to, stop_at
from ..engines.trl.trainer import IsentropicTrainer
from ..tasks import Task
from ..tasks.checks import training_rows


def in_order(first: Task, then: Task, num_first: int, num_then: int) -> Task:
    """One task that asks ``num_first`` prompts of the first and then ``num_then`` of the second.

    Every row carries ``task``, the name of the one it belongs to. A task's prompts are shuffled anew for every pass.

    Args:
        first, then: two tasks of different names, answered or played.
        num_first, num_then: prompts of each; the caller's generated batches must not straddle the switch.

    Raises:
        ValueError: two tasks of one name, prompts of two forms, or no row that is not held out by one of them.
    """
    if first.name == then.name:
        raise ValueError(f"tasks that follow one another need different names, got {first.name!r} twice; rename one")

    def train(seed: int) -> list[dict[str, Any]]:
        parts = [
            _repeat(task, num, seed, other) for task, num, other in ((first, num_first, then), (then, num_then, first))
        ]
        if len({isinstance(part[0]["prompt"], str) for part in parts}) > 1:
            raise ValueError(
                f"{first.name} and {then.name} need prompts of one form, got texts and conversations; "
                "choose the same prompt= or format= in both names"
            )
        names = dict.fromkeys(name for part in parts for row in part for name in row)
        return [{name: row.get(name) for name in names} for part in parts for row in part]

    return _InTurn(
        tasks={task.name: task for task in (first, then)},
        name=f"{first.name} then {then.name}",
        description=f"{first.description} Then: {then.description}",
        train=train,
        heldout=then.heldout,
        verify=then.verify,
        normalise=then.normalise,
        max_completion_length=max(first.max_completion_length, then.max_completion_length),
    )


@dataclass(frozen=True, kw_only=True)
class _InTurn(Task):
    """Each completion is judged by the task that its row names."""

    tasks: dict[str, Task]

    def reward(
        self, completions: Sequence[Any], *, prompts: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        names, found = columns["task"], [0.0] * len(completions)
        per_row = {k: v for k, v in columns.items() if isinstance(v, list) and len(v) == len(names)}
        for name in dict.fromkeys(names):
            at = [i for i, each in enumerate(names) if each == name]
            asked = None if prompts is None else [prompts[i] for i in at]
            held = {key: [column[i] for i in at] for key, column in per_row.items()}
            marks = self.tasks[name].reward([completions[i] for i in at], prompts=asked, **held)
            for i, mark in zip(at, marks, strict=True):
                found[i] = mark
        return found


def _repeat(task: Task, num: int, seed: int, other: Task) -> list[dict[str, Any]]:
    rows, found, generator = training_rows(task, seed, [other]), list[dict[str, Any]](), random.Random(seed)
    while len(found) < num:
        found += generator.sample(rows, len(rows))
    return [{**row, "task": task.name} for row in found[:num]]


class Manner(NamedTuple):
    """How a task's completions are made.

    Attributes:
        stop: tokens that end one.
        limit: its tokens at most.
        rollout: who plays, where the task is played.
    """

    stop: list[int]
    limit: int
    rollout: Rollout | None = None


class SequentialTrainer(IsentropicTrainer):
    """An :class:`IsentropicTrainer` over the rows of :func:`in_order`; set both before training.

    Attributes:
        switch: optimizer steps on the first task.
        manners: of the first task, and of the second.
    """

    switch: int
    manners: tuple[Manner, Manner]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self._batch_facts["task"] = inputs[0]["task"]
        return output

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The configured schedule for each task, one after the other."""
        made: Any = self.optimizer if optimizer is None else optimizer
        shapes = [self._shape(steps) for steps in (self.switch, num_training_steps - self.switch)]

        def factor(step: int) -> float:
            return shapes[0](step) if step < self.switch else shapes[1](step - self.switch)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(made, factor)
        return self.lr_scheduler

    def _shape(self, steps: int) -> Callable[[int], float]:
        unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        warmup = self.args.get_warmup_steps(steps)
        made: Any = get_scheduler(self.args.lr_scheduler_type, unused, warmup, steps)
        return made.lr_lambdas[0]


class Switch(TrainerCallback):
    """Before the first step on the second task: the optimizer forgets, and ``then`` is called."""

    def __init__(self, trainer: SequentialTrainer, then: Callable[[int], None]):
        self.trainer, self.then = trainer, then

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        manner = self.trainer.manners[state.global_step >= self.trainer.switch]
        stop_at(self.trainer, manner.stop)
        limit_to(self.trainer, manner.limit)
        self.trainer.rollout_func = manner.rollout
        if state.global_step == self.trainer.switch:
            optimizer: Any = self.trainer.optimizer
            optimizer.state.clear()
            self.then(state.global_step)
