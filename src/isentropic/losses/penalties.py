"""Penalties: a term of the loss beside the objective, per token, to be multiplied by its coefficient and added.

Those that look at whole rows take ``logp_rows`` [b t v], the log-probabilities of every token of the vocabulary. Ranks
and shares are over the masked tokens of the call. Outside the mask a penalty is 0.
"""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from .selection import covariance, top


def kl_cov(
    logp: Float[Tensor, "b t"],
    logp_old: Float[Tensor, "b t"] | None,
    adv: Float[Tensor, "b t"],
    mask: Shaped[Tensor, "b t"],
    *,
    kl_share: float,
) -> Float[Tensor, "b t"]:
    """Hold the tokens of the largest covariance near where they were sampled.

    ``|logp − logp_old|`` for the ``max(1, ⌊kl_share·n⌋)`` tokens of the largest ``(A−Ā)(logp−mean logp)``, else 0

    There is no gradient at r = 1, and so none in the first step on a batch.

    Args:
        logp: [b t] log-probabilities under the current policy, with gradient, nats.
        logp_old: [b t] when they were sampled; ``None`` means exactly on-policy.
        adv: [b t] advantages.
        mask: [b t] non-zero where the token counts.
        kl_share: 2e-3 for a 7B model, 2e-4 for 32B in the paper.

    Returns:
        [b t] nats.

    KL-Cov (arXiv:2505.22617): there beside an objective that is not clipped.

    >>> logp, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -2.5]])
    >>> kl_cov(logp, old, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2), kl_share=2e-3)
    tensor([[0.5000, 0.0000]])
    """
    inside = mask.bool()
    held = top(covariance(adv, logp, mask), kl_share, inside)
    before = logp if logp_old is None else logp_old
    moved = torch.where(held, logp - before.detach(), torch.zeros_like(logp))
    return moved.abs()


def lp_reg(
    logp_rows: Float[Tensor, "b t v"],
    logp: Float[Tensor, "b t"],
    adv: Float[Tensor, "b t"],
    mask: Shaped[Tensor, "b t"],
    *,
    lp_share: float,
    lp_kappa: float,
) -> Float[Tensor, "b t"]:
    """Hold up the unlikely tokens that a negative advantage pushes down, unless they look like noise.

    ``KL(π' ‖ π)`` for those of the ``max(1, ⌊lp_share·n⌋)`` least likely of n tokens with A < 0 that π' keeps, else 0,
    ``π' ∝ π`` where ``π ≥ lp_kappa·max_v π`` and 0 elsewhere, as a constant

    Args:
        logp_rows: [b t v] log-probabilities of the rows, with gradient, nats.
        logp: [b t] of the sampled tokens.
        adv: [b t] advantages.
        mask: [b t] non-zero where the token counts.
        lp_share: share of the tokens with A < 0.
        lp_kappa: of the min-p filter.

    Returns:
        [b t] nats.

    Lp-Reg (arXiv:2510.03222): κ 0.02, the lowest 1 %. The rank among tokens with A < 0 and the condition that the
    filter keeps the token are as in code that implements it; the filter is of the current policy [ours].

    >>> rows = torch.tensor([[[0.5, 0.49, 0.01]]]).log()
    >>> lp_reg(rows, rows[..., 1], torch.tensor([[-1.0]]), torch.ones(1, 1), lp_share=0.01, lp_kappa=0.1)  # −log 0.99
    tensor([[0.0101]])
    """
    falling = mask.bool() & (adv < 0)
    fixed = logp_rows.detach()
    floor = fixed.amax(-1, keepdim=True) + math.log(lp_kappa)
    kept = fixed >= floor
    proxy = fixed.masked_fill(~kept, -torch.inf).log_softmax(-1)
    held = top(-logp, lp_share, falling) & (logp.detach() >= floor[..., 0])
    term = proxy.exp() * torch.where(kept, proxy - logp_rows, torch.zeros_like(fixed))
    return torch.where(held, term.sum(-1), torch.zeros_like(logp))


def aent(logp_rows: Float[Tensor, "b t v"], mask: Shaped[Tensor, "b t"], *, aent_drop: float) -> Float[Tensor, "b t"]:
    """The negative entropy of each row over its likeliest tokens alone.

    ``Σ_v π' log π'``, ``π' ∝ π`` on the ``v − ⌊aent_drop·v⌋`` likeliest tokens of the row

    Args:
        logp_rows: [b t v] log-probabilities of the rows, with gradient, nats.
        mask: [b t] non-zero where the token counts.
        aent_drop: share of the vocabulary that is left out.

    Returns:
        [b t] nats, <= 0.

    AEnt (arXiv:2509.03493); 0.3 is its released configuration.

    >>> aent(torch.tensor([[[0.4, 0.4, 0.1, 0.1]]]).log(), torch.ones(1, 1), aent_drop=0.5)  # −log 2
    tensor([[-0.6931]])
    """
    size = logp_rows.shape[-1]
    kept = logp_rows.topk(size - int(aent_drop * size), dim=-1).values.log_softmax(-1)
    total = (kept.exp() * kept).sum(-1)
    return torch.where(mask.bool(), total, torch.zeros_like(total))
