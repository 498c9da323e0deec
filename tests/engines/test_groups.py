"""What a step knows of its groups: by hand, over micro-batches, and by rows that count for nothing."""

import math

import pytest
import torch

from isentropic.engines.groups import group_row, group_sums
from isentropic.losses.advantages import group_distinct, group_rate, group_repeats, group_reward
from isentropic.types import EntropyReading, GroupFacts, TokenBatch

REWARDS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
ANSWERS = torch.tensor([[4, 5, 4], [1, 2, 3], [6, 6, 7]])


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    mask = torch.tensor([[1, 1, 1, 0]] * 4 + [[1, 1, 1, 1]] * 5).float()
    return TokenBatch(
        -2 * draw(9, 4),
        None,
        draw(9),
        mask,
        draw(9, 4),
        reward=REWARDS.flatten(),
        group_rate=group_rate(REWARDS),
        group_reward=group_reward(REWARDS),
        group_distinct=group_distinct(REWARDS, ANSWERS),
        group_repeats=group_repeats(REWARDS, ANSWERS),
    )


def test_by_hand():
    one = batch()
    facts = group_sums(one, held_out=(3.0, 4.0))
    counts = (facts.completions, facts.failed, facts.solved, facts.mixed, facts.rate, facts.reward, facts.right)
    assert [float(x) for x in counts] == pytest.approx([9.0, 3.0, 3.0, 3.0, 5.0, 5.0, 6.0])
    # One of two right answers is distinct in the first group, two of three in the last.
    assert float(facts.distinct) == pytest.approx(3 * 1 / 2 + 3 * 2 / 3)
    # The only pair of the first group is equal, and one of three pairs of the last.
    assert (float(facts.paired), float(facts.repeats)) == pytest.approx((6.0, 3 * 1 + 3 * 1 / 3))
    centred = (one.logp + one.entropy)[:3, :3].double()
    gain = torch.tensor([1 / 3, -2 / 3, 1 / 3], dtype=torch.float64)[:, None]
    assert float(facts.pull) == pytest.approx(float((gain * centred).sum()), rel=1e-6)
    assert float(facts.spread) == pytest.approx(float(centred.square().sum()), rel=1e-6)
    failing = torch.tensor([1 / 3] * 3 + [1.0] * 3 + [0.0] * 3)[:, None] * one.mask
    assert float(facts.failing_tokens) == pytest.approx(float(failing.sum()))
    assert float(facts.failing_entropy) == pytest.approx(float((failing * one.entropy).sum()), rel=1e-6)
    assert (float(facts.held_out), float(facts.held_out_count)) == (3.0, 4.0)


def test_the_price_is_the_slope_of_the_reward_on_the_centred_log_probability():
    """A reward that is 0.25·L of its only token has the price 0.25, in groups of mean 0."""
    torch.manual_seed(0)
    logp, entropy = -2 * torch.rand(8, 1), torch.rand(8, 1)
    reward = 0.25 * (logp + entropy).flatten()
    half = torch.full((8,), 0.5)
    one = TokenBatch(logp, None, half, torch.ones(8, 1), entropy, reward=reward, group_rate=half, group_reward=0 * half)
    assert group_row(group_sums(one), 8.0)["price/nat"] == pytest.approx(0.25, rel=1e-5)


def test_micro_batches_add_up_and_rows_that_fill_a_batch_up_count_for_nothing():
    one = batch()
    parts = [
        one._replace(**{k: v[part] for k, v in one._asdict().items() if v is not None})
        for part in (slice(0, 4), slice(4, 9))
    ]
    whole = [float(x) for x in group_sums(one)]
    added = [float(a) + float(b) for a, b in zip(*map(group_sums, parts), strict=True)]
    assert added == pytest.approx(whole)
    filled = one._replace(**{k: torch.cat([v, v[:2]]) for k, v in one._asdict().items() if v is not None})
    mask = filled.mask.clone()
    mask[9:] = 0
    assert [float(x) for x in group_sums(filled._replace(mask=mask))] == pytest.approx(whole)
    weighted = group_sums(filled, weight=torch.tensor([1.0] * 9 + [0.0] * 2))
    assert [float(x) for x in weighted] == pytest.approx(whole)


@pytest.mark.parametrize("name", ["logp", "entropy"])
def test_a_broken_token_counts_in_no_sum_over_tokens(name):
    one = batch()
    broken = getattr(one, name).clone()
    broken[0, 1] = math.nan
    facts = group_sums(one._replace(**{name: broken}))
    assert all(math.isfinite(float(x)) for x in facts)
    mask = one.mask.clone()
    mask[0, 1] = 0
    assert [float(x) for x in facts] == pytest.approx([float(x) for x in group_sums(one._replace(mask=mask))])


def test_an_answer_that_is_not_scored_belongs_to_no_group():
    one = batch()
    reward = one.reward.clone()
    reward[4] = math.nan
    facts = group_sums(one._replace(reward=reward))
    assert (float(facts.completions), float(facts.failed)) == (8.0, 2.0)


def test_nothing_is_known_without_rewards():
    facts = group_sums(batch()._replace(reward=None), held_out=(1.0, 2.0))
    assert [float(x) for x in facts] == [0.0] * 13 + [1.0, 2.0]
    assert group_row(GroupFacts(*map(float, facts)), 9.0) == {}
    assert group_row(None, 9.0) == {}


def test_readings_add_up_with_their_groups():
    facts = GroupFacts(completions=2.0, failed=1.0)
    both = EntropyReading(1.0, 2.0, groups=facts) + EntropyReading(1.0, 2.0, groups=facts._replace(failed=2.0))
    assert both.groups == GroupFacts(completions=4.0, failed=3.0)
    assert (EntropyReading(1.0, 2.0) + EntropyReading(1.0, 2.0, groups=facts)).groups == facts
