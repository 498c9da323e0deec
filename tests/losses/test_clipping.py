"""Rules for the bounds of the ratio, by hand and against what they are meant to say."""

import math
from functools import partial

import pytest
import torch
from defaults import default, table
from hypothesis import given
from hypothesis import strategies as st

from isentropic.losses.clipping import RatioFacts, bounds_of
from isentropic.losses.objectives import clipped
from isentropic.types import TokenBatch

linear, dcpo, balanced = (default("bounds", name) for name in ("linear", "dcpo", "balanced"))


def facts(ratio, adv, prob_old=None, mask=None):
    ratio, adv = (torch.tensor([x], dtype=torch.float64) for x in (ratio, adv))
    prob_old = torch.ones_like(ratio) if prob_old is None else torch.tensor([prob_old], dtype=torch.float64)
    return RatioFacts(ratio, prob_old, adv, torch.ones_like(ratio).bool() if mask is None else torch.tensor([mask]))


def test_linear_by_hand():
    lower, upper = linear(0.2, 0.28, facts([1.0] * 3, [1.0] * 3, [0.0, 0.5, 1.0]), slope=-0.4)
    assert lower == 0.8
    assert upper.flatten().tolist() == pytest.approx([1.28, 1.08, 1.0])  # 0.28 − 0.4 is no width: the bound stays at 1


def test_dcpo_by_hand():
    # q = 0.64: ½ + ½√(1 − 4·0.16/0.64) = ½; q = 1: ½ + ½√0.36 = 0.8; q = 0.8 above: ½ + ½√2.
    lower, upper = dcpo(0.16, 0.2, facts([1.0] * 3, [1.0] * 3, [0.64, 1.0, 0.8]))
    assert lower.flatten().tolist() == pytest.approx([0.5, 0.8, 0.5 + 0.5 * math.sqrt(0.2)])
    assert upper.flatten().tolist() == pytest.approx([1.25, 0.5 + 0.5 * math.sqrt(1.8), 0.5 + 0.5 * math.sqrt(2)])
    assert dcpo(0.16, 0.2, facts([1.0], [1.0], [1e-9]))[1].item() == 10.0


@given(st.floats(0.01, 1.0), st.floats(0.05, 5.0))
def test_dcpo_bounds_the_change_weighted_with_the_new_probability(q, ratio):
    lower, upper = (x.item() for x in dcpo(0.16, 0.2, facts([ratio], [1.0], [q])))
    change = (ratio - 1) * ratio * q
    if abs(change - 0.2) > 1e-9 and ratio < 10:
        assert (ratio <= upper) == (change <= 0.2)
    if 1 - 4 * 0.16 / q > 0 and ratio > 0.5 and abs(change + 0.16) > 1e-9:
        assert (ratio >= lower) == (change >= -0.16)


PATH = [(0.6, 1.2), (0.6, 1.7), (0.6, 2.0), (0.7, 2.0), (0.8, 2.0)]
STEPS = {"lower_to": 0.8, "upper_to": 2.0, "lower_step": 0.1, "upper_step": 0.5}


@pytest.mark.parametrize(
    ("ratio", "adv", "at"),
    [
        ([1.0, 1.0], [1.0, -1.0], 0),  # even from the start
        ([3.0, 1.0], [1.0, -1.6], 1),  # min(3, 1.7)·1 ≥ 1.6
        ([3.0, 1.0], [1.0, -1.9], 2),
        ([3.0, 1.0], [1.0, -9.0], 4),  # never: the end of the path
        ([1.0, 0.1], [-1.0, -1.0], 4),
        ([1.0, 0.1], [1.0, 1.0], 0),
    ],
)
def test_balanced_takes_the_first_point_of_its_path(ratio, adv, at):
    lower, upper = balanced(0.4, 0.2, facts(ratio, adv), **STEPS)
    assert (lower.item(), upper.item()) == pytest.approx(PATH[at])


def test_balanced_against_a_walk_along_the_path():
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        ratio, adv = torch.rand(4, 6, generator=g) * 3, torch.randn(4, 6, generator=g) - 0.3
        mask = torch.rand(4, 6, generator=g) < 0.7
        lower, upper = 0.6, 1.2
        while True:
            kept = torch.where(adv > 0, ratio.clamp(max=upper), ratio.clamp(min=lower)) * adv * mask
            share = kept.clamp(min=0).sum() / kept.abs().sum()
            if share >= 0.5 or (upper >= 3.0 - 1e-6 and lower >= 0.9 - 1e-6):
                break
            if upper < 3.0 - 1e-6:
                upper = min(upper + 0.05, 3.0)
            else:
                lower = min(lower + 0.02, 0.9)
        got = balanced(0.4, 0.2, RatioFacts(ratio, torch.ones_like(ratio), adv, mask))
        assert [x.item() for x in got] == pytest.approx([lower, upper], abs=1e-5)


def test_balanced_allows_for_rounding_and_no_more():
    # 0.3 of 0.3 + 2.7 is the share 0.1 exactly, but 0.1·3.0 = 0.30000000000000004 > 0.3.
    assert 0.1 * (0.3 + 2.7) > 0.3
    start = pytest.approx((0.6, 1.2))
    at_share = balanced(0.4, 0.2, facts([1.0, 1.0], [0.3, -2.7]), **{**STEPS, "positive_share": 0.1})
    assert tuple(x.item() for x in at_share) == start
    # A hundred-thousandth below the share is below it: nothing on the path helps, and it goes to its end.
    below = balanced(0.4, 0.2, facts([1.0, 1.0], [0.3 * (1 - 1e-5), -2.7]), **{**STEPS, "positive_share": 0.1})
    assert tuple(x.item() for x in below) == pytest.approx(PATH[-1])
    above = balanced(0.4, 0.2, facts([1.0, 1.0], [0.3 * (1 + 1e-5), -2.7]), **{**STEPS, "positive_share": 0.1})
    assert tuple(x.item() for x in above) == start


@pytest.mark.parametrize("step", [0.395, 0.4, 0.27, 5.0])
def test_balanced_ends_at_the_end_of_its_path_whatever_the_step(step):
    got = balanced(0.4, 0.2, facts([3.0, 1.0], [1.0, -9.0]), **{**STEPS, "upper_step": step, "lower_step": step / 4})
    assert [x.item() for x in got] == pytest.approx([0.8, 2.0])


def test_a_rule_bounds_the_clip():
    # π_old = ½, ratio 1.3: with ε_high 0.28 clipped by 1.28 − 0.2·½ = 1.18.
    logp_old = torch.tensor([[0.5]]).log()
    batch = TokenBatch((0.5 * torch.tensor([[1.3]])).log(), logp_old, torch.tensor([1.0]), torch.ones(1, 1))
    assert clipped(batch, 0.2, 0.28, linear)[0].item() == pytest.approx(-1.18)
    assert clipped(batch, 0.2, 0.28, partial(linear, slope=0.0))[0].item() == pytest.approx(-1.28)
    assert clipped(batch, 0.2, 0.28, dcpo)[1].clipped_high.item() is (0.3 * 0.65 > 0.28)


def test_errors_and_devices():
    some = facts([1.0], [1.0])
    with pytest.raises(ValueError, match="widths by token"):
        balanced(torch.ones(1, 1), 0.2, some)
    with pytest.raises(ValueError, match="steps > 0, got 0"):
        balanced(0.4, 0.2, some, lower_step=0.0)
    with pytest.raises(ValueError, match="clip_low must be >= 0"):
        bounds_of(dcpo, -1.0, 0.2, some, some.mask)
    meta = RatioFacts(*(x.to("meta") for x in some))
    for rule in table("bounds").values():
        assert all(isinstance(x, float) or x.is_meta for x in bounds_of(rule, 0.2, 0.2, meta, meta.mask))


def test_widths_outside_the_mask_count_as_nothing():
    seen = []
    mask = [True, False]

    def rule(clip_low, clip_high, facts):
        seen.extend([clip_low, clip_high])
        return 1 - clip_low, 1 + clip_high

    widths = torch.tensor([[0.2, math.nan]]), torch.tensor([[0.3, 7.0]])
    bounds_of(rule, *widths, facts([1.0, 1.0], [1.0, 1.0], mask=mask), torch.tensor([mask]))
    assert [x.tolist() for x in seen] == [[[pytest.approx(0.2), 0.0]], [[pytest.approx(0.3), 0.0]]]
