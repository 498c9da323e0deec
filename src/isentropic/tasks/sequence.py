"""Two tasks, one after the other, as one task: all rows of the first before those of the second.

Training on them in one run, and what happens at the switch: :mod:`isentropic.engines.trl.sequence`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import Task
from .checks import training_rows


def in_order(first: Task, then: Task, num_first: int, num_then: int) -> Task:
    """One task that asks ``num_first`` prompts of the first and then ``num_then`` of the second.

    Every row has a column ``task``, the name of the task that it belongs to. A task's prompts are shuffled anew for
    every pass.

    Args:
        first, then: two tasks of different names, answered or played.
        num_first, num_then: prompts of each; a generated batch of the caller must be of one task.

    Raises:
        ValueError: two tasks of one name, prompts of two forms, or no row that is not held out by one of them.
    """
    if first.name == then.name:
        raise ValueError(f"tasks that follow one another need different names, got {first.name!r} twice; rename one")

    def train(seed: int) -> list[dict[str, Any]]:
        first_rows = _repeated_rows(first, num_first, seed, then)
        then_rows = _repeated_rows(then, num_then, seed, first)
        if isinstance(first_rows[0]["prompt"], str) != isinstance(then_rows[0]["prompt"], str):
            raise ValueError(
                f"{first.name} and {then.name} need prompts of one form, got texts and conversations; "
                "choose the same prompt= or format= in both names"
            )
        rows = [*first_rows, *then_rows]
        columns = dict.fromkeys(name for row in rows for name in row)
        return [{name: row.get(name) for name in columns} for row in rows]

    return TaskSequence(
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
class TaskSequence(Task):
    """A task whose completions are judged by the task that their row names; see :func:`in_order`.

    Args:
        tasks: by name.
    """

    tasks: dict[str, Task]

    def reward(
        self, completions: Sequence[Any], *, prompts: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        """Return the rewards of the tasks that the column ``task`` names, in the form of a TRL reward function."""
        names, rewards = columns["task"], [0.0] * len(completions)
        per_row = {
            key: column for key, column in columns.items() if isinstance(column, list) and len(column) == len(names)
        }
        for name in dict.fromkeys(names):
            index = [i for i, task in enumerate(names) if task == name]
            task_prompts = None if prompts is None else [prompts[i] for i in index]
            task_columns = {key: [column[i] for i in index] for key, column in per_row.items()}
            task_rewards = self.tasks[name].reward(
                [completions[i] for i in index], prompts=task_prompts, **task_columns
            )
            for i, reward in zip(index, task_rewards, strict=True):
                rewards[i] = reward
        return rewards


def _repeated_rows(task: Task, num: int, seed: int, other: Task) -> list[dict[str, Any]]:
    """``num`` rows to train on: as many passes as needed, each in an order of its own."""
    rows, repeated, generator = training_rows(task, seed, [other]), list[dict[str, Any]](), random.Random(seed)
    while len(repeated) < num:
        repeated += generator.sample(rows, len(rows))
    return [{**row, "task": task.name} for row in repeated[:num]]
