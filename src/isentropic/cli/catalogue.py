"""`isentropic recipes`, `isentropic tasks` and `isentropic configs`: the choices, as text."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from ..control.controllers import CONTROLLERS
from ..control.names import choose
from ..control.targets import TARGETS
from ..experiments.config import config_errors
from ..recipes import RECIPES
from ..recipes.knobs import all_knobs
from ..recipes.stages import REDUCTIONS, STAGES, Component
from ..tasks import KINDS, TASKS, load_task
from .parser import add_command

# Of each stage: its plural, and what its formulas are.
_TITLES = {
    "baseline": ("BASELINES", "the advantage A from the rewards R of a group"),
    "selection": ("SELECTIONS", "the tokens whose advantage counts"),
    "shaping": ("SHAPINGS", "the advantage by token; L = log π + H"),
    "bounds": ("BOUNDS", "of the ratio r"),
    "objective": ("OBJECTIVES", "the loss by token"),
    "penalty": ("PENALTIES", "added to the loss, times penalty_coef"),
}


def add_to(commands: Any) -> None:
    """Add the commands."""
    add_command(commands, "recipes", _print_recipes, "list the algorithms, their components, knobs and controllers")
    add_command(commands, "tasks", _print_tasks, "list the tasks, and how each is named")
    help = "list configurations to start from, or print one: isentropic configs NAME > my.toml"
    parser = add_command(commands, "configs", _print_configs, help)
    parser.add_argument("name", nargs="?", metavar="NAME", help="the one to print [list all]")


def _print_recipes(args: dict[str, Any]) -> int:
    print(recipes())
    return 0


def _print_tasks(args: dict[str, Any]) -> int:
    print(tasks())
    return 0


def _print_configs(args: dict[str, Any]) -> int:
    known = configs()
    if args["name"] is None:
        print(_section("CONFIGURATIONS (isentropic configs NAME > my.toml)", map(_headline, known.items())))
        return 0
    with config_errors():
        choose("NAME", args["name"], known)
    print(known[args["name"]], end="")
    return 0


def configs() -> dict[str, str]:
    """The configurations that the package ships, by name: files for `train`, and accelerate's for FSDP2.

    Example:
        >>> configs()["smollm2-gsm8k-1gpu"].splitlines()[0]
        '# SmolLM2-135M on GSM8K, one GPU of 24 GB or more.'
    """
    there = files("isentropic.experiments") / "configs"
    shipped = {path.name.rpartition(".")[0]: path.read_text(encoding="utf-8") for path in there.iterdir()}
    return dict(sorted(shipped.items()))


def _headline(entry: tuple[str, str]) -> tuple[str, str]:
    """A configuration's name and the first line of its header."""
    name, text = entry
    return name, text.partition("\n")[0].removeprefix("# ")


def recipes() -> str:
    """Recipes, and their components, knobs, controllers and targets.

    Example:
        >>> print(recipes()[:18])
        RECIPES (--recipe)
    """
    named = []
    for name, recipe in RECIPES.items():
        control = f"; knob {recipe.knob}, controller {recipe.controller}" if recipe.knob else ""
        named += [(name, f"{recipe.formula}{control}"), ("", recipe.source)]
    controllers = [
        (name, (function.__doc__ or "").splitlines()[0].replace("`", "")) for name, function in CONTROLLERS.items()
    ]
    return "\n\n".join(
        [
            _section("RECIPES (--recipe)", named),
            _section(
                "KNOBS (--knob), numbers of the loss that a controller may turn",
                [(name, knob.source) for name, knob in all_knobs().items()],
            ),
            *(_stage_section(stage) for stage in STAGES),
            _section("REDUCTIONS (recipe_options.reduction), of the losses of tokens", REDUCTIONS.items()),
            _section("CONTROLLERS (--controller NAME[:OPTION=VALUE])", controllers),
            _section("TARGETS (--target), of entropy in nats per token", TARGETS.items()),
        ]
    )


def _stage_section(stage: str) -> str:
    plural, meaning = _TITLES[stage]
    rows = []
    for name, component in STAGES[stage].items():
        rows.append((name, component.formula))
        if component.constants:
            rows.append(("", f"constants: {_constants(component)}"))
    return _section(f"{plural} (--{stage}), {meaning}", rows)


def _constants(component: Component) -> str:
    """Constants with their defaults, which recipe_options may set; those that are knobs are marked."""
    return ", ".join(
        f"{name}={value:g}" + (" (knob)" if name in component.knobs else "")
        for name, value in component.constants.items()
    )


def tasks() -> str:
    """Tasks by name, properties of an expression, sequences, and the generators of reasoning-gym.

    Example:
        >>> print(tasks()[:14])
        TASKS (--task)
    """
    from ..tasks.expressions import PROPERTIES
    from ..tasks.sequence import SEQUENCES

    built_in = [(name, load_task(name).description) for name in TASKS]
    kinds = [row for kind in KINDS.values() for row in ((kind.form, ""), ("", kind.meaning))]
    custom = [("FILE.py:NAME", ""), ("", "a Task of your own; or package.module:attribute")]
    if find_spec("reasoning_gym") is None:
        generators = "GENERATORS of reasoning-gym: pip install 'isentropic[tasks]'"
    else:
        from ..tasks.gym import names

        generators = f"GENERATORS of reasoning-gym (rg:NAME)\n  {', '.join(names())}"
    sequences = [
        row
        for name, one in SEQUENCES.items()
        for row in ((name, one.meaning), *(("", f"{i}. {task}") for i, task in enumerate(one.tasks, start=1)))
    ]
    return "\n\n".join(
        [
            _section("TASKS (--task)", [*built_in, *kinds, *custom]),
            _section(
                "PROPERTIES of an expression (--task expr:need=NAME,NAME...)",
                [(name, one.meaning) for name, one in PROPERTIES.items()],
            ),
            _ladder(),
            _section("SEQUENCES (--task), or tasks of your own by --task A --then B --then C", sequences),
            generators,
        ]
    )


def _ladder() -> str:
    """The rungs of the expression tasks, from easy to hard."""
    from ..tasks.expressions import RUNGS

    rows = [("pass@1", "pass@64  distinct of 64  task")]
    rows += [(f"{r.rate:g}", f"{r.pass64:7.2f}  {r.distinct:14.1f}  {r.name}") for r in RUNGS]
    title = "LADDER of base rates (--task expr:rate=SHARE takes the nearest), of the tiny model before training"
    return "\n".join([title, *(f"  {rate:8} {text}" for rate, text in rows)])


def _section(title: str, rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join([title, *(f"  {name:23} {text}".rstrip() for name, text in rows)])
