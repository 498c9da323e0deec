"""Rewards [p g] to advantages [b], with b = p·g and the samples of a prompt side by side.

Shared rules. A reward that is NaN or infinite means "not scorable": the sample takes no part in the statistics of its
group and its advantage is 0. For every baseline computed from the group, a group whose scorable rewards are all equal
(or that has only one) gets exactly 0, so that rounding in the baseline never becomes a gradient.
"""

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

INTERPOLATIONS = ("linear", "lower", "higher", "midpoint", "nearest", "inverted_cdf")


def _scorable(rewards: Float[Tensor, "p g"]) -> Float[Tensor, "p g"]:
    """Return the rewards at least in fp32, with NaN for every one that is not scorable."""
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    return torch.where(rewards.isfinite(), rewards, math.nan)


def _mean(rewards: Float[Tensor, "p g"]) -> Float[Tensor, "p 1"]:
    """Return the mean over scorable samples; 0 for a group that has none."""
    scorable = ~rewards.isnan()
    return rewards.nansum(dim=1, keepdim=True) / scorable.sum(dim=1, keepdim=True).clamp(min=1)


def _zero_uninformative(adv: Float[Tensor, "p g"], rewards: Float[Tensor, "p g"]) -> Float[Tensor, " b"]:
    """Set samples that are not scorable, and groups whose rewards are all equal, to zero, and flatten."""
    keep = informative_groups(rewards).unsqueeze(1) & ~rewards.isnan()
    return torch.where(keep, adv, torch.zeros_like(adv)).flatten()


def group_reward(rewards: Float[Tensor, "p g"]) -> Float[Tensor, " b"]:
    """The mean reward of each group, repeated for every sample.

    Args:
        rewards: [p g] rewards; NaN or infinite for a sample that is not scorable, which does not count.

    Returns:
        [b] means; 0 for a group without a scorable sample.

    >>> group_reward(torch.tensor([[3.0, 1.0], [1.0, float("nan")]]))
    tensor([2., 2., 1., 1.])
    """
    rewards = _scorable(rewards)
    return _mean(rewards).expand(rewards.shape).flatten()


def group_distinct(rewards: Float[Tensor, "p g"], answers: Int[Tensor, "p g"]) -> Float[Tensor, " b"]:
    """Distinct right answers of each group as a share of its right ones, repeated for every sample.

    Args:
        rewards: [p g] rewards; an answer is right if its reward is above 0.
        answers: [p g] a number for each answer, equal for equal answers, for example a hash.

    Returns:
        [b] shares in (0, 1]; NaN for a group without a right answer.

    [ours]

    >>> group_distinct(torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), torch.tensor([[7, 7, 8, 9]] * 2))
    tensor([0.6667, 0.6667, 0.6667, 0.6667,    nan,    nan,    nan,    nan])
    """
    right = rewards > 0
    same = (answers[:, :, None] == answers[:, None, :]) & right[:, None, :]
    first = right & ~same.tril(-1).any(2)
    share = first.sum(1, keepdim=True) / right.sum(1, keepdim=True)
    return share.to(rewards.dtype).expand(rewards.shape).flatten()


def group_repeats(rewards: Float[Tensor, "p g"], answers: Int[Tensor, "p g"]) -> Float[Tensor, " b"]:
    """The chance that two right answers of a group are the same, repeated for every sample.

    ``equal pairs of right answers / pairs of right answers``, an unbiased estimate of ``Σ_a π(a | right)²``

    Args:
        rewards: [p g] rewards; an answer is right if its reward is above 0.
        answers: [p g] a number for each answer, equal for equal answers, for example a hash.

    Returns:
        [b] shares in [0, 1]; NaN for a group with fewer than two right answers.

    [derived]

    >>> group_repeats(torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]), torch.tensor([[7, 7, 8, 9]] * 2))
    tensor([0.3333, 0.3333, 0.3333, 0.3333,    nan,    nan,    nan,    nan])
    """
    right = rewards > 0
    pairs = (right[:, :, None] & right[:, None, :]).tril(-1)
    equal = pairs & (answers[:, :, None] == answers[:, None, :])
    share = equal.sum((1, 2)) / pairs.sum((1, 2))
    return share.to(rewards.dtype)[:, None].expand(rewards.shape).flatten()


def informative_groups(rewards: Float[Tensor, "p g"]) -> Bool[Tensor, " p"]:
    """Mark the groups with two different scorable rewards: the groups that dynamic sampling keeps.

    ``max_g R > min_g R``

    Args:
        rewards: [p g] rewards; NaN or infinite for a sample that is not scorable.

    Returns:
        [p] true for a group with a learning signal.

    DAPO's dynamic sampling (arXiv:2503.14476), for any rewards instead of 0 and 1.

    >>> informative_groups(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, float("nan")]]))
    tensor([ True, False, False])
    """
    missing = ~rewards.isfinite()
    highest = rewards.masked_fill(missing, -math.inf).amax(dim=1)
    lowest = rewards.masked_fill(missing, math.inf).amin(dim=1)
    return highest > lowest


def none(rewards: Float[Tensor, "p g"]) -> Float[Tensor, " b"]:
    """Use the reward itself as advantage.

    ``A = R``

    Groups are ignored: equal rewards are kept, and only a sample that is not scorable gets 0.

    Args:
        rewards: [p g] rewards; NaN or infinite for a sample that is not scorable.

    Returns:
        [b] advantages in the unit of the reward.

    REINFORCE without a baseline [derived].

    >>> none(torch.tensor([[1.0, float("nan")], [0.5, 0.5]]))
    tensor([1.0000, 0.0000, 0.5000, 0.5000])
    """
    return _scorable(rewards).nan_to_num(nan=0.0).flatten()


def signed(rewards: Float[Tensor, "p g"]) -> Float[Tensor, " b"]:
    """Give every right sample 1 and every wrong one −1, whatever its group did.

    ``A = 1 if R > 0 else −1``

    Groups are ignored: equal rewards are kept, and only a sample that is not scorable gets 0.

    Args:
        rewards: [p g] rewards; NaN or infinite for a sample that is not scorable.

    Returns:
        [b] advantages, dimensionless.

    The binary reward of arXiv:2506.01347; the sign for graded rewards is [ours].

    >>> signed(torch.tensor([[1.0, 0.0], [0.0, float("nan")]]))
    tensor([ 1., -1., -1.,  0.])
    """
    rewards = _scorable(rewards)
    return torch.where(rewards.isnan(), 0.0, torch.where(rewards > 0, 1.0, -1.0)).to(rewards.dtype).flatten()


def group_mean(rewards: Float[Tensor, "p g"]) -> Float[Tensor, " b"]:
    """Subtract the mean of the group.

    ``A = R − mean_g R``

    A group of one is always equal to itself: its advantage is 0.

    Args:
        rewards: [p g] rewards; NaN or infinite for a sample that is not scorable.

    Returns:
        [b] advantages in the unit of the reward.

    Dr. GRPO (arXiv:2503.20783).

    >>> group_mean(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    rewards = _scorable(rewards)
    return _zero_uninformative(rewards - _mean(rewards), rewards)


def mean_std(rewards: Float[Tensor, "p g"], eps: float = 1e-4) -> Float[Tensor, " b"]:
    """Subtract the mean of the group and divide by its standard deviation.

    ``A = (R − mean_g R) / (std_g R + eps)``, with ``std² = Σ (R − mean)² / (n − 1)`` over the n scorable samples

    Args:
        rewards: [p g] rewards, g >= 2; NaN or infinite for a sample that is not scorable.
        eps: keeps nearly equal groups finite, in the unit of the reward.

    Returns:
        [b] advantages, dimensionless.

    Raises:
        ValueError: g = 1, which has no standard deviation; eps < 0.

    GRPO (arXiv:2402.03300), with the unbiased deviation and the eps of TRL.

    >>> mean_std(torch.tensor([[2.0, 0.0], [3.0, 3.0]]))  # the deviation of (2, 0) is √2
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            f"mean_std needs at least 2 samples per prompt, got {rewards.shape[1]}; sample more or use 'mean' or 'none'"
        )
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}; 1e-4 is TRL's")
    rewards = _scorable(rewards)
    centred = rewards - _mean(rewards)
    num_others = (~rewards.isnan()).sum(dim=1, keepdim=True) - 1
    std = (centred.square().nansum(dim=1, keepdim=True) / num_others.clamp(min=1)).sqrt()
    return _zero_uninformative(centred / (std + eps), rewards)


def leave_one_out(rewards: Float[Tensor, "p g"]) -> Float[Tensor, " b"]:
    """Subtract the mean of the *other* samples of the group.

    ``A_i = R_i − (Σ_{j≠i} R_j) / (n − 1) = n / (n − 1) · (R_i − mean_g R)`` over the n scorable samples

    The baseline does not depend on the sample it is used for, so the gradient estimate stays unbiased.

    Args:
        rewards: [p g] rewards, g >= 2; NaN or infinite for a sample that is not scorable.

    Returns:
        [b] advantages in the unit of the reward.

    Raises:
        ValueError: g = 1, which leaves no other sample.

    RLOO (arXiv:2402.14740); the baseline of RLOO and LOOP in the tables of arXiv:2603.11682 [paper].

    >>> leave_one_out(torch.tensor([[1.0, 0.0, 0.0]]))
    tensor([ 1.0000, -0.5000, -0.5000])
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            f"leave_one_out needs at least 2 samples per prompt, got {rewards.shape[1]}; sample more or use 'none'"
        )
    rewards = _scorable(rewards)
    num_scorable = (~rewards.isnan()).sum(dim=1, keepdim=True).to(rewards.dtype)
    return _zero_uninformative((rewards - _mean(rewards)) * (num_scorable / (num_scorable - 1).clamp(min=1)), rewards)


def quantile(rewards: Float[Tensor, "p g"], quantile: float, interpolation: str = "linear") -> Float[Tensor, " b"]:
    """Subtract a quantile of the group instead of its mean.

    ``A = R − Q_k(R)``, k the quantile

    With right-or-wrong rewards the baseline is (nearly) 0 on prompts that are mostly failed, so that only the rare
    successes give a gradient, and 1 on prompts that are mostly solved, so that only the rare failures do.

    The interpolation matters in between. The n scorable rewards are sorted, ``x_0 <= … <= x_{n−1}``. ``inverted_cdf``
    takes the smallest reward for which the share of rewards at or below it is at least k. The others use the position
    ``h = k·(n − 1)``: ``linear`` interpolates between its two neighbours; ``lower``, ``higher``, ``nearest`` and
    ``midpoint`` choose as their names say. For 8 samples of which 5 are right, k = 0.4 (h = 2.8): linear 0.8, lower 0,
    higher 1, inverted_cdf 1.

    Args:
        rewards: [p g] rewards; NaN or infinite for a sample that is not scorable.
        quantile: k, in [0, 1].
        interpolation: one of INTERPOLATIONS.

    Returns:
        [b] advantages in the unit of the reward.

    Raises:
        ValueError: a quantile outside [0, 1]; unknown interpolation.

    QAE (arXiv:2509.22611); ``linear`` as the default is our choice [ours].

    >>> quantile(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]), 0.4)  # h = 1.2
    tensor([ 1.,  0.,  0.,  0.,  0.,  0.,  0., -1.])
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}; 0.4 is the paper's")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}; choose one")
    rewards = _scorable(rewards)
    if interpolation == "inverted_cdf":
        num_scorable = (~rewards.isnan()).sum(dim=1, keepdim=True)
        # k·n is rarely exact in binary: 0.3·50 must be 15 and not the next sample.
        rank = (quantile * num_scorable - 1e-6 * num_scorable).ceil().long().clamp(min=1) - 1
        baseline = rewards.sort(dim=1).values.gather(1, rank)
    else:
        baseline = rewards.nanquantile(quantile, dim=1, keepdim=True, interpolation=interpolation)
    return _zero_uninformative(rewards - baseline, rewards)


def pass_at_k(rewards: Float[Tensor, "p g"], pass_k: float | int) -> Float[Tensor, " b"]:
    """Reward a draw of k samples for its best one, in closed form over all draws of k from the group.

    ``A = (1 − ρ)/σ`` for a right sample, ``(1 − ρ − C(n−c−1, k−1)/C(n−1, k−1))/σ`` for a wrong one, with
    ``ρ = 1 − C(n−c, k)/C(n, k)`` and ``σ = √(ρ(1 − ρ))``, c right of n scorable samples

    The sum over a group is 0. If fewer than k are wrong every draw holds a right one, ρ = 1, and the advantage is 0: a
    prompt teaches only while it fails often. With k = 1 this is the mean and the standard deviation over n.

    Right is a reward above the middle of the group's range, so that rewards of 0 and 1, and of −1 and 1, do alike; in a
    group of fewer than k scorable samples the advantage is 0 [ours].

    Args:
        rewards: [p g] rewards, g >= k; NaN or infinite for a sample that is not scorable.
        pass_k: k, a whole number >= 1.

    Returns:
        [b] advantages, dimensionless.

    Raises:
        ValueError: k not whole, below 1, or more than the samples of a prompt.

    Pass@k training (arXiv:2508.10751), its analytic form [derived: the sum is 0].

    >>> pass_at_k(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 2)  # C(3,2)/C(4,2) = ½: σ = ½; C(2,1)/C(3,1) = 2/3
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    k = int(pass_k)
    if k != pass_k or not 1 <= k <= rewards.shape[1]:
        raise ValueError(
            f"pass_k must be a whole number from 1 to the {rewards.shape[1]} samples per prompt, got {pass_k}; "
            "a quarter of them is common"
        )
    rewards = _scorable(rewards)
    missing = rewards.isnan()
    highest = rewards.masked_fill(missing, -math.inf).amax(dim=1, keepdim=True)
    lowest = rewards.masked_fill(missing, math.inf).amin(dim=1, keepdim=True)
    right = rewards > lowest + (highest - lowest) / 2
    num = (~missing).sum(dim=1, keepdim=True).double()
    num_wrong = num - right.sum(dim=1, keepdim=True)
    none_right = _share_of_draws(num_wrong, num, k)
    others_wrong = _share_of_draws(num_wrong - 1, num - 1, k - 1)
    std = (none_right * (1 - none_right)).sqrt()
    adv = (none_right - torch.where(right, 0.0, others_wrong)) / torch.where(std > 0, std, 1.0)
    return _zero_uninformative(torch.where(std > 0, adv, 0.0).to(rewards.dtype), rewards)


def _share_of_draws(num_wrong: Float[Tensor, "p 1"], num: Float[Tensor, "p 1"], k: int) -> Float[Tensor, "p 1"]:
    """``C(num_wrong, k) / C(num, k)``: the share of draws of k, without replacement, that are all wrong."""
    share = torch.ones_like(num)
    for drawn in range(k):
        share = share * (num_wrong - drawn).clamp(min=0.0) / (num - drawn).clamp(min=1.0)
    return share


def unlikeliness(
    rewards: Float[Tensor, "p g"], logp_mean: Float[Tensor, "p g"], rank_penalty: float, eps: float = 1e-4
) -> Float[Tensor, " b"]:
    """Reward a right sample the less, the likelier it is in its group, and standardise as ``mean_std`` does.

    ``R' = R·(1 − β·(n − k)/n)`` for a right sample (R > 0) of n scorable ones, k its rank by ``logp_mean``, 0 the
    likeliest; ``A = (R' − mean_g R')/(std_g R' + eps)``

    A group whose rewards are all equal gets exactly 0: ranks alone teach nothing.

    Args:
        rewards: [p g] rewards, g >= 2; NaN or infinite for a sample that is not scorable.
        logp_mean: [p g] log-probability of each sample when it was drawn, mean over its tokens, nats.
        rank_penalty: β, in [0, 1].
        eps: as in ``mean_std``.

    Returns:
        [b] advantages, dimensionless.

    Raises:
        ValueError: β outside [0, 1]; g = 1.

    Unlikeliness reward (arXiv:2506.02355). Its released code ranks by the mean over tokens, as here, and its weights
    are larger by β/n.

    >>> rewards, logp = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[-1.0, -2.0, -3.0, -4.0]])
    >>> unlikeliness(rewards, logp, 0.4, eps=0.0)  # R' = 0.6, 0.7, 0, 0: mean 0.325, std √0.1425
    tensor([ 0.7285,  0.9934, -0.8609, -0.8609])
    """
    if not 0 <= rank_penalty <= 1:
        raise ValueError(f"rank_penalty must be in [0, 1], got {rank_penalty}; 0.25 is the paper's")
    rewards = _scorable(rewards)
    scorable = ~rewards.isnan()
    likely = torch.where(scorable, logp_mean.to(rewards.dtype), -math.inf)
    rank = likely.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    num = scorable.sum(dim=1, keepdim=True).clamp(min=1)
    weight = 1 - rank_penalty * (num - rank) / num
    return _zero_uninformative(
        mean_std(torch.where(rewards > 0, weight * rewards, rewards), eps).view_as(rewards), rewards
    )


def uniform_correct(
    rewards: Float[Tensor, "p g"], logp_mean: Float[Tensor, "p g"], uniform_share: float, eps: float = 1e-4
) -> Float[Tensor, " b"]:
    """Share out anew what ``mean_std`` gives the right samples of a group: the rarer one of them is, the more it gets.

    ``A' = c·w·A`` for the c right samples (R > 0), ``w = (1 − τ)/c + τ·(1/q)/Σ 1/q``, q the softmax of ``logp_mean``
    over them; ``A' = A`` for the others

    The right samples of a group get as much in sum as before if their rewards are equal.

    Args:
        rewards: [p g] rewards, g >= 2; NaN or infinite for a sample that is not scorable.
        logp_mean: [p g] log-probability of each sample when it was drawn, mean over its tokens, nats.
        uniform_share: τ, in [0, 1]; 0 is ``mean_std``.
        eps: as in ``mean_std``.

    Returns:
        [b] advantages, dimensionless.

    Raises:
        ValueError: τ outside [0, 1]; g = 1.

    Uniform-correct policy optimization, UCPO (arXiv:2605.00365), as its released code has it, without its floor of 1e-6
    under q.

    >>> rewards, logp = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.6, 0.2, 0.1, 0.1]]).log()
    >>> uniform_correct(rewards, logp, 0.4, eps=0.0)  # 1/q as 1 to 3: 2·(0.3 + 0.4·(¼, ¾)) times √¾
    tensor([ 0.6928,  1.0392, -0.8660, -0.8660])
    """
    if not 0 <= uniform_share <= 1:
        raise ValueError(f"uniform_share must be in [0, 1], got {uniform_share}; 0.2 is the released one")
    rewards = _scorable(rewards)
    adv, right = mean_std(rewards, eps).view_as(rewards), rewards > 0
    inverse = torch.where(right, -logp_mean.to(rewards.dtype), -math.inf).softmax(dim=1)
    weight = 1 - uniform_share + uniform_share * right.sum(dim=1, keepdim=True) * inverse
    return torch.where(right, weight * adv, adv).flatten()


def overlong_penalty(lengths: Shaped[Tensor, " b"], max_length: int, buffer: int) -> Float[Tensor, " b"]:
    """Penalise responses that come close to the length limit; add the result to the reward.

    ``0`` up to ``max_length − buffer``, then ``(max_length − buffer − length) / buffer``, which reaches −1 at
    ``max_length`` and does not fall further.

    Args:
        lengths: [b] response lengths in tokens.
        max_length: tokens; the limit.
        buffer: tokens before the limit over which the penalty grows.

    Returns:
        [b] penalties in [−1, 0], fp32.

    Raises:
        ValueError: buffer outside [1, max_length].

    DAPO's soft overlong punishment (arXiv:2503.14476).

    >>> overlong_penalty(torch.tensor([10, 80, 90, 100, 120]), max_length=100, buffer=20)
    tensor([ 0.0000,  0.0000, -0.5000, -1.0000, -1.0000])
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer must be in [1, max_length], got {buffer} with max_length {max_length}; shorten it")
    return ((max_length - buffer - lengths.float()) / buffer).clamp(min=-1.0, max=0.0)


def group_rate(rewards: Float[Tensor, "p g"]) -> Float[Tensor, " b"]:
    """Rate how well the samples of each prompt did, in [0, 1], and repeat the rate for every sample.

    If all rewards are 0 or 1, the rate is the share of right answers; if they are graded, it is the mean reward scaled
    by the group's own range, ``(mean − min)/(max − min)``. A graded group whose rewards are all equal has rate 1 if
    that reward is above 0, else 0.

    Args:
        rewards: [p g] rewards; NaN or infinite for a sample that is not scorable, which does not count.

    Returns:
        [b] rates; a group without a scorable sample gets 0.

    [ours]

    >>> group_rate(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([0.5000, 0.5000, 1.0000, 1.0000])
    >>> group_rate(torch.tensor([[3.0, 1.0, 2.0, 1.0], [-2.0, -2.0, -2.0, -2.0]]))
    tensor([0.3750, 0.3750, 0.3750, 0.3750, 0.0000, 0.0000, 0.0000, 0.0000])
    """
    rewards = _scorable(rewards)
    missing = rewards.isnan()
    mean = _mean(rewards)
    highest = rewards.masked_fill(missing, -math.inf).amax(dim=1, keepdim=True)
    lowest = rewards.masked_fill(missing, math.inf).amin(dim=1, keepdim=True)
    width = highest - lowest
    scaled = torch.where(width > 0, (mean - lowest) / torch.where(width > 0, width, 1.0), (mean > 0).to(mean.dtype))
    binary = ((rewards == 0) | (rewards == 1) | missing).all()
    return torch.where(binary, mean, scaled).expand(rewards.shape).flatten()
