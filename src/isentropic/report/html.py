"""HTML in which everything is escaped unless it is markup already."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from ..runs.text import visible


class Html(str):
    """Text that is markup; any other string is escaped when it becomes part of an element."""

    __slots__ = ()


VOID = {"meta", "input", "br"}


def el(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element; strings are escaped, lists flattened, None left out.

    Args:
        name: the tag.
        children: :class:`Html`, anything that ``str`` turns into text, None, or lists of these.
        attributes: values are escaped; True gives the name alone, None and False are left out. ``class_`` is ``class``
            and ``data_run`` is ``data-run``.

    Example:
        >>> el("p", "1 < 2 ", el("b", "&"), class_="note", hidden=True, title=None)
        '<p class="note" hidden>1 &lt; 2 <b>&amp;</b></p>'
    """
    tag = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            tag.append(key)
        elif value is not None and value is not False:
            tag.append(f'{key}="{escape(visible(str(value)))}"')
    start = f"<{' '.join(tag)}>"
    return Html(start) if name in VOID else Html(f"{start}{join(children)}</{name}>")


def join(children: Any) -> Html:
    """Children side by side, escaped unless they are markup.

    Example:
        >>> join(["<b>", Html("<br>"), None, 3])
        '&lt;b&gt;<br>3'
    """
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, list | tuple):
        return Html("".join(join(child) for child in children))
    return Html(escape(visible(str(children))))


def data(value: Any) -> Html:
    """JSON for a script element that holds data: nothing in it can end the element.

    Example:
        >>> data({"a": "</script>"})
        '{"a":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 is escaped too
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def table(head: list[Any], rows: list[list[Any]], **attributes: Any) -> Html:
    """A table that scrolls sideways if it is too wide; on a phone one of class ``cards`` becomes a list.

    Args:
        head: one cell per column.
        rows: as many cells each; numbers are written by :func:`number`.
        attributes: of the table element, as :func:`el` takes them.
    """
    return el(
        "div",
        el(
            "table",
            el("thead", el("tr", [el("th", cell, scope="col") for cell in head])),
            el("tbody", [el("tr", [_cell(*pair) for pair in zip(head, row, strict=True)]) for row in rows]),
            **attributes,
        ),
        class_="scroll",
        tabindex="0",
    )


def _cell(name: Any, value: Any) -> Html:
    content = number(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    return el("td", content, data_name=None if isinstance(name, Html) else name)


def number(value: float | None, digits: int = 3) -> str:
    """A number as a person reads it.

    Example:
        >>> number(0.7934), number(95.07), number(387.2), number(-1234567), number(0.0000123), number(None)
        ('0.793', '95.1', '387', '−1,234,567', '1.23e−05', '–')
    """
    return "–" if value is None else _digits(value, digits).replace("-", "−")


def _digits(value: float, digits: int) -> str:
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    if 100 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if 10 <= abs(value) < 100:
        return f"{value:.{max(digits - 2, 0)}f}"
    return f"{value:.{digits}f}" if 0.1 <= abs(value) < 10 else f"{value:.{digits}g}"
