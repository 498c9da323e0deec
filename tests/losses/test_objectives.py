"""Objectives by hand, against one another, and under masks that hide anything."""

import inspect
import math

import pytest
import torch
from defaults import default, table
from hypothesis import given, settings
from hypothesis import strategies as st

from isentropic.losses.clipping import additive, reciprocal
from isentropic.losses.objectives import (
    cispo,
    clipped,
    importance,
    reinforce,
    sequence_clipped,
    unbounded_positive,
)
from isentropic.losses.reduce import SumCount, constant, merge, sequence, token
from isentropic.types import TokenBatch

gradient_preserving, sapo = (default("objective", name) for name in ("gradient_preserving", "sapo"))
linear, dcpo = (default("bounds", name) for name in ("linear", "dcpo"))


def reduced(name, loss, mask, length):
    return (
        constant(loss, mask, length) if name == "constant" else {"token": token, "sequence": sequence}[name](loss, mask)
    )


# Every objective with parameters that bite, as (batch) -> (loss, facts).
CASES = {
    "reinforce": reinforce,
    "importance": importance,
    "clipped": lambda batch: clipped(batch, 0.2, 0.28),
    "clipped_reciprocal": lambda batch: clipped(batch, 0.1, 0.1, bounds=reciprocal),
    "sequence_clipped": lambda batch: sequence_clipped(batch, 0.05, 0.1),
    "sequence_clipped_token": lambda batch: sequence_clipped(batch, 0.05, 0.1, gradient="token"),
    "cispo": lambda batch: cispo(batch, clip_high=0.5),
    "cispo_both": lambda batch: cispo(batch, 0.2, 0.5),
    "clipped_linear": lambda batch: clipped(batch, 0.2, 0.28, default("bounds", "linear")),
    "clipped_dcpo": lambda batch: clipped(batch, 0.16, 0.2, default("bounds", "dcpo")),
    "gradient_preserving": lambda batch: gradient_preserving(batch, 0.2, 0.28),
    "sapo": sapo,
    "unbounded_positive": lambda batch: unbounded_positive(batch, 0.2),
}


def by_hand(ratios, advs):
    """One sequence with the given ratios over logp_old = log 0.1, and its advantages."""
    ratio = torch.tensor([ratios], dtype=torch.float64)
    logp_old = torch.full_like(ratio, 0.1).log()
    logp = (logp_old + ratio.log()).requires_grad_()
    return TokenBatch(logp, logp_old, torch.tensor([advs], dtype=torch.float64), torch.ones_like(ratio))


def random_batch(b=5, t=7, seed=0, spread=0.4):
    generator = torch.Generator().manual_seed(seed)
    logp_old = -torch.rand(b, t, generator=generator, dtype=torch.float64) * 3 - 0.1
    logp = (logp_old + spread * torch.randn(b, t, generator=generator, dtype=torch.float64)).requires_grad_()
    adv = torch.randn(b, generator=generator, dtype=torch.float64)
    return TokenBatch(logp, logp_old, adv, torch.rand(b, t, generator=generator) < 0.7)


def weights(batch, objective):
    """Effective weight of each token under a plain sum, −∂loss/∂logp."""
    return -torch.autograd.grad(objective(batch)[0].sum(), batch.logp)[0]


def close(got, expected):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=1e-12)


def test_gradient_preserving_by_hand():
    # Bounds 0.8 and 1.28, β1 = ½, β2 = 1. Kept: 1·1.28·2 and ½·0.8·(−2), whatever the ratio; else r·A.
    batch = by_hand([1.5, 0.5, 1.5, 0.5, 3.0, 1.1], [2.0, 2.0, -2.0, -2.0, 2.0, 2.0])

    def objective(batch, **more):
        return gradient_preserving(batch, 0.2, 0.28, **more)

    close(objective(batch)[0], [[-2.56, -1.0, 3.0, 0.8, -2.56, -2.2]])
    close(weights(batch, objective), [[2.56, 1.0, -3.0, -0.8, 2.56, 2.2]])
    # Without what is kept it is the clip; facts are those of the clip.
    none = lambda batch: objective(batch, grad_low=0.0, grad_high=0.0)  # noqa: E731
    plain = lambda batch: clipped(batch, 0.2, 0.28)  # noqa: E731
    close(weights(batch, none), weights(batch, plain))
    assert all(torch.equal(x, y) for x, y in zip(objective(batch)[1], plain(batch)[1], strict=True))


def test_sapo_by_hand():
    # 4σ(τ(r−1))/τ·A; its slope by log r is 4σ(1−σ)·r·A: r·A at r = 1, whatever τ.
    batch = by_hand([1.0, 1.0, 2.0, 2.0], [3.0, -3.0, 1.0, -1.0])
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    up, down = sigma(1.0), sigma(1.05)
    close(sapo(batch)[0], [[-6.0, 6 / 1.05, -4 * up, 4 * down / 1.05]])
    close(weights(batch, sapo), [[3.0, -3.0, 8 * up * (1 - up), -8 * down * (1 - down)]])


def test_unbounded_positive_by_hand():
    # A>0: −A with the weight A, whatever the ratio. A<0: r·A down to 0.8, from there 0; nothing is clipped above.
    batch = by_hand([1.5, 0.5, 9.0, 1.5, 0.5, 0.9, 9.0, 1.5], [2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0, 0.0])
    objective = CASES["unbounded_positive"]
    loss, facts = objective(batch)
    close(loss, [[-2.0, -2.0, -2.0, 3.0, 1.6, 1.8, 18.0, 0.0]])
    close(weights(batch, objective), [[2.0, 2.0, 2.0, -3.0, 0.0, -1.8, -18.0, 0.0]])
    assert facts.clipped_low.tolist() == [[False] * 4 + [True] + [False] * 3]
    assert not facts.clipped_high.any()
    # On-policy it is the plain policy gradient.
    fresh = random_batch(spread=0.0)
    close(weights(fresh, objective), weights(fresh, reinforce))


def test_clipped_by_hand():
    # Bounds 0.8 and 1.28. A>0: r up to 1.28. A<0: r down to 0.8. The other sides are never clipped.
    batch = by_hand([1.5, 0.5, 1.5, 0.5, 1.1, 1.5], [2.0, 2.0, -2.0, -2.0, 2.0, 0.0])
    loss, facts = clipped(batch, clip_low=0.2, clip_high=0.28)
    close(loss, [[-2.56, -1.0, 3.0, 1.6, -2.2, 0.0]])
    close(facts.ratio, [[1.5, 0.5, 1.5, 0.5, 1.1, 1.5]])
    assert facts.clipped_low.tolist() == [[False, False, False, True, False, False]]
    assert facts.clipped_high.tolist() == [[True, False, False, False, False, False]]
    close(weights(batch, CASES["clipped"]), [[0.0, 1.0, -3.0, 0.0, 2.2, 0.0]])  # r·A, and 0 where clipped


def test_reciprocal_by_hand():
    # Bounds 1/1.25 = 0.8 and 1.5
    batch = by_hand([0.79, 0.81, 1.49, 1.51], [-1.0, -1.0, 1.0, 1.0])
    loss, facts = clipped(batch, clip_low=0.25, clip_high=0.5, bounds=reciprocal)
    close(loss, [[0.8, 0.81, -1.49, -1.5]])
    assert facts.clipped_low.tolist() == [[True, False, False, False]]
    assert facts.clipped_high.tolist() == [[False, False, False, True]]


def test_bounds_by_token():
    batch = by_hand([2.0, 2.0, 0.5, 0.5], [1.0, 1.0, -1.0, -1.0])
    low = torch.tensor([[0.0, 0.0, 0.3, 0.7]], dtype=torch.float64)
    high = torch.tensor([[0.5, 1.5, 0.0, 0.0]], dtype=torch.float64)
    loss, facts = clipped(batch, low, high)
    close(loss, [[-1.5, -2.0, 0.7, 0.5]])
    assert facts.clipped_high.tolist() == [[True, False, False, False]]
    assert facts.clipped_low.tolist() == [[False, False, True, False]]
    same = clipped(batch, torch.full_like(batch.adv, 0.2), 0.28)  # a tensor and a number may meet
    close(same[0], clipped(batch, 0.2, 0.28)[0])


def test_reinforce_and_importance_by_hand():
    batch = by_hand([2.0, 0.5], [3.0, -1.0])  # probabilities 0.2 and 0.05
    loss, facts = reinforce(batch)
    close(loss, [[-3.0 * math.log(0.2), math.log(0.05)]])
    close(facts.ratio, [[2.0, 0.5]])
    close(weights(batch, reinforce), [[3.0, -1.0]])
    close(importance(batch)[0], [[-6.0, 0.5]])
    close(weights(batch, importance), [[6.0, -0.5]])
    assert not any((facts.clipped_low | facts.clipped_high).flatten().tolist())


def test_cispo_by_hand():
    batch = by_hand([4.0, 2.0, 0.5, 4.0], [1.0, 1.0, -1.0, -1.0])
    logp = batch.logp.detach()
    loss, facts = cispo(batch, clip_high=2.0)
    close(loss, -torch.tensor([[3.0, 2.0, -0.5, -3.0]]) * logp)
    close(weights(batch, lambda b: cispo(b, clip_high=2.0)), [[3.0, 2.0, -0.5, -3.0]])  # bounded, never removed
    assert facts.clipped_high.tolist() == [[True, False, False, False]]
    assert not facts.clipped_low.any()
    loss, facts = cispo(batch, clip_low=0.25, clip_high=2.0)
    close(loss, -torch.tensor([[3.0, 2.0, -0.75, -3.0]]) * logp)
    assert facts.clipped_low.tolist() == [[False, False, True, False]]
    close(cispo(batch, clip_low=0.25, clip_high=2.0, bounds=reciprocal)[0][0, 2], 0.8 * logp[0, 2])


def test_cispo_ceiling_is_a_width_plus_one():
    batch = random_batch(spread=1.0)
    for ceiling, width in ((5.0, 4.0), (1.0, 0.0), (1.5, 0.5)):
        wide, high = cispo(batch, clip_high=width), cispo(batch, ceiling=ceiling)
        assert torch.equal(wide[0], high[0])
        assert torch.equal(wide[1].clipped_high, high[1].clipped_high)
    low = cispo(by_hand([2.0], [1.0]), ceiling=0.28)[0]  # a ceiling below 1 is possible, a width is not
    close(low, [[-0.28 * math.log(0.2)]])


def test_sequence_ratio_by_hand():
    # √(2·8) = 4 with A = 1 and bounds 0.8, 1.2; √(0.5·0.5) = 0.5 with A = 1; the third token is masked.
    ratio = torch.tensor([[2.0, 8.0, 999.0], [0.5, 0.5, 999.0]], dtype=torch.float64)
    logp_old = torch.full_like(ratio, -9.0)
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    batch = TokenBatch((logp_old + ratio.log()).requires_grad_(), logp_old, torch.ones(2).double(), mask)
    for gradient in ("sequence", "token"):
        loss, facts = sequence_clipped(batch, 0.2, 0.2, gradient=gradient)
        close(loss, [[-1.2, -1.2, 0.0], [-0.5, -0.5, 0.0]])
        close(facts.ratio, [[4.0, 4.0, 1.0], [0.5, 0.5, 1.0]])
        assert facts.clipped_high.tolist() == [[True, True, False], [False, False, False]]
        assert not facts.clipped_low.any()
        got = weights(batch, lambda b, g=gradient: sequence_clipped(b, 0.2, 0.2, gradient=g))
        close(got, [[0.0, 0.0, 0.0], [0.5, 0.5, 0.0]])


def test_sequence_gradient_averages_the_advantages_that_token_gradient_keeps():
    batch = by_hand([1.0, 1.0], [3.0, 1.0])
    close(weights(batch, lambda b: sequence_clipped(b, 0.2, 0.2)), [[2.0, 2.0]])
    close(weights(batch, lambda b: sequence_clipped(b, 0.2, 0.2, gradient="token")), [[3.0, 1.0]])


@pytest.mark.parametrize("name", ["token", "sequence", "constant"])
def test_sequence_and_token_gradients_agree_on_equal_advantages(name):
    batch = random_batch(b=30, seed=3)
    both = []
    for gradient in ("sequence", "token"):
        loss, facts = sequence_clipped(batch, 0.05, 0.1, gradient=gradient)
        pair = (
            constant(loss, batch.mask, 9)
            if name == "constant"
            else {"token": token, "sequence": sequence}[name](loss, batch.mask)
        )
        both.append((pair.mean(), torch.autograd.grad(pair.mean(), batch.logp)[0], *facts))
    assert both[0][4].any()  # something is clipped
    assert both[0][3].any()
    for one, other in zip(*both, strict=True):
        close(one.detach().double(), other.detach().double())


def test_one_token_sequences_make_the_sequence_ratio_the_token_ratio():
    batch = random_batch(b=20, t=1, seed=4)._replace(mask=torch.ones(20, 1))
    close(sequence_clipped(batch, 0.1, 0.2)[0], clipped(batch, 0.1, 0.2)[0])


def test_grpo_is_dapo_with_equal_bounds_up_to_the_normaliser():
    batch = random_batch(seed=5)
    ratio, adv = (batch.logp - batch.logp_old).exp(), batch.adv[:, None]
    grpo = -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
    loss, _ = clipped(batch, clip_low=0.2, clip_high=0.2)
    mask = batch.mask.double()
    close(loss, grpo * mask)
    close(sequence(loss, mask).mean(), ((grpo * mask).sum(1) / mask.sum(1).clamp(min=1)).mean())
    close(token(loss, mask).mean(), (grpo * mask).sum() / mask.sum())


def test_limits():
    batch = random_batch(seed=6)
    close(clipped(batch, 1e9, 1e9)[0], importance(batch)[0])
    close(cispo(batch, clip_high=1e9)[0], (batch.logp - batch.logp_old).exp().detach() * reinforce(batch)[0])
    shut = clipped(batch, 0.0, 0.0)[1]
    moved = batch.mask & (batch.adv[:, None] * (batch.logp - batch.logp_old) > 0)
    assert torch.equal(shut.clipped_low | shut.clipped_high, moved)


@pytest.mark.parametrize("name", CASES)
def test_on_policy_all_have_the_gradient_of_reinforce(name):
    batch = random_batch(seed=7)._replace(logp_old=None)
    loss, facts = CASES[name](batch)
    assert torch.equal(facts.ratio, torch.ones_like(batch.logp))
    assert not (facts.clipped_low | facts.clipped_high).any()
    explicit = batch._replace(logp_old=batch.logp.detach())
    close(loss, CASES[name](explicit)[0].detach())
    close(weights(batch, CASES[name]), weights(batch, reinforce))


@pytest.mark.parametrize("name", CASES)
def test_advantages_broadcast(name):
    batch = random_batch(seed=8)
    expected = CASES[name](batch)[0]
    for adv in (batch.adv[:, None], batch.adv[:, None].expand(5, 7).clone()):
        assert torch.equal(CASES[name](batch._replace(adv=adv))[0], expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_entries_reach_neither_value_nor_gradient(name, bad):
    clean = random_batch(seed=9)
    clean = clean._replace(adv=clean.adv[:, None].expand(5, 7))
    inside = clean.mask
    dirty = TokenBatch(
        torch.where(inside, clean.logp, bad).detach().requires_grad_(),
        torch.where(inside, clean.logp_old, bad),
        torch.where(inside, clean.adv, bad),
        inside,
    )
    (loss, facts), (expected, expected_facts) = CASES[name](dirty), CASES[name](clean)
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(facts, expected_facts, strict=True))
    assert loss[~inside].eq(0).all()
    assert torch.equal(weights(dirty, CASES[name]), weights(clean, CASES[name]))


def test_masked_bounds_may_hold_anything():
    batch = random_batch(seed=10)
    bound = torch.full_like(batch.logp_old, 0.2).masked_fill(~batch.mask, math.nan)
    for objective in (clipped, sequence_clipped, cispo):
        assert torch.equal(objective(batch, bound, bound)[0], objective(batch, 0.2, 0.2)[0])
        assert weights(batch, lambda b, f=objective: f(b, bound, bound)).isfinite().all()


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), b=st.integers(1, 5), t=st.integers(1, 6), extra=st.integers(0, 3))
def test_padding_and_order_do_not_matter(name, seed, b, t, extra):
    batch = random_batch(b, t, seed)
    loss, facts = CASES[name](batch)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(b, generator=generator), torch.randperm(t, generator=generator)

    def moved(x):
        return x[rows][:, columns]

    def padded(x, value):
        return torch.cat([x, torch.full((b, extra), value, dtype=x.dtype)], 1)

    other = TokenBatch(moved(batch.logp), moved(batch.logp_old), batch.adv[rows], moved(batch.mask))
    close(CASES[name](other)[0], moved(loss))
    longer = TokenBatch(
        padded(batch.logp, -1.0), padded(batch.logp_old, -5.0), batch.adv, padded(batch.mask, value=False)
    )
    longer_loss, longer_facts = CASES[name](longer)
    close(longer_loss[:, :t], loss)
    close(longer_facts.ratio[:, :t], facts.ratio)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_micro_batches_have_the_gradient_of_the_whole(name, reduction):
    whole, parts = random_batch(b=9, seed=11), random_batch(b=9, seed=11)

    def pair(batch):
        loss, _ = CASES[name](batch)
        return (
            constant(loss, batch.mask, 7)
            if reduction == "constant"
            else {"token": token, "sequence": sequence}[reduction](loss, batch.mask)
        )

    expected = pair(whole).mean()
    expected.backward()
    slices = [slice(0, 2), slice(2, 3), slice(3, 9)]
    pairs = [pair(TokenBatch(*(x[s] for x in parts[:4]))) for s in slices]
    total = merge(*pairs)
    close(total.mean(), expected.detach())
    for part in pairs:
        SumCount(part.sum, total.count).mean().backward()
    close(parts.logp.grad, whole.logp.grad)


def test_the_rest_is_constant():
    batch = random_batch(seed=12)
    adv, old = batch.adv.clone().requires_grad_(), batch.logp_old.clone().requires_grad_()
    for objective in CASES.values():
        objective(batch._replace(adv=adv, logp_old=old))[0].sum().backward()
    assert adv.grad is None
    assert old.grad is None


def test_half_precision_is_computed_in_fp32():
    logp = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    loss, facts = clipped(TokenBatch(logp, logp - 0.125, torch.ones(1), torch.ones(1, 1)), 0.2, 0.28)
    assert loss.dtype == facts.ratio.dtype == torch.float32
    assert facts.ratio.item() == pytest.approx(math.exp(0.125), rel=1e-6)


def test_every_objective_has_one_signature():
    for function in table("objective").values():
        assert next(iter(inspect.signature(function).parameters)) == "batch"
    batch = random_batch()
    for function in (clipped, sequence_clipped, cispo):
        assert function(batch, clip_low=0.2, clip_high=0.2, bounds=additive)[0].shape == batch.logp.shape


def test_errors():
    batch = random_batch()
    for function in (clipped, sequence_clipped, cispo):
        with pytest.raises(ValueError, match=r"clip_low must be >= 0, got -0\.1"):
            function(batch, clip_low=-0.1, clip_high=0.2)
        with pytest.raises(ValueError, match=r"clip_high must be >= 0, got nan"):
            function(batch, clip_low=0.1, clip_high=math.nan)
    with pytest.raises(ValueError, match=r"either clip_high or ceiling, got both"):
        cispo(batch, clip_high=0.1, ceiling=5.0)
    with pytest.raises(ValueError, match=r"either clip_high or ceiling, got neither"):
        cispo(batch)
    with pytest.raises(ValueError, match=r"ceiling must be > 0, got 0"):
        cispo(batch, ceiling=0)
    with pytest.raises(ValueError, match=r"gradient must be 'sequence' or 'token', got 'row'"):
        sequence_clipped(batch, 0.1, 0.1, gradient="row")


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_device(name):
    # Tensors without data: reading a value, which would synchronise, raises.
    batch = TokenBatch(*(x.detach().to("meta") for x in random_batch()[:4]))
    loss, facts = CASES[name](batch._replace(logp=batch.logp.requires_grad_()))
    loss.sum().backward()
    assert all(x.is_meta for x in (loss, *facts, batch.logp.grad))


def test_bounds_carry_no_gradient():
    """A clipped token teaches nothing, also if its bound depends on its own probability."""
    logp = torch.tensor([[-0.1, -0.5]], requires_grad=True)
    batch = TokenBatch(logp, torch.tensor([[-3.0, -3.0]]), torch.tensor([1.0]), torch.ones(1, 2))
    for rule in (linear, dcpo):
        loss, found = clipped(batch, 0.1, 0.1, bounds=rule)
        assert found.clipped_high.all()
        assert not found.ratio.requires_grad
        assert torch.autograd.grad(loss.sum(), logp)[0].tolist() == [[0.0, 0.0]]
