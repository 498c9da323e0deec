"""What verl loads in each of its processes: the recipes as a group of its command line, ``+isentropic=RECIPE``.

It holds data alone, and imports neither torch nor verl: the engine is imported where verl builds the actor's config.
"""

from __future__ import annotations

from typing import Any

from ...recipes import RECIPES, Recipe

ESTIMATORS: dict[str, tuple[str, bool | None]] = {
    "mean_std": ("grpo", True),
    "mean": ("grpo", False),
    "leave_one_out": ("rloo", None),
}
# Every other baseline is our own estimator, in a module that verl imports where advantages are computed.
OURS = "isentropic"
ESTIMATOR_MODULE = "isentropic.engines.verl.estimator"
AGG_MODES = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}
MONITOR = "monitor"


def estimator_of(recipe: Recipe) -> tuple[str, bool | None]:
    """verl's ``adv_estimator`` and ``norm_adv_by_std_in_grpo`` for the recipe's baseline; None if it has no effect.

    Example:
        >>> estimator_of(RECIPES["grpo"]), estimator_of(RECIPES["qae"])
        (('grpo', True), ('isentropic', None))
    """
    return ESTIMATORS.get(str(recipe.baseline), (OURS, None))


def group_entry(recipe: Recipe | None, name: str | None) -> dict[str, Any]:
    """What ``+isentropic=NAME`` sets in verl's config.

    Example:
        >>> entry = group_entry(RECIPES["repo-r-loop"], "repo-r-loop")
        >>> entry["algorithm"]["adv_estimator"], entry["actor_rollout_ref"]["actor"]["loss_agg_mode"]
        ('rloo', 'token-mean')
    """
    policy_loss = {
        "_target_": "isentropic.engines.verl.engine.PolicyLoss",
        "recipe": name,
        "knob": None,
        "controller": None,
        "target": None,
        "recipe_options": None,
        "folder": "${trainer.default_local_dir}/isentropic",
        "adv_estimator": "${algorithm.adv_estimator}",
        "norm_adv_by_std": "${algorithm.norm_adv_by_std_in_grpo}",
        "batch_size": "${data.train_batch_size}",
        "strategy": "${actor_rollout_ref.actor.strategy}",
        "external_lib": "${actor_rollout_ref.model.external_lib}",
    }
    actor: dict[str, Any] = {"policy_loss": policy_loss, "calculate_entropy": True}
    entry: dict[str, Any] = {"actor_rollout_ref": {"actor": actor}}
    if recipe is None:
        return entry
    actor["loss_agg_mode"] = AGG_MODES[recipe.reduction]
    if recipe.reduction == "constant":
        # verl would divide by the longest answer of each micro-batch, which is not a constant.
        actor["loss_scale_factor"] = "${data.max_response_length}"
    policy_loss["loss_mode"] = "isentropic"
    estimator, norm = estimator_of(recipe)
    algorithm: dict[str, Any] = {"adv_estimator": estimator}
    if norm is not None:
        algorithm["norm_adv_by_std_in_grpo"] = norm
    ours = "actor_rollout_ref.actor.policy_loss"
    algorithm[OURS] = {"recipe": f"${{{ours}.recipe}}", "recipe_options": f"${{{ours}.recipe_options}}"}
    if estimator == OURS:
        entry["actor_rollout_ref"]["model"] = {"external_lib": ESTIMATOR_MODULE}
    return {**entry, "algorithm": algorithm}


def register() -> None:
    """Store every recipe as ``isentropic=NAME``, and ``isentropic=monitor``, which changes nothing and reads."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name, recipe in {MONITOR: None, **RECIPES}.items():
        node = group_entry(recipe, None if recipe is None else name)
        store.store(group="isentropic", name=name, node=node, package="_global_")
