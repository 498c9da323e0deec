"""The lab against numbers by hand, autograd, and the enumeration of all groups."""

import itertools
import math

import numpy as np
import pytest
import torch

from isentropic import recipes
from isentropic.engines import tabular as lab
from isentropic.engines.tabular import Batch, Tree

BIT = math.log(2)
SMALL = Tree(prompts=3, vocab=3, depth=2)


def close(got, expected, atol=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def world(tree=SMALL, regime="calibrated", seed=0):
    logits = lab.random_logits(tree, 1.5, seed)
    return logits, lab.make_rewards(tree, logits, regime, 0.4, seed)


def moved(logits, size=0.3, seed=9):
    return logits + lab.random_logits(SMALL, size, seed)


def test_a_tree_by_hand():
    # After token 0 (¾) the policy is certain, after token 1 (¼) it throws a coin.
    logits = torch.tensor([[3.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64).log()
    tree = Tree(1, 2, 2)
    visits, prob = lab.reach(tree, logits)
    close(visits, torch.tensor([4, 3, 1], dtype=torch.float64) / 8)
    close(prob, torch.tensor([[6, 0, 1, 1]], dtype=torch.float64) / 8)
    first = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert lab.mean_entropy(tree, logits) == pytest.approx(first / 2 + BIT / 8)
    assert lab.mean_entropy(tree, logits, torch.tensor([0.0, 0.5, 0.5]).double()) == pytest.approx(BIT / 2)
    assert lab.expected_reward(tree, logits, torch.tensor([[0.0, 1, 1, 0]]).double()) == pytest.approx(1 / 8)


def test_answers_and_their_probabilities_agree():
    logits, _ = world()
    rows, ids = lab.answers(SMALL)
    visits, prob = lab.reach(SMALL, logits)
    close(logits.log_softmax(-1)[rows, ids].sum(1).exp(), prob.flatten())
    # A row is visited by the answers that pass it.
    passing = torch.zeros(SMALL.num_rows, dtype=torch.float64).index_add(
        0, rows.flatten(), prob.flatten().repeat_interleave(2)
    )
    close(passing / 6, visits)
    close(prob.sum(1), torch.ones(3, dtype=torch.float64))
    assert SMALL.num_rows == 12


def test_regimes():
    tree = Tree(200, 8)
    logits = lab.random_logits(tree, 1.0)
    prob = lab.reach(tree, logits)[1]
    shares = []
    for regime in lab.REGIMES:
        right = lab.make_rewards(tree, logits, regime, 0.3, seed=1)
        assert ((right.sum(1) > 0) & (right.sum(1) < 8)).all()
        centred = right - (prob * right).sum(1, keepdim=True)
        shares.append(float((prob * centred * prob.log()).sum(1).mean()))
    likely, rare, neither = shares
    assert likely > 0.1
    assert rare < -0.1
    assert abs(neither) < 0.05


def enumerated_gradient(logits, old, rewards, recipe, knob, group):
    """Every group of answers that can be drawn, each with its probability; one prompt at a time."""
    rows, ids = lab.answers(SMALL)
    prob = lab.reach(SMALL, old)[1]
    logp = old.log_softmax(-1)[rows, ids]
    total = torch.zeros_like(logits)
    for prompt in range(SMALL.prompts):
        for drawn in itertools.product(range(prob.shape[1]), repeat=group):
            chosen = torch.tensor(drawn)
            adv = recipes.advantages(recipe, rewards[prompt, chosen][None])
            at = chosen + prompt * prob.shape[1]
            batch = Batch(rows[at], ids[at], logp[at], adv, torch.ones_like(adv))
            weight = prob[prompt, chosen].prod() / SMALL.prompts
            total += weight * lab.gradient(logits, batch, recipe, knob)
    return total


@pytest.mark.parametrize(
    ("name", "changes", "knob"),
    [
        ("reinforce", {}, None),
        ("rloo", {}, None),
        ("grpo", {"clip_high": 0.1, "clip_low": 0.1}, None),
        ("loop", {"shaping": "repo_r_raw", "zeta": 0.3}, None),
        ("gspo", {"entropy_coef": 0.1, "clip_high": 0.1}, None),
        ("cispo", {"shaping": "repo_d_token", "knob": "zeta"}, 2.0),
        ("dapo", {"knob": "beta"}, 0.1),
    ],
)
def test_expected_gradient_is_the_mean_over_all_groups(name, changes, knob):
    recipe = recipes.compose(name, **changes)
    old, rewards = world()
    logits = moved(old)
    batch = lab.expected_batch(SMALL, old, rewards, recipe, group=2)
    got = lab.gradient(logits, batch, recipe, knob)
    close(got, enumerated_gradient(logits, old, rewards, recipe, knob, group=2))
    assert got.abs().max() > 1e-3
    assert float(batch.weight.mean()) == pytest.approx(1.0)


def test_expected_gradient_on_policy_is_that_of_the_reward():
    logits, rewards = world(seed=1)
    leaf = logits.clone().requires_grad_()
    mean = (lab.reach(SMALL, leaf)[1] * rewards).sum(1).mean()
    slope = torch.autograd.grad(mean, leaf)[0] / SMALL.depth
    for name, share in (("reinforce", 1.0), ("rloo", 1.0), ("loop", 1.0), ("dr-grpo", 7 / 8)):
        recipe = recipes.RECIPES[name]
        batch = lab.expected_batch(SMALL, logits, rewards, recipe, group=8)
        close(lab.gradient(logits, batch, recipe), -share * slope, atol=1e-8)


def test_expected_likeness_of_right_answers_by_hand():
    """Three answers at 1/2, 1/4, 1/4, of which the first two are right: among the right ones 2/3 and 1/3.

    Two draws are the same with 4/9 + 1/9, and hold 2 − 5/9 distinct ones; one draw alone is distinct, and has no pair.
    """
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    rewards = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    batch = lab.expected_batch(Tree(1, 3), logits, rewards, recipes.RECIPES["loop"], group=2)
    nan = math.nan  # rows are: each answer beside a wrong one, then beside a right one
    assert batch.group_distinct.tolist() == pytest.approx([1, 13 / 18, 1, 13 / 18, nan, 1], nan_ok=True)
    assert batch.group_repeats.tolist() == pytest.approx([nan, 5 / 9, nan, 5 / 9, nan, nan], nan_ok=True)


def test_a_weight_of_two_is_the_same_answer_twice():
    logits, rewards = world(seed=2)
    for name in ("grpo", "gspo", "repo-r-loop", "repo-d-loop", "entropy-bonus"):
        recipe = recipes.compose(name)
        knob = 2.0 if recipe.knob else None
        batch = lab.sampled_batch(SMALL, logits, rewards, recipe, 4)
        twice = Batch(*(torch.cat([x, x[:3]]) for x in batch))
        weight = torch.ones(12, dtype=torch.float64)
        weight[:3] = 2.0
        once = batch._replace(weight=weight * 12 / 15)
        now = moved(logits)
        close(lab.gradient(now, once, recipe, knob), lab.gradient(now, twice, recipe, knob))


def test_repo_d_expectation_is_the_limit_of_many_groups():
    recipe = recipes.compose("repo-d-loop")
    logits, rewards = world(seed=3)
    batch = lab.expected_batch(SMALL, logits, rewards, recipe, 2)
    expected = lab.gradient(logits, batch, recipe, 32.0)
    pairs = [lab.sampled_batch(SMALL, logits, rewards, recipe, 2, seed) for seed in range(800)]
    many = Batch(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))
    close(lab.gradient(logits, many, recipe, 32.0), expected, atol=8e-3)
    assert (expected - lab.gradient(logits, batch, recipe, 0.0)).abs().max() > 0.08


ALL = [
    ("reinforce", None), ("rloo", None), ("grpo", None), ("dr-grpo", None), ("loop", None), ("dapo", None),
    ("gspo", None), ("cispo", None), ("entropy-bonus", None), ("repo-r-loop", 0.05), ("repo-d-loop", 4.0),
    ("adapo", 0.5), ("isentropic", 0.5), ("entropic", -0.5), ("entrocraft", 1.0), ("dynamic-clip", 0.2), ("dcpo", None),
    ("ce-gppo", None), ("qae", None), ("erc", None), ("sapo", None), ("mai", 1.5), ("aent", 0.1),
    ("pass-at-k", None), ("nsr", None), ("w-reinforce", None), ("up", None), ("tre-p", None), ("tre-k", None),
    ("entropy-bonus-adaptive", 0.005), ("repo-r-rloo", 0.05), ("repo-r-grpo", 0.05), ("repo-r-dapo", 0.05),
    ("repo-r-gspo", 0.05), ("repo-d-rloo", 4.0), ("repo-d-grpo", 4.0), ("repo-d-dapo", 4.0), ("repo-d-gspo", 4.0),
]  # fmt: skip
# Parts that look at a batch as a whole: sampled batches alone.
WHOLE = [("clip-cov", None), ("kl-cov", None), ("bapo", None), ("high-entropy", None), ("stare", 1.5), ("lp-reg", None)]
WHOLE += [("steer", None), ("opefo", None), ("distribution-centric", 0.05), ("unlikeliness", None), ("ucpo", None)]


def test_no_recipe_is_left_out():
    drawn_once = {name for name, recipe in recipes.RECIPES.items() if not recipe.redraws}
    assert {name for name, _ in ALL + WHOLE} == drawn_once


@pytest.mark.parametrize(("name", "knob"), ALL + WHOLE)
@pytest.mark.parametrize("updates", [0, 3])
def test_prediction_meets_truth(name, knob, updates):
    recipe = recipes.RECIPES[name]
    for seed, regime in enumerate(lab.REGIMES):
        old, rewards = world(regime=regime, seed=seed)
        batches = [lab.sampled_batch(SMALL, old, rewards, recipe, 8, seed)]
        if (name, knob) in ALL:
            batches.append(lab.expected_batch(SMALL, old, rewards, recipe, 4))
        for batch in batches:
            logits = lab.advance(old, batch, recipe, 1.0, updates, knob)

            def same_draw(take, *args, seed=seed):
                torch.manual_seed(seed)
                return take(*args)

            out = same_draw(lab.step, SMALL, logits, batch, recipe, 0.02, knob)
            finer = same_draw(lab.step, SMALL, logits, batch, recipe, 0.002, knob)
            assert out.error < 0.01
            # The error is of second order, the contributions are of first.
            assert finer.error < 0.15 * out.error + 1e-6
            close(out.after, logits - 0.02 * same_draw(lab.gradient, logits, batch, recipe, knob))
            whole = lab.mean_entropy(SMALL, out.after) - lab.mean_entropy(SMALL, logits)
            assert out.fixed + out.shift == pytest.approx(whole, abs=1e-14)


def test_natural_step():
    for name, knob in ALL:
        recipe = recipes.RECIPES[name]
        old, rewards = world(seed=4)
        batch = lab.expected_batch(SMALL, old, rewards, recipe, 5)  # above the k of pass@k
        out = lab.step(SMALL, old, batch, recipe, 1e-3, knob, natural=True)
        assert out.error < 0.01
        assert out.predicted == out.natural != out.exact


def test_contexts_visit_the_same_states():
    tree = Tree(5, 6)
    logits, rewards = world(tree)
    recipe = recipes.RECIPES["rloo"]
    out = lab.step(tree, logits, lab.expected_batch(tree, logits, rewards, recipe), recipe, 1.0)
    assert out.shift == pytest.approx(0.0, abs=1e-15)
    # One token an answer and an unbiased baseline: the state's mean advantage is 0, and the moments drop out.
    assert out.simple == pytest.approx(out.exact, abs=1e-15)


def test_simulation_is_reproducible_and_predicts_its_steps():
    recipe = recipes.compose("loop", knob="zeta", target="80%", every=1)
    run, again = (lab.simulate(recipe, 40, seed=3, lr=0.5) for _ in range(2))
    for name, x, y in zip(run._fields, run, again, strict=True):
        assert x.shape == (40,), name
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(run.predicted, run.measured, rtol=0.1, atol=2e-6)
    assert not np.array_equal(run.entropy, lab.simulate(recipe, 40, seed=4, lr=0.5).entropy)


def test_a_random_selection_is_drawn_from_the_seed():
    state = torch.random.get_rng_state()
    run, again = (lab.simulate(recipes.RECIPES["clip-cov"], 8, seed=3, lr=16.0) for _ in range(2))
    np.testing.assert_array_equal(run.exact, again.exact)
    assert torch.equal(state, torch.random.get_rng_state())


def test_rejection_by_the_reward_has_one_expected_gradient_on_either_side():
    """∇E[1 right] = −∇E[1 wrong]: on-policy only noise tells the sides apart; by the group they differ."""
    recipe = recipes.RECIPES["entrocraft"]
    logits, rewards = world(seed=1)
    batch = lab.expected_batch(SMALL, logits, rewards, recipe, 8)
    wrong, right = (lab.gradient(logits, batch, recipe, knob) for knob in (1.0, -1.0))
    close(wrong, right)
    assert wrong.abs().max() > 0.01
    by_group = recipes.compose("grpo", shaping="one_sided", knob="reject", controller="switch", target="0.5")
    batch = lab.expected_batch(SMALL, logits, rewards, by_group, 8)
    wrong, right = (lab.gradient(logits, batch, by_group, knob) for knob in (1.0, -1.0))
    assert (wrong - right).abs().max() > 0.01


@pytest.mark.parametrize("name", ["entropic", "stare", "aent"])
def test_a_knob_raises_entropy_the_way_its_range_says(name):
    recipe = recipes.RECIPES[name]
    span = recipes.knob_range(recipe)
    ends = (span.high, span.low) if span.sign > 0 else (span.low, span.high)
    # A boost acts where rare tokens are rewarded, the others where likely ones are.
    logits, rewards = world(regime="anti-calibrated" if name == "stare" else "calibrated", seed=1)
    batch = lab.sampled_batch(SMALL, logits, rewards, recipe, 32)
    up, down = (lab.step(SMALL, logits, batch, recipe, 0.02, knob).fixed for knob in ends)
    assert up > down


def test_control_holds_what_a_plain_recipe_loses():
    plain = lab.simulate(recipes.compose("loop"), 200, lr=16.0)
    held = lab.simulate(recipes.compose("loop", knob="zeta", target="75%", every=1), 200, lr=16.0)
    assert np.isnan(plain.knob).all()
    assert np.isnan(plain.target).all()
    assert plain.exact[-1] < 0.4 * plain.exact[0]
    assert np.abs(held.entropy[-100:] / held.target[-100:] - 1).mean() < 0.1
    assert held.reward[-1] > held.reward[0] + 0.2


@pytest.mark.parametrize(("knob", "at"), [("zeta", 0.2), ("beta", 0.05), ("entropy_coef", 0.02)])
def test_gain_is_the_derivative_of_the_step(knob, at):
    def first(value):
        recipe = recipes.compose("loop", knob=knob, controller="fixed", knob_start=value)
        run = lab.simulate(recipe, 1, lr=0.01, scale=2.0)
        return float(run.measured[0]), float(run.gain[0])

    (low, _), (high, _), (_, gain) = first(at - 0.01), first(at + 0.01), first(at)
    # The gain is read over 5 % of the range, in which a few of the shaped advantages reach their clamp.
    assert gain == pytest.approx((high - low) / 0.02, rel=0.05)
    assert gain > 0


def test_minibatches_may_be_cut_short():
    recipe = recipes.compose("grpo")
    assert len(lab.simulate(recipe, 6).entropy) == 6
    np.testing.assert_array_equal(lab.simulate(recipe, 6).entropy, lab.simulate(recipe, 8).entropy[:6])


def test_errors():
    logits, rewards = world()
    grpo = recipes.RECIPES["grpo"]
    with pytest.raises(ValueError, match="vocab must be >= 2, got 1"):
        lab.answers(Tree(1, 1))
    with pytest.raises(ValueError, match="may have 10\\^6 answers, got 1 x 10\\^7"):
        lab.answers(Tree(1, 10, 7))
    with pytest.raises(ValueError, match="regime must be one of calibrated"):
        lab.make_rewards(SMALL, logits, "best")
    with pytest.raises(ValueError, match="share must lie in"):
        lab.make_rewards(SMALL, logits, "uninformed", 1.0)
    with pytest.raises(ValueError, match="rewards of 0 and 1"):
        lab.expected_batch(SMALL, logits, rewards / 2, grpo)
    with pytest.raises(ValueError, match="no dynamic_sampling, got True"):
        lab.sampled_batch(SMALL, logits, rewards, recipes.compose("dapo", dynamic_sampling=True))
    with pytest.raises(ValueError, match="no overlong_buffer, got 2"):
        lab.expected_batch(SMALL, logits, rewards, recipes.compose("dapo", overlong_buffer=2))
    with pytest.raises(ValueError, match="tabular engine draws no second batch, got redraw=0 and knob=redraw"):
        lab.sampled_batch(SMALL, logits, rewards, recipes.RECIPES["aepo"])
    for name, _ in WHOLE:
        with pytest.raises(ValueError, match="use sampled_batch"):
            lab.expected_batch(SMALL, logits, rewards, recipes.RECIPES[name])
    with pytest.raises(ValueError, match="strictly on-policy"):
        lab.simulate(recipes.RECIPES["rloo"], 1)
    with pytest.raises(ValueError, match="updates must lie in"):
        lab.simulate(grpo, 1, updates=0)
