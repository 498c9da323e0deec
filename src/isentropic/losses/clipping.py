"""Bounds of the importance ratio: clip widths and facts of the tokens in, the lowest and the highest ratio out.

Every rule has one signature, ``(clip_low, clip_high, facts, **constants) -> (lower, upper)``; a width of 0 puts a bound
at 1. The bounds of two rules are numbers; those of the others differ by token or are computed from the whole call.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Width = float | int | Tensor
Bound = float | int | Tensor


class RatioFacts(NamedTuple):
    """The facts a bound may depend on, all ``[b t]`` and without gradient, with zeros outside the mask.

    Attributes:
        ratio: ``π/π_old``.
        prob_old: ``π_old`` of the sampled token.
        adv: advantages.
        mask: true where the token counts.
    """

    ratio: Tensor
    prob_old: Tensor
    adv: Tensor
    mask: Tensor


Rule = Callable[[Any, Any, RatioFacts], tuple[Any, Any]]


def additive(clip_low: Width, clip_high: Width, facts: RatioFacts) -> tuple[Bound, Bound]:
    """``[1 − clip_low, 1 + clip_high]``: PPO (arXiv:1707.06347), DAPO (arXiv:2503.14476)."""
    return 1 - clip_low, 1 + clip_high


def reciprocal(clip_low: Width, clip_high: Width, facts: RatioFacts) -> tuple[Bound, Bound]:
    """``[1/(1 + clip_low), 1 + clip_high]``: with equal widths, symmetric in the logarithm of the ratio."""
    return 1 / (1 + clip_low), 1 + clip_high


def linear(clip_low: Width, clip_high: Width, facts: RatioFacts, *, slope: float) -> tuple[Bound, Bound]:
    """``[1 − clip_low, 1 + max(slope·p_old + clip_high, 0)]``: a likely token can rise less than a rare one.

    Dynamic clip thresholds (arXiv:2602.09782): ``ε_high(p) = α·p + β`` with α < 0; here β is clip_high. α is unknown
    (?), and p is the probability under the old policy, so that the bound is fixed while the token moves [ours].

    >>> facts = RatioFacts(torch.ones(1, 2), torch.tensor([[0.1, 0.9]]), torch.ones(1, 2), torch.ones(1, 2).bool())
    >>> linear(0.2, 0.28, facts, slope=-0.2)
    (0.8, tensor([[1.2600, 1.1000]]))
    """
    return 1 - clip_low, 1 + (slope * facts.prob_old + clip_high).clamp(min=0.0)


def dcpo(clip_low: Width, clip_high: Width, facts: RatioFacts, *, ratio_cap: float) -> tuple[Bound, Bound]:
    """``½ + ½√max(1 − 4·clip_low/q, 0) ≤ r ≤ min(½ + ½√(1 + 4·clip_high/q), ratio_cap)``, q the old probability.

    If the root is real, this is ``−clip_low ≤ (r − 1)·p_new ≤ clip_high``: it bounds the weighted change of the
    probability instead of the ratio, which lets rare tokens change more.

    DCPO (arXiv:2509.02333).

    >>> q = torch.tensor([[1.0, 0.01]])
    >>> facts = RatioFacts(torch.ones(1, 2), q, torch.ones(1, 2), torch.ones(1, 2).bool())
    >>> dcpo(0.16, 0.2, facts, ratio_cap=10.0)  # ½+½·√0.36, …√1.8
    (tensor([[0.8000, 0.5000]]), tensor([[1.1708, 5.0000]]))
    """
    q = facts.prob_old.clamp(min=torch.finfo(facts.prob_old.dtype).tiny)
    lower = 0.5 + 0.5 * (1 - 4 * clip_low / q).clamp(min=0.0).sqrt()
    return lower, (0.5 + 0.5 * (1 + 4 * clip_high / q).sqrt()).clamp(max=ratio_cap)


def balanced(
    clip_low: Width,
    clip_high: Width,
    facts: RatioFacts,
    *,
    positive_share: float,
    lower_to: float,
    upper_to: float,
    lower_step: float,
    upper_step: float,
) -> tuple[Bound, Bound]:
    """Widen the upper bound, then tighten the lower one, until positive advantages carry their share of the loss.

    From ``[1 − clip_low, 1 + clip_high]`` the upper bound rises by ``upper_step`` to ``upper_to``, then the lower one
    by ``lower_step`` to ``lower_to``. The result is the first pair for which
    ``Σ_{A>0} min(r, upper)·A ≥ positive_share·(Σ_{A>0} min(r, upper)·A + Σ_{A<0} max(r, lower)·|A|)``,
    or else the last one.

    The sums are over the tokens of the call inside the mask: each micro-batch has its own pair. No operation
    synchronises with the device.

    Returns:
        Two 0-d tensors.

    Raises:
        ValueError: a width is a tensor; a step is not positive.

    BAPO (arXiv:2510.18927); the steps are ours (?), and the released code moves the lower bound first.

    >>> one = torch.ones(1, 2)
    >>> facts = RatioFacts(torch.tensor([[2.0, 1.0]]), one, torch.tensor([[1.0, -1.5]]), one.bool())
    >>> path = dict(positive_share=0.5, lower_to=0.9, upper_to=3.0, lower_step=0.02, upper_step=0.05)
    >>> balanced(0.4, 0.2, facts, **path)  # min(2, 1.5)·1 = max(1, 0.6)·1.5
    (tensor(0.6000), tensor(1.5000))
    """
    if isinstance(clip_low, Tensor) or isinstance(clip_high, Tensor):
        raise ValueError("balanced bounds are one pair for a call, got widths by token; give numbers")
    adv = torch.where(facts.mask, facts.adv, 0.0)
    positive_adv, negative_adv = adv.clamp(min=0.0), (-adv).clamp(min=0.0)
    device = facts.ratio.device
    lowers, uppers = (torch.as_tensor(x, device=device, dtype=facts.ratio.dtype) for x in (1 - clip_low, 1 + clip_high))
    # Offsets along the two parts of the path; the last offset of each is its end.
    upper_offsets = [i * upper_step for i in range(_num_points(upper_to - 1 - clip_high, upper_step))]
    lower_offsets = [i * lower_step for i in range(_num_points(clip_low - 1 + lower_to, lower_step))]
    uppers = torch.stack([(uppers + x).clamp(max=max(upper_to, 1 + clip_high)) for x in upper_offsets])
    lowers = torch.stack([(lowers + x).clamp(max=max(lower_to, 1 - clip_low)) for x in lower_offsets])
    positive_sums = torch.stack([(facts.ratio.clamp(max=upper) * positive_adv).sum() for upper in uppers])
    negative_sums = torch.stack([(facts.ratio.clamp(min=x) * negative_adv).sum() for x in lowers])
    # The path: every upper bound with the first lower one, then the last upper bound with every lower one.
    num_uppers, num_lowers = len(uppers), len(lowers)
    path_upper = torch.cat([uppers, uppers[-1:].expand(num_lowers - 1)])
    path_lower = torch.cat([lowers[:1].expand(num_uppers), lowers[1:]])
    positive = torch.cat([positive_sums, positive_sums[-1:].expand(num_lowers - 1)])
    negative = torch.cat([negative_sums[:1].expand(num_uppers), negative_sums[1:]])
    is_reached = positive >= positive_share * (positive + negative) * (1 - 1e-6)
    is_reached = torch.cat([is_reached[:-1], torch.ones_like(is_reached[-1:])])
    first_reached = is_reached.int().argmax()
    return path_lower.gather(0, first_reached[None])[0], path_upper.gather(0, first_reached[None])[0]


def _num_points(length: float, step: float) -> int:
    """The number of points on a part of the path of this length, both ends included."""
    if not step > 0:
        raise ValueError(f"balanced bounds move in steps > 0, got {step}")
    return 1 + max(0, math.ceil(length / step - 1e-9))


def bounds_of(
    rule: Rule,
    clip_low: Width,
    clip_high: Width,
    facts: RatioFacts,
    mask: Bool[Tensor, "b t"],
) -> tuple[Bound | Float[Tensor, ""] | Float[Tensor, "b t"], Bound | Float[Tensor, ""] | Float[Tensor, "b t"]]:
    """Compute the lowest and the highest ratio by a rule.

    Args:
        rule: a function of this module with its constants fixed, or one with the same signature.
        clip_low, clip_high: widths, numbers or [b t]; values of a tensor outside the mask count as 0.
        facts: of the tokens, [b t] each.
        mask: [b t] true where the token counts.

    Raises:
        ValueError: a width is a negative number.
    """
    for name, width in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not isinstance(width, Tensor) and not width >= 0:
            raise ValueError(f"{name} must be >= 0, got {width}; it is a width, the bound is on the other side of 1")
    width_low, width_high = (
        torch.where(mask, width, 0.0) if isinstance(width, Tensor) else width for width in (clip_low, clip_high)
    )
    return rule(width_low, width_high, facts)
