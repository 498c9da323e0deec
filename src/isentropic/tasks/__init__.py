"""Verifiable tasks: prompts, a verifier, and a canonical form by which two right answers are the same answer.

A `Task` is data, so a custom task is one object in one file; `load_task` finds it by its name, as it finds a built-in
task, a generator of reasoning-gym, a data set or a mixture. Importing this package imports no torch and builds nothing.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ..control.names import suggest
from .spec import path_of, short, users_code

TASKS: dict[str, str] = {
    "expr": "isentropic.tasks.expressions:expr",
    "expr-digit": "isentropic.tasks.expressions:expr_digit",
}


class Kind(NamedTuple):
    """Tasks whose name starts with a word and a colon.

    Attributes:
        loader: ``module:function`` that creates the task from the text after the first colon and the whole name.
        form: how such a name is written.
        meaning: in a few words.
    """

    loader: str
    form: str
    meaning: str


KINDS: dict[str, Kind] = {
    "expr": Kind(
        "isentropic.tasks.expressions:load",
        "expr:need=PROPERTY,...[:within=N]|expr:rate=SHARE",
        "harder and easier variants of expr, from a base rate of 0.5 down to 0.002",
    ),
    "gsm8k": Kind("isentropic.tasks.data:named", "gsm8k[:path=...]", "grade-school word problems, 7,473 for training"),
    "math": Kind("isentropic.tasks.data:named", "math[:path=...]", "competition mathematics; held out is MATH-500"),
    "math500": Kind("isentropic.tasks.data:named", "math500[:path=...]", "500 problems, for evaluation"),
    "aime24": Kind("isentropic.tasks.data:named", "aime24[:path=...]", "30 problems, for evaluation"),
    "rg": Kind("isentropic.tasks.gym:load", "rg:GENERATOR[:option=value...]", "any generator of reasoning-gym"),
    "file": Kind(
        "isentropic.tasks.data:from_file",
        "file:PATH.jsonl|.parquet:prompt=COLUMN:answer=COLUMN:verifier=exact|numeric|math",
        "your own rows",
    ),
    "hub": Kind(
        "isentropic.tasks.data:from_hub",
        "hub:ORG/NAME:prompt=COLUMN:answer=COLUMN:verifier=exact|numeric|math",
        "a data set of the hub",
    ),
    "mix": Kind("isentropic.tasks.mixture:load", "mix:TASK@WEIGHT+TASK@WEIGHT...", "a weighted mixture of tasks"),
    "textworld": Kind(
        "isentropic.tasks.environments.textworld:load",
        "textworld:GAME[:option=value...]",
        "text adventures, generated",
    ),
    "textarena": Kind(
        "isentropic.tasks.environments.textarena:load", "textarena:GAME[:option=value...]", "games for one player"
    ),
    "appworld": Kind(
        "isentropic.tasks.environments.appworld:load",
        "appworld:train=FILE:test=FILE:ports=8000-8007",
        "apps behind a server",
    ),
}
MAX_NAME = 4000  # characters
_WITHOUT_OPTIONS = ("gsm8k", "math", "math500", "aime24")  # kinds whose name needs nothing after it


@dataclass(frozen=True)
class Task:
    """A verifiable task: prompts to train on and held-out prompts, and a verifier of answers.

    A row is a dict with `prompt` and the columns that `verify` names, all of them plain values, so that
    `datasets.Dataset.from_list(rows)` is a dataset in TRL's standard format.

    Args:
        name: short and unique; it names runs and metrics.
        description: one sentence for people.
        train: seed -> rows to train on.
        heldout: () -> rows to evaluate on, disjoint from those of every training seed. Any beginning of the list
            should be a fair sample, so that a cheaper evaluation may take the first rows.
        verify: (completion, **columns) -> right or wrong. It gets the columns that it names (`prompt` is one), or all
            of them if it takes `**columns`.
        normalise: completion, right or wrong -> canonical text of its answer, empty if it gives none. Two right
            answers are distinct if these differ, and equal texts are votes for one answer.
        max_completion_length: tokens that an answer may take, the end-of-sequence token included.
        stop: a completion ends before the first of these, in training and evaluation: the text after it is not judged.
            If it is a line break, generation ends there too.
        gold: row -> a right completion; None if none is known. The best constant answer is searched among these.

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
        """Return a completion up to its stop text.

        Example:
            >>> from isentropic.tasks.expressions import expr
            >>> from dataclasses import replace
            >>> replace(expr, stop="\\n").cut("1+2\\n3")
            '1+2'
        """
        return completion.partition(self.stop)[0] if self.stop else completion

    def with_system_prompt(self, text: str | None) -> "Task":
        """Return the task under a system message, which replaces that of its rows; None leaves it as it is.

        Raises:
            ValueError: as its rows are read, if their prompts are texts.

        Example:
            >>> rows = [{"prompt": [{"role": "user", "content": "1+1="}], "sum": "2"}]
            >>> sums = Task("sums", "", lambda seed: rows, lambda: rows, lambda completion: True, str, 2)
            >>> [message["role"] for message in sums.with_system_prompt("Be brief.").heldout()[0]["prompt"]]
            ['system', 'user']
        """
        if text is None:
            return self

        def asked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            if rows and isinstance(rows[0]["prompt"], str):
                raise ValueError(
                    f"task {self.name!r} asks by texts, which have no system message, got system_prompt={text!r}; "
                    "leave it out, or name a task that asks by messages, such as a generator with prompt=chat"
                )
            system = {"role": "system", "content": text}
            return [
                {**row, "prompt": [system, *(m for m in row["prompt"] if m.get("role") != "system")]} for row in rows
            ]

        return replace(self, train=lambda seed: asked(self.train(seed)), heldout=lambda: asked(self.heldout()))

    def question(self, row: dict[str, Any]) -> Any:
        """Return the value by which two rows are the same question: the prompt."""
        return row["prompt"]

    def reward(
        self, completions: Sequence[Any], *, prompts: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        """Return 1.0 for every right completion and 0.0 for the others, in the form of a TRL reward function.

        Args:
            completions: b texts, or b conversations, of which the last message counts.
            prompts: b prompts, passed to `verify` as `prompt` if it names it.
            columns: b values each, for example `target=[73, 12]`. Those that `verify` does not name are ignored: an
                engine also passes its state and its loggers here.

        Raises:
            ValueError: a column that `verify` needs is missing, or does not have b values.
        """
        num = len(completions)
        if prompts is not None:
            columns["prompt"] = prompts
        names = self._columns_for_verify(columns, num)
        wrong = [name for name in names if len(columns[name]) != num]
        if wrong:
            sizes = ", ".join(f"{name} has {len(columns[name])}" for name in wrong)
            raise ValueError(
                f"task {self.name!r}: each column must have one value per completion, "
                f"got {num} completions and {sizes}; repeat the columns as often as the prompts"
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

    A missing extra or file is reported here; rows are read when they are asked for.

    Raises:
        ValueError: there is no such name, option, module or attribute, it is not a `Task`, or its file cannot be run.
            The your own rows task raise it too, as they are asked for, if your function fails or returns anything
            but dicts with a prompt.

    Example:
        >>> load_task("expr").max_completion_length
        8
    """
    if len(name) > MAX_NAME:
        raise ValueError(
            f"the name of a task must have at most {MAX_NAME} characters, got {len(name)}, {short(name)!r}; shorten it"
        )
    kind, colon, rest = name.partition(":")
    if kind in KINDS and (colon or kind in _WITHOUT_OPTIONS):
        module_name, _, attribute = KINDS[kind].loader.partition(":")
        return getattr(importlib.import_module(module_name), attribute)(rest, name)
    if name not in TASKS and not colon:
        from .sequence import SEQUENCES

        if name in SEQUENCES:
            raise ValueError(
                f"task {name!r} is a sequence, which has no prompts of its own; name one of its tasks: "
                f"{', '.join(SEQUENCES[name].tasks)}"
            )
        known = list(dict.fromkeys([*TASKS, *KINDS]))
        raise ValueError(
            f"task must be one of {', '.join(known)}, or 'package.module:attribute', got {short(name)!r}"
            f"{suggest(name, [*known, *SEQUENCES])}; name a Task of your own, for example 'my_tasks.py:spelling', or "
            "see `isentropic tasks`"
        )
    module_name, _, attribute = TASKS.get(name, name).rpartition(":")
    module = _module(name, module_name)
    task = getattr(module, attribute, None)
    if isinstance(task, Task):
        return task if name in TASKS or module_name.startswith("isentropic.") else _own_task(name, task)
    tasks = sorted(key for key, value in vars(module).items() if isinstance(value, Task))
    got = "no such attribute" if task is None else f"a {type(task).__name__}"
    raise ValueError(
        f"task {name!r} must be a Task, got {got}{suggest(attribute, tasks)}; Tasks in {module_name}: "
        f"{tasks or 'none'}; assign an isentropic.tasks.Task to that name"
    )


def _own_task(name: str, task: Task) -> Task:
    """Return a task of the user's, whose rows are checked as they are asked for."""
    from .checks import own_rows

    train, heldout = (partial(own_rows, name, function) for function in (task.train, task.heldout))
    return replace(task, train=train, heldout=heldout)


def _module(name: str, place: str) -> ModuleType:
    """The module of a dotted name, or of a file, which may import modules beside it."""
    if place.endswith(".py"):
        path = path_of(name, place).resolve()
        if not path.is_file():
            raise ValueError(
                f"task {short(name)!r} must name a Python file, got {short(place)!r}, and there is no such file"
            )
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        with users_code(name):
            spec.loader.exec_module(module)
        return module
    if not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"task {short(name)!r} must be FILE.py:NAME or package.module:NAME, got {short(place)!r}")
    try:
        with users_code(name):
            return importlib.import_module(place)
    except ValueError as error:
        missing = error.__cause__
        # An import that fails inside the module is its author's error; our message is about the module itself only.
        if not isinstance(missing, ModuleNotFoundError) or not f"{place}.".startswith(f"{missing.name}."):
            raise
        raise ValueError(
            f"task {short(name)!r} must name an importable module, got {short(place)!r}, and there is no module "
            f"{short(missing.name)!r}; install it, or put its directory on PYTHONPATH"
        ) from missing
