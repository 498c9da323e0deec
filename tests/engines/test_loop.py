"""The control step that every engine shares: refuse, hold, act, ten refusals in a row, monitor only, sums, resume."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch

from isentropic.engines.loop import (
    ControlLoop,
    EntropyReadingError,
    OffPolicySums,
    TokenSums,
    add,
    masked_sums,
    off_policy_row,
    off_policy_sums,
    reduce,
    saved_in,
    token_sums,
)
from isentropic.losses.reduce import SumCount
from isentropic.recipes import build_thermostat, compose, with_knob
from isentropic.types import EntropyReading, TokenBatch, TokenFacts

HELD = compose("loop", knob="zeta", controller="sign_step:step=0.1", target="1.0", every=1)
GOOD, BROKEN = EntropyReading(8.0, 10.0), EntropyReading(float("nan"), 10.0)


def batch():
    logp = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    entropy = torch.tensor([[0.5, 1.0], [1.5, float("nan")]])
    facts = TokenFacts(
        torch.tensor([[1.0, 2.0], [0.5, 7.0]]),
        torch.tensor([[False, False], [True, True]]),
        torch.tensor([[False, True], [False, False]]),
    )
    return TokenBatch(logp, None, torch.tensor([2.0, -1.0]), mask, entropy), facts


def test_sums_by_hand():
    sums = token_sums(*batch())
    assert {name: x.item() for name, x in sums._asdict().items()} == {
        "entropy": 3.0,
        "tokens": 3.0,
        "clipped_low": 1.0,
        "clipped_high": 1.0,
        "adv": 3.0,  # 2 + 2 − 1
        "logp": -6.0,
        "adv_logp": -3.0,  # −2 − 4 + 3
        "ratio": 3.5,
        "outside": 2.0,
    }
    assert all(x.dtype == torch.float64 for x in sums)


SAMPLER = torch.tensor([[-1.0 - math.log(2), float("nan")], [-3.0, 0.0]])  # of the tokens of batch(), one unknown
CHOSEN = torch.tensor([[True, False], [True, True]])


def test_sums_on_the_distance_from_the_sampler_by_hand():
    sums = off_policy_sums(*batch(), age=3, deselected=CHOSEN, sampler=SAMPLER)
    assert {name: pytest.approx(x.item()) for name, x in sums._asdict().items()} == {
        "ratio_squared": 5.25,  # 1 + 4 + ¼
        "dropped": 3.0,  # one by each bound, one by the selection
        "dropped_entropy": 3.0,
        "age": 9.0,
        "known": 2.0,
        "kl": 1 - math.log(2),  # d = log 2, and 0: e^d − 1 − d
        "kl_k1": -math.log(2),
        "kl_entropy": 2.0,
    }
    assert all(x.dtype == torch.float64 for x in sums)
    assert off_policy_row(reduced(token_sums(*batch())), reduced(sums)) == {
        "policy/age": 3.0,
        "clip/dropped_frac": 1.0,
        "clip/entropy_share": 1.0,
        "ratio/ess_frac": pytest.approx(3.5**2 / (3 * 5.25)),
        "mismatch/kl": pytest.approx((1 - math.log(2)) / 2),
        "mismatch/kl_k1": pytest.approx(-math.log(2) / 2),
        "mismatch/kl_over_entropy": pytest.approx((1 - math.log(2)) / 2),
    }


def reduced(sums):
    return reduce(sums, lambda vector: vector)


def test_what_is_not_known_of_the_sampler_is_absent():
    sums = off_policy_sums(*batch(), age=0)
    row = off_policy_row(reduced(token_sums(*batch())), reduced(sums))
    assert row == {
        "policy/age": 0.0,
        "clip/dropped_frac": pytest.approx(2 / 3),
        "clip/entropy_share": pytest.approx(2.5 / 3),
        "ratio/ess_frac": pytest.approx(7 / 9),
    }


def test_a_deselected_token_without_an_advantage_has_no_gradient_to_drop():
    still, facts = batch()
    sums = off_policy_sums(still._replace(adv=torch.zeros(2)), facts, 0, CHOSEN)
    assert (sums.dropped, sums.dropped_entropy) == (2.0, 2.5)


def test_the_mismatch_is_that_of_sampling_time():
    """Log-probs and entropies of the weights that sampled, whatever the policy has become since."""
    still, facts = batch()
    old = still._replace(logp_old=SAMPLER.nan_to_num(), entropy_old=torch.full((2, 2), 4.0))
    sums = off_policy_sums(old, facts, 1, sampler=SAMPLER)
    assert (sums.kl, sums.kl_k1, sums.kl_entropy) == (0.0, 0.0, 8.0)


def test_a_small_mismatch_is_not_lost_in_rounding():
    still, facts = batch()
    near = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]]) - 3 * 2**-22
    sums = off_policy_sums(still, facts, 0, sampler=near)
    assert sums.kl.item() == pytest.approx(3 * 9 * 2**-45, rel=1e-5, abs=0)  # d²/2 each


def test_what_is_dropped_and_off_policy_adds_up_over_micro_batches():
    still, facts = batch()
    parts = [
        off_policy_sums(
            still._replace(**{name: getattr(still, name)[i] for name in ("logp", "adv", "mask", "entropy")}),
            TokenFacts(*(x[i] for x in facts[:3])),
            2,
            CHOSEN[i],
            SAMPLER[i],
        )
        for i in (slice(0, 1), slice(1, 2))
    ]
    whole = off_policy_sums(still, facts, 2, CHOSEN, SAMPLER)
    assert reduced(add(*parts)) == pytest.approx(tuple(reduced(whole)))
    assert isinstance(add(*parts), OffPolicySums)


def test_micro_batches_and_ranks_add_up_in_one_reduction():
    loop, calls = ControlLoop(HELD), []
    loop.observe(token_sums(*batch()))
    loop.observe(token_sums(*batch()))
    assert loop.observed

    def both_ranks(vector):
        calls.append(vector.shape)
        return 2 * vector

    sums = loop.reduced(both_ranks)
    assert calls == [torch.Size([9])]
    assert isinstance(sums, TokenSums)
    assert (sums.entropy, sums.tokens, sums.adv_logp) == (12.0, 12.0, -12.0)
    assert not loop.observed


def test_nested_sums_keep_their_names():
    nested = SumCount(TokenSums(*torch.arange(9.0).unbind()), torch.tensor([1.0, 2.0]))
    doubled = reduce(add(nested, nested), lambda vector: vector)
    assert doubled.count == [2.0, 4.0]
    assert (doubled.sum.clipped_low, doubled.sum.outside) == (4.0, 16.0)


def test_masked_sums_leave_out_what_is_masked():
    rows = torch.tensor([[[1.0, float("nan")]], [[2.0, 5.0]]])
    assert masked_sums(rows, torch.tensor([[1, 0]])).tolist() == [1.0, 2.0]


def test_the_row_by_hand():
    loop = ControlLoop(HELD)
    before = loop.state
    loop.regulate(GOOD, act=True)
    sums = TokenSums(
        entropy=8.0,
        tokens=10.0,
        clipped_low=1.0,
        clipped_high=2.0,
        adv=5.0,
        logp=-20.0,
        adv_logp=-4.0,
        ratio=11.0,
        outside=3.0,
    )
    assert loop.row(sums, GOOD, before) == {
        "entropy/mean": 0.8,
        "entropy/tokens": 10.0,
        "entropy/refused": 0,
        "clip/low_frac": 0.1,
        "clip/high_frac": 0.2,
        "ratio/mean": 1.1,
        "ratio/outside_frac": 0.3,
        "cov/adv_logp": pytest.approx(-0.4 + 0.5 * 2.0),
        "adv/mean": 0.5,
        "entropy/target": 1.0,
        "entropy/error": pytest.approx(-0.2),
        "knob/value": 0.0,
        "knob/saturated": 0,
    }
    assert loop.value == 0.1
    assert loop.recipe_now == with_knob(HELD, 0.1)


@pytest.mark.parametrize(("entropy", "error"), [(8.0, -0.2), (12.0, 0.0)])
def test_entropy_above_a_floor_is_no_error_and_the_knob_at_rest_not_at_its_bound(entropy, error):
    loop = ControlLoop(replace(HELD, target="floor:1.0"))
    reading = EntropyReading(sum=entropy, count=10.0)
    loop.regulate(reading, act=True)
    row = loop.row(TokenSums(*[1.0] * len(TokenSums._fields)), reading, loop.state)
    assert row["entropy/error"] == pytest.approx(error)
    assert (row["knob/value"], row["knob/saturated"]) == (0.1 if error else 0.0, 0)


def test_the_first_refused_reading_raises():
    with pytest.raises(ValueError, match=r"the first entropy reading is refused: .*no checkpoint was written"):
        ControlLoop(HELD).regulate(BROKEN, act=True)


def test_a_refused_reading_holds_the_knob_and_ten_in_a_row_end_the_run(caplog):
    loop = ControlLoop(HELD)
    loop.regulate(GOOD, act=True)
    for count in range(1, 10):
        loop.regulate(BROKEN, act=True)
        assert (loop.value, loop.refused, loop.state.refused) == (0.1, count, count)
    with pytest.raises(EntropyReadingError, match=r"10 entropy readings in a row .*resume from the last checkpoint"):
        loop.regulate(BROKEN, act=True)
    assert loop.value == 0.1
    assert caplog.text.count("the knob is held") == 10


def test_nine_refusals_and_a_good_reading_start_the_count_again():
    loop = ControlLoop(HELD)
    loop.regulate(GOOD, act=True)
    for _ in range(9):
        loop.regulate(BROKEN, act=True)
    loop.regulate(GOOD, act=True)
    assert (loop.refused, loop.value) == (0, 0.2)


def test_an_engine_that_saves_is_asked_to():
    reasons = []
    loop = ControlLoop(HELD, save_and_stop=reasons.append)
    loop.regulate(GOOD, act=True)
    for _ in range(10):
        loop.regulate(BROKEN, act=True)
    assert len(reasons) == 1
    assert "10 entropy readings in a row were refused" in reasons[0]


def test_monitoring_alone_only_warns_and_never_stops(caplog):
    loop = ControlLoop(compose("grpo"))
    with caplog.at_level(logging.WARNING):
        for _ in range(25):
            loop.regulate(BROKEN, act=True)
    assert (loop.value, loop.state, loop.refused) == (None, None, 25)
    assert caplog.text.count("entropy reading refused") == 1
    loop.regulate(GOOD, act=True)
    loop.regulate(BROKEN, act=True)
    assert caplog.text.count("entropy reading refused") == 2


def test_a_resumed_loop_equals_an_uninterrupted_one(tmp_path):
    recipe = compose("isentropic", target="1.0")
    readings = [
        EntropyReading(8.0 + i, 10.0, predicted=-1e-3 * i, gain=2e-3, steps=1, rate=1 / (1 + i)) if i != 3 else BROKEN
        for i in range(8)
    ]
    straight, first = ControlLoop(recipe, 8), ControlLoop(recipe, 8)
    for reading in readings:
        straight.regulate(reading, act=True)
    for reading in readings[:4]:
        first.regulate(reading, act=True)
    (tmp_path / "isentropic.json").write_text(json.dumps(first.as_dict()))
    second = ControlLoop(recipe, 8)
    second.restore(saved_in(tmp_path))
    assert second.refused == 1
    for reading in readings[4:]:
        second.regulate(reading, act=True)
    assert second.state == straight.state


def test_a_checkpoint_of_another_control_is_not_continued(tmp_path, caplog):
    held = ControlLoop(HELD)
    held.regulate(GOOD, act=True)
    other = ControlLoop(compose(HELD, target="2.0"))
    other.restore(json.loads(json.dumps(held.as_dict())))
    assert other.state == build_thermostat(HELD).init()
    assert "target changed since the checkpoint: the controller starts anew" in caplog.text
    assert saved_in(tmp_path) is None
    assert "has no isentropic.json" in caplog.text


def test_a_target_over_the_whole_run_learns_its_length():
    loop = ControlLoop(compose(HELD, target="anneal:2.0:1.0"), 1)
    loop.extend_to(5)
    targets = []
    for _ in range(5):
        loop.regulate(GOOD, act=True)
        targets.append(loop.thermostat.level(loop.state))
    assert targets == [2.0, 1.75, 1.5, 1.25, 1.0]


def readings(loop, *values):
    for value in values:
        loop.regulate(EntropyReading(10 * value, 10.0), act=True)


def test_a_knob_at_its_bound_for_fifty_steps_is_a_warning(caplog):
    loop = ControlLoop(compose(HELD, controller="sign_step:step=1.0"))
    readings(loop, *[0.5] * 50)
    assert not caplog.records
    readings(loop, *[0.5] * 2)
    assert ["knob zeta has been at its upper bound 1 for 50" in r.getMessage() for r in caplog.records] == [True]


def test_the_cut_out_is_told_once_and_is_in_the_row(caplog):
    loop = ControlLoop(compose("loop", knob="zeta", target="1.0", every=1))
    marks = []
    for mean in (1.0, 1.6, 1.7, 1.2, 1.6):
        before = loop.state
        loop.regulate(EntropyReading(mean * 8, 8.0), act=True)
        marks.append(
            loop.row(TokenSums(*[0.0] * len(TokenSums._fields)), EntropyReading(8.0, 8.0), before).get("knob/cut_out")
        )
    assert marks == [None, None, 1, 1, None]
    told = [record.message for record in caplog.records if "is kept from raising it" in record.message]
    assert len(told) == 2
    assert told[0].startswith(
        "entropy is 1.600 nats per token, above 1.5 x both its target and its first reading: zeta"
    )


def test_the_count_of_steps_at_a_bound_is_saved(caplog):
    loop, second = (ControlLoop(compose(HELD, controller="sign_step:step=1.0")) for _ in range(2))
    readings(loop, *[0.5] * 30)
    second.restore(json.loads(json.dumps(loop.as_dict())))
    assert second.watched == loop.watched
    readings(second, *[0.5] * 22)
    assert "for 50 optimizer steps" in caplog.text


def test_a_target_above_log_of_the_vocabulary(caplog):
    with pytest.raises(ValueError, match=r"below log of the vocabulary, 2.079 nats for 8 tokens, got 2.5"):
        ControlLoop(compose(HELD, target="2.5"), vocabulary=8)
    loop = ControlLoop(compose(HELD, target="150%", initial_readings=2), vocabulary=8)
    readings(loop, 1.5, 1.5)
    assert "target 150% of the measured start is out of reach" in caplog.text
    assert "got 2.25" in caplog.text


def test_a_controller_outside_the_range_is_clipped_and_one_without_a_number_is_refused():
    loop = ControlLoop(HELD)
    loop.state = loop.state._replace(controller=loop.state.controller._replace(value=9.0))
    assert (loop.value, loop.recipe_now.number("zeta")) == (1.0, 1.0)
    loop.state = loop.state._replace(controller=loop.state.controller._replace(value=float("nan")))
    with pytest.raises(ValueError, match="controller of zeta asks for nan"):
        loop.value  # noqa: B018


def test_what_a_checkpoint_may_hold(caplog):
    loop = ControlLoop(HELD)
    readings(loop, 0.5)
    saved = json.loads(json.dumps(loop.as_dict()))
    narrow = ControlLoop(compose(HELD, knob_low=-0.05, knob_high=0.05))
    narrow.restore({**saved, "refused": 10})
    assert (narrow.value, narrow.refused) == (0.05, 0)
    with pytest.raises(
        ValueError, match=r"no state that controller sign_step:step=0.1 can continue from .*start a new"
    ):
        ControlLoop(HELD).restore({**saved, "state": {**saved["state"], "controller": {"integral": 1.0}}})
    ControlLoop(HELD).restore({**saved, "state": None})
    assert "saved without control: the controller starts anew" in caplog.text
