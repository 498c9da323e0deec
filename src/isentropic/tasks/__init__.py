"""Verifiable tasks: prompts, a verifier, and what makes two right answers the same answer.

A `Task` is data, so a task of your own is one object in one file; `load_task` finds it, a built-in one, a generator of
reasoning-gym, a data set or a mixture by its name. Importing this file imports no torch and builds nothing.
"""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

TASKS: dict[str, str] = {
    "expr": "isentropic.tasks.expressions:expr",
    "expr-digit": "isentropic.tasks.expressions:expr_digit",
}
# kind: (who makes the task of what follows the first colon, how such a name is written, what it is).
KINDS: dict[str, tuple[str, str, str]] = {
    "gsm8k": ("isentropic.tasks.data:named", "gsm8k[:path=...]", "grade-school word problems, 7,473 to train on"),
    "math": ("isentropic.tasks.data:named", "math[:path=...]", "competition mathematics; held out is MATH-500"),
    "math500": ("isentropic.tasks.data:named", "math500[:path=...]", "500 problems, to evaluate on"),
    "aime24": ("isentropic.tasks.data:named", "aime24[:path=...]", "30 problems, to evaluate on"),
    "rg": ("isentropic.tasks.gym:load", "rg:GENERATOR[:option=value...]", "any generator of reasoning-gym"),
    "file": (
        "isentropic.tasks.data:from_file",
        "file:PATH.jsonl|.parquet:prompt=COLUMN:answer=COLUMN:verifier=exact|numeric|math",
        "rows of your own",
    ),
    "hub": (
        "isentropic.tasks.data:from_hub",
        "hub:ORG/NAME:prompt=COLUMN:answer=COLUMN:verifier=exact|numeric|math",
        "a data set of the hub",
    ),
    "mix": ("isentropic.tasks.mixture:load", "mix:TASK@WEIGHT+TASK@WEIGHT...", "several tasks by share"),
    "textworld": ("isentropic.tasks.environments.textworld:load", "textworld:GAME[:option=value...]", "text adventures, generated"),
    "textarena": ("isentropic.tasks.environments.textarena:load", "textarena:GAME[:option=value...]", "games for one player"),
    "appworld": (
        "isentropic.tasks.environments.appworld:load",
        "appworld:train=FILE:test=FILE:ports=8000-8007",
        "apps behind a server",
    ),
}
_ALONE = ("gsm8k", "math", "math500", "aime24")  # kinds that are a name without anything after it


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
        normalise: completion, right or wrong -> canonical text of its answer, empty where it gives none. Two right
            answers are distinct when these differ, and equal texts are votes for one answer.
        max_completion_length: tokens that an answer may take, the end-of-sequence token included.
        stop: a completion ends before the first of these, in training and evaluation: what follows is not judged. If
            it is a line break, generation ends there too.
        gold: row -> a right completion; None where none is known. By it the best constant answer is found.

    A prompt is a text, or a conversation in the form of a list of messages, for which the tokenizer needs a chat
    template; all prompts of a task have one form.

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
    stop: str = ""
    gold: Callable[[dict[str, Any]], str] | None = None

    def cut(self, completion: str) -> str:
        """Return a completion up to where it ends.

        Example:
            >>> from isentropic.tasks.expressions import expr
            >>> from dataclasses import replace
            >>> replace(expr, stop="\\n").cut("1+2\\n3")
            '1+2'
        """
        return completion.partition(self.stop)[0] if self.stop else completion

    def asked(self, row: dict[str, Any]) -> Any:
        """Return what makes two rows the same question: the prompt."""
        return row["prompt"]

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
        texts = [self.cut(c if isinstance(c, str) else c[-1]["content"] or "") for c in completions]
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
    """Return the task of a name: of `TASKS`, of one of the `KINDS`, or your own at `package.module:attribute` or
    `file.py:NAME`.

    What needs an extra or a file says so here; rows are read when they are asked for.

    Raises:
        ValueError: there is no such name, option, module or attribute, or what stands there is not a `Task`.

    Example:
        >>> load_task("expr").max_completion_length
        8
    """
    kind, colon, rest = name.partition(":")
    if kind in KINDS and (colon or kind in _ALONE):
        module_name, _, attribute = KINDS[kind][0].partition(":")
        return getattr(importlib.import_module(module_name), attribute)(rest, name)
    if name not in TASKS and not colon:
        known = [*TASKS, *KINDS]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? Or" if near else "use one of these, or"
        raise ValueError(
            f"task must be one of {', '.join(known)}, or 'package.module:attribute', got {name!r}; "
            f"{hint} name a Task of your own, for example 'my_tasks.py:spelling'; see `isentropic tasks`"
        )
    module_name, _, attribute = TASKS.get(name, name).rpartition(":")
    module = _module(name, module_name)
    task = getattr(module, attribute, None)
    if isinstance(task, Task):
        return task
    found = sorted(key for key, value in vars(module).items() if isinstance(value, Task))
    got = "no such attribute" if task is None else f"a {type(task).__name__}"
    near = difflib.get_close_matches(attribute, found, n=1)
    hint = f"did you mean {module_name}:{near[0]}?" if near else "assign an isentropic.tasks.Task to that name"
    raise ValueError(f"task {name!r} must be a Task, got {got}; Tasks in {module_name}: {found or 'none'}; {hint}")


def _module(name: str, where: str) -> ModuleType:
    """The module of a dotted name, or the one that a file holds, which may import its neighbours."""
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"task {name!r} must name a Python file, got {where!r}, and there is no such file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        # An import that fails inside the module is the author's to see; only the module itself is our message.
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"task {name!r} must name an importable module, got {where!r}, and there is no module "
            f"{error.name!r}; install it, or put its directory on PYTHONPATH"
        ) from error
