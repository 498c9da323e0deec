"""What there is to choose from, as text: `isentropic recipes` and `isentropic tasks`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from ..control.controllers import CONTROLLERS
from ..control.targets import TARGETS
from ..recipes.compose import KNOBS, RECIPES
from ..recipes.parts import BOUNDS, PENALTIES, SELECTIONS, SHAPINGS
from ..tasks import KINDS, TASKS, load_task


def recipes() -> str:
    """Recipes, and what they are made of: knobs, parts, controllers, targets.

    Example:
        >>> print(recipes()[:18])
        RECIPES (--recipe)
    """
    named = []
    for name, recipe in RECIPES.items():
        control = f"; knob {recipe.knob}, controller {recipe.controller}" if recipe.knob else ""
        named += [(name, f"{recipe.formula}{control}"), ("", recipe.source)]
    first_lines = ((name, (function.__doc__ or "").splitlines()[0]) for name, function in CONTROLLERS.items())
    return "\n\n".join(
        [
            _section("RECIPES (--recipe)", named),
            _section("KNOBS (--knob)", ((name, knob.source) for name, knob in KNOBS.items())),
            _section("SELECTIONS (recipe_options.selection), which tokens count", SELECTIONS.items()),
            _section("SHAPINGS (--shaping), L = log π + H", SHAPINGS.items()),
            _section("BOUNDS (recipe_options.bounds), of the ratio r", BOUNDS.items()),
            _section("PENALTIES (recipe_options.penalty), what is added to the loss", PENALTIES.items()),
            _section(
                "CONTROLLERS (--controller NAME[:OPTION=VALUE])",
                ((n, line.replace("`", "")) for n, line in first_lines),
            ),
            _section("TARGETS (--target)", TARGETS.items()),
        ]
    )


def tasks() -> str:
    """Tasks by name, and the generators of reasoning-gym where it is installed."""
    built_in = [(name, load_task(name).description) for name in TASKS]
    kinds = [row for _, form, meaning in KINDS.values() for row in ((form, ""), ("", meaning))]
    own = [("FILE.py:NAME", ""), ("", "a Task of your own; or package.module:attribute")]
    if find_spec("reasoning_gym") is None:
        generators = "GENERATORS of reasoning-gym: pip install 'isentropic[tasks]'"
    else:
        from ..tasks.gym import names

        generators = f"GENERATORS of reasoning-gym (rg:NAME)\n  {', '.join(names())}"
    return f"{_section('TASKS (--task)', [*built_in, *kinds, *own])}\n\n{generators}"


def _section(title: str, rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join([title, *(f"  {name:23} {text}".rstrip() for name, text in rows)])
