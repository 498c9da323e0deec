"""Exact statistics against their definitions, limits, gradients, chunks; the sampled estimate against its formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isentropic.entropy.statistics import _row_chunks, logits_stats, sampled_entropy, token_entropy

INF = math.inf


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def entropy_of(logp):
    return -(logp.exp() * logp).sum(-1)


def close(got, expected, atol=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def test_numbers_by_hand():
    # π = (½, ¼, ¼): H = ½·1 + 2·¼·2 = 1.5 bit; Σπ² = ¼ + 2/16 = 3/8; Σπ² log₂π = −¼ − 2·2/16 = −½;
    # Σπ² log₂²π = ¼ + 2·4/16 = ¾
    bit = math.log(2)
    stats = logits_stats(torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([1]))
    expected = [-2 * bit, 1.5 * bit, 0.375, -0.5 * bit, 0.75 * bit**2]
    assert [x.item() for x in stats] == pytest.approx(expected, rel=1e-6)


def test_temperature_by_hand():
    # Odds 16 : 1 at temperature 2 are 4 : 1.
    logits = torch.tensor([[math.log(16.0), 0.0]])
    stats = logits_stats(logits, torch.tensor([0]), temperature=2.0)
    p = torch.tensor([0.8, 0.2])
    assert stats.logp.item() == pytest.approx(math.log(0.8), rel=1e-6)
    assert stats.entropy.item() == pytest.approx(entropy_of(p.log()).item(), rel=1e-6)
    assert token_entropy(logits, temperature=2.0).item() == stats.entropy.item()


@pytest.mark.parametrize("v", [1, 2, 50_000])
def test_uniform_rows(v):
    stats = logits_stats(torch.full((2, v), 3.0), torch.tensor([0, v - 1]))
    log_v = math.log(v)
    expected = [-log_v, log_v, 1 / v, -log_v / v, log_v**2 / v]
    for got, value in zip(stats, expected, strict=True):
        assert got.tolist() == pytest.approx([value] * 2, rel=1e-5, abs=1e-9)
    assert token_entropy(torch.full((2, v), 3.0)).tolist() == pytest.approx([log_v] * 2, rel=1e-5)


def test_one_hot_rows():
    for logits in (torch.tensor([[-INF, 0.0, -INF]]), torch.tensor([[-1e4, 0.0, -1e4]])):
        stats = logits_stats(logits, torch.tensor([1]))
        assert [x.item() for x in stats] == [0.0, 0.0, 1.0, 0.0, 0.0]
        assert token_entropy(logits).item() == 0.0
    # Far tokens keep their log-probability even where π underflows to 0; what cannot be sampled has −inf.
    assert logits_stats(torch.tensor([[-1e4, 0.0]]), torch.tensor([0])).logp.item() == -1e4
    assert logits_stats(torch.tensor([[-INF, 0.0]]), torch.tensor([0])).logp.item() == -INF


def test_masked_vocabulary_is_a_smaller_vocabulary():
    logits = random_logits(4, 9)
    cut = logits.clone()
    cut[:, 5:] = -INF
    ids = torch.tensor([0, 4, 2, 1])
    for got, expected in zip(logits_stats(cut, ids), logits_stats(logits[:, :5], ids), strict=True):
        close(got, expected)
    close(token_entropy(cut), token_entropy(logits[:, :5]))
    cut.requires_grad_()
    token_entropy(cut).sum().backward()
    part = logits[:, :5].clone().requires_grad_()
    token_entropy(part).sum().backward()
    close(cut.grad[:, :5], part.grad)
    assert cut.grad[:, 5:].eq(0).all()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    v=st.integers(1, 12),
    chunk=st.integers(1, 10),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 999),
)
def test_definitions_and_chunks(rows, v, chunk, temperature, seed):
    logits = random_logits(rows, v, seed=seed)
    ids = torch.randint(v, (rows,), generator=torch.Generator().manual_seed(seed))
    logp = (logits / temperature).log_softmax(-1)
    p = logp.exp()
    stats = logits_stats(logits, ids, temperature, chunk)
    expected = (
        logp[torch.arange(rows), ids],
        entropy_of(logp),
        (p**2).sum(-1),
        (p**2 * logp).sum(-1),
        (p**2 * logp**2).sum(-1),
    )
    for got, value in zip(stats, expected, strict=True):
        close(got, value)
    close(token_entropy(logits, temperature, chunk), stats.entropy)
    assert (stats.sum_p2_logp + stats.entropy * stats.sum_p2 >= -1e-12).all()  # Σ π² L is never negative


def test_shapes_and_slices():
    logits = random_logits(3, 5, 7)
    ids = torch.arange(15).reshape(3, 5) % 7
    whole = logits_stats(logits, ids)
    assert all(x.shape == (3, 5) for x in whole)
    # Without the last position, as engines slice: a view that is not contiguous.
    for got, expected in zip(logits_stats(logits[:, :-1], ids[:, :-1], chunk=3), whole, strict=True):
        close(got, expected[:, :-1])
    for part in (logits[:, :-1], logits.transpose(0, 1), logits[0], logits[0, 0], logits[:, :0], logits[:0]):
        assert token_entropy(part, chunk=2).shape == part.shape[:-1]
        close(token_entropy(part, chunk=2), entropy_of(part.log_softmax(-1)))
    assert logits_stats(logits[0, 0], ids[0, 0]).entropy.shape == ()
    assert logits_stats(logits[:0], ids[:0]).logp.shape == (0, 5)


def test_chunks_are_views():
    logits = random_logits(3, 5, 7)
    for part in (logits, logits[:, :-1], logits[:, 1:]):
        chunks = list(_row_chunks(part, 2))
        assert all(rows.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr() for rows in chunks)
        assert torch.equal(torch.cat(chunks), part.reshape(-1, 7))


def test_gradient_is_the_one_of_autograd():
    logits = random_logits(4, 3, 6, seed=1)
    weight = random_logits(4, 3, seed=2)
    for temperature in (1.0, 0.7):
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        (token_entropy(ours, temperature, chunk=5) * weight).sum().backward()
        (entropy_of((theirs / temperature).log_softmax(-1)) * weight).sum().backward()
        close(ours.grad, theirs.grad)
    sliced, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    token_entropy(sliced[:, :-1], chunk=1).sum().backward()
    entropy_of(theirs[:, :-1].log_softmax(-1)).sum().backward()
    close(sliced.grad, theirs.grad)


def test_gradcheck():
    logits = random_logits(3, 4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_entropy(z, 0.8, 2), (logits,))


def test_statistics_carry_no_gradient():
    logits = random_logits(2, 3).requires_grad_()
    assert not any(x.requires_grad for x in logits_stats(logits, torch.tensor([0, 1])))


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_rows_outside_the_mask_may_hold_anything(bad):
    logits = random_logits(1, 3, 4)
    logits[0, 2] = bad
    logits.requires_grad_()
    mask = torch.tensor([[True, True, False]])
    torch.where(mask, token_entropy(logits), 0.0).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2].eq(0).all()
    assert logits.grad[0, :2].ne(0).all()
    stats = logits_stats(logits, torch.tensor([[1, 2, -100]]))  # a padding id reads some token
    assert all(x[mask].isfinite().all() for x in stats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_fp32(dtype):
    logits = random_logits(2, 2000, seed=4).to(dtype)
    exact = logits_stats(logits.double(), torch.tensor([3, 5]))
    for got, expected in zip(logits_stats(logits, torch.tensor([3, 5])), exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)
    logits.requires_grad_()
    entropy = token_entropy(logits)
    entropy.sum().backward()
    assert entropy.dtype == torch.float32
    assert logits.grad.dtype == dtype


def test_invariances():
    logits = random_logits(3, 8, seed=5)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    for other in (logits + 100.0, logits[:, order]):
        close(token_entropy(other), token_entropy(logits), atol=1e-11)
    close(token_entropy(logits, temperature=2.0), token_entropy(logits / 2.0))


def test_sampled_entropy_by_hand():
    pair = sampled_entropy(torch.tensor([[-1.0, -2.0], [-4.5, math.nan]]), torch.tensor([[1, 1], [1, 0]]))
    assert pair == (7.5, 3.0)
    assert pair.mean() == 2.5


def expected_surprisal(q, logp):
    """What sampled_entropy converges to under samples from q."""
    return -(q * logp).sum(-1)


def test_sampled_entropy_is_unbiased_and_its_variance_is_the_one_stated():
    logp = random_logits(1, 5, seed=6).log_softmax(-1)[0]
    p, entropy = logp.exp(), entropy_of(logp)
    close(expected_surprisal(p, logp), entropy)
    num = 200_000
    ids = torch.multinomial(p, num, replacement=True, generator=torch.Generator().manual_seed(7))
    sd = ((p * logp**2).sum() - entropy**2).sqrt() / math.sqrt(num)
    mean = sampled_entropy(logp[ids][None], torch.ones(1, num)).mean()
    assert abs(mean - entropy) < 4 * sd
    assert -logp[ids].mean() == pytest.approx(mean.item())
    assert logp[ids].std() / math.sqrt(num) == pytest.approx(sd.item(), rel=0.02)


def test_bias_under_truncation():
    logp = random_logits(300, 12, seed=8).log_softmax(-1)
    p, entropy = logp.exp(), entropy_of(logp)
    kept = {
        "top_k": p >= p.topk(4).values[:, -1:],
        "min_p": p >= 0.1 * p.amax(-1, keepdim=True),
        "top_p": torch.zeros_like(p, dtype=torch.bool).scatter(
            1,
            p.argsort(descending=True),
            p.sort(descending=True).values.cumsum(1) - p.sort(descending=True).values < 0.9,
        ),
    }
    for keep in kept.values():
        mass = (p * keep).sum(-1)
        q = p * keep / mass[:, None]
        got = expected_surprisal(q, logp)
        entropy_q = -torch.xlogy(q, q).sum(-1)
        close(got, entropy_q - mass.log())
        cut = torch.where(mass < 1, -(p * ~keep * logp).sum(-1) / (1 - mass), 0.0)
        close(got, entropy - (1 - mass) * (cut - got), atol=1e-9)
        assert (got <= entropy + 1e-12).all()
        assert (got < entropy).any()


def test_bias_under_another_temperature():
    logp = random_logits(300, 12, seed=9).log_softmax(-1)
    for temperature, sign in ((0.5, -1), (2.0, 1)):
        logq = (logp / temperature).log_softmax(-1)
        got = expected_surprisal(logq.exp(), logp)
        close(got, entropy_of(logq) + (logq.exp() * (logq - logp)).sum(-1))
        assert (sign * (got - entropy_of(logp)) > 0).all()


def test_errors():
    logits = torch.zeros(1, 2)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be > 0, got"):
            token_entropy(logits, temperature)
        with pytest.raises(ValueError, match="temperature must be > 0, got"):
            logits_stats(logits, torch.tensor([0]), temperature)
    with pytest.raises(ValueError, match="chunk must be >= 1 row, got 0"):
        token_entropy(logits, chunk=0)


def test_nothing_waits_for_the_device():
    # Tensors without data: reading a value, which would synchronise, raises.
    logits = torch.empty(2, 5, 7, device="meta", requires_grad=True)
    token_entropy(logits, chunk=3).sum().backward()
    assert logits.grad.is_meta
    assert logits_stats(logits, torch.empty(2, 5, device="meta", dtype=torch.int64), chunk=3).entropy.is_meta
