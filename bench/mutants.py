"""Planted errors: change one expression of the source at a time, by a seed, and see whether the nearest tests notice.

Each error is one of: a comparison, an arithmetic or a boolean operator exchanged; a sign, a `not`, a `detach()` or a
field of a `_replace` lost; `min` for `max`; a number changed; a condition reversed. The same number of errors goes into
each part of the source. The nearest tests are the doctests of the changed module and the tests that mirror it.
Messages, log lines, annotations and Triton's kernels are left alone.

    python bench/mutants.py                       # 60 errors, seed 0
    python bench/mutants.py --seed 1 --count 12 --only control
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from isentropic.runs.text import duration

ROOT = Path(__file__).resolve().parents[1]
SRC = Path("src/isentropic")
PARTS = {
    "losses": ("losses",),
    "entropy": ("entropy",),
    "control": ("control",),
    "recipes": ("recipes",),
    "runs/statistics": ("runs/statistics.py",),
    "engines/loop": ("engines/loop.py",),
}
# Tests that mirror a module under another name than its own.
ALSO = {
    "runs/statistics.py": ["tests/runs/test_statistics.py"],
    "engines/loop.py": ["tests/engines/test_loop.py", "tests/engines/test_rewrite.py"],
}
LIMIT = 300  # seconds that tests may take; an error that makes them hang is seen

COMPARISONS = {ast.Lt: ast.GtE, ast.LtE: ast.Lt, ast.Gt: ast.LtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
EXCHANGED = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "amax": "amin", "amin": "amax"}
SILENT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)


class Mutant(NamedTuple):
    """One error: `old` at a place of a file becomes `new`."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self):
        return f"{self.file}:{self.line}: {' '.join(self.old.split())}  →  {self.new}"


def changed(node):
    """The expressions that may stand in the place of one."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=rest) if type(op) in COMPARISONS:
            yield ast.Compare(left, [COMPARISONS[type(op)]()], rest)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            yield ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.And() if isinstance(op, ast.Or) else ast.Or(), values)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield operand
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1 if isinstance(value, int) else value * 2 if value else 1.0)
        case ast.Call(func=ast.Attribute(value=value, attr="detach"), args=[]):
            yield value
        case ast.Call(func=ast.Attribute(attr="_replace") as call, keywords=keywords) if len(keywords) > 1:
            for lost in keywords:
                yield ast.Call(call, [], [keyword for keyword in keywords if keyword is not lost])
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in EXCHANGED:
            yield ast.Call(ast.Name(EXCHANGED[name]), args, keywords)
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=args, keywords=keywords) if name in EXCHANGED:
            yield ast.Call(ast.Attribute(value, EXCHANGED[name]), args, keywords)


def statements(node):
    """The nodes below one whose value a test could see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, SILENT) or child is getattr(node, "annotation", None):
            continue
        if child is getattr(node, "returns", None) or child in getattr(node, "decorator_list", []):
            continue
        if isinstance(child, ast.Call) and ast.unparse(child.func).startswith(("logger.", "warnings.")):
            continue
        yield child
        yield from statements(child)


def mutants(file):
    """All errors of one file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    # Offsets of the syntax tree are in bytes.
    content, starts = text.encode(), [0]
    for row in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(row.encode()))
    for node in statements(ast.parse(text)):
        for new in changed(node):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            yield Mutant(str(file), node.lineno, start, end, content[start:end].decode(), f"({ast.unparse(new)})")


def nearest(file):
    """The module itself, for its doctests, and the tests that mirror it."""
    inside = Path(file).relative_to(SRC)
    if str(inside) in ALSO:
        return [file, *ALSO[str(inside)]]
    folder = Path("tests") / inside.parent
    while not (ROOT / folder).is_dir():
        folder = folder.parent
    # Tables of recipes are checked together.
    own = sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(f"test_{inside.stem}*.py"))
    own = [] if inside.parts[0] == "recipes" else own
    return [file, *(own or [str(folder)])]


def passes(tree, tests):
    """Whether tests pass in a copy of the tree."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *tests]
    try:
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=LIMIT).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def survives(tree, mutant):
    """Plant an error in a copy of the tree, try the nearest tests, and take it out again."""
    path = tree / mutant.file
    content = path.read_bytes()
    path.write_bytes(content[: mutant.start] + mutant.new.encode() + content[mutant.end :])
    try:
        return passes(tree, nearest(mutant.file))
    finally:
        path.write_bytes(content)


def chosen(only, count, seed):
    """As many errors from each part, by a seed."""
    draw, found = random.Random(seed), []
    for i, part in enumerate(only):
        paths = [ROOT / SRC / name for name in PARTS[part]]
        files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))
        every = [m for file in files if file.name != "triton.py" for m in mutants(file.relative_to(ROOT))]
        found += draw.sample(every, min(len(every), count // len(only) + (i < count % len(only))))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="errors in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts of the source")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="copies of the tree that are tried at a time")
    parser.add_argument("--most", type=int, default=3, help="survivors above which the exit code is 1")
    options = parser.parse_args()
    for name in ("count", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, must be at least 1")
    planted = chosen(options.only, options.count, options.seed)
    started, survivors, trees = time.monotonic(), [], SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.jobs):
            tree = Path(folder) / str(i)
            for name in ("src", "tests", "configs"):
                shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", tree)
            trees.put(tree)

        def in_a_tree(check, *values):
            tree = trees.get()
            try:
                return check(tree, *values)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(options.jobs) as pool:
            suites = sorted({tuple(nearest(mutant.file)) for mutant in planted})
            for tests, fine in zip(suites, pool.map(lambda tests: in_a_tree(passes, tests), suites), strict=True):
                if not fine:
                    sys.exit(f"tests fail before anything is planted: {' '.join(tests)}")
            print(f"{len(suites)} groups of tests pass as they are, {duration(time.monotonic() - started)}", flush=True)
            began = time.monotonic()
            results = pool.map(lambda mutant: in_a_tree(survives, mutant), planted)
            for i, (mutant, survived) in enumerate(zip(planted, results, strict=True), 1):
                spent = time.monotonic() - began
                left = duration(spent / i * (len(planted) - i))
                survivors += [mutant] if survived else []
                print(f"[{i}/{len(planted)}, {left} left] {'SURVIVED' if survived else 'seen'}  {mutant}", flush=True)
    print(f"\n{len(survivors)} of {len(planted)} planted errors survived the nearest tests (seed {options.seed})")
    print("\n".join(map(str, survivors)))
    return 1 if len(survivors) > options.most else 0


if __name__ == "__main__":
    raise SystemExit(main())
