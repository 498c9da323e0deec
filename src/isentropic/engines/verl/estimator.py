"""The baselines that verl does not have, as an advantage estimator of its own: ``algorithm.adv_estimator=isentropic``.

A recipe that needs it has verl import this file by ``actor_rollout_ref.model.external_lib``, in the process that makes
advantages too.
"""

from __future__ import annotations

from typing import Any

import torch

from ...recipes import Recipe, compose
from ...recipes.apply import advantages
from .compat import register_adv_est
from .plugin import OURS


def recipe_of(config: Any) -> Recipe:
    """The recipe whose baseline is meant by verl's ``algorithm``; nothing else of it is as configured.

    Raises:
        ValueError: it names none.
    """
    ours = config.get(OURS) if config is not None else None
    if not ours or not ours.get("recipe"):
        raise ValueError(
            "algorithm.adv_estimator=isentropic takes its baseline from a recipe, got none; add +isentropic=RECIPE"
        )
    options = dict(ours.get("recipe_options") or {})
    recipe = compose(ours["recipe"], baseline=options.get("baseline"))
    numbers = {**(options.get("constants") or {}), **options}
    names = recipe.component("baseline").constants
    return compose(recipe, **{name: numbers[name] for name in names if name in numbers})


def grouped(recipe: Recipe, scores: torch.Tensor, index: Any) -> torch.Tensor:
    """Advantages ``[b]`` of scores ``[b]`` by the recipe's baseline; groups may differ in size.

    Args:
        recipe: for its baseline.
        scores: ``[b]``.
        index: the group of each, b names.

    Example:
        >>> from isentropic.recipes import compose
        >>> grouped(compose("loop", baseline="mean"), torch.tensor([1.0, 5.0, 3.0, 5.0]), ["a", "b", "a", "b"])
        tensor([-1.,  0.,  1.,  0.])
    """
    members: dict[Any, list[int]] = {}
    for i, uid in enumerate(index):
        members.setdefault(uid, []).append(i)
    adv = torch.zeros_like(scores)
    for size in {len(rows) for rows in members.values()}:
        at = torch.tensor([rows for rows in members.values() if len(rows) == size], device=scores.device)
        adv[at.flatten()] = advantages(recipe, scores[at]).to(scores.dtype)
    return adv


@register_adv_est(OURS)
def estimate(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: Any = None, index: Any = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recipe's baseline on the summed rewards of each answer, at every token of it, ``[b t]`` twice."""
    with torch.no_grad():
        scores = token_level_rewards.sum(-1)
        adv = grouped(recipe_of(config), scores, range(len(scores)) if index is None else index)
        by_token = adv.unsqueeze(-1) * response_mask
    return by_token, by_token
