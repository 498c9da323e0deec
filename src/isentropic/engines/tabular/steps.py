"""One step of a recipe on a table: the predicted entropy change and the measured one."""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ... import recipes
from ...entropy import prediction
from ...entropy.statistics import logits_stats, token_entropy
from ...losses.reduce import SumCount
from ...recipes import Recipe, with_knob
from ...types import TokenBatch, TokenFacts, TokenStats
from .batches import Batch
from .states import Tree, mean_entropy, reach


class Outcome(NamedTuple):
    """A step, as predicted and as it came out. Entropies are means over visited states, nats per token.

    Attributes:
        after: ``[r v]`` logits after the step.
        exact, simple, natural: predicted change at fixed prefixes, by the exact form, by the form without moments, by
            the natural form.
        absolute: sum of the absolute contributions of the tokens, in the form that belongs to the step.
        fixed: measured change at fixed prefixes: every state counts as often as it was visited before the step.
        shift: measured change because the step changed which states are visited; ``fixed + shift`` is the whole.
        clipped: share of the tokens whose clip was active.
        parts: the exact prediction split by ``prediction.attribute``.
        is_natural: whether the step was a natural-gradient one.
    """

    after: Tensor
    exact: float
    simple: float
    natural: float
    absolute: float
    fixed: float
    shift: float
    clipped: float
    parts: dict[str, float]
    is_natural: bool

    @property
    def predicted(self) -> float:
        """The prediction that belongs to the step: ``natural`` for a natural-gradient step, else ``exact``."""
        return self.natural if self.is_natural else self.exact

    @property
    def error(self) -> float:
        """``|predicted − fixed| / absolute``; 0 where nothing moves."""
        return abs(self.predicted - self.fixed) / self.absolute if self.absolute else 0.0


class Pass(NamedTuple):
    """A forward pass: leaf logits, entropies by row, what a loss sees [b t], token statistics, whole rows [b t v]."""

    logits: Tensor
    by_row: Tensor
    logp: Tensor
    entropy: Tensor
    stats: TokenStats
    rows: Tensor


def forward(logits: Float[Tensor, "r v"], batch: Batch) -> Pass:
    """Look the tokens of a batch up in a policy, with gradient.

    >>> from isentropic.engines.tabular import random_logits, sampled_batch
    >>> logits = random_logits(Tree(2, 3))
    >>> batch = sampled_batch(Tree(2, 3), logits, torch.eye(3)[:2].double(), recipes.RECIPES["grpo"], group=4)
    >>> forward(logits, batch).logp.shape
    torch.Size([8, 1])
    """
    leaf = logits.detach().requires_grad_()
    # Entropies and moments belong to rows: computed once for each row, then looked up for every token.
    by_row = token_entropy(leaf, chunk=len(leaf))
    moments = logits_stats(leaf.detach(), torch.zeros(len(leaf), dtype=torch.long), chunk=len(leaf))
    stats = TokenStats(*(x[batch.rows] for x in moments if x is not None))
    # Sampled tokens and whole rows are two ways from the logits to a loss, with a gradient each.
    logp, whole = leaf.log_softmax(-1)[batch.rows, batch.ids], leaf.log_softmax(-1)[batch.rows]
    return Pass(leaf, by_row.detach(), logp, by_row[batch.rows], stats._replace(logp=logp.detach()), whole)


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    """The value of x with its gradient scaled by sequence: a loss of unit weights becomes a weighted one."""
    return x.detach() + weight.view(-1, *[1] * (x.dim() - 1)) * (x - x.detach())


def loss_of(recipe: Recipe, batch: Batch, run: Pass, knob: float | None) -> tuple[SumCount, TokenFacts]:
    """The recipe's loss over a batch as (sum, count), its gradient weighted by ``batch.weight``; and its facts."""
    recipe = with_knob(recipe, knob)
    if recipe.shaping == "repo_d":
        # Its β is a batch mean, which has to heed the weights: the same shaping with that mean given.
        adv = batch.adv[:, None].expand_as(batch.ids)
        change = prediction.predicted_change(adv, run.stats.logp, run.stats.entropy)
        mean = float((batch.weight[:, None] * change).mean())
        beta = recipe.number("zeta") * max(-mean, 0.0)
        recipe = replace(recipe, shaping="repo", constants={**recipe.constants, "beta": beta}, knob=None)
    logp, entropy, rows = (_weighted(x, batch.weight) for x in (run.logp, run.entropy, run.rows))
    mask = torch.ones_like(run.stats.logp)
    facts = TokenBatch(
        logp, batch.logp_old, batch.adv, mask, entropy, batch.entropy_old, rows, batch.reward, batch.group_rate
    )
    return recipes.loss(recipe, facts)


def pulls(loss: Float[Tensor, ""], run: Pass) -> tuple[prediction.Weights, Float[Tensor, "b t v"]]:
    """How a loss pulls at the sampled tokens and entropies, and how at whole rows."""
    through = torch.autograd.grad(loss, run.rows, retain_graph=True, allow_unused=True)[0]
    weights = prediction.effective_weights(loss, run.logp, run.entropy)
    return weights, torch.zeros_like(run.rows) if through is None else -through


def gradient(
    logits: Float[Tensor, "r v"], batch: Batch, recipe: Recipe, knob: float | None = None
) -> Float[Tensor, "r v"]:
    """The gradient of the recipe's loss by the logits, expected or sampled as the batch is.

    Args:
        logits: [r v] the current policy.
        batch: from ``expected_batch`` or ``sampled_batch``, of this policy or an older one.
        recipe: the loss.
        knob: value of the recipe's knob; ``None`` leaves its own number.

    >>> from isentropic.engines.tabular import expected_batch
    >>> tree, logits = Tree(1, 2), torch.zeros(1, 2, dtype=torch.float64)
    >>> batch = expected_batch(tree, logits, torch.tensor([[1.0, 0.0]]).double(), recipes.RECIPES["rloo"])
    >>> gradient(logits, batch, recipes.RECIPES["rloo"])  # −π(A − E[A]), A = ±½
    tensor([[-0.2500,  0.2500]], dtype=torch.float64)
    """
    run = forward(logits, batch)
    return torch.autograd.grad(loss_of(recipe, batch, run, knob)[0].mean(), run.logits)[0]


def step(
    tree: Tree,
    logits: Float[Tensor, "r v"],
    batch: Batch,
    recipe: Recipe,
    lr: float,
    knob: float | None = None,
    natural: bool = False,
) -> Outcome:
    """Take one step, and lay the predicted entropy change beside the measured one.

    The step is ``Δz = −lr·∂loss/∂z``, or ``Δz = −lr·(∂loss/∂z)/π``, which solves ``F Δz = −lr·∂loss/∂z`` row by row
    with the Fisher matrix ``F = diag(π) − π πᵀ``. Predictions come from the weights ``−∂loss/∂logp`` and
    ``−∂loss/∂H`` alone, each token's multiplied by the share of visits of its row.

    Args:
        tree: the states.
        logits: [r v] the policy before the step.
        batch: of this policy or, off-policy, of an older one.
        recipe: the loss.
        lr: step size.
        knob: value of the recipe's knob; ``None`` leaves its own number.
        natural: take a natural-gradient step.

    arXiv:2603.11682, Theorem 1 in its exact form, and arXiv:2505.22617 for the natural gradient [derived].

    >>> from isentropic.engines.tabular import expected_batch, make_rewards, random_logits
    >>> tree, recipe = Tree(4, 5), recipes.RECIPES["rloo"]
    >>> logits = random_logits(tree)
    >>> batch = expected_batch(tree, logits, make_rewards(tree, logits, "calibrated"), recipe)
    >>> out = step(tree, logits, batch, recipe, lr=0.01)
    >>> out.fixed < 0, out.error < 0.01
    (True, True)
    """
    visits, run = reach(tree, logits)[0], forward(logits, batch)
    pair, facts = loss_of(recipe, batch, run, knob)
    loss = pair.mean()
    weights, through = pulls(loss, run)
    slope = torch.autograd.grad(loss, run.logits)[0]
    before = run.logits.detach()
    after = before - lr * (slope / before.softmax(-1) if natural else slope)
    share = lr * visits[batch.rows]
    scaled = prediction.Weights(weights.logp * share, weights.entropy * share)
    adv, mask = batch.adv[:, None].expand_as(share), torch.ones_like(share)
    rows = (through * share[..., None], run.rows.detach())
    parts = {name: float(x) for name, x in prediction.attribute(scaled, run.stats, adv, mask, facts, rows).items()}
    by_token = prediction.natural_change(scaled.logp, run.stats.logp, run.stats.entropy, scaled.entropy)
    by_token = by_token + prediction.rows_change(*rows, natural=True)
    fixed = mean_entropy(tree, after, visits) - mean_entropy(tree, before, visits)
    clipped = (facts.clipped_low | facts.clipped_high) * batch.weight[:, None]
    return Outcome(
        after,
        exact=parts["change"],
        simple=parts["change_simple"],
        natural=parts["change_natural"],
        absolute=float(by_token.abs().sum()) if natural else parts["absolute"],
        fixed=fixed,
        shift=mean_entropy(tree, after) - mean_entropy(tree, after, visits),
        clipped=float(clipped.mean()),
        parts=parts,
        is_natural=natural,
    )


def advance(
    logits: Float[Tensor, "r v"],
    batch: Batch,
    recipe: Recipe,
    lr: float,
    updates: int,
    knob: float | None = None,
    natural: bool = False,
) -> Float[Tensor, "r v"]:
    """Take ``updates`` steps on one batch, plain or natural as in ``step``; each makes the batch more off-policy.

    >>> from isentropic.engines.tabular import expected_batch
    >>> tree, recipe = Tree(1, 2), recipes.RECIPES["rloo"]
    >>> logits = torch.zeros(1, 2, dtype=torch.float64)
    >>> batch = expected_batch(tree, logits, torch.tensor([[1.0, 0.0]]).double(), recipe)
    >>> advance(logits, batch, recipe, lr=1.0, updates=1)
    tensor([[ 0.2500, -0.2500]], dtype=torch.float64)
    """
    for _ in range(updates):
        slope = gradient(logits, batch, recipe, knob)
        logits = logits - lr * (slope / logits.softmax(-1) if natural else slope)
    return logits
