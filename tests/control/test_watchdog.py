"""The watchdog: how long a knob is at its bound, whether that helps, and what it says."""

import json
import random

import pytest

from isentropic.control.controllers import CONTROLLERS, Range, predictive
from isentropic.control.plant import Plant, run
from isentropic.control.watchdog import Watchdog, WatchdogState
from isentropic.types import EntropyReading

KNOB = Range(0.0, -1.0, 1.0)
LOWERS = Range(0.0, -1.0, 1.0, sign=-1)


def reading(mean, predicted=0.0, gain=0.0, steps=0):
    return EntropyReading(mean * 10, 10.0, predicted=predicted, gain=gain, steps=steps)


def watch(readings, knob=KNOB, target=1.0, value=1.0, patience=50):
    """(step, message) of everything that is said, steps from 1."""
    dog, state, said = Watchdog("zeta", knob, patience), WatchdogState(), []
    for step, one in enumerate(readings, 1):
        state = dog.update(state, one, target, value)
        if dog.message(state):
            said.append((step, dog.message(state)))
    return said


def test_fifty_steps_at_a_bound_are_said_and_then_ever_more_seldom():
    said = watch([reading(0.7)] * 450)
    assert [step for step, _ in said] == [50, 100, 200, 400]
    assert "knob zeta" in said[0][1]
    assert "upper bound 1 for 50 optimizer steps in a row" in said[0][1]
    assert "its target 1, and this bound does not raise it further" in said[0][1]
    assert "lower the target, widen the range by knob_high, or turn another knob" in said[0][1]
    assert "\n" not in said[0][1]


def test_the_way_out_names_the_bound():
    ((_, text),) = watch([reading(2.0)] * 50, value=-1.0)
    assert "lower bound -1" in text
    assert "raise the target, widen the range by knob_low" in text
    ((_, text),) = watch([reading(2.0)] * 50, LOWERS, value=1.0)
    assert "upper bound 1" in text
    assert "raise the target, widen the range by knob_high" in text
    # A multiplying controller cannot leave its least magnitude, which is its lower bound where the range is positive.
    assert watch([reading(2.0)] * 50, Range(0.1, 0.0, 1.0, 1e-3), value=1e-3)


@pytest.mark.parametrize(
    ("knob", "rest", "end"), [(KNOB, 0.0, 1.0), (LOWERS, 0.0, -1.0), (Range(1.1, 1.0, 1.5, 1.0), 1.0, 1.5)]
)
def test_a_knob_that_works_one_way_rests_at_the_other_bound(knob, rest, end):
    one_way = knob.raising()
    assert not one_way.saturated(rest)
    assert one_way.saturated(end)
    assert watch([reading(2.0)] * 60, one_way, value=rest) == watch([reading(0.5)] * 60, one_way, value=rest) == []
    assert [step for step, _ in watch([reading(0.7)] * 60, one_way, value=end)] == [50]


def test_a_stay_ends_where_the_knob_leaves_or_nothing_is_steered():
    dog = Watchdog("zeta", KNOB)
    state = WatchdogState()
    for _ in range(49):
        state = dog.update(state, reading(0.7), 1.0, 1.0)
    assert state.steps == 49
    assert dog.update(state, reading(0.7), 1.0, 0.9) == WatchdogState()
    assert dog.update(state, reading(0.7), None, 1.0) == WatchdogState()
    assert dog.update(state, reading(0.7), 1.0, -1.0).steps == 0  # it does not push against that one
    # A refused reading changes nothing, noise beyond the target ends nothing.
    assert dog.update(state, reading(float("nan")), 1.0, 1.0) == state
    assert dog.update(state, reading(1.1), 1.0, 1.0).steps == 50


def test_nothing_is_said_near_the_target_or_on_the_way_there():
    assert not watch([reading(0.96)] * 200)
    assert not watch([reading(0.3 + 0.01 * i) for i in range(70)])
    # 0.003 a step: about the last ten of 50 have a mean of 0.42, 193 steps from 1.
    ((_, text),) = watch([reading(0.3 + 0.003 * i) for i in range(60)])
    assert "about 193 more steps away" in text


def test_measured_against_predicted():
    # It falls by 0.01 a step, where a rise of 0.002 was predicted: said after 20 steps, and again after 50.
    said = watch([reading(0.9 - 0.01 * i, 0.002, 0.002, 1) for i in range(50)])
    assert [step for step, _ in said] == [20, 50]
    assert "falling although a change of +0.04 was predicted" in said[0][1]
    assert "has changed sign here" in said[0][1]
    assert "lower knob_high" in said[0][1]
    # Where the fall was predicted, the knob is too weak, or as far as readings say it has turned.
    ((step, text),) = watch([reading(0.9 - 0.01 * i, -0.002, 0.002, 1) for i in range(50)])
    assert step == 50
    assert "although this bound should raise it: the knob is too weak, or its effect has changed sign" in text


def test_the_declared_sign_is_enough_without_predictions():
    ((step, text),) = watch([reading(2.0 + 0.01 * i) for i in range(60)], LOWERS)
    assert step == 50
    assert "rising although this bound should lower it" in text
    assert "changed sign" in text


def test_predictions_that_turn_the_sign_are_believed():
    said = watch([reading(0.7, -0.001, -0.002, 1)] * 30)
    assert [step for step, _ in said] == [20]
    assert "opposite of its sign" in said[0][1]
    assert not watch([reading(0.7, -0.001, 0.002, 1)] * 30)
    assert not watch([reading(0.7, float("nan"), -0.002, 1)] * 30)


def test_the_rate_is_that_of_least_squares():
    rng = random.Random(0)
    values = [0.8 - 0.004 * i + 0.01 * rng.gauss(0, 1) for i in range(40)]
    state = WatchdogState()
    for value in values:
        state = Watchdog("zeta", KNOB).update(state, reading(value), 2.0, 1.0)
    slope, error = state.rate()
    n, mean = 40, sum(values) / 40
    spread = sum((i - 19.5) ** 2 for i in range(n))
    fit = sum((i - 19.5) * (v - mean) for i, v in enumerate(values)) / spread
    rest = sum((v - mean - fit * (i - 19.5)) ** 2 for i, v in enumerate(values))
    assert (slope, error) == pytest.approx((fit, (rest / 38 / spread) ** 0.5))


@pytest.mark.parametrize("name", ["pi", "predictive", "sign_step", "switch", "gated_step", "double_halve"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sign_that_turns_round_is_seen_under_every_controller(name, sign):
    knob = Range(0.0, -1.0, 1.0, 1e-3, sign)
    for plant in (Plant(turns_at=300), Plant(turns_at=300, authority=0.04, noise=0.05), Plant(0.04, forecast_every=0)):
        plant = plant._replace(turns_at=300)
        dog, state, said = Watchdog("zeta", knob), WatchdogState(), []
        for step, row in enumerate(run(CONTROLLERS[name], plant, knob, steps=500)):
            state = dog.update(state, row.reading, 1.0, row.knob)
            if dog.message(state):
                said.append((step, dog.message(state)))
        assert 300 < said[0][0] < 400
        assert "changed sign" in said[0][1]


@pytest.mark.parametrize("seed", range(5))
def test_a_plant_that_is_held_is_no_reason_to_warn(seed):
    rows = run(predictive, Plant(noise=0.05, wander=0.01), KNOB, seed=seed)
    dog, state = Watchdog("zeta", KNOB), WatchdogState()
    for row in rows:
        state = dog.update(state, row.reading, 1.0, row.knob)
        assert dog.message(state) is None
    assert WatchdogState(**json.loads(json.dumps(state._asdict()))) == state


def test_a_fresh_state_remembers_nothing():
    assert set(WatchdogState()._replace(next=0)) == {0}
