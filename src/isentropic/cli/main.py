"""The commands of `isentropic`, and what they return. Nothing heavy is imported before the settings are checked."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .. import __version__
from ..experiments.config import ConfigError
from . import catalogue, compare, evaluate, models, show, train
from .failures import failure
from .parser import PROG, Command, Parser, complain, fail


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog=PROG, description="Steer the entropy of a language model while it is trained by RL.")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    train.add_to(commands)
    evaluate.add_to(commands)
    compare.add_to(commands)
    show.add_to(commands)
    catalogue.add_to(commands)
    models.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns 0; 1 if the result is bad (a serious finding, a failed or a stopped run, a full disk); 2 for a mistake in
    the settings; 130 for Ctrl-C.
    """
    args = vars(build_parser().parse_args(argv))
    command: Command = args.pop("command")
    try:
        return command(args)
    except ConfigError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        refused = failure(error)
        if refused is None:
            raise
        complain(refused.line)
        return refused.code
