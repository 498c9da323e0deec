"""verl's loss as it is, and what a recipe changes around it: mode, clip, reduction, and a penalty beside it."""

from __future__ import annotations

from typing import Any

import torch

from ...recipes import Recipe
from ...recipes.apply import penalty
from ...types import TokenBatch
from ..rewrite import lower_width
from .compat import Keys, aggregated, aligned, answers_of, holds, replaced
from .plugin import AGG_MODES

NO_ENTROPY = (
    "verl's engine delivered no entropy; set actor_rollout_ref.actor.calculate_entropy=True and leave "
    "actor_rollout_ref.actor.use_prefix_grouper out"
)
NO_OLD_ENTROPY = (
    "a component of this recipe reads the entropies of sampling time, which verl leaves out if it takes the sampler's "
    "log-probs for the old ones, got algorithm.rollout_correction.bypass_mode=True; set it to False"
)
NO_GROUPS = (
    "a component of this recipe reads reward or group_rate, which come from the keys uid and "
    f"{' or '.join(Keys.REWARDS)} of verl's data, got neither reward nor group; keep both in the batch that the actor "
    "trains on, or take another recipe"
)


def native_mode(recipe: Recipe) -> str | None:
    """The verl loss that is the recipe's objective, or None if it takes the general path.

    Example:
        >>> from isentropic.recipes import RECIPES
        >>> native_mode(RECIPES["dapo"]), native_mode(RECIPES["gspo"])
        ('vanilla', None)
    """
    modes = {"clipped": "vanilla", "cispo": "cispo"}
    known = isinstance(recipe.objective, str) and recipe.bounds in ("additive", "reciprocal")
    return modes.get(str(recipe.objective)) if known else None


def native_config(recipe: Recipe, config: Any) -> Any:
    """verl's actor config as the native loss reads it under a recipe with its knob in force."""
    return replaced(
        config,
        policy_loss=replaced(config.policy_loss, loss_mode=native_mode(recipe) or "vanilla"),
        clip_ratio_low=1.0 if recipe.objective == "cispo" else lower_width(recipe),
        clip_ratio_high=recipe.clip_high,
        loss_agg_mode=AGG_MODES[recipe.reduction],
        entropy_coeff=recipe.entropy_coef,
    )


def read_batch(output: dict[str, Any], data: Any) -> TokenBatch:
    """A micro-batch as token facts ``[b t]`` without gradients, in fp32.

    Args:
        output: the model's, as verl hands it to its loss.
        data: verl's micro-batch.

    Raises:
        RuntimeError: the engine delivered no entropy.
    """
    if output.get(Keys.ENTROPY) is None:
        raise RuntimeError(NO_ENTROPY)
    logp, entropy = (answers_of(output[key].detach(), data).float() for key in (Keys.LOGP, Keys.ENTROPY))
    length = logp.shape[1]
    return TokenBatch(
        logp=logp,
        logp_old=aligned(data[Keys.LOGP_OLD], length).float(),
        adv=aligned(data[Keys.ADV], length).float(),
        mask=aligned(data[Keys.MASK], length),
        entropy=entropy,
        entropy_old=aligned(data[Keys.ENTROPY], length).float() if holds(data, Keys.ENTROPY) else None,
        reward=data[Keys.REWARD] if holds(data, Keys.REWARD) else None,
        **{
            name: data[key] if holds(data, key) else None
            for name, key in (
                ("group_rate", Keys.GROUP_RATE),
                ("group_reward", Keys.GROUP_REWARD),
                ("group_distinct", Keys.GROUP_DISTINCT),
                ("group_repeats", Keys.GROUP_REPEATS),
            )
        },
    )


def sampler_logp(data: Any, length: int) -> torch.Tensor | None:
    """The sampler's log-probabilities of so many tokens per answer, ``[b t]``, if verl's data holds them."""
    return aligned(data[Keys.LOGP_SAMPLER], length).float() if holds(data, Keys.LOGP_SAMPLER) else None


def generated_mask(data: Any, mask: torch.Tensor) -> torch.Tensor:
    """``[b t]`` the tokens that the policy generated: ``mask``, with those that verl's rejection took out of it."""
    return aligned(data[Keys.GENERATED], mask.shape[1]) if holds(data, Keys.GENERATED) else mask


def correction(data: Any, length: int) -> torch.Tensor | None:
    """verl's weights against the sampler's policy, ``[b t]``, by which its losses are multiplied, if it has some."""
    return aligned(data[Keys.CORRECTION], length).float() if holds(data, Keys.CORRECTION) else None


def check_fields(recipe: Recipe, batch: TokenBatch) -> None:
    """Refuse a recipe that reads what verl's data does not hold.

    Raises:
        ValueError: what, got, remedy.
    """
    if "entropy_old" in recipe.reads and batch.entropy_old is None:
        raise ValueError(NO_OLD_ENTROPY)
    if recipe.reads & {"reward", "group_rate"} and batch.group_rate is None:
        raise ValueError(NO_GROUPS)


def add_penalty(recipe: Recipe, loss: torch.Tensor, batch: TokenBatch, config: Any) -> torch.Tensor:
    """Add the recipe's penalty under verl's own reduction; ``batch`` carries gradients."""
    cost = penalty(recipe, batch)
    cost = torch.where(batch.mask.bool(), cost, torch.zeros_like(cost))
    return loss + recipe.penalty_coef * aggregated(cost, batch.mask, config)


def normaliser(mask: torch.Tensor, config: Any) -> torch.Tensor:
    """The weight of each token in verl's reduction, ``[b t]``: the derivative of the loss by the loss of the token."""
    with torch.enable_grad():
        zero = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
        return torch.autograd.grad(aggregated(zero, mask.bool(), config), zero)[0]
