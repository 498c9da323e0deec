"""How a task is named in one line: `kind:what:option=value:...`, its options checked by name. Standard library only."""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

EXTRA = "pip install 'isentropic[tasks]'"


def split(text: str) -> tuple[list[str], dict[str, Any]]:
    """Split at colons: words first, then options; a value is read as JSON where it can be, else as text.

    Args:
        text: what follows the kind.

    Raises:
        ValueError: a word after an option, or an option named twice.

    Example:
        >>> split("chain_sum:max_terms=2:allow_negation=true:prompt=chat")
        (['chain_sum'], {'max_terms': 2, 'allow_negation': True, 'prompt': 'chat'})
    """
    words: list[str] = []
    options: dict[str, Any] = {}
    for part in text.split(":") if text else []:
        name, equals, value = part.partition("=")
        if not equals and options:
            raise ValueError(f"option {part!r} of {text!r} has no value, must be NAME=VALUE; a value holds no colon")
        if not equals:
            words.append(part)
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


def chosen(name: str, options: dict[str, Any], allowed: dict[str, Any]) -> dict[str, Any]:
    """The options over their defaults.

    Args:
        name: of the task, for the message.
        options: as given.
        allowed: defaults by name. A tuple is a choice of texts, the first of them the default; an int or a bool must
            stay one.

    Raises:
        ValueError: an unknown option, or a value that is not allowed.

    Example:
        >>> chosen("gsm8k", {"tokens": 64}, {"prompt": ("chat", "plain"), "tokens": 512})
        {'prompt': 'chat', 'tokens': 64}
    """
    for key in options:
        if key not in allowed:
            near = get_close_matches(key, list(allowed), n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"task {name!r}: unknown option {key!r}{hint}; allowed: {', '.join(allowed)}")
    found: dict[str, Any] = {}
    for key, default in allowed.items():
        value = options.get(key, default[0] if isinstance(default, tuple) else default)
        if isinstance(default, tuple) and value not in default:
            raise ValueError(f"task {name!r}: {key}: got {value!r}, must be one of {', '.join(map(str, default))}")
        if type(default) is int and (type(value) is not int or value < 0):
            raise ValueError(f"task {name!r}: {key}: got {value!r}, must be an integer >= 0")
        if type(default) is bool and type(value) is not bool:
            raise ValueError(f"task {name!r}: {key}: got {value!r}, must be true or false")
        found[key] = str(value) if isinstance(default, str) else value
    return found


def options(name: str, text: str, allowed: dict[str, Any]) -> dict[str, Any]:
    """The options alone, over their defaults, of a task whose words have been read.

    Raises:
        ValueError: as :func:`split` and :func:`chosen`, or a word that is no option.

    Example:
        >>> options("game", "level=3:hard=true", {"level": 1, "hard": False, "text": ("full", "brief")})
        {'level': 3, 'hard': True, 'text': 'full'}
    """
    words, given = split(text)
    if words:
        raise ValueError(f"task {name!r}: got {words[0]!r}, must be OPTION=VALUE; options: {', '.join(allowed)}")
    return chosen(name, given, allowed)


def require(name: str, packages: Sequence[str]) -> None:
    """Refuse a task whose extra is not installed, in one line, without importing it.

    Raises:
        ValueError: a package is missing.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ValueError(f"task {name!r} needs {package}, which is not installed; {EXTRA}")
