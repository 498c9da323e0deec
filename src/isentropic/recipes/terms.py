"""What the names of a recipe stand for: each part as one function of a batch and the recipe.

A part of your own has the same signature and stands in the same place. Selections and shapings see a batch without
gradients; objectives and penalties see it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from ..entropy import prediction as dynamics
from ..losses import objectives, penalties, selection, shaping
from ..types import TokenBatch, TokenFacts
from .parts import NEEDS_ENTROPY, NEEDS_ROWS, Part, Recipe

# A batch holds what a part reads once `term` has looked: to a type checker it is Any.
Term = Callable[[Any, Any], Any]


def wide(adv: Tensor, like: Tensor) -> Tensor:
    """Advantages repeated along the tokens."""
    return (adv.unsqueeze(1) if adv.dim() == 1 else adv).expand(like.shape)


def constant(batch: TokenBatch) -> TokenBatch:
    """The batch without gradients, its advantages by token."""
    kept: dict[str, Any] = {name: None if x is None else x.detach() for name, x in batch._asdict().items()}
    return batch._replace(**kept)._replace(adv=wide(batch.adv.detach(), batch.logp))


def selected(adv: Tensor, chosen: Tensor | None) -> Tensor:
    """Advantages times the factors of a selection."""
    return adv if chosen is None else wide(adv, chosen) * chosen


def term(functions: dict[str, Term], part: Part) -> Term:
    """The function of a name, which first sees to it that the batch holds what it reads, or the function itself."""
    if not isinstance(part, str):
        return lambda batch, recipe: part(batch._replace(adv=wide(batch.adv, batch.logp)), recipe)
    function = functions[part]

    def checked(batch: TokenBatch, recipe: Recipe) -> Any:
        if part in NEEDS_ENTROPY and batch.entropy is None:
            raise ValueError(f"{part} needs batch.entropy, got None; pass the entropies of the rows")
        if part in NEEDS_ROWS and batch.logp_rows is None:
            raise ValueError(
                f"{part} needs batch.logp_rows, got None; pass the log-probabilities of whole rows [b t v]"
            )
        return function(batch, recipe)

    return checked


def penalty(recipe: Recipe, batch: TokenBatch) -> Tensor:
    """The recipe's penalty by token, without its coefficient, ``[b t]``."""
    return term(PENALTIES, recipe.penalty)(batch._replace(adv=wide(batch.adv.detach(), batch.logp)), recipe)


def _clip_cov(batch: TokenBatch, recipe: Recipe) -> Tensor:
    _, facts = term(OBJECTIVES, recipe.objective)(batch, recipe)
    gone, numbers = facts.clipped_low | facts.clipped_high, recipe.constants_of("clip_cov")
    return selection.clip_cov(batch.adv, batch.logp, batch.mask, gone, **cast(Any, numbers))


SELECTIONS: dict[str, Term] = {
    "clip_cov": _clip_cov,
    "high_entropy": lambda b, r: selection.high_entropy(b.entropy, b.mask, **r.constants_of("high_entropy")),
    "erc": lambda b, r: selection.erc(b.entropy, b.entropy_old, b.mask, **r.constants_of("erc")),
}


def _repo_d(batch: TokenBatch, recipe: Recipe, per: str) -> Tensor:
    assert batch.entropy is not None
    change = dynamics.predicted_change(batch.adv, batch.logp, batch.entropy)
    return shaping.repo_d(batch.adv, batch.logp, batch.entropy, change, recipe.zeta, batch.mask, per=per)


SHAPINGS: dict[str, Term] = {
    "repo": lambda b, r: shaping.repo(b.adv, b.logp, b.entropy, r.beta),
    "repo_r": lambda b, r: shaping.repo_r(b.adv, b.logp, r.zeta, b.entropy),
    "repo_r_raw": lambda b, r: shaping.repo_r(b.adv, b.logp, r.zeta),
    "repo_r_positive": lambda b, r: shaping.repo_r(b.adv, b.logp, r.zeta, positive_only=True),
    "repo_d": lambda b, r: _repo_d(b, r, "batch"),
    "repo_d_token": lambda b, r: _repo_d(b, r, "token"),
    "sign_weight": lambda b, r: shaping.sign_weight(b.adv, b.logp, r.alpha),
    "one_sided": lambda b, r: shaping.one_sided(b.adv, b.logp, r.reject),
    "surprisal_boost": lambda b, r: shaping.surprisal_boost(
        b.adv, b.logp, b.mask, r.boost, **r.constants_of("surprisal_boost")
    ),
}


def _clip(recipe: Recipe) -> dict[str, Any]:
    rule = {"bounds": recipe.bounds, **recipe.constants_of(recipe.bounds)}
    return {"clip_low": recipe.clip_low, "clip_high": recipe.clip_high, **rule}


def _sequence(batch: TokenBatch, recipe: Recipe) -> tuple[Tensor, TokenFacts]:
    # Advantages that differ by token need a gradient by token, or their sequence mean is all that acts.
    gradient = "sequence" if recipe.plain else "token"
    return objectives.sequence_clipped(batch, recipe.clip_low, recipe.clip_high, recipe.bounds, gradient)


OBJECTIVES: dict[str, Term] = {
    "reinforce": lambda b, r: objectives.reinforce(b),
    "importance": lambda b, r: objectives.importance(b),
    "clipped": lambda b, r: objectives.clipped(b, **_clip(r)),
    "sequence_clipped": _sequence,
    "cispo": lambda b, r: objectives.cispo(b, None, r.clip_high, r.bounds, **cast(Any, r.constants_of(r.bounds))),
    "gradient_preserving": lambda b, r: objectives.gradient_preserving(
        b, **_clip(r), **r.constants_of("gradient_preserving")
    ),
    "sapo": lambda b, r: objectives.sapo(b, **r.constants_of("sapo")),
}

PENALTIES: dict[str, Term] = {
    "kl_cov": lambda b, r: penalties.kl_cov(b.logp, b.logp_old, b.adv, b.mask, **r.constants_of("kl_cov")),
    "lp_reg": lambda b, r: penalties.lp_reg(b.logp_rows, b.logp, b.adv, b.mask, **r.constants_of("lp_reg")),
    "aent": lambda b, r: penalties.aent(b.logp_rows, b.mask, **r.constants_of("aent")),
}
