"""Interactive environments: text in, text out, many turns, one reward at the end.

An environment is any object with two methods::

    class Guess:
        def reset(self, low, high, number, **row):
            self.number = number
            return f"Guess a number from {low} to {high}."

        def step(self, action):
            right = action == str(self.number)
            return ("right" if right else "wrong"), float(right), right

``reset`` gets the columns of the task's row by name (use ``**row``: all of them are passed) and returns the first
observation. ``step`` gets one line, the policy's text up to the line break, and returns (observation, reward, done).
Rewards of an episode are summed; an episode ends early, with its rewards so far, if the policy runs out of turns or
tokens. The samples of a group are comparable if the environment is deterministic given its row. One object plays many
episodes, one after the other, and several objects exist at once: keep state in the object, not in the module.

For supervised warm-up an environment may have two more methods: ``advice()``, the next action of an expert in the
current state of the episode, and ``choices()``, a list of actions that are possible now.

An `EnvironmentTask` is a `Task` with a factory of such objects. It is loaded by name like every task:
``textworld:coin_collector:level=104``, ``textarena:FrozenLake-v0``, or ``package.module:attribute`` of your own.

The policy reads the row's prompt, the first observation and ``>``; then its own line, the next observation and ``>``,
and so on. Importing this package imports no torch.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .. import Task

MARK = ">"


class Environment(Protocol):
    """An environment; see the module's docstring."""

    def reset(self, *args: Any, **row: Any) -> str:
        """Start an episode from the row's columns, by name; return the first observation."""
        ...

    def step(self, action: str) -> tuple[str, float, bool]:
        """Take an action, one line of text; return (observation, reward, done)."""
        ...


def _won(completion: str, episode_return: float) -> bool:
    return episode_return >= 1.0


def _actions(text: str) -> str:
    """Two won episodes are distinct if their actions differ."""
    return " ".join(text.lower().split())


@dataclass(frozen=True, kw_only=True)
class EnvironmentTask(Task):
    """A task that is played, not answered; see the module's docstring for the environment itself.

    Args:
        make: () -> a new :class:`Environment`; one is created for each episode that is played at once.
        max_turns: actions that an episode may take.
        max_action_tokens: tokens of one action, its line break included; a longer one is cut.
        max_completion_length: tokens of an episode after the first observation, actions and observations together.
        win_at: an episode is won if its rewards sum to at least this.
        parallel: episodes played at once at most; None for all of a batch. An environment behind a server has few.
        words: () -> words that may occur in observations, for a word-level vocabulary; None to collect them from
            demonstrations.
        verify, normalise: as for every task; the defaults read the return of the episode, and compare its actions.

    Example:
        >>> class Echo:
        ...     def reset(self, word, **row):
        ...         self.word = word
        ...         return f"say {word}"
        ...
        ...     def step(self, action):
        ...         return "", float(action == self.word), True
        >>> echo = EnvironmentTask(
        ...     name="echo",
        ...     description="Repeat the word.",
        ...     make=Echo,
        ...     train=lambda seed: [{"prompt": "A game. ", "word": "a"}],
        ...     heldout=lambda: [{"prompt": "A game. ", "word": "b"}],
        ...     max_turns=1,
        ...     max_action_tokens=4,
        ...     max_completion_length=4,
        ... )
        >>> echo.opening("A game. ", "say a"), echo.reply("say it again")
        ('A game. say a\\n>', 'say it again\\n>')
        >>> echo.reward(["a", "c"], episode_return=[1.0, 0.0])
        [1.0, 0.0]
    """

    make: Callable[[], Environment]
    max_turns: int
    max_action_tokens: int
    max_completion_length: int
    win_at: float = 1.0
    parallel: int | None = None
    words: Callable[[], Iterable[str]] | None = None
    verify: Callable[..., bool] = _won
    normalise: Callable[[str], str] = _actions

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_action_tokens", "max_completion_length", "parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"task {self.name!r}: {name} must be at least 1, got {value}")
        if self.max_action_tokens > self.max_completion_length:
            raise ValueError(
                f"task {self.name!r}: max_action_tokens must be <= max_completion_length, got "
                f"{self.max_action_tokens} > {self.max_completion_length}; an episode needs at least one action"
            )

    def reward(
        self, completions: Sequence[Any], *, prompts: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        """Return the returns of the episodes, which the rollout passes as a column.

        Raises:
            ValueError: there is no column ``episode_return``.
        """
        returns = columns.get("episode_return")
        if returns is None or len(returns) != len(completions):
            raise ValueError(
                f"task {self.name!r} is played, and its reward is the column episode_return, got {sorted(columns)}; "
                "train it by `isentropic train`, or give the trainer a rollout_func"
            )
        return [float(x) for x in returns]

    def question(self, row: dict[str, Any]) -> str:
        """Return the value by which two rows are the same episode: all of their columns."""
        return json.dumps(row, sort_keys=True, default=str)

    def opening(self, prompt: str, observation: str) -> str:
        """The text that the policy reads before its first action."""
        return f"{prompt}{observation}\n{MARK}"

    def reply(self, observation: str) -> str:
        """The text that the policy reads after an action."""
        return f"{observation}\n{MARK}"


def demonstrate(
    task: EnvironmentTask, row: dict[str, Any], environment: Any = None, noise: float = 0.0, seed: int = 0
) -> tuple[list[tuple[str, bool]], float]:
    """Play a row by its environment's own advice.

    Args:
        task: the task.
        row: its row.
        environment: one to reuse; None creates one.
        noise: share of actions in [0, 1] that are drawn from ``choices()`` in place of the advice.
        seed: of the noise.

    Returns:
        The episode as texts, each with whether the policy should write it, and the sum of its rewards.

    Raises:
        ValueError: the environment gives no advice.

    Example:
        >>> class Door:
        ...     def reset(self, **row):
        ...         return "A door."
        ...
        ...     def step(self, action):
        ...         return "It opens.", 1.0, True
        ...
        ...     def advice(self):
        ...         return "open door"
        >>> door = EnvironmentTask(
        ...     name="door", description="", make=Door, train=lambda seed: [], heldout=lambda: [], max_turns=2,
        ...     max_action_tokens=4, max_completion_length=8,
        ... )
        >>> demonstrate(door, {"prompt": ""})
        ([('A door.\\n>', False), ('open door\\n', True)], 1.0)
    """
    played: Any = task.make() if environment is None else environment
    if not hasattr(played, "advice"):
        raise ValueError(
            f"task {task.name!r} cannot demonstrate how to win; give its environment a method advice(), or start from "
            "a model that wins now and then"
        )
    draw = random.Random(f"{seed}/{sorted((k, str(v)) for k, v in row.items())}")
    texts, total = [(task.opening(row["prompt"], played.reset(**row)), False)], 0.0
    for turn in range(task.max_turns):
        action = draw.choice(played.choices()) if draw.random() < noise else played.advice()
        observation, reward, done = played.step(action)
        total += reward
        texts.append((f"{action}\n", True))
        if done or turn + 1 == task.max_turns:
            break
        texts.append((task.reply(observation), False))
    return texts, total
