"""Properties of the predicted entropy change over random rows, policies and batches."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isentropic import recipes
from isentropic.entropy.prediction import entropy_bounds, natural_change, predicted_change
from isentropic.entropy.statistics import logits_stats, token_entropy
from isentropic.types import TokenBatch

SEEDED = settings(derandomize=True, deadline=None, max_examples=150)

VALUES = st.floats(-6, 6, allow_nan=False, width=32)
ROWS = st.integers(2, 9).flatmap(lambda v: st.lists(VALUES, min_size=v, max_size=v))


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def every_token(row):
    """The statistics of each token of one row, [1 v], as if it had been sampled."""
    logits = double(row)
    v = len(logits)
    return logits_stats(logits.expand(1, v, v), torch.arange(v)[None])


def exact(weight, stats):
    return predicted_change(weight, stats.logp, stats.entropy, stats.sum_p2, stats.sum_p2_logp)


def mean(stats, change):
    return float((stats.logp.exp() * change).sum())


@SEEDED
@given(ROWS, st.floats(1e-3, 10))
def test_a_constant_beta_never_lowers_entropy(row, beta):
    stats = every_token(row)
    centred = stats.logp + stats.entropy
    weight = -beta * centred  # what the term −βL adds to the advantage
    # E_a[L] = 0: the moments drop out, and what is left is a mean of squares.
    gain = mean(stats, stats.logp.exp() * beta * centred.square())
    assert gain >= 0
    assert abs(mean(stats, exact(weight, stats)) - gain) < 1e-9 * max(1.0, beta)
    assert mean(stats, natural_change(weight, stats.logp, stats.entropy)) >= 0


@SEEDED
@given(ROWS, st.data())
def test_repo_r_where_the_size_of_the_advantage_varies(row, data):
    stats = every_token(row)
    size = double([data.draw(st.lists(st.floats(0, 3), min_size=len(row), max_size=len(row)))])
    centred = stats.logp + stats.entropy
    weight = -size * centred
    # Under a natural gradient and under the form without moments the claim stands whatever |A| is.
    assert mean(stats, natural_change(weight, stats.logp, stats.entropy)) >= -1e-12
    assert mean(stats, predicted_change(weight, stats.logp, stats.entropy)) >= -1e-12
    # For a step on the logits it is ζ{E[π|A|L²] − E[|A|L]·Σπ²L}, whose second part has either sign.
    sum_p2_l = stats.sum_p2_logp + stats.entropy * stats.sum_p2
    closed = mean(stats, stats.logp.exp() * size * centred.square()) - mean(stats, size * centred * sum_p2_l)
    assert abs(mean(stats, exact(weight, stats)) - closed) < 1e-9
    # Same size for all tokens: never lower.
    assert mean(stats, exact(-3.0 * centred, stats)) >= -1e-12


def test_repo_r_may_lower_entropy_where_the_size_varies():
    # Only the second token has an advantage, and it is likely (L > 0) though not likely enough (πL < Σπ²L).
    stats = every_token(double([0.5, 0.45, 0.05]).log().tolist())
    weight = -double([[0.0, 1.0, 0.0]]) * (stats.logp + stats.entropy)
    assert weight[0, 1] < 0
    assert mean(stats, exact(weight, stats)) < 0
    # In random rows it is rare: never met with half-normal sizes, about one in a hundred where a tenth have any.
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 1, 8, generator=generator, dtype=torch.float64)
    stats = logits_stats(logits.expand(2000, 8, 8), torch.arange(8).expand(2000, 8), chunk=16000)
    size = (torch.rand(2000, 8, generator=generator) < 0.1).double()
    change = (stats.logp.exp() * exact(-size * (stats.logp + stats.entropy), stats)).sum(-1)
    assert 0 < (change < 0).double().mean() < 0.04


@SEEDED
@given(ROWS, st.data(), st.floats(0.0, 0.9), st.floats(0.0, 2.0))
def test_theorem_2(row, data, clip_low, clip_high):
    old = double(row).softmax(-1)
    other = double(data.draw(st.lists(VALUES, min_size=len(row), max_size=len(row)))).softmax(-1)
    # As far towards another policy as the bounds allow for every token.
    slope = other / old - 1
    room = torch.where(slope > 0, clip_high / slope, -clip_low / slope)[slope != 0]
    far = min(1.0, float(room.min())) if len(room) else 0.0
    new = old + far * (other - old)
    low, high = entropy_bounds(token_entropy(old.log()[None]), clip_low, clip_high)
    entropy = token_entropy(new.log()[None])
    assert low - 1e-9 <= entropy <= high + 1e-9


BATCHES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31), st.floats(0.05, 0.5))


@SEEDED
@given(BATCHES)
def test_dapo_with_equal_bounds_is_grpo(shape):
    b, t, seed, clip = shape
    generator = torch.Generator().manual_seed(seed)
    logp = (-3 * torch.rand(b, t, generator=generator, dtype=torch.float64)).requires_grad_()
    logp_old = logp.detach() + 0.5 * torch.randn(b, t, generator=generator, dtype=torch.float64)
    adv = torch.randn(b, generator=generator, dtype=torch.float64)
    mask = (torch.rand(b, t, generator=generator) < 0.8).double()
    grpo = recipes.compose("grpo", clip_low=clip, clip_high=clip)
    dapo = recipes.compose("dapo", clip_low=clip, clip_high=clip, reduction="sequence")
    losses = [recipes.loss(r, TokenBatch(logp, logp_old, adv, mask))[0].mean() for r in (grpo, dapo)]
    assert losses[0] == losses[1]
    slopes = [torch.autograd.grad(loss, logp)[0] for loss in losses]
    assert torch.equal(*slopes)
    rewards = torch.rand(b, 4, generator=generator)
    assert torch.equal(recipes.advantages(grpo, rewards), recipes.advantages(dapo, rewards))


@SEEDED
@given(ROWS, st.floats(1e-3, 5), st.booleans())
def test_quadrants(row, size, up):
    stats = every_token(row)
    weight = torch.full_like(stats.logp, size if up else -size)
    centred = stats.logp + stats.entropy
    sign = weight.sign()
    # Natural step: likely tokens pushed up, or rare ones pushed down, lower entropy. Always.
    natural = natural_change(weight, stats.logp, stats.entropy)
    assert torch.equal(natural.sign(), -sign * centred.sign())
    # Step on the logits: what decides is π(a)L(a) against Σπ²L, which is never negative ...
    floor = stats.sum_p2_logp + stats.entropy * stats.sum_p2
    assert (floor > -1e-12).all()
    change = exact(weight, stats)
    clear = (stats.logp.exp() * centred - floor).abs() > 1e-12
    assert torch.equal(change.sign()[clear], (-sign * (stats.logp.exp() * centred - floor).sign())[clear])
    # ... so that a rare token is on the side that its surprisal says.
    rare = clear & (centred < 0)
    assert torch.equal(change.sign()[rare], sign[rare])


@SEEDED
@given(ROWS, st.floats(0.01, 1))
def test_an_entropy_bonus_never_lowers_entropy(row, coef):
    stats = every_token(row)
    nothing, bonus = torch.zeros_like(stats.logp), torch.full_like(stats.logp, coef)
    change = predicted_change(nothing, *stats, entropy_weight=bonus)
    assert (change >= 0).all()
    # In expectation the constant β of REPO is the same term.
    beta = exact(-coef * (stats.logp + stats.entropy), stats)
    assert abs(mean(stats, change) - mean(stats, beta)) < 1e-9
