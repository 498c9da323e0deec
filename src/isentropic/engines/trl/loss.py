"""TRL's loss as it is: its ratio, its clip and its normaliser; and the terms of a recipe that are added to it.

Terms that act through the entropies or whole rows are added after the native loss, under the same normaliser.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...recipes import Recipe
from ...recipes.apply import finite, penalty
from ...types import TokenBatch, TokenFacts
from ..rewrite import Rewritten, rewrite
from .compat import Trainer


def native_ratio(trainer: Trainer, batch: TokenBatch) -> torch.Tensor:
    """The importance ratio as the native loss uses it, ``[b t]``, 1 outside the mask."""
    if batch.logp_old is None:
        return torch.ones_like(batch.logp)
    log_ratio = torch.where(batch.mask.bool(), batch.logp - batch.logp_old, 0.0)
    if trainer.recipe.objective == "sequence_clipped":
        log_ratio = log_ratio.sum(-1, keepdim=True) / batch.mask.sum(-1, keepdim=True).clamp(min=1.0)
        log_ratio = log_ratio.expand_as(batch.logp)
    return log_ratio.exp()


def native_facts(trainer: Trainer, ratio: torch.Tensor, adv: torch.Tensor) -> TokenFacts:
    """The tokens whose gradient the native clip removes, and the ratios outside it whatever the sign of A, [b t]."""
    ceiling = trainer.epsilon_high if trainer.loss_type == "cispo" else 1 + trainer.epsilon_high
    floor = -1.0 if trainer.loss_type == "cispo" else 1 - trainer.epsilon_low
    low, high = ratio < floor, ratio > ceiling
    return TokenFacts(ratio, low & (adv < 0), high & (adv > 0), low | high)


def rewrite_for_trl(trainer: Trainer, recipe: Recipe, batch: TokenBatch, ratio: torch.Tensor) -> Rewritten:
    """Rewrite a micro-batch for TRL's loss.

    TRL has no sequence ratio with a gradient per token: the token ratio ``exp(logp − (sg(logp) − log s))`` is one.
    """
    rewritten = rewrite(recipe, batch, trainer.native)
    if trainer.native and recipe.objective == "sequence_clipped" and not recipe.plain:
        return rewritten._replace(logp_old=batch.logp - ratio.log())
    return rewritten


def deselected(inputs: dict[str, Any], factors: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """The tokens that a selection took out, ``[b t]``: the recipe's, or TRL's correction of the sampler's ratio.

    Args:
        inputs: of the native loss.
        factors: of the recipe's selection, if it has one.
        like: ``[b t]``.
    """
    zero = [x.expand_as(like) == 0 for x in (factors, inputs.get("importance_sampling_ratio")) if x is not None]
    return torch.stack(zero).any(0) if zero else None


class Term(NamedTuple):
    """What was added to the native loss, for its explanation.

    Attributes:
        unit: the normalised term that the knob multiplies, to be maximised; ``None`` if the knob is not of its kind.
        rows: ``[b t v]`` rows that it was computed from, or ``None``.
    """

    unit: torch.Tensor | None
    rows: torch.Tensor | None


def normalised(trainer: Trainer, term: torch.Tensor, mask: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """The mean of a term ``[b t]`` under the loss's own normaliser."""
    term = torch.where(mask.bool(), term, torch.zeros_like(term))
    windows = trainer.current_gradient_accumulation_steps
    if trainer.recipe.reduction == "sequence":
        return (term.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean() / windows
    if trainer.recipe.reduction == "constant":
        return term.sum() / (term.shape[0] * trainer.args.max_completion_length) / windows
    share = windows / trainer.args.steps_per_generation / trainer.accelerator.num_processes
    return term.sum() / (inputs["num_items_in_batch"].clamp(min=1.0) * share)


def add_terms(
    trainer: Trainer, recipe: Recipe, loss: torch.Tensor, batch: TokenBatch, inputs: dict[str, Any]
) -> tuple[torch.Tensor, Term]:
    """Add the recipe's penalty and its entropy bonus; ``batch`` carries gradients.

    A token whose entropy is not finite adds nothing to either.
    """
    unit = None
    if recipe.entropy_coef or recipe.knob == "entropy_coef":
        assert batch.entropy is not None
        bonus = normalised(trainer, finite(batch.entropy), batch.mask, inputs)
        loss = loss - recipe.entropy_coef * bonus if recipe.entropy_coef else loss
        unit = bonus if recipe.knob == "entropy_coef" else None
    if recipe.penalty != "none":
        cost = normalised(trainer, penalty(recipe, batch), batch.mask, inputs)
        loss = loss + recipe.penalty_coef * cost
        unit = -cost if recipe.knob == "penalty_coef" else unit
    return loss, Term(unit, batch.logp_rows)
