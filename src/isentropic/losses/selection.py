"""Selection: facts of the tokens in, a factor of 0 or 1 on the advantage of each token out.

A dropped token has an advantage of 0 and no effect on the policy. It still counts in the normaliser of the loss and in
the reading of entropy, which is over every token that was generated.

Quantities of a batch (means, ranks, shares) are over the tokens of the call inside the mask: those of one micro-batch,
if an engine splits the step into several. Facts enter as constants. Shares become counts on the device, by ranks, so
that no operation synchronises. Outside the mask a factor is 1.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from . import reduce


def ranks(score: Float[Tensor, "b t"], inside: Bool[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Number the tokens inside the mask by falling score, from 0; ties by position, and the other tokens come last.

    >>> ranks(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, False, True]]))
    tensor([[1, 2, 0]])
    """
    flat = torch.where(inside, score.detach(), -torch.inf).flatten()
    order = flat.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    return rank.scatter_(0, order, torch.arange(len(order), device=order.device)).view(score.shape)


def top(score: Float[Tensor, "b t"], share: float, inside: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Mark the ``share`` of the tokens inside the mask with the largest score: ``max(1, ⌊share·n⌋)`` of n if n > 0.

    >>> top(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 0.5, torch.tensor([[True, True, True, True]]))
    tensor([[False,  True,  True, False]])
    """
    # A share is rarely exact in binary: 0.29·100 must be 29.
    count = (share * inside.sum() + 1e-4).floor().clamp(min=1)
    return inside & (ranks(score, inside) < count)


def covariance(
    adv: Float[Tensor, "b t"], logp: Float[Tensor, "b t"], mask: Shaped[Tensor, "b t"]
) -> Float[Tensor, "b t"]:
    """``(A − mean A)·(logp − mean logp)`` of each token, whose mean is the covariance that drives entropy; 0 outside.

    Cui et al. (arXiv:2505.22617).

    >>> covariance(torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    adv, logp = adv.detach(), logp.detach()
    cov = (adv - reduce.token(adv, mask).mean()) * (logp - reduce.token(logp, mask).mean())
    return torch.where(mask.bool(), cov, 0.0)


def clip_cov(
    adv: Float[Tensor, "b t"],
    logp: Float[Tensor, "b t"],
    mask: Shaped[Tensor, "b t"],
    clipped: Bool[Tensor, "b t"] | None = None,
    *,
    cov_share: float,
    cov_low: float,
    cov_high: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b t"]:
    """Drop a few tokens, drawn at random from those whose covariance is large.

    0 for ``max(1, ⌊cov_share·n⌋)`` tokens drawn from those with ``cov_low < (A−Ā)(logp−mean logp) < cov_high``, else 1

    Args:
        adv: [b t] advantages.
        logp: [b t] log-probabilities of the sampled tokens under the current policy, nats.
        mask: [b t] non-zero where the token counts; n of them do.
        clipped: [b t] true for tokens that a clip has already removed, which are not drawn.
        cov_share: share of the n tokens that is dropped, if so many qualify.
        cov_low, cov_high: bounds of the covariance, in nats times the unit of the advantage.
        generator: the random generator of the draw; ``None`` uses the device's global one.

    Returns:
        [b t] factors.

    Clip-Cov (arXiv:2505.22617), with the draw and the exclusion of its published code.

    >>> adv, logp = torch.tensor([[2.0, -2.0, 0.0]]), torch.tensor([[-0.5, -2.0, -0.5]])  # cov 1, 2, 0
    >>> clip_cov(adv, logp, torch.ones(1, 3), cov_share=2e-4, cov_low=1.5, cov_high=5.0)
    tensor([[1., 0., 1.]])
    """
    cov, inside = covariance(adv, logp, mask), mask.bool()
    eligible = inside & (cov > cov_low) & (cov < cov_high)
    eligible = eligible if clipped is None else eligible & ~clipped
    count = (cov_share * inside.sum() + 1e-4).floor().clamp(min=1)
    draw = torch.rand(cov.shape, generator=generator, device=cov.device)
    dropped = eligible & (ranks(draw, eligible) < count)
    return (~dropped).to(cov.dtype)


def high_entropy(
    entropy: Float[Tensor, "b t"], mask: Shaped[Tensor, "b t"], *, entropy_share: float
) -> Float[Tensor, "b t"]:
    """Keep the tokens whose rows have the highest entropy: ``max(1, ⌊entropy_share·n⌋)`` of the n that count.

    Args:
        entropy: [b t] entropy of the rows, nats.
        mask: [b t] non-zero where the token counts.
        entropy_share: share of the n tokens that is kept.

    Returns:
        [b t] factors.

    The 80/20 rule (arXiv:2506.01939). The published loss divides by the tokens kept; here a selection never changes the
    normaliser [ours], so that the loss is the published one times the share.

    >>> high_entropy(torch.tensor([[0.1, 2.0, 0.3, 0.2, 1.0]]), torch.ones(1, 5), entropy_share=0.2)
    tensor([[0., 1., 0., 0., 0.]])
    """
    inside = mask.bool()
    kept = top(entropy, entropy_share, inside)
    return (kept | ~inside).to(entropy.dtype)


def erc(
    entropy: Float[Tensor, "b t"],
    entropy_old: Float[Tensor, "b t"] | None,
    mask: Shaped[Tensor, "b t"],
    *,
    erc_width: float,
) -> Float[Tensor, "b t"]:
    """Drop the tokens whose row has changed its entropy too much since they were sampled.

    1 if ``1 − w < H/H_old < 1 + w`` or the entropy has not changed, else 0

    Args:
        entropy: [b t] entropy of the rows now, nats.
        entropy_old: [b t] entropy of the same rows when the tokens were sampled; ``None`` if they have not changed.
        mask: [b t] non-zero where the token counts.
        erc_width: w.

    Returns:
        [b t] factors.

    Entropy ratio clipping, ERC (arXiv:2512.05591).

    >>> erc(torch.tensor([[1.0, 1.04, 0.9]]), torch.ones(1, 3), torch.ones(1, 3), erc_width=0.05)
    tensor([[1., 1., 0.]])
    """
    if entropy_old is None:
        return torch.ones_like(entropy.detach())
    now, before = entropy.detach(), entropy_old.detach()
    kept = (now == before) | ((now - before).abs() < erc_width * before)
    return (kept | ~mask.bool()).to(now.dtype)
