"""Objectives: facts of the sampled tokens in, a loss and its facts per token out.

Every objective has one signature, ``(batch, **parameters) -> (loss [b t], TokenFacts)``;
:mod:`isentropic.losses.reduce` turns the loss into a number. Here ``r = exp(logp − logp_old)`` and A is the advantage,
which counts as a constant, as does ``logp_old``. Without ``logp_old`` the batch is exactly on-policy: r is 1, and its
gradient is that of ``logp``.

Outside the mask the loss is 0, the ratio 1 and no token is clipped, whatever the batch contains there.

``bounds`` is the rule of :mod:`isentropic.losses.clipping` that computes bounds from the two widths.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..types import TokenBatch, TokenFacts
from .clipping import RatioFacts, Rule, additive, bounds_of

Bound = float | int | Float[Tensor, ""] | Float[Tensor, "b t"]


def _prepare(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor, Bool[Tensor, "b t"]]:
    """Return logp, log r, adv and mask, all [b t], at least fp32, with zeros outside the mask."""
    mask = batch.mask.bool()
    zero = torch.zeros((), dtype=torch.promote_types(batch.logp.dtype, torch.float32), device=batch.logp.device)
    adv = batch.adv.unsqueeze(1) if batch.adv.dim() == 1 else batch.adv
    logp = torch.where(mask, batch.logp.to(zero.dtype), zero)
    logp_old = logp if batch.logp_old is None else torch.where(mask, batch.logp_old.to(zero.dtype), zero)
    return logp, logp - logp_old.detach(), torch.where(mask, adv.detach().to(zero.dtype), zero), mask


def _facts(ratio: Tensor, adv: Tensor, lower: Bound | None, upper: Bound | None) -> TokenFacts:
    """Mark the tokens whose ratio lies past the bound that their advantage pushes towards."""
    false = torch.zeros_like(ratio, dtype=torch.bool)
    below = false if lower is None else ratio < lower
    above = false if upper is None else ratio > upper
    return TokenFacts(ratio.detach(), below & (adv < 0), above & (adv > 0), below | above)


def _bounds(
    clip_low: Bound,
    clip_high: Bound,
    rule: Rule,
    ratio: Tensor,
    prepared: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Bound, Bound]:
    """Turn clip widths into the lowest and highest ratio; ``prepared`` is the result of :func:`_prepare`."""
    logp, _, adv, mask = prepared
    detached_ratio = ratio.detach().expand(mask.shape)
    prob_old = torch.where(mask, logp.detach().exp() / detached_ratio, torch.zeros_like(detached_ratio))
    return bounds_of(
        rule, clip_low, clip_high, RatioFacts(detached_ratio, prob_old, adv.expand(mask.shape), mask), mask
    )


def _surrogate(ratio: Tensor, adv: Tensor, lower: Bound, upper: Bound) -> Tensor:
    return -torch.minimum(ratio * adv, ratio.clamp(min=lower).clamp(max=upper) * adv)


def reinforce(batch: TokenBatch) -> tuple[Float[Tensor, "b t"], TokenFacts]:
    """Policy gradient without a correction for old samples.

    ``loss = −A·logp``

    Args:
        batch: logp, logp_old [b t] in nats, adv, mask. ``logp_old`` enters the reported ratio only.

    Returns:
        The loss [b t] and its facts; no token is ever clipped.

    REINFORCE; with leave-one-out advantages the strictly on-policy RLOO of arXiv:2603.11682 [paper].

    >>> batch = TokenBatch(torch.tensor([[-0.5, -2.0]]), None, torch.tensor([2.0]), torch.ones(1, 2))
    >>> reinforce(batch)[0]
    tensor([[1., 4.]])
    """
    logp, log_ratio, adv, _ = _prepare(batch)
    return -adv * logp, _facts(log_ratio.exp(), adv, None, None)


def importance(batch: TokenBatch) -> tuple[Float[Tensor, "b t"], TokenFacts]:
    """Policy gradient on old samples, weighted by the unbounded ratio.

    ``loss = −r·A``

    Args:
        batch: logp, logp_old [b t] in nats, adv, mask.

    Returns:
        The loss [b t] and its facts; no token is ever clipped.

    >>> logp, logp_old = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    >>> importance(TokenBatch(logp, logp_old, torch.tensor([1.0]), torch.ones(1, 2)))[0]
    tensor([[-2.0000, -0.5000]])
    """
    _, log_ratio, adv, _ = _prepare(batch)
    ratio = log_ratio.exp()
    return -ratio * adv, _facts(ratio, adv, None, None)


def clipped(
    batch: TokenBatch, clip_low: Bound, clip_high: Bound, bounds: Rule = additive
) -> tuple[Float[Tensor, "b t"], TokenFacts]:
    """Clip the ratio of each token between two independent bounds.

    ``loss = −min(r·A, clip(r, lower, upper)·A)`` with ``[1 − clip_low, 1 + clip_high]`` (additive) or
    ``[1/(1 + clip_low), 1 + clip_high]`` (reciprocal), or by another rule of :mod:`isentropic.losses.clipping`

    A token loses its gradient if A > 0 and r > upper, or if A < 0 and r < lower. Equal widths give PPO and GRPO,
    a wider upper one DAPO. Widths may differ by token.

    Args:
        batch: logp, logp_old [b t] in nats, adv, mask.
        clip_low: width below 1, a number or [b t].
        clip_high: width above 1, a number or [b t].
        bounds: the rule that computes bounds from the widths, with its constants fixed.

    Returns:
        The loss [b t] and its facts.

    Raises:
        ValueError: a width is a negative number.

    PPO (arXiv:1707.06347), DAPO (arXiv:2503.14476).

    >>> logp, logp_old = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    >>> batch = TokenBatch(logp, logp_old, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
    >>> loss, facts = clipped(batch, clip_low=0.2, clip_high=0.28)  # ratios 2 and 0.5
    >>> loss
    tensor([[-1.2800,  0.8000]])
    >>> facts.clipped_low, facts.clipped_high
    (tensor([[False,  True]]), tensor([[ True, False]]))
    """
    _, log_ratio, adv, _ = prepared = _prepare(batch)
    ratio = log_ratio.exp()
    lower, upper = _bounds(clip_low, clip_high, bounds, ratio, prepared)
    return _surrogate(ratio, adv, lower, upper), _facts(ratio, adv, lower, upper)


def sequence_clipped(
    batch: TokenBatch, clip_low: Bound, clip_high: Bound, bounds: Rule = additive, gradient: str = "sequence"
) -> tuple[Float[Tensor, "b t"], TokenFacts]:
    """Clip one ratio per sequence, the geometric mean of the ratios of its tokens.

    ``s = exp(Σ_t m·log r / max(Σ_t m, 1))``, ``loss = −min(s·A, clip(s, lower, upper)·A)`` at every token

    With ``gradient="sequence"`` the gradient of each token's loss spreads evenly over the sequence, so advantages that
    differ between tokens act through their mean alone, and a per-token shaping is lost. ``gradient="token"`` has
    the same value, ``s_t = sg(s)·exp(logp_t − sg(logp_t))``, and gives each token its own advantage. The two agree,
    gradient included, if the advantages of a sequence are equal and its tokens are reduced with equal weights.

    Args:
        batch: logp, logp_old [b t] in nats, adv, mask.
        clip_low: width below 1, a number or [b t]; the published ones are near 3e-4.
        clip_high: width above 1, a number or [b t]; the published ones are near 4e-4.
        bounds: ``additive`` or ``reciprocal`` of :mod:`isentropic.losses.clipping`.
        gradient: ``sequence`` or ``token``; use ``token`` with a per-token shaping.

    Returns:
        The loss [b t] and its facts, whose ratio is s at every token.

    Raises:
        ValueError: a width is a negative number; unknown gradient.

    GSPO and, with ``gradient="token"``, GSPO-token (arXiv:2507.18071).

    >>> logp, logp_old = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.0625]]).log()
    >>> batch = TokenBatch(logp, logp_old, torch.tensor([-1.0]), torch.ones(1, 2))
    >>> sequence_clipped(batch, clip_low=0.2, clip_high=0.2)[0]  # √(2·8) = 4
    tensor([[4., 4.]])
    """
    if gradient not in ("sequence", "token"):
        raise ValueError(f"gradient must be 'sequence' or 'token', got {gradient!r}; choose one")
    logp, log_ratio, adv, mask = prepared = _prepare(batch)
    log_mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if gradient == "token":
        log_mean = log_mean.detach() + (logp - logp.detach())
    ratio = torch.where(mask, log_mean, torch.zeros_like(log_mean)).exp()
    lower, upper = _bounds(clip_low, clip_high, bounds, ratio, prepared)
    return _surrogate(ratio, adv, lower, upper), _facts(ratio, adv, lower, upper)


def cispo(
    batch: TokenBatch,
    clip_low: Bound | None = None,
    clip_high: Bound | None = None,
    bounds: Rule = additive,
    ceiling: float | int | None = None,
) -> tuple[Float[Tensor, "b t"], TokenFacts]:
    """Bound the weight of a token instead of removing its gradient.

    ``loss = −sg(clip(r, lower, upper))·A·logp`` with the bounds of ``clipped``, without a lower one if clip_low is None

    The upper bound is given either as a width, ``1 + clip_high``, or as the highest weight itself, ``ceiling``. TRL's
    ``epsilon_high`` is a ceiling: ``cispo(batch, ceiling=epsilon_high)`` is TRL's loss.

    Args:
        batch: logp, logp_old [b t] in nats, adv, mask.
        clip_low: width below 1, a number or [b t]; ``None`` leaves small weights as they are.
        clip_high: width above 1, a number or [b t].
        bounds: the rule that computes bounds from the widths, with its constants fixed.
        ceiling: the highest weight, > 0, in place of clip_high.

    Returns:
        The loss [b t] and its facts. No token loses its gradient: ``clipped_high`` marks A > 0 with r above the upper
        bound, ``clipped_low`` A < 0 with r below the lower one, as in the other objectives.

    Raises:
        ValueError: both or neither of clip_high and ceiling are given; a width is negative; the ceiling is not > 0.

    MiniMax-M1 (arXiv:2506.13585).

    >>> logp, logp_old = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.1, 0.25]]).log()
    >>> batch = TokenBatch(logp, logp_old, torch.tensor([1.0]), torch.ones(1, 2))
    >>> cispo(batch, clip_high=2.0)[0]  # weights 3 of 5 and 2; −log 0.5 = 0.6931
    tensor([[2.0794, 1.3863]])
    """
    if (clip_high is None) == (ceiling is None):
        got = "neither" if ceiling is None else "both"
        raise ValueError(f"cispo needs either clip_high or ceiling, got {got}; ceiling=5.0 is clip_high=4.0")
    if ceiling is not None and not ceiling > 0:
        raise ValueError(f"ceiling must be > 0, got {ceiling}; it is the highest weight, not a width")
    logp, log_ratio, adv, _ = prepared = _prepare(batch)
    ratio = log_ratio.exp()
    width_low, width_high = (0.0 if width is None else width for width in (clip_low, clip_high))
    lower, upper = _bounds(width_low, width_high, bounds, ratio, prepared)
    lower, upper = (None if clip_low is None else lower), (upper if ceiling is None else ceiling)
    weight = (ratio if lower is None else ratio.clamp(min=lower)).clamp(max=upper).detach()
    return -weight * adv * logp, _facts(ratio, adv, lower, upper)


def gradient_preserving(
    batch: TokenBatch,
    clip_low: Bound,
    clip_high: Bound,
    bounds: Rule = additive,
    *,
    grad_low: float,
    grad_high: float,
) -> tuple[Float[Tensor, "b t"], TokenFacts]:
    """Keep a bounded gradient for tokens that a clip would remove.

    ``loss = −r·A`` inside the clip; ``−grad_low·lower/sg(r)·r·A`` for A < 0 and r < lower;
    ``−grad_high·upper/sg(r)·r·A`` for A > 0 and r > upper

    A clipped token keeps the weight ``grad·bound·A`` instead of ``r·A``, whatever its ratio. With grad_low and
    grad_high at 0 the weights are those of ``clipped``.

    Args:
        batch: logp, logp_old [b t] in nats, adv, mask.
        clip_low, clip_high, bounds: as in ``clipped``.
        grad_low: β₁, the share of the gradient that is kept below the lower bound.
        grad_high: β₂, the share that is kept above the upper one.

    Returns:
        The loss [b t] and its facts; clipped tokens are those with a bounded gradient.

    Raises:
        ValueError: a width is a negative number.

    CE-GPPO (arXiv:2509.20712): β₁ 0.5 to 0.75, β₂ 1.

    >>> logp = torch.tensor([[0.5, 0.25]]).log().requires_grad_()
    >>> batch = TokenBatch(logp, torch.tensor([[0.25, 0.5]]).log(), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
    >>> loss, _ = gradient_preserving(batch, 0.2, 0.28, grad_low=0.5, grad_high=1.0)  # ratios 2 and ½: −1.28, ½·0.8
    >>> loss.detach(), -torch.autograd.grad(loss.sum(), logp)[0]
    (tensor([[-1.2800,  0.4000]]), tensor([[ 1.2800, -0.4000]]))
    """
    _, log_ratio, adv, _ = prepared = _prepare(batch)
    ratio = log_ratio.exp()
    lower, upper = _bounds(clip_low, clip_high, bounds, ratio, prepared)
    facts = _facts(ratio, adv, lower, upper)
    # r/sg(r) has the value 1 and the gradient of log r.
    unit_ratio = (log_ratio - log_ratio.detach()).exp()
    weight = torch.where(
        facts.clipped_low,
        grad_low * lower * unit_ratio,
        torch.where(facts.clipped_high, grad_high * upper * unit_ratio, ratio),
    )
    return -weight * adv, facts


def unbounded_positive(
    batch: TokenBatch, clip_low: Bound, bounds: Rule = additive
) -> tuple[Float[Tensor, "b t"], TokenFacts]:
    """Leave tokens with A > 0 without a ratio and a clip, and clip the others from below.

    ``loss = −A·π/sg(π)`` for A > 0, ``−min(r·A, clip(r)·A)`` for A <= 0

    The value at A > 0 is −A and the weight A, whatever the sampling policy was: a rare right token is pushed as far as
    a likely one. At A <= 0 only the lower bound acts.

    Args:
        batch: logp, logp_old [b t] in nats, adv, mask.
        clip_low: width below 1, a number or [b t].
        bounds: the rule that computes the lower bound from the width, with its constants fixed.

    Returns:
        The loss [b t] and its facts; ``clipped_high`` is false everywhere.

    Raises:
        ValueError: the width is a negative number.

    UP (arXiv:2607.06987), as TRL's UPTrainer has it; its optional dual clip is left out.

    >>> logp = torch.tensor([[0.5, 0.25, 0.5]]).log().requires_grad_()
    >>> logp_old = torch.tensor([[0.25, 0.5, 0.4]]).log()
    >>> batch = TokenBatch(logp, logp_old, torch.tensor([[2.0, -1.0, -1.0]]), torch.ones(1, 3))
    >>> loss, _ = unbounded_positive(batch, clip_low=0.2)
    >>> loss.detach(), -torch.autograd.grad(loss.sum(), logp)[0]  # ratios 2, ½ and 1.25
    (tensor([[-2.0000,  0.8000,  1.2500]]), tensor([[ 2.0000,  0.0000, -1.2500]]))
    """
    logp, log_ratio, adv, _ = prepared = _prepare(batch)
    ratio = log_ratio.exp()
    lower, _ = _bounds(clip_low, 0.0, bounds, ratio, prepared)
    anchored = (logp - logp.detach()).exp()
    loss = torch.where(adv > 0, -adv * anchored, -torch.minimum(ratio * adv, ratio.clamp(min=lower) * adv))
    return loss, _facts(ratio, adv, lower, None)


def sapo(batch: TokenBatch, *, tau_positive: float, tau_negative: float) -> tuple[Float[Tensor, "b t"], TokenFacts]:
    """Let the weight of a token decay as its ratio moves away from 1, instead of clipping it.

    ``loss = −(4/τ)·σ(τ(r − 1))·A`` with τ by the sign of A

    The weight is ``4σ(1 − σ)·r·A``: that of ``−r·A`` at r = 1, and it vanishes on both sides.

    Args:
        batch: logp, logp_old [b t] in nats, adv, mask.
        tau_positive, tau_negative: τ for A > 0 and for A <= 0; the weight decays faster for a larger τ.

    Returns:
        The loss [b t] and its facts; no token is ever clipped.

    SAPO (arXiv:2511.20347).

    >>> logp = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    >>> batch = TokenBatch(logp, torch.tensor([[0.5, 0.25]]).log(), torch.tensor([1.0]), torch.ones(1, 2))
    >>> loss, _ = sapo(batch, tau_positive=1.0, tau_negative=1.05)
    >>> -torch.autograd.grad(loss.sum(), logp)[0]  # r = 1, 2: 1 and 4·σ(1)(1−σ(1))·2
    tensor([[1.0000, 1.5729]])
    """
    _, log_ratio, adv, _ = _prepare(batch)
    ratio = log_ratio.exp()
    tau = torch.full_like(adv, tau_negative).masked_fill(adv > 0, tau_positive)
    return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * adv, _facts(ratio, adv, None, None)
