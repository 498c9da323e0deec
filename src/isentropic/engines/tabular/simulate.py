"""A recipe under control on a table: the whole loop of a run, thousands of steps in seconds."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import recipes
from ...entropy import prediction
from ...recipes import Recipe
from ...types import EntropyReading, GroupFacts, TokenBatch
from ..groups import group_sums
from ..loop import ControlLoop
from ..rewrite import across_knob
from .batches import Batch, draw, expected_batch
from .states import Tree, make_rewards, mean_entropy, random_logits, reach
from .steps import Pass, forward, loss_of, pulls


class Run(NamedTuple):
    """What :func:`simulate` returns: arrays over optimizer steps, each as it was before the step.

    Attributes:
        entropy: reading that the controller got, mean over the tokens of the minibatch, nats per token.
        exact: entropy of the policy over the states it visits, nats per token.
        target: H* in force, NaN where there is none.
        knob: value in force, NaN where there is none.
        reward: exact expected reward of the policy.
        predicted: predicted change of this step at fixed prefixes, nats per token.
        measured: what came of it, at the same prefixes.
        gain: derivative of ``predicted`` by the knob, 0 where there is none.
    """

    entropy: np.ndarray
    exact: np.ndarray
    target: np.ndarray
    knob: np.ndarray
    reward: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray
    gain: np.ndarray


SIMULATED = Tree(prompts=16, vocab=8, depth=2)


def _predict(recipe: Recipe, batch: Batch, run: Pass, knob: float | None, share: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the change it predicts with the shares [b t] of the tokens."""
    loss = loss_of(recipe, batch, run, knob)[0].mean()
    weights, through = pulls(loss, run)
    change = prediction.change_of(weights, run.stats) + prediction.rows_change(through, run.rows.detach())
    return loss, (share * change).sum()


def _groups(batch: Batch, run: Pass) -> GroupFacts:
    """The group facts of a minibatch; for a group that was cut, its whole rate."""
    mask = torch.ones_like(run.stats.logp)
    names = ("reward", "group_rate", "group_reward", "group_distinct", "group_repeats")
    of_group = {name: getattr(batch, name) for name in names}
    tokens = TokenBatch(run.stats.logp, None, batch.adv, mask, run.stats.entropy, **of_group)
    sums = group_sums(tokens, weight=batch.weight)
    return GroupFacts(*map(float, sums))


def _gain(recipe: Recipe, batch: Batch, run: Pass, knob: float, share: Tensor) -> float:
    """Derivative of the prediction by the knob."""
    moved = across_knob(recipe, knob, lambda end: _predict(end, batch, run, None, share)[1])
    return float(moved.change / moved.width)


def simulate(
    recipe: Recipe,
    steps: int,
    seed: int = 0,
    *,
    tree: Tree = SIMULATED,
    lr: float = 4.0,
    group: int = 16,
    updates: int = 4,
    regime: str = "uninformed",
    share: float = 0.2,
    scale: float = 1.0,
    exact: bool = False,
) -> Run:
    """Run a recipe under the control of its thermostat on a table, as an engine would.

    A batch of ``group`` answers for every prompt is drawn, shuffled and cut into ``updates`` minibatches of one plain
    gradient step each. The thermostat reads every step, on the tokens of its minibatch before the step, with the
    predicted change of the step and its derivative by the knob. The prediction is that of the policy's own entropy
    at fixed prefixes, lr included: rows share nothing, and each moves by its own tokens.

    Args:
        recipe: composed and checked; without a knob nothing is under control.
        steps: optimizer steps.
        seed: of the policy, the rewards and the draws.
        tree: the states.
        lr: step size; a loss is a mean over tokens, so that a row moves by about ``lr`` times its share of them.
        group: samples per prompt.
        updates: minibatches, and optimizer steps, of a batch.
        regime, share: of the rewards, as in ``make_rewards``.
        scale: standard deviation of the first logits.
        exact: whether a batch is what groups hold in expectation (``expected_batch``), so that no draw is left to
            chance; needs rewards of 0 and 1 and one update.

    Returns:
        Arrays [steps].

    Raises:
        ValueError: an on-policy recipe with several updates, a recipe that this engine cannot run, or more updates than
            there are answers in a batch; a first reading that is refused.
        EntropyReadingError: ten readings in a row are refused.

    [ours]

    >>> run = simulate(recipes.compose("loop", knob="zeta", target="80%"), steps=8)
    >>> len(run.entropy), float(run.knob[0])
    (8, 0.0)
    """
    # What a part draws at random comes from the global generator, which a simulation leaves as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _simulate(recipe, steps, seed, tree, lr, group, updates, regime, share, scale, exact)


def _simulate(
    recipe: Recipe,
    steps: int,
    seed: int,
    tree: Tree,
    lr: float,
    group: int,
    updates: int,
    regime: str,
    share: float,
    scale: float,
    exact: bool,
) -> Run:
    recipes.check(recipe, updates)
    if exact and updates != 1:
        raise ValueError(f"an exact simulation takes one update per batch, got {updates}; set updates=1")
    if not 1 <= updates <= tree.prompts * group:
        raise ValueError(f"updates must lie in [1, {tree.prompts * group}], the answers of a batch, got {updates}")
    generator = torch.Generator().manual_seed(seed)
    logits = random_logits(tree, scale, seed)
    rewards = make_rewards(tree, logits, regime, share, seed)
    loop, table = ControlLoop(recipe, steps, vocabulary=tree.vocab), []
    while len(table) < steps:
        if exact:
            batch = expected_batch(tree, logits, rewards, recipe, group)
        else:
            batch = draw(tree, logits, rewards, recipe, group, generator)
        order = torch.randperm(len(batch.adv), generator=generator)
        for i, part in enumerate(order.tensor_split(updates)[: steps - len(table)]):
            minibatch = Batch(*(x[part] for x in batch if x is not None))
            visits, prob = reach(tree, logits)
            run, token_share = forward(logits, minibatch), lr * visits[minibatch.rows]
            knob = loop.value
            loss, predicted = _predict(recipe, minibatch, run, knob, token_share)
            gain = 0.0 if knob is None else _gain(recipe, minibatch, run, knob, token_share)
            logits = logits - lr * torch.autograd.grad(loss, run.logits)[0]
            before, count = float(visits @ run.by_row), minibatch.weight[:, None].expand_as(run.stats.entropy)
            seen = float((count * run.stats.entropy).sum())
            reading = EntropyReading(seen, float(count.sum()), "exact", 1.0, "float64", rate=lr)
            reading = reading._replace(predicted=float(predicted), gain=gain, steps=1, groups=_groups(minibatch, run))
            loop.regulate(reading, act=i == updates - 1)
            target = loop.thermostat.level(loop.state) if loop.thermostat and loop.state else None
            reward = float((prob * rewards).sum(1).mean())
            change = mean_entropy(tree, logits, visits) - before
            table.append((reading.mean, before, target, knob, reward, reading.predicted, change, gain))
    return Run(*np.array(table, dtype=np.float64).T)
