"""fused_logp: gradients against float64 autograd, Euler's identity, and the shortcuts of its backward."""

import pytest
import torch
from head_case import case, plain, relative

from isentropic.entropy.kernels import cpu, fused_logp, token_stats

HEADS = [{}, {"bias": True}, {"softcap": 12.0, "bias": True, "scale": 0.5}]
# The gradient comes back in the dtype of the inputs: its rounding is all that may be left of it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}


def gradients(c, stats, g, g_entropy):
    loss = 0.0
    if g is not None:
        loss = loss + (stats[0] * g).sum()
    if g_entropy is not None:
        loss = loss + (stats[1] * g_entropy).sum()
    return torch.autograd.grad(loss, c.leaves())


def incoming_gradients(which, n=90, seed=1):
    gen = torch.Generator().manual_seed(seed)
    g, g_entropy = torch.randn(n, generator=gen), torch.randn(n, generator=gen)
    return (g if "logp" in which else None), (g_entropy if "entropy" in which else None)


@pytest.mark.parametrize("which", ["logp", "entropy", "logp entropy"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "bias", "capped"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_equal_float64_autograd(dtype, head, frozen, which):
    c = case(dtype=dtype, frozen=frozen, **head)
    g = incoming_gradients(which)
    got = gradients(c, fused_logp(c.hidden, c.weight, c.ids, c.temperature, **c.options()), *g)
    expected = gradients(c, plain(c), *g)
    assert len(got) == (1 if frozen else 2 + ("bias" in head))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) < TOLERANCE[dtype]


def test_the_values_are_those_without_a_gradient():
    c, frozen = case(), case(frozen=True)
    for a, b, d in zip(
        token_stats(c.hidden, c.weight, c.ids),
        fused_logp(c.hidden, c.weight, c.ids),
        fused_logp(frozen.hidden, frozen.weight, frozen.ids),
        strict=True,
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, d)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap):
    gen = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=gen).requires_grad_() for shape in ((4, 3), (6, 3), (6,))
    )
    ids, temperature = torch.tensor([0, 5, 2, 2]), torch.tensor([0.7, 1.0, 1.5, 2.0], dtype=torch.float64)

    def values(hidden, weight, bias):
        return fused_logp(hidden, weight, ids, temperature, bias=bias, softcap=softcap, scale=1.3)[:2]

    assert torch.autograd.gradcheck(values, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h: values(h, weight.detach(), bias.detach()), hidden)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_eulers_identity(temperature):
    """Logits are linear in h: H = ⟨h, ∂logp/∂h⟩ − logp, and ⟨h, ∂H/∂h⟩ = −Var[log π]."""
    c = case(dtype=torch.float64)
    stats = fused_logp(c.hidden, c.weight, c.ids, temperature)
    slope = torch.autograd.grad(stats.logp.sum(), c.hidden, retain_graph=True)[0]
    torch.testing.assert_close((c.hidden * slope).sum(-1) - stats.logp, stats.entropy, rtol=1e-9, atol=1e-9)
    slope = torch.autograd.grad(stats.entropy.sum(), c.hidden)[0]
    logp = (c.hidden @ c.weight.T / temperature).log_softmax(-1)
    variance = (logp.exp() * (logp + stats.entropy[:, None]).square()).sum(-1)
    torch.testing.assert_close(-(c.hidden * slope).sum(-1), variance, rtol=1e-9, atol=1e-9)


def test_confident_tokens_keep_their_gradient_in_bf16():
    """Where π(a) > 0.98, π(a) − 1 cancels; half-precision logits lose 4 % of the gradient there."""
    c = case(dtype=torch.bfloat16, n=800)
    c = c._replace(temperature=torch.ones(800))
    expected = plain(c)
    sure = (expected[0] > -0.02) & (expected[0] < -1e-6)
    got = torch.autograd.grad(fused_logp(c.hidden, c.weight, c.ids).logp.sum(), c.hidden)[0].double()
    true = torch.autograd.grad(expected[0].sum(), c.hidden)[0].double()
    error = ((got - true).norm(dim=-1) / true.norm(dim=-1))[sure]
    assert sure.sum() > 5
    assert error.median() < 5e-3


def test_rows_without_a_gradient_are_left_out(monkeypatch):
    c = case()
    g, g_entropy = incoming_gradients("logp entropy")
    has_gradient = torch.arange(90) % 4 == 0
    g, g_entropy = g * has_gradient, g_entropy * (torch.arange(90) == 4)
    num_rows, original = [], cpu.gradients

    def spy(head, rows, pull, needs):
        num_rows.append(len(rows.ids))
        return original(head, rows, pull, needs)

    monkeypatch.setattr(cpu, "gradients", spy)
    got = gradients(c, fused_logp(c.hidden, c.weight, c.ids, c.temperature), g, g_entropy)
    assert num_rows == [int(has_gradient.sum())]
    for a, b in zip(got, gradients(c, plain(c), g, g_entropy), strict=True):
        assert relative(a, b) < 2e-5
    assert (got[0][~has_gradient] == 0).all()


def test_masked_rows_and_an_empty_mask_have_zero_gradients():
    c = case(bias=True)
    mask = torch.arange(90) % 3 == 0
    spoilt = torch.where(mask[:, None], c.hidden.detach(), torch.nan).requires_grad_()
    stats = fused_logp(spoilt, c.weight, c.ids, c.temperature, mask=mask, bias=c.bias)
    got = torch.autograd.grad((stats.logp + stats.entropy).sum(), (spoilt, c.weight, c.bias))
    expected = plain(c)
    expected_grads = torch.autograd.grad((expected[0] + expected[1])[mask].sum(), c.leaves())
    for a, b in zip(got, expected_grads, strict=True):
        assert relative(a, b) < 2e-5
    nothing = fused_logp(c.hidden, c.weight, c.ids, mask=torch.zeros(90))
    for x in torch.autograd.grad(nothing.logp.sum(), (c.hidden, c.weight)):
        assert (x == 0).all()


def test_a_masked_vocabulary_entry_has_no_gradient():
    c = case(bias=True)
    bias = c.bias.detach().clone()
    bias[3] = -torch.inf
    stats = fused_logp(c.hidden, c.weight, c.ids.where(c.ids != 3, 4), bias=bias)
    hidden, weight = torch.autograd.grad((stats.logp + stats.entropy).sum(), (c.hidden, c.weight))
    assert (weight[3] == 0).all()
    assert hidden.isfinite().all()


def test_tied_weights_add_both_gradients():
    c = case(v=300, dtype=torch.float64)
    ids = torch.arange(90)
    hidden = torch.nn.functional.embedding(ids, c.weight)
    got = torch.autograd.grad(fused_logp(hidden, c.weight, ids).logp.sum(), c.weight, retain_graph=True)[0]
    logp = (hidden @ c.weight.T).log_softmax(-1).gather(1, ids[:, None]).sum()
    assert relative(got, torch.autograd.grad(logp, c.weight)[0]) < 1e-12


def test_threads_split_the_vocabulary_in_the_backward():
    c = case(v=5000)
    alone = gradients(c, fused_logp(c.hidden, c.weight, c.ids), *incoming_gradients("logp"))
    torch.set_num_threads(2)
    try:
        both = gradients(c, fused_logp(c.hidden, c.weight, c.ids), *incoming_gradients("logp"))
    finally:
        torch.set_num_threads(1)
    for a, b in zip(both, alone, strict=True):
        assert relative(a, b) < 1e-6
