"""Names that people write: a wrong one is refused with those that are allowed and the one that is close."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def suggest(word: Any, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` if a known name is close, else nothing.

    Example:
        >>> suggest("clip_hi", ["clip_low", "clip_high"]), suggest("?", ["clip_low"])
        (' (did you mean clip_high?)', '')
    """
    close = get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def choose(what: str, got: Any, allowed: Iterable[str]) -> None:
    """Refuse a name that is not allowed.

    Raises:
        ValueError: names those that are, and the one that is close.

    Example:
        >>> choose("reduction", "tokn", ["token", "sequence"])
        Traceback (most recent call last):
        ...
        ValueError: reduction must be one of sequence, token; got 'tokn' (did you mean token?)
    """
    allowed = list(allowed)
    if got not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(sorted(allowed))}; got {got!r}{suggest(got, allowed)}")
