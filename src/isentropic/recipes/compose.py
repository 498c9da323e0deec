"""Named algorithms as compositions: baseline × selection × shaping × objective × penalty × reduction, and one knob.

A recipe is data (:mod:`isentropic.recipes.parts`), and ``RECIPES`` is the whole catalogue (:mod:`isentropic.recipes.catalogue`);
``compose`` changes any part by name and refuses what cannot work; ``advantages``, ``loss`` and ``build_thermostat`` run
it in a hand-written loop, and an engine reads the same fields. Importing this room needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..control.controllers import Range, parse_controller
from ..control.targets import parse_target
from ..control.thermostat import Thermostat, thermostat
from .catalogue import RECIPES
from .parts import (
    BASELINES,
    BOUNDS,
    BY_TOKEN,
    CONSTANTS,
    NEEDS_RATIO,
    OBJECTIVES,
    PENALTIES,
    REDUCTIONS,
    SELECTIONS,
    SHAPINGS,
    SIGNATURES,
    Recipe,
    check_part,
    choose,
    load,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..losses.reduce import SumCount
    from ..types import TokenBatch, TokenFacts

__all__ = [
    "BASELINES",
    "BOUNDS",
    "CONSTANTS",
    "KNOBS",
    "OBJECTIVES",
    "PENALTIES",
    "RECIPES",
    "REDUCTIONS",
    "SELECTIONS",
    "SHAPINGS",
    "Knob",
    "Recipe",
    "advantages",
    "build_thermostat",
    "check",
    "compose",
    "knob_range",
    "load_recipe",
    "loss",
    "per_token",
    "select",
    "shape",
    "with_knob",
]


class Knob(NamedTuple):
    """One number that a controller may turn.

    Attributes:
        range: its range on a recipe.
        shapings: those that read it, the one that it brings first; none where it acts elsewhere.
        needs: ``clip`` or ``penalty``, where it acts through one.
        source: where it is from.
    """

    range: Callable[[Recipe], Range]
    shapings: tuple[str, ...]
    needs: str | None
    source: str


def _scaled(name: str, sign: int) -> Callable[[Recipe], Range]:
    """A clip bound may go to a quarter and to four times where the recipe puts it."""

    def range_of(recipe: Recipe) -> Range:
        start = getattr(recipe, name)
        high = min(4 * start, 0.95) if name == "clip_low" and recipe.bounds == "additive" else 4 * start
        return Range(start, start / 4, high, start / 4, sign)

    return range_of


def _zeta_range(recipe: Recipe) -> Range:
    if recipe.shaping in ("repo_d", "repo_d_token"):
        return Range(recipe.zeta or 1.0, 0.0, 64.0, 0.01)
    if recipe.shaping == "repo_r":
        return Range(recipe.zeta, -1.0, 1.0, 1e-3)
    return Range(recipe.zeta or 1e-3, -0.05, 0.05, 1e-4)


def _coefficient(recipe: Recipe) -> Range:
    return Range(recipe.penalty_coef, 0.0, 4 * recipe.penalty_coef or 1.0)


KNOBS: dict[str, Knob] = {
    "clip_high": Knob(_scaled("clip_high", 1), (), "clip", "ADAPO arXiv:2603.11682 [paper: direction; range ours]"),
    "clip_low": Knob(
        _scaled("clip_low", -1), (), "clip", "arXiv:2509.26114: a tighter low clip raises entropy [range ours]"
    ),
    "beta": Knob(lambda r: Range(r.beta, -1.0, 1.0, 1e-3), ("repo",), None, "A − βL of arXiv:2603.11682 [range ours]"),
    "zeta": Knob(
        _zeta_range,
        ("repo_r", "repo_r_raw", "repo_r_positive", "repo_d", "repo_d_token"),
        None,
        "REPO, arXiv:2603.11682; raw ±[1e-4, 0.05] [paper], centred ±1 [ours]",
    ),
    "alpha": Knob(
        lambda r: Range(r.alpha, -1.0, 1.0, 1e-3, -1, rest=0.0),
        ("sign_weight",),
        None,
        "weights 1±α by the sign of A, EntroPIC arXiv:2511.15248 [range ours]",
    ),
    "reject": Knob(
        lambda r: Range(r.reject, -1.0, 1.0, 1e-3, rest=0.0),
        ("one_sided",),
        None,
        "1 drops A>0, −1 drops A<0, Entrocraft arXiv:2604.26326 [between: ours]",
    ),
    "boost": Knob(
        lambda r: Range(r.boost, 1.0, 1.5, 1.0, rest=1.0),
        ("surprisal_boost",),
        None,
        "weight of rare rewarded tokens, STARE arXiv:2606.19236",
    ),
    "entropy_coef": Knob(
        lambda r: Range(r.entropy_coef, 0.0, 0.1, 1e-4),
        (),
        None,
        "loss − c·H, under the recipe's reduction [range ours]",
    ),
    "penalty_coef": Knob(
        _coefficient,
        (),
        "penalty",
        "coefficient of the recipe's penalty, up to four times where it puts it [range ours]",
    ),
}


def load_recipe(text: str) -> Recipe:
    """A recipe by its name, or one of your own at ``file.py:NAME`` or ``package.module:NAME``.

    Raises:
        ValueError: an unknown name; nothing, or no recipe, at that place; a composition that cannot work.

    Example:
        >>> load_recipe("dapo").clip_high
        0.28
    """
    if ":" not in text:
        choose("recipe", text, RECIPES)
        return RECIPES[text]
    found = load(text, "recipe")
    if not isinstance(found, Recipe):
        raise ValueError(
            f"recipe {text!r} must be a Recipe, got {type(found).__name__}; "
            'assign one, for example compose("loop", shaping=my_function)'
        )
    return check(found)


def _checked_change(key: str, value: Any, kind: str, recipe: Recipe) -> Any:
    """A change of one field as the field holds it, refused where it is of another type."""
    if key == "constants":
        numbers = isinstance(value, dict) and all(type(x) in (int, float) for x in value.values())
        if not numbers:
            raise ValueError(f"constants must be a table of numbers, got {value!r}; write {{cov_share = 1e-3}}")
        return {**recipe.constants, **value}
    if key in SIGNATURES:
        if isinstance(value, str) and ":" in value:
            value = load(value, key)
        if not (isinstance(value, str) or callable(value)):
            raise ValueError(f"{key} must be a name or a function of yours, got {value!r}")
        return value
    allowed = ("int", "float") if kind == "float" else (kind,)
    if type(value).__name__ not in allowed:
        raise ValueError(f"{key} must be of type {kind}, got {value!r}")
    return value


def compose(recipe: str | Recipe, **changes: Any) -> Recipe:
    """A recipe by name with parts replaced, checked.

    A knob brings the shaping it acts through (``zeta`` brings centred REPO-R where the recipe shapes nothing), and a
    knob named without a controller is steered by ``pi``.

    Args:
        recipe: a name in :data:`RECIPES`, ``file.py:NAME``, ``package.module:NAME``, or a recipe.
        **changes: fields of :class:`Recipe`; ``None`` leaves a field as it is. A part may be a function of yours, or
            the place of one; ``constants`` are added to the recipe's own.

    Raises:
        ValueError: an unknown name, or a composition that cannot work, by name.

    Example:
        >>> compose("loop", knob="zeta", target="75%").shaping
        'repo_r'
        >>> compose("rloo", knob="clip_high")
        Traceback (most recent call last):
        ...
        ValueError: knob clip_high needs a clip, and objective reinforce has none; ...
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    changes = {key: value for key, value in changes.items() if value is not None}
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in fields(Recipe)}
    for key, value in changes.items():
        choose("a field of a recipe", key, kinds)
        changes[key] = _checked_change(key, value, kinds[key], recipe)
    knob = changes.get("knob")
    if knob is not None and knob != "none":
        choose("knob", knob, KNOBS)
        if knob != recipe.knob:
            # Bounds and steps of the recipe's own knob mean nothing for another one.
            recipe = replace(recipe, knob_low=None, knob_high=None, knob_start=None, controller="pi")
        wanted = KNOBS[knob].shapings
        if wanted and "shaping" not in changes and not _reads(recipe.shaping, wanted):
            changes["shaping"] = wanted[0]
    elif knob == "none":
        changes["knob"] = None
        recipe = replace(recipe, knob=None, controller="fixed")
        changes = {key: value for key, value in changes.items() if key != "knob"}
    made = check(replace(recipe, **changes))
    idle = [key for key in ("target", "every", "initial_readings") if key in changes and made.knob is None]
    if idle and knob != "none":
        raise ValueError(f"{idle[0]} has no effect without a knob under control; name one of {', '.join(KNOBS)}")
    return made


def _reads(shaping: Any, wanted: tuple[str, ...]) -> bool:
    """Whether a shaping reads the knob; a function of yours is believed."""
    return not isinstance(shaping, str) or shaping in wanted


def check(recipe: Recipe, updates: int | None = None) -> Recipe:
    """Refuse a composition that cannot work.

    Args:
        recipe: what to check.
        updates: optimizer steps per generated batch, where known.

    Raises:
        ValueError: what is wrong, what is allowed, the remedy.
    """
    parts = {
        "baseline": BASELINES,
        "selection": SELECTIONS,
        "shaping": SHAPINGS,
        "objective": OBJECTIVES,
        "penalty": PENALTIES,
    }
    for what, allowed in parts.items():
        check_part(what, getattr(recipe, what), allowed)
    choose("reduction", recipe.reduction, REDUCTIONS)
    _check_clip(recipe)
    known = [name for part in recipe.parts() for name in recipe.constants_of(part)]
    for name in recipe.constants:
        if not any(callable(part) for part in recipe.parts()):
            choose("a constant of this recipe", name, known or ["none, for its parts have none"])
    if recipe.on_policy and updates is not None and updates != 1:
        raise ValueError(
            f"this recipe is strictly on-policy: one optimizer step a generated batch, got {updates}; "
            "make the batch one step, or choose a clipped recipe such as loop"
        )
    if recipe.on_policy or updates == 1:
        for part in (recipe.selection, recipe.penalty):
            if part in NEEDS_RATIO:
                raise ValueError(
                    f"{part} has no effect where every update is on-policy, since nothing has moved; "
                    "take several optimizer steps a generated batch, or leave it out"
                )
    if recipe.controller.split(":")[0] != "fixed" and recipe.knob is None:
        raise ValueError(f"controller {recipe.controller} has no knob to turn; name one of {', '.join(KNOBS)}")
    parse_target(recipe.target, recipe.initial_readings, steps=1)
    if recipe.knob is not None:
        _check_knob(recipe, updates)
    return recipe


def _check_clip(recipe: Recipe) -> None:
    choose("bounds", recipe.bounds, BOUNDS)
    for name in ("clip_low", "clip_high"):
        if not getattr(recipe, name) > 0:
            raise ValueError(f"{name} must be > 0, got {getattr(recipe, name)}; it is the distance of the bound from 1")
    if recipe.bounds in ("additive", "linear", "balanced") and recipe.clip_low >= 1:
        raise ValueError(
            f"clip_low must be < 1 with {recipe.bounds} bounds, got {recipe.clip_low}; a ratio is never negative"
        )
    allowed = BY_TOKEN.get(recipe.bounds)
    if allowed and isinstance(recipe.objective, str) and recipe.objective not in allowed:
        raise ValueError(
            f"bounds {recipe.bounds} need an objective that clips single tokens, got {recipe.objective}; "
            f"use {' or '.join(allowed)}"
        )


def _check_knob(recipe: Recipe, updates: int | None) -> None:
    name = str(recipe.knob)
    choose("knob", name, KNOBS)
    knob, free = KNOBS[name], ", ".join(sorted(k for k, knob in KNOBS.items() if knob.needs is None))
    if knob.needs == "clip" and isinstance(recipe.objective, str) and not OBJECTIVES[recipe.objective]:
        clips = ", ".join(sorted(k for k, clip in OBJECTIVES.items() if clip))
        raise ValueError(
            f"knob {name} needs a clip, and objective {recipe.objective} has none; use {clips}, or a knob of {free}"
        )
    if knob.needs == "clip" and (recipe.on_policy or updates == 1):
        raise ValueError(
            f"knob {name} has no effect where every update is on-policy, since no ratio leaves 1; "
            f"take several optimizer steps a generated batch, or a knob of {free}"
        )
    if knob.needs == "penalty" and recipe.penalty == "none":
        raise ValueError(
            f"knob {name} needs a penalty, got none; name one of {', '.join(PENALTIES)}, or a knob of {free}"
        )
    if knob.shapings and not _reads(recipe.shaping, knob.shapings):
        raise ValueError(f"knob {name} needs a shaping that it scales, got shaping {recipe.shaping}; leave shaping out")
    parse_controller(recipe.controller, knob_range(recipe))


def knob_range(recipe: Recipe) -> Range:
    """The range of the recipe's knob: the knob's own, with what the recipe overrides.

    Raises:
        ValueError: no knob, or bounds that exclude one another.

    Example:
        >>> knob_range(RECIPES["adapo"])
        Range(start=0.28, low=0.07, high=1.12, least=0.07, sign=1, rest=None)
    """
    choose("knob", recipe.knob or "none", KNOBS)
    span = KNOBS[str(recipe.knob)].range(recipe)
    low = span.low if recipe.knob_low is None else recipe.knob_low
    high = span.high if recipe.knob_high is None else recipe.knob_high
    start = min(max(span.start, low), high) if recipe.knob_start is None else recipe.knob_start
    return span._replace(start=start, low=low, high=high, least=min(span.least, high)).check()


def build_thermostat(recipe: Recipe, steps: int | None = None) -> Thermostat | None:
    """The recipe's controller and target, joined; ``None`` where nothing is under control.

    Args:
        recipe: composed and checked.
        steps: optimizer steps of the run, which a target that goes over the whole of it needs.

    Raises:
        ValueError: such a target without ``steps``.

    Example:
        >>> t = build_thermostat(compose("adapo", target="0.5"))
        >>> t.init().value
        0.28
    """
    if recipe.knob is None:
        return None
    controller = parse_controller(recipe.controller, knob_range(recipe))
    return thermostat(controller, parse_target(recipe.target, recipe.initial_readings, steps), recipe.every)


def with_knob(recipe: Recipe, value: float | None) -> Recipe:
    """The recipe with its knob at a value, unchanged where it has none or the value is ``None``.

    Example:
        >>> with_knob(compose("adapo"), 0.5).clip_high
        0.5
    """
    if recipe.knob is None or value is None:
        return recipe
    turned: dict[str, Any] = {recipe.knob: value}
    return replace(recipe, **turned)


def advantages(recipe: Recipe, rewards: Tensor) -> Tensor:
    """Rewards ``[p g]`` to advantages ``[b]`` by the recipe's baseline."""
    from ..losses.advantages import BASELINES as functions

    if not isinstance(recipe.baseline, str):
        return recipe.baseline(rewards)
    options: dict[str, Any] = {"k": recipe.quantile} if recipe.baseline == "quantile" else {}
    return functions[recipe.baseline](rewards, **options)


def shape(recipe: Recipe, batch: TokenBatch) -> Tensor:
    """Advantages after the recipe's shaping, from detached log-probs and entropies of the current policy.

    Returns:
        ``[b t]``, or ``batch.adv`` itself where the recipe shapes nothing.

    Raises:
        ValueError: a centred shaping without entropies.
    """
    from .terms import SHAPINGS as functions
    from .terms import constant, term

    return batch.adv if recipe.shaping == "none" else term(functions, recipe.shaping)(constant(batch), recipe)


def select(recipe: Recipe, batch: TokenBatch) -> Tensor | None:
    """The factor of each token's advantage by the recipe's selection, ``[b t]``, or ``None`` where all tokens count.

    Means, ranks and shares are over the masked tokens of the batch; a random choice takes the global generator.

    Raises:
        ValueError: a selection that looks at entropies, without them.
    """
    from .terms import SELECTIONS as functions
    from .terms import constant, term

    return None if recipe.selection == "none" else term(functions, recipe.selection)(constant(batch), recipe)


def per_token(
    recipe: Recipe, batch: TokenBatch, chosen: Tensor | None = None, penalised: bool = True
) -> tuple[Tensor, TokenFacts]:
    """The recipe's loss by token, before its reduction and without an entropy bonus.

    Args:
        recipe: composed and checked, with its knob in force.
        batch: token facts.
        chosen: the factors of :func:`select`, where they were worked out before; ``None`` works them out.
        penalised: add the recipe's penalty.

    Returns:
        The loss ``[b t]``, and the objective's facts.

    Raises:
        ValueError: a part that reads what the batch does not hold.
    """
    from .terms import OBJECTIVES as functions
    from .terms import penalty, selected, term

    chosen = select(recipe, batch) if chosen is None else chosen
    shaped = batch._replace(adv=selected(shape(recipe, batch), chosen))
    per_token, facts = term(functions, recipe.objective)(shaped, recipe)
    if penalised and recipe.penalty != "none":
        per_token = per_token + recipe.penalty_coef * penalty(recipe, batch)
    return per_token, facts


def loss(
    recipe: Recipe, batch: TokenBatch, knob: float | None = None, length: int | None = None
) -> tuple[SumCount, TokenFacts]:
    """The recipe's loss as (sum, count), to be added over micro-batches and ranks before the division.

    Args:
        recipe: composed and checked.
        batch: token facts; ``entropy`` is needed for centred shapings, some selections and the entropy bonus,
            ``logp_rows`` where ``recipe.needs_rows``.
        knob: value from the thermostat; ``None`` leaves the recipe's own number.
        length: generation limit in tokens, for the constant reduction; default ``t``.

    Returns:
        (sum, count) whose quotient is minimised, and the objective's per-token facts.

    Raises:
        ValueError: a part that reads what the batch does not hold.
    """
    from ..losses import reduce

    recipe = with_knob(recipe, knob)
    by_token, facts = per_token(recipe, batch)
    if recipe.entropy_coef:
        if batch.entropy is None:
            raise ValueError("an entropy bonus needs batch.entropy, got None; pass the rows' entropies, with gradient")
        by_token = by_token - recipe.entropy_coef * batch.entropy
    sums: dict[str, Callable[[], SumCount]] = {
        "token": lambda: reduce.token(by_token, batch.mask),
        "sequence": lambda: reduce.sequence(by_token, batch.mask),
        "constant": lambda: reduce.constant(by_token, batch.mask, length or by_token.shape[1]),
    }
    return sums[recipe.reduction](), facts
