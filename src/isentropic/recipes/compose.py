"""From names to a recipe that is checked: any component replaced by name, impossible ones refused. No torch."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from numbers import Integral, Real
from typing import Any, Unpack

from ..control.names import choose
from ..control.targets import parse_target
from .catalogue import DEFAULT, RECIPES
from .changes import Changes
from .custom import NAMES, Factory, load, resolve
from .knobs import FIELD_KNOBS, all_knobs, build_thermostat, knob_range, owner, readers
from .recipe import Recipe
from .stages import NO_KNOB, OBJECTIVES, PENALTIES, REDUCTIONS, STAGES, WITHOUT_KNOB, Bounds, Component, number

# What means nothing without a knob.
_OF_KNOB = ("target", "every", "initial_readings", "knob_low", "knob_high", "knob_start")
# Names that no constant may have.
_TAKEN = frozenset(f.name for f in fields(Recipe)).union(*NAMES.values())
MOST_REDRAWN = 0.5  # entropy is read from the rest
_DEFAULT_COEF = Recipe("", "").penalty_coef


def load_recipe(text: str) -> Recipe:
    """A recipe by its name, or one of your own at ``file.py:NAME`` or ``package.module:NAME``.

    Raises:
        ValueError: an unknown name; nothing, or no recipe, at that place; a composition that cannot work.

    Example:
        >>> load_recipe("dapo").clip_high
        0.28
    """
    if ":" not in text and not text.endswith(".py"):
        choose("recipe", text, RECIPES)
        return RECIPES[text]
    recipe = load(text, "recipe")
    if not isinstance(recipe, Recipe):
        raise ValueError(
            f"recipe {text!r} must be a Recipe, got {type(recipe).__name__}; "
            'assign one, for example compose("loop", shaping=my_function)'
        )
    return check(recipe)


def compose(recipe: str | Recipe, **changes: Unpack[Changes]) -> Recipe:
    """A recipe by name with components and numbers replaced, checked.

    A knob brings the shaping it acts through (``zeta`` brings centred REPO-R if the recipe shapes nothing). A knob that
    is named without a controller is steered by that of the default recipe, and if the recipe had no knob also to the
    default's target, as often.

    Args:
        recipe: a name in :data:`RECIPES`, ``file.py:NAME``, ``package.module:NAME``, or a recipe.
        **changes: fields of :class:`Recipe`, or constants of its components by their own names; ``None`` leaves a field
            as it is. A component, a controller or a target may be yours: a function, an object, or the place of one.

    Raises:
        ValueError: an unknown name, or a composition that cannot work, by name.

    Example:
        >>> compose("loop", knob="zeta", target="75%").shaping
        'repo_r'
        >>> compose("clip-cov", cov_low=2.0).constants
        {'cov_low': 2.0}
        >>> compose("rloo", knob="clip_high")
        Traceback (most recent call last):
        ...
        ValueError: knob clip_high needs a clip, and objective reinforce has none; ...
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    knob = given.pop("knob", None)
    if knob == "none":
        recipe = replace(recipe, knob=None, controller="fixed")
    recipe = _with_fields(recipe, given, knob)
    if knob is not None and knob != "none":
        recipe = _with_knob_named(recipe, str(knob), given)
    composed = check(recipe)
    idle = [key for key in _OF_KNOB if key in given and composed.knob is None]
    if idle and knob != "none":
        raise ValueError(f"{idle[0]} has no effect without a knob under control; name one of {', '.join(all_knobs())}")
    cost = given.get("penalty_coef", _DEFAULT_COEF)
    if composed.penalty == "none" and cost != _DEFAULT_COEF:
        raise ValueError(
            f"penalty_coef has no effect without a penalty, got {cost}; name one of {', '.join(PENALTIES)}"
        )
    return composed


def _with_fields(recipe: Recipe, changes: dict[str, Any], knob: Any) -> Recipe:
    """The recipe with fields replaced, and then constants: those of the components that it now has."""
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in fields(Recipe)}
    known = {key: _checked(key, value, kinds[key]) for key, value in changes.items() if key in kinds}
    constants = {**known.pop("constants", {}), **{k: v for k, v in changes.items() if k not in kinds}}
    before = {name for component in recipe.components().values() for name in component.constants}
    recipe = replace(recipe, **known)
    if knob is not None and "shaping" not in known and owner(recipe, knob) is None and readers(str(knob)):
        recipe = replace(recipe, shaping=readers(str(knob))[0])
    names = [name for component in recipe.components().values() for name in component.constants]
    # A component that was replaced takes its constants with it.
    kept = {name: x for name, x in recipe.constants.items() if name in names or name not in before}
    for name in constants:
        if name not in names:
            if name in changes.get("constants", {}):
                choose("a constant of this recipe", name, names or ["none, for its components have none"])
            choose("a field of a recipe, or a constant of its components,", name, [*kinds, *names])
    return replace(recipe, constants={**kept, **{name: number(name, value) for name, value in constants.items()}})


def _checked(key: str, value: Any, kind: str) -> Any:
    """A change of one field as the field holds it, refused if it is of another type."""
    if key == "constants":
        if not isinstance(value, dict):
            raise ValueError(f"constants must be a table of numbers, got {value!r}; write {{cov_share = 1e-3}}")
        return value
    if key in STAGES or key in ("controller", "target"):
        if isinstance(value, str):
            return resolve(key, value)
        if not (callable(value) or isinstance(value, Component | Factory | tuple)):
            raise ValueError(f"{key} must be a name or a custom function, got {value!r}")
        return value
    numbers = {"float": Real, "int": Integral}
    if kind in numbers and isinstance(value, numbers[kind]) and not isinstance(value, bool):
        return number(key, value)
    if type(value).__name__ != kind:
        raise ValueError(f"{key} must be of type {kind}, got {value!r}")
    return value


def _with_knob_named(recipe: Recipe, knob: str, changes: dict[str, Any]) -> Recipe:
    if knob not in FIELD_KNOBS and owner(recipe, knob) is None:
        choose("knob", knob, all_knobs())
    if knob == recipe.knob:
        return recipe
    # Bounds and steps of the recipe's own knob mean nothing for another one.
    blank: dict[str, Any] = {"knob_low": None, "knob_high": None, "knob_start": None}
    blank |= {"controller": RECIPES[DEFAULT].controller}
    if recipe.knob is None:
        blank |= {"target": RECIPES[DEFAULT].target, "every": RECIPES[DEFAULT].every}
    return replace(recipe, knob=knob, **{key: value for key, value in blank.items() if key not in changes})


def check(recipe: Recipe, updates: int | None = None, samples: int | None = None) -> Recipe:
    """Refuse a composition that cannot work.

    Args:
        recipe: what to check.
        updates: optimizer steps per generated batch, if known.
        samples: samples per prompt, if known.

    Raises:
        ValueError: what is wrong, what is allowed, the remedy.
    """
    components = recipe.components()
    choose("reduction", recipe.reduction, REDUCTIONS)
    _check_clip(recipe)
    _check_constants(recipe)
    k = recipe.constants_of("baseline").get("pass_k")
    if k is not None and samples is not None and k >= samples:
        raise ValueError(
            f"pass_k must be below the samples per prompt, got {k:g} with {samples}: every draw would be the whole "
            "group, and no advantage would differ from 0; draw more samples, or lower pass_k by recipe_options"
        )
    if recipe.on_policy and updates is not None and updates != 1:
        raise ValueError(
            f"this recipe is strictly on-policy: one optimizer step per generated batch, got {updates}; "
            "make the batch one step, or choose a clipped recipe such as loop"
        )
    if recipe.on_policy or updates == 1:
        if components["baseline"].needs_logp:
            raise ValueError(
                f"baseline {recipe.baseline} needs the log-probabilities of sampling time, which engines leave out if "
                "every update is on-policy, got one optimizer step per generated batch; take several"
            )
        for stage in ("selection", "penalty"):
            if components[stage].needs_ratio:
                raise ValueError(
                    f"{getattr(recipe, stage)} has no effect if every update is on-policy, since nothing has moved; "
                    "take several optimizer steps per generated batch, or leave it out"
                )
    if not isinstance(recipe.controller, Factory) and recipe.controller.split(":")[0] == "fixed":
        pass
    elif recipe.knob is None:
        raise ValueError(f"controller {recipe.controller} has no knob to turn; name one of {', '.join(all_knobs())}")
    if not isinstance(recipe.target, Factory):
        parse_target(recipe.target, recipe.initial_readings, steps=1)
    if recipe.knob is not None:
        _check_knob(recipe, updates)
    return recipe


def _check_constants(recipe: Recipe) -> None:
    """Each constant is of one component alone, hides nothing that functions get by name, and is a number."""
    owners: dict[str, str] = {}
    for stage, component in recipe.components().items():
        for name in component.constants:
            if name in _TAKEN:
                raise ValueError(
                    f"constant {name} of the {stage} is also a field of a recipe or of a batch, or made of them; "
                    f"rename it, as in {name}_"
                )
            if name in owners:
                raise ValueError(
                    f"constant {name} must be of one component, got two, {owners[name]} and {stage}; rename one of them"
                )
            owners[name] = stage
    for name, value in recipe.constants.items():
        choose("a constant of this recipe", name, list(owners) or ["none, for its components have none"])
        number(name, value)
    for name in ("entropy_coef", "penalty_coef"):
        if not math.isfinite(getattr(recipe, name)):
            raise ValueError(f"{name} must be a finite number, got {getattr(recipe, name)}; 0 leaves its term out")
    if recipe.overlong_buffer < 0:
        raise ValueError(f"overlong_buffer must be >= 0 tokens, got {recipe.overlong_buffer}; 0 is off")
    _check_redraw(recipe)


def refuse_redraw(recipe: Recipe, engine: str) -> None:
    """Refuse a recipe that may draw a second batch, in an engine that draws one.

    Raises:
        ValueError: what was got, and what to do.

    Example:
        >>> refuse_redraw(RECIPES["aepo"], "the tabular engine")
        Traceback (most recent call last):
        ...
        ValueError: the tabular engine draws no second batch, got redraw=0 and knob=redraw; set redraw=0 and ...
    """
    if recipe.redraws:
        raise ValueError(
            f"{engine} draws no second batch, got redraw={recipe.redraw:g} and knob={recipe.knob}; set redraw=0 and "
            "another knob or none, use the TRL engine, or take distribution-centric, which needs no second batch"
        )


def _check_redraw(recipe: Recipe) -> None:
    shares = {"redraw": recipe.redraw}
    if recipe.knob == "redraw":
        shares |= {"knob_low": recipe.knob_low or 0.0, "knob_high": recipe.knob_high or 0.0}
    for name, share in shares.items():
        if not abs(share) <= MOST_REDRAWN:
            raise ValueError(
                f"{name} must be a share of the batch in [-{MOST_REDRAWN}, {MOST_REDRAWN}], got {share}; entropy is "
                "read from the rest, and 0 draws no second batch"
            )
    if not 0 < recipe.redraw_low < 1 < recipe.redraw_high < math.inf:
        raise ValueError(
            "redraw_low must be in (0, 1) and redraw_high above 1, got "
            f"{recipe.redraw_low} and {recipe.redraw_high}; they scale the sampling temperature"
        )


def _check_clip(recipe: Recipe) -> None:
    for name in ("clip_low", "clip_high"):
        if not getattr(recipe, name) > 0:
            raise ValueError(f"{name} must be > 0, got {getattr(recipe, name)}; it is the distance of the bound from 1")
    bounds = recipe.component("bounds")
    if not isinstance(bounds, Bounds):
        return
    if bounds.below_one and recipe.clip_low >= 1:
        raise ValueError(
            f"clip_low must be < 1 with {recipe.bounds} bounds, got {recipe.clip_low}; a ratio is never negative"
        )
    allowed = bounds.objectives
    if allowed is not None and isinstance(recipe.objective, str) and recipe.objective not in allowed:
        raise ValueError(
            f"bounds {recipe.bounds} need an objective that clips single tokens, got {recipe.objective}; "
            f"use {' or '.join(allowed)}"
        )


def _check_knob(recipe: Recipe, updates: int | None) -> None:
    name = str(recipe.knob)
    if name in FIELD_KNOBS:
        needs = FIELD_KNOBS[name].needs
    else:
        component = owner(recipe, name)
        if component is None:
            choose("knob", name, all_knobs())
            raise ValueError(
                f"knob {name} needs a shaping that it scales, got shaping {recipe.shaping}; leave shaping out"
            )
        if component.stage in WITHOUT_KNOB:
            raise ValueError(f"knob {name} is a number of the {component.stage}, which can have none: {NO_KNOB}")
        needs = component.knobs[name].needs if name in component.knobs else None
    free = ", ".join(sorted(key for key, knob in all_knobs().items() if knob.needs is None))
    if needs == "clip" and not recipe.clips:
        clips = ", ".join(sorted(key for key, objective in OBJECTIVES.items() if objective.clips))
        raise ValueError(
            f"knob {name} needs a clip, and objective {recipe.objective} has none; use {clips}, or a knob of {free}"
        )
    if needs == "clip" and (recipe.on_policy or updates == 1):
        raise ValueError(
            f"knob {name} has no effect if every update is on-policy, since no ratio leaves 1; "
            f"take several optimizer steps per generated batch, or a knob of {free}"
        )
    if needs == "penalty" and recipe.penalty == "none":
        raise ValueError(
            f"knob {name} needs a penalty, got none; name one of {', '.join(PENALTIES)}, or a knob of {free}"
        )
    if needs == "clip":
        _check_clip_knob(recipe)
    build_thermostat(recipe, steps=1)


def _check_clip_knob(recipe: Recipe) -> None:
    span, bounds = knob_range(recipe), recipe.component("bounds")
    if span.low < 0:
        raise ValueError(f"knob_low of {recipe.knob} must be >= 0, got {span.low}; it is the distance from 1")
    if recipe.knob == "clip_low" and isinstance(bounds, Bounds) and bounds.below_one and span.high >= 1:
        raise ValueError(
            f"knob_high of clip_low must be < 1 with {recipe.bounds} bounds, got {span.high}; a ratio is never negative"
        )
