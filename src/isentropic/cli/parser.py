"""The argument parser: errors in one line with a suggestion, a flag for every setting of a run, lazy heavy imports."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from ..control.names import suggest
from ..experiments.config import FLAGLESS, GROUPS, ConfigError, RunConfig
from ..runs.text import visible

PROG = "isentropic"
# A command: its arguments by name -> exit code.
Command = Callable[[dict[str, Any]], int]


class Parser(argparse.ArgumentParser):
    """Errors in one line on stderr, with a suggestion."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{suggest(unknown[0].split('=')[0], known)}")
        return parsed, unknown


def fail(message: str) -> NoReturn:
    """Print an error in one line and exit with code 2."""
    complain(message)
    raise SystemExit(2)


def complain(message: str) -> None:
    """Print an error in one line."""
    text = re.sub(r"\S{400,}", lambda word: f"{word[0][:100]}...{word[0][-20:]}", " ".join(message.split()))
    print(f"{PROG}: error: {visible(text)}", file=sys.stderr)


def add_command(commands: Any, name: str, command: Command, help: str, description: str | None = None) -> Parser:
    """A subparser whose arguments go to ``command``."""
    parser = commands.add_parser(name, help=help, description=description or help, allow_abbrev=False)
    parser.set_defaults(command=command)
    return parser


def add_settings(parser: Parser, leave_out: tuple[str, ...] = ()) -> None:
    """A flag for every setting of a run, in groups."""
    hints = get_type_hints(RunConfig)
    groups = {name: parser.add_argument_group(title.replace("%", "%%")) for name, title in GROUPS.items()}
    for setting in fields(RunConfig):
        if setting.name in (*FLAGLESS, *leave_out):
            continue
        kind = next(k for k in (*get_args(hints[setting.name]), hints[setting.name]) if k is not type(None))
        choices = f": {', '.join(setting.metadata['choices'])}" if setting.metadata["choices"] else ""
        several = get_origin(hints[setting.name]) is list
        value: Any = setting.default_factory() if callable(setting.default_factory) else setting.default
        shown = ", ".join(map(str, value)) if several else value
        default = "" if shown in (None, "") else f" [{shown}]"
        groups[setting.metadata["group"]].add_argument(
            f"--{setting.name.replace('_', '-')}",
            action="append" if several else "store",
            type=kind,
            default=argparse.SUPPRESS,
            metavar=kind.__name__.upper(),
            help=(setting.metadata["help"] + choices + default).replace("%", "%%"),
        )
    groups["recipe"].add_argument(
        "--set",
        action="append",
        default=argparse.SUPPRESS,
        metavar="recipe.OPTION=VALUE",
        help="another field of the recipe, or a constant of one of its components; may be repeated",
    )


def settings_of(args: dict[str, Any]) -> dict[str, Any]:
    """The settings among the arguments of :func:`add_settings`, those of ``--set`` in ``recipe_options``.

    Raises:
        ConfigError: what ``--set`` cannot set.
    """
    pairs = args.pop("set", [])
    for text in pairs:
        if not re.match(r"recipe\.[^=]+=", text):
            known = text.partition("=")[0].replace("-", "_") in RunConfig.__annotations__
            flag = "; settings of the run have flags of their own" if known else ""
            raise ConfigError(f"--set: got {text!r}, must be recipe.OPTION=VALUE, such as recipe.clip_high=0.3{flag}")
    if not pairs:
        return args
    from ..experiments.grid import settings_from

    return args | settings_from(pairs)


def heavy(module: str) -> Any:
    """Import a module of the package that needs the TRL engine, once the settings have been checked.

    Raises:
        ConfigError: the engine is not installed.
    """
    try:
        return import_module(f"..{module}", __package__)
    except ImportError as error:
        if (error.name or "").startswith("isentropic"):  # a mistake of ours, which a missing extra is not
            raise
        raise ConfigError(f"training needs the TRL engine: {error}; pip install 'isentropic[trl,cli]'") from None
