"""What verl loads in each of its processes: the recipes as a group of its command line, ``+isentropic=RECIPE``.

It holds data alone, and imports neither torch nor verl: the engine is imported where verl builds the actor's config.
"""

from __future__ import annotations

from typing import Any

from ..recipes import RECIPES, Recipe

ESTIMATORS: dict[str, tuple[str, bool | None]] = {
    "mean_std": ("grpo", True),
    "mean": ("grpo", False),
    "leave_one_out": ("rloo", None),
}
AGG_MODES = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}
MONITOR = "monitor"


def group_entry(recipe: Recipe | None, name: str | None) -> dict[str, Any]:
    """What ``+isentropic=NAME`` sets in verl's config.

    Example:
        >>> entry = group_entry(RECIPES["repo-r-loop"], "repo-r-loop")
        >>> entry["algorithm"], entry["actor_rollout_ref"]["actor"]["loss_agg_mode"]
        ({'adv_estimator': 'rloo'}, 'token-mean')
    """
    policy_loss = {
        "_target_": "isentropic.engines.verl.PolicyLoss",
        "recipe": name,
        "knob": None,
        "controller": None,
        "target": None,
        "recipe_options": None,
        "folder": "${trainer.default_local_dir}/isentropic",
        "adv_estimator": "${algorithm.adv_estimator}",
        "norm_adv_by_std": "${algorithm.norm_adv_by_std_in_grpo}",
        "batch_size": "${data.train_batch_size}",
    }
    actor: dict[str, Any] = {"policy_loss": policy_loss, "calculate_entropy": True}
    algorithm: dict[str, Any] = {}
    entry: dict[str, Any] = {"actor_rollout_ref": {"actor": actor}}
    if recipe is None:
        return entry
    actor["loss_agg_mode"] = AGG_MODES[recipe.reduction]
    policy_loss["loss_mode"] = "isentropic"
    if isinstance(recipe.baseline, str) and recipe.baseline in ESTIMATORS:
        estimator, norm = ESTIMATORS[recipe.baseline]
        entry["algorithm"] = algorithm
        algorithm["adv_estimator"] = estimator
        if norm is not None:
            algorithm["norm_adv_by_std_in_grpo"] = norm
    return entry


def register() -> None:
    """Store every recipe as ``isentropic=NAME``, and ``isentropic=monitor``, which changes nothing and reads."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name, recipe in {MONITOR: None, **RECIPES}.items():
        named = None if recipe is None else name
        store.store(group="isentropic", name=name, node=group_entry(recipe, named), package="_global_")
