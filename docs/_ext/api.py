"""The API pages: one for each package, in the order in which data flows, from the docstrings.

They are written to docs/api/ as the build starts (a directory that git ignores). A module that is neither listed here
nor named as inner fails the build.
"""

import pkgutil
import re
from importlib import import_module
from inspect import isfunction
from pathlib import Path

import isentropic

ENVIRONMENTS = ("textworld", "textarena", "appworld")
# Each package with the modules shown on its page; a package that lists __all__ shows what it lists.
PAGES = {
    "types": ["types"],
    "losses": [
        f"losses.{name}"
        for name in ("reduce", "advantages", "selection", "shaping", "clipping", "objectives", "penalties")
    ],
    "entropy": ["entropy.statistics", "entropy.prediction", "entropy.kernels", "entropy.audit"],
    "control": [
        f"control.{name}"
        for name in (
            "controllers",
            "predictive",
            "levels",
            "targets",
            "auto",
            "thermostat",
            "watchdog",
            "guard",
            "plant",
            "names",
        )
    ],
    "recipes": [f"recipes.{name}" for name in ("recipe", "stages", "catalogue", "knobs", "compose", "custom", "apply")],
    "runs": [
        f"runs.{name}"
        for name in (
            "record",
            "checkpoints",
            "lock",
            "statistics",
            "summary",
            "frontier",
            "calibration",
            "diagnosis",
            "explain",
            "frames",
            "labels",
            "text",
            "moves",
        )
    ],
    "tasks": [
        "tasks",
        *(
            f"tasks.{name}"
            for name in (
                "expressions",
                "data",
                "rows",
                "gym",
                "mixture",
                "sequence",
                "verifiers",
                "quantities",
                "checks",
            )
        ),
        "tasks.environments",
        *(f"tasks.environments.{name}" for name in ENVIRONMENTS),
    ],
    "models": [
        "models",
        *(
            f"models.{name}"
            for name in ("loading", "generation", "episodes", "candidates", "tiny", "smollm2", "words", "warmup")
        ),
    ],
    "engines": [
        "engines.loop",
        "engines.rewrite",
        "engines.groups",
        "engines.function",
        "engines.packing",
        "engines.card",
        *(
            f"engines.trl.{name}"
            for name in ("trainer", "wrap", "callbacks", "audit", "rollout", "settings", "sequence")
        ),
        "engines.tabular",
    ],
    "experiments": [
        f"experiments.{name}" for name in ("config", "train", "evaluate", "compare", "lines", "grid", "origin")
    ],
    "report": ["report", "report.watch"],
    "cli": ["cli.main"],
}
# Modules behind a package's public names, and modules of an engine that nobody calls.
INNER = (
    r"losses|entropy|control|recipes|runs|engines|experiments|cli|(entropy\.(kernels|audit)|report|engines\.tabular|cli)\..+|"
    r"engines\.(trl|verl)|engines\.verl\..+|engines\.trl\.(compat|explain|generation|head|log|loss)|"
    r"experiments\.(devices|hub|processes|terminal|trainer)|recipes\.changes|tasks\.(equality|items|spec|worker)"
)


def modules():
    """Every module of the package, by its name below ``isentropic``."""
    found = pkgutil.walk_packages(isentropic.__path__, "isentropic.")
    return {info.name.removeprefix("isentropic.") for info in found}


LISTED = {f"isentropic.{module}" for shown in PAGES.values() for module in shown}


def names(module):
    """The public names that a module's section shows: each name once, so not those of another module with a section."""
    found = import_module(f"isentropic.{module}")
    others = LISTED - {found.__name__}
    if hasattr(found, "__all__"):
        return [name for name in found.__all__ if getattr(getattr(found, name), "__module__", None) not in others]
    own = vars(found).items()
    return [name for name, x in own if not name.startswith("_") and getattr(x, "__module__", None) == found.__name__]


def _section(module, alone):
    name = f"isentropic.{module}"
    head = "" if alone else f"{name}\n{'-' * len(name)}\n\n"
    if module == "runs.record":
        # Its docstring is the schema, which has a page of its own.
        head += "What the files hold: :doc:`/run-directory`.\n\n"
        functions = [n for n in names(module) if isfunction(getattr(import_module(name), n))]
        return (
            head
            + "".join(f".. autofunction:: {name}.{f}\n" for f in functions)
            + f".. autoclass:: {name}.Record\n   :members:\n"
        )
    options = "   :members:"
    if hasattr(import_module(name), "__all__"):
        options = f"   :imported-members:\n   :members: {', '.join(names(module))}"
    return f"{head}.. automodule:: {name}\n{options}\n"


def _link(name):
    """A top-level name, as a link to where it is described."""
    if name == "RECIPES":
        return ":doc:`RECIPES </recipes>`"
    homes = [m for page in PAGES.values() for m in page if name in names(m)]
    (home,) = (m for m in homes if getattr(import_module(f"isentropic.{m}"), name) is getattr(isentropic, name))
    return f":py:obj:`{name} <isentropic.{home}.{name}>`"


def write(source):
    """Write the pages, and the index that lists them; a page that is right already is left alone."""
    there = modules()
    listed = {module for shown in PAGES.values() for module in shown}
    unknown = sorted(m for m in there - listed if not re.fullmatch(INNER, m))
    if unknown:
        raise ValueError(f"docs/_ext/api.py knows no page for {', '.join(unknown)}; add it to PAGES or to INNER")
    folder = source / "api"
    folder.mkdir(exist_ok=True)
    packages = [package for package, shown in PAGES.items() if any(module in there for module in shown)]
    pages = {}
    for package in packages:
        shown = [module for module in PAGES[package] if module in there]
        title = f"isentropic.{package}"
        body = "\n".join(_section(module, len(shown) == 1) for module in shown)
        pages[f"{package}.rst"] = f"{title}\n{'=' * len(title)}\n\n{body}"
    table = "\n".join(f"   {package}" for package in packages)
    pages["index.rst"] = (
        "API\n===\n\nOne page for each package, in the order in which data flows; "
        "a package imports only the packages before it.\nShapes are in the axes of :doc:`types`."
        f"\n\n.. toctree::\n   :maxdepth: 1\n\n{table}\n"
        "\nNames of the top level\n----------------------\n\n``from isentropic import ...`` gives these.\n\n"
        + "".join(f"* {_link(name)}\n" for name in isentropic.__all__)
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
