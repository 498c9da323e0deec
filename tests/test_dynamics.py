"""Predicted entropy change against what a step on the logits really does."""

import math

import pytest
import torch

from isentropic.dynamics import natural_change, predicted_change
from isentropic.entropy import logits_stats, token_entropy

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
