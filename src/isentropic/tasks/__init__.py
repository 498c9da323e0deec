"""Verifiable tasks: prompts, a verifier, and what makes two right answers the same answer.

A `Task` is data, so a task of your own is one object in one file; `load_task` finds a built-in one by name and yours by
`package.module:attribute`. Importing this file imports no torch and builds nothing.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

TASKS: dict[str, str] = {
    "expr": "isentropic.tasks.expressions:expr",
    "expr-digit": "isentropic.tasks.expressions:expr_digit",
}
# kind: (who makes the task of what follows the first colon, how such a name is written, what it is).
KINDS: dict[str, tuple[str, str, str]] = {
    "textworld": ("isentropic.tasks.textworld:load", "textworld:GAME[:option=value...]", "text adventures, generated"),
    "textarena": ("isentropic.tasks.textarena:load", "textarena:GAME[:option=value...]", "games for one player"),
    "appworld": (
        "isentropic.tasks.appworld:load",
        "appworld:train=FILE:test=FILE:ports=8000-8007",
        "apps behind a server",
    ),
}


@dataclass(frozen=True)
class Task:
    """A verifiable task: what is asked, in training and when held out, and which answers are right.

    A row is a dict with `prompt` and the columns that `verify` names, all of them plain values, so that
    `datasets.Dataset.from_list(rows)` is a dataset in TRL's standard format.

    Args:
        name: short and unique; it names runs and metrics.
        description: one sentence for people.
        train: seed -> rows to train on.
        heldout: () -> rows to evaluate on, disjoint from those of every training seed. Any beginning of the list
            should be a fair sample, so that a cheaper evaluation may take the first rows.
        verify: (completion, **columns) -> right or wrong. It gets the columns that it names (`prompt` is one), or all
            of them when it takes `**columns`.
        normalise: right completion -> canonical text; two right answers are distinct when these differ.
        max_completion_length: tokens that an answer may take, the end-of-sequence token included.

    Example:
        >>> echo = Task(
        ...     name="echo",
        ...     description="Repeat the word.",
        ...     train=lambda seed: [{"prompt": "say a:", "word": "a"}],
        ...     heldout=lambda: [{"prompt": "say b:", "word": "b"}],
        ...     verify=lambda completion, word: completion.strip() == word,
        ...     normalise=str.strip,
        ...     max_completion_length=3,
        ... )
        >>> echo.reward([" a", "b"], word=["a", "a"])
        [1.0, 0.0]
    """

    name: str
    description: str
    train: Callable[[int], list[dict[str, Any]]]
    heldout: Callable[[], list[dict[str, Any]]]
    verify: Callable[..., bool]
    normalise: Callable[[str], str]
    max_completion_length: int

    def reward(
        self, completions: Sequence[Any], *, prompts: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        """Return 1.0 for every right completion and 0.0 for the others, in the form of a TRL reward function.

        Args:
            completions: b texts, or b conversations, of which the last message counts.
            prompts: b prompts, given to `verify` as `prompt` if it asks.
            columns: b values each, for example `target=[73, 12]`. What `verify` does not name is ignored: an engine
                also passes its state and its loggers here.

        Raises:
            ValueError: a column that `verify` needs is missing, or has not b values.
        """
        num = len(completions)
        if prompts is not None:
            columns["prompt"] = prompts
        names = self._columns_for_verify(columns, num)
        wrong = [name for name in names if len(columns[name]) != num]
        if wrong:
            sizes = ", ".join(f"{name} has {len(columns[name])}" for name in wrong)
            raise ValueError(
                f"task {self.name!r}: each column must have one value a completion, got {num} completions and {sizes}; "
                "repeat the columns as often as the prompts"
            )
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [float(self.verify(text, **{n: columns[n][i] for n in names})) for i, text in enumerate(texts)]

    def _columns_for_verify(self, columns: dict[str, Any], num: int) -> list[str]:
        """Return the names among `columns` that `verify` gets."""
        params = list(inspect.signature(self.verify).parameters.values())[1:]
        if any(p.kind is p.VAR_KEYWORD for p in params):
            return [name for name, column in columns.items() if isinstance(column, list) and len(column) == num]
        # A bound or defaulted parameter is a setting of the verifier unless the rows have a column of that name.
        names = [p.name for p in params if p.default is p.empty or isinstance(columns.get(p.name), list)]
        missing = [name for name in names if name not in columns]
        if missing:
            raise ValueError(
                f"task {self.name!r}: verify needs the column {missing[0]!r}, got {sorted(columns)}; "
                "add it to every row of the task, or give it a default in verify"
            )
        return names


def load_task(name: str) -> Task:
    """Return the task of a built-in name, or the one at `package.module:attribute`.

    Raises:
        ValueError: there is no such name, module or attribute, or what stands there is not a `Task`.

    Example:
        >>> load_task("expr").max_completion_length
        8
    """
    kind, colon, rest = name.partition(":")
    if kind in KINDS and colon:
        module_name, _, attribute = KINDS[kind][0].partition(":")
        return getattr(importlib.import_module(module_name), attribute)(rest, name)
    if name not in TASKS and ":" not in name:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? Or" if near else "use one of these, or"
        raise ValueError(
            f"task must be one of {', '.join(map(repr, TASKS))} or 'package.module:attribute', got {name!r}; "
            f"{hint} name a Task of your own, for example 'my_tasks:spelling'"
        )
    module_name, _, attribute = TASKS.get(name, name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import that fails inside the module is the author's to see; only the module itself is our message.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"task {name!r} must name an importable module, got {module_name!r}, and there is no module "
            f"{error.name!r}; install it, or put its directory on PYTHONPATH"
        ) from error
    task = getattr(module, attribute, None)
    if isinstance(task, Task):
        return task
    found = sorted(key for key, value in vars(module).items() if isinstance(value, Task))
    got = "no such attribute" if task is None else f"a {type(task).__name__}"
    near = difflib.get_close_matches(attribute, found, n=1)
    hint = f"did you mean {module_name}:{near[0]}?" if near else "assign an isentropic.tasks.Task to that name"
    raise ValueError(f"task {name!r} must be a Task, got {got}; Tasks in {module_name}: {found or 'none'}; {hint}")
