"""States, and what is exact about a policy on them: visits, answers, entropy, reward."""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...entropy.statistics import token_entropy

REGIMES = ("calibrated", "anti-calibrated", "uninformed")


class Tree(NamedTuple):
    """The states: for every prompt one row of logits for each prefix shorter than the answer.

    Attributes:
        prompts: p prompts, each with a tree of its own.
        vocab: v tokens.
        depth: t tokens an answer; 1 makes a contextual bandit.

    Rows lie prompt by prompt, in each by length and then by the prefix read as a number in base v.

    >>> Tree(prompts=2, vocab=3, depth=2).num_rows  # 1 + 3 prefixes each
    8
    """

    prompts: int
    vocab: int
    depth: int = 1

    @property
    def num_rows(self) -> int:
        """Rows of the table, ``p·(1 + v + … + v^(t−1))``."""
        return self.prompts * sum(self.vocab**level for level in range(self.depth))

    def check(self) -> "Tree":
        """Return self, or raise ``ValueError`` naming what is too small or too large."""
        for name, least in (("prompts", 1), ("vocab", 2), ("depth", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}; answers are enumerated")
        if self.prompts * self.vocab**self.depth > 10**6:
            raise ValueError(
                f"a tree may have 10^6 answers, got {self.prompts} x {self.vocab}^{self.depth}; "
                "take fewer prompts, fewer tokens or less depth"
            )
        return self


@lru_cache(maxsize=32)
def answers(tree: Tree) -> tuple[Int[Tensor, "m t"], Int[Tensor, "m t"]]:
    """Enumerate the answers of all prompts: their rows and their tokens, ``m = p·v^t``, prompt by prompt.

    Raises:
        ValueError: a tree that is too small or too large.

    >>> rows, ids = answers(Tree(prompts=1, vocab=2, depth=2))
    >>> ids.tolist(), rows.tolist()
    ([[0, 0], [0, 1], [1, 0], [1, 1]], [[0, 1], [0, 1], [0, 2], [0, 2]])
    """
    prompts, v, depth = tree.check()
    codes, levels = torch.arange(v**depth)[:, None], torch.arange(depth)
    ids = codes // v ** (depth - 1 - levels) % v
    rows = codes // v ** (depth - levels) + (v**levels - 1) // (v - 1)
    start = torch.arange(prompts)[:, None, None] * (tree.num_rows // prompts)
    return (rows + start).flatten(0, 1), ids.repeat(prompts, 1)


def random_logits(tree: Tree, scale: float = 2.0, seed: int = 0) -> Float[Tensor, "r v"]:
    """Draw a table of normal logits with the standard deviation ``scale``, in float64.

    >>> random_logits(Tree(2, 3)).shape
    torch.Size([2, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tree.check().num_rows, tree.vocab, generator=generator, dtype=torch.float64)


def reach(tree: Tree, logits: Float[Tensor, "r v"]) -> tuple[Float[Tensor, " r"], Float[Tensor, "p n"]]:
    """Follow the policy down the trees.

    Args:
        tree: the states.
        logits: [r v] the policy.

    Returns:
        The share [r] of its tokens that the policy draws from each row, which sums to 1; and the probability [p n] of
        each answer of a prompt.

    >>> visits, prob = reach(Tree(1, 2, 2), torch.zeros(3, 2, dtype=torch.float64))
    >>> visits.tolist(), prob.tolist()
    ([0.5, 0.25, 0.25], [[0.25, 0.25, 0.25, 0.25]])
    """
    p = logits.softmax(-1).unflatten(0, (tree.prompts, -1))
    here, start, levels = p.new_ones(tree.prompts, 1), 0, []
    for _ in range(tree.depth):
        levels.append(here)
        stop = start + here.shape[1]
        here, start = (here[..., None] * p[:, start:stop]).flatten(1), stop
    return torch.cat(levels, dim=1).flatten() / (tree.prompts * tree.depth), here


def mean_entropy(tree: Tree, logits: Float[Tensor, "r v"], visits: Float[Tensor, " r"] | None = None) -> float:
    """Entropy over the visited states, ``Σ_r d(r)·H(r)``, nats per token.

    Args:
        tree: the states.
        logits: [r v] the policy.
        visits: [r] the weights d; ``None`` takes the policy's own.

    >>> round(mean_entropy(Tree(1, 2, 2), torch.zeros(3, 2, dtype=torch.float64)), 4)  # log 2
    0.6931
    """
    visits = reach(tree, logits)[0] if visits is None else visits
    return float(visits @ token_entropy(logits, chunk=len(logits)))


def make_rewards(
    tree: Tree, logits: Float[Tensor, "r v"], regime: str, share: float = 0.3, seed: int = 0
) -> Float[Tensor, "p n"]:
    """Say which answers are right, 1 or 0.

    ``calibrated``: the likeliest answers of each prompt, until their probability is as near to ``share`` as whole
    answers allow; ``anti-calibrated``: the least likely ones; ``uninformed``: each answer with probability ``share``,
    whatever its own. At least one answer of a prompt is right and one is wrong.

    Args:
        tree: the states.
        logits: [r v] the policy that the regime is meant for.
        regime: one of REGIMES.
        share: about the share of samples that is right, in (0, 1).
        seed: for ``uninformed``.

    Raises:
        ValueError: unknown regime; share outside (0, 1).

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    >>> [make_rewards(Tree(1, 3), logits, regime, share=0.5).tolist() for regime in REGIMES[:2]]
    [[[1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]]]
    """
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {', '.join(REGIMES)}, got {regime!r}; choose one")
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}; it is the share of samples that is right")
    prob = reach(tree, logits)[1]
    chance = torch.rand(prob.shape, generator=torch.Generator().manual_seed(seed), dtype=prob.dtype)
    if regime == "uninformed":
        right = chance < share
        first, last = chance.argmin(1, keepdim=True), chance.argmax(1, keepdim=True)
    else:
        order = prob.argsort(dim=1, descending=regime == "calibrated")
        ranked = prob.gather(1, order)
        # The last answer taken in is the one whose middle still lies below the share.
        right = torch.zeros_like(prob, dtype=torch.bool).scatter(1, order, ranked.cumsum(1) - ranked / 2 < share)
        first, last = order[:, :1], order[:, -1:]
    return right.scatter(1, last, False).scatter(1, first, True).to(prob.dtype)


def expected_reward(tree: Tree, logits: Float[Tensor, "r v"], rewards: Float[Tensor, "p n"]) -> float:
    """Share of right answers, ``mean_p Σ_n π(answer)·R``.

    >>> expected_reward(Tree(1, 2), torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 0.0]]).double())
    0.5
    """
    return float((reach(tree, logits)[1] * rewards).sum(1).mean())
