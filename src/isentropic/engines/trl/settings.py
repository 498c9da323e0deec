"""Between a recipe and TRL's settings: the fields that a recipe sets, and the recipe of a plain GRPOConfig."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from numbers import Real
from typing import Any

from ...recipes import RECIPES, Recipe, compose, load_recipe
from ...recipes.catalogue import DEFAULT
from ..rewrite import lower_width
from .compat import bypassed

logger = logging.getLogger("isentropic")
_LOSS_TYPES = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}
# A native loss type as a recipe: its objective and its reduction.
_NATIVE = {
    "grpo": ("clipped", "sequence"),
    "bnpo": ("clipped", "token"),
    "dapo": ("clipped", "token"),
    "dr_grpo": ("clipped", "constant"),
    "luspo": ("clipped", "sequence"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"),
    "vespo": ("importance", "token"),
}


def clip_settings(recipe: Recipe) -> dict[str, float]:
    """TRL's clip fields: bounds 1 − epsilon and 1 + epsilon_high, except that CISPO's epsilon_high is the ceiling."""
    return {"epsilon": lower_width(recipe), "epsilon_high": recipe.clip_high + (recipe.objective == "cispo")}


def native_objective(recipe: Recipe) -> bool:
    """Whether TRL has the recipe's objective, bounds and reduction in one of its own losses.

    Example:
        >>> from isentropic.recipes import RECIPES
        >>> native_objective(RECIPES["dapo"]), native_objective(RECIPES["dcpo"])
        (True, False)
    """
    if recipe.objective == "cispo":
        return recipe.bounds in ("additive", "reciprocal") and recipe.reduction == "token"
    clips = recipe.objective in ("clipped", "sequence_clipped") and recipe.bounds in ("additive", "reciprocal")
    return clips or recipe.objective == "reinforce"


def is_native(args: Any, recipe: Recipe) -> bool:
    """Whether a trainer's loss is TRL's own: always, if the config names no recipe."""
    return getattr(args, "recipe", None) is None or native_objective(recipe)


def settings(recipe: Recipe) -> dict[str, Any]:
    """The GRPOConfig fields that a recipe decides.

    Example:
        >>> from isentropic.recipes import RECIPES
        >>> settings(RECIPES["gspo"])["importance_sampling_level"]
        'sequence'
    """
    native = native_objective(recipe)
    by_sequence = native and recipe.objective == "sequence_clipped" and recipe.plain
    return {
        "loss_type": "cispo" if native and recipe.objective == "cispo" else _LOSS_TYPES[recipe.reduction],
        "scale_rewards": "group" if recipe.baseline == "mean_std" else "none",
        "importance_sampling_level": "sequence" if by_sequence else "token",
        **clip_settings(recipe),
    }


# Without a recipe TRL's own loss is trained, which reads none of these.
_OF_A_RECIPE = {
    "baseline",
    "selection",
    "bounds",
    "objective",
    "reduction",
    "on_policy",
    "clip_low",
    "clip_high",
    "overlong_buffer",
}


def _options(given: Any) -> dict[str, Any]:
    """recipe_options as a dict, from a dict or its JSON.

    Raises:
        ValueError: anything else.
    """
    problem = ""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            problem = f", which is not JSON ({error})"
    if not isinstance(given, dict):
        raise ValueError(
            f"recipe_options must be a dict or a JSON object, got {given!r}{problem}; "
            """write '{"clip_high": 0.3}'"""
        )
    return dict(given)


def resolve_recipe(args: Any) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that a config means, and the settings it takes over (none if no recipe is named).

    A target or a controller without a knob is given that of the default recipe, unless the recipe shapes advantages.

    Raises:
        ValueError: an unknown name or option, or a composition that cannot work.
    """
    options = getattr(args, "recipe_options", None) or {}
    options = _options(options)
    changes = {name: getattr(args, name, None) for name in ("knob", "controller", "target")}
    twice = [name for name in changes if name in options]
    if twice:
        raise ValueError(f"recipe_options has {', '.join(twice)}, which the config has a field for; set that instead")
    if isinstance(changes["target"], Real) and not isinstance(changes["target"], bool):
        changes["target"] = repr(float(changes["target"]))
    if changes["controller"] == "none":
        changes |= {"knob": "none", "controller": None}
    name = getattr(args, "recipe", None)
    if not isinstance(name, str | Recipe | None):
        raise ValueError(f"recipe must be a name, a FILE.py:NAME, or a Recipe, got {name!r}; see `isentropic recipes`")
    start = _as_recipe(args) if name is None else load_recipe(name) if isinstance(name, str) else name
    asked = any(changes[key] is not None for key in ("target", "controller")) and changes["knob"] is None
    if asked and start.knob is None and start.shaping == "none" and "shaping" not in options:
        changes["knob"] = RECIPES[DEFAULT].knob
    if name is not None:
        recipe = compose(start, **changes, **options)
        _check_effects(args, recipe)
        return recipe, settings(recipe)
    fixed = _OF_A_RECIPE & set(options)
    if fixed:
        raise ValueError(
            f"recipe_options {', '.join(sorted(fixed))} need a recipe to change, got recipe=None; name one"
        )
    return compose(start, **changes, **options), {}


def check_switches(args: Any) -> None:
    """Refuse switches that are not True or False, and a bound on entropy that the start of a run is above.

    Raises:
        ValueError: what was got, what is allowed.
    """
    for name in ("audit", "report"):
        if not isinstance(getattr(args, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(args, name)!r}; False switches it off")
    bound = args.stop_above
    if bound is not None and not (bound == 0 or bound > 1):
        raise ValueError(f"stop_above must be above 1, or 0 for never, got {bound!r}; 3 is usual")


def _general(args: Any, recipe: Recipe) -> bool:
    """On the general path TRL's loss sees a ratio of 1: what TRL computes from the ratio beside it would be lost."""
    return not native_objective(recipe)


def _hides_old_logps(args: Any, recipe: Recipe) -> bool:
    """The old log-probs that TRL's loss reads are not those of sampling time."""
    return _general(args, recipe) or (recipe.objective == "sequence_clipped" and not recipe.plain)


def _replaces_advantages(args: Any, recipe: Recipe) -> bool:
    return recipe.baseline not in ("mean", "mean_std") or recipe.overlong_buffer > 0


def _always(args: Any, recipe: Recipe) -> bool:
    return True


_TAU = "set tau_positive and tau_negative in recipe_options"
_VESPO = "leave the recipe out to train with TRL's vespo"
# Fields of TRL that a recipe would leave without effect: when, why, and the remedy. A field at its default is no claim.
WITHOUT_EFFECT: dict[str, tuple[Callable[[Any, Recipe], bool], str, str]] = {
    "delta": (_general, "objective {objective} with bounds {bounds}, which TRL's loss does not have", "switch it off"),
    "off_policy_mask_threshold": (
        _hides_old_logps,
        "objective {objective}, which TRL's loss gets by its gradient",
        "switch it off",
    ),
    "multi_objective_aggregation": (
        _replaces_advantages,
        "baseline {baseline}, which makes advantages of the summed rewards",
        "leave it out, or take the baseline mean or mean_std",
    ),
    "sapo_temperature_pos": (_always, "a recipe, which sets the loss", _TAU),
    "sapo_temperature_neg": (_always, "a recipe, which sets the loss", _TAU),
    **{
        f"vespo_{name}": (_always, "a recipe, which sets the loss", _VESPO)
        for name in ("k_pos", "k_neg", "lambda_pos", "lambda_neg")
    },
}


def _check_effects(args: Any, recipe: Recipe) -> None:
    """Refuse fields of TRL that were set and would have no effect.

    Raises:
        ValueError: the field, why it has no effect, and the remedy.
    """
    default = {f.name: f.default for f in fields(args)}
    for name, (when, reason, remedy) in WITHOUT_EFFECT.items():
        if getattr(args, name, default.get(name)) != default.get(name) and when(args, recipe):
            why = reason.format(objective=recipe.objective, bounds=recipe.bounds, baseline=recipe.baseline)
            raise ValueError(f"{name}={getattr(args, name)!r} has no effect on {why}; {remedy}")
    if _general(args, recipe) and args.beta and args.use_bias_correction_kl:
        raise ValueError(
            f"use_bias_correction_kl has no effect on objective {recipe.objective} with bounds {recipe.bounds}, which "
            "TRL's loss does not have; set use_bias_correction_kl=False beside TRL's KL coefficient, its field beta"
        )


def _as_recipe(args: Any) -> Recipe:
    objective, reduction = _NATIVE.get(args.loss_type, ("importance", "token"))
    if args.importance_sampling_level == "sequence" and objective == "clipped":
        objective = "sequence_clipped"
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    listed = RECIPES.get(args.loss_type.replace("_", "-"))
    return Recipe(
        formula=f"TRL's {args.loss_type}",
        source="the trainer's own settings" + (f"; loss type of {listed.source}" if listed else ""),
        baseline="mean_std" if args.scale_rewards in ("group", "batch", True) else "mean",
        objective=objective,
        reduction=reduction,
        clip_low=args.epsilon,
        # A CISPO ceiling below 1 (TRL's own default is 0.2) scales every token down; it is not a width to start from.
        clip_high=max(high - 1, 1e-6) if objective == "cispo" else high,
    )


def adopt(args: Any, owned: dict[str, Any]) -> None:
    """Write a recipe's settings into a config, unless the user set them otherwise.

    Raises:
        ValueError: a field set by hand to a value that the recipe excludes.
    """
    default = {f.name: f.default for f in fields(args)}
    for name, value in owned.items():
        got = getattr(args, name)
        if got not in (default[name], value):
            hint = "set clip_low and clip_high in recipe_options" if "epsilon" in name else f"leave {name} out"
            raise ValueError(
                f"recipe {recipe_name(args.recipe)} sets {name}={value!r}, got {got!r}; {hint}, or leave the recipe out"
            )
        setattr(args, name, value)


def updates_per_batch(args: Any) -> int:
    """Optimizer steps that reuse one generated batch; 1 is strictly on-policy."""
    return max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)


def boundary(args: Any) -> int:
    """Optimizer steps between the moments at which both a step ends and a new batch is about to be generated."""
    every = args.steps_per_generation * args.num_iterations
    return math.lcm(every, args.gradient_accumulation_steps) // args.gradient_accumulation_steps


def round_save_steps(args: Any) -> None:
    """TRL does not save its generation buffer: a resume is exact only if a new batch is about to be generated."""
    period = boundary(args)
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "steps" or period == 1:
        return
    steps = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * max(args.max_steps, 0))
    rounded = max(1, math.ceil(steps / period)) * period
    if rounded != args.save_steps:
        logger.warning(
            "save_steps=%s is rounded up to %s, a multiple of the %s optimizer steps of a generated batch, so that a "
            "resumed run equals an uninterrupted one",
            args.save_steps,
            rounded,
            period,
        )
        args.save_steps = rounded


def refuse_two_bonuses(args: Any, recipe: Recipe) -> None:
    """Refuse an entropy bonus under control together with TRL's own.

    Raises:
        ValueError: both are on, and would add up.
    """
    if recipe.knob == "entropy_coef" and (args.use_adaptive_entropy or args.entropy_coef):
        raise ValueError(
            "knob entropy_coef and TRL's own entropy bonus are both on, and would add up; "
            "leave use_adaptive_entropy and entropy_coef out of the config"
        )


def refuse_bypass(kind: type, recipe: Recipe) -> None:
    """Refuse a trainer that replaces a step of TRL's in which entropy is read, or advantages are rewritten.

    Raises:
        ValueError: the method, and what it has to call.
    """
    watched = recipe.knob is None and recipe.plain
    if step := bypassed(kind, watched):
        watch = "" if watched or bypassed(kind, watched=True) else ", or only monitor, by controller='none'"
        raise ValueError(
            f"{step} replaces TRL's own, which entropy control works in, and never calls it: call "
            f"super().{step.rpartition('.')[2]} in it, or train with TRL's GRPOTrainer{watch}"
        )


def recipe_name(recipe: str | Recipe) -> str:
    """A recipe's name as it was given, else its formula."""
    return recipe if isinstance(recipe, str) else recipe.formula


def check_context(model: Any, prompt: int, completion: int) -> None:
    """Refuse a prompt that fills the model's context; warn once if a completion may leave it.

    Args:
        model: whose config may name ``max_position_embeddings``.
        prompt: tokens of the longest prompt.
        completion: tokens of a completion at most.

    Raises:
        ValueError: the lengths, the context, the remedy.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None or prompt + completion <= context:
        return
    if prompt >= context:
        raise ValueError(
            f"a prompt of {prompt} tokens fills the model's context of {context} tokens (max_position_embeddings); "
            "shorten the prompts, or drop the long ones"
        )
    warn_once(
        f"max_completion_length={completion} after a prompt exceeds the model's context of {context} tokens "
        "(max_position_embeddings): the end of a long completion is sampled outside it; lower max_completion_length"
    )


@cache
def warn_once(message: str) -> None:
    """Log a warning only the first time in a process."""
    logger.warning(message)


def vocabulary_of(model: Any) -> int | None:
    """The number of tokens that a model chooses from, if its config names it."""
    return getattr(model.config.get_text_config(), "vocab_size", None)
