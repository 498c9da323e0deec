"""The sums that a micro-batch adds to the reading of its optimizer step in TRL."""

from __future__ import annotations

from typing import Any

import torch

from ...entropy.prediction import bound_violations
from ...recipes.terms import wide
from ...types import TokenBatch, TokenFacts

# TRL's names for what a row carries from the latest generated batch.
FROM_TRL = {
    "reward": "reward/mean",
    "reward_std": "reward/std",
    "frac_reward_zero_std": "reward/zero_std_frac",
    "completions/mean_length": "length/mean",
    "completions/clipped_ratio": "length/truncated_frac",
    # Of episodes with an environment, by the names that trl_rollout.py gives them.
    **{f"episode/{name}": f"episode/{name}" for name in ("win_frac", "return", "turns", "calls", "truncated_frac")},
}
SUMS = tuple("entropy tokens low high adv logp adv_logp ratio outside violated compared loss stop".split())
TURNS = 8  # the last of them holds all that come after it
TURN_SUMS = tuple(f"turn_{kind}_{i}" for kind in ("entropy", "tokens") for i in range(1, TURNS + 1))


def native_ratio(trainer: Any, batch: TokenBatch) -> torch.Tensor:
    """The importance ratio as the native loss uses it, ``[b t]``, 1 outside the mask."""
    if batch.logp_old is None:
        return torch.ones_like(batch.logp)
    log_ratio = torch.where(batch.mask.bool(), batch.logp - batch.logp_old, 0.0)
    if trainer.recipe.objective == "sequence_clipped":
        log_ratio = log_ratio.sum(-1, keepdim=True) / batch.mask.sum(-1, keepdim=True).clamp(min=1.0)
        log_ratio = log_ratio.expand_as(batch.logp)
    return log_ratio.exp()


def native_facts(trainer: Any, ratio: torch.Tensor, adv: torch.Tensor) -> TokenFacts:
    """Which tokens the native clip takes hold of, and which ratios lie outside it whatever the sign of A, ``[b t]``."""
    ceiling = trainer.epsilon_high if trainer.loss_type == "cispo" else 1 + trainer.epsilon_high
    floor = -1.0 if trainer.loss_type == "cispo" else 1 - trainer.epsilon_low
    low, high = ratio < floor, ratio > ceiling
    return TokenFacts(ratio, low & (adv < 0), high & (adv > 0), low | high)


def sums_of(trainer: Any, batch: TokenBatch, facts: TokenFacts, native: bool) -> torch.Tensor:
    """What this micro-batch adds, in the order of ``SUMS``, without a synchronisation."""
    logp, entropy = batch.logp, batch.entropy
    assert entropy is not None
    adv = wide(batch.adv, logp)
    outside = facts.clipped_low | facts.clipped_high if facts.outside is None else facts.outside
    ratio, ones = facts.ratio.expand_as(logp), torch.ones_like(logp)
    table = torch.stack([entropy, ones, facts.clipped_low, facts.clipped_high, adv, logp, adv * logp, ratio, outside])
    wide_dtype = torch.float32 if logp.device.type == "mps" else torch.float64
    sums = torch.where(batch.mask.bool(), table, 0.0).sum((1, 2), dtype=wide_dtype)
    left = sums.new_zeros(2)
    if batch.entropy_old is not None and native and trainer.recipe.objective == "clipped":
        low, high = trainer.epsilon_low, trainer.epsilon_high
        left = torch.stack(bound_violations(entropy, batch.entropy_old, batch.mask, low, high))
    more = sums.new_zeros(2)
    if trainer._stop_requested:
        more[1:].fill_(1.0)
    return torch.cat([sums, left.to(wide_dtype), more])


def turn_sums(batch: TokenBatch, has_turns: bool) -> torch.Tensor:
    """Entropy and tokens by turn, in the order of ``TURN_SUMS``: a turn is a run of tokens that the policy wrote."""
    wide_dtype = torch.float32 if batch.logp.device.type == "mps" else torch.float64
    if not has_turns:
        return torch.zeros(2 * TURNS, dtype=wide_dtype, device=batch.logp.device)
    assert batch.entropy is not None
    inside = batch.mask.bool()
    begins = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    turn = (begins.cumsum(1) - 1).clamp(0, TURNS - 1)
    of = torch.nn.functional.one_hot(turn, TURNS).to(wide_dtype) * inside[..., None]
    entropy = torch.where(inside, batch.entropy, 0.0).to(wide_dtype)
    return torch.cat([(of * entropy[..., None]).sum((0, 1)), of.sum((0, 1))])


def by_turn(totals: dict[str, float]) -> dict[str, float]:
    """``entropy/turn_1`` and on, as far as there were turns; nothing where a completion is one turn.

    Example:
        >>> by_turn(dict.fromkeys(TURN_SUMS, 0.0) | {"turn_entropy_1": 3.0, "turn_tokens_1": 2.0})
        {'entropy/turn_1': 1.5}
    """
    pairs = ((i, totals[f"turn_entropy_{i}"], totals[f"turn_tokens_{i}"]) for i in range(1, TURNS + 1))
    return {f"entropy/turn_{i}": entropy / tokens for i, entropy, tokens in pairs if tokens}
