"""TextWorld games by name: ``textworld:coin_collector:level=104``, generated on this machine.

A game is generated from a seed once and kept in the cache. Training games are seeds from 0, held-out games seeds from
1,000,000. Two seeds may give the same game: games are identified by a hash of their map (connections of rooms, and
objects in them) and their walkthrough, independent of the rooms' names. No held-out game has the hash of a training
game, and no hash occurs twice; a seed whose game is not new is skipped. Different maps may share a walkthrough: at low
levels there are few.

Needs the extra ``textworld``; importing this module does not. The reward is 1 if the game is won.
"""

import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...runs.text import duration
from ..spec import options
from . import EnvironmentTask

# Options of a game's own, with their defaults; the names are TextWorld's.
GAMES: dict[str, dict[str, Any]] = {
    "coin_collector": {"level": 1},
    "treasure_hunter": {"level": 1},
    "simple": {"rewards": "sparse", "goal": "brief", "test": False},
    "cooking": {
        "recipe": 1,
        "take": 0,
        "go": 1,
        "open": False,
        "cook": False,
        "cut": False,
        "drop": False,
        "recipe_seed": 0,
        "split": "",
    },
}
# Our own options: number of games, limits of an episode, form of observations.
OURS: dict[str, Any] = {
    "train": 40,
    "test": 40,
    "turns": 20,
    "text": ("full", "brief"),
    "commands": 20,
    "tokens": 1024,
    "action_tokens": 12,
}
HELD_OUT_FROM = 1_000_000
PROMPT = "A text game. Write one command a line.\n"
# Increment it when the game of a name and a seed changes.
VERSION = 1


def load(rest: str, name: str) -> EnvironmentTask:
    """The task that ``textworld:REST`` names; games are generated when its rows are asked for.

    Raises:
        ValueError: no such game or option, or TextWorld is not installed.

    Example:
        >>> load("coin_collector:level=300000", "textworld:coin_collector:level=300000")
        Traceback (most recent call last):
            ...
        ValueError: task 'textworld:coin_collector:level=300000': level must be from 1 to 300, got 300000
    """
    game, _, text = rest.partition(":")
    if game not in GAMES:
        raise ValueError(f"task {name!r}: game must be one of {', '.join(GAMES)}, got {game!r}")
    values = options(name, text, GAMES[game] | OURS)
    top = {"coin_collector": 300, "treasure_hunter": 30}.get(game)
    if top and not 1 <= values["level"] <= top:
        raise ValueError(f"task {name!r}: level must be from 1 to {top}, got {values['level']}")
    for key in ("train", "test", "commands"):
        if values[key] < 1:
            raise ValueError(f"task {name!r}: {key} must be at least 1, got {values[key]}")
    if importlib.util.find_spec("textworld") is None:
        raise ValueError(f"task {name!r} needs TextWorld, which is not installed; pip install 'isentropic[textworld]'")
    store = Games(game, {key: values[key] for key in GAMES[game]})
    brief, commands = values["text"] == "brief", values["commands"]
    return EnvironmentTask(
        name=name,
        description=f"Win a TextWorld game of {game}.",
        make=lambda: TextWorld(brief=brief, commands=commands),
        train=lambda seed: store.rows("train", values["train"], values["test"]),
        heldout=lambda: store.rows("test", values["train"], values["test"]),
        max_turns=values["turns"],
        max_action_tokens=values["action_tokens"],
        max_completion_length=values["tokens"],
        words=words,
    )


@dataclass
class Games:
    """The games of one setting in the cache, generated as they are asked for.

    Attributes:
        game, settings: the generator, and its options.
        root: directory of the games of all settings; by default `textworld` in `$ISENTROPIC_CACHE`,
            `$XDG_CACHE_HOME/isentropic`, or `~/.cache/isentropic`.
    """

    game: str
    settings: dict[str, Any]
    root: Path | None = None
    _known: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """The directory of the games of this setting."""
        cache = os.environ.get("ISENTROPIC_CACHE")
        base = Path(cache or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/isentropic").expanduser()
        text = json.dumps([VERSION, self.game, self.settings], sort_keys=True)
        return (self.root or base / "textworld") / f"{self.game}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def rows(self, split: str, num_train: int, num_test: int) -> list[dict[str, Any]]:
        """Rows of ``train`` or ``test``: prompt, file of the game, seed.

        Held-out games are chosen first, so that they do not depend on the number of training games.

        Raises:
            ValueError: the setting has fewer different games than are asked for.
        """
        test = self._take(HELD_OUT_FROM, num_test, set())
        chosen = test if split == "test" else self._take(0, num_train, {g["hash"] for g in test})
        return [{"prompt": PROMPT, "game": str(self.home / f"{g['seed']}.z8"), "seed": g["seed"]} for g in chosen]

    def _take(self, first: int, num: int, taken: set[str]) -> list[dict[str, Any]]:
        """The games of the first ``num`` seeds, from ``first``, whose games are new."""
        games, taken, seed = [], set(taken), first
        started = last = time.monotonic()
        while len(games) < num:
            if seed - first >= 20 * num + 100:
                raise ValueError(
                    f"{self.game} with {self.settings}: only {len(games)} of {num} different games in "
                    f"{seed - first} seeds; ask for fewer, or for a higher level"
                )
            game = self._game(seed)
            if game["hash"] not in taken:
                taken.add(game["hash"])
                games.append(game)
            seed += 1
            if time.monotonic() - last > 10:
                last = time.monotonic()
                print(f"textworld: {len(games)} of {num} games, {duration(last - started)}", file=sys.stderr)
        return games

    def _game(self, seed: int) -> dict[str, Any]:
        """The facts of a game, which is generated once and then read from its file."""
        if seed not in self._known:
            path = self.home / f"{seed}.facts.json"
            if not path.is_file():
                self._generate(seed, path)
            self._known[seed] = json.loads(path.read_text(encoding="utf-8"))
        return self._known[seed]

    def _generate(self, seed: int, path: Path) -> None:
        """Write the game in a scratch directory, then move it; the facts are moved last, and mark it as complete."""
        from textworld import GameOptions
        from textworld.challenges import CHALLENGES
        from textworld.generator import compile_game

        options = GameOptions()
        options.seeds = seed
        options.file_ext = ".z8"
        # The objective names the goal; with the whole path in it there would be nothing to explore.
        options.grammar.only_last_action = True
        settings = {**self.settings, **({"split": None} if self.settings.get("split") == "" else {})}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generated = CHALLENGES[f"tw-{self.game}"][1](settings, options)
        self.home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.home, prefix=".making-") as scratch:
            options.path = f"{scratch}/{seed}.z8"
            compile_game(generated, options)
            player = _start(options.path)
            walkthrough = list(player.reset().policy_commands)
            player.close()
            facts = {"seed": seed, "hash": content_hash(generated, walkthrough), "walkthrough": walkthrough}
            Path(scratch, path.name).write_text(json.dumps(facts), encoding="utf-8")
            for suffix in (".json", ".z8", ".facts.json"):
                Path(scratch, f"{seed}{suffix}").replace(self.home / f"{seed}{suffix}")


def _start(path: str) -> Any:
    """A game that reports the fields from which observations are composed."""
    import textworld

    names = "feedback description objective admissible_commands policy_commands won"
    with warnings.catch_warnings():
        # The interpreter warns about a game that it does not know; TextWorld provides the fields itself.
        warnings.simplefilter("ignore")
        return textworld.start(path, textworld.EnvInfos(**dict.fromkeys(names.split(), True)))


def content_hash(game: Any, walkthrough: list[str]) -> str:
    """A hash of a game's map, objects and walkthrough, independent of the rooms' names."""
    facts = sorted(str(fact) for fact in game.world.facts)
    return hashlib.sha256(json.dumps([facts, walkthrough]).encode()).hexdigest()[:16]


class TextWorld:
    """One player of TextWorld games; ``reset`` takes the file of a game.

    An observation ends with the commands that the game accepts, a list of limited length. Any other command is refused
    without reaching the game: a game also knows `quit`, `restart` and `save`, which are not moves.

    Args:
        brief: give the room's name instead of its description.
        commands: commands that are listed at most.
    """

    def __init__(self, brief: bool = False, commands: int = 20):
        self.brief, self.commands = brief, commands
        self._file: str | None = None
        self._game: Any = None
        self._possible: list[str] = []
        self._walkthrough: list[str] = []

    def reset(self, game: str, **row: Any) -> str:
        """Start the game in the file ``game``."""
        if game != self._file:
            self.close()
            self._game, self._file = _start(game), game
        state = self._observed(self._game.reset())
        return f"{tidy(state.objective)}\n{self._shown(state.description)}"

    def step(self, action: str) -> tuple[str, float, bool]:
        """Take an action: one command."""
        wanted = " ".join(action.lower().split())
        command = next((c for c in self._possible if c.lower() == wanted), None)
        if command is None:
            return f"You can't do that.\n{self._listed()}", 0.0, False
        state, _, done = self._game.step(command)
        self._observed(state)
        return self._shown(state.feedback), float(bool(state.won)), bool(done)

    def advice(self) -> str:
        """The first command of a walkthrough from here; `look` in a game that cannot be won any more."""
        return self._walkthrough[0] if self._walkthrough else "look"

    def choices(self) -> list[str]:
        """The commands that the game accepts."""
        return self._possible

    def _observed(self, state: Any) -> Any:
        self._possible, self._walkthrough = state.admissible_commands, state.policy_commands or []
        return state

    def close(self) -> None:
        """Close the game."""
        if self._game is not None:
            self._game.close()
            self._game = self._file = None

    def _shown(self, text: str) -> str:
        text = tidy(text)
        room = re.search(r"-= (.*?) =-", text) if self.brief else None
        return f"{room[1] if room else text}\n{self._listed()}"

    def _listed(self) -> str:
        more = len(self._possible) - self.commands
        shown = ", ".join(self._possible[: self.commands])
        return f"Commands: {shown}" + (f" and {more} more" if more > 0 else "")


def tidy(text: str) -> str:
    """The text of the game alone: no prompt, no status line, no blank lines.

    Example:
        >>> tidy("-= Attic =-\\n\\n  You are in an attic.\\n\\n>        -= Attic =-0/1")
        '-= Attic =-\\nYou are in an attic.'
    """
    body = re.split(r"^>", text or "", maxsplit=1, flags=re.MULTILINE)[0]
    lines = (" ".join(line.split()) for line in body.splitlines())
    return "\n".join(line for line in lines if line)


def words() -> set[str]:
    """All words of TextWorld's grammars and rules: the vocabulary of its games is closed."""
    import textworld

    home = Path(str(textworld.__file__)).parent
    files = [*home.glob("**/*.twg"), *home.glob("**/*.twl")]
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    return set(re.findall(r"[a-z][a-z'\-]*", text.lower()))
