"""Run a notebook's cells in order, in one namespace, and keep what they show: as Jupyter does, without a kernel.

python tests/helpers/notebook.py FILE.ipynb           run it in this directory; exits 1 at the first error
python tests/helpers/notebook.py --write FILE.ipynb   the same, and write the outputs into the file
"""

import ast
import base64
import contextlib
import io
import json
import sys
import traceback
from pathlib import Path

DPI = 60  # of pictures, so that a notebook stays small


def outputs(source, names):
    """Run a cell; returns its outputs in the form of nbformat 4."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    text, value = io.StringIO(), None
    with contextlib.redirect_stdout(text):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    shown = [{"output_type": "stream", "name": "stdout", "text": _lines(text.getvalue())}] if text.getvalue() else []
    return shown if value is None else [*shown, {"output_type": "display_data", "metadata": {}, "data": _bundle(value)}]


def _bundle(value):
    """A value in the forms that a page can show."""
    bundle = {"text/plain": _lines(repr(value))}
    if hasattr(value, "_repr_html_") and (page := value._repr_html_()):
        bundle["text/html"] = _lines(page)
    if type(value).__module__ == "matplotlib.figure":
        picture = io.BytesIO()
        value.savefig(picture, format="png", dpi=DPI)
        bundle["image/png"] = base64.b64encode(picture.getvalue()).decode()
    return bundle


def _lines(text):
    return text.splitlines(keepends=True)


def run(path, write=False):
    """Run a notebook's code cells; returns the notebook with their outputs.

    Args:
        path: of the notebook; its cells run in the working directory.
        write: write the outputs into the file.
    """
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    names = {"__name__": "__main__"}
    for number, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), start=1):
        try:
            cell["outputs"] = outputs("".join(cell["source"]), names)
        except BaseException as error:
            error.add_note(f"in cell {number} of {path}:\n{''.join(cell['source'])}")
            raise
        cell["execution_count"] = number
    if write:
        Path(path).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return notebook


if __name__ == "__main__":
    files = [word for word in sys.argv[1:] if word != "--write"]
    try:
        for file in files:
            run(file, write="--write" in sys.argv)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
