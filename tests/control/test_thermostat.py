"""The closed loop: when it acts, what it refuses, and that its state survives JSON."""

import json
import random
from types import SimpleNamespace

import pytest

from isentropic.control.controllers import CONTROLLERS, Controller, Range, fixed, pi, predictive, sign_step
from isentropic.control.predictive import Forecast
from isentropic.control.targets import parse_target
from isentropic.control.thermostat import thermostat, to_json
from isentropic.types import EntropyReading

KNOB = Range(0.0, -1.0, 1.0)


def loop(target="1.0", every=None):
    return thermostat(sign_step(KNOB, step=0.1), parse_target(target), every)


def reading(mean, count=10.0):
    return EntropyReading(mean * count, count)


def test_acts_on_the_token_weighted_mean_since_it_last_acted():
    t = loop()
    # 0.5 over 30 tokens and 1.8 over 10 have the mean 0.825 < 1, though the last reading alone is above the target.
    state = t.update(t.init(), reading(0.5, 30.0), act=False)
    assert state.value == 0.0
    assert t.update(state, reading(1.8, 10.0), act=True).value == pytest.approx(0.1)


def test_every_counts_readings_and_ignores_the_caller():
    t = loop(every=3)
    state, values = t.init(), []
    for _ in range(6):
        state = t.update(state, reading(0.5), act=False)
        values.append(round(state.value, 6))
    assert values == [0.0, 0.0, 0.1, 0.1, 0.1, 0.2]


def recorder(forecasts=True, counts=True):
    """A controller that moves nothing and writes down what it is told."""
    told = []

    def update(state, *what):
        told.append(what)
        return state

    return Controller(fixed(KNOB).init, update, forecasts, counts), told


def test_each_update_is_told_what_came_since_the_one_before_and_no_more():
    controller, told = recorder()
    t = thermostat(controller, parse_target("1.0"), every=2)
    state = t.init()
    readings = [(0.5, -0.1, 0.01, 1), (0.7, -0.3, 0.03, 1), (0.9, -0.5, 0.05, 1), (0.9, 9.0, 9.0, 0)]
    for mean, predicted, gain, steps in readings:
        state = t.update(state, reading(mean)._replace(predicted=predicted, gain=gain, steps=steps))
    (first, second) = told
    assert first[:2] == pytest.approx((0.6, 1.0))
    assert first[2] == pytest.approx(Forecast(-0.4, 0.04, 2, 2, 2))
    assert first[3] == 2
    # The mean of the last two alone, and their predictions alone: 8.5 and 9.05 are theirs, 1 step of the two had one.
    assert second[:2] == pytest.approx((0.9, 1.0))
    assert second[2] == pytest.approx(Forecast(8.5, 9.05, 1, 2, 2))
    assert second[3] == 2
    assert (state.sum, state.count, state.waited, state.predicted, state.gain, state.steps) == (0, 0, 0, 0, 0, 0)
    assert state.readings == 4


def test_what_was_read_while_the_start_was_measured_is_not_kept():
    controller, told = recorder()
    t = thermostat(controller, parse_target("initial"))
    state = t.update(t.init(), reading(1.0)._replace(predicted=-0.1, gain=0.1, steps=1))
    assert not told
    t.update(state, reading(0.8)._replace(predicted=-0.2, gain=0.2, steps=1))
    assert told == [(pytest.approx(0.8), 1.0, Forecast(-0.2, 0.2, 1, 1, 1), 1)]


def test_time_is_counted_in_the_largest_learning_rate_so_far():
    # 0 of nothing is no time; then 1, 1 (the largest so far) and half of it: 2.5 of four readings.
    controller, told = recorder()
    t = thermostat(controller, parse_target("1.0"), every=4)
    state = t.init()
    for rate in (0.0, 1e-4, 4e-4, 2e-4):
        state = t.update(state, reading(0.5)._replace(rate=rate))
    assert told == [(0.5, 1.0, Forecast(0, 0, 0, 4, 2.5), 2.5)]
    assert (state.rate, state.time) == (4e-4, 0.0)
    # A reading without a rate counts as one.
    for rate in (1e-4, None, 1e-4, 0.0):
        state = t.update(state, reading(0.5)._replace(rate=rate))
    assert told[1] == (0.5, 1.0, Forecast(0, 0, 0, 4, 1.5), 1.5)


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("every", [1, 3])
def test_a_constant_learning_rate_is_as_none(name, every):
    t = thermostat(CONTROLLERS[name](KNOB), parse_target("1.0"), every)
    with_rate = without = t.init()
    for i in range(60):
        one = reading(1.0 + 0.1 * (i % 7 - 3))._replace(predicted=-1e-3, gain=5e-3, steps=1)
        without = t.update(without, one)
        with_rate = t.update(with_rate, one._replace(rate=3e-4))
    assert with_rate == without._replace(rate=3e-4)


def test_a_controller_is_told_only_what_it_takes():
    for forecasts in (False, True):
        for counts in (False, True):
            controller, told = recorder(forecasts, counts)
            t = thermostat(controller, parse_target("1.0"))
            t.update(t.init(), reading(0.5))
            assert len(told[0]) == 2 + forecasts + counts


def test_pi_hears_how_many_readings_it_waited_for():
    t = thermostat(pi(KNOB), parse_target("1.0"), every=3)
    state = t.init()
    for _ in range(3):
        state = t.update(state, reading(0.99))
    alone = pi(KNOB)
    assert state.controller == pytest.approx(alone.update(alone.init(), 0.99, 1.0, 3))
    assert state.value < alone.update(alone.init(), 0.99, 1.0).value


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_prediction_that_is_not_finite_is_left_out(bad):
    t = thermostat(predictive(KNOB), parse_target("1.0"))
    good = reading(0.9)._replace(predicted=-1e-3, gain=5e-3, steps=1)
    before = t.update(t.init(), good)
    without = t.update(before, reading(0.9))
    assert t.update(before, good._replace(predicted=bad)) == without
    assert t.update(before, good._replace(gain=bad)) == without


@pytest.mark.parametrize("name", CONTROLLERS)
def test_whether_the_knob_follows_readings(name):
    t = thermostat(CONTROLLERS[name](Range(0.1, 0.0, 1.0)), parse_target("initial"))
    state = t.init()
    assert not t.steers(state)
    state = t.update(t.update(state, reading(1.0)), reading(0.9))
    assert t.steers(state) == (name not in ("fixed", "schedule"))
    band = thermostat(CONTROLLERS[name](Range(0.1, 0.0, 1.0)), parse_target("band:0.5:1.5"))
    assert not band.steers(band.update(band.init(), reading(1.0)))


@pytest.mark.parametrize(
    "bad", [reading(float("nan")), reading(float("inf")), EntropyReading(0, 0), reading(0.0), reading(-1)]
)
def test_a_refused_reading_moves_nothing(bad):
    t = loop()
    before = t.update(t.init(), reading(0.5))
    after = t.update(before, bad)
    assert after == before._replace(refused=1)
    assert t.update(after, reading(0.5)).refused == 0


def test_the_knob_is_held_while_the_start_is_measured():
    t = loop("initial")
    state = t.update(t.init(), reading(1.0))
    assert (state.value, t.level(state)) == (0.0, 1.0)
    assert t.update(state, reading(0.9)).value == 0.1


@pytest.mark.parametrize("name", CONTROLLERS)
def test_resumes_bit_for_bit_through_json(name):
    t = thermostat(CONTROLLERS[name](KNOB), parse_target("anneal:100%:50%:7"))
    straight = before = t.init()

    def step(state, i):
        one = reading(1.0 + 0.1 * (i % 3), 10.0 + i)._replace(
            predicted=-1e-3, gain=5e-3, steps=i % 2, rate=1 - 0.03 * i
        )
        return t.update(state, one, act=i % 4 == 3)

    for i in range(30):
        straight = step(straight, i)
        if i == 17:
            before = straight
    resumed = t.restore(json.loads(json.dumps(to_json(before))))
    assert resumed == before
    for i in range(18, 30):
        resumed = step(resumed, i)
    assert resumed == straight


def test_every_below_one_is_refused():
    with pytest.raises(ValueError, match="every must be >= 1"):
        loop(every=0)


def always_up(knob):
    """A controller that raises its knob, or lowers one that so raises entropy, whatever it reads."""
    base = sign_step(knob, step=0.3)
    return Controller(base.init, lambda state, entropy, target: base.update(state, 0.5, target))


@pytest.mark.parametrize(
    ("knob", "values"),
    [
        (KNOB, [0.3, 0.6, 0.0, 0.3]),
        (Range(0.5, 0.1, 2.0), [0.8, 1.1, 0.5, 0.8]),  # without a rest: its start
        (Range(0.5, 0.1, 2.0, sign=-1), [0.2, 0.1, 0.5, 0.2]),
    ],
)
def test_an_entropy_far_above_target_and_start_is_not_raised(knob, values):
    """The first reading is 1.2, the target 1.0: 1.79 is below 1.5 times the larger, 1.81 is above."""
    t = thermostat(always_up(knob), parse_target("1.0"), 1, knob)
    state, got, cut = t.init(), [], []
    for mean in (1.2, 1.79, 1.81, 1.79):
        state = t.update(t.restore(json.loads(json.dumps(to_json(state)))), reading(mean))
        got.append(state.value)
        cut.append(state.cut_out)
    assert got == pytest.approx(values)
    assert cut == [False, False, True, False]


def test_the_cut_out_leaves_a_schedule_and_a_lowering_knob_alone():
    down = thermostat(sign_step(KNOB, step=0.3), parse_target("1.0"), 1, KNOB)
    state = down.update(down.update(down.init(), reading(1.2)), reading(2.0))
    assert (state.value, state.cut_out) == (pytest.approx(-0.6), True)
    held = thermostat(fixed(Range(0.4, -1.0, 1.0)), parse_target("1.0"), 1, KNOB)
    state = held.update(held.update(held.init(), reading(1.2)), reading(2.0))
    assert (state.value, state.cut_out) == (0.4, False)
    plain = SimpleNamespace(value=0.4, _asdict=dict)
    own = thermostat(Controller(lambda: plain, lambda state, *_: state), parse_target("1.0"), 1, KNOB)
    state = own.update(own.update(own.init(), reading(1.2)), reading(2.0))
    assert (state.value, state.cut_out) == (0.4, False)  # a state that cannot be limited is not said to be
    free = thermostat(always_up(KNOB), parse_target("1.0"), 1)
    assert free.update(free.update(free.init(), reading(1.2)), reading(9.0)).value == pytest.approx(0.6)


@pytest.mark.parametrize("seed", range(10))
def test_a_strong_knob_whose_effect_is_not_known_is_cut_out(seed):
    """Predictions are noise, and the knob moves entropy twenty times as much as they say: it exploded without."""
    tops = {}
    for knob in (None, Range(0.0, 0.0, 1.0, one_way=True)):
        rng = random.Random(seed)
        t = thermostat(predictive(Range(0.0, 0.0, 1.0, one_way=True)), parse_target("0.345"), 1, knob)
        state, entropy, path = t.init(), 0.58, []
        for _ in range(300):
            gain, seen = abs(rng.gauss(1e-5, 5e-6)), entropy + rng.gauss(0, 0.02)
            predicted = rng.gauss(-1e-6, 4e-6) + gain * state.value
            entropy = max(0.02, entropy + 2e4 * gain * state.value - 5e-4 + rng.gauss(0, 0.005))
            state = t.update(state, reading(seen, 450.0)._replace(predicted=predicted, gain=gain, steps=1))
            path.append(entropy)
        tops[knob is None] = max(path)
    assert tops[False] <= tops[True]
    assert tops[False] < 1.6
