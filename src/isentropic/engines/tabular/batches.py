"""Batches of answers: enumerated, so that a gradient is the expected one, or sampled as an engine samples."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ... import recipes
from ...entropy.statistics import token_entropy
from ...losses.advantages import group_distinct, group_rate, group_repeats, group_reward
from ...recipes import Recipe
from ...recipes.compose import refuse_redraw
from .states import Tree, answers, reach


class Batch(NamedTuple):
    """Answers that one loss is taken over, sampled or enumerated.

    Attributes:
        rows: ``[b t]`` the row that each token was drawn from.
        ids: ``[b t]`` the tokens.
        logp_old: ``[b t]`` their log-probabilities when they were drawn, nats.
        adv: ``[b]`` advantages.
        weight: ``[b]`` how much an answer counts, 1 on average: 1 if it was sampled, its relative probability
            if it was enumerated.
        entropy_old: ``[b t]`` entropy of the rows when the tokens were drawn, nats; ``None`` means that they have not
            moved since.
        reward: ``[b]`` rewards of the answers.
        group_rate: ``[b]`` share of right answers in the group of each.
        group_reward: ``[b]`` mean reward of the group of each.
        group_distinct: ``[b]`` distinct right answers of the group of each, as a share of its right ones.
        group_repeats: ``[b]`` the chance that two of these right answers are the same.
    """

    rows: Tensor
    ids: Tensor
    logp_old: Tensor
    adv: Tensor
    weight: Tensor
    entropy_old: Tensor | None = None
    reward: Tensor | None = None
    group_rate: Tensor | None = None
    group_reward: Tensor | None = None
    group_distinct: Tensor | None = None
    group_repeats: Tensor | None = None


def _check_recipe(recipe: Recipe) -> None:
    refuse_redraw(recipe, "the tabular engine")
    for name in ("dynamic_sampling", "overlong_buffer"):
        if setting := getattr(recipe, name):
            raise ValueError(f"the tabular engine has no {name}, got {setting}; switch it off in the recipe")


def expected_batch(
    tree: Tree, logits: Float[Tensor, "r v"], rewards: Float[Tensor, "p n"], recipe: Recipe, group: int = 8
) -> Batch:
    """Enumerate what a group of samples may hold, so that the gradient of the batch is the expected one.

    Every answer y stands for each number m of right answers among the other ``group − 1``, with the weight
    ``π(y)·Binomial(m; group − 1, q)``, q being the prompt's share of right answers. The advantage of y is then known,
    and every loss is exact in expectation that depends on an answer and its advantage alone. ``repo_d``, whose β is a
    mean over the batch, is taken at infinitely many groups. Components that rank the tokens of a batch, or add them up,
    know no weights: use ``sampled_batch`` for them.

    Args:
        tree: the states.
        logits: [r v] the policy that samples.
        rewards: [p n] 1 or 0.
        recipe: whose baseline makes the advantages.
        group: samples per prompt.

    Raises:
        ValueError: rewards other than 0 and 1; a recipe with dynamic sampling, an overlong penalty or a component that
            looks at the batch as a whole; a group that the baseline cannot use.

    [derived]

    >>> tree, logits = Tree(1, 2), torch.zeros(1, 2, dtype=torch.float64)
    >>> batch = expected_batch(tree, logits, torch.tensor([[1.0, 0.0]]).double(), recipes.RECIPES["rloo"], group=2)
    >>> batch.adv.tolist(), batch.weight.tolist()  # right beside a wrong or a right one, wrong beside either
    ([1.0, 0.0, 0.0, -1.0], [1.0, 1.0, 1.0, 1.0])
    """
    _check_recipe(recipe)
    for component in recipe.components().values():
        if component.per_batch:
            raise ValueError(f"{component} looks at a batch as a whole, which knows no weights; use sampled_batch")
    if not ((rewards == 0) | (rewards == 1)).all():
        raise ValueError("an expected batch needs rewards of 0 and 1, got others; use sampled_batch for them")
    rows, ids = answers(tree)
    prob = reach(tree, logits)[1]
    others = torch.arange(group)
    # All groups there are, by their number of right answers; the first sample is right, the last wrong, if any is.
    groups = (torch.arange(group) < torch.arange(group + 1)[:, None]).to(prob.dtype)
    by_count = recipes.advantages(recipe, groups).unflatten(0, groups.shape)
    right = rewards.flatten().bool()
    adv = torch.where(right[:, None], by_count[others + 1, 0], by_count[others, -1])
    q = (prob * rewards).sum(1).clamp(0.0, 1.0)[:, None]
    ways = torch.tensor([math.comb(group - 1, m) for m in range(group)], dtype=prob.dtype)
    binomial = ways * q**others * (1 - q) ** (group - 1 - others)
    weight = prob.flatten()[:, None] * binomial.repeat_interleave(prob.shape[1], 0)
    logp = logits.log_softmax(-1)[rows, ids]
    entropy = token_entropy(logits, chunk=len(logits))[rows]
    rows, ids, logp, entropy = (x.repeat_interleave(group, 0) for x in (rows, ids, logp, entropy))
    weight = weight.flatten() * (weight.numel() / tree.prompts)
    reward = rewards.flatten().repeat_interleave(group, 0)
    rate = (others.to(prob.dtype) + rewards.flatten()[:, None]) / group
    alike = [x.flatten() for x in _alike(prob * rewards, others + rewards.flatten()[:, None].long())]
    # Rewards are 0 and 1: the mean of a group is its rate.
    return Batch(rows, ids, logp, adv.flatten(), weight, entropy, reward, rate.flatten(), rate.flatten(), *alike)


def _alike(prob: Tensor, num: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``num`` [p·n, g] right answers drawn with chances as ``prob`` [p, n]: the expected share that is distinct, and
    the chance that two are the same; NaN where there are too few."""
    share = prob / prob.sum(1, keepdim=True)
    counts = torch.arange(num.shape[1] + 1, dtype=prob.dtype)
    distinct = (1 - (1 - share[:, :, None]) ** counts).sum(1) / counts
    repeats = share.square().sum(1, keepdim=True).expand_as(distinct)
    repeats = torch.where(counts < 2, torch.nan, repeats)
    of_prompt = torch.arange(len(num)) // prob.shape[1]
    return distinct[of_prompt[:, None], num], repeats[of_prompt[:, None], num]


def sampled_batch(
    tree: Tree,
    logits: Float[Tensor, "r v"],
    rewards: Float[Tensor, "p n"],
    recipe: Recipe,
    group: int = 8,
    seed: int = 0,
) -> Batch:
    """Draw a group of answers for every prompt, as an engine does.

    Args:
        tree: the states.
        logits: [r v] the policy that samples.
        rewards: [p n] any rewards.
        recipe: whose baseline makes the advantages.
        group: samples per prompt.
        seed: of the draw.

    Raises:
        ValueError: a recipe with dynamic sampling or an overlong penalty; a group that the baseline cannot use.

    >>> from isentropic.engines.tabular import random_logits
    >>> tree = Tree(2, 3)
    >>> logits = random_logits(tree)
    >>> sampled_batch(tree, logits, torch.eye(3)[:2].double(), recipes.RECIPES["grpo"], group=4).ids.shape
    torch.Size([8, 1])
    """
    return draw(tree, logits, rewards, recipe, group, torch.Generator().manual_seed(seed))


def draw(
    tree: Tree,
    logits: Float[Tensor, "r v"],
    rewards: Float[Tensor, "p n"],
    recipe: Recipe,
    group: int,
    generator: torch.Generator,
) -> Batch:
    """``sampled_batch`` by a generator that the caller keeps."""
    _check_recipe(recipe)
    rows, ids = answers(tree)
    prob = reach(tree, logits)[1]
    drawn = torch.multinomial(prob, group, replacement=True, generator=generator)
    sampled = rewards.gather(1, drawn)
    chosen = (drawn + torch.arange(tree.prompts)[:, None] * prob.shape[1]).flatten()
    rows, ids = rows[chosen], ids[chosen]
    entropy = token_entropy(logits, chunk=len(logits))[rows]
    logp, rate = logits.log_softmax(-1)[rows, ids], group_rate(sampled)
    of_group = group_reward(sampled), group_distinct(sampled, drawn), group_repeats(sampled, drawn)
    adv = recipes.advantages(recipe, sampled, logp.mean(1).view_as(sampled))
    return Batch(rows, ids, logp, adv, torch.ones_like(adv), entropy, sampled.flatten(), rate, *of_group)
