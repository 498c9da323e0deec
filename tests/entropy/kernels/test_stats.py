"""token_stats against float64, at its limits, and where it refuses."""

import math

import pytest
import torch
from head_case import case, plain

from isentropic.entropy.kernels import Shard, cpu, fused_logp, token_stats
from isentropic.entropy.statistics import logits_stats

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HEADS = [{}, {"bias": True}, {"softcap": 12.0, "bias": True, "scale": 0.5}]
INF = float("inf")


def one_row(logits):
    """Hidden state and weight whose logits are exactly these."""
    return torch.ones(1, 1), torch.tensor(logits)[:, None]


@pytest.mark.parametrize("head", HEADS, ids=["plain", "bias", "capped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64_at_every_dtype_and_a_temperature_for_each_token(dtype, head):
    c = case(dtype=dtype, **head)
    got, expected = token_stats(c.hidden, c.weight, c.ids, c.temperature, **c.options()), plain(c)
    assert expected[0].min() < -20  # the second pass runs too
    assert expected[0].max() > -1
    for a, b, tolerance in zip(got, expected, (2e-5, 1e-5, 1e-5, 1e-5, 1e-4), strict=True):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (a - b).abs().max() < (1e-11 if dtype == torch.float64 else tolerance)


def test_logp_of_bf16_inputs_is_within_1e_5_for_tokens_that_are_sampled():
    c = case(dtype=torch.bfloat16, n=256)
    logits = (c.hidden.double() @ c.weight.double().T).detach()
    ids = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    c = c._replace(ids=ids, temperature=torch.ones(256))
    assert (token_stats(c.hidden, c.weight, ids).logp - plain(c)[0]).abs().max() < 1e-5


def test_agrees_with_the_statistics_of_logits():
    c = case()
    logits = c.hidden @ c.weight.T
    for a, b in zip(token_stats(c.hidden, c.weight, c.ids, 0.7), logits_stats(logits, c.ids, 0.7), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-4)


def test_uniform_row_by_hand():
    stats = token_stats(torch.zeros(1, 3), torch.randn(50, 3), torch.tensor([7]))
    log = math.log(50)
    for got, expected in zip(stats, (-log, log, 1 / 50, -log / 50, log**2 / 50), strict=True):
        assert got.item() == pytest.approx(expected, rel=1e-6)


def test_an_almost_certain_token_keeps_its_relative_precision():
    hidden, weight = one_row([30.0, 0.0, 0.0])
    stats = token_stats(hidden, weight, torch.tensor([0]))
    rest = 2 * math.exp(-30)
    assert stats.logp.item() == pytest.approx(-rest, rel=1e-6)
    assert stats.entropy.item() == pytest.approx(rest * 31, rel=1e-6)
    assert stats.sum_p2_logp.item() == pytest.approx(-rest, rel=1e-6)


@pytest.mark.parametrize("gap", [19.0, 21.0, 43.5, 44.5, 90.0, 3000.0])
def test_an_unlikely_token_never_overflows(gap):
    """From e² past e past what fp32 holds; the row is (0.5, 0.5, ~0) and the token is the third."""
    hidden, weight = one_row([-5.0, -5.0, -5.0 - gap])
    stats = token_stats(hidden, weight, torch.tensor([2]))
    log = math.log(2)
    for got, expected in zip(stats, (-gap - log, log, 0.5, -0.5 * log, 0.5 * log**2), strict=True):
        assert got.item() == pytest.approx(expected, rel=5e-5)


@pytest.mark.parametrize("level", [-1e4, -50.0, 50.0, 1e4])
def test_rows_far_from_zero_are_those_near_zero(level):
    got = token_stats(*one_row([level, level + 1, level - 2]), torch.tensor([0]))
    expected = token_stats(*one_row([0.0, 1.0, -2.0]), torch.tensor([0]))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_masked_vocabulary_entry_is_as_if_it_were_not_there():
    c = case(bias=True)
    inside = torch.ones(2500, dtype=torch.bool)
    inside[100:200] = False
    ids = torch.arange(90) + 200
    bias = c.bias.detach().masked_fill(~inside, -INF)
    got = token_stats(c.hidden, c.weight, ids, c.temperature, bias=bias)
    expected = token_stats(c.hidden, c.weight[inside], ids - 100, c.temperature, bias=c.bias[inside])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    never = token_stats(c.hidden, c.weight, torch.full((90,), 150), bias=bias)
    assert (never.logp == -INF).all()
    assert all(x.isfinite().all() for x in never[1:])


def test_mask_is_slice_and_hides_anything():
    c = case()
    mask = torch.arange(90) % 3 == 0
    spoilt = torch.where(mask[:, None], c.hidden, torch.nan)
    ids = torch.where(mask, c.ids, -100)
    got = token_stats(spoilt, c.weight, ids, c.temperature, mask=mask)
    expected = token_stats(c.hidden[mask], c.weight, c.ids[mask], c.temperature[mask])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[mask], b)
        assert (a[~mask] == 0).all()


def test_empty_masks_and_no_tokens_read_zero():
    c = case()
    stats = token_stats(c.hidden, c.weight, c.ids, mask=torch.zeros(90))
    assert all((x == 0).all() and x.shape == (90,) for x in stats)
    assert token_stats(c.hidden[:0], c.weight, c.ids[:0]).logp.shape == (0,)


def test_shape_is_that_of_ids_and_order_does_not_matter():
    c = case()
    stats = token_stats(c.hidden.reshape(9, 10, 16), c.weight, c.ids.reshape(9, 10))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    shuffled = token_stats(c.hidden[order], c.weight, c.ids[order])
    for a, b in zip(stats, shuffled, strict=True):
        assert a.shape == (9, 10)
        torch.testing.assert_close(a.flatten()[order], b, rtol=1e-5, atol=1e-5)


def test_weights_of_another_dtype_and_layout():
    c = case(dtype=torch.bfloat16)
    expected = token_stats(c.hidden.float(), c.weight.float(), c.ids)
    for weight in (c.weight.float(), c.weight.detach().t().contiguous().t()):
        torch.testing.assert_close(token_stats(c.hidden, weight, c.ids).logp, expected.logp, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_reach_the_arithmetic():
    c = case(n=40)
    expected = token_stats(c.hidden, c.weight, c.ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = token_stats(c.hidden, c.weight, c.ids)
    assert torch.equal(got.logp, expected.logp)


@pytest.mark.parametrize("bias", [False, True])
def test_shifted_arithmetic_is_ten_times_as_exact_as_half_precision_logits(bias):
    c = case(dtype=torch.bfloat16, bias=bias)
    c = c._replace(ids=torch.where(plain(c)[0] > -8, c.ids, c.ids.roll(1)), temperature=torch.ones(90))
    expected = plain(c)[0]
    likely = expected > -8
    rounded = (c.hidden @ c.weight.T + (0.0 if c.bias is None else c.bias)).float().log_softmax(-1)
    theirs = (rounded.gather(1, c.ids[:, None])[:, 0] - expected)[likely].square().mean().sqrt()
    stats = token_stats(c.hidden, c.weight, c.ids, arithmetic="shifted", bias=c.bias)
    ours = (stats.logp - expected)[likely].square().mean().sqrt()
    assert likely.sum() > 40
    assert ours < 4e-3
    assert ours < 0.25 * theirs


def test_threads_split_the_rows():
    c = case(n=600)
    alone = token_stats(c.hidden, c.weight, c.ids)
    torch.set_num_threads(2)
    try:
        both = token_stats(c.hidden, c.weight, c.ids)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for a, b in zip(alone, both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    spans = []
    cpu.run_threaded(spans.append, 10, 3, c.hidden)
    assert spans == [slice(0, 10)]


REFUSED = [
    ({"weight": torch.zeros(9, 3)}, "must share d"),
    ({"ids": torch.zeros(3, dtype=torch.long)}, "shift one of them"),
    ({"bias": torch.zeros(4)}, "bias must be"),
    ({"mask": torch.zeros(3)}, "mask must be"),
    ({"ids": torch.tensor([0, 9])}, "got 9; are they of this tokenizer"),
    ({"ids": torch.tensor([0, -100])}, "got -100 of padding; pass mask=ids >= 0"),
    ({"ids": torch.tensor([0, -1]), "mask": torch.ones(2)}, "got -1 where the mask is not 0; mask such tokens"),
    ({"ids": torch.tensor([0, 9]), "mask": torch.tensor([0, 1])}, "got 9"),
    ({"ids": torch.tensor([0, -5]), "shard": Shard(0, lambda x, op: x)}, "got -5"),
    ({"ids": torch.tensor([0.0, 1.0])}, "must be integers"),
    ({"temperature": 0.0}, "temperature must be > 0"),
    ({"temperature": INF}, "finite"),
    ({"temperature": torch.ones(3)}, "temperature must be a number"),
    ({"softcap": -1.0}, "softcap must be > 0"),
    ({"scale": 0.0}, "scale must not be 0"),
    ({"arithmetic": "fast"}, "exact, shifted"),
    ({"weight": torch.zeros(9, 4, dtype=torch.int8)}, "dequantise"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refusals(changes, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(9, 4), "ids": torch.tensor([0, 8]), **changes}
    with pytest.raises(ValueError, match=message):
        token_stats(**arguments)
    if arguments.get("arithmetic") is None:
        with pytest.raises(ValueError, match=message):
            fused_logp(**arguments)


def test_a_setting_without_effect_warns():
    with pytest.warns(UserWarning, match="has no effect"):
        token_stats(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), arithmetic="shifted")
