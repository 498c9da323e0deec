"""Small repairs while Markdown is read: a table that a bench wrote by itself has no title, and gets one here."""

import re


def _title(app, name, source):
    if name.startswith("results/") and not source[0].lstrip().startswith("# "):
        what = name.removeprefix("results/").removesuffix("-table")
        source[0] = f"# Table: {what}\n\n{source[0]}"


def _plain(app, what, name, obj, options, lines):
    """Docstrings are read in a terminal first: single backticks are code there, bars and stars are themselves."""
    for i, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...")):
            continue
        line = re.sub(r"(?<![`:\\])`([^`<>]+)`(?![`_])", r"``\1``", line)
        parts = re.split(r"(``.*?``)", line)
        bare = [p if p.startswith("``") else re.sub(r"(?<!\\)\||(?<![\\*])\*\*(?=\w)", r"\\\g<0>", p) for p in parts]
        lines[i] = "".join(bare)


def setup(app):
    app.connect("source-read", _title)
    app.connect("autodoc-process-docstring", _plain)
    return {"version": "1", "parallel_read_safe": True}
