"""What a recipe asks of verl's settings: the recipe that a config means, and what is refused before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...recipes import Recipe, compose
from ...recipes.compose import refuse_redraw
from . import fallback
from .compat import BACKENDS
from .plugin import AGG_MODES, ESTIMATOR_MODULE, OURS, estimator_of

if TYPE_CHECKING:
    from .engine import PolicyLoss


def resolve(settings: PolicyLoss) -> Recipe:
    """The recipe that a config means.

    Raises:
        ValueError: an unknown name, a composition that cannot work, or one that verl's settings or workers exclude.
    """
    changes: dict[str, Any] = {
        "knob": settings.knob,
        "controller": settings.controller,
        "target": None if settings.target is None else str(settings.target),
    }
    options = dict(settings.recipe_options or {})
    if settings.recipe is None:
        if any(value is not None for value in changes.values()) or options:
            raise ValueError("knob, controller, target and recipe_options need a recipe; name one: +isentropic=NAME")
        if settings.strategy is not None and settings.strategy not in BACKENDS:
            raise ValueError(
                "monitor reads entropies from the engine, which is not wrapped here, got "
                f"actor_rollout_ref.actor.strategy={settings.strategy}; set it to {' or '.join(BACKENDS)}"
            )
        return Recipe(formula="verl's own loss", source="the actor's settings")
    if settings.controller == "none":
        changes |= {"knob": "none", "controller": None}
    recipe = compose(settings.recipe, **changes, **options)
    _check_verl(settings, recipe)
    return recipe


def _check_verl(settings: PolicyLoss, recipe: Recipe) -> None:
    if recipe.dynamic_sampling:
        raise ValueError(
            "dynamic_sampling is verl's own, got dynamic_sampling=True in recipe_options; set "
            "algorithm.filter_groups.enable=True instead"
        )
    if recipe.overlong_buffer:
        raise ValueError(
            f"the overlong penalty is verl's own, got overlong_buffer={recipe.overlong_buffer} in recipe_options; set "
            "reward.reward_manager.name=dapo and +reward.reward_kwargs.overlong_buffer_cfg instead"
        )
    refuse_redraw(recipe, "verl")
    if settings.strategy is not None and settings.strategy not in BACKENDS:
        fallback.check(recipe, settings.strategy)
    if settings.adv_estimator is not None:
        _check_estimator(settings, recipe)


def _check_estimator(settings: PolicyLoss, recipe: Recipe) -> None:
    estimator, by_std = estimator_of(recipe)
    if recipe.component("baseline").needs_logp:
        raise ValueError(
            f"baseline {recipe.baseline} needs the log-probabilities of sampling time, which verl's estimators do not "
            f"get, got recipe {settings.recipe}; use the TRL engine, or set baseline in recipe_options"
        )
    got = str(getattr(settings.adv_estimator, "value", settings.adv_estimator))
    if got != estimator or by_std not in (None, settings.norm_adv_by_std):
        norm = "" if by_std is None else f" algorithm.norm_adv_by_std_in_grpo={by_std}"
        raise ValueError(
            f"recipe {settings.recipe} needs algorithm.adv_estimator={estimator}{norm}, got adv_estimator={got} "
            f"norm_adv_by_std_in_grpo={settings.norm_adv_by_std}; leave them out of the command, or set them so"
        )
    libraries = settings.external_lib
    libraries = [libraries] if isinstance(libraries, str) else list(libraries or ())
    if estimator == OURS and ESTIMATOR_MODULE not in libraries:
        raise ValueError(
            f"baseline {recipe.baseline} is an estimator of isentropic's, which verl must be told to import, got "
            f"actor_rollout_ref.model.external_lib={settings.external_lib}; add {ESTIMATOR_MODULE} to it"
        )


def check_actor(actor: Any, recipe: Recipe, name: str) -> None:
    """Refuse settings of the actor that a recipe excludes.

    Raises:
        ValueError: what, got, remedy.
    """
    mode = AGG_MODES[recipe.reduction]
    if actor.loss_agg_mode != mode:
        raise ValueError(
            f"recipe {name} needs actor_rollout_ref.actor.loss_agg_mode={mode}, got {actor.loss_agg_mode}; "
            "leave it out, or set it so"
        )
    if actor.entropy_coeff:
        raise ValueError(
            f"recipe {name} sets the entropy bonus, got actor_rollout_ref.actor.entropy_coeff="
            f"{actor.entropy_coeff}; leave it out, or set entropy_coef in recipe_options"
        )
