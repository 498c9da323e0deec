"""Text that a model, a task or a file wrote, made harmless: for the terminal and for the page alike.

A completion may hold escape sequences, which colour a terminal, move its cursor or set its title, and marks that turn
the direction of the text around them. What is printed or shown goes through :func:`visible` first.
"""

from __future__ import annotations

import json
import re
from typing import Any, TextIO

from .record import plain

# Marks that change the direction of the text around them, and the two characters that end a line for some programs.
_MARKS = {0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029}


def visible(text: str) -> str:
    """Text with pictures of the characters that would control a page or a terminal; tab and newline stay.

    Example:
        >>> visible("a\\x1b[31mb\\n"), visible("\\u202eabc")
        ('a␛[31mb\\n', '⟦U+202E⟧abc')
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _picture(c) for c in text)


def one_line(value: Any) -> str:
    """A value as visible text without a line break; nothing for None.

    Example:
        >>> one_line("a\\n\\tb"), one_line(None)
        ('a↵⇥b', '')
    """
    return visible(str(value if value is not None else "")).replace("\n", "↵").replace("\t", "⇥")


def show(text: str, file: TextIO | None = None) -> None:
    """Print visible text at once.

    Args:
        text: of any origin.
        file: stdout if it is None.
    """
    print(visible(text), file=file, flush=True)


def as_json(value: Any) -> str:
    """JSON for a terminal or a pipe: what :func:`visible` would picture is escaped, so that the data stay the same.

    Example:
        >>> print(as_json({"a": "é\\x9b2J"}))
        {
          "a": "é\\u009b2J"
        }
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False)
    return re.sub(r"[^\n -~]", lambda match: match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1], text)


def _picture(char: str) -> str:
    code = ord(char)
    if code < 32 and char not in "\t\n":
        return chr(0x2400 + code)
    if code in _MARKS:
        return f"⟦U+{code:04X}⟧"
    # A lone half of a surrogate pair cannot be written as UTF-8.
    return "\ufffd" if 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 else char


def duration(seconds: float) -> str:
    """Write a duration as hours, minutes and seconds.

    Args:
        seconds: not negative; parts of a second are dropped.

    Returns:
        ``M:SS``, or ``H:MM:SS`` from an hour on.

    Example:
        >>> duration(59), duration(3723)
        ('0:59', '1:02:03')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
