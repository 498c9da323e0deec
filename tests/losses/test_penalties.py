"""Penalties by hand: values, gradients, and what they leave alone."""

import math

import pytest
import torch
from defaults import default, table

from isentropic import TokenBatch, compose
from isentropic.recipes import loss
from isentropic.recipes.apply import penalty

aent = default("penalty", "aent")
kl_cov = default("penalty", "kl_cov")
lp_reg = default("penalty", "lp_reg")


def close(got, expected):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=1e-6)


def test_kl_cov_by_hand():
    # Covariances 0.75, −0.5, −0.25, 1.0: the last is the largest quarter. |−4 + 3| = 1, with the slope −1.
    adv = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    logp = torch.tensor([[-0.5, -1.0, -2.5, -4.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -1.0, -1.0, -3.0]])
    term = kl_cov(logp, old, adv, torch.ones(1, 4), kl_share=0.25)
    close(term.detach(), [[0.0, 0.0, 0.0, 1.0]])
    close(torch.autograd.grad(term.sum(), logp)[0], [[0.0, 0.0, 0.0, -1.0]])
    close(kl_cov(logp, old, adv, torch.ones(1, 4), kl_share=0.5).detach(), [[0.5, 0.0, 0.0, 1.0]])
    # At r = 1 it is 0, and has no gradient.
    still = kl_cov(logp, None, adv, torch.ones(1, 4), kl_share=0.5)
    close(torch.autograd.grad(still.sum(), logp)[0], torch.zeros(1, 4))
    # What is masked may hold anything.
    masked = kl_cov(logp, torch.full_like(old, math.nan), adv, torch.zeros(1, 4), kl_share=0.5)
    close(masked.detach(), torch.zeros(1, 4))


def test_kl_cov_holds_the_policy_and_never_the_one_that_sampled():
    # An engine may hand over log-probs that still have a graph, or the current ones themselves.
    adv, mask = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2)
    logp = torch.tensor([[-0.5, -2.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -2.5]], requires_grad=True)
    slopes = torch.autograd.grad(kl_cov(logp, old, adv, mask).sum(), [logp, old], allow_unused=True)
    close(slopes[0], [[1.0, 0.0]])
    assert slopes[1] is None
    # |logp − (2·logp + 1)| at −0.5 has the slope −1 if the past is fixed, and +1 if it is not.
    (slope,) = torch.autograd.grad(kl_cov(logp, 2 * logp + 1, adv, mask).sum(), logp)
    close(slope, [[-1.0, 0.0]])


def test_a_penalty_sees_the_advantages_before_shaping_and_selection():
    # Covariances of A = (1, −1, 1, −1) with log π − (−2) = (1.5, 1, −0.5, −2): 1.5, −1, −0.5, 2; the fourth is largest.
    adv = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    logp = torch.tensor([[-0.5, -1.0, -2.5, -4.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -1.5, -2.75, -3.0]])
    batch = TokenBatch(logp, old, adv, torch.ones(1, 4), torch.full((1, 4), 1.0))
    seen = []

    def flipped(adv):
        seen.append(adv)
        return -adv

    def first_only(adv):
        return torch.tensor([[1.0, 0.0, 0.0, 0.0]])

    penalised = {"penalty": "kl_cov", "penalty_coef": 0.5, "kl_share": 0.25}
    for changes in ({}, {"shaping": flipped}, {"selection": first_only}, {"shaping": "repo_r", "zeta": 5.0}):
        plain, held = (loss(compose("dapo", **changes, **more), batch)[0].sum for more in ({}, penalised))
        close((held - plain).detach(), 0.5 * abs(-4.0 + 3.0))  # the fourth token's |log r|
        (slope,) = torch.autograd.grad(held - plain, logp)
        close(slope, [[0.0, 0.0, 0.0, -0.5]])
    assert seen
    close(kl_cov(logp, old, -adv, torch.ones(1, 4), kl_share=0.25).detach(), [[0.0, 0.5, 0.0, 0.0]])  # if it did not


def rows_of(*rows):
    logits = torch.tensor([rows], dtype=torch.float64).log().requires_grad_()
    return logits, logits.log_softmax(-1)


def test_lp_reg_by_hand():
    # κ = 0.2 keeps π ≥ 0.1: π' = (0.5, 0.25, 0.2)/0.95, KL(π'‖π) = −log 0.95, and its slope by the logits is π − π'.
    logits, rows = rows_of([0.5, 0.25, 0.2, 0.05])
    one = torch.ones(1, 1)
    term = lp_reg(rows, rows[..., 2], -one, one, lp_kappa=0.2)
    close(term.detach(), [[-math.log(0.95)]])
    kept = torch.tensor([0.5, 0.25, 0.2, 0.0], dtype=torch.float64)
    close(torch.autograd.grad(term.sum(), logits)[0][0, 0], logits.detach()[0, 0].exp() - kept / 0.95)
    # A token that the filter drops, a positive advantage and a masked token are left alone.
    assert lp_reg(rows, rows[..., 3], -one, one, lp_kappa=0.2).item() == 0
    assert lp_reg(rows, rows[..., 2], one, one, lp_kappa=0.2).item() == 0
    assert lp_reg(rows, rows[..., 2], -one, 0 * one, lp_kappa=0.2).item() == 0


def test_lp_reg_holds_the_least_likely_of_what_falls():
    _, rows = rows_of([0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2], [0.9, 0.05, 0.05])
    logp = rows.detach()[..., 1]  # 0.3, 0.3, 0.4, 0.05
    adv = torch.tensor([[-1.0, 1.0, -1.0, -1.0]])
    # Three fall: ⌊0.7·3⌋ = 2, the least likely of them the fourth and the first. The fourth passes a filter of 0.05.
    term = lp_reg(rows, logp, adv, torch.ones(1, 4), lp_share=0.7, lp_kappa=0.5)
    assert (term > 0).tolist() == [[True, False, False, False]]
    term = lp_reg(rows, logp, adv, torch.ones(1, 4), lp_share=0.7, lp_kappa=0.05)
    close(term.detach(), torch.zeros(1, 4))  # a filter that drops nothing is the policy itself


def test_aent_by_hand():
    # Half of the tokens: (0.6, 0.3)/0.9 = (⅔, ⅓).
    logits, rows = rows_of([0.6, 0.3, 0.06, 0.04])
    term = aent(rows, torch.ones(1, 1), aent_drop=0.5)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    close(term.detach(), [[-entropy]])
    slope = torch.autograd.grad(term.sum(), logits)[0][0, 0]
    assert slope[0] > 0 > slope[1]  # minimising it evens the two out
    close(slope[2:], [0.0, 0.0])
    # Without a drop it is −H of the row; a uniform one has log v.
    _, even = rows_of([0.25] * 4)
    close(aent(even, torch.ones(1, 1), aent_drop=0.0).detach(), [[-math.log(4)]])
    assert aent(even, torch.zeros(1, 1)).item() == 0


def test_a_token_that_is_never_sampled_adds_nothing():
    # (½, ½, 0, 0): −log 2 over the two that can be, and no slope by the others.
    logits, rows = rows_of([0.5, 0.5, 0.0, 0.0])
    term = aent(rows, torch.ones(1, 1), aent_drop=0.0)
    close(term.detach(), [[-math.log(2)]])
    close(torch.autograd.grad(term.sum(), logits)[0], torch.zeros(1, 1, 4))
    logits, rows = rows_of([0.9, 0.1, 0.0, 0.0])
    term = lp_reg(rows, rows[..., 0], -torch.ones(1, 1), torch.ones(1, 1), lp_kappa=0.2)
    close(term.detach(), [[-math.log(0.9)]])
    assert torch.autograd.grad(term.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("field", ["logp", "entropy", "logp_rows"])
@pytest.mark.parametrize("name", ["aent", "lp_reg", "kl_cov"])
def test_a_broken_token_is_outside_the_mask_of_a_penalty(name, field):
    """Its penalty is 0, it has no gradient, and the others are as if it had been masked."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 5, generator=generator).log_softmax(-1)
    ids = torch.randint(5, (2, 3, 1), generator=generator)
    kept = {"logp": rows.gather(-1, ids)[..., 0], "entropy": -(rows.exp() * rows).sum(-1), "logp_rows": rows}
    broken = {name: x.clone() for name, x in kept.items()}
    broken[field][1, 2] = math.nan
    mask = torch.ones(2, 3)
    mask[1, 2] = 0
    constants = {"lp_share": 1.0, "lp_kappa": 0.3} if name == "lp_reg" else {}
    recipe, adv = compose("grpo", penalty=name, constants=constants), torch.tensor([-1.0, -2.0])

    def cost(values, mask):
        leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
        batch = TokenBatch(leaves["logp"], kept["logp"] - 0.1, adv, mask, leaves["entropy"], None, leaves["logp_rows"])
        by_token = penalty(recipe, batch)
        slopes = torch.autograd.grad(by_token.sum(), list(leaves.values()), allow_unused=True)
        return by_token.detach(), [x for x in slopes if x is not None]

    got, slopes = cost(broken, torch.ones(2, 3))
    wanted, _ = cost(kept, mask)
    assert wanted.abs().max() > 0
    close(got, wanted)
    assert all(x.isfinite().all() and x[1, 2].abs().max() == 0 for x in slopes)


@pytest.mark.parametrize("name", table("penalty"))
def test_nothing_waits_for_the_device(name):
    x, rows = torch.ones(2, 3, device="meta"), torch.ones(2, 3, 5, device="meta")
    args = {"kl_cov": (x, x, x, x), "lp_reg": (rows, x, x, x), "aent": (rows, x)}.get(name, (rows, x))
    assert default("penalty", name)(*args).is_meta


def test_tre_by_hand():
    rows = torch.tensor([[[0.5, 0.25, 0.15, 0.1], [0.9, 0.05, 0.03, 0.02]]]).log()
    # Mass 0.8: three tokens of the first row, 5/9, 5/18, 1/6, H = 0.9810 nats, log 4/log 3 = 1.2619; one of the second.
    torch.testing.assert_close(default("penalty", "tre_p")(rows, torch.ones(1, 2), tre_mass=0.8),
                               torch.tensor([[-1.23794, 0.0]]), rtol=0, atol=1e-4)  # fmt: skip
    # Two tokens: 2/3, 1/3 and 18/19, 1/19; log 4/log 2 = 2.
    torch.testing.assert_close(default("penalty", "tre_k")(rows, torch.ones(1, 2)),
                               torch.tensor([[-2 * 0.636514, -2 * 0.206192]]), rtol=0, atol=1e-4)  # fmt: skip
