"""Tasks, one after the other, as one task: all rows of one before those of the next.

Training on them in one run, and what happens at a switch: :mod:`isentropic.engines.trl.sequence`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import Task
from .checks import training_rows


class NamedSequence(NamedTuple):
    """A sequence of tasks that has a name, which may be given in place of a task's.

    Attributes:
        tasks: names, in order.
        meaning: in a few words.
    """

    tasks: tuple[str, ...]
    meaning: str


SEQUENCES: dict[str, NamedSequence] = {
    "reversal": NamedSequence(
        ("expr", "expr:need=no-plus"),
        "the first task rewards any right expression, and most have a sum; the second one punishes a sum",
    ),
    "reversal-3": NamedSequence(
        ("expr", "expr:need=no-plus", "expr:need=last,plus"),
        "the same, and then a task that asks for a sum again",
    ),
    "textworld-two-games": NamedSequence(
        (
            "textworld:coin_collector:level=5:train=24:test=20:text=brief:turns=10",
            "textworld:coin_collector:level=105:train=24:test=20:text=brief:turns=16",
        ),
        "in the first game going forward always wins; in the second, half of the rooms are dead ends",
    ),
}


def in_order(tasks: Sequence[Task], nums: Sequence[int]) -> Task:
    """One task that asks prompts of each task in turn.

    Every row has a column ``task``, the name of the task that it belongs to. A task's prompts are shuffled anew for
    every pass.

    Args:
        tasks: two or more, of different names, answered or played.
        nums: prompts of each; a generated batch of the caller must be of one task.

    Raises:
        ValueError: two tasks of one name, prompts of two forms, or no row that is not held out by one of them.
    """
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"tasks that follow one another need different names, got {twice!r} twice; rename one")

    def train(seed: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for task, num in zip(tasks, nums, strict=True):
            mine = _repeated_rows(task, num, seed, [other for other in tasks if other is not task])
            if rows and isinstance(rows[0]["prompt"], str) != isinstance(mine[0]["prompt"], str):
                raise ValueError(
                    f"{names[0]} and {task.name} need prompts of the same form, got texts and conversations; "
                    "choose the same prompt= or format= in both names"
                )
            rows += mine
        columns = dict.fromkeys(name for row in rows for name in row)
        return [{name: row.get(name) for name in columns} for row in rows]

    last = tasks[-1]
    return TaskSequence(
        tasks={task.name: task for task in tasks},
        name=" then ".join(names),
        description=" Then: ".join(task.description for task in tasks),
        train=train,
        heldout=last.heldout,
        verify=last.verify,
        normalise=last.normalise,
        max_completion_length=max(task.max_completion_length for task in tasks),
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


def _repeated_rows(task: Task, num: int, seed: int, others: Sequence[Task]) -> list[dict[str, Any]]:
    """``num`` rows to train on: as many passes as needed, each in an order of its own."""
    rows, repeated, generator = training_rows(task, seed, others), list[dict[str, Any]](), random.Random(seed)
    while len(repeated) < num:
        repeated += generator.sample(rows, len(rows))
    return [{**row, "task": task.name} for row in repeated[:num]]
