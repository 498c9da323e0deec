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
from isentropic.control.predictive import Forecast

WIDE = Range(start=0.1, low=-1.0, high=1.0, least=0.01)
BELOW, ABOVE, TARGET = 0.5, 2.0, 1.0


def more(controller, sign=1):
    """What a controller that forecasts is told beside the reading."""
    return (Forecast(-0.001, 0.005 * sign, 1, 1),) if controller.forecasts else ()


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
        forecast = (Forecast(change, gain, 1, 1),) if controller.forecasts else ()
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


def test_predictive_solves_for_the_knob_without_noise():
    # Two steps by hand: slope 1 is the first guess for gain 0.005 over a span of 2 at target 1 (0.01·1/(0.005·2)).
    controller = predictive(Range(0.0, -10.0, 10.0))
    state = controller.update(controller.init(), 1.0, 1.0, Forecast(-0.01, 0.0005, 1, 1))
    assert state.slope == pytest.approx(0.01 / (0.0005 * 20))
    # Ĥ = 1 − 0.01; wanted 0.01/8 + 0.01 over the gain 0.0005: 22.5, cut at the bound
    assert state.entropy == pytest.approx(0.99)
    assert state.value == 10.0
    state = controller.update(controller.init(), 1.0, 1.0, Forecast(-0.001, 0.0005, 1, 1))
    assert state.value == pytest.approx((0.001 / 8 + 0.001) / 0.0005)


def test_predictive_counts_the_steps_of_an_update_in_what_it_wants():
    # Four steps at a time: Ĥ = 1 − 0.004; the change wanted over the next four is 0.004·4/8 against the target and
    # 4·0.001 against the fall, and they turn the knob for 4·0.0005 each.
    controller = predictive(Range(0.0, -10.0, 10.0))
    state = controller.update(controller.init(), 1.0, TARGET, Forecast(-0.004, 0.002, 4, 4))
    assert (state.entropy, state.base, state.gain) == pytest.approx((0.996, -0.001, 0.0005))
    assert state.value == pytest.approx((0.004 * 4 / 8 + 4 * 0.001) / (4 * 0.0005))
    # More than the horizon: all of the error is to be gone.
    state = controller.update(controller.init(), 1.0, TARGET, Forecast(-0.016, 0.008, 16, 16))
    assert state.value == pytest.approx((0.016 + 16 * 0.001) / (16 * 0.0005))


def test_predictive_counts_the_steps_in_the_drift_that_it_found():
    controller = predictive(Range(0.0, -10.0, 10.0))
    state = controller.init()
    for entropy in (1.0, 0.99, 0.98):  # and nothing but the knob is predicted to move it
        state = controller.update(state, entropy, TARGET, Forecast(0.002 * state.value, 0.002, 4, 4))
    assert state.base == pytest.approx(0.0)
    assert state.drift < -1e-4
    assert state.value < 10.0
    wanted = (TARGET - state.entropy) * 4 / 8 - 4 * state.drift
    assert state.value == pytest.approx(wanted / (4 * state.slope * 0.0005))


def test_predictive_advances_its_covariance_by_hand():
    # After the first reading the knob is at 0.5: a step is predicted to do x = −0.001 + 0.004·0.5 = 0.001, four 0.004.
    knob = Range(0.5, -1.0, 1.0)
    controller = predictive(knob)
    state = controller.update(controller.init(), 1.0, TARGET, Forecast(0.004, 0.016, 4, 4))
    unit, n, x = 0.01 / (0.004 * 2), 4, 0.004
    slope_var, drift_var, noise = unit**2, 2e-3**2, 0.05**2
    # P ← F P Fᵀ + Q with F = [[1, x, n], [0, 1, 0], [0, 0, 1]] and P diagonal.
    assert state.entropy_slope_cov == pytest.approx(x * slope_var)
    assert state.entropy_drift_cov == pytest.approx(n * drift_var)
    assert state.entropy_var == pytest.approx(noise + x**2 * slope_var + n**2 * drift_var + n * 1e-2**2)
    assert state.slope_var == pytest.approx(slope_var + n * (0.02 * unit) ** 2)
    assert state.drift_var == pytest.approx(drift_var + n * 2e-4**2)
    assert state.slope_drift_cov == 0.0


def test_predictive_covariance_is_that_of_the_matrices():
    import numpy as np

    def matrix(s):
        return np.array(
            [
                [s.entropy_var, s.entropy_slope_cov, s.entropy_drift_cov],
                [s.entropy_slope_cov, s.slope_var, s.slope_drift_cov],
                [s.entropy_drift_cov, s.slope_drift_cov, s.drift_var],
            ]
        )

    rng, controller = random.Random(0), predictive(Range(0.2, -1.0, 1.0))
    state = controller.update(controller.init(), 1.0, TARGET, Forecast(-0.002, 0.01, 2, 2))
    for n in (1, 3, 1, 8, 2):
        before, covariance = state, matrix(state)
        seen = state.entropy + 0.02 * rng.gauss(0, 1)
        state = controller.update(state, seen, TARGET, Forecast(-0.001 * n, 0.005 * n, n, n))
        row = covariance[0]
        covariance = covariance - np.outer(row, row) / (covariance[0, 0] + before.noise)
        estimate = np.array([before.entropy, before.slope, before.drift])
        estimate = estimate + row / (row[0] + before.noise) * (seen - before.entropy)
        x = n * (state.base + state.gain * before.value)
        move = np.array([[1.0, x, n], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        wander = 0.02 * max(abs(estimate[1]), 0.1 * state.unit)
        spread = np.diag([n * 1e-2**2, n * wander**2, n * 2e-4**2])
        assert matrix(state) == pytest.approx(move @ covariance @ move.T + spread, rel=1e-9)
        assert (state.entropy, state.slope, state.drift) == pytest.approx(tuple(move @ estimate))


def test_predictive_restarts_after_a_jump():
    controller = predictive(Range(0.0, -1.0, 1.0))
    _, state = plant(controller, 200)
    jumped = controller.update(state, 3.0, TARGET, Forecast(-1e-4, 1e-3, 1, 1))
    assert jumped.entropy == pytest.approx(3.0, abs=0.05)
    assert jumped.slope == pytest.approx(state.slope)


def test_predictive_holds_its_estimate_where_a_forecast_is_missing():
    controller = predictive(Range(0.0, -1.0, 1.0))
    state = controller.update(controller.init(), 1.0, TARGET, Forecast(-1e-3, 5e-3, 1, 1))
    after = controller.update(state, 1.0, TARGET, Forecast(0.0, 0.0, 0, 1))
    assert (after.base, after.gain, after.unit) == (state.base, state.gain, state.unit)


def test_predictive_without_any_forecast_goes_by_sign_and_first_guess():
    # g = sign · 0.01 · H* / 2 and p₀ = 0: the error of 0.01 is to be gone in 8 steps.
    none = Forecast(0.0, 0.0, 0, 1)
    for sign in (1, -1):
        controller = predictive(Range(0.0, -1.0, 1.0, sign=sign))
        state = controller.update(controller.init(), 0.99, TARGET, none)
        assert state.value == pytest.approx(sign * 0.01 / 8 / 0.005)
        assert (state.updates, state.slope) == (0, 1.0)
        # The whole range does four times as much as was guessed, which the filter finds from readings alone.
        state, entropy = controller.init(), 0.8
        for step in range(200):
            state = controller.update(state, entropy, TARGET, none)
            entropy += 0.02 * sign * state.value + (0.005 if step % 50 < 25 else -0.005)
        assert state.slope > 1.4


def test_the_first_forecast_restarts_the_filter_on_its_own_scale():
    controller = predictive(Range(0.0, -1.0, 1.0))
    state = controller.init()
    for _ in range(9):
        state = controller.update(state, 0.9, TARGET, Forecast(0.0, 0.0, 0, 1))
    assert state.updates == 0
    told = Forecast(-1e-3, 5e-5, 1, 1)
    first = controller.update(state, 0.9, TARGET, told)
    fresh = controller.update(controller.init()._replace(value=state.value), 0.9, TARGET, told)
    assert first == pytest.approx(fresh)
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


@given(st.sampled_from(sorted(CONTROLLERS)), st.lists(st.floats(0.01, 10), max_size=40))
def test_states_are_plain_numbers_and_values_stay_inside(name, entropies):
    controller = CONTROLLERS[name](WIDE)
    state = controller.init()
    for entropy in entropies:
        state = controller.update(state, entropy, TARGET, *more(controller))
        assert WIDE.low <= state.value <= WIDE.high
    assert all(isinstance(x, float | int) and math.isfinite(x) for x in state)
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
        state = controller.update(state, 1.0, 1.0, Forecast(0.0, 0.5, 1, 1))
    assert state.gain == pytest.approx(0.5)
    assert controller.update(state, 1.0, 1.0, Forecast(0.0, 1.5, 1, 1)).gain == pytest.approx(0.5 + 1 / 20)
