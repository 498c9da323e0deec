"""First-order prediction of how a step changes entropy, and the split of that change, one sampled token at a time.

Notation: ``L(b) = log π(b) + H`` is the centred log-probability of token b in its row, so that ``Σ_b π L = 0``. A loss
reaches a token through its log-probability, with the weight ``w = −∂loss/∂log π(a)`` (positive if the step raises the
probability of the sampled token a), and through the entropy of its row, with ``u = −∂loss/∂H``. One autograd call on
the elementwise graph between the loss and its log-probabilities gives both, for any loss, an engine's own included.

A prediction is per unit step size: multiply it by the learning rate. Weights that carry the loss's own normaliser
(1/N of a token mean) make the *sum* over tokens the predicted change of the mean entropy, in nats per token.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..losses import reduce
from ..types import TokenFacts, TokenStats

NUM_POSITIONS = 8


class Weights(NamedTuple):
    """The effective weights of a loss on its tokens.

    Attributes:
        logp: ``[b t]`` ``w = −∂loss/∂log π(a)``.
        entropy: ``[b t]`` ``u = −∂loss/∂H``; zero for a loss without an entropy term.
    """

    logp: Tensor
    entropy: Tensor


def effective_weights(
    loss: Float[Tensor, ""],
    logp: Float[Tensor, "b t"],
    entropy: Float[Tensor, "b t"] | None = None,
    *,
    differentiable: bool = False,
) -> Weights:
    """Compute the effective weight of every token from any loss.

    ``w = −∂loss/∂log π(a)``, ``u = −∂loss/∂H``

    This is one backward pass through the elementwise graph between the loss and its log-probabilities. It does not
    enter the network, and it keeps the graph for the training step. Tokens that a clip or a mask removed have weight 0.

    Args:
        loss: the scalar that is minimised, as the engine computed it.
        logp: [b t] the very tensor of log-probabilities that the loss was computed from.
        entropy: [b t] the entropies that it was computed from, if it has an entropy term.
        differentiable: keep the graph of the weights, for their derivative by a knob.

    Returns:
        The weights, [b t] each, 0 for a tensor that the loss does not depend on.

    Raises:
        ValueError: the loss or the log-probabilities have no gradient.

    arXiv:2603.11682, Theorem 1, is about ``w = A``; for any loss [derived].

    >>> logp = torch.tensor([[-0.5, -2.0]], requires_grad=True)
    >>> effective_weights((-torch.tensor([[3.0, 1.0]]) * logp).mean(), logp).logp
    tensor([[1.5000, 0.5000]])
    """
    if not (loss.requires_grad and logp.requires_grad):
        got = "loss" if not loss.requires_grad else "logp"
        raise ValueError(
            f"effective weights need a loss computed from logp with gradient, got {got} without; do not detach it"
        )
    inputs = [logp] if entropy is None or not entropy.requires_grad else [logp, entropy]
    gradients = torch.autograd.grad(loss, inputs, retain_graph=True, create_graph=differentiable, allow_unused=True)
    weights = [torch.zeros_like(logp) if gradient is None else -gradient for gradient in gradients]
    return Weights(weights[0], weights[1] if len(weights) > 1 else torch.zeros_like(logp))


def _logp_slope(stats: TokenStats) -> Float[Tensor, "b t"]:
    """``π(a) L(a) − Σ π² L``: how much a unit of w, the weight of the sampled token, lowers the entropy of its row."""
    slope = stats.logp.exp() * (stats.logp + stats.entropy)
    if stats.sum_p2 is None or stats.sum_p2_logp is None:
        return slope
    return slope - (stats.sum_p2_logp + stats.entropy * stats.sum_p2)


def entropy_slope(stats: TokenStats) -> Float[Tensor, "b t"]:
    """``Σ π² L²``: how much a unit of u, the weight of the row's own entropy, raises that entropy; never negative.

    ``Σ π² L² = Σ π² log² π + 2H·Σ π² log π + H²·Σ π²``; without moments, its unbiased sample ``π(a) L(a)²``

    In expectation over a ∼ π, a unit of β in ``A − β·L`` raises it as much.

    >>> half = torch.tensor([[0.5]])
    >>> row = TokenStats(half.log(), -half.log(), half, half * half.log(), half * half.log() ** 2)  # two equal tokens
    >>> entropy_slope(row)
    tensor([[0.]])
    """
    if stats.sum_p2 is None or stats.sum_p2_logp is None or stats.sum_p2_logp2 is None:
        return stats.logp.exp() * (stats.logp + stats.entropy).square()
    spread = stats.sum_p2_logp2 + 2 * stats.entropy * stats.sum_p2_logp + stats.entropy.square() * stats.sum_p2
    return spread.clamp(min=0.0)


def predicted_change(
    weight: Float[Tensor, "b t"],
    logp: Float[Tensor, "b t"],
    entropy: Float[Tensor, "b t"],
    sum_p2: Float[Tensor, "b t"] | None = None,
    sum_p2_logp: Float[Tensor, "b t"] | None = None,
    sum_p2_logp2: Float[Tensor, "b t"] | None = None,
    entropy_weight: Float[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t"]:
    """Predict the entropy change of each row under a unit gradient step on its logits.

    ``ΔH = −w·{π(a) L(a) − Σ_b π(b)² L(b)} + u·Σ_b π(b)² L(b)²`` (with moments)
    ``ΔH = −w·π(a)·L(a) + u·π(a)·L(a)²`` (without)

    with ``Σ π² L = Σ π² log π + H·Σ π²`` and ``Σ π² L² = Σ π² log² π + 2H·Σ π² log π + H²·Σ π²``.

    Derivation: the step moves the logits by ``Δz = w·(e_a − π) − u·π L`` and ``∂H/∂z_b = −π(b) L(b)``; the first form
    is their scalar product. It assumes a small step and that each row moves by its own token alone: a network shares
    its parameters between rows. The second form drops ``Σ π² L``, which is never negative; it further assumes that
    the score functions of different tokens of a row are orthogonal, or that weights average to 0 in every row.

    For logits divided by a temperature T before the softmax, divide by T² for a unit step on the undivided ones.

    Args:
        weight: [b t] ``w = −∂loss/∂logp``.
        logp: [b t] log-probabilities of the sampled tokens, nats.
        entropy: [b t] entropy of their rows, nats.
        sum_p2: [b t] ``Σ π²`` of the rows.
        sum_p2_logp: [b t] ``Σ π² log π`` of the rows, nats.
        sum_p2_logp2: [b t] ``Σ π² log² π`` of the rows, nats²; needed beside the other two if u is given.
        entropy_weight: [b t] ``u = −∂loss/∂H``.

    Returns:
        [b t] nats per unit step size.

    Raises:
        ValueError: some of the moments are given without the others.

    arXiv:2603.11682, Theorem 1: without moments [paper], with them, and the term in u [derived].

    >>> p = torch.tensor([0.75, 0.25])
    >>> logp, H = p.log()[None, :1], -(p * p.log()).sum()[None, None]
    >>> predicted_change(torch.ones(1, 1), logp, H)  # −¾·(log ¾ + 0.5623)
    tensor([[-0.2060]])
    >>> predicted_change(torch.ones(1, 1), logp, H, (p**2).sum()[None, None], (p**2 * p.log()).sum()[None, None])
    tensor([[-0.1030]])
    """
    if (sum_p2 is None) != (sum_p2_logp is None):
        got = "sum_p2_logp" if sum_p2 is None else "sum_p2"
        raise ValueError(f"sum_p2 and sum_p2_logp go together, got only {got}; give both, or neither to drop the term")
    if entropy_weight is not None and (sum_p2 is None) != (sum_p2_logp2 is None):
        raise ValueError(
            "an entropy weight needs all three moments or none, got some; add sum_p2_logp2, or leave all of them out"
        )
    stats = TokenStats(logp, entropy, sum_p2, sum_p2_logp, sum_p2_logp2)
    change = -weight * _logp_slope(stats)
    return change if entropy_weight is None else change + entropy_weight * entropy_slope(stats)


def natural_change(
    weight: Float[Tensor, "b t"],
    logp: Float[Tensor, "b t"],
    entropy: Float[Tensor, "b t"],
    entropy_weight: Float[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t"]:
    """Predict the entropy change of each row under a unit natural-gradient step.

    ``ΔH = −w·L(a) + u·L(a)²``, in expectation ``−Cov_π(w, log π) + u·Var_π(log π)``

    Derivation: the Fisher matrix of a row of logits is ``F = diag(π) − π πᵀ``; the natural step solves
    ``F Δz = w·(e_a − π) − u·π L``, so ``Δz = w·e_a/π(a) − u·L`` up to a constant, and ``∂H/∂z_b = −π(b) L(b)``. It
    assumes a small step and that each row moves by its own token alone, but no orthogonality within a row. The term in
    u is a sampled estimate, exact in expectation.

    Args:
        weight: [b t] ``w = −∂loss/∂logp``.
        logp: [b t] log-probabilities of the sampled tokens, nats.
        entropy: [b t] entropy of their rows, nats.
        entropy_weight: [b t] ``u = −∂loss/∂H``.

    Returns:
        [b t] nats per unit step size.

    Cui et al. (arXiv:2505.22617), here for one sampled token, and the term in u [derived].

    >>> natural_change(torch.tensor([[2.0]]), torch.tensor([[-0.5]]), torch.tensor([[0.75]]))
    tensor([[-0.5000]])
    """
    centred = logp + entropy
    change = -weight * centred
    return change if entropy_weight is None else change + entropy_weight * centred.square()


def change_of(weights: Weights, stats: TokenStats) -> Float[Tensor, "b t"]:
    """Return the predicted change of each row: :func:`predicted_change` for the effective weights of a loss.

    Args:
        weights: [b t] each.
        stats: [b t] each; without moments, the change is that of the form without moments.

    Returns:
        [b t] nats per unit step size; differentiable in the weights.
    """
    return -weights.logp * _logp_slope(stats) + weights.entropy * entropy_slope(stats)


def rows_change(
    weights: Float[Tensor, "b t v"], logp_rows: Float[Tensor, "b t v"], natural: bool = False
) -> Float[Tensor, "b t"]:
    """Predict the entropy change of each row from the weights of all its tokens, for a term that acts on whole rows.

    ``ΔH = −Σ_b w_b·{π(b) L(b) − Σ π² L}``, or ``−Σ_b w_b·L(b)`` under a natural-gradient step: :func:`predicted_change`
    in its exact form and :func:`natural_change`, summed over the row

    Args:
        weights: [b t v] ``w_b = −∂loss/∂log π(b)``.
        logp_rows: [b t v] log-probabilities, nats.
        natural: predict the change of a natural-gradient step.

    Returns:
        [b t] nats per unit step size.

    [derived]

    >>> rows = torch.tensor([[[0.75, 0.25]]]).log()
    >>> rows_change(torch.tensor([[[1.0, 0.0]]]), rows)  # as predicted_change has it
    tensor([[-0.1030]])
    """
    prob = logp_rows.exp()
    centred = logp_rows - (prob * logp_rows).sum(-1, keepdim=True)
    if natural:
        return -(weights * centred).sum(-1)
    prob_centred = prob * centred
    return -(weights * prob_centred).sum(-1) + weights.sum(-1) * (prob * prob_centred).sum(-1)


def _masked_stats(stats: TokenStats, inside: Bool[Tensor, "b t"]) -> TokenStats:
    """Set the statistics outside the mask, where they may have any value, to zero."""
    masked: dict[str, Any] = {
        name: None if values is None else torch.where(inside, values.detach(), torch.zeros_like(values))
        for name, values in stats._asdict().items()
    }
    return stats._replace(**masked)


def attribute(
    weights: Weights,
    stats: TokenStats,
    adv: Float[Tensor, "b t"],
    mask: Shaped[Tensor, "b t"],
    facts: TokenFacts | None = None,
    through_rows: tuple[Float[Tensor, "b t v"], Float[Tensor, "b t v"]] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Split the predicted change of a step by its causes; every split sums to ``change``.

    - by quadrant: the sign of the weight (up, down) and the surprisal below or above H (likely, rare), and ``bonus``
      for terms that act through H itself or on whole rows. ``likely_up`` lowers entropy and ``rare_up`` raises it,
      ``likely_down`` and ``rare_down`` are reversed. That is certain under a natural-gradient step, and true of most
      tokens in the exact form, in which a likely token has this sign only if ``π(a) L(a) > Σ π² L``.
    - by clip: ``unclipped``, ``clipped_low``, ``clipped_high``. These are 0 for a clip that removes the gradient;
      ``removed_low`` and ``removed_high`` estimate how much such tokens would have added with the unclipped weight
      ``c·r·A``, where c is the mean of |w| / |r·A| over the unclipped tokens of the sequence, or else of the batch
      [ours].
    - by sample: ``positive``, ``negative``, ``neutral``, the sign of the advantage.
    - by position: ``position_1`` to ``position_8``, the eighths of each response.

    The result also has ``change_simple`` and ``change_natural``, the totals of the form without moments and of the
    natural one, and ``absolute``, the sum of absolute contributions, with which a total is to be compared.

    Args:
        weights: [b t] from :func:`effective_weights`, with the loss's normaliser.
        stats: [b t] each; without moments, ``change`` is ``change_simple``.
        adv: [b t] advantages that the loss was computed from.
        mask: [b t] non-zero where the token counts.
        facts: of the objective; without them no token counts as clipped.
        through_rows: the two [b t v] arguments of :func:`rows_change`, for a term that acts on whole rows.

    Returns:
        0-d sums, nats per token and unit step size, to be added over micro-batches and ranks.

    >>> row = TokenStats(torch.tensor([[-0.5, -3.0]]), torch.tensor([[1.0, 1.0]]))  # L = ½, −2
    >>> w = Weights(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2))
    >>> parts = attribute(w, row, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
    >>> parts["change"], parts["likely_up"], parts["rare_down"]  # −½·e^−½ and −2·e^−3
    (tensor(-0.4028), tensor(-0.3033), tensor(-0.0996))
    """
    inside = mask.bool()
    w, u = (torch.where(inside, weight.detach(), torch.zeros_like(weight)) for weight in weights)
    masked = _masked_stats(stats, inside)
    by_logp, bonus = -w * _logp_slope(masked), u * entropy_slope(masked)
    through_exact = through_natural = torch.zeros_like(w)
    if through_rows is not None:
        row_changes = (
            torch.where(inside, rows_change(*through_rows, natural=is_natural).detach(), 0.0)
            for is_natural in (False, True)
        )
        through_exact, through_natural = row_changes
    bonus = bonus + through_exact
    change = by_logp + bonus
    likely, up = masked.logp + masked.entropy > 0, w > 0
    simple = predicted_change(w, masked.logp, masked.entropy, entropy_weight=u)
    natural = natural_change(w, masked.logp, masked.entropy, entropy_weight=u)
    per_token = {
        "change": change,
        "change_simple": simple + through_exact,
        "change_natural": natural + through_natural,
        "absolute": by_logp.abs() + bonus.abs(),
        "likely_up": by_logp * (likely & up),
        "rare_up": by_logp * (~likely & up),
        "likely_down": by_logp * (likely & ~up),
        "rare_down": by_logp * (~likely & ~up),
        "bonus": bonus,
        "positive": change * (adv > 0),
        "negative": change * (adv < 0),
        "neutral": change * (adv == 0),
        **_by_clip(w, masked, adv, change, inside, facts),
    }
    sums = {name: value.sum() for name, value in per_token.items()}
    return sums | {f"position_{i + 1}": eighth for i, eighth in enumerate(_by_position(change, inside))}


def _by_clip(
    w: Float[Tensor, "b t"],
    stats: TokenStats,
    adv: Float[Tensor, "b t"],
    change: Float[Tensor, "b t"],
    inside: Bool[Tensor, "b t"],
    facts: TokenFacts | None,
) -> dict[str, Float[Tensor, "b t"]]:
    if facts is None:
        zeros = torch.zeros_like(change)
        names = ("clipped_low", "clipped_high", "removed_low", "removed_high")
        return {"unclipped": change} | dict.fromkeys(names, zeros)
    low, high = facts.clipped_low & inside, facts.clipped_high & inside
    removed = -(_unclipped_weights(w, adv, inside, facts) - w) * _logp_slope(stats)
    return {
        "unclipped": change * ~(low | high),
        "clipped_low": change * low,
        "clipped_high": change * high,
        "removed_low": removed * low,
        "removed_high": removed * high,
    }


def _unclipped_weights(
    w: Float[Tensor, "b t"], adv: Float[Tensor, "b t"], inside: Bool[Tensor, "b t"], facts: TokenFacts
) -> Float[Tensor, "b t"]:
    """The weights ``c·r·A`` of the same loss without its clip, with c from the tokens that are not clipped."""
    unclipped = inside & ~facts.clipped_low & ~facts.clipped_high
    ratio_adv = torch.where(inside, facts.ratio * adv, torch.zeros_like(w))
    sequence_scale = (w.abs() * unclipped).sum(-1, keepdim=True) / (ratio_adv.abs() * unclipped).sum(-1, keepdim=True)
    batch_scale = (w.abs() * unclipped).sum() / (ratio_adv.abs() * unclipped).sum()
    return ratio_adv * torch.where(
        sequence_scale.isfinite() & (sequence_scale > 0), sequence_scale, batch_scale.nan_to_num(0.0, posinf=0.0)
    )


def _by_position(change: Float[Tensor, "b t"], inside: Bool[Tensor, "b t"]) -> Float[Tensor, "8"]:
    rank = inside.cumsum(-1) - 1
    length = inside.sum(-1, keepdim=True).clamp(min=1)
    position = (rank * NUM_POSITIONS // length).clamp(min=0, max=NUM_POSITIONS - 1)
    return change.new_zeros(NUM_POSITIONS).index_add(0, position.flatten(), change.flatten())


def token_totals(
    change: Float[Tensor, "b t"], ids: Int[Tensor, "b t"], mask: Shaped[Tensor, "b t"], num_tokens: int
) -> Float[Tensor, "2 v"]:
    """Sum the predicted change, and count, by token of the vocabulary, to find the tokens that change entropy most.

    Args:
        change: [b t] predicted change of each row.
        ids: [b t] sampled tokens.
        mask: [b t] non-zero where the token counts.
        num_tokens: size v of the vocabulary.

    Returns:
        [2 v]: sums in the unit of change, and counts.

    >>> token_totals(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[2, 0, 2]]), torch.tensor([[1, 1, 0]]), 3)
    tensor([[2., 0., 1.],
            [1., 0., 1.]])
    """
    inside = mask.bool()
    masked = torch.where(inside, change, torch.zeros_like(change))
    change_and_count = torch.stack([masked, inside.to(masked.dtype)]).flatten(1)
    return change_and_count.new_zeros(2, num_tokens).index_add(1, ids.clamp(min=0).flatten(), change_and_count)


def clip_gain(
    weights: Weights,
    stats: TokenStats,
    adv: Float[Tensor, "b t"],
    facts: TokenFacts,
    mask: Shaped[Tensor, "b t"],
    bound: float,
    width: float,
) -> Float[Tensor, ""]:
    """Estimate the derivative of the predicted change by a clip bound, from the tokens at its edge.

    ``dΔH/dε ≈ (1/width)·Σ over tokens with A on the bound's side and |r − bound| < width/2 of −c·r·A·{πL − Σπ²L}``

    Moving the bound unclips, or clips, the tokens whose ratio lies at it; their density is estimated over a window.

    Args:
        weights, stats, adv, facts, mask: as in :func:`attribute`.
        bound: the ratio at which tokens are clipped: above 1 it clips A > 0, below 1 it clips A < 0.
        width: width of the window in which tokens count as at the bound, > 0.

    Returns:
        0-d, nats per token, unit step size and unit of the width of the clip (away from 1).

    Raises:
        ValueError: the width is not positive.

    [ours], an estimate: a density needs a window.
    """
    if not width > 0:
        raise ValueError(f"width must be > 0, got {width}; a quarter of the clip's width is a start")
    inside = mask.bool()
    clippable = adv > 0 if bound > 1 else adv < 0
    at_edge = inside & clippable & ((facts.ratio - bound).abs() < width / 2)
    unclipped = _unclipped_weights(weights.logp.detach(), adv, inside, facts)
    return -torch.where(at_edge, unclipped * _logp_slope(stats), torch.zeros_like(unclipped)).sum() / width


def entropy_bounds(
    entropy_old: Float[Tensor, "..."], clip_low: float, clip_high: float
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Return the lowest and highest entropy that a row can reach if all its ratios stay inside the clip.

    ``(1 − ε_low)·H_old ≤ H_new ≤ (1 + ε_high)·H_old`` if ``1 − ε_low ≤ π_new/π_old ≤ 1 + ε_high`` for every token

    Derivation: ``H_new = −Σ π_new log π_new ≤ −Σ π_new log π_old ≤ (1 + ε_high)·H_old`` by Gibbs' inequality, and
    ``H_new ≥ (1 − ε_low)·(−Σ π_old log π_new) ≥ (1 − ε_low)·H_old`` by the same. No clipped loss forces its ratios to
    stay inside, so rows can leave these bounds; :func:`bound_violations` counts them.

    Args:
        entropy_old: entropies when the tokens were sampled, nats.
        clip_low, clip_high: widths of the clip around 1.

    Returns:
        The lower and the upper bound, nats.

    arXiv:2603.11682, Theorem 2 [paper].

    >>> entropy_bounds(torch.tensor(2.0), 0.2, 0.28)
    (tensor(1.6000), tensor(2.5600))
    """
    return (1 - clip_low) * entropy_old, (1 + clip_high) * entropy_old


def bound_violations(
    entropy: Float[Tensor, "b t"],
    entropy_old: Float[Tensor, "b t"],
    mask: Shaped[Tensor, "b t"],
    clip_low: float,
    clip_high: float,
) -> reduce.SumCount:
    """Count the rows whose entropy left :func:`entropy_bounds`; such a row had a ratio outside the clip.

    Args:
        entropy: [b t] entropies now, nats.
        entropy_old: [b t] entropies of the same rows when their tokens were sampled, nats.
        mask: [b t] non-zero where the token counts.
        clip_low, clip_high: widths of the clip around 1.

    Returns:
        (violations, rows).

    >>> now, before = torch.tensor([[1.0, 1.5, 3.0]]), torch.tensor([[1.0, 2.0, 2.0]])
    >>> bound_violations(now, before, torch.ones(1, 3), 0.2, 0.28).sum
    tensor(2.)
    """
    low, high = entropy_bounds(entropy_old, clip_low, clip_high)
    # With a clip of width 0 a row that did not move lies on its bound: allow for rounding.
    slack = 1e-5 * entropy_old.abs() + 1e-7
    return reduce.token(((entropy < low - slack) | (entropy > high + slack)).to(entropy.dtype), mask)
