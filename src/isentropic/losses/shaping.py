"""Shaping: an advantage, facts of the tokens and a knob in, an advantage per token out.

Here ``L = logp + H`` is the centred log-probability of a token, in nats: positive if the token was likelier than the
expectation of its row. ``logp``, the entropy and a predicted change enter as constants; no gradient passes through
them. A knob at rest (0, or 1 for a boost) returns the advantage bit for bit.

Tokens outside the mask may have any value; their results are meaningless, and objectives drop them.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from . import reduce
from .selection import top

Advantage = Float[Tensor, " b"] | Float[Tensor, "b 1"] | Float[Tensor, "b t"]
Knob = float | int | Float[Tensor, ""] | Float[Tensor, "b t"]


def _per_token(adv: Tensor, logp: Tensor) -> Tensor:
    """Repeat the advantage along the tokens, at least in fp32."""
    adv = adv.unsqueeze(1) if adv.dim() == 1 else adv
    return adv.to(torch.promote_types(adv.dtype, torch.float32)).expand(logp.shape)


def _unless_zero(knob: Knob, shaped: Tensor, adv: Tensor) -> Tensor:
    """Return the unshaped advantage if the knob is 0, because 0·(−inf) would not be 0."""
    if isinstance(knob, Tensor):
        return torch.where(knob == 0, adv, shaped)
    return adv if knob == 0 else shaped


def repo(adv: Advantage, logp: Float[Tensor, "b t"], entropy: Float[Tensor, "b t"], beta: Knob) -> Float[Tensor, "b t"]:
    """Lower the advantage of likely tokens: the general form of REPO.

    ``A' = A − β·L``, ``L = logp + H``

    β > 0 raises entropy, β < 0 lowers it. With a constant β this is the score-function estimate of the gradient of an
    entropy bonus ``β·H``.

    Args:
        adv: [b t], [b 1] or [b] advantages.
        logp: [b t] log-probabilities of the sampled tokens under the latest policy, nats.
        entropy: [b t] entropy of their rows, nats.
        beta: advantage per nat; a number, a 0-d tensor or [b t].

    Returns:
        [b t] advantages.

    REPO (arXiv:2603.11682) [paper].

    >>> repo(torch.tensor([1.0]), torch.tensor([[-0.5, -3.0]]), torch.tensor([[1.0, 1.0]]), beta=0.5)  # L = 0.5, −2
    tensor([[0.7500, 2.0000]])
    """
    adv = _per_token(adv, logp)
    return _unless_zero(beta, adv - beta * (logp + entropy).detach(), adv)


def repo_failing(
    adv: Advantage,
    logp: Float[Tensor, "b t"],
    entropy: Float[Tensor, "b t"],
    group_rate: Float[Tensor, " b"],
    beta: Knob,
) -> Float[Tensor, "b t"]:
    """REPO for groups that fail: full strength on prompts that are never solved, none on those that always are.

    ``A' = A − β·(1 − ρ)·L``, ``L = logp + H``

    Args:
        adv: [b t], [b 1] or [b] advantages.
        logp: [b t] log-probabilities of the sampled tokens under the latest policy, nats.
        entropy: [b t] entropy of their rows, nats.
        group_rate: [b] ρ, the success rate of the completion's group, a share.
        beta: advantage per nat; a number, a 0-d tensor or [b t].

    Returns:
        [b t] advantages.

    REPO (arXiv:2603.11682) [paper]; the weight is ours.

    >>> logp, entropy = torch.tensor([[-3.0], [-3.0]]), torch.ones(2, 1)
    >>> repo_failing(torch.tensor([1.0, 1.0]), logp, entropy, torch.tensor([0.0, 0.75]), beta=0.5)  # L = −2
    tensor([[2.0000],
            [1.2500]])
    """
    return repo(adv, logp, entropy, beta * (1 - group_rate[:, None]).expand_as(logp))


def repo_r(
    adv: Advantage,
    logp: Float[Tensor, "b t"],
    zeta: Knob,
    entropy: Float[Tensor, "b t"] | None = None,
    *,
    positive_only: bool = False,
    clamp: bool = True,
    sign: str = "raises",
) -> Float[Tensor, "b t"]:
    """Rescale the advantage of each token by how likely it was.

    ``A' = A − ζ·|A|·L``, where L is ``logp`` (raw) or ``logp + H`` (centred)

    The raw form is ``A·(1 − ζ·logp)`` for A > 0 and ``A·(1 + ζ·logp)`` for A < 0 [paper]. The centred form has the same
    expected gradient if |A| does not depend on the token, on-policy, unclipped and unclamped [derived]; the raw form
    also shifts the mean advantage: with ζ > 0 it amplifies every A > 0 and attenuates every A < 0.

    The clamp keeps the sign of A. With ζ > 0 it binds in the raw form only if A < 0 and the surprisal is above 1/ζ; in
    the centred form if A > 0 and L > 1/ζ, or A < 0 and L < −1/ζ [derived].

    Args:
        adv: [b t], [b 1] or [b] advantages.
        logp: [b t] log-probabilities of the sampled tokens under the latest policy, nats.
        zeta: per nat; a number, a 0-d tensor or [b t]; the paper's magnitudes lie in [1e-4, 0.05].
        entropy: [b t] entropy of their rows, nats, to centre logp; ``None`` gives the raw form, as in the paper.
        positive_only: shape A > 0 alone, ``A' = A − ζ·max(A, 0)·L`` [paper, an earlier version].
        clamp: keep A > 0 from falling below 0 and A < 0 from rising above it.
        sign: ``raises`` if a positive ζ raises entropy, the general form of the paper; ``lowers`` for the opposite
            convention.

    Returns:
        [b t] advantages.

    Raises:
        ValueError: unknown sign.

    REPO-R (arXiv:2603.11682) [paper]; the centred form is [ours].

    >>> logp = torch.tensor([[-1.0, -4.0], [-1.0, -4.0]])
    >>> repo_r(torch.tensor([1.0, -1.0]), logp, zeta=0.5)  # the last one is clamped from +1
    tensor([[ 1.5000,  3.0000],
            [-0.5000,  0.0000]])
    """
    if sign not in ("raises", "lowers"):
        raise ValueError(
            f"sign must be 'raises' or 'lowers', got {sign!r}; say which way a positive zeta moves entropy"
        )
    adv = _per_token(adv, logp)
    centred = (logp if entropy is None else logp + entropy).detach()
    size = adv.clamp(min=0.0) if positive_only else adv.abs()
    shaped = adv - (zeta if sign == "raises" else -zeta) * size * centred
    if clamp:
        shaped = torch.where(adv > 0, shaped.clamp(min=0.0), shaped.clamp(max=0.0))
    return _unless_zero(zeta, shaped, adv)


def repo_d(
    adv: Advantage,
    logp: Float[Tensor, "b t"],
    entropy: Float[Tensor, "b t"],
    predicted: Float[Tensor, "b t"],
    zeta: Knob,
    mask: Shaped[Tensor, "b t"],
    *,
    per: str = "token",
) -> Float[Tensor, "b t"]:
    """Oppose the fall of entropy that the step is predicted to make.

    ``A' = A − β·L``, ``β = ζ·max(−ΔĤ, 0)``, with ΔĤ of each token or its mean over the batch

    ζ > 0 opposes falls, ζ < 0 amplifies them; a predicted rise leaves the advantage as it was. So a larger ζ never asks
    for less entropy, and a controller that holds entropy at a target is not turned against it while it recovers. With
    ``per="token"`` the term opposes the fall in 92–94 % of random states, with ``per="batch"`` in all of those tried
    [derived].

    Args:
        adv: [b t], [b 1] or [b] advantages.
        logp: [b t] log-probabilities of the sampled tokens under the latest policy, nats.
        entropy: [b t] entropy of their rows, nats.
        predicted: [b t] predicted entropy change ΔĤ of each token, as ``entropy.prediction`` computes it.
        zeta: ζ, advantage per nat and unit of ΔĤ; a number, a 0-d tensor or [b t].
        mask: [b t] non-zero where the token counts; read with ``per="batch"`` only.
        per: ``token`` uses each token's own ΔĤ, ``batch`` the mean over the tokens of this call. For a mean over more
            than this call (micro-batches, ranks) pass that mean, repeated to [b t], as ``predicted`` with ``token``.

    Returns:
        [b t] advantages.

    Raises:
        ValueError: unknown per.

    REPO-D (arXiv:2603.11682): the paper gives β = ζ·ΔH in one sentence; the sign, both readings of ΔH and that rises
    are left alone are a reconstruction [ours].

    >>> logp, entropy = torch.tensor([[-0.5, -3.0]]), torch.tensor([[1.0, 1.0]])  # L = 0.5, −2
    >>> predicted = torch.tensor([[-1.0, 0.5]])
    >>> repo_d(torch.tensor([1.0]), logp, entropy, predicted, 0.5, torch.ones(1, 2))  # β = 0.5, 0
    tensor([[0.7500, 1.0000]])
    """
    if per not in ("token", "batch"):
        raise ValueError(f"per must be 'token' or 'batch', got {per!r}; choose one")
    predicted = predicted.detach()
    change = predicted if per == "token" else reduce.token(predicted, mask).mean()
    adv = _per_token(adv, logp)
    return _unless_zero(zeta, adv + zeta * change.clamp(max=0.0) * (logp + entropy).detach(), adv)


def sign_weight(adv: Advantage, logp: Float[Tensor, "b t"], alpha: Knob) -> Float[Tensor, "b t"]:
    """Weigh samples above the baseline against samples below it.

    ``A' = A·(1 + α·sign A)``

    α > 0 emphasises the samples with A > 0, which lowers entropy as a rule; α < 0 those with A < 0, which raises it.

    Args:
        adv: [b t], [b 1] or [b] advantages.
        logp: [b t], of which only the shape is used.
        alpha: in [−1, 1]; a number, a 0-d tensor or [b t].

    Returns:
        [b t] advantages.

    EntroPIC (arXiv:2511.15248): weights 1 + α and 1 − α on positive and negative samples.

    >>> sign_weight(torch.tensor([1.0, -1.0]), torch.zeros(2, 1), alpha=-0.25)
    tensor([[ 0.7500],
            [-1.2500]])
    """
    adv = _per_token(adv, logp)
    return _unless_zero(alpha, adv * (1 + alpha * adv.sign()), adv)


def one_sided(adv: Advantage, logp: Float[Tensor, "b t"], reject: Knob) -> Float[Tensor, "b t"]:
    """Reduce the advantage, down to 0, of samples above the baseline, or else of samples below it.

    ``A' = A·(1 − max(ρ, 0))`` for A > 0, ``A·(1 − max(−ρ, 0))`` for A < 0

    ρ = 1 keeps only A <= 0, which raises entropy as a rule; ρ = −1 keeps only A >= 0.

    Args:
        adv: [b t], [b 1] or [b] advantages.
        logp: [b t], of which only the shape is used.
        reject: ρ in [−1, 1]; a number, a 0-d tensor or [b t].

    Returns:
        [b t] advantages.

    [ours], after Entrocraft (arXiv:2604.26326), which rejects by the reward itself: ``one_sided_reward``.

    >>> one_sided(torch.tensor([2.0, -1.0]), torch.zeros(2, 1), reject=1.0).flatten()
    tensor([ 0., -1.])
    """
    adv = _per_token(adv, logp)
    share = torch.as_tensor(reject, dtype=adv.dtype, device=adv.device)
    dropped = torch.where(adv > 0, share.clamp(min=0.0), (-share).clamp(min=0.0))
    return adv * (1 - dropped)


def one_sided_reward(
    adv: Advantage, logp: Float[Tensor, "b t"], reward: Float[Tensor, " b"], reject: Knob
) -> Float[Tensor, "b t"]:
    """Learn from wrong answers alone, or from right ones alone, by the reward itself and not by its group.

    ``A' = (1 − |ρ|)·A + max(ρ, 0)·min(R, 0) + max(−ρ, 0)·max(R, 0)``, R = 1 if the reward is above 0, else −1

    ρ = 1 gives −1 to every wrong answer and 0 to every right one, in groups without a right answer too; ρ = −1 gives 1
    to every right one and 0 to every wrong one. On-policy and unclipped the two have one expected gradient,
    ``∇E[1 right] = −∇E[1 wrong]``: they differ only in the noise of the sample and in the clip [derived]. By the group,
    in ``one_sided``, they weigh easy and hard prompts differently.

    Args:
        adv: [b t], [b 1] or [b] advantages, which ρ = 0 returns.
        logp: [b t], of which only the shape is used.
        reward: [b]; NaN for an answer that was not scored, which keeps its advantage.
        reject: ρ in [−1, 1]; a number, a 0-d tensor or [b t].

    Returns:
        [b t] advantages.

    Entrocraft (arXiv:2604.26326), as its released code has it: ρ in {−1, 0, 1} and rewards of ±1. Values between, and
    the sign for graded rewards, are [ours].

    >>> one_sided_reward(torch.zeros(2), torch.zeros(2, 1), torch.tensor([1.0, 0.0]), reject=1.0).flatten()
    tensor([ 0., -1.])
    """
    adv = _per_token(adv, logp)
    share = torch.as_tensor(reject, dtype=adv.dtype, device=adv.device)
    right = (reward > 0)[:, None].expand(adv.shape)
    kept = torch.where(right, (-share).clamp(min=0.0), -share.clamp(min=0.0))
    scored = reward.isfinite()[:, None]
    return _unless_zero(reject, torch.where(scored, (1 - share.abs()) * adv + kept, adv), adv)


def steer(
    adv: Advantage,
    logp: Float[Tensor, "b t"],
    logp_old: Float[Tensor, "b t"] | None,
    entropy: Float[Tensor, "b t"],
    mask: Shaped[Tensor, "b t"],
    *,
    steer_least: float | int,
) -> Float[Tensor, "b t"]:
    """Damp the tokens whose entropy a step would change most, in either direction.

    ``A' = A·exp(−k·|Ω|)``, ``Ω = A·r·(1 − π)·L``, ``k = −log(steer_least)/max(max |Ω|, 0.02)``, ``L = logp + H``

    The token of the largest |Ω| of the call keeps the share ``steer_least`` of its advantage; if all are below 0.02, it
    keeps more.

    Args:
        adv: [b t], [b 1] or [b] advantages.
        logp: [b t] log-probabilities of the sampled tokens under the latest policy, nats.
        logp_old: [b t] when they were sampled; ``None`` means exactly on-policy.
        entropy: [b t] entropy of their rows, nats.
        mask: [b t] non-zero where the token counts.
        steer_least: the smallest weight, in (0, 1].

    Returns:
        [b t] advantages.

    Raises:
        ValueError: steer_least outside (0, 1].

    STEER (arXiv:2510.10150), as its released code has it, with 0.8 as the smallest weight.

    >>> logp, entropy, one = torch.tensor([[0.5, 0.25]]).log(), torch.ones(1, 2), torch.ones(1, 2)
    >>> steer(torch.tensor([1.0]), logp, None, entropy, one, steer_least=0.8)  # Ω = ½·0.3069 and ¾·(−0.3863)
    tensor([[0.8885, 0.8000]])
    """
    if not 0 < steer_least <= 1:
        raise ValueError(f"steer_least must be in (0, 1], got {steer_least}; 0.8 is the released one")
    adv = _per_token(adv, logp)
    logp = logp.detach()
    ratio = torch.ones_like(logp) if logp_old is None else (logp - logp_old.detach()).exp()
    change = adv * ratio * (1 - logp.exp()) * (logp + entropy.detach())
    change = torch.where(mask.bool() & change.isfinite(), change, torch.zeros_like(change)).abs()
    return adv * steer_least ** (change / change.amax().clamp(min=0.02))


def entropy_balance(
    adv: Advantage, logp: Float[Tensor, "b t"], entropy: Float[Tensor, "b t"], mask: Shaped[Tensor, "b t"]
) -> Float[Tensor, "b t"]:
    """Weigh tokens that raise entropy against tokens that lower it, so that the predicted change of the call is 0.

    ``A' = (1 + λ)·A`` where ΔĤ > 0, ``(1 − λ)·A`` where ΔĤ < 0, ``λ = −Σ ΔĤ/Σ |ΔĤ|``, ``ΔĤ = −A·π·L``, ``L = logp + H``

    λ is in [−1, 1]; if every token lowers entropy, λ = 1 and nothing is learnt.

    Args:
        adv: [b t], [b 1] or [b] advantages.
        logp: [b t] log-probabilities of the sampled tokens under the latest policy, nats.
        entropy: [b t] entropy of their rows, nats.
        mask: [b t] non-zero where the token counts.

    Returns:
        [b t] advantages.

    OPEFO (arXiv:2605.11491), the weights and λ by a secondary account. Its ΔĤ is also a function of A, log π and H, but
    its form could not be confirmed (?): here it is the prediction without moments of ``entropy.prediction`` [ours].

    >>> logp, entropy = torch.tensor([[0.5, 0.25]]).log(), torch.ones(1, 2)  # −π·L = −½·0.3069 and ¼·0.3863
    >>> entropy_balance(torch.tensor([1.0]), logp, entropy, torch.ones(1, 2))  # λ = 0.0569/0.2500
    tensor([[0.7726, 1.2274]])
    """
    adv, logp = _per_token(adv, logp), logp.detach()
    change = -adv * logp.exp() * (logp + entropy.detach())
    change = torch.where(mask.bool() & change.isfinite(), change, torch.zeros_like(change))
    total = change.abs().sum()
    balance = -change.sum() / torch.where(total > 0, total, 1.0)
    return adv * (1 + balance * change.sign())


def tempered(
    adv: Advantage,
    logp: Float[Tensor, "b t"],
    logp_rows: Float[Tensor, "b t v"],
    reward: Float[Tensor, " b"],
    mask: Shaped[Tensor, "b t"],
    tilt: Knob,
    *,
    temper_high: float,
    temper_low: float,
) -> Float[Tensor, "b t"]:
    """Reinforce right answers as if they had been sampled at another temperature.

    ``A' = (A + a·ρ)/(1 + a)`` for right answers, ``A/(1 + a)`` for the others, ``a = |κ|/share of right answers``,
    ``ρ = π_T/π``, ``π_T ∝ π^(1/T)``, T = temper_high if κ > 0, else temper_low

    The importance weight ρ of a token is above 1 if the temperature T would draw it more often. The share is that of
    the call; without a right answer nothing changes.

    Args:
        adv: [b t], [b 1] or [b] advantages.
        logp: [b t] log-probabilities of the sampled tokens under the latest policy, nats.
        logp_rows: [b t v] log-probabilities of whole rows under the latest policy, nats.
        reward: [b]; an answer is right if it is above 0; NaN for an answer that was not scored.
        mask: [b t] non-zero where the token counts.
        tilt: κ, advantage; a number, a 0-d tensor or [b t].
        temper_high, temper_low: temperatures relative to that of the policy.

    Returns:
        [b t] advantages.

    Distribution-centric policy optimization (arXiv:2601.12730), as its released code has it, where |κ| is |H* − H|
    in nats, at most 0.1, and π is the policy that sampled; the latest one in its place is [ours].

    >>> rows = torch.tensor([[[0.8, 0.2]], [[0.8, 0.2]]]).log()  # at T = 2: ⅔ and ⅓
    >>> tempered(torch.ones(2), rows[..., 1], rows, torch.tensor([1.0, 0.0]), torch.ones(2, 1), 0.1,
    ...          temper_high=2.0, temper_low=0.8).flatten()  # ρ = 5/3, a = 0.1/½
    tensor([1.1111, 0.8333])
    """
    adv, logp, logp_rows = _per_token(adv, logp), logp.detach(), logp_rows.detach()
    tilt = torch.as_tensor(tilt, dtype=adv.dtype, device=adv.device)
    temperature = torch.where(tilt > 0, temper_high, temper_low).to(adv.dtype)
    ratio = (logp / temperature - (logp_rows / temperature[..., None]).logsumexp(-1) - logp).exp()
    counted = mask.bool().any(1) & reward.isfinite()
    right = counted & (reward > 0)
    share = right.sum().to(adv.dtype) / counted.sum().clamp(min=1)
    size = tilt.abs() / torch.where(share > 0, share, 1.0)
    shaped = (adv + size * torch.where(right[:, None], ratio, 0.0)) / (1 + size)
    return torch.where((share > 0) & (tilt != 0), shaped, adv)


def surprisal_boost(
    adv: Advantage,
    logp: Float[Tensor, "b t"],
    mask: Shaped[Tensor, "b t"],
    boost: Knob,
    *,
    surprisal_share: float,
) -> Float[Tensor, "b t"]:
    """Amplify the advantage of the rarest tokens among those with A > 0.

    ``A' = W·A`` if A > 0 and the token is among the ``max(1, ⌊surprisal_share·n⌋)`` of the n tokens of the call with
    the largest surprisal, else A

    Args:
        adv: [b t], [b 1] or [b] advantages.
        logp: [b t] log-probabilities of the sampled tokens under the latest policy, nats.
        mask: [b t] non-zero where the token counts.
        boost: W; a number, a 0-d tensor or [b t]; 1 changes nothing.
        surprisal_share: share of all tokens of the call inside the mask.

    Returns:
        [b t] advantages.

    STARE (arXiv:2606.19236): the top 10 %, W up to 1.5. That the share is of all tokens, not of those with A > 0, is
    our reading [ours].

    >>> logp = torch.tensor([[-0.1, -3.0], [-0.2, -0.3]])
    >>> surprisal_boost(torch.tensor([1.0, -1.0]), logp, torch.ones(2, 2), boost=1.5, surprisal_share=0.1)
    tensor([[ 1.0000,  1.5000],
            [-1.0000, -1.0000]])
    """
    adv = _per_token(adv, logp)
    boosted = top(-logp.detach(), surprisal_share, mask.bool()) & (adv > 0)
    return torch.where(boosted, boost * adv, adv)
