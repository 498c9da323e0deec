"""The knobs of a recipe: which numbers a controller may turn, and over which range. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..control.controllers import Controller, Range, parse_controller
from ..control.names import choose
from ..control.targets import Target, parse_target
from ..control.thermostat import Thermostat, thermostat
from .custom import Factory
from .recipe import FIELD_NUMBERS, Recipe
from .stages import STAGES, Bounds, Component, Knob


def _scaled(name: str, sign: int) -> Callable[[Recipe], Range]:
    """A clip bound may go from a quarter of the recipe's own to four times it."""

    def range_of(recipe: Recipe) -> Range:
        start = getattr(recipe, name)
        bounds = recipe.component("bounds")
        below_one = name == "clip_low" and isinstance(bounds, Bounds) and bounds.below_one
        high = min(4 * start, 0.95) if below_one else 4 * start
        return Range(start, start / 4, high, start / 4, sign)

    return range_of


# Knobs that are fields of a recipe; those of components are in their entries.
FIELD_KNOBS: dict[str, Knob] = {
    "clip_high": Knob(_scaled("clip_high", 1), "ADAPO arXiv:2603.11682 [paper: direction; range ours]", "clip"),
    "clip_low": Knob(
        _scaled("clip_low", -1), "arXiv:2509.26114: a tighter low clip raises entropy [range ours]", "clip"
    ),
    "entropy_coef": Knob(
        lambda r: Range(r.entropy_coef, 0.0, 0.1, 1e-4), "loss − c·H, under the recipe's reduction [range ours]"
    ),
    "penalty_coef": Knob(
        lambda r: Range(r.penalty_coef, 0.0, 4 * r.penalty_coef or 1.0),
        "coefficient of the recipe's penalty, up to four times the recipe's own [range ours]",
        "penalty",
    ),
    # 60 completions of 512 prompts with 5 answers each, and half as many at the lower temperature.
    "redraw": Knob(
        lambda r: Range(min(max(r.redraw, -0.0117), 0.0234), -0.0117, 0.0234, 1e-3),
        "AEPO arXiv:2510.08141; the TRL engine alone",
    ),
}


def all_knobs() -> dict[str, Knob]:
    """Every knob by its name, those of the tables' components included; the first entry of a name speaks for it.

    Example:
        >>> all_knobs()["clip_low"].source
        'arXiv:2509.26114: a tighter low clip raises entropy [range ours]'
    """
    knobs = {name: FIELD_KNOBS[name] for name in ("clip_high", "clip_low")}
    for table in STAGES.values():
        for component in table.values():
            for name, knob in component.knobs.items():
                knobs.setdefault(name, knob)
    return knobs | FIELD_KNOBS


def readers(name: str) -> tuple[str, ...]:
    """The shapings of the table that a knob reaches, the one that it brings first.

    Example:
        >>> readers("beta")
        ('repo', 'repo_failing')
    """
    return tuple(key for key, shaping in STAGES["shaping"].items() if name in shaping.knobs)


def owner(recipe: Recipe, name: str) -> Component | None:
    """The component of a recipe that has a constant of this name."""
    return next((c for c in recipe.components().values() if name in c.constants), None)


def knob_range(recipe: Recipe) -> Range:
    """The range of the recipe's knob: the knob's own, with the recipe's overrides.

    Any constant of a component may be a knob if the recipe gives ``knob_low`` and ``knob_high``. A target that is a
    floor leaves the part that raises entropy, unless the recipe gives the bound on the other side.

    Raises:
        ValueError: no knob, one that nothing reads, or bounds that exclude one another.

    Example:
        >>> from isentropic.recipes import RECIPES
        >>> knob_range(RECIPES["adapo"])
        Range(start=0.28, low=0.07, high=1.12, least=0.07, sign=1, rest=None, one_way=False)
    """
    span = _own_range(recipe)
    low = span.low if recipe.knob_low is None else recipe.knob_low
    high = span.high if recipe.knob_high is None else recipe.knob_high
    start = min(max(span.start, low), high) if recipe.knob_start is None else recipe.knob_start
    span = span._replace(start=start, low=low, high=high, least=min(span.least, high)).check()
    free = (recipe.knob_low if span.sign > 0 else recipe.knob_high) is None
    return span.raising() if free and _holds_up(recipe, span) else span


def _holds_up(recipe: Recipe, span: Range) -> bool:
    """Whether the knob follows a target that is a floor."""
    own = isinstance(recipe.controller, Factory)
    return (own or parse_controller(recipe.controller, span).steers) and _target(recipe).one_way


def _own_range(recipe: Recipe) -> Range:
    name = recipe.knob or "none"
    if name in FIELD_KNOBS:
        span = FIELD_KNOBS[name].range
        return span(recipe) if callable(span) else span
    component = owner(recipe, name)
    if component is None:
        choose("knob", name, all_knobs())
        raise ValueError(f"knob {name} is read by no component of this recipe; take one of {_names(readers(name))}")
    if name in component.knobs:
        span = component.knobs[name].range
        span = span(recipe) if callable(span) else span
        return span._replace(start=recipe.constants.get(name, span.start))
    if recipe.knob_low is None or recipe.knob_high is None:
        raise ValueError(
            f"knob {name} has no range of its own, got knob_low={recipe.knob_low}, knob_high={recipe.knob_high}; "
            "give both, or declare it in the component's entry"
        )
    width = recipe.knob_high - recipe.knob_low
    return Range(recipe.number(name), recipe.knob_low, recipe.knob_high, 1e-3 * width if width > 0 else 1e-4)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "your own"


def with_knob(recipe: Recipe, value: float | None) -> Recipe:
    """The recipe with its knob at a value, unchanged if it has none or the value is ``None``.

    Example:
        >>> from isentropic.recipes import compose
        >>> with_knob(compose("adapo"), 0.5).clip_high, with_knob(compose("repo-r-loop"), 0.01).number("zeta")
        (0.5, 0.01)
    """
    if recipe.knob is None or value is None:
        return recipe
    if recipe.knob in FIELD_NUMBERS:
        field: dict[str, Any] = {recipe.knob: value}
        return replace(recipe, **field)
    return replace(recipe, constants={**recipe.constants, recipe.knob: value})


def build_controller(recipe: Recipe) -> Controller:
    """The recipe's controller over its knob.

    Raises:
        ValueError: no knob, or a controller that cannot be made.

    Example:
        >>> from isentropic.recipes import compose
        >>> build_controller(compose("isentropic")).forecasts, build_controller(compose("adapo")).forecasts
        (True, False)
    """
    controller, span = recipe.controller, knob_range(recipe)
    return controller.controller(span) if isinstance(controller, Factory) else parse_controller(controller, span)


def build_thermostat(
    recipe: Recipe, steps: int | Sequence[int] | None = None, vocabulary: int | None = None
) -> Thermostat | None:
    """The recipe's controller and target, joined; ``None`` if nothing is under control.

    Args:
        recipe: composed and checked.
        steps: optimizer steps of the run, which a target over the whole of it needs; of a sequence of tasks, the steps
            done at the end of each.
        vocabulary: number of tokens that the model chooses from, if known.

    Raises:
        ValueError: such a target without ``steps``; a target in nats that no policy over the vocabulary has.

    Example:
        >>> from isentropic.recipes import compose
        >>> t = build_thermostat(compose("adapo", target="0.5"))
        >>> t.init().value
        0.28
    """
    if recipe.knob is None:
        return None
    return thermostat(build_controller(recipe), _target(recipe, steps, vocabulary), recipe.every, knob_range(recipe))


def _target(recipe: Recipe, steps: int | Sequence[int] | None = 1, vocabulary: int | None = None) -> Target:
    """The recipe's target; what kind of target it is does not depend on the steps."""
    target, first = recipe.target, recipe.initial_readings
    if isinstance(target, Factory):
        return target.target(first=first, steps=steps[-1] if isinstance(steps, Sequence) else steps)
    return parse_target(target, first, steps, vocabulary)
