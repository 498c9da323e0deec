"""What a recipe hands to TRL's loss, and what it adds to it.

Objectives that TRL has are TRL's, with advantages and clip bounds rewritten. Any other one takes the general road: its
gradient by the log-probabilities, ``w = −∂(Σ loss)/∂logp``, goes in as the advantages and the current log-probabilities
as the old ones, so that TRL's own ``−exp(logp − old)·w``, whose ratio is 1 and which no clip takes hold of, has exactly
that gradient under TRL's own normaliser. The value of that loss is ``−w``, which is what TRL logs.

Terms that act through the entropies or whole rows are added afterwards under the same normaliser.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..recipes.compose import Recipe, per_token, select, shape
from ..recipes.terms import penalty, selected, wide
from ..types import TokenBatch, TokenFacts


class Handed(NamedTuple):
    """What the native loss reads of a micro-batch in place of what was there.

    Attributes:
        adv: shaped and selected advantages, ``[b t]``, or ``[b]`` where they are as they were.
        given: what stands for the advantages.
        logp_old: what stands for the old log-probabilities, or ``None`` to leave them.
        facts: of the objective on the general road, ``None`` on the native one.
        chosen: factors of the selection, ``None`` without one.
    """

    adv: torch.Tensor
    given: torch.Tensor
    logp_old: torch.Tensor | None
    facts: TokenFacts | None
    chosen: torch.Tensor | None


def hand(recipe: Recipe, batch: TokenBatch, ratio: torch.Tensor, native: bool) -> Handed:
    """Rewrite a micro-batch for the native loss; ``batch`` carries no gradient, ``recipe`` its knob in force."""
    chosen = select(recipe, batch)
    adv = selected(shape(recipe, batch), chosen)
    if native:
        # One ratio a sequence with a gradient by token: the token ratio exp(logp − (sg(logp) − log s)).
        spread = recipe.objective == "sequence_clipped" and not recipe.plain
        return Handed(adv, adv, batch.logp - ratio.log() if spread else None, None, chosen)
    given, facts = weights_of(recipe, batch, chosen)
    return Handed(adv, given, batch.logp, facts, chosen)


def weights_of(recipe: Recipe, batch: TokenBatch, chosen: torch.Tensor | None) -> tuple[torch.Tensor, TokenFacts]:
    """The weight ``−∂(Σ loss)/∂logp`` of each token under the recipe's objective, ``[b t]``, and its facts."""
    with torch.enable_grad():
        leaf = batch.logp.detach().clone().requires_grad_()
        loss, facts = per_token(recipe, batch._replace(logp=leaf), chosen, penalised=False)
        total = torch.where(batch.mask.bool(), loss, torch.zeros_like(loss)).sum()
        slope = torch.autograd.grad(total, leaf)[0]
    return -slope, facts


def given_at(recipe: Recipe, batch: TokenBatch, handed: Handed) -> torch.Tensor:
    """What would stand for the advantages with another value of the knob in ``recipe``; the selection stays."""
    if handed.facts is None:
        return wide(selected(shape(recipe, batch), handed.chosen), batch.logp)
    return weights_of(recipe, batch, handed.chosen)[0]


class Term(NamedTuple):
    """What was added to the native loss, for its explanation.

    Attributes:
        unit: the normalised term that the knob multiplies, to be maximised; ``None`` where the knob is not of its kind.
        rows: ``[b t v]`` rows that it was computed from, or ``None``.
    """

    unit: torch.Tensor | None
    rows: torch.Tensor | None


def normalised(trainer: Any, term: torch.Tensor, mask: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
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
    trainer: Any, recipe: Recipe, loss: torch.Tensor, batch: TokenBatch, inputs: dict[str, Any]
) -> tuple[torch.Tensor, Term]:
    """Add the recipe's penalty and its entropy bonus; ``batch`` carries gradients."""
    unit = None
    if recipe.entropy_coef or recipe.knob == "entropy_coef":
        assert batch.entropy is not None
        bonus = normalised(trainer, batch.entropy, batch.mask, inputs)
        loss = loss - recipe.entropy_coef * bonus if recipe.entropy_coef else loss
        unit = bonus if recipe.knob == "entropy_coef" else None
    if recipe.penalty != "none":
        cost = normalised(trainer, penalty(recipe, batch), batch.mask, inputs)
        loss = loss + recipe.penalty_coef * cost
        unit = -cost if recipe.knob == "penalty_coef" else unit
    return loss, Term(unit, batch.logp_rows)
