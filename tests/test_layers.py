"""The import direction of the package, and the size of its files and functions, read from the syntax trees."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
SRC = TESTS.parent / "src" / "isentropic"
IGNORED = {"__init__.py", "__pycache__"}

# A package imports only the packages before it: the order in which data flows.
ORDER = "types losses entropy control recipes runs report tasks models engines experiments cli".split()
# These import torch, numpy and jaxtyping only: no configuration, no I/O, no globals, no collective calls.
CORE = {"types", "losses", "entropy", "control", "recipes"}
# Those of one line do not import one another.
SEPARATE = [{"engines", "tasks"}, {"tasks", "report"}, {"engines.trl", "engines.verl", "engines.tabular"}]
# Packages and modules that import no torch, and those of them that may.
TORCHLESS = {"__init__", "types", "control", "recipes", "runs.record", "experiments.config", "cli"}
TORCH_ALLOWED = {"recipes.apply"}
ONLY_IN = {"argparse": {"cli"}, "tomllib": {"experiments", "cli"}}
EXTRAS = {"verl", "ray", "triton", "reasoning_gym", "math_verify", "textworld"}
MAX_BYTES, MAX_LINES = 25_000, 60  # both exclusive
MAX_FILES = 14  # in a folder


class Import(NamedTuple):
    name: str  # absolute and dotted, with the imported name where it may be a module
    line: int
    eager: bool  # runs when the module is imported


def package_of(module: str) -> str:
    """`isentropic.engines.trl` -> `engines`, `isentropic` -> `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree: ast.AST, module: str, is_package: bool, eager: bool = True) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import():
                yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
            case ast.ImportFrom():
                parts = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
                base = ".".join([*parts, *([node.module] if node.module else [])])
                yield from (Import(f"{base}.{alias.name}", node.lineno, eager) for alias in node.names)
            case ast.Call(
                func=ast.Name("import_module") | ast.Attribute(attr="import_module"), args=[ast.Constant(name), *_]
            ):
                yield Import(name, node.lineno, eager)
        match node:
            case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                yield from imports(ast.Module(node.body, []), module, is_package, False)
                yield from imports(ast.Module(node.orelse, []), module, is_package, eager)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from imports(node, module, is_package, False)
            case _:
                yield from imports(node, module, is_package, eager)


def lies_in(module: str, places: set[str]) -> str | None:
    """The one of these dotted places, below `isentropic`, that a module lies in."""
    name = module.removeprefix("isentropic.") if module != "isentropic" else "__init__"
    return next((place for place in places if name == place or name.startswith(f"{place}.")), None)


def violation(imp: Import, module: str) -> str | None:
    """Why `module` must not import this, or None. Eager torch is found in `check`, through the graph."""
    top, package = imp.name.split(".")[0], package_of(module)
    if top in ONLY_IN and package not in ONLY_IN[top]:
        return f"{top} belongs to {', '.join(sorted(ONLY_IN[top]))}"
    if top != "isentropic":
        allowed = {"torch", "numpy", "jaxtyping"} | ({"triton"} if lies_in(module, {"entropy.kernels"}) else set())
        if package in CORE and top not in allowed | sys.stdlib_module_names:
            return f"the core imports {', '.join(sorted(allowed))} and the standard library only"
        return None
    target = package_of(imp.name)
    if package == "__init__":
        return "the package resolves its names lazily" if imp.eager else None
    if imp.name in ("isentropic.__version__", "isentropic.lazy"):
        return None
    if target not in ORDER:
        return "import from the package that defines it"
    for group in SEPARATE:
        ours, theirs = lies_in(module, group), lies_in(imp.name, group)
        if ours and theirs and ours != theirs:
            return f"{', '.join(sorted(group))} do not import one another"
    if ORDER.index(target) > ORDER.index(package):
        return f"{target} comes after {package}"
    return None


def long_functions(tree: ast.AST) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            num_lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if num_lines >= MAX_LINES:
                yield node, num_lines


def torch_path(module: str, graph: dict[str, list[str]], seen: set[str]) -> list[str] | None:
    """The chain of eager imports by which importing `module` imports torch, or None."""
    for name in graph[module]:
        if name.split(".")[0] == "torch":
            return [module, "torch"]
        parts = name.split(".")
        # Importing a.b.c runs a and a.b too.
        for target in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            if target in graph and target not in seen:
                seen.add(target)
                if path := torch_path(target, graph, seen):
                    return [module, *path]
    return None


def cycle(graph: dict[str, list[str]]) -> list[str] | None:
    """Modules that import one another as they are loaded, or None."""
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> list[str] | None:
        state[module] = 1
        for name in graph[module]:
            target = name if name in graph else name.rpartition(".")[0]
            if target not in graph or target == module:
                continue
            if state.get(target) == 1:
                return [*path[path.index(target) :], target] if target in path else None
            if target not in state and (found := visit(target, [*path, target])):
                return found
        state[module] = 2
        return None

    return next((found for module in graph if module not in state and (found := visit(module, [module]))), None)


def check(sources: dict[str, str]) -> list[str]:
    """Every violation in `sources`, a path relative to the package -> text mapping."""
    found, graph = [], {}
    for path, text in sources.items():
        parts = ["isentropic", *Path(path).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        tree = ast.parse(text, path)
        if package_of(module) not in [*ORDER, "__init__"]:
            found.append(f"{path}: {package_of(module)} has no place in the order")
            continue
        if len(text.encode()) >= MAX_BYTES:
            found.append(f"{path}: {len(text.encode())} bytes, allowed < {MAX_BYTES}; split the module")
        for node, num_lines in long_functions(tree):
            found.append(f"{path}:{node.lineno}: {node.name} has {num_lines} lines, allowed < {MAX_LINES}")
        entries = list(imports(tree, module, is_package))
        for entry in entries:
            if why := violation(entry, module):
                found.append(f"{path}:{entry.line}: imports {entry.name}: {why}")
        graph[module] = [entry.name for entry in entries if entry.eager]
    for module in graph:
        torchless = lies_in(module, TORCHLESS) and not lies_in(module, TORCH_ALLOWED)
        if torchless and (chain := torch_path(module, graph, {module})):
            found.append(f"{module}: imports torch at module level: {' -> '.join(chain)}")
    if loop := cycle(graph):
        found.append(f"modules import one another: {' -> '.join(loop)}")
    return found


def read_package() -> dict[str, str]:
    return {str(path.relative_to(SRC)): path.read_text() for path in sorted(SRC.rglob("*.py"))}


def test_layers_hold():
    sources = read_package()
    assert {"__init__.py", "types.py", "cli/main.py"} <= set(sources)
    assert check(sources) == []


def test_the_listing_is_the_order():
    """Twelve names at the root and nothing else; no folder of many files, here and in the tests."""
    listed = {path.stem for path in SRC.iterdir() if path.suffix != ".typed" and path.name not in IGNORED}
    assert listed == set(ORDER)
    for root in (SRC, TESTS):
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            files = [path for path in folder.iterdir() if path.is_file()]
            assert len(files) <= MAX_FILES, folder


def test_tests_mirror_the_package():
    """Every folder of tests is one of the package, but for what tests share, and kinds of TRL trainers."""
    folders = {path.relative_to(TESTS) for path in TESTS.rglob("*") if path.is_dir() and path.name != "__pycache__"}
    own = {Path("helpers"), Path("engines/trl/trainers")}
    extra = {folder for folder in folders if not (SRC / folder).is_dir()} - own
    assert {folder for folder in extra if ".pytest_cache" not in str(folder)} == set()
    missing = {name for name in ORDER if name != "types"} - {str(folder) for folder in folders}
    assert missing == set()


@pytest.mark.parametrize("engine", ["trl", "verl"])
def test_private_names_of_an_engine_are_in_compat(engine):
    """What a new version of an engine can break is one file."""
    private = re.compile(r"\b(?:trainer|engine|worker)\._(?!stop\b)[a-z]\w*")
    for path in [*(SRC / "engines" / engine).glob("*.py"), *(SRC / "experiments").glob("*.py")]:
        if path.name != "compat.py":
            assert private.findall(path.read_text()) == [], path
            if engine == "verl" and path.parent.name == "verl":
                assert not re.search(r"^\s*(from|import) verl\b", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize("name", sorted(read_package()))
def test_every_module_imports_or_lacks_a_named_extra(name):
    parts = ["isentropic", *Path(name).with_suffix("").parts]
    if parts[-1] == "__main__":
        pytest.skip("runs the command line")
    try:
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in EXTRAS:
            raise


PLANTED = [
    ("upwards", {"types.py": "from isentropic.entropy import read"}, "entropy comes after types"),
    ("nested", {"losses/reduce.py": "def f():\n    import isentropic.cli"}, "cli comes after losses"),
    ("relative", {"losses/reduce.py": "from ..control import names"}, "control comes after losses"),
    ("relative package", {"losses/__init__.py": "from .. import entropy"}, "entropy comes after losses"),
    ("relative parent", {"entropy/kernels/cpu.py": "from ...recipes import read"}, "recipes comes after entropy"),
    (
        "type checking",
        {"types.py": "if TYPE_CHECKING:\n    from isentropic.engines import loop"},
        "engines comes after",
    ),
    ("by name", {"types.py": "import_module('isentropic.runs')"}, "runs comes after types"),
    ("method", {"types.py": "class A:\n    def f(self):\n        import isentropic.runs"}, "runs comes after types"),
    ("neighbours", {"engines/loop.py": "from isentropic.tasks import Task"}, "do not import one another"),
    ("engines", {"engines/trl/loss.py": "from ..verl import control"}, "do not import one another"),
    ("public name", {"runs/frames.py": "from isentropic import Recipe"}, "import from the package"),
    ("foreign core", {"control/pid.py": "def f():\n    import scipy.stats"}, "the core imports"),
    ("triton", {"entropy/statistics.py": "import triton"}, "the core imports"),
    ("eager package", {"__init__.py": "from isentropic.types import TokenBatch"}, "lazily"),
    ("torch", {"experiments/config.py": "import torch"}, "config -> torch"),
    ("torch in recipes", {"recipes/compose.py": "import torch"}, "isentropic.recipes.compose -> torch"),
    (
        "torch guarded",
        {"experiments/config.py": "try:\n    from torch import nn\nfinally:\n    pass"},
        "config -> torch",
    ),
    (
        "torch indirectly",
        {"losses/reduce.py": "import torch.nn", "cli/main.py": "from isentropic.losses import reduce"},
        "isentropic.cli.main -> isentropic.losses.reduce -> torch",
    ),
    ("argparse", {"engines/loop.py": "import argparse"}, "argparse belongs to"),
    ("tomllib", {"runs/record.py": "def f():\n    from tomllib import load"}, "tomllib belongs to"),
    ("stray module", {"utils.py": ""}, "no place in the order"),
    ("long file", {"types.py": "#" * MAX_BYTES}, "split the module"),
    ("long function", {"types.py": "def f():\n" + "    x = 1\n" * MAX_LINES}, "f has 60 lines"),
    (
        "cycle",
        {"runs/a.py": "from .b import x", "runs/b.py": "from . import a"},
        "isentropic.runs.a -> isentropic.runs.b -> isentropic.runs.a",
    ),
]


@pytest.mark.parametrize(("sources", "message"), [p[1:] for p in PLANTED], ids=[p[0] for p in PLANTED])
def test_planted_violations_are_found(sources, message):
    found = check(sources)
    assert len(found) == 1
    assert message in found[0]


def test_allowed_imports_pass():
    sources = {
        "__init__.py": "if TYPE_CHECKING:\n    from isentropic.types import TokenBatch",
        "types.py": "from typing import NamedTuple",
        "losses/reduce.py": 'import torch\ndef f():\n    """'
        + "\n" * MAX_LINES
        + '"""\n'
        + "    x = 1\n" * (MAX_LINES - 1),
        "entropy/kernels/__init__.py": "from .cpu import head\nfrom isentropic.types import TokenBatch",
        "entropy/kernels/cpu.py": "import torch\nimport triton",
        "control/controllers.py": "if TYPE_CHECKING:\n    from isentropic.types import EntropyReading",
        "recipes/apply.py": "import torch\nfrom ..losses import reduce",
        "tasks/__init__.py": "def load():\n    from isentropic.tasks import gym",
        "tasks/gym.py": "import torch\nimport reasoning_gym",
        "engines/trl/loss.py": "from ..rewrite import rewrite",
        "engines/rewrite.py": "import torch",
        "experiments/config.py": "import tomllib\nimport isentropic.control.controllers",
        "cli/main.py": "import argparse\ndef main():\n    from isentropic import __version__, experiments",
    }
    assert check(sources) == []
