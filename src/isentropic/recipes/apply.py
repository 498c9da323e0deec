"""A recipe at work: from rewards to advantages, from a batch to a loss per token. The torch half of this package.

Every component is called alike: each parameter of its function is looked up by name, among what the entry fixes, the
recipe's constants, the fields of the batch, and a few values that are derived here. Selections and shapings see a
batch without gradients; objectives and penalties see it as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..entropy.prediction import predicted_change
from ..losses import reduce
from ..losses.clipping import RatioFacts
from ..losses.reduce import SumCount
from ..types import TokenBatch, TokenFacts
from .custom import OPTIONAL
from .knobs import with_knob
from .recipe import FIELD_NUMBERS, Recipe
from .stages import Component

_FIELDS = frozenset(TokenBatch._fields)


def per_token(adv: Tensor, like: Tensor) -> Tensor:
    """Advantages ``[b]``, ``[b 1]`` or ``[b t]``, repeated along the tokens to ``[b t]``."""
    return (adv.unsqueeze(1) if adv.dim() == 1 else adv).expand(like.shape)


def detached(batch: TokenBatch) -> TokenBatch:
    """The batch without gradients, its advantages per token."""
    fields: dict[str, Any] = {name: None if x is None else x.detach() for name, x in batch._asdict().items()}
    return batch._replace(**fields)._replace(adv=per_token(batch.adv.detach(), batch.logp))


def weighted(adv: Tensor, factors: Tensor | None) -> Tensor:
    """Advantages times the factors of a selection; as they are without one."""
    return adv if factors is None else per_token(adv, factors) * factors


@lru_cache(maxsize=512)
def _parameters(function: Callable[..., Any]) -> Mapping[str, bool]:
    """The parameters of a function by name: whether it can do without them."""
    parameters = inspect.signature(function).parameters.values()
    loose = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name: p.default is not inspect.Parameter.empty for p in parameters if p.kind not in loose}


def _call(recipe: Recipe, stage: str, batch: TokenBatch) -> Any:
    """Call the component of a stage with what its parameters name."""
    component = recipe.component(stage)
    for name in sorted(component.reads - OPTIONAL):
        if getattr(batch, name) is None:
            raise ValueError(
                f"{_name(recipe, stage)} needs batch.{name}, got None; {_REMEDIES.get(name, f'pass {name} [b]')}"
            )
    constants = recipe.constants_of(stage)
    arguments: dict[str, Any] = dict(component.options)
    for name in _parameters(component.function):
        if name in arguments:
            continue
        if name in constants:
            arguments[name] = constants[name]
        elif name in _FIELDS:
            arguments[name] = getattr(batch, name)
        elif name in FIELD_NUMBERS:
            arguments[name] = getattr(recipe, name)
        elif name in _DERIVED:
            arguments[name] = _DERIVED[name](recipe, batch)
    return component.function(**arguments)


_REMEDIES = {
    "entropy": "pass the entropies of the rows",
    "logp_rows": "pass the log-probabilities of whole rows [b t v]",
    "reward": "pass the reward of each completion [b]",
    "group_rate": "pass the success rate of each completion's group [b], as losses.advantages.group_rate computes it",
}


def _name(recipe: Recipe, stage: str) -> str:
    return str(getattr(recipe, stage)).partition("@")[0]


def _predicted(recipe: Recipe, batch: TokenBatch) -> Tensor:
    assert batch.entropy is not None
    return predicted_change(batch.adv, batch.logp, batch.entropy)


def _clipped(recipe: Recipe, batch: TokenBatch) -> Tensor:
    """The tokens that the objective's clip has removed already."""
    _, facts = _call(recipe, "objective", batch)
    return facts.clipped_low | facts.clipped_high


def clip_rule(recipe: Recipe) -> Callable[..., Any]:
    """The rule of the recipe's clip bounds, ``(clip_low, clip_high, facts) -> (lowest, highest ratio)``."""
    function = recipe.component("bounds").function
    fixed = {**recipe.component("bounds").options, **recipe.constants_of("bounds")}
    named = [name for name in _parameters(function) if name not in fixed]

    def rule(clip_low: Any, clip_high: Any, facts: RatioFacts) -> Any:
        values = {"clip_low": clip_low, "clip_high": clip_high, "facts": facts, "recipe": recipe, **facts._asdict()}
        return function(**fixed, **{name: values[name] for name in named if name in values})

    return rule


# What a function may name that no batch holds.
_DERIVED: dict[str, Callable[[Recipe, TokenBatch], Any]] = {
    "batch": lambda recipe, batch: batch,
    "recipe": lambda recipe, batch: recipe,
    "predicted": _predicted,
    "clipped": _clipped,
    "bounds": lambda recipe, batch: clip_rule(recipe),
    # Advantages that differ by token need a gradient by token, or their sequence mean is all that acts.
    "gradient": lambda recipe, batch: "sequence" if recipe.plain else "token",
}


def advantages(recipe: Recipe, rewards: Tensor) -> Tensor:
    """Rewards ``[p g]`` to advantages ``[b]`` by the recipe's baseline."""
    baseline: Component = recipe.component("baseline")
    more = {"recipe": recipe} if "recipe" in _parameters(baseline.function) else {}
    return baseline.function(rewards=rewards, **baseline.options, **recipe.constants_of("baseline"), **more)


def shape(recipe: Recipe, batch: TokenBatch) -> Tensor:
    """Advantages after the recipe's shaping, from detached log-probs and entropies of the current policy.

    Returns:
        ``[b t]``, or ``batch.adv`` itself if the recipe shapes nothing.

    Raises:
        ValueError: a shaping that reads what the batch does not hold.
    """
    return batch.adv if recipe.shaping == "none" else _call(recipe, "shaping", detached(batch))


def select(recipe: Recipe, batch: TokenBatch) -> Tensor | None:
    """The factor of each token's advantage by the recipe's selection, ``[b t]``, or ``None`` if all tokens count.

    Means, ranks and shares are over the masked tokens of the batch; a random choice takes the global generator.

    Raises:
        ValueError: a selection that reads what the batch does not hold.
    """
    return None if recipe.selection == "none" else _call(recipe, "selection", detached(batch))


def penalty(recipe: Recipe, batch: TokenBatch) -> Tensor:
    """The recipe's penalty per token, without its coefficient, ``[b t]``.

    Raises:
        ValueError: a penalty that reads what the batch does not hold.
    """
    return _call(recipe, "penalty", batch._replace(adv=per_token(batch.adv.detach(), batch.logp)))


def token_loss(
    recipe: Recipe, batch: TokenBatch, factors: Tensor | None = None, penalised: bool = True
) -> tuple[Tensor, TokenFacts]:
    """The recipe's loss per token, before its reduction and without an entropy bonus.

    Args:
        recipe: composed and checked, with its knob in force.
        batch: token facts.
        factors: of :func:`select`, if they were computed before; ``None`` computes them.
        penalised: add the recipe's penalty.

    Returns:
        The loss ``[b t]``, and the objective's facts.

    Raises:
        ValueError: a component that reads what the batch does not hold.
    """
    factors = select(recipe, batch) if factors is None else factors
    shaped = batch._replace(adv=weighted(shape(recipe, batch), factors))
    if not isinstance(recipe.objective, str):
        shaped = shaped._replace(adv=per_token(shaped.adv, batch.logp))
    by_token, facts = _call(recipe, "objective", shaped)
    if penalised and recipe.penalty != "none":
        by_token = by_token + recipe.penalty_coef * penalty(recipe, batch)
    return by_token, facts


def loss(
    recipe: Recipe, batch: TokenBatch, knob: float | None = None, length: int | None = None
) -> tuple[SumCount, TokenFacts]:
    """The recipe's loss as (sum, count), to be added over micro-batches and ranks before the division.

    Args:
        recipe: composed and checked.
        batch: token facts; it must hold what ``recipe.reads`` names, and ``entropy`` for an entropy bonus.
        knob: value from the thermostat; ``None`` leaves the recipe's own number.
        length: generation limit in tokens, for the constant reduction; default ``t``.

    Returns:
        (sum, count) whose quotient is minimised, and the objective's per-token facts.

    Raises:
        ValueError: a component that reads what the batch does not hold.
    """
    recipe = with_knob(recipe, knob)
    by_token, facts = token_loss(recipe, batch)
    if recipe.entropy_coef:
        if batch.entropy is None:
            raise ValueError("an entropy bonus needs batch.entropy, got None; pass the rows' entropies, with gradient")
        by_token = by_token - recipe.entropy_coef * batch.entropy
    if recipe.reduction == "constant":
        return reduce.constant(by_token, batch.mask, length or by_token.shape[1]), facts
    return {"token": reduce.token, "sequence": reduce.sequence}[recipe.reduction](by_token, batch.mask), facts


def token_weights(recipe: Recipe, batch: TokenBatch, factors: Tensor | None) -> tuple[Tensor, TokenFacts]:
    """The weight of each token under the recipe's objective, ``w = −∂(Σ loss)/∂logp``, ``[b t]``, and its facts.

    Args:
        recipe: with its knob in force.
        batch: token facts; nothing is differentiated through them.
        factors: of :func:`select`.
    """
    with torch.enable_grad():
        leaf = batch.logp.detach().clone().requires_grad_()
        by_token, facts = token_loss(recipe, batch._replace(logp=leaf), factors, penalised=False)
        total = torch.where(batch.mask.bool(), by_token, torch.zeros_like(by_token)).sum()
        slope = torch.autograd.grad(total, leaf)[0]
    return -slope, facts
