"""The API pages: one for each room, in the order in which data flows, from the docstrings.

They are written to docs/api/ as the build starts (a directory that git ignores). A module that is neither listed here
nor named as inner fails the build.
"""

import pkgutil
import re
from importlib import import_module
from inspect import isfunction
from pathlib import Path

import isentropic

ENVIRONMENTS = ("environments", "textworld", "textarena", "appworld")
# Each room with the modules shown on its page; a package that lists __all__ shows what it lists.
ROOMS = {
    "types": ["types"],
    "reduce": ["reduce"],
    "advantages": ["advantages"],
    "selection": ["selection"],
    "penalties": ["penalties"],
    "shaping": ["shaping"],
    "bounds": ["bounds"],
    "objectives": ["objectives"],
    "kernels": ["kernels"],
    "entropy": ["entropy"],
    "dynamics": ["dynamics"],
    "controllers": ["controllers"],
    "targets": ["targets"],
    "thermostat": ["thermostat"],
    "parts": ["parts", "terms"],
    "recipes": ["recipes", "catalogue"],
    "precision": ["precision"],
    "evaluation": ["evaluation"],
    "record": ["record"],
    "explain": ["explain"],
    "lab": ["lab"],
    "compare": ["compare"],
    "engines": ["engines.trl", "engines.trl_audit", "engines.trl_rollout", "engines.trl_settings"],
    "tasks": [
        "tasks",
        "tasks.expressions",
        "tasks.data",
        "tasks.gym",
        "tasks.mixture",
        "tasks.verifiers",
        "tasks.checks",
        *(f"tasks.{kind}" for kind in ENVIRONMENTS),
    ],
    "models": ["models", "models.tiny", "models.smollm2", "models.words", "models.warmup"],
    "report": ["report"],
    "watch": ["watch"],
    "config": ["config"],
    "sequence": ["sequence"],
    "assess": ["assess"],
    "training": ["training"],
    "measure": ["measure"],
    "grid": ["grid"],
    "cli": ["cli"],
}
# Modules behind a package's public names, and parts of the engine that nobody calls.
INNER = (
    r"(kernels|lab|precision|report)\..+|engines|engines\.verl(_\w+)?|"
    r"engines\.control|engines\.trl_(explain|guard|head|rows|samples|sampling|signals|stop|surrogate|vocabulary)|"
    r"listing|tasks\.(equality|items|spec|worker)|models\.candidates"
)


def modules():
    """Every module of the package, by its name below ``isentropic``."""
    found = pkgutil.walk_packages(isentropic.__path__, "isentropic.")
    return {info.name.removeprefix("isentropic.") for info in found}


def _functions(module):
    """Public functions that a module defines, in their order."""
    found = vars(import_module(module)).items()
    return [n for n, f in found if not n.startswith("_") and isfunction(f) and f.__module__ == module]


def _section(module, alone):
    name = f"isentropic.{module}"
    options = ["   :members:"]
    if hasattr(import_module(name), "__all__"):
        options.append("   :imported-members:")
    head = "" if alone else f"{name}\n{'-' * len(name)}\n\n"
    if module == "record":
        # Its docstring is the schema, which has a page of its own.
        head += "What the files hold: :doc:`/run-directory`.\n\n"
        return (
            head
            + "".join(f".. autofunction:: {name}.{f}\n" for f in _functions(name))
            + f".. autoclass:: {name}.Record\n   :members:\n"
        )
    return f"{head}.. automodule:: {name}\n" + "\n".join(options) + "\n"


def write(source):
    """Write the pages, and the index that lists them; a page that is right already is left alone."""
    there = modules()
    listed = {module for shown in ROOMS.values() for module in shown}
    unknown = sorted(m for m in there - listed if not re.fullmatch(INNER, m))
    if unknown:
        raise ValueError(f"docs/_ext/api.py knows no page for {', '.join(unknown)}; add it to ROOMS or to INNER")
    folder = source / "api"
    folder.mkdir(exist_ok=True)
    rooms = [room for room, shown in ROOMS.items() if any(module in there for module in shown)]
    pages = {}
    for room in rooms:
        shown = [module for module in ROOMS[room] if module in there]
        title = f"isentropic.{room}"
        body = "\n".join(_section(module, len(shown) == 1) for module in shown)
        pages[f"{room}.rst"] = f"{title}\n{'=' * len(title)}\n\n{body}"
    table = "\n".join(f"   {room}" for room in rooms)
    pages["index.rst"] = (
        "API\n===\n\nOne page for each room, in the order in which data flows; "
        "a room imports only what stands above it."
        "\nShapes are in the axes of :doc:`types`. What the top level exports: "
        + ", ".join(f"``{name}``" for name in isentropic.__all__)
        + f".\n\n.. toctree::\n   :maxdepth: 1\n\n{table}\n"
    )
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in folder.glob("*.rst"):
        if path.name not in pages:
            path.unlink()


def setup(app):
    app.connect("builder-inited", lambda app: write(Path(app.srcdir)))
    return {"version": "1", "parallel_read_safe": True}
