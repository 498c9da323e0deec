"""Penalties: a term per token that is multiplied by its coefficient and added to the loss of the objective.

Those that need whole rows take ``logp_rows`` [b t v], the log-probabilities of every token of the vocabulary. Ranks and
shares are over the tokens of the call inside the mask. Outside the mask a penalty is 0.
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
    """Keep the tokens with the largest covariance near the policy that sampled them.

    ``|logp − logp_old|`` for the ``max(1, ⌊kl_share·n⌋)`` tokens of the largest ``(A−Ā)(logp−mean logp)``, else 0

    The gradient is 0 at r = 1, and so in the first step on a batch.

    Args:
        logp: [b t] log-probabilities under the current policy, with gradient, nats.
        logp_old: [b t] when they were sampled; ``None`` means exactly on-policy.
        adv: [b t] advantages.
        mask: [b t] non-zero where the token counts.
        kl_share: share of the n tokens; 2e-3 for a 7B model, 2e-4 for 32B in the paper.

    Returns:
        [b t] nats.

    KL-Cov (arXiv:2505.22617): the paper combines it with an objective that is not clipped.

    >>> logp, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -2.5]])
    >>> kl_cov(logp, old, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2), kl_share=2e-3)
    tensor([[0.5000, 0.0000]])
    """
    inside = mask.bool()
    selected = top(covariance(adv, logp, mask), kl_share, inside)
    reference = logp if logp_old is None else logp_old
    difference = torch.where(selected, logp - reference.detach(), torch.zeros_like(logp))
    return difference.abs()


def lp_reg(
    logp_rows: Float[Tensor, "b t v"],
    logp: Float[Tensor, "b t"],
    adv: Float[Tensor, "b t"],
    mask: Shaped[Tensor, "b t"],
    *,
    lp_share: float,
    lp_kappa: float,
) -> Float[Tensor, "b t"]:
    """Protect the unlikely tokens that a negative advantage pushes down, unless they look like noise.

    ``KL(π' ‖ π)`` for those of the ``max(1, ⌊lp_share·n⌋)`` least likely of n tokens with A < 0 that π' keeps, else 0;
    π' is a constant, with ``π' ∝ π`` for tokens with ``π ≥ lp_kappa·max_v π``, else 0

    Args:
        logp_rows: [b t v] log-probabilities of the rows, with gradient, nats.
        logp: [b t] of the sampled tokens.
        adv: [b t] advantages.
        mask: [b t] non-zero where the token counts.
        lp_share: share of the tokens with A < 0.
        lp_kappa: κ, the threshold of the min-p filter.

    Returns:
        [b t] nats.

    Lp-Reg (arXiv:2510.03222): κ 0.02, the lowest 1 %. The rank among tokens with A < 0 and the condition that the
    filter keeps the token follow code that implements it; the filter is of the current policy [ours].

    >>> rows = torch.tensor([[[0.5, 0.49, 0.01]]]).log()
    >>> lp_reg(rows, rows[..., 1], torch.tensor([[-1.0]]), torch.ones(1, 1), lp_share=0.01, lp_kappa=0.1)  # −log 0.99
    tensor([[0.0101]])
    """
    pushed_down = mask.bool() & (adv < 0)
    detached = logp_rows.detach()
    floor = detached.amax(-1, keepdim=True) + math.log(lp_kappa)
    kept = detached >= floor
    proxy = detached.masked_fill(~kept, -torch.inf).log_softmax(-1)
    selected = top(-logp, lp_share, pushed_down) & (logp.detach() >= floor[..., 0])
    kl_terms = proxy.exp() * torch.where(kept, proxy - logp_rows, torch.zeros_like(detached))
    return torch.where(selected, kl_terms.sum(-1), torch.zeros_like(logp))


def aent(logp_rows: Float[Tensor, "b t v"], mask: Shaped[Tensor, "b t"], *, aent_drop: float) -> Float[Tensor, "b t"]:
    """Return the negative entropy of each row over its likeliest tokens only.

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
    likeliest = logp_rows.topk(size - int(aent_drop * size), dim=-1).values.log_softmax(-1)
    # A token that is never sampled, log π = −∞, adds 0 and not 0·∞.
    negative_entropy = (likeliest.exp() * likeliest.clamp(min=torch.finfo(likeliest.dtype).min)).sum(-1)
    return torch.where(mask.bool(), negative_entropy, torch.zeros_like(negative_entropy))


def tre_p(logp_rows: Float[Tensor, "b t v"], mask: Shaped[Tensor, "b t"], *, tre_mass: float) -> Float[Tensor, "b t"]:
    """Return the negative entropy of each row over its nucleus, scaled to the range of the whole vocabulary.

    ``log v/log n · Σ_v π' log π'``, ``π' ∝ π`` on the n likeliest tokens that reach the mass ``tre_mass``; 0 if n is 1

    Args:
        logp_rows: [b t v] log-probabilities of the rows, with gradient, nats.
        mask: [b t] non-zero where the token counts.
        tre_mass: probability of the nucleus, in (0, 1); the token that reaches it is part of it.

    Returns:
        [b t] nats, <= 0.

    TRE-P (arXiv:2602.03635), as its released code has it, without its limit of 256 tokens.

    >>> tre_p(torch.tensor([[[0.4, 0.4, 0.1, 0.1]]]).log(), torch.ones(1, 1), tre_mass=0.7)  # log 4/log 2 · log 2
    tensor([[-1.3863]])
    """
    sorted_rows = logp_rows.sort(-1, descending=True).values
    p = sorted_rows.detach().exp()
    return _scaled_entropy(sorted_rows, p.cumsum(-1) - p < tre_mass, mask)


def tre_k(
    logp_rows: Float[Tensor, "b t v"], mask: Shaped[Tensor, "b t"], *, tre_keep: float | int
) -> Float[Tensor, "b t"]:
    """Return the negative entropy of each row over its likeliest tokens, scaled to the range of the whole vocabulary.

    ``log v/log k · Σ_v π' log π'``, ``π' ∝ π`` on the k = ``tre_keep`` likeliest tokens

    Args:
        logp_rows: [b t v] log-probabilities of the rows, with gradient, nats.
        mask: [b t] non-zero where the token counts.
        tre_keep: k, at least 2.

    Returns:
        [b t] nats, <= 0.

    TRE-K (arXiv:2602.03635), as its released code has it: k = 2.

    >>> tre_k(torch.tensor([[[0.4, 0.4, 0.1, 0.1]]]).log(), torch.ones(1, 1), tre_keep=2)
    tensor([[-1.3863]])
    """
    sorted_rows = logp_rows.sort(-1, descending=True).values
    kept = (torch.arange(sorted_rows.shape[-1], device=sorted_rows.device) < tre_keep).expand(sorted_rows.shape)
    return _scaled_entropy(sorted_rows, kept, mask)


def _scaled_entropy(rows: Float[Tensor, "b t v"], kept: Tensor, mask: Shaped[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Negative entropy over the kept tokens of each row, times log v over the log of their number."""
    local = rows.masked_fill(~kept, -torch.inf).log_softmax(-1)
    terms = torch.where(local.detach() > -torch.inf, local.exp() * local.clamp(min=torch.finfo(local.dtype).min), 0.0)
    num_kept = kept.sum(-1)
    scale = math.log(rows.shape[-1]) / num_kept.clamp(min=2).to(local.dtype).log()
    return torch.where(mask.bool() & (num_kept > 1), scale * terms.sum(-1), torch.zeros_like(scale))
