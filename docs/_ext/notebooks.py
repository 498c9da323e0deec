"""Notebooks as pages: their cells and stored outputs as Markdown. Nothing is executed here."""

import json

from myst_parser.sphinx_ import Parser as MarkdownParser


def _fenced(language, text):
    """A fenced block; its fence is longer than any fence in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _output(output):
    """The richest form of an output that a page can show."""
    if output["output_type"] == "stream":
        return _fenced("text", "".join(output["text"]))
    forms = {kind: "".join(data) for kind, data in output["data"].items()}
    if "image/png" in forms:
        return f"![Figure of the cell above](data:image/png;base64,{forms['image/png'].replace(chr(10), '')})"
    if "text/html" in forms:
        return _fenced("{raw} html", f'<div class="frame">{forms["text/html"]}</div>')
    return _fenced("text", forms["text/plain"])


def markdown(text):
    """The Markdown of a notebook.

    >>> cells = [{"cell_type": "code", "source": ["1 + 1"], "outputs": []}]
    >>> markdown(json.dumps({"cells": cells}))
    '```python\\n1 + 1\\n```'
    """
    blocks = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        blocks.append(_fenced("python", source) if cell["cell_type"] == "code" else source)
        blocks += [_output(output) for output in cell.get("outputs", ())]
    return "\n\n".join(blocks)


class NotebookParser(MarkdownParser):
    """Reads a notebook."""

    supported = ("notebook",)

    def parse(self, inputstring, document):
        super().parse(markdown(inputstring), document)


def setup(app):
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    return {"version": "1", "parallel_read_safe": True}
