"""From a recipe to the advantages and old log-probabilities that an engine's own loss reads.

An objective that the engine has stays the engine's, with advantages and clip bounds rewritten. Any other one takes the
general path: its gradient by the log-probabilities, ``w = −∂(Σ loss)/∂logp``, goes in as the advantages and the current
log-probabilities as the old ones, so that the engine's own ``−exp(logp − old)·w``, whose ratio is 1 and which no clip
removes, has exactly that gradient under the engine's own normaliser. The value of that loss is ``−w``, which is what
the engine logs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..entropy.prediction import Weights, change_of
from ..recipes import Recipe, knob_range, with_knob
from ..recipes.apply import per_token, select, shape, token_weights, weighted
from ..types import TokenBatch, TokenFacts, TokenStats
from .loop import masked_sums

CLIP_KNOBS = ("clip_low", "clip_high")


class Rewritten(NamedTuple):
    """What the native loss reads in place of the engine's own micro-batch.

    Attributes:
        adv: shaped and selected advantages, ``[b t]``, or ``[b]`` if they are as they were.
        advantages: what takes the place of the advantages.
        logp_old: what takes the place of the old log-probabilities, or ``None`` to leave them.
        facts: of the objective on the general path, ``None`` on the native one.
        factors: of the selection, ``None`` without one.
    """

    adv: Tensor
    advantages: Tensor
    logp_old: Tensor | None
    facts: TokenFacts | None
    factors: Tensor | None


def rewrite(recipe: Recipe, batch: TokenBatch, native: bool) -> Rewritten:
    """Rewrite a micro-batch for the native loss.

    Args:
        recipe: with its knob in force.
        batch: token facts without gradients.
        native: whether the engine has the recipe's objective.
    """
    factors = select(recipe, batch)
    adv = weighted(shape(recipe, batch), factors)
    if native:
        return Rewritten(adv, adv, None, None, factors)
    advantages, facts = token_weights(recipe, batch, factors)
    return Rewritten(adv, advantages, batch.logp, facts, factors)


def advantages_at(recipe: Recipe, batch: TokenBatch, rewritten: Rewritten) -> Tensor:
    """What would take the place of the advantages with another value of the knob in ``recipe``; the selection stays."""
    if rewritten.facts is None:
        return per_token(weighted(shape(recipe, batch), rewritten.factors), batch.logp)
    return token_weights(recipe, batch, rewritten.factors)[0]


class Difference(NamedTuple):
    """A difference across the knob, and the width over which it was taken: their quotient is the derivative."""

    change: Tensor
    width: float


def across_knob(recipe: Recipe, value: float, quantity: Callable[[Recipe], Tensor]) -> Difference:
    """The difference of a quantity across the knob under control, centred on its value.

    Clip bounds free tokens one by one, which are counted over half the width of the clip; everything else is smooth in
    its knob, and a thousandth of the range to either side is enough. Neither side leaves the range: the knob's formula
    need not be defined there.

    Args:
        recipe: with the knob under control.
        value: of the knob.
        quantity: of a recipe with its knob in force.
    """
    span = knob_range(recipe)
    step = value / 4 if recipe.knob in CLIP_KNOBS else 1e-3 * (span.high - span.low)
    above, below = span.clip(value + step), span.clip(value - step)
    up, down = (quantity(with_knob(recipe, x)) for x in (above, below))
    return Difference(up - down, above - below)


def predicted_sums(
    recipe: Recipe,
    now: Recipe,
    value: float | None,
    batch: TokenBatch,
    share: Tensor,
    weights: Callable[[Recipe], Tensor],
) -> tuple[Tensor, Tensor]:
    """Σ of the predicted entropy change, without moments, per unit of learning rate, and of its derivative by the knob.

    Args:
        recipe: with the knob under control.
        now: the same with its knob in force.
        value: of the knob; None if nothing is under control.
        batch: without gradients; ``entropy`` is there.
        share: ``[b t]`` the derivative of the engine's reduction by the loss of each token.
        weights: of a recipe, ``[b t]`` how its objective pulls at each log-probability.
    """
    assert batch.entropy is not None
    rows = TokenStats(batch.logp, batch.entropy)

    def change(of: Recipe) -> Tensor:
        return change_of(Weights(share * weights(of), share * of.entropy_coef), rows)

    predicted = change(now)
    gain = torch.zeros_like(predicted)
    if value is not None:
        moved = across_knob(recipe, value, change)
        gain = moved.change / moved.width
    predicted_sum, gain_sum = masked_sums(torch.stack([predicted, gain]), batch.mask).unbind()
    return predicted_sum, gain_sum


def lower_width(recipe: Recipe) -> float:
    """How far below 1 the recipe's lower clip bound is, whichever rule makes it a bound.

    Example:
        >>> from isentropic.recipes import RECIPES
        >>> lower_width(RECIPES["dapo"]), round(lower_width(RECIPES["loop"]), 4)
        (0.2, 0.0909)
    """
    return recipe.clip_low if recipe.bounds == "additive" else 1 - 1 / (1 + recipe.clip_low)
