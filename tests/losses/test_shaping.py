"""Shapings by hand, the knob at 0, the clamps, and what they do to entropy in expectation."""

import inspect
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isentropic.losses.shaping import (
    entropy_balance,
    one_sided,
    one_sided_reward,
    repo,
    repo_d,
    repo_failing,
    repo_r,
    sign_weight,
    steer,
    tempered,
)
from isentropic.recipes.stages import SHAPINGS

LOGP = torch.tensor([[-0.5, -3.0], [-0.5, -3.0]])
ENTROPY = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # L = 0.5, −2
ADV = torch.tensor([2.0, -2.0])
ONES = torch.ones(2, 2)

surprisal_boost = partial(SHAPINGS["surprisal_boost"].function, surprisal_share=0.1)


def close(got, expected):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=1e-6)


def random_tokens(seed, b=4, t=5):
    generator = torch.Generator().manual_seed(seed)
    adv = torch.randn(b, t, generator=generator)
    adv[0, 0], adv[-1, -1] = 0.0, -0.0
    return adv, -5 * torch.rand(b, t, generator=generator), 3 * torch.rand(b, t, generator=generator)


def test_repo_by_hand():
    close(repo(ADV, LOGP, ENTROPY, 0.5), [[1.75, 3.0], [-2.25, -1.0]])  # A − 0.5·L
    close(repo(ADV, LOGP, ENTROPY, -1.0), [[2.5, 0.0], [-1.5, -4.0]])
    by_token = torch.tensor([[0.5, -1.0], [0.0, 2.0]])
    close(repo(ADV, LOGP, ENTROPY, by_token), [[1.75, 0.0], [-2.0, 2.0]])
    close(repo(ADV, LOGP, ENTROPY, torch.tensor(0.5)), [[1.75, 3.0], [-2.25, -1.0]])


def test_sign_weight_by_hand():
    close(sign_weight(ADV, LOGP, 0.25), [[2.5, 2.5], [-1.5, -1.5]])  # 2·1.25, −2·0.75
    close(sign_weight(ADV, LOGP, torch.tensor(-1.0)), [[0.0, 0.0], [-4.0, -4.0]])


def test_one_sided_reward_by_hand():
    """±1 by the reward on one side, 0 on the other, where the group's advantage says nothing too."""
    adv, logp = torch.tensor([2.0, -0.5, 0.0, 0.0, 0.7]), torch.zeros(5, 1)
    reward = torch.tensor([1.0, 0.0, 0.0, -1.0, math.nan])
    shaped = lambda knob: one_sided_reward(adv, logp, reward, knob)[:, 0]  # noqa: E731
    close(shaped(1.0), [0.0, -1.0, -1.0, -1.0, 0.7])
    close(shaped(-1.0), [1.0, 0.0, 0.0, 0.0, 0.7])
    close(shaped(0.5), [1.0, -0.75, -0.5, -0.5, 0.7])  # ½·A + ½·min(R, 0)
    assert torch.equal(shaped(0.0), adv)
    close(one_sided_reward(adv[:2], torch.zeros(2, 2), reward[:2], torch.tensor([[0.0, 1.0], [1.0, -1.0]])),
          [[2.0, 0.0], [-1.0, 0.0]])  # fmt: skip


def test_steer_by_hand():
    # π ½ and ¼, H = 1: L = 0.3069, −0.3863. Ω = A·r·(1−π)·L with r = 2 and ½, A = 2: 0.6137, −0.2897.
    logp, entropy, ones = torch.tensor([[0.5, 0.25]]).log(), torch.ones(1, 2), torch.ones(1, 2)
    old = logp - torch.tensor([[2.0, 0.5]]).log()
    shaped = steer(torch.tensor([2.0]), logp, old, entropy, ones, steer_least=0.7)
    expected = torch.tensor([[1.4, 2 * 0.7 ** (0.75 * 0.38629436 / (2 * 0.30685282))]])
    torch.testing.assert_close(shaped, expected, rtol=1e-5, atol=0)
    close(steer(torch.tensor([-2.0]), logp, old, entropy, ones, steer_least=0.7), -shaped)  # |Ω|: either direction
    # Below 0.02 the scale stops: A = 0.02 makes |Ω| 0.003069 and 0.005795, on-policy.
    small = steer(torch.tensor([0.02]), logp, None, entropy, ones, steer_least=0.7)
    close(small / 0.02, [[0.7 ** (0.00306853 / 0.02), 0.7 ** (0.00579442 / 0.02)]])
    # What is masked, or not finite, sets no scale.
    hidden = torch.tensor([[0.5, 1e-6]]).log()
    alone = steer(torch.tensor([2.0]), hidden, None, entropy, torch.tensor([[1.0, 0.0]]), steer_least=0.7)
    assert alone[0, 0].item() == pytest.approx(1.4)
    assert torch.equal(steer(torch.tensor([2.0]), logp, old, entropy, ones, steer_least=1.0), torch.full((1, 2), 2.0))
    with pytest.raises(ValueError, match=r"steer_least must be in \(0, 1\], got 0"):
        steer(torch.tensor([2.0]), logp, old, entropy, ones, steer_least=0)


def test_one_sided_by_hand():
    close(one_sided(ADV, LOGP, 1.0), [[0.0, 0.0], [-2.0, -2.0]])
    close(one_sided(ADV, LOGP, -1.0), [[2.0, 2.0], [0.0, 0.0]])
    close(one_sided(ADV, LOGP, 0.25), [[1.5, 1.5], [-2.0, -2.0]])
    close(one_sided(ADV, LOGP, torch.tensor([[0.0, 1.0], [-0.5, 0.0]])), [[2.0, 0.0], [-1.0, -2.0]])


def test_entropy_balance_by_hand():
    # π ½ and ¼, H = 1: L = 0.3069, −0.3863, ΔĤ = −A·π·L = −0.3069 and 0.1931 at A = 2; λ = 0.1137/0.5 = 0.2274.
    logp, entropy = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[1.0, 1.0, math.nan]])
    for mask in (torch.tensor([[1, 1, 0]]), torch.ones(1, 3)):  # masked or broken, a token sets no balance
        shaped = entropy_balance(torch.tensor([2.0]), logp, entropy, mask)
        close(shaped, [[2 * (1 - 0.22741128), 2 * (1 + 0.22741128), 2.0]])
    # Negative advantages turn both changes round: the same tokens raise and lower by the other sign.
    turned = entropy_balance(torch.tensor([-2.0]), logp[:, :2], entropy[:, :2], torch.ones(1, 2))
    close(turned, [[-2 * (1 - 0.22741128), -2 * (1 + 0.22741128)]])


@pytest.mark.parametrize("seed", range(4))
def test_entropy_balance_predicts_no_change(seed):
    adv, logp, entropy = (x.double() for x in random_tokens(seed))
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)) < 0.7
    shaped = entropy_balance(adv, logp, entropy, mask)
    change = lambda a: -(a * logp.exp() * (logp + entropy))[mask].sum()  # noqa: E731
    assert abs(change(shaped)) < 1e-12 < abs(change(adv))
    assert ((shaped == 0) | (shaped.sign() == adv.sign())).all()  # no weight is negative
    assert torch.equal(entropy_balance(torch.zeros(4), logp, entropy, mask), torch.zeros_like(adv))
    falls = entropy_balance(torch.ones(4), logp, 9 + entropy, mask)  # L > 0: every token lowers entropy
    close(falls[mask], torch.zeros_like(falls[mask]))


def test_tempered_by_hand():
    # π = (0.8, 0.2) at T = 2 is (⅔, ⅓), at ½ (0.9412, 0.0588). One of two answers is right: a = 0.1/½ = 0.2.
    rows = torch.tensor([0.8, 0.2]).log().expand(3, 2, 2)
    logp, adv = torch.tensor([0.8, 0.2]).log().expand(3, 2), torch.tensor([1.0, -1.0, 0.5])
    reward = torch.tensor([1.0, 0.0, math.nan])

    def shaped(tilt, reward=reward, mask=None):
        mask = torch.ones(3, 2) if mask is None else mask
        return tempered(adv, logp, rows, reward, mask, tilt, temper_high=2.0, temper_low=0.5)

    rest = [[-1 / 1.2] * 2, [0.5 / 1.2] * 2]
    close(shaped(0.1), [[(1 + 0.2 * 5 / 6) / 1.2, (1 + 0.2 * 5 / 3) / 1.2], *rest])
    close(shaped(-0.1), [[(1 + 0.2 * 0.64 / 0.68 / 0.8) / 1.2, (1 + 0.2 * 0.04 / 0.68 / 0.2) / 1.2], *rest])
    # An answer without a token is no answer: one of one is right, a = 0.1.
    alone = shaped(0.1, mask=torch.tensor([[1, 1], [0, 0], [1, 1]]))
    close(alone[0], [(1 + 0.1 * 5 / 6) / 1.1, (1 + 0.1 * 5 / 3) / 1.1])
    close(shaped(torch.tensor([[0.0, 0.1]] * 3))[0], [1.0, (1 + 0.2 * 5 / 3) / 1.2])
    unchanged = adv[:, None].expand(3, 2)
    assert torch.equal(shaped(0.0), unchanged)
    assert torch.equal(shaped(0.1, torch.zeros(3)), unchanged)  # nothing is right
    assert torch.equal(shaped(0.1, torch.full((3,), math.nan)), unchanged)


def test_tempered_weighs_as_a_draw_at_the_other_temperature():
    """Σ_b π(b)·ρ(b)·f(b) is the mean of f at the other temperature, whatever f is."""
    generator = torch.Generator().manual_seed(0)
    row, f = torch.randn(7, generator=generator).double().log_softmax(-1), torch.randn(7, generator=generator).double()
    rows = row.expand(7, 1, 7)  # one answer for each token of the vocabulary, all right
    for tilt, temperature in ((1.0, 1.2), (-1.0, 0.8)):
        shaped = tempered(torch.zeros(7), row[:, None], rows, torch.ones(7), torch.ones(7, 1), tilt, temper_high=1.2,
                          temper_low=0.8)  # fmt: skip
        weight = 2 * shaped[:, 0]  # A = 0 and a = 1 leave ρ/2
        wanted = ((row / temperature).softmax(-1) * f).sum()
        torch.testing.assert_close((row.exp() * weight * f).sum(), wanted, rtol=1e-6, atol=1e-7)


def test_surprisal_boost_by_hand():
    logp = torch.tensor([[-0.5, -3.0, -1.0], [-5.0, -0.1, -9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    # The two rarest of five are −5 (where A < 0) and −3 (where A > 0); the masked −9 counts for nothing.
    close(surprisal_boost(ADV, logp, mask, 1.5, surprisal_share=0.4), [[2.0, 3.0, 2.0], [-2.0, -2.0, -2.0]])
    close(surprisal_boost(ADV, logp, mask, 1.5), [[2.0] * 3, [-2.0] * 3])  # one of five: −5
    close(surprisal_boost(ADV, logp, mask, 1.0, surprisal_share=0.4), [[2.0] * 3, [-2.0] * 3])


def test_repo_r_by_hand():
    # Raw, ζ = 0.1: A(1 − ζ logp) = 2·1.05, 2·1.3; A(1 + ζ logp) = −2·0.95, −2·0.7
    close(repo_r(ADV, LOGP, 0.1), [[2.1, 2.6], [-1.9, -1.4]])
    # Centred: A − ζ|A|L = 2 − 0.1·2·(0.5, −2), −2 − the same
    close(repo_r(ADV, LOGP, 0.1, ENTROPY), [[1.9, 2.4], [-2.1, -1.6]])
    close(repo_r(ADV, LOGP, 0.1, positive_only=True), [[2.1, 2.6], [-2.0, -2.0]])


def test_repo_r_clamps():
    # Raw, ζ = 0.5: −2·(1 − 1.5) = +1 becomes 0. Centred, ζ = 3: 2 − 6·0.5 = −1 and −2 + 12 = 10 become 0.
    close(repo_r(ADV, LOGP, 0.5), [[2.5, 5.0], [-1.5, 0.0]])
    close(repo_r(ADV, LOGP, 0.5, clamp=False), [[2.5, 5.0], [-1.5, 1.0]])
    close(repo_r(ADV, LOGP, 3.0, ENTROPY), [[0.0, 14.0], [-5.0, 0.0]])
    close(repo_r(ADV, LOGP, 3.0, ENTROPY, clamp=False), [[-1.0, 14.0], [-5.0, 10.0]])


def test_repo_r_signs_are_opposite():
    assert torch.equal(repo_r(ADV, LOGP, 0.1, sign="lowers"), repo_r(ADV, LOGP, -0.1))
    assert torch.equal(repo_r(ADV, LOGP, -0.1, ENTROPY, sign="lowers"), repo_r(ADV, LOGP, 0.1, ENTROPY))


def test_repo_r_is_repo_with_beta_by_token():
    adv, logp, entropy = random_tokens(0)
    close(repo_r(adv, logp, 0.02, entropy, clamp=False), repo(adv, logp, entropy, 0.02 * adv.abs()))


def test_repo_d_by_hand():
    predicted = torch.tensor([[-1.0, 0.5], [-2.0, 0.5]])
    # By token: A + 0.5·min(ΔH, 0)·L = 2 − 0.25, 2; −2 − 0.5, −2
    close(repo_d(ADV, LOGP, ENTROPY, predicted, 0.5, ONES), [[1.75, 2.0], [-2.5, -2.0]])
    # As one scalar: mean −0.5, so β = 0.25 and A − 0.25·L
    close(repo_d(ADV, LOGP, ENTROPY, predicted, 0.5, ONES, per="batch"), [[1.875, 2.5], [-2.125, -1.5]])
    # The mean is over the tokens inside the mask: (−1 − 0.5 + 0.75)/3 = −0.25, so β = 0.125
    mask = torch.tensor([[1, 1], [0, 1]])
    predicted = torch.tensor([[-1.0, -0.5], [math.nan, 0.75]])
    close(repo_d(ADV, LOGP, ENTROPY, predicted, 0.5, mask, per="batch"), [[1.9375, 2.25], [-2.0625, -1.75]])


def test_repo_d_raises_what_is_predicted_to_fall():
    falling = torch.full((2, 2), -1.0)
    assert torch.equal(repo_d(ADV, LOGP, ENTROPY, falling, 0.5, ONES), repo(ADV, LOGP, ENTROPY, 0.5))
    for per in ("token", "batch"):  # a constant is its own mean: the way to pass the mean of a whole step
        assert torch.equal(repo_d(ADV, LOGP, ENTROPY, falling, 0.5, ONES, per=per), repo(ADV, LOGP, ENTROPY, 0.5))


@pytest.mark.parametrize("per", ["token", "batch"])
def test_repo_d_leaves_rises_alone(per):
    rising = torch.full((2, 2), 0.5)
    assert torch.equal(repo_d(ADV, LOGP, ENTROPY, rising, 8.0, ONES, per=per), repo(ADV, LOGP, ENTROPY, 0.0))


@pytest.mark.parametrize("per", ["token", "batch"])
@pytest.mark.parametrize("seed", range(8))
def test_a_larger_zeta_of_repo_d_never_asks_for_less_entropy(per, seed):
    """Its term is that of REPO with a β that is >= 0 and grows with ζ, whether entropy falls or recovers."""
    adv, logp, entropy = random_tokens(seed)
    predicted = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    ones, centred = torch.ones(4, 5), logp + entropy
    betas = [(adv - repo_d(adv, logp, entropy, predicted, zeta, ones, per=per)) / centred for zeta in (0.5, 1.0, 4.0)]
    for low, high in pairwise([torch.zeros(4, 5), *betas]):
        assert (high >= low - 1e-5).all()


@pytest.mark.parametrize("zero", [0.0, -0.0, 0, torch.tensor(0.0), torch.zeros(4, 5)])
def test_a_knob_of_zero_is_the_identity_bit_for_bit(zero):
    adv, logp, entropy = random_tokens(1)
    logp[1, 1], entropy[2, 2] = -math.inf, math.nan
    shaped = [
        repo(adv, logp, entropy, zero),
        repo_r(adv, logp, zero),
        repo_r(adv, logp, zero, entropy, sign="lowers"),
        repo_r(adv, logp, zero, positive_only=True, clamp=False),
        repo_d(adv, logp, entropy, entropy, zero, torch.ones(4, 5)),
        repo_d(adv, logp, entropy, entropy, zero, torch.ones(4, 5), per="batch"),
    ]
    for result in shaped:
        assert torch.equal(result.view(torch.int32), adv.view(torch.int32))


def test_broadcasting():
    _, logp, entropy = random_tokens(2)
    adv = torch.tensor([1.0, -1.0, 0.5, 0.0])
    full = adv[:, None].expand(4, 5).contiguous()
    for shape in (
        lambda a: repo(a, logp, entropy, 0.1),
        lambda a: repo_r(a, logp, 0.1),
        lambda a: repo_r(a, logp, 0.0),
        lambda a: repo_d(a, logp, entropy, logp, 0.1, torch.ones(4, 5)),
    ):
        for narrow in (adv, adv[:, None]):
            assert shape(narrow).shape == (4, 5)
            assert torch.equal(shape(narrow), shape(full))
    assert repo_r(adv.bfloat16(), logp, 0.0).dtype == torch.float32


def test_no_gradient_passes():
    adv, logp, entropy = random_tokens(3)
    logp.requires_grad_()
    entropy.requires_grad_()
    for result in (
        repo(adv, logp, entropy, 0.1),
        repo_r(adv, logp, 0.1),
        repo_r(adv, logp, 0.1, entropy),
        repo_d(adv, logp, entropy, logp * entropy, 0.1, torch.ones(4, 5)),
        entropy_balance(adv, logp, entropy, torch.ones(4, 5)),
        tempered(adv, logp, logp[..., None], torch.ones(4), torch.ones(4, 5), 0.1, temper_high=1.2, temper_low=0.8),
    ):
        assert not result.requires_grad


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    zeta=st.floats(-50, 50, width=32),
    centred=st.booleans(),
    positive_only=st.booleans(),
    sign=st.sampled_from(["raises", "lowers"]),
)
def test_the_clamp_keeps_signs(seed, zeta, centred, positive_only, sign):
    adv, logp, entropy = random_tokens(seed)
    given_entropy = entropy if centred else None
    shaped = repo_r(adv, logp, zeta, given_entropy, positive_only=positive_only, sign=sign)
    assert (shaped[adv > 0] >= 0).all()
    assert (shaped[adv < 0] <= 0).all()
    assert (shaped[adv == 0] == 0).all()
    free = repo_r(adv, logp, zeta, given_entropy, positive_only=positive_only, sign=sign, clamp=False)
    kept = free * adv > 0
    assert torch.equal(shaped[kept], free[kept])


def test_where_the_clamps_bind():
    # ζ = 0.25. Raw: A<0 and surprisal > 4. Centred: A>0 and L > 4, A<0 and L < −4.
    logp, entropy = torch.tensor([[-3.99, -4.01]]), torch.zeros(1, 2)
    assert (repo_r(torch.tensor([-1.0]), logp, 0.25) == 0).tolist() == [[False, True]]
    assert (repo_r(torch.tensor([1.0]), logp, 0.25) == 0).tolist() == [[False, False]]
    assert (repo_r(torch.tensor([-1.0]), logp, 0.25, entropy) == 0).tolist() == [[False, True]]
    entropy = torch.tensor([[7.98, 8.02]])  # L = 3.99, 4.01
    assert (repo_r(torch.tensor([1.0]), logp, 0.25, entropy) == 0).tolist() == [[False, True]]


def random_rows(num=200, v=6):
    logits = 2 * torch.randn(num, v, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logp = logits.log_softmax(-1)
    return logp, -(logp.exp() * logp).sum(-1, keepdim=True).expand(num, v)


def test_constant_beta_is_the_score_function_gradient_of_an_entropy_bonus():
    # E_π[(−βL)·∂log π(a)/∂z] = −β π L, which is β ∂H/∂z.
    logp, entropy = random_rows()
    p, adv = logp.exp(), torch.zeros_like(logp)
    added = repo(adv, logp, entropy, 0.3)
    expected_grad = p * added - p * (p * added).sum(-1, keepdim=True)
    z = logp.clone().requires_grad_()
    lp = z.log_softmax(-1)
    (0.3 * -(lp.exp() * lp).sum()).backward()
    torch.testing.assert_close(expected_grad, z.grad, rtol=0, atol=1e-12)


def test_raw_and_centred_have_the_same_expected_gradient_for_constant_size():
    logp, entropy = random_rows()
    sign = torch.where(torch.rand(logp.shape, generator=torch.Generator().manual_seed(5)) < 0.5, 1.0, -1.0).double()

    def expected_grad(adv):
        return logp.exp() * (adv - (logp.exp() * adv).sum(-1, keepdim=True))

    raw, centred = repo_r(sign, logp, 0.05, clamp=False), repo_r(sign, logp, 0.05, entropy, clamp=False)
    torch.testing.assert_close(expected_grad(raw), expected_grad(centred), rtol=0, atol=1e-12)


def test_signs_raise_and_lower_entropy():
    # Natural-gradient change of the added term, −E[(A' − A)·L], for any advantages.
    logp, entropy = random_rows()
    adv = torch.randn(logp.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def change(shaped):
        return -(logp.exp() * (shaped - adv) * (logp + entropy)).sum(-1)

    assert (change(repo(adv, logp, entropy, 0.1)) > 0).all()
    assert (change(repo_r(adv, logp, 0.05, entropy, clamp=False)) > 0).all()
    assert (change(repo_r(adv, logp, 0.05, entropy, clamp=False, sign="lowers")) < 0).all()


def test_errors():
    with pytest.raises(ValueError, match="sign must be 'raises' or 'lowers', got 'up'"):
        repo_r(ADV, LOGP, 0.1, sign="up")
    with pytest.raises(ValueError, match="per must be 'token' or 'batch', got 'row'"):
        repo_d(ADV, LOGP, ENTROPY, LOGP, 0.1, ONES, per="row")


def test_nothing_waits_for_the_device():
    # Tensors without data: reading a value, which would synchronise, raises.
    adv, logp, entropy, ones = (x.to("meta") for x in (ADV, LOGP, ENTROPY, ONES))
    for knob in (0.1, torch.tensor(0.1, device="meta")):
        assert repo(adv, logp, entropy, knob).is_meta
        assert repo_failing(adv, logp, entropy, adv.abs() / 4, knob).is_meta
        assert repo_r(adv, logp, knob, entropy).is_meta
        assert entropy_balance(adv, logp, entropy, ones).is_meta
        assert tempered(adv, logp, logp[..., None], adv, ones, knob, temper_high=1.2, temper_low=0.8).is_meta
        for per in ("token", "batch"):
            assert repo_d(adv, logp, entropy, logp, knob, ones, per=per).is_meta


def test_every_signature_starts_alike():
    own = (repo, repo_failing, repo_r, repo_d, sign_weight, one_sided, one_sided_reward, steer, surprisal_boost)
    own += (entropy_balance, tempered)
    for function in own:
        assert list(inspect.signature(function).parameters)[:2] == ["adv", "logp"]


def test_repo_failing_by_hand():
    # A − β·(1 − ρ)·L with L = 0.5, −2: a group that never succeeds, and one that does three times in four.
    rate = torch.tensor([0.0, 0.75])
    close(repo_failing(ADV, LOGP, ENTROPY, rate, 0.5), [[1.75, 3.0], [-2.0625, -1.75]])
    close(repo_failing(ADV, LOGP, ENTROPY, rate, torch.tensor(-1.0)), [[2.5, 0.0], [-1.875, -2.5]])
    by_token = torch.tensor([[0.5, -1.0], [0.0, 2.0]])
    close(repo_failing(ADV, LOGP, ENTROPY, rate, by_token), [[1.75, 0.0], [-2.0, -1.0]])


def test_repo_failing_is_repo_where_all_fail_and_nothing_where_all_succeed():
    adv, logp, entropy = random_tokens(7)
    close(repo_failing(adv, logp, entropy, torch.zeros(4), 0.3), repo(adv, logp, entropy, 0.3))
    assert torch.equal(repo_failing(adv, logp, entropy, torch.ones(4), 0.3), adv)
    assert torch.equal(repo_failing(adv, logp, entropy, torch.rand(4), 0.0), adv)


def test_the_success_rate_of_the_group_reaches_training_in_trl(tmp_path, monkeypatch):
    """The rates that the shaping gets are those of the rewards, group by group; the advantages it returns train."""
    pytest.importorskip("trl")
    from trl_case import train, weights

    from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer

    seen, rewards = [], []

    def reward(completions, **columns):
        rewards.append([float(ord(text[0]) % 2) if text else 0.0 for text in completions])
        return rewards[-1]

    def spy(adv, logp, entropy, group_rate, beta):
        seen.append((group_rate.clone(), beta))
        return repo_failing(adv, logp, entropy, group_rate, beta)

    def run(name, **options):
        settings = {"recipe": "loop", "recipe_options": {"shaping": name, **options}, "shuffle_dataset": False}
        return train(IsentropicTrainer, IsentropicConfig, tmp_path / str(len(rewards)), 4, reward=reward, **settings)

    plain = weights(run("repo_failing", beta=0.0))
    monkeypatch.setitem(SHAPINGS, "repo_failing", replace(SHAPINGS["repo_failing"], at=spy))
    rewards.clear()
    pushed = weights(run("repo_failing", beta=0.5))
    rates = torch.tensor(rewards[0]).view(-1, 8).mean(1)
    assert len(rates.unique()) > 2
    assert (
        torch.cat([rate for rate, _ in seen[:4]]).sort().values.tolist()
        == rates.repeat_interleave(8).sort().values.tolist()
    )
    assert {float(beta) for _, beta in seen} == {0.5}
    assert any(not torch.equal(plain[name], pushed[name]) for name in plain)
    everywhere = weights(run("repo", beta=0.5))
    assert any(not torch.equal(everywhere[name], pushed[name]) for name in plain)
