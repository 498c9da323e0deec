"""The normalisers: numbers by hand, and one large batch against the same data in parts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isentropic.losses.reduce import SumCount, constant, merge, sequence, token

X = torch.tensor([[1.0, 2.0, 3.0], [6.0, 10.0, -1.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])

NAMES = ("token", "sequence", "constant")


def by_name(name, x, mask):
    return constant(x, mask, 7) if name == "constant" else {"token": token, "sequence": sequence}[name](x, mask)


def random_batch(b, t, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, t, generator=generator, dtype=dtype)
    return x, torch.rand(b, t, generator=generator) < 0.6


def test_numbers_by_hand():
    # 1+2+3+6+10 = 22 over 5 tokens; means 2 and 8 over 2 sequences; 22/4 over 2 sequences
    assert token(X, MASK) == (22.0, 5.0)
    assert sequence(X, MASK) == (10.0, 2.0)
    assert constant(X, MASK, 4) == (5.5, 2.0)
    assert token(X, MASK).mean() == pytest.approx(4.4)
    assert sequence(X, MASK).mean() == 5.0
    assert constant(X, MASK, 4).mean() == 2.75
    one = torch.tensor([[0, 0, 1], [0, 0, 0]])  # a single token
    assert (token(X, one).mean(), sequence(X, one).mean()) == (3.0, 1.5)


def test_all_agree_where_lengths_are_equal_to_the_constant():
    mask = torch.ones(2, 3)
    means = [token(X, mask).mean(), sequence(X, mask).mean(), constant(X, mask, 3).mean()]
    assert means == [pytest.approx(3.5)] * 3


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_mask_dtypes_and_weights_that_are_not_weights(dtype):
    assert token(X, MASK.to(dtype)) == (22.0, 5.0)
    assert token(X, MASK * 3) == (22.0, 5.0)  # a mask says which, not how much


def test_nothing_inside_the_mask():
    nothing = torch.zeros(2, 3)
    assert token(X, nothing) == (0.0, 0.0)
    assert sequence(X, nothing) == (0.0, 2.0)  # rows count, as in TRL
    assert constant(X, nothing, 3) == (0.0, 2.0)
    assert sequence(torch.zeros(0, 3), torch.zeros(0, 3)) == (0.0, 0.0)
    x = X.clone().requires_grad_()
    mean = token(x, nothing).mean()
    mean.backward()
    assert mean == 0.0
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_values_reach_neither_value_nor_gradient(name, bad):
    x = torch.where(MASK.bool(), X, bad).requires_grad_()
    mean = by_name(name, x, MASK).mean()
    mean.backward()
    assert mean == by_name(name, X, MASK).mean()
    assert x.grad.isfinite().all()
    assert x.grad[1, 2] == 0


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up(name):
    x, mask = random_batch(13, 9, seed=0)
    mask[4] = False  # an empty sequence
    whole_x, part_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    whole = by_name(name, whole_x, mask)
    parts = [by_name(name, part_x[s], mask[s]) for s in (slice(0, 1), slice(1, 6), slice(6, 13))]
    merged = merge(*parts)
    assert merged.count == whole.count
    torch.testing.assert_close(merged.sum, whole.sum, rtol=0, atol=1e-12)
    whole.mean().backward()
    for part in parts:  # gradient accumulation: each sum over the count of all
        SumCount(part.sum, merged.count).mean().backward()
    torch.testing.assert_close(part_x.grad, whole_x.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 5), t=st.integers(1, 6), extra=st.integers(0, 4), seed=st.integers(0, 999))
def test_padding_and_order_do_not_matter(name, b, t, extra, seed):
    x, mask = random_batch(b, t, seed)
    expected = by_name(name, x, mask)
    padding = torch.full((b, extra), math.nan, dtype=x.dtype)
    padded = by_name(name, torch.cat([padding, x], 1), torch.cat([torch.zeros(b, extra), mask], 1))
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(b, generator=generator), torch.randperm(t, generator=generator)
    permuted = by_name(name, x[rows][:, columns], mask[rows][:, columns])
    for other in (padded, permuted):
        assert other.count == expected.count
        torch.testing.assert_close(other.sum, expected.sum, rtol=0, atol=1e-12)


def test_mask_is_a_slice():
    x, _ = random_batch(3, 8, seed=1)
    mask = torch.zeros(3, 8)
    mask[:, 2:5] = 1
    for name in NAMES:
        torch.testing.assert_close(by_name(name, x, mask), by_name(name, x[:, 2:5], mask[:, 2:5]), rtol=0, atol=1e-14)


def test_half_precision_is_summed_in_fp32():
    # In bf16 a running sum of ones sticks at 256.
    ones = torch.ones(4, 1024, dtype=torch.bfloat16)
    for name in NAMES:
        assert by_name(name, ones, ones).sum.dtype == torch.float32
    assert token(ones, ones) == (4096.0, 4096.0)


def test_errors():
    with pytest.raises(ValueError, match="length must be > 0 tokens, got 0"):
        constant(X, MASK, 0)
    with pytest.raises(ValueError, match="at least one pair"):
        merge()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name):
    # Tensors without data: reading a value, which would synchronise, raises.
    x = torch.empty(2, 3, device="meta", requires_grad=True)
    pair = by_name(name, x, torch.empty(2, 3, device="meta", dtype=torch.bool))
    merge(pair, pair).mean().backward()
    assert x.grad.shape == (2, 3)
