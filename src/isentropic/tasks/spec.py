"""Names of tasks, `kind:word:option=value:...`: parsed, and their options checked by name. Standard library only."""

import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..control.names import suggest

EXTRA = "pip install 'isentropic[tasks]'"


def split(text: str) -> tuple[list[str], dict[str, Any]]:
    """Split at colons: words first, then options; a value is read as JSON if it is JSON, and as text otherwise.

    Args:
        text: after the kind and its colon.

    Raises:
        ValueError: a word after an option, or an option named twice.

    Example:
        >>> split("chain_sum:max_terms=2:allow_negation=true:prompt=chat")
        (['chain_sum'], {'max_terms': 2, 'allow_negation': True, 'prompt': 'chat'})
    """
    words: list[str] = []
    options: dict[str, Any] = {}
    for word in text.split(":") if text else []:
        name, equals, value = word.partition("=")
        if not equals and options:
            raise ValueError(
                f"option {word!r} of {text!r} has no value, must be NAME=VALUE; a value cannot contain a colon"
            )
        if not equals:
            words.append(word)
            continue
        if name in options:
            raise ValueError(f"option {name!r} of {text!r} is set twice; leave one out")
        options[name] = _value(value)
    return words, options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except ValueError:
        return text


def resolve(name: str, options: dict[str, Any], allowed: dict[str, Any]) -> dict[str, Any]:
    """The options, checked, with defaults for those that are missing.

    Args:
        name: of the task, for the message.
        options: as the user wrote them.
        allowed: defaults by name. A tuple is a choice of texts, the first of them the default; an option with an int
            or a bool for a default must be one.

    Raises:
        ValueError: an unknown option, or a value that is not allowed.

    Example:
        >>> resolve("gsm8k", {"tokens": 64}, {"prompt": ("chat", "plain"), "tokens": 512})
        {'prompt': 'chat', 'tokens': 64}
    """
    for key in options:
        if key not in allowed:
            raise ValueError(
                f"task {name!r}: unknown option {key!r}{suggest(key, allowed)}; allowed: {', '.join(allowed)}"
            )
    resolved: dict[str, Any] = {}
    for key, default in allowed.items():
        value = options.get(key, default[0] if isinstance(default, tuple) else default)
        if isinstance(default, tuple) and value not in default:
            raise ValueError(f"task {name!r}: {key}: got {value!r}, must be one of {', '.join(map(str, default))}")
        if type(default) is int and (type(value) is not int or value < 0):
            raise ValueError(f"task {name!r}: {key}: got {value!r}, must be an integer >= 0")
        if type(default) is bool and type(value) is not bool:
            raise ValueError(f"task {name!r}: {key}: got {value!r}, must be true or false")
        resolved[key] = str(value) if isinstance(default, str) else value
    return resolved


def options(name: str, text: str, allowed: dict[str, Any]) -> dict[str, Any]:
    """The options of a text that has no words, checked, with defaults for those that are missing.

    Raises:
        ValueError: as :func:`split` and :func:`resolve`, or a word that is not an option.

    Example:
        >>> options("game", "level=3:hard=true", {"level": 1, "hard": False, "text": ("full", "brief")})
        {'level': 3, 'hard': True, 'text': 'full'}
    """
    words, values = split(text)
    if words:
        raise ValueError(f"task {name!r}: got {words[0]!r}, must be OPTION=VALUE; options: {', '.join(allowed)}")
    return resolve(name, values, allowed)


def path_of(name: str, text: Any) -> Path:
    """Return the path that a text names, which need not exist, with `~` read as the home directory.

    Raises:
        ValueError: the system can have no such path, for example because a part of it is too long.

    Example:
        >>> path_of("file", "rows.jsonl").suffix
        '.jsonl'
    """
    try:
        path = Path(str(text)).expanduser()
        # `is_file` raises for a name that is too long, and not for one that does not exist.
        path.is_file()
        str(path).encode()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"task {short(name)!r}: got the path {short(text)!r}: {reason}; name another file") from None
    return path


def short(text: Any, length: int = 80) -> str:
    """Return a text for a message: cut if it is long.

    Example:
        >>> short("a" * 100, 9), short("abc")
        ('aaaaaa...', 'abc')
    """
    return str(text) if len(str(text)) <= length else f"{str(text)[: length - 3]}..."


def require(name: str, packages: Sequence[str]) -> None:
    """Refuse a task whose extra is not installed, in one line, without importing it.

    Raises:
        ValueError: a package is missing.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ValueError(f"task {name!r} needs {package}, which is not installed; {EXTRA}")


@contextmanager
def users_code(name: str) -> Iterator[None]:
    """Run code that a user wrote: an error in it is reported in one line, with the file and the line that raised it.

    Raises:
        ValueError: anything was raised, `SystemExit` included; its cause is what was raised.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        message = one_line(error)
        if isinstance(error, SyntaxError):
            place = f"{error.filename}, line {error.lineno}"
            message = error.msg
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{frame.filename}, line {frame.lineno}"
        raise ValueError(
            f"task {short(name)!r} cannot be loaded: {type(error).__name__}: {message} ({place}); correct that file"
        ) from error


def one_line(error: BaseException, length: int = 200) -> str:
    """Return the message of an error, or else its type, in one line.

    Example:
        >>> one_line(ValueError("a\\n  b")), one_line(KeyError())
        ('a b', 'KeyError')
    """
    return short(" ".join(str(error).split()), length) or type(error).__name__
