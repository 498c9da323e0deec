"""Running a recipe: from rewards to advantages, from a batch to a loss per token. The torch half of this package.

Every component is called in the same way: each parameter of its function is looked up by name, among what the entry
fixes, the recipe's constants, the fields of the batch, and a few values that are derived here. Selections and shapings
see a batch without gradients; objectives and penalties see it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
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


def finite(entropy: Tensor) -> Tensor:
    """Entropies that a term of a loss may read: one that is not finite is 0 and has no gradient.

    Example:
        >>> finite(torch.tensor([1.5, float("nan"), float("inf")]))
        tensor([1.5000, 0.0000, 0.0000])
    """
    return entropy.nan_to_num(0.0, 0.0, 0.0)


def weighted(adv: Tensor, factors: Tensor | None) -> Tensor:
    """Advantages times the factors of a selection; as they are without one."""
    return adv if factors is None else per_token(adv, factors) * factors


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
    for name in component.parameters:
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
    returned = component.function(**arguments)
    if stage == "objective":
        return _checked_pair(recipe, returned, batch.logp)
    if not (isinstance(returned, Tensor) and returned.shape == batch.logp.shape):
        raise ValueError(
            f"{stage} {_name(recipe, stage)} must return [b t] {_sized(batch.logp)}, got {_sized(returned)}"
        )
    return returned


def _checked_pair(recipe: Recipe, returned: Any, logp: Tensor) -> tuple[Tensor, TokenFacts]:
    """What an objective returned, refused if it is no loss per token with its facts."""
    name = f"objective {_name(recipe, 'objective')}"
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], TokenFacts)):
        raise ValueError(f"{name} must return a loss [b t] and TokenFacts, got {_sized(returned)}; return both")
    by_token, facts = returned
    for what, x in {"a loss": by_token, **dict(zip(TokenFacts._fields, facts, strict=True))}.items():
        if not (isinstance(x, Tensor) and x.shape == logp.shape) and not (what == "outside" and x is None):
            raise ValueError(f"{name} must return {what} per token, [b t] {_sized(logp)}, got {_sized(x)}")
    return by_token, facts


def _sized(x: Any) -> str:
    """A tensor by its shape, anything else by its type."""
    if isinstance(x, Tensor):
        return str(list(x.shape))
    return f"({', '.join(map(_sized, x))})" if isinstance(x, tuple) else type(x).__name__


_REMEDIES = {
    "entropy": "pass the entropies of the rows",
    "logp_rows": "pass the log-probabilities of whole rows [b t v]",
    "reward": "pass the reward of each completion [b]",
    "group_rate": "pass the success rate of each completion's group [b], as losses.advantages.group_rate computes it",
}


def _name(recipe: Recipe, stage: str) -> str:
    return str(getattr(recipe, stage)).partition("@")[0]


def _predicted(recipe: Recipe, batch: TokenBatch) -> Tensor:
    if batch.entropy is None:
        raise ValueError(f"predicted needs batch.entropy, got None; {_REMEDIES['entropy']}")
    return predicted_change(batch.adv, batch.logp, batch.entropy)


def _clipped(recipe: Recipe, batch: TokenBatch) -> Tensor:
    """The tokens that the objective's clip has removed already."""
    _, facts = _call(recipe, "objective", batch)
    return facts.clipped_low | facts.clipped_high


def clip_rule(recipe: Recipe) -> Callable[..., Any]:
    """The rule of the recipe's clip bounds, ``(clip_low, clip_high, facts) -> (lowest, highest ratio)``."""
    component = recipe.component("bounds")
    function, fixed = component.function, {**component.options, **recipe.constants_of("bounds")}
    named = [name for name in component.parameters if name not in fixed]

    def rule(clip_low: Any, clip_high: Any, facts: RatioFacts) -> Any:
        values = {"clip_low": clip_low, "clip_high": clip_high, "facts": facts, "recipe": recipe, **facts._asdict()}
        pair = function(**fixed, **{name: values[name] for name in named if name in values})
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(_is_bound(x, facts.mask) for x in pair)):
            raise ValueError(
                f"bounds {_name(recipe, 'bounds')} must return the lowest and the highest ratio, each a number or "
                f"[b t] {_sized(facts.mask)}, got {_sized(pair)}"
            )
        return pair

    return rule


def _is_bound(x: Any, mask: Tensor) -> bool:
    return x.shape in ((), mask.shape) if isinstance(x, Tensor) else isinstance(x, Real)


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


def advantages(recipe: Recipe, rewards: Tensor, logp_mean: Tensor | None = None) -> Tensor:
    """Rewards ``[p g]`` to advantages ``[b]``, prompt by prompt, by the recipe's baseline.

    Args:
        recipe: for its baseline.
        rewards: ``[p g]``.
        logp_mean: ``[p g]`` log-probability of each sample when it was drawn, mean over its tokens, nats; ``None`` if
            it is not known, which a baseline that ranks by it refuses.

    Raises:
        ValueError: a baseline that returns anything else, or that needs ``logp_mean``.
    """
    baseline: Component = recipe.component("baseline")
    if baseline.needs_logp and logp_mean is None:
        raise ValueError(
            f"baseline {_name(recipe, 'baseline')} needs the log-probabilities of sampling time, got rewards alone; "
            "use the TRL engine with several optimizer steps per generated batch, or pass logp_mean [p g]"
        )
    given = {"rewards": rewards, "logp_mean": logp_mean, "recipe": recipe}
    named = {name: value for name, value in given.items() if name in baseline.parameters}
    returned = baseline.function(**named, **baseline.options, **recipe.constants_of("baseline"))
    if not (isinstance(returned, Tensor) and returned.shape == (rewards.numel(),)):
        raise ValueError(
            f"baseline {_name(recipe, 'baseline')} must return [b] [{rewards.numel()}], prompt by prompt, "
            f"got {_sized(returned)}; make [p g] of it and flatten that"
        )
    return returned


def shape(recipe: Recipe, batch: TokenBatch) -> Tensor:
    """Advantages after the recipe's shaping, from detached log-probs and entropies of the current policy.

    Returns:
        ``[b t]``, or ``batch.adv`` itself if the recipe shapes nothing. An advantage that the shaping would make NaN or
        infinite, as from a broken entropy, is left as it was.

    Raises:
        ValueError: a shaping that reads what the batch does not hold.
    """
    if recipe.shaping == "none":
        return batch.adv
    still = detached(batch)
    shaped = _call(recipe, "shaping", still)
    return torch.where(shaped.isfinite(), shaped, still.adv)


def select(recipe: Recipe, batch: TokenBatch) -> Tensor | None:
    """The factor of each token's advantage by the recipe's selection, ``[b t]``, or ``None`` if all tokens count.

    Means, ranks and shares are over the masked tokens of the batch; a random choice takes the global generator.

    Raises:
        ValueError: a selection that reads what the batch does not hold.
    """
    return None if recipe.selection == "none" else _call(recipe, "selection", detached(batch))


def penalty(recipe: Recipe, batch: TokenBatch) -> Tensor:
    """The recipe's penalty per token, without its coefficient, ``[b t]``.

    A token whose log-probability, entropy or row is broken is outside the mask for it, and its penalty is 0.

    Raises:
        ValueError: a penalty that reads what the batch does not hold.
    """
    broken = ~batch.logp.isfinite()
    intact: dict[str, Any] = {"adv": per_token(batch.adv.detach(), batch.logp)}
    if batch.entropy is not None:
        broken = broken | ~batch.entropy.isfinite()
        intact["entropy"] = finite(batch.entropy)
    if (rows := batch.logp_rows) is not None:
        # A row may hold −∞, for a token that is never sampled; the maximum passes a NaN on.
        broken = broken | rows.detach().amax(-1).isnan()
        intact["logp_rows"] = torch.where(broken[..., None], torch.zeros_like(rows), rows)
    cost = _call(recipe, "penalty", batch._replace(**intact, mask=batch.mask.masked_fill(broken, 0)))
    return torch.where(broken, torch.zeros_like(cost), cost)


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
    shaped = batch._replace(adv=per_token(weighted(shape(recipe, batch), factors), batch.logp))
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

    A token whose entropy is not finite adds nothing to an entropy bonus.
    """
    recipe = with_knob(recipe, knob)
    by_token, facts = token_loss(recipe, batch)
    if recipe.entropy_coef:
        if batch.entropy is None:
            raise ValueError("an entropy bonus needs batch.entropy, got None; pass the rows' entropies, with gradient")
        by_token = by_token - recipe.entropy_coef * finite(batch.entropy)
    if recipe.reduction == "constant":
        return reduce.constant(by_token, batch.mask, length or by_token.shape[1]), facts
    return {"token": reduce.token, "sequence": reduce.sequence}[recipe.reduction](by_token, batch.mask), facts


def token_weights(recipe: Recipe, batch: TokenBatch, factors: Tensor | None) -> tuple[Tensor, TokenFacts]:
    """The weight of each token under the recipe's objective, ``w = −∂(Σ loss)/∂logp``, ``[b t]``, and its facts.

    Args:
        recipe: with its knob in force.
        batch: token facts; nothing is differentiated through them.
        factors: of :func:`select`.

    Raises:
        ValueError: an objective whose gradient is not by the log-probabilities alone: an engine would lose the rest.
    """
    leaves = {"logp": batch.logp.detach().clone().requires_grad_()}
    for name in _lost(recipe):
        x = getattr(batch, name)
        leaves |= {} if x is None else {name: x.detach().requires_grad_()}
    with torch.enable_grad():
        by_token, facts = token_loss(recipe, batch._replace(**leaves), factors, penalised=False)
        total = torch.where(batch.mask.bool(), by_token, torch.zeros_like(by_token)).sum()
        reached = total.requires_grad
        slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if reached else [None]
    for name, slope in zip(leaves, slopes, strict=False):
        if name != "logp" and slope is not None:
            raise ValueError(
                f"objective {_name(recipe, 'objective')} depends on {name}, whose gradient an engine does not carry "
                f"through an objective; write that part as a penalty, or use {name}.detach()"
            )
    if slopes[0] is None:
        raise ValueError(
            f"objective {_name(recipe, 'objective')} must depend on logp with a gradient, got none; leave out a detach"
        )
    return -slopes[0], facts


def _lost(recipe: Recipe) -> list[str]:
    """Fields with a gradient of their own that the recipe's objective may name, by its signature."""
    component = recipe.component("objective")
    named = component.parameters
    # The objectives of the package take the batch, and read neither.
    whole = "batch" in named and not isinstance(component.at, str)
    return [name for name in ("entropy", "logp_rows") if whole or name in named]
