"""fused_policy_loss: the same loss and gradients as from the statistics, whatever the chunks."""

import pytest
import torch
from head_case import case, plain, relative

from isentropic import TokenBatch, compose, recipes
from isentropic.entropy.kernels import fused_logp, fused_policy_loss, loss
from isentropic.losses import reduce

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-4}
B, T = 6, 15


class Facts:
    """What a policy loss needs beside the statistics; one sequence and some tokens are masked."""

    gen = torch.Generator().manual_seed(3)
    mask = torch.rand(B, T, generator=gen) > 0.3
    mask[2] = False
    adv = torch.randn(B, 1, generator=gen)
    noise = 0.2 * torch.randn(B, T, generator=gen)


@pytest.fixture
def small_chunks(monkeypatch):
    """Some 20 rows a chunk."""
    monkeypatch.setattr(loss, "BUFFER", 20 * 2500 * 4)


def shaped(c):
    return c.hidden.reshape(B, T, -1), c.weight, c.ids.reshape(B, T)


def policy_gradient(entropy_coef=0.0, reduction=reduce.token, calls=None):
    def loss_fn(stats, where):
        if calls is not None:
            calls.append(stats.logp.shape)
        per_token = -stats.logp * Facts.adv.expand(B, T)[where]
        if entropy_coef:
            per_token = per_token - entropy_coef * stats.entropy
        return reduction(per_token, Facts.mask[where])

    return loss_fn


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("head", [{}, {"softcap": 12.0, "bias": True}], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradients_equal_float64_autograd(dtype, head, frozen, level, entropy_coef, small_chunks):
    c = case(dtype=dtype, frozen=frozen, **head)
    calls = []
    loss_fn = policy_gradient(entropy_coef, calls=calls)
    temperature = c.temperature.reshape(B, T)
    out = fused_policy_loss(*shaped(c), loss_fn, temperature, level=level, mask=Facts.mask, **c.options())
    assert len(calls) > 1
    expected = LogpAndEntropy(plain(c))
    expected_loss = loss_fn(expected, slice(None))
    assert float(out.loss.count) == Facts.mask.sum()
    assert abs(float((out.loss.mean() - expected_loss.mean()).detach())) < 1e-4
    assert torch.equal(out.stats.logp == 0, ~Facts.mask)
    got = torch.autograd.grad(out.loss.mean(), c.leaves())
    for a, b in zip(got, torch.autograd.grad(expected_loss.mean(), c.leaves()), strict=True):
        assert relative(a, b) < TOLERANCE[dtype]


class LogpAndEntropy:
    def __init__(self, flat):
        self.logp, self.entropy = (x.reshape(B, T) for x in flat[:2])


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "rloo", "repo-r-loop", "entropy-bonus"])
def test_recipes_plug_in(name, small_chunks):
    c, recipe = case(), compose(name)
    recipe = compose(recipe, zeta=0.01) if recipe.knob == "zeta" else recipe
    hidden, weight, ids = shaped(c)
    old = (fused_logp(hidden, weight, ids).logp + Facts.noise).detach()

    def loss_fn(stats, where):
        batch = TokenBatch(stats.logp, old[where], Facts.adv[where], Facts.mask[where], stats.entropy)
        return recipes.loss(recipe, batch)[0]

    out = fused_policy_loss(hidden, weight, ids, loss_fn, mask=Facts.mask)
    stats = fused_logp(hidden, weight, ids, mask=Facts.mask)
    expected = loss_fn(stats, slice(None))
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(out.loss.mean(), c.leaves())
    for a, b in zip(got, torch.autograd.grad(expected.mean(), c.leaves()), strict=True):
        assert relative(a, b) < 3e-5


def test_the_callback_sees_the_moments_and_whole_sequences(small_chunks):
    c = case()
    hidden, weight, ids = shaped(c)
    expected, chunks = fused_logp(hidden, weight, ids, mask=Facts.mask), []

    def loss_fn(stats, where):
        chunks.append(where)
        for a, b in zip(stats, expected, strict=True):
            torch.testing.assert_close(a, b[where], rtol=1e-5, atol=1e-5)
        assert not stats.sum_p2.requires_grad
        return reduce.sequence(stats.logp, Facts.mask[where])

    fused_policy_loss(hidden, weight, ids, loss_fn, mask=Facts.mask)
    assert [row for where in chunks for row in range(where.start, where.stop)] == list(range(B))


def test_micro_batches_add_up_to_the_whole():
    c = case(dtype=torch.float64)
    hidden, weight, ids = shaped(c)
    whole = fused_policy_loss(hidden, weight, ids, policy_gradient(), mask=Facts.mask).loss

    def half(rows):
        def loss_fn(stats, where):
            shifted = slice(rows.start + where.start, rows.start + where.stop)
            return policy_gradient()(stats, shifted)

        return fused_policy_loss(hidden[rows], weight, ids[rows], loss_fn, mask=Facts.mask[rows]).loss

    both = reduce.merge(half(slice(0, 4)), half(slice(4, B)))
    for a, b in zip(*(torch.autograd.grad(x.mean(), c.leaves()) for x in (whole, both)), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_to_learn_from():
    c = case()
    hidden, weight, ids = shaped(c)
    empty = torch.zeros(B, T)
    for level in ("token", "sequence"):
        out = fused_policy_loss(
            hidden, weight, ids, lambda stats, where: reduce.token(stats.logp, empty[where]), level=level, mask=empty
        )
        for x in torch.autograd.grad(out.loss.mean(), c.leaves()):
            assert (x == 0).all()
    constant = fused_policy_loss(hidden, weight, ids, lambda stats, where: reduce.token(empty[where], ids[where] >= 0))
    for x in torch.autograd.grad(constant.loss.mean(), c.leaves()):
        assert (x == 0).all()


def test_without_gradients_the_loss_is_still_right():
    c = case()
    hidden, weight, ids = shaped(c)
    expected = fused_policy_loss(hidden, weight, ids, policy_gradient()).loss
    with torch.no_grad():
        got = fused_policy_loss(hidden, weight, ids, policy_gradient()).loss
    torch.testing.assert_close(got.mean(), expected.mean().detach())


def test_one_backward_only():
    c = case()
    out = fused_policy_loss(*shaped(c), policy_gradient())
    out.loss.sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        out.loss.sum.backward()


@pytest.mark.parametrize(("changes", "message"), [({"level": "batch"}, "'sequence' or 'token'"), ({}, "loose tokens")])
def test_refusals(changes, message):
    hidden = torch.zeros(2, 3, 4) if changes else torch.zeros(3, 4)
    with pytest.raises(ValueError, match=message):
        fused_policy_loss(hidden, torch.zeros(5, 4), torch.zeros(2, 3).long(), policy_gradient(), **changes)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_marks_of_padding_are_refused_unless_they_are_masked(frozen):
    c = case(frozen=frozen)
    hidden, weight, ids = shaped(c)
    padded = ids.masked_fill(~Facts.mask, -100)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 2500\), .*got -100 .*pass mask"):
        fused_policy_loss(hidden, weight, padded, policy_gradient())
    got = fused_policy_loss(hidden, weight, padded, policy_gradient(), mask=Facts.mask)
    expected = fused_policy_loss(hidden, weight, ids, policy_gradient(), mask=Facts.mask)
    for a, b in zip(*(torch.autograd.grad(x.loss.mean(), c.leaves()) for x in (got, expected)), strict=True):
        assert torch.equal(a, b)
