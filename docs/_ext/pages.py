"""Small repairs as pages and docstrings are read: a title where a bench wrote a table alone, and plain typography."""

import re


def _table(app, name, source):
    """A table gets a title, and is neither in the sidebar nor in the search: its page links it."""
    if name.startswith("results/") and name.endswith("-table"):
        what = name.removeprefix("results/").removesuffix("-table")
        head = "" if source[0].lstrip().startswith("# ") else f"# Table: {what}\n\n"
        source[0] = f"---\norphan: true\nnosearch: true\n---\n\n{head}{source[0]}"


def _plain(app, what, name, obj, options, lines):
    """Docstrings are read in a terminal first: single backticks are code there, bars and stars are themselves."""
    for i, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...")):
            continue
        parts = re.split(r"(``.*?``|:[\w:]+:`[^`]*`)", line)
        lines[i] = "".join(p if p.endswith("`") else _bare(p) for p in parts)


def _bare(text):
    """Text outside code: single backticks become double; bars are escaped, and double stars that are not bold."""
    special = r"(?<!\\)\||(?<![\\*])\*\*(?=\w)(?!.*\w\*\*)"
    pieces = re.split(r"(`[^`]+`)", text)
    return "".join(f"`{p}`" if p.startswith("`") else re.sub(special, r"\\\g<0>", p) for p in pieces)


def _fields(app, what, name, obj, options, lines):
    """Attributes are listed as parameters are: one entry may name several."""
    lines[:] = ["Fields:" if line.strip() == "Attributes:" else line for line in lines]


def _skip(app, what, name, obj, skip, options):
    """The fields of a NamedTuple stand in its docstring; Python's own text for them says nothing."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _short(app, what, name, obj, options, signature, returns):
    """A config that derives from an engine's has a hundred fields of the engine's; they are documented there."""
    if what == "class" and signature and signature.count(",") > 60:
        return "(**settings)", returns
    return None


def setup(app):
    app.connect("autodoc-process-docstring", _fields, priority=100)
    app.connect("autodoc-process-signature", _short)
    app.connect("autodoc-skip-member", _skip)
    app.connect("source-read", _table)
    app.connect("autodoc-process-docstring", _plain, priority=200)
    return {"version": "1", "parallel_read_safe": True}
