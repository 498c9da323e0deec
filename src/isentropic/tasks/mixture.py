"""Several tasks in one: `mix:TASK@WEIGHT+TASK@WEIGHT...`, each a name with options of its own.

A weight ends a name, so that options stay as they are: `mix:rg:chain_sum:max_terms=2@0.7+rg:gcd@0.3`.
"""

import random
import re
from typing import Any

from . import Task, load_task
from .environments import EnvironmentTask

_MEMBER = re.compile(r"(.+?)@([0-9.]+)(?:\+|$)")


def members(rest: str, name: str) -> list[tuple[str, float]]:
    """Return the names and their shares, which sum to 1.

    Raises:
        ValueError: a text that is not TASK@WEIGHT+TASK@WEIGHT, or weights that are not above 0.

    Example:
        >>> members("rg:gcd:max_numbers=3@3+expr@1", "mix")
        [('rg:gcd:max_numbers=3', 0.75), ('expr', 0.25)]
    """
    pairs = [(m[1], m[2]) for m in _MEMBER.finditer(rest)]
    if len(pairs) < 2 or "".join(f"{task}@{weight}+" for task, weight in pairs) != f"{rest}+":
        raise ValueError(f"task {name!r} must be mix:TASK@WEIGHT+TASK@WEIGHT, got {rest!r} after mix")
    try:
        weights = [float(weight) for _, weight in pairs]
    except ValueError:
        weights = [0.0]
    if min(weights) <= 0:
        raise ValueError(f"task {name!r}: weights must be > 0, got {', '.join(w for _, w in pairs)}; leave a task out")
    return [(task, weight / sum(weights)) for (task, _), weight in zip(pairs, weights, strict=True)]


def load(rest: str, name: str) -> Task:
    """Return the mixture of `mix:TASK@WEIGHT+TASK@WEIGHT...`.

    Raises:
        ValueError: a text that is not a mixture, a task that cannot be loaded, one named twice, one that is played, or
            tasks with different stop texts.
    """
    shares = members(rest, name)
    tasks = {task: load_task(task) for task, _ in shares}
    if len(tasks) != len(shares):
        raise ValueError(f"task {name!r}: a task is named twice; add its weights")
    played = [name for name, task in tasks.items() if isinstance(task, EnvironmentTask)]
    if played:
        raise ValueError(
            f"task {name!r}: a mixture is of tasks that are answered, got {played[0]!r}, which is played; "
            "train one after the other by --then"
        )
    stops = {task.stop for task in tasks.values()}
    if len(stops) > 1:
        raise ValueError(
            f"task {name!r}: completions of a mixture must have the same stop text, got {sorted(stops)}; "
            "choose the same prompt= for all of them"
        )
    return mixture(name, tasks, [share for _, share in shares])


def mixture(name: str, tasks: dict[str, Task], shares: list[float]) -> Task:
    """Return a task with the prompts of several, by share.

    Every row has a column `member`, the name of the task that it belongs to. As many rows are taken as the shares allow
    without taking a row twice; held-out rows alternate, so that any beginning of the list has the same shares.

    Args:
        name: of the mixture.
        tasks: by name.
        shares: one a task, in order; they sum to 1.
    """

    def joined(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        num = min(len(of_member) / share for of_member, share in zip(rows, shares, strict=True))
        placed = [
            ((i + 0.5) / max(1, int(num * share)), {**row, "member": member})
            for member, of_member, share in zip(tasks, rows, shares, strict=True)
            for i, row in enumerate(of_member[: max(1, int(num * share))])
        ]
        placed.sort(key=lambda pair: pair[0])
        columns = dict.fromkeys(key for _, row in placed for key in row)
        return [{key: row.get(key) for key in columns} for _, row in placed]

    def train(seed: int) -> list[dict[str, Any]]:
        rows = joined([task.train(seed) for task in tasks.values()])
        random.Random(seed).shuffle(rows)
        return rows

    def verify(completion: str, member: str, prompt: Any = None, **columns: Any) -> bool:
        per_row = {key: [value] for key, value in columns.items()}
        return bool(tasks[member].reward([completion], prompts=[prompt], **per_row)[0])

    first, *_ = tasks.values()
    return Task(
        name=name,
        description="A mixture: " + ", ".join(f"{s:.0%} {t}" for t, s in zip(tasks, shares, strict=True)) + ".",
        train=train,
        heldout=lambda: joined([task.heldout() for task in tasks.values()]),
        verify=verify,
        # Two tasks may normalise one text differently, and a mixture does not know which of them it answers.
        normalise=lambda completion: " ".join(completion.split()),
        max_completion_length=max(task.max_completion_length for task in tasks.values()),
        stop=first.stop,
        gold=_gold(tasks),
    )


def _gold(tasks: dict[str, Task]) -> Any:
    golds = {name: task.gold for name, task in tasks.items()}
    if any(gold is None for gold in golds.values()):
        return None
    return lambda row: golds[row["member"]](row)  # type: ignore[misc]
