"""Predicted entropy change against what a step on the logits really does."""

import math

import pytest
import torch

from isentropic.entropy.prediction import (
    Weights,
    attribute,
    bound_violations,
    change_of,
    clip_gain,
    effective_weights,
    entropy_slope,
    natural_change,
    predicted_change,
)
from isentropic.entropy.statistics import logits_stats, token_entropy
from isentropic.recipes import compose, loss
from isentropic.types import TokenBatch, TokenFacts, TokenStats

STEP = 1e-6


def rows(num=200, v=8, seed=0):
    """Random rows of logits, a sampled token for each, and its weight; axes [b t v] with t = 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num, 1, v, generator=generator, dtype=torch.float64)
    ids = torch.multinomial(logits[:, 0].softmax(-1), 1, generator=generator)
    return logits, ids, torch.randn(num, 1, generator=generator, dtype=torch.float64)


def measured(logits, direction):
    """Central difference of H along a direction, per unit step."""
    ahead, behind = token_entropy(logits + STEP * direction), token_entropy(logits - STEP * direction)
    return (ahead - behind) / (2 * STEP)


def one_hot(ids, v):
    return torch.nn.functional.one_hot(ids, v).double()


def predict(weight, stats):
    return predicted_change(weight, stats.logp, stats.entropy, stats.sum_p2, stats.sum_p2_logp)


def close(got, expected, atol=1e-7):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def test_numbers_by_hand():
    # π = (½, ¼, ¼) in bits: H = 1.5, L = (½, −½, −½), πL = (¼, −⅛, −⅛), Σπ²L = ⅛ − 2/32 = 1/16
    bit = math.log(2)
    p = torch.tensor([0.5, 0.25], dtype=torch.float64)[None]
    entropy, sum_p2 = torch.full_like(p, 1.5 * bit), torch.full_like(p, 0.375)
    sum_p2_logp = torch.full_like(p, -0.5 * bit)
    weight = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    exact = predicted_change(weight, p.log(), entropy, sum_p2, sum_p2_logp)
    close(exact / bit, torch.tensor([[-3 / 16, -3 / 8]], dtype=torch.float64), 1e-14)
    close(
        predicted_change(weight, p.log(), entropy) / bit, torch.tensor([[-1 / 4, -1 / 4]], dtype=torch.float64), 1e-14
    )
    close(natural_change(weight, p.log(), entropy) / bit, torch.tensor([[-0.5, -1.0]], dtype=torch.float64), 1e-14)


def test_exact_form_is_the_measured_change():
    logits, ids, weight = rows()
    stats = logits_stats(logits, ids)
    direction = weight[..., None] * (one_hot(ids, 8) - logits.softmax(-1))
    close(predict(weight, stats), measured(logits, direction))
    # A step of the loss itself: z − η ∂loss/∂z with loss = −w·logp
    z = logits.clone().requires_grad_()
    logp = z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    (-weight * logp).sum().backward()
    close(-z.grad, direction, 1e-12)


def test_natural_form_is_the_measured_change_of_a_natural_step():
    logits, ids, weight = rows(seed=1)
    stats = logits_stats(logits, ids)
    p = logits.softmax(-1)[:, 0]
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    gradient = (weight[..., None] * (one_hot(ids, 8) - p[:, None]))[:, 0]
    direction = torch.linalg.lstsq(fisher, gradient[..., None], driver="gelsd").solution[..., 0][:, None]
    # Rare tokens make steps of 1/π: what matters is the error beside the size of the step.
    scale = direction.abs().amax(-1)
    close(natural_change(weight, stats.logp, stats.entropy) / scale, measured(logits, direction / scale[..., None]))


def test_temperature():
    logits, ids, weight = rows(seed=2)
    for temperature in (0.6, 1.5):
        stats = logits_stats(logits, ids, temperature)
        p = (logits / temperature).softmax(-1)
        direction = weight[..., None] * (one_hot(ids, 8) - p) / temperature  # −∂loss/∂z through the temperature
        ahead = token_entropy(logits + STEP * direction, temperature)
        behind = token_entropy(logits - STEP * direction, temperature)
        close(predict(weight, stats) / temperature**2, (ahead - behind) / (2 * STEP))


def expectation(logits, advantage, change):
    """Σ_a π(a)·ΔH(a): the mean over all tokens of a row instead of one sample."""
    num, _, v = logits.shape
    spread = logits.expand(num, v, v)
    stats = logits_stats(spread, torch.arange(v).expand(num, v))
    return (stats.logp.exp() * change(advantage, stats)).sum(-1)


def test_expectations():
    logits, _, _ = rows(seed=3)
    p, logp = logits.softmax(-1)[:, 0], logits.log_softmax(-1)[:, 0]
    advantage = torch.randn(p.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    # The whole policy gradient p(A − E[A]) measured, against the exact form
    mean = (p * advantage).sum(-1, keepdim=True)
    exact = expectation(logits, advantage, predict)
    close(exact, measured(logits, (p * (advantage - mean))[:, None])[:, 0])

    # The paper's form is the exact one where the mean advantage of the state is 0
    def paper(weight, stats):
        return predicted_change(weight, stats.logp, stats.entropy)

    centred = advantage - mean
    close(expectation(logits, centred, paper), expectation(logits, centred, predict), 1e-12)
    assert (expectation(logits, advantage, paper) - exact).abs().max() > 0.05

    # The natural form is −Cov_π(A, log π), whatever the mean advantage
    covariance = (p * advantage * logp).sum(-1) - mean[:, 0] * (p * logp).sum(-1)
    natural = expectation(logits, advantage, lambda w, s: natural_change(w, s.logp, s.entropy))
    close(natural, -covariance, 1e-12)


def test_limits():
    flat = torch.zeros(1, 1, 7, dtype=torch.float64)  # L = 0: no first-order change
    stats = logits_stats(flat, torch.tensor([[3]]))
    weight = torch.ones(1, 1, dtype=torch.float64)
    close(predict(weight, stats), torch.zeros_like(weight), 1e-15)
    certain = flat.clone()
    certain[..., 1:] = -math.inf
    stats = logits_stats(certain, torch.tensor([[0]]))
    assert predict(weight, stats).item() == 0.0
    logits, ids, weight = rows(seed=5)
    stats = logits_stats(logits, ids)
    close(predict(-3 * weight, stats), -3 * predict(weight, stats), 1e-12)  # linear in the weight


def test_quadrants():
    # A<0 and surprisal > H surely falls; A>0 and surprisal > H surely rises; the likely side is not certain.
    logits, ids, _ = rows(num=2000, seed=6)
    stats = logits_stats(logits, ids)
    up = predict(torch.ones_like(stats.logp), stats)
    surprising = -stats.logp > stats.entropy
    assert (up[surprising] > 0).all()
    assert (up[~surprising] > 0).any()
    assert (up[~surprising] < 0).any()


def test_errors():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="go together, got only sum_p2;"):
        predicted_change(x, x, x, sum_p2=x)
    with pytest.raises(ValueError, match="go together, got only sum_p2_logp;"):
        predicted_change(x, x, x, sum_p2_logp=x)


def double(*values):
    return torch.tensor([values], dtype=torch.float64)


def policy(seed=7, b=6, t=9, v=8):
    """Logits of a small batch, what was sampled from them, advantages, and a ragged mask."""
    generator = torch.Generator().manual_seed(seed)
    logits = (1.5 * torch.randn(b, t, v, generator=generator, dtype=torch.float64)).requires_grad_()
    ids = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1, generator=generator).view(b, t)
    adv = torch.randn(b, generator=generator, dtype=torch.float64)
    adv[0] = 0.0
    mask = torch.arange(t) < torch.tensor([t, 1, 5, t, 7, 8])[:, None]
    old = 0.3 * torch.randn(b, t, generator=generator, dtype=torch.float64)
    return logits, ids, adv, mask, old


def statistics_of(logits, ids):
    """Log-probabilities and entropies with gradient, and the statistics without."""
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return logp, token_entropy(logits), logits_stats(logits.detach(), ids)


RECIPES = {
    "reinforce": {},
    "grpo": {},
    "loop": {},
    "dapo": {},
    "gspo": {},
    "cispo": {},
    "entropy-bonus": {"entropy_coef": 0.1},
    "repo-r-dapo": {"zeta": 0.05},
    "repo-d-gspo": {"zeta": 1.0},
}


def objective(name, logits, ids, adv, mask, old):
    recipe = compose(name, **RECIPES[name])
    logp, entropy, stats = statistics_of(logits, ids)
    batch = TokenBatch(logp, logp.detach() - old, adv, mask, entropy)
    total, facts = loss(recipe, batch)
    return total.mean(), facts, logp, entropy, stats


@pytest.mark.parametrize("name", RECIPES)
def test_weights_of_any_loss_predict_the_step_that_it_takes(name):
    """The predicted change of each row is the derivative of its H along the descent of the loss in the logits."""
    logits, ids, adv, mask, old = policy()
    total, _, logp, entropy, stats = objective(name, logits, ids, adv, mask, old)
    weights = effective_weights(total, logp, entropy)
    (slope,) = torch.autograd.grad(total, logits, retain_graph=True)
    step = 1e-5 / slope.abs().max()
    ahead, behind = (token_entropy(logits.detach() - s * slope) for s in (step, -step))
    close(change_of(weights, stats), (ahead - behind) / (2 * step), 1e-7)


@pytest.mark.parametrize("name", RECIPES)
def test_every_split_sums_to_the_change(name):
    logits, ids, adv, mask, old = policy()
    total, facts, logp, entropy, stats = objective(name, logits, ids, adv, mask, old)
    weights = effective_weights(total, logp, entropy)
    parts = attribute(weights, stats, adv[:, None].expand_as(logp), mask, facts)
    close(parts["change"], change_of(weights, stats)[mask].sum(), 1e-12)
    for names in (
        ["likely_up", "rare_up", "likely_down", "rare_down", "bonus"],
        ["unclipped", "clipped_low", "clipped_high"],
        ["positive", "negative", "neutral"],
        [f"position_{i}" for i in range(1, 9)],
    ):
        close(sum(parts[n] for n in names), parts["change"], 1e-12)
    simple = predicted_change(weights.logp, stats.logp, stats.entropy, entropy_weight=weights.entropy)
    natural = natural_change(weights.logp, stats.logp, stats.entropy, weights.entropy)
    close(parts["change_simple"], simple[mask].sum(), 1e-12)
    close(parts["change_natural"], natural[mask].sum(), 1e-12)


def test_splits_by_hand():
    # Without moments: −w·π·L with L = ½, −2, ½, −2 and π = e^(L − 1); positions 1, 3, 5, 7 of eight.
    centred = double(0.5, -2.0, 0.5, -2.0)
    stats = TokenStats(centred - 1, torch.ones_like(centred))
    weights = Weights(double(1.0, 1.0, -1.0, -2.0), torch.zeros_like(centred))
    parts = attribute(weights, stats, double(1.0, 1.0, -1.0, -1.0), torch.ones_like(centred))
    likely, rare = 0.5 * math.exp(-0.5), 2 * math.exp(-3)
    expected = {"likely_up": -likely, "rare_up": rare, "likely_down": likely, "rare_down": -2 * rare, "bonus": 0.0}
    expected |= {"positive": rare - likely, "negative": likely - 2 * rare, "neutral": 0.0, "position_1": -likely}
    expected |= {"position_2": 0.0, "position_7": -2 * rare, "absolute": 2 * likely + 3 * rare}
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, abs=1e-15), name


def test_what_the_clip_removed_by_hand():
    # One sequence of three tokens, weights |w| = |rA|/10 where free; the second was clipped at ratio 1.5.
    stats = TokenStats(double(-1.0, -1.0, -1.0), double(2.0, 2.0, 2.0))  # π = 1/e, L = 1
    ratio, adv = double(1.0, 1.5, 1.2), double(1.0, 2.0, 1.0)
    high = torch.tensor([[False, True, False]])
    facts = TokenFacts(ratio, torch.zeros_like(high), high)
    weights = Weights(double(0.1, 0.0, 0.12), torch.zeros_like(ratio))
    parts = attribute(weights, stats, adv, torch.ones_like(ratio), facts)
    assert parts["removed_high"].item() == pytest.approx(-0.3 / math.e)
    assert parts["clipped_high"].item() == 0 == parts["removed_low"].item()
    # A window of 0.2 around 1.28 holds the ratio 1.2 alone, whose weight without a clip is r·A/10.
    narrow = clip_gain(weights, stats, adv, facts, torch.ones_like(ratio), bound=1.28, width=0.2)
    assert narrow.item() == pytest.approx(-(0.12 / math.e) / 0.2)
    with pytest.raises(ValueError, match="width must be > 0"):
        clip_gain(weights, stats, adv, facts, torch.ones_like(ratio), bound=1.28, width=0.0)


def test_a_clip_bound_moves_only_the_tokens_of_its_side():
    # Weights r·A/10, π = 1/e, L = 1. At 1.28 only A > 0 is clipped, at 0.8 only A < 0; A = 0 moves nothing.
    stats = TokenStats(double(*[-1.0] * 5), double(*[2.0] * 5))
    ratio, adv = double(1.25, 1.25, 0.8, 0.8, 1.25), double(1.0, -2.0, 3.0, -4.0, 0.0)
    no = torch.zeros_like(ratio).bool()
    weights, facts = Weights(ratio * adv / 10, torch.zeros_like(ratio)), TokenFacts(ratio, no, no)
    high, low = (clip_gain(weights, stats, adv, facts, torch.ones_like(ratio), x, width=0.2) for x in (1.28, 0.8))
    assert high.item() == pytest.approx(-0.125 / math.e / 0.2)
    assert low.item() == pytest.approx(0.32 / math.e / 0.2)


def test_splits_add_over_micro_batches_and_ignore_what_is_masked():
    logits, ids, adv, mask, old = policy()
    total, facts, logp, entropy, stats = objective("dapo", logits, ids, adv, mask, old)
    weights = effective_weights(total, logp, entropy)
    spoiled = TokenStats(*(torch.where(mask, x, float("nan")) for x in stats))
    wide = adv[:, None].expand_as(logp)

    def split(stats, part):
        cut = TokenFacts(*(x[part] for x in facts))
        stats, pulls = TokenStats(*(x[part] for x in stats)), Weights(*(w[part] for w in weights))
        return attribute(pulls, stats, wide[part], mask[part], cut)

    whole, halves = split(stats, slice(None)), [split(spoiled, part) for part in (slice(0, 2), slice(2, None))]
    for name in whole:
        if not name.startswith("removed"):  # whose normaliser may fall back to the batch
            close(halves[0][name] + halves[1][name], whole[name], 1e-12)


def test_the_pull_of_entropy_is_the_gain_of_a_bonus_and_of_repo():
    logits, _, _ = rows(seed=8)
    p, logp = logits.softmax(-1)[:, 0], logits.log_softmax(-1)[:, 0]
    stats = logits_stats(logits, torch.zeros(len(logits), 1, dtype=torch.int64))
    centred = logp + stats.entropy
    close(entropy_slope(stats)[:, 0], (p**2 * centred**2).sum(-1), 1e-12)
    # The measured change along the gradient of H itself, −π L
    close(entropy_slope(stats), measured(logits, -(p * centred)[:, None]))
    # In expectation over a ∼ π, A − β L adds the same per unit of β
    repo = expectation(logits, -centred, predict)
    close(repo, entropy_slope(stats)[:, 0], 1e-12)


def test_weights_are_differentiable_by_what_the_advantages_depend_on():
    logits, ids, adv, mask, old = policy()
    knob = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def change(value, differentiable=False):
        logp, entropy, stats = statistics_of(logits, ids)
        shaped = adv[:, None] - value * adv.abs()[:, None] * (stats.logp + stats.entropy)
        total = -(shaped * (logp - logp.detach() + old).exp() * mask).sum()
        return change_of(effective_weights(total, logp, entropy, differentiable=differentiable), stats)[mask].sum()

    (slope,) = torch.autograd.grad(change(knob, differentiable=True), knob)
    assert slope.item() == pytest.approx((change(0.4) - change(0.2)).item() / 0.2, rel=1e-9)


def test_theorem_2_counts_rows_that_left():
    entropy_old = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    now = torch.tensor([[0.79, 1.28, 1.29, 0.0]])
    count = bound_violations(now, entropy_old, torch.tensor([[1, 1, 1, 1]]), 0.2, 0.28)
    assert (count.sum.item(), count.count.item()) == (2, 4)
    assert bound_violations(now, entropy_old, torch.tensor([[1, 1, 0, 0]]), 0.2, 0.28).sum.item() == 1
    # The lower bound is by the lower width, the upper one by the upper: 0.8 and 1.28, not 0.72 and 1.2.
    for row, left in enumerate((1, 0, 1, 0)):
        mask = torch.nn.functional.one_hot(torch.tensor([row]), 4)
        assert bound_violations(now, entropy_old, mask, 0.2, 0.28).sum.item() == left


def test_weights_need_a_gradient():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="got loss without"):
        effective_weights(x.sum(), x)
    y = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="got logp without"):
        effective_weights(y.sum(), x)
    with pytest.raises(ValueError, match="all three moments or none"):
        predicted_change(x, x, x, x, x, entropy_weight=x)
