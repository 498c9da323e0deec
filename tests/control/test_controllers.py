"""Controllers: numbers worked by hand, bounds, and what they have in common."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isentropic.control.controllers import (
    CONTROLLERS,
    Range,
    double_halve,
    gated_step,
    multiplicative,
    parse_controller,
    pi,
    predictive,
    schedule,
    sign_step,
    switch,
)
from isentropic.control.predictive import Filter, Forecast, PredictiveState, plan

WIDE = Range(start=0.1, low=-1.0, high=1.0, least=0.01)
BELOW, ABOVE, TARGET = 0.5, 2.0, 1.0
NONE = Forecast(0.0, 0.0, 0, 1, 1.0)


def more(controller, sign=1):
    """What a controller that forecasts is told beside the reading."""
    return (Forecast(-0.001, 0.005 * sign, 1, 1, 1.0),) if controller.forecasts else ()


def run(controller, *entropies, sign=1):
    state = controller.init()
    values = []
    for entropy in entropies:
        state = controller.update(state, entropy, TARGET, *more(controller, sign))
        values.append(state.value)
    return values


def test_double_halve_takes_18_updates_from_bound_to_bound():
    # 0.05 halves to 0.05/2^8 = 1.95e-4 in 8 updates; the 9th would pass 1e-4 and flips to -1e-4; nine doublings of 1e-4
    # reach 0.0512, held at 0.05: 18 in all.
    values = run(double_halve(Range(0.05, -0.05, 0.05, 1e-4)), *[ABOVE] * 18)
    assert values[7] == pytest.approx(0.05 / 256)
    assert values[8] == -1e-4
    assert values[17] == -0.05
    assert values[16] > -0.05


def test_double_halve_of_a_negative_knob_halves_below_and_doubles_above():
    controller = double_halve(Range(-0.02, -0.05, 0.05, 1e-4))
    assert run(controller, BELOW, ABOVE, ABOVE) == [-0.01, -0.02, -0.04]


def test_double_halve_stays_positive_where_the_range_does():
    assert run(double_halve(Range(0.02, 0.0, 0.1, 0.01)), ABOVE, ABOVE, BELOW) == [0.01, 0.01, 0.02]


def test_multiplicative_by_hand():
    assert run(multiplicative(Range(0.28, 0.1, 0.3), 0.05), BELOW, BELOW) == pytest.approx([0.294, 0.3])
    assert run(multiplicative(Range(0.28, 0.1, 0.3), 0.05), ABOVE) == pytest.approx([0.28 / 1.05])


def test_sign_step_by_hand():
    assert run(sign_step(WIDE, 0.25), BELOW, ABOVE, ABOVE, TARGET) == pytest.approx([0.35, 0.1, -0.15, -0.15])


def test_gated_step_is_off_above_the_target():
    assert run(gated_step(Range(0.01, 0.0, 0.1), 0.01), BELOW, ABOVE, BELOW) == pytest.approx([0.02, 0.0, 0.02])


def test_gated_step_is_on_below_and_off_at_the_target_whatever_the_sign():
    # Below, the knob is its coefficient; at and above, it is at rest, while the coefficient goes on by itself.
    for sign, rest in ((1, 0.0), (-1, 0.1)):
        gated = gated_step(Range(0.05, 0.0, 0.1, 1e-3, sign), 0.01)
        state = gated.update(gated.init(), BELOW, TARGET)
        assert state == pytest.approx((0.05 + 0.01 * sign, 0.05 + 0.01 * sign))
        assert gated.update(state, TARGET, TARGET) == pytest.approx((rest, 0.05 + 0.01 * sign))
        assert gated.update(state, ABOVE, TARGET) == pytest.approx((rest, 0.05))


def test_gated_step_rests_where_the_knob_does_nothing():
    # STARE: W from 1.1 by 0.01 while entropy is below its target, else out of force at 1.
    stare = gated_step(Range(1.1, 1.0, 1.5, 1.0, rest=1.0), 0.01)
    assert stare.init().value == 1.0
    assert run(stare, BELOW, ABOVE, BELOW) == pytest.approx([1.11, 1.0, 1.11])
    # EntroPIC's weight lowers entropy as it grows, and rests at 0, not at a bound.
    assert run(gated_step(Range(0.0, -1.0, 1.0, 1e-3, -1, rest=0.0), 0.1), BELOW, ABOVE) == pytest.approx([-0.1, 0.0])
    assert Range(0.2, 0.1, 0.4, sign=-1).neutral() == 0.4


def test_switch_by_hand():
    assert run(switch(WIDE, 0.1), 0.8, 0.95, 1.05, 1.2) == [1.0, 0.0, 0.0, -1.0]
    lowers = switch(Range(0.0, -1.0, 0.5, 0.01, -1, rest=0.0), 0.0)
    assert run(lowers, BELOW, TARGET, ABOVE) == [-1.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="width must be >= 0"):
        switch(WIDE, -0.1)


def test_schedules_by_hand():
    knob = Range(0.0, -1.0, 2.0)
    assert run(schedule(knob, "up_down", 4), *[TARGET] * 5) == pytest.approx([1.0, 2.0, 1.0, 0.0, 0.0])
    # −sin 3πx at ⅙, ⅓, ½, ⅔, ⅚: down, through the start, up, and down again.
    assert run(schedule(knob, "down_up_down", 6), *[BELOW] * 6) == pytest.approx([-1, 0, 2, 0, -1, 0], abs=1e-12)
    # (1 − x)·sin 6πx at 1/12, 3/12, …: swings of ever less.
    swings = run(schedule(knob, "oscillate", 12), *[ABOVE] * 12)[0:12:2]
    assert swings == pytest.approx([2 * 11 / 12, -9 / 12, 2 * 7 / 12, -5 / 12, 2 * 3 / 12, -1 / 12], abs=1e-12)
    # A knob that lowers entropy is turned the other way.
    assert run(schedule(Range(0.3, 0.1, 0.9, 0.1, -1), "up_down", 4), TARGET, TARGET) == pytest.approx([0.2, 0.1])
    assert parse_controller("schedule:shape=oscillate:steps=8", knob).init().value == 0.0
    with pytest.raises(ValueError, match="did you mean oscillate"):
        parse_controller("schedule:shape=oscilate", knob)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        parse_controller("schedule:steps=0", knob)


def test_pi_by_hand():
    # span 2; e = 0.5: value = 0.1 + 2 (0.2·0.5 + 0.1·0.5) = 0.4; again: 0.1 + 2 (0.1 + 0.1·1.0) = 0.5.
    assert run(pi(WIDE, 0.2, 0.1), BELOW, BELOW) == pytest.approx([0.4, 0.5])


def test_pi_goes_softer_the_more_readings_it_waited_for():
    # gain 0.5 and 101 readings: f = 1 + 0.06·0.5·100 = 4, the sum gets 101·0.1/(4·7/4) = 1.442857.
    controller = pi(Range(0.0, -1.0, 1.0), 0.5, 0.01)
    state = controller.update(controller.init(), 0.9, TARGET, 101)
    assert state == pytest.approx((2 * (0.125 * 0.1 + 0.01 * 10.1 / 7), 10.1 / 7))
    # One reading, or none counted: the gains as they are.
    assert controller.update(state, 0.9, TARGET, 1) == controller.update(state, 0.9, TARGET)
    assert controller.counts
    assert not controller.forecasts
    # A delay of 100 steps softens one reading as much.
    late = pi(Range(0.0, -1.0, 1.0), 0.5, 0.01, delay=100)
    assert late.update(late.init(), 0.9, TARGET) == pytest.approx((2 * (0.125 * 0.1 + 0.01 * 0.1 / 7), 0.1 / 7))


def test_pi_lets_its_sum_grow_by_the_learning_rate_alone():
    controller = pi(Range(0.0, -1.0, 1.0), 0.5, 0.01)
    state = controller.update(controller.init(), 0.9, TARGET, 0.25)
    assert state == pytest.approx((2 * (0.5 * 0.1 + 0.01 * 0.025), 0.025))


def test_pi_does_not_wind_up():
    controller = pi(WIDE, 0.0, 0.5)
    state = controller.init()
    for _ in range(1000):
        state = controller.update(state, BELOW, TARGET)
    assert state.value == 1.0
    # Two readings at -e undo what two at +e did: the bound is left at once.
    state = controller.update(state, 1.5, TARGET)
    assert state.value < 1.0


def plant(controller, steps=400, *, slope=7.0, gain=1e-3, fall=-1e-4, noise=0.05, unexplained=-5e-4, seed=0):
    """An entropy that answers the knob through a slope the controller is not told, read with noise."""
    rng, entropy, state, rows = random.Random(seed), 1.2, controller.init(), []
    for _ in range(steps):
        seen = entropy * (1 + noise * rng.gauss(0, 1))
        rows.append((entropy, seen, state.value))
        change = fall + gain * state.value
        entropy += slope * change + unexplained
        forecast = (Forecast(change, gain, 1, 1, 1.0),) if controller.forecasts else ()
        state = controller.update(state, seen, TARGET, *forecast)
    return rows, state


def rms(values):
    return math.sqrt(sum(v * v for v in values) / len(values))


@pytest.mark.parametrize("slope", [0.7, 7.0, 70.0])
def test_predictive_needs_no_gain_for_plants_a_hundredfold_apart(slope):
    # The fall without control scales along, so that every plant can be held.
    rows, _ = plant(predictive(Range(0.0, -1.0, 1.0)), 2000, slope=slope, unexplained=-7e-5 * slope)
    assert rms([entropy - TARGET for entropy, *_ in rows[1000:]]) < 0.03
    # Both parts of the fall are there in the end: s·p₀ + d = slope·(−1e-4) + unexplained, over the whole of it.
    knobs = [knob for *_, knob in rows[1000:]]
    assert sum(knobs) / len(knobs) == pytest.approx(0.1 + 0.07, abs=0.03)


def test_predictive_beats_pi_on_a_plant_whose_slope_neither_knows():
    knob = Range(0.0, -1.0, 1.0)
    ours, theirs = (
        [rms([h - TARGET for h, *_ in plant(make(knob), seed=seed)[0][150:]]) for seed in range(8)]
        for make in (predictive, pi)
    )
    assert sum(ours) < 0.9 * sum(theirs)


def told(change, gain, n=1, time=None):
    """A forecast of n steps, each of which was predicted."""
    return Forecast(n * change, n * gain, n, n, float(n if time is None else time))


def test_predictive_solves_for_the_knob_by_hand():
    # The first guess of the slope for gain 0.0005 over a span of 20 at target 1: 0.01·1/(0.0005·20) = 1, twice as
    # doubtful as large. Ĥ = 1 − 0.001; the horizon is (5 + 1)·(1 + 4).
    controller = predictive(Range(0.0, -10.0, 10.0), delay=0)
    state = controller.update(controller.init(), 1.0, 1.0, told(-0.001, 0.0005))
    one = state.best()
    assert (one.slope, one.entropy) == pytest.approx((1.0, 0.999))
    doubt = 1 + one.ss
    assert doubt == pytest.approx(1 + 4 + 0.02**2)
    assert state.value == pytest.approx((0.001 / (6 * doubt) + 0.001) / 0.0005)
    # A fall that the knob cannot make good: at its bound.
    assert controller.update(controller.init(), 1.0, 1.0, told(-0.01, 0.0005)).value == 10.0


def test_predictive_counts_the_steps_of_an_update_in_its_horizon():
    # Four steps at a time: Ĥ = 1 − 0.004, the error of which is to be gone in 5 + 4 steps.
    controller = predictive(Range(0.0, -10.0, 10.0), delay=0)
    state = controller.update(controller.init(), 1.0, TARGET, told(-0.001, 0.0005, 4))
    one = state.best()
    assert (one.entropy, state.base, state.gain) == pytest.approx((0.996, -0.001, 0.0005))
    assert state.value == pytest.approx((0.004 / (9 * (1 + one.ss)) + 0.001) / 0.0005)


def test_predictive_knows_the_knobs_that_have_yet_to_act():
    # A delay of 2: the knobs of the last two steps act in the next two, and the new one meets the entropy after them.
    controller = predictive(Range(0.0, -10.0, 10.0), delay=2)
    state = controller.init()
    assert state.past == (0.0, 0.0)
    state = controller.update(state._replace(value=1.0), 1.0, TARGET, told(0.0005, 0.0005))
    assert state.past == (0.0, 1.0)
    one = state.best()
    assert one.entropy == pytest.approx(1.0)  # nothing has acted yet
    error = 0.0005 * 1.0
    assert state.value == pytest.approx(-error / ((5 + 1 + 1) * (1 + one.ss)) / 0.0005)


def test_predictive_moves_its_estimates_by_the_delayed_knob():
    # Readings 1 to 3 of an update come after knobs 3 and 2 steps older than it: 4 and 2, and then its own, 1.
    controller = predictive(Range(0.0, -10.0, 10.0), delay=2)
    state = controller.update(controller.init(), 1.0, TARGET, told(0.0, 0.0005))
    start = state.best().entropy
    state = state._replace(past=(4.0, 2.0), value=1.0)
    after = controller.update(state, start + 0.0005 * (2 * 4 + 1 * 2) / 3, TARGET, told(0.0005, 0.0005, 3))
    assert after.past == (1.0, 1.0)
    # The reading is what was expected, their mean over three steps: nothing is learned, and all three act.
    assert after.best().slope == pytest.approx(1.0)
    assert after.best().entropy == pytest.approx(start + 0.0005 * (4 + 2 + 1))


def matrix(one):
    import numpy as np

    return np.array([[one.hh, one.hs, one.hd], [one.hs, one.ss, one.sd], [one.hd, one.sd, one.dd]])


def test_predictive_filters_as_the_matrices_do():
    import numpy as np

    rng, controller = random.Random(0), predictive(Range(0.2, -1.0, 1.0), delay=0)
    state = controller.update(controller.init(), 1.0, TARGET, told(-0.001, 0.005, 2))
    for n, time in ((1, 1.0), (3, 3.0), (1, 0.5), (8, 2.0), (2, 0.0)):
        before, old = state, state.best()
        seen = old.entropy + 0.02 * rng.gauss(0, 1)
        state = controller.update(before, seen, TARGET, told(-0.001 * time / n, 0.005 * time / n, n, time))
        one = state.best()
        change = time * (state.base + state.gain * before.value)
        row = np.array([1.0, change * (n - 1) / (2 * n), time * (n - 1) / (2 * n)])
        estimate, covariance = np.array([old.entropy, old.slope, old.drift]), matrix(old)
        total = row @ covariance @ row + old.noise
        share = covariance @ row / total
        estimate = estimate + share * (seen - row @ estimate)
        covariance = covariance - np.outer(share, row @ covariance)
        move = np.array([[1.0, change, time], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        wander = 0.02 * max(abs(estimate[1]), 0.1 * state.unit)
        spread = time * np.diag([1e-2**2, wander**2, 2e-4**2])
        assert matrix(one) == pytest.approx(move @ covariance @ move.T + spread, rel=1e-9)
        assert (one.entropy, one.slope, one.drift) == pytest.approx(tuple(move @ estimate))


def test_predictive_does_not_make_good_an_authority_that_the_learning_rate_takes():
    # A hundredth of the rate: a hundredth of the change and of the gain. Per step at the full rate nothing is new, and
    # the knob for an error is the same but for a horizon of 5.01 and not 6 steps.
    controller = predictive(Range(0.0, -10.0, 10.0), delay=0)
    full = controller.update(controller.init(), 1.1, TARGET, told(-0.001, 0.0005))
    late = controller.update(controller.init(), 1.1, TARGET, told(-0.00001, 0.000005, 1, 0.01))
    assert (late.base, late.gain) == pytest.approx((full.base, full.gain))
    assert late.best().entropy == pytest.approx(1.1 - 0.00001)
    assert late.value == pytest.approx((-0.09999 / (5.01 * (1 + late.best().ss)) + 0.001) / 0.0005)


def test_predictive_learns_nothing_of_the_knob_while_the_learning_rate_is_0():
    controller = predictive(Range(0.0, -1.0, 1.0))
    state = controller.update(controller.init(), 1.0, TARGET, told(0.0, 0.0, 1, 0.0))
    assert (state.updates, state.gain) == (0, 0.005)  # the guess
    state = controller.update(state, 1.0, TARGET, told(-1e-6, 5e-6))
    assert (state.updates, state.gain, state.best().slope) == pytest.approx((1, 5e-6, 0.01 / 1e-5))


@pytest.mark.parametrize("delay", [0, 4, 16])
def test_predictive_finds_the_delay(delay):
    rng, controller = random.Random(delay), predictive(Range(0.0, -1.0, 1.0))
    state, entropy, waiting = controller.init(), 1.1, [0.0] * delay
    for _ in range(300):
        waiting.append(state.value + 0.5 * rng.gauss(0, 1))  # what shakes the knob is known to the controller
        state = state._replace(value=waiting[-1])
        seen = entropy * (1 + 0.01 * rng.gauss(0, 1))
        entropy += 0.02 * waiting.pop(0) - 0.002
        state = controller.update(state, seen, TARGET, told(0.02 * state.value / 3, 0.02 / 3))
    assert state.best().delay == delay


def test_predictive_weighs_the_delays_by_their_evidence():
    # Entropies of 0.9 and 1.06 under the delays 0 and 2, neither of them in doubt: knobs of 0.1/6/0.05 and
    # −0.06/7/0.05, three to one.
    sure = {"hh": 0.0, "hs": 0.0, "hd": 0.0, "ss": 0.0, "sd": 0.0, "dd": 0.0, "noise": 1.0}
    filters = (
        Filter(0, 0.9, 1.0, 0.0, evidence=-5.0, **sure),
        Filter(2, 1.06, 1.0, 0.0, evidence=-5.0 - math.log(3), **sure),
    )
    state = PredictiveState(0.0, (0.0, 0.0), filters, gain=0.05, unit=1.0)
    value = plan(state, TARGET, Forecast(0.0, 0.0, 0, 1, 1.0), WIDE.clip)
    assert value == pytest.approx(0.75 * 0.1 / 6 / 0.05 - 0.25 * 0.06 / 7 / 0.05)


@pytest.mark.parametrize("trust", [math.inf, 25.0])
def test_a_doubtful_slope_turns_the_knob_the_other_way_unless_trust_is_bounded(trust):
    # A slope of 0 counts as 0.1, whose doubt is (1/0.1)² = 100. Above the target the long horizon alone brakes a fall
    # of 0.002, by a knob of (−0.05/6/101 + 0.002)/0.1/0.05; a slope without doubt asks for a faster fall.
    doubtful = {"hh": 0.0, "hs": 0.0, "hd": 0.0, "ss": 1.0, "sd": 0.0, "dd": 0.0, "noise": 1.0}
    brake = (-0.05 / 6 / 101 + 0.002) / 0.1 / 0.05
    push = (0.05 / 6 / 101 + 0.002) / 0.1 / 0.05
    for entropy, knob in ((1.05, brake if trust == math.inf else 0.0), (0.95, push)):
        one = Filter(0, entropy, 0.0, -0.002, evidence=0.0, **doubtful)
        state = PredictiveState(0.0, (), (one,), gain=0.05, unit=1.0)
        assert plan(state, TARGET, Forecast(0.0, 0.0, 0, 1, 1.0), WIDE.clip, trust=trust) == pytest.approx(knob)
    with pytest.raises(ValueError, match="trust must be > 0, got 0"):
        predictive(WIDE, trust=0)


def test_noise_above_a_floor_does_not_turn_the_knob_with_a_bounded_trust():
    """Predictions that explain nothing: entropy stays 60 % above its floor, and there is nothing to hold."""
    turned = {}
    for trust in (math.inf, 25.0):
        tops = []
        for seed in range(20):
            rng, controller = random.Random(seed), predictive(Range(0.0, 0.0, 1.0, one_way=True), trust=trust)
            state, entropy, values = controller.init(), 0.56, []
            for _ in range(120):
                entropy += 0.3 * (0.58 - entropy) + rng.gauss(0, 0.015)
                state = controller.update(state, entropy, 0.345, told(rng.gauss(0, 4e-6), abs(rng.gauss(1e-5, 6e-6))))
                values.append(state.value)
            tops.append(max(values[10:]))
        turned[trust] = sum(top > 0.1 for top in tops)
    assert turned[25.0] == 0
    assert turned[math.inf] > 5


def test_predictive_restarts_after_a_jump():
    controller = predictive(Range(0.0, -1.0, 1.0))
    _, state = plant(controller, 200)
    jumped = controller.update(state, 3.0, TARGET, told(-1e-4, 1e-3))
    assert jumped.best().entropy == pytest.approx(3.0, abs=0.05)
    before, after = ({one.delay: one.slope for one in at.estimates()} for at in (state, jumped))
    assert after == pytest.approx(before, rel=0.05)
    assert [one.noise for one in jumped.estimates()] == [one.noise for one in state.estimates()]


def test_predictive_holds_its_estimate_where_a_forecast_is_missing():
    controller = predictive(Range(0.0, -1.0, 1.0))
    state = controller.update(controller.init(), 1.0, TARGET, told(-1e-3, 5e-3))
    after = controller.update(state, 1.0, TARGET, NONE)
    assert (after.base, after.gain, after.unit) == (state.base, state.gain, state.unit)


def test_predictive_without_any_forecast_goes_by_sign_and_first_guess():
    # g = sign · 0.01 · H* / 2 and p₀ = 0: the error of 0.01 is to be gone in 6 steps, times 5 for the doubt.
    for sign in (1, -1):
        controller = predictive(Range(0.0, -1.0, 1.0, sign=sign), delay=0)
        state = controller.update(controller.init(), 0.99, TARGET, NONE)
        assert state.value == pytest.approx(sign * 0.01 / 30 / 0.005, rel=1e-3)
        assert (state.updates, state.best().slope) == (0, 1.0)
        # The whole range does four times as much as was guessed, which the filter finds from readings alone.
        state, entropy = controller.init(), 0.8
        for step in range(200):
            state = controller.update(state, entropy, TARGET, NONE)
            entropy += 0.02 * sign * state.value + (0.005 if step % 50 < 25 else -0.005)
        assert state.best().slope > 1.4


def test_the_first_forecast_restarts_the_filter_on_its_own_scale():
    controller = predictive(Range(0.0, -1.0, 1.0))
    state = controller.init()
    for _ in range(9):
        state = controller.update(state, 0.9, TARGET, NONE)
    assert state.updates == 0
    first = controller.update(state, 0.9, TARGET, told(-1e-3, 5e-5))
    fresh = controller.init()._replace(value=state.value, past=state.past)
    assert list(flat(first)) == pytest.approx(list(flat(controller.update(fresh, 0.9, TARGET, told(-1e-3, 5e-5)))))
    # The mean is over forecasts, not over updates: the tenth reading is the first of them.
    assert first.gain == pytest.approx(5e-5)


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_controller_moves_the_right_way_and_stays_inside(name, sign):
    knob = Range(0.3, 0.1, 0.9, 0.1, sign)
    controller = CONTROLLERS[name](knob)
    low = run(controller, *[BELOW] * 200, sign=sign)
    high = run(controller, *[ABOVE] * 200, sign=sign)
    assert all(knob.low <= value <= knob.high or value == 0.1 for value in low + high)
    if name not in ("fixed", "schedule"):  # these two go by no reading
        assert (low[-1] - high[-1]) * sign > 0
        assert {low[-1], high[-1]} == {0.1, 0.9}


def flat(numbers):
    """The numbers of nested tuples."""
    for x in numbers:
        yield from flat(x) if isinstance(x, tuple) else (x,)


@given(st.sampled_from(sorted(CONTROLLERS)), st.lists(st.floats(0.01, 10), max_size=40))
def test_states_are_plain_numbers_and_values_stay_inside(name, entropies):
    controller = CONTROLLERS[name](WIDE)
    state = controller.init()
    for entropy in entropies:
        state = controller.update(state, entropy, TARGET, *more(controller))
        assert WIDE.low <= state.value <= WIDE.high
    assert all(isinstance(x, float | int) and math.isfinite(x) for x in flat(state))
    assert type(state)(**state._asdict()) == state


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("p", "controller must be one of"),
        ("pi:gian=1", "got 'gian'"),
        ("pi:gain=x", "must be a number"),
        ("pi:gain", "must be a number"),
        ("pi:gain=nan", "gain must be a finite number, got 'nan'"),
        ("pi:integral_gain=inf", "integral_gain must be a finite number, got 'inf'"),
        ("pi:gain=-1", "gains must be >= 0, finite and not both 0, got -1.0"),
        ("pi:gain=0:integral_gain=0", "not both 0"),
        ("pi:gain=1:gain=2", "given twice"),
        ("sign_step:step=-1", "step must be > 0"),
        ("sign_step:step=1e999", "must be a finite number"),
        ("gated_step:step=-inf", "must be a finite number"),
        ("multiplicative:rate=0", "rate must be > 0"),
        ("switch:width=-1", "width must be >= 0"),
        ("schedule:steps=-5", "steps must be >= 1"),
    ],
)
def test_bad_controllers_are_named(text, says):
    with pytest.raises(ValueError, match=says) as refused:
        parse_controller(text, WIDE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_numbers_from_python_are_checked_too(bad):
    makers = (
        pi,
        lambda k, x: pi(k, 1.0, x),
        lambda k, x: pi(k, delay=x),
        lambda k, x: predictive(k, delay=x),
        multiplicative,
        sign_step,
        switch,
        lambda k, x: schedule(k, "up_down", x),
    )
    for make in makers:
        with pytest.raises(ValueError, match=r"finite|>= 1"):
            make(WIDE, bad)


@pytest.mark.parametrize(
    "knob",
    [
        Range(0, 1, 0),
        Range(2, 0, 1),
        Range(0.5, 0, 1, least=0),
        Range(0.5, 0, 1, sign=2),
        Range(math.nan, 0, 1),
        Range(0, 0, math.inf),
        Range(0, -math.inf, 1),
    ],
    ids=str,
)
def test_bad_ranges_are_refused(knob):
    with pytest.raises(ValueError, match="knob"):
        pi(knob)


def test_a_target_of_zero_is_refused():
    controller = pi(WIDE)
    with pytest.raises(ValueError, match="target must be > 0"):
        controller.update(controller.init(), 0.5, 0.0)


def test_predictive_averages_predictions_over_twenty_readings():
    controller = predictive(Range(0.0, -1.0, 1.0))
    state = controller.init()
    for _ in range(30):
        state = controller.update(state, 1.0, 1.0, told(0.0, 0.5))
    assert state.gain == pytest.approx(0.5)
    assert controller.update(state, 1.0, 1.0, told(0.0, 1.5)).gain == pytest.approx(0.5 + 1 / 20)
