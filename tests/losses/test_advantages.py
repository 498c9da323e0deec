"""Baselines by hand, the degenerate groups, and what every baseline has to keep."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from defaults import table
from hypothesis import given, settings
from hypothesis import strategies as st

from isentropic.losses.advantages import (
    group_mean,
    group_rate,
    informative_groups,
    leave_one_out,
    mean_std,
    none,
    overlong_penalty,
    pass_at_k,
    quantile,
    signed,
    uniform_correct,
    unlikeliness,
)

NAN = math.nan
# Draws of two, which the smallest groups below have.
BASELINES = table("baseline") | {"pass_at_k": partial(pass_at_k, pass_k=2)}
# They read what is no reward, and treat rewards above 0 alone: a shift of all changes which those are.
del BASELINES["unlikeliness"], BASELINES["uniform_correct"]
GROUPED = [name for name in BASELINES if name not in ("none", "signed")]


def check(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-5, equal_nan=False)


def test_numbers_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0]])  # sum 4, mean 1, squares 0+1+1+4 = 6, std √(6/3) = √2
    check(none(rewards), [1.0, 0.0, 0.0, 3.0])
    check(group_mean(rewards), [0.0, -1.0, -1.0, 2.0])
    check(leave_one_out(rewards), [0.0, -4 / 3, -4 / 3, 8 / 3])  # others: 3/3, 4/3, 4/3, 1/3
    root = math.sqrt(2)
    check(mean_std(rewards, eps=0.0), [0.0, -1 / root, -1 / root, root])
    check(mean_std(rewards, eps=root), [0.0, -1 / (2 * root), -1 / (2 * root), 1 / root])
    check(quantile(rewards, 0.5), [0.5, -0.5, -0.5, 2.5])  # the median of 0 0 1 3 is ½
    assert mean_std(rewards)[3] == pytest.approx(2 / (root + 1e-4))


def test_signs_ignore_the_group():
    """Wrong is 0 or below; a group that is all right, or all wrong, keeps its signs."""
    check(signed(torch.tensor([[1.0, 0.0], [0.3, 2.0], [0.0, -1.0], [NAN, math.inf]])), [1, -1, 1, 1, -1, -1, 0.0, 0])


def test_rows_are_prompts_and_come_out_in_order():
    rewards = torch.tensor([[1.0, 0.0], [5.0, 9.0], [2.0, 2.0]])
    check(group_mean(rewards), [0.5, -0.5, -2.0, 2.0, 0.0, 0.0])


def test_unscorable_samples_are_as_if_never_drawn():
    rewards = torch.tensor([[1.0, NAN, 0.0, 0.0]])
    for name in BASELINES:
        got = BASELINES[name](rewards)
        assert got[1] == 0.0
        check(got[[0, 2, 3]], BASELINES[name](rewards[:, [0, 2, 3]]).tolist())
    check(none(torch.tensor([[NAN, NAN]])), [0.0, 0.0])


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_reward_is_not_scorable(value):
    infinite, missing = (torch.tensor([[1.0, x, 0.0, 0.0], [1.0, 1.0, x, 1.0]]) for x in (value, NAN))
    for baseline in BASELINES.values():
        check(baseline(infinite), baseline(missing).tolist())
    for method in ("linear", "lower", "inverted_cdf"):
        check(quantile(infinite, 0.4, method), quantile(missing, 0.4, method).tolist())
    check(group_rate(infinite), [1 / 3] * 4 + [1.0] * 4)
    assert informative_groups(infinite).tolist() == [True, False]


@pytest.mark.parametrize("name", GROUPED)
def test_degenerate_groups_are_exactly_zero(name):
    # Three times 0.1 or 0.7 does not always average to itself in binary; division by a tiny std would blow that up.
    for value in (0.1, 0.7, -1e6 / 3, 1e-30):
        assert BASELINES[name](torch.full((1, 7), value)).eq(0).all()
    one_scorable = torch.tensor([[NAN, 0.3, NAN], [NAN, NAN, NAN]])
    assert BASELINES[name](one_scorable).eq(0).all()


def test_one_sample_a_prompt():
    single = torch.tensor([[1.0], [0.0]])
    for function in (mean_std, leave_one_out):
        with pytest.raises(ValueError, match="at least 2 samples per prompt, got 1; sample more"):
            function(single)
    check(none(single), [1.0, 0.0])
    check(group_mean(single), [0.0, 0.0])
    check(quantile(single, 0.4), [0.0, 0.0])


@pytest.mark.parametrize(
    ("interpolation", "baseline"),
    [("linear", 0.8), ("lower", 0.0), ("higher", 1.0), ("nearest", 1.0), ("midpoint", 0.5), ("inverted_cdf", 1.0)],
)
def test_the_interpolation_of_the_quantile(interpolation, baseline):
    rewards = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]])  # 5 of 8: position 0.4·7 = 2.8
    check(quantile(rewards, 0.4, interpolation), (rewards[0] - baseline).tolist())


def test_inverted_cdf_is_the_two_regime_rule():
    # The baseline is 1 where the share of right answers exceeds 1 − k, else 0: only one side of a group then teaches.
    for n in (5, 8, 10, 30):
        for right in range(1, n):
            rewards = torch.tensor([[1.0] * right + [0.0] * (n - right)])
            baseline = 1.0 if n - right < 0.4 * n - 1e-9 else 0.0
            check(quantile(rewards, 0.4, "inverted_cdf"), (rewards[0] - baseline).tolist())
    rewards = torch.arange(50.0)[None]
    assert quantile(rewards, 0.3, "inverted_cdf")[0] == -14.0  # 0.3·50 is the 15th, although it exceeds 15 in fp32
    assert quantile(rewards, 0.0, "inverted_cdf")[0] == 0.0
    assert quantile(rewards, 1.0, "inverted_cdf")[49] == 0.0


def test_pass_at_k_by_hand():
    # 5 samples, 2 right, k = 2: ρ = 1 − C(3,2)/C(5,2) = 0.7, σ = √0.21, C(2,1)/C(4,1) = ½.
    rewards, std = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]]), math.sqrt(0.21)
    right, wrong = 0.3 / std, (0.3 - 0.5) / std
    check(pass_at_k(rewards, 2), [right, wrong, right, wrong, wrong])
    check(pass_at_k(2 * rewards - 1, 2), [right, wrong, right, wrong, wrong])
    # k = 3: ρ = 1 − 1/10, σ = 0.3, C(2,2)/C(4,2) = 1/6. From k = 4 on every draw holds a right one.
    check(pass_at_k(rewards, 3), [1 / 3, -2 / 9, 1 / 3, -2 / 9, -2 / 9])
    assert pass_at_k(rewards, 4).eq(0).all()
    assert pass_at_k(rewards, 5).eq(0).all()


def test_pass_at_k_is_the_mean_over_every_draw():
    """The closed form against its definition: each draw of k is a sample with the reward of its best."""
    for n, right, k in ((6, 1, 2), (6, 2, 3), (8, 3, 4), (8, 1, 8), (7, 2, 1)):
        rewards = torch.tensor([[1.0] * right + [0.0] * (n - right)], dtype=torch.float64)
        draws = list(itertools.combinations(range(n), k))
        best = torch.tensor([rewards[0, list(d)].max() for d in draws], dtype=torch.float64)
        std = best.std(unbiased=False)
        scaled = (best - best.mean()) / std if std > 0 else torch.zeros_like(best)
        means = [scaled[[i in d for d in draws]].mean() for i in range(n)]
        torch.testing.assert_close(pass_at_k(rewards, k), torch.stack(means), rtol=0, atol=1e-12)


def test_pass_at_k_at_its_limits():
    for n in (2, 5, 8):
        for k in range(1, n + 1):
            for right in range(n + 1):
                rewards = torch.tensor([[1.0] * right + [0.0] * (n - right)], dtype=torch.float64)
                adv = pass_at_k(rewards, k)
                assert adv.sum().abs() < 1e-12
                teaches = 0 < right <= n - k
                assert adv.ne(0).all() if teaches else adv.eq(0).all()
                if k == 1 and teaches:  # the mean and the standard deviation over n
                    expected = (rewards - rewards.mean()) / rewards.std(unbiased=False)
                    torch.testing.assert_close(adv, expected[0])
    check(pass_at_k(torch.tensor([[1.0, 0.0, NAN]]), 3), [0.0, 0.0, 0.0])  # no draw of three is left
    for k in (0, 1.5, 4):
        with pytest.raises(ValueError, match="pass_k must be a whole number from 1 to the 3 samples"):
            pass_at_k(torch.zeros(1, 3), k)


def test_unlikeliness_by_hand():
    # Ranks by log π, the likeliest 0: 2, 0, 3, 1. β = 0.4: right ones are worth 1 − 0.4·(4−k)/4 = 0.8, 0.6 and 0.9.
    rewards, logp = torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.tensor([[-3.0, -1.0, -4.0, -2.0]])
    worth = torch.tensor([[0.8, 0.6, 0.9, 0.0]])  # mean 0.575
    centred = worth - 0.575
    check(unlikeliness(rewards, logp, 0.4, eps=0.0), (centred / (centred.square().sum() / 3).sqrt())[0].tolist())
    check(unlikeliness(rewards, logp, 0.4), mean_std(worth).tolist())
    # Wrong answers below 0 stay as they are, and rewards of any size are weighed alike.
    check(unlikeliness(3 * rewards - 1, logp, 0.4), mean_std(torch.tensor([[1.6, 1.2, 1.8, -1.0]])).tolist())


def test_unlikeliness_at_its_limits():
    rewards, logp = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]), torch.tensor([[-1.0, -2.0, -3.0]] * 2)
    assert torch.equal(unlikeliness(rewards, logp, 0.0), mean_std(rewards))
    assert unlikeliness(rewards, logp, 0.25)[3:].eq(0).all()  # all right: ranks alone teach nothing
    # A sample that is not scorable has no rank, and the group is one smaller.
    some, likely = torch.tensor([[NAN, 1.0, 0.0, 1.0]]), torch.tensor([[0.0, -1.0, -2.0, -3.0]])
    got = unlikeliness(some, likely, 0.25)
    check(got, [0.0, *unlikeliness(rewards[:1], logp[:1], 0.25).tolist()])
    assert unlikeliness(rewards, logp, 0.25)[2] > unlikeliness(rewards, logp, 0.25)[0] > 0  # the rarer, the more
    tied = unlikeliness(torch.tensor([[1.0, 1.0, 0.0]]), torch.zeros(1, 3), 0.3)
    check(tied, mean_std(torch.tensor([[0.7, 0.8, 0.0]])).tolist())  # ties by position
    assert unlikeliness(torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta"), 0.25).is_meta
    for penalty in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=rf"rank_penalty must be in \[0, 1\], got {penalty}"):
            unlikeliness(rewards, logp, penalty)


def test_uniform_correct_by_hand():
    # Right ones at 0.5, 0.25, 0.25: 1/q as 1 to 2 to 2. τ = ½: 3·(1/6 + ½·(0.2, 0.4, 0.4)) = 0.8, 1.1, 1.1.
    rewards, logp = torch.tensor([[1.0, 0.0, 1.0, 1.0, NAN]]), torch.tensor([[0.4, 0.9, 0.2, 0.2, 0.9]]).log()
    plain = mean_std(rewards)
    got = uniform_correct(rewards, logp, 0.5)
    check(got, (torch.tensor([0.8, 1.0, 1.1, 1.1, 1.0]) * plain).tolist())
    assert got.sum().item() == pytest.approx(0.0, abs=1e-6)  # the right ones get as much as before
    check(uniform_correct(rewards - 0.5, logp, 0.5), got.tolist())  # rewards of ±½
    assert torch.equal(uniform_correct(rewards, logp, 0.0), plain)
    full = uniform_correct(rewards, logp, 1.0)
    check(full[[0, 2]] * logp[0, [0, 2]].exp(), [full[0].item() * 0.4] * 2)  # A·π alike
    # Alone, the right one keeps its advantage; groups that are all right or all wrong have none.
    same = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert torch.equal(uniform_correct(same, torch.zeros(3, 2), 0.5), mean_std(same))
    assert uniform_correct(torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta"), 0.2).is_meta
    for share in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=rf"uniform_share must be in \[0, 1\], got {share}"):
            uniform_correct(rewards, logp, share)


def test_the_ranks_reach_training_in_trl(tmp_path, monkeypatch):
    """TRL's old log-probs rank the completions, and the advantages that come of it are those that train."""
    pytest.importorskip("trl")
    from trl_case import make

    from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
    from isentropic.recipes.stages import BASELINES as TABLE

    seen = []

    def spy(rewards, logp_mean, rank_penalty):
        seen.append((logp_mean, unlikeliness(rewards, logp_mean, rank_penalty)))
        return seen[-1][1]

    monkeypatch.setitem(TABLE, "unlikeliness", replace(TABLE["unlikeliness"], at=spy))
    trainer = make(IsentropicTrainer, IsentropicConfig, tmp_path / "a", 4, recipe="unlikeliness")
    trainer.train()
    parts = trainer._buffered_inputs
    mask = [part["completion_mask"].bool() for part in parts]
    pairs = zip(parts, mask, strict=True)
    mean = torch.stack([row[m].mean() for part, k in pairs for row, m in zip(part["old_per_token_logps"], k)])  # noqa: B905
    torch.testing.assert_close(mean.sort().values, seen[-1][0].flatten().sort().values)
    trained = torch.cat([part["advantages"] for part in parts])
    assert len(trained.unique()) > 3
    assert torch.equal(trained.sort().values, seen[-1][1].to(trained.dtype).sort().values)
    with pytest.raises(ValueError, match="engines leave out if every update is on-policy, got one optimizer step"):
        make(IsentropicTrainer, IsentropicConfig, tmp_path / "b", 4, recipe="unlikeliness", steps_per_generation=1)


def test_quantile_limits():
    rewards = torch.tensor([[3.0, 1.0, 2.0]])
    check(quantile(rewards, 0.0), [2.0, 0.0, 1.0])  # the minimum
    check(quantile(rewards, 1.0), [0.0, -2.0, -1.0])  # the maximum
    with pytest.raises(ValueError, match=r"quantile must be in \[0, 1\], got 1.5"):
        quantile(rewards, 1.5)
    with pytest.raises(ValueError, match=r"interpolation must be one of linear.* got 'cubic'"):
        quantile(rewards, 0.4, "cubic")


def test_eps():
    with pytest.raises(ValueError, match=r"eps must be >= 0, got -1\.0"):
        mean_std(torch.zeros(1, 2), eps=-1.0)


@settings(max_examples=40, deadline=None)
@given(p=st.integers(1, 4), g=st.integers(2, 7), seed=st.integers(0, 999), shift=st.sampled_from([0.0, 3.0, -100.0]))
def test_what_baselines_keep(p, g, seed, shift):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(p, g, generator=generator, dtype=torch.float64)
    for name in GROUPED:
        function = BASELINES[name]
        adv = function(rewards)
        assert adv.shape == (p * g,)
        torch.testing.assert_close(function(rewards + shift), adv, rtol=0, atol=1e-9)
        order = torch.randperm(g, generator=generator)
        torch.testing.assert_close(function(rewards[:, order]), adv.view(p, g)[:, order].flatten())
        if name != "quantile":
            torch.testing.assert_close(adv.view(p, g).sum(1), torch.zeros(p, dtype=adv.dtype), rtol=0, atol=1e-9)
    torch.testing.assert_close(leave_one_out(rewards), group_mean(rewards) * g / (g - 1))
    torch.testing.assert_close(
        mean_std(rewards), ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    )


def test_half_precision_rewards():
    adv = group_mean(torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.bfloat16))
    check(adv, [2 / 3, -1 / 3, -1 / 3])


def test_overlong_penalty():
    lengths = torch.tensor([0, 79, 80, 81, 85, 99, 100, 101, 900])
    check(overlong_penalty(lengths, 100, 20), [0.0, 0.0, 0.0, -0.05, -0.25, -0.95, -1.0, -1.0, -1.0])
    check(overlong_penalty(torch.tensor([0, 50, 100]), 100, 100), [0.0, -0.5, -1.0])
    for buffer in (0, 101):
        with pytest.raises(ValueError, match=f"buffer must be in .*, got {buffer} with max_length 100"):
            overlong_penalty(lengths, 100, buffer)


def test_informative_groups():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [NAN, 0.5, 0.5], [NAN, 0.5, 0.6], [NAN] * 3])
    assert informative_groups(rewards).tolist() == [True, False, False, True, False]


def test_nothing_waits_for_the_device():
    # Tensors without data: reading a value, which would synchronise, raises.
    rewards = torch.empty(2, 3, device="meta")
    for function in [*BASELINES.values(), informative_groups, lambda r: quantile(r, 0.4, "inverted_cdf")]:
        assert function(rewards).is_meta
    assert overlong_penalty(torch.empty(4, device="meta", dtype=torch.int64), 10, 2).is_meta


def test_group_rates_by_hand():
    right = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, NAN, NAN, 1.0]])
    check(group_rate(right).view(3, 4)[:, 0], [0.5, 1.0, 0.5])
    # Graded: (mean − min)/(max − min); (3 + 1 + 2 + 1)/4 = 1.75 of [1, 3].
    graded = torch.tensor([[3.0, 1.0, 2.0, 1.0], [-1.0, -1.0, -1.0, -1.0], [2.0, 2.0, NAN, 2.0]])
    check(group_rate(graded).view(3, 4)[:, 0], [0.375, 0.0, 1.0])
    assert group_rate(torch.full((1, 3), NAN)).eq(0).all()
    assert group_rate(torch.ones(2, 3, device="meta")).is_meta


@settings(max_examples=40, deadline=None)
@given(p=st.integers(1, 4), g=st.integers(2, 7), seed=st.integers(0, 999), scale=st.sampled_from([1.0, 5.0]))
def test_a_group_rate_keeps_order_and_scale(p, g, seed, scale):
    rewards = torch.randn(p, g, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rate = group_rate(rewards)
    assert ((rate >= 0) & (rate <= 1)).all()
    torch.testing.assert_close(group_rate(scale * rewards), rate)
    torch.testing.assert_close(group_rate(rewards + 3.0), rate)
