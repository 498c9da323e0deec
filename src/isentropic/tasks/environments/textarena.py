"""Games of textarena for one player, by name: ``textarena:FrozenLake-v0``.

A row is a seed; training seeds are counted from 0, held-out seeds from 1,000,000. Whether two seeds give two games
depends on the game: some, such as TowerOfHanoi, have one start only, and their held-out rows are those trained on. The
reward is the game's own, between 0 and 1 in most; 1 is a win.

Needs the extra ``textarena``; importing this module does not. textarena downloads word lists when some of its games are
imported; without them those games are refused, and the others work.
"""

import contextlib
import importlib
import importlib.util
import io
import random
from typing import Any

from ..spec import options
from . import EnvironmentTask

OURS: dict[str, Any] = {"train": 64, "test": 40, "turns": 12, "tokens": 2048, "action_tokens": 16}
HELD_OUT_FROM = 1_000_000
PROMPT = "A game. Write one action a line.\n"


def load(rest: str, name: str) -> EnvironmentTask:
    """The task that ``textarena:REST`` names.

    An unknown game, or one for several players, is refused when its rows are asked for.

    Raises:
        ValueError: an unknown option, or textarena is not installed.
    """
    game, _, text = rest.partition(":")
    values = options(name, text, OURS)
    if importlib.util.find_spec("textarena") is None:
        raise ValueError(f"task {name!r} needs textarena, which is not installed; pip install 'isentropic[textarena]'")
    return EnvironmentTask(
        name=name,
        description=f"Win {game}.",
        make=lambda: TextArena(game),
        train=lambda seed: _rows(game, 0, values["train"]),
        heldout=lambda: _rows(game, HELD_OUT_FROM, values["test"]),
        max_turns=values["turns"],
        max_action_tokens=values["action_tokens"],
        max_completion_length=values["tokens"],
    )


def _rows(game: str, first: int, num: int) -> list[dict[str, Any]]:
    """One row per seed, after a check that the game starts."""
    TextArena(game).reset(first)
    return [{"prompt": PROMPT, "seed": first + i} for i in range(num)]


class TextArena:
    """One player of one game; ``reset`` takes a seed.

    textarena draws from Python's global random state. Each player keeps a state of its own and swaps it in during its
    calls, so that simultaneous episodes affect neither one another nor the training.

    Args:
        game: textarena's name of it, such as ``FrozenLake-v0``.

    Raises:
        ValueError: no such game, one that cannot be made here, or one for several players.
    """

    def __init__(self, game: str):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            arena: Any = importlib.import_module("textarena")
            try:
                # The raw one returns new messages only; the others repeat the whole dialogue.
                self._game = arena.make(f"{game}-raw")
            except Exception as error:
                lines = [line.strip() for line in str(error).splitlines() if any(map(str.isalpha, line))]
                reason = lines[0] if lines else type(error).__name__
                raise ValueError(f"textarena game {game!r} cannot be made: {reason}; name another") from None
        self.game = game
        self._random = random.Random(0).getstate()

    @contextlib.contextmanager
    def _random_state(self) -> Any:
        before = random.getstate()
        random.setstate(self._random)
        try:
            yield
        finally:
            self._random = random.getstate()
            random.setstate(before)

    def reset(self, seed: int, **row: Any) -> str:
        """Start the game of a seed."""
        self._random = random.Random(seed).getstate()
        with self._random_state():
            try:
                self._game.reset(num_players=1, seed=seed)
            except (AssertionError, ValueError) as error:
                raise ValueError(f"textarena game {self.game!r} is not for one player: {error}") from None
            return self._new_messages()

    def step(self, action: str) -> tuple[str, float, bool]:
        """Take an action; the first observation explains what an action looks like."""
        with self._random_state():
            done, _ = self._game.step(action)
            observation = self._new_messages()
            reward = self._game.close()[0] if done else None
        return observation, float((reward or {}).get(0, 0.0)), bool(done)

    def _new_messages(self) -> str:
        """The new messages, without the player's own."""
        _, messages = self._game.get_observation()
        return "\n".join(text.strip() for sender, text, _ in messages if sender != 0)
