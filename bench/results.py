"""How the scripts of this folder read and write results: data, tables, figures, and the line below them.

Data is JSON or JSON lines in docs/results; a name that ends in ``.gz`` is compressed, to the same bytes for the same
value. ``RESULTS=DIR python bench/NAME.py`` reads and writes another directory: a trial run changes no committed file.
"""

import gzip
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("RESULTS", ROOT / "docs" / "results")).resolve()
# For ``os.environ |= ONE_THREAD`` before numpy or torch is imported, and for the processes that a script starts.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _bytes(text, name):
    return gzip.compress(text.encode(), mtime=0) if str(name).endswith(".gz") else text.encode()


def _text(name):
    content = (RESULTS / name).read_bytes()
    return (gzip.decompress(content) if str(name).endswith(".gz") else content).decode()


def _line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def exists(name):
    return (RESULTS / name).exists()


def load(name):
    """The value of a JSON file."""
    return json.loads(_text(name))


def rows(name):
    """The rows of a file of JSON lines; none if it is missing."""
    return [json.loads(line) for line in _text(name).split("\n") if line] if exists(name) else []


def save(name, value):
    """Write a value as JSON, rows as JSON lines, a text as it is, by the name's ending; the whole file or none."""
    kinds = {".jsonl": lambda value: "".join(map(_line, value)), ".json": _line}
    text = kinds.get(Path(str(name).removesuffix(".gz")).suffix, str)(value)
    path = RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(_bytes(text, name))
    draft.replace(path)


def append(name, row):
    """Add a row to a file of JSON lines."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / name).open("ab") as file:
        file.write(_bytes(_line(row), name))


def versions(*packages):
    """Versions of these packages, and of Python if it is named."""
    return {name: platform.python_version() if name == "python" else version(name) for name in packages}


def made(packages, *facts, threads="one thread"):
    """Date, machine, versions and other facts: the line under a table.

    Args:
        packages: versions by name, or such a text.
        facts: more of what a reader needs: seeds, rounds, seconds.
        threads: how many, of a run or a process.
    """
    if not isinstance(packages, str):
        packages = ", ".join(f"{name} {number}" for name, number in packages.items())
    return "; ".join(
        [date.today().isoformat(), f"{platform.machine()}, {os.cpu_count()} cores, {threads}", packages, *facts]
    )


def table(head, rows, right=0):
    """A Markdown table from texts.

    Args:
        head: of the columns.
        rows: a sequence of cells each.
        right: how many of the last columns are aligned to the right.
    """
    rule = "|---" * (len(head) - right) + "|---:" * right + "|"
    head, *lines = (f"| {' | '.join(row)} |" for row in [head, *rows])
    return "\n".join([head, rule, *lines])


def pyplot(size=9):
    """matplotlib.pyplot in the style of all figures."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    spines = {"axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams |= {"svg.hashsalt": "isentropic", "font.size": size, **spines}
    return plt


def save_figure(figure, name):
    """Write a figure as a light SVG, to the same bytes for the same figure."""
    figure.tight_layout()
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    save(name, thin(file.getvalue()))


def thin(svg):
    """matplotlib's SVG in half the bytes: coordinates to 0.1 points, short ids, one style for marks that share it."""

    def rounded(text, digits=1):
        return re.sub(r"-?\d+\.\d+(?:e-?\d+)?", lambda m: f"{round(float(m[0]), digits) or 0.0:.12g}", text)

    def path(m):
        # A path with an id is the shape of a mark or a letter, which is small.
        line = re.sub(r"\s*([A-Za-z])\s*", r"\1", m[2]).strip()
        return f'<path {m[1]}d="{rounded(line, 2 if m[1] else 1)}"'

    def group(m):
        styles = set(re.findall(r' style="[^"]*"', m[2]))
        if len(styles) != 1 or m[2].count(" style=") != m[2].count("<use"):
            return m[0]
        (style,) = styles
        inherited = not re.search(r"[\" ;]opacity", style)
        return f"<g{m[1]}{style}>{m[2].replace(style, '')}</g>" if inherited else m[0]

    svg = re.sub(r'<!--.*?-->|<metadata>.*?</metadata>|(?<=<g) id="[^"]*"', "", svg, flags=re.DOTALL)
    svg = re.sub(r'<path ((?:id="[^"]*" )?)d="([^"]*)"', path, svg)
    svg = re.sub(r'\b(?:[xy]|width|height)="[\d.-]+"|translate\([^)]*\)', lambda m: rounded(m[0]), svg)
    svg = re.sub(r'<g((?: clip-path="[^"]*")?)>((?:\s*<use [^>]*/>)+)\s*</g>', group, svg)
    ids = {name: f"i{n}" for n, name in enumerate(re.findall(r' id="([^"]*)"', svg))}
    svg = re.sub(r'(?<= id=")[^"]*|(?<=#)[\w-]+(?=["\)])', lambda m: ids.get(m[0], m[0]), svg)
    svg = re.sub(r'(?<=[:;]) (?=[^"<>]*"/?>)', "", svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


def run_cells(cells, jobs):
    """Run each cell of a comparison on the embedded task in a process of its own.

    A cell whose summary is there is not run again; one that was killed starts afresh.

    Args:
        cells: (name, run directory, arguments of Python) each.
        jobs: processes at a time.
    """
    from isentropic.models import resolve_model

    resolve_model("tiny")
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda cell: _run_cell(*cell), cells))


def _run_cell(name, out, arguments):
    if (out / "summary.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    command = [sys.executable, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ONE_THREAD})
    if run.returncode:
        raise SystemExit(f"{name}: exit code {run.returncode}\n{run.stderr[-2000:]}")
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def train_arguments(settings):
    """`isentropic train` with these settings, as arguments of Python."""
    flags = [x for key, value in settings.items() for x in (f"--{key.replace('_', '-')}", str(value))]
    return ["-m", "isentropic.cli", "train", *flags]
