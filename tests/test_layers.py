"""The import direction of the package, and the size of its files and functions, read from the syntax trees."""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SRC = Path(__file__).parents[1] / "src" / "isentropic"

# A room imports only the rooms above it.
ORDER = """types reduce advantages selection penalties shaping bounds objectives kernels entropy dynamics controllers
    targets thermostat parts terms catalogue recipes precision evaluation record explain lab engines tasks models
    listing report watch config compare grid sequence assess training measure cli""".split()
CORE = set(ORDER[: ORDER.index("evaluation") + 1])
SEPARATE = {"engines", "tasks", "report"}
TORCHLESS = set(
    """__init__ controllers targets thermostat parts catalogue recipes record explain tasks models listing config
    compare grid cli""".split()
)
ONLY_IN = {"argparse": {"config", "cli"}, "tomllib": {"config", "cli", "grid"}}
EXTRAS = {"verl", "ray", "triton", "reasoning_gym", "math_verify", "textworld"}
MAX_BYTES, MAX_LINES = 25_000, 60  # both exclusive


class Import(NamedTuple):
    name: str  # absolute and dotted, with the imported name where it may be a module
    line: int
    eager: bool  # runs when the module is imported


def room_of(module: str) -> str:
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


def violation(imp: Import, room: str) -> str | None:
    """Why `room` must not import this, or None. Eager torch is found in `check`, through the graph."""
    top = imp.name.split(".")[0]
    if top in ONLY_IN and room not in ONLY_IN[top]:
        return f"{top} belongs to {', '.join(sorted(ONLY_IN[top]))}"
    if top != "isentropic":
        allowed = {"torch", "numpy", "jaxtyping"} | ({"triton"} if room == "kernels" else set())
        if room in CORE and top not in allowed | sys.stdlib_module_names:
            return f"the core imports {', '.join(sorted(allowed))} and the standard library only"
        return None
    target = room_of(imp.name)
    if room == "__init__":
        return "the package resolves its names lazily" if imp.eager else None
    if target == room or imp.name == "isentropic.__version__":
        return None
    if target not in ORDER:
        return "import from the room that defines it"
    if room in SEPARATE and target in SEPARATE:
        return f"{', '.join(sorted(SEPARATE))} do not import one another"
    if ORDER.index(target) > ORDER.index(room):
        return f"{target} stands below {room}"
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


def check(sources: dict[str, str]) -> list[str]:
    """Every violation in `sources`, a path relative to the package -> text mapping."""
    found, graph = [], {}
    for path, text in sources.items():
        parts = ["isentropic", *Path(path).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        room, tree = room_of(module), ast.parse(text, path)
        room = "cli" if room == "__main__" else room
        if room not in [*ORDER, "__init__"]:
            found.append(f"{path}: {room} has no place in the order")
            continue
        if len(text.encode()) >= MAX_BYTES:
            found.append(f"{path}: {len(text.encode())} bytes, allowed < {MAX_BYTES}; split the room")
        for node, num_lines in long_functions(tree):
            found.append(f"{path}:{node.lineno}: {node.name} has {num_lines} lines, allowed < {MAX_LINES}")
        entries = list(imports(tree, module, is_package))
        for entry in entries:
            if why := violation(entry, room):
                found.append(f"{path}:{entry.line}: imports {entry.name}: {why}")
        graph[module] = [entry.name for entry in entries if entry.eager]
    for module in graph:
        # Of a package only its __init__ must do without torch: what stands inside is imported lazily.
        if module.count(".") < 2 and room_of(module) in TORCHLESS and (chain := torch_path(module, graph, {module})):
            found.append(f"{module}: imports torch at module level: {' -> '.join(chain)}")
    return found


def read_package() -> dict[str, str]:
    return {str(path.relative_to(SRC)): path.read_text() for path in sorted(SRC.rglob("*.py"))}


def test_layers_hold():
    sources = read_package()
    assert {"__init__.py", "types.py", "cli.py"} <= set(sources)
    assert check(sources) == []


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
    ("upwards", {"types.py": "from isentropic.entropy.statistics import read"}, "entropy stands below types"),
    ("nested", {"reduce.py": "def f():\n    import isentropic.cli"}, "cli stands below reduce"),
    ("relative", {"reduce.py": "from .shaping import mask"}, "shaping stands below reduce"),
    ("relative package", {"kernels/__init__.py": "from .. import entropy"}, "entropy stands below kernels"),
    ("relative parent", {"kernels/cpu.py": "from ..entropy import read"}, "entropy stands below kernels"),
    ("type checking", {"types.py": "if TYPE_CHECKING:\n    from isentropic.engines.tabular import Policy"}, "lab stands below"),
    ("by name", {"types.py": "import_module('isentropic.engines.tabular')"}, "lab stands below types"),
    ("method", {"types.py": "class A:\n    def f(self):\n        import isentropic.engines.tabular"}, "lab stands below types"),
    ("neighbours", {"report/html.py": "from isentropic.engines.trl import Trainer"}, "do not import one another"),
    ("public name", {"lab.py": "from isentropic import Recipe"}, "import from the room"),
    ("foreign core", {"evaluation.py": "def f():\n    import scipy.stats"}, "the core imports"),
    ("triton", {"entropy.py": "import triton"}, "the core imports"),
    ("eager package", {"__init__.py": "from isentropic.types import TokenBatch"}, "lazily"),
    ("torch", {"config.py": "import torch"}, "config -> torch"),
    (
        "torch guarded",
        {"config.py": "try:\n    from torch import nn\nfinally:\n    pass"},
        "config -> torch",
    ),
    (
        "torch indirectly",
        {"types.py": "import torch.nn", "config.py": "from isentropic import types"},
        "isentropic.experiments.config -> isentropic.types -> torch",
    ),
    ("torch in a package", {"tasks/__init__.py": "import torch"}, "isentropic.tasks -> torch"),
    ("argparse", {"lab.py": "import argparse"}, "argparse belongs to"),
    ("tomllib", {"record.py": "def f():\n    from tomllib import load"}, "tomllib belongs to"),
    ("stray room", {"utils.py": ""}, "no place in the order"),
    ("long file", {"types.py": "#" * MAX_BYTES}, "split the room"),
    ("long function", {"types.py": "def f():\n" + "    x = 1\n" * MAX_LINES}, "f has 60 lines"),
]


@pytest.mark.parametrize(("sources", "message"), [p[1:] for p in PLANTED], ids=[p[0] for p in PLANTED])
def test_planted_violations_are_found(sources, message):
    found = check(sources)
    assert len(found) == 1
    assert message in found[0]


def test_allowed_imports_pass():
    sources = {
        "__init__.py": "if TYPE_CHECKING:\n    from isentropic.types import TokenBatch",
        "types.py": "import torch\nfrom jaxtyping import Float",
        "kernels/__init__.py": "from .cpu import head\nfrom isentropic.types import TokenBatch",
        "kernels/cpu.py": "import torch\nimport triton",
        "controllers.py": "if TYPE_CHECKING:\n    from isentropic.types import EntropyReading",
        "grid.py": "import tomllib",
        "tasks/__init__.py": "def make():\n    from isentropic.tasks import gym",
        "tasks/gym.py": "import torch\nimport reasoning_gym",
        "config.py": "import argparse\nimport isentropic.control.controllers",
        "cli.py": "def main():\n    from isentropic import __version__, config\n    from isentropic.engines import trl",
        "reduce.py": 'def f():\n    """' + "\n" * MAX_LINES + '"""\n' + "    x = 1\n" * (MAX_LINES - 1),
    }
    assert check(sources) == []
