"""The closed loop: when it acts, what it refuses, and that its state survives JSON."""

import json

import pytest

from isentropic.control.controllers import Range, sign_step
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


def test_resumes_bit_for_bit_through_json():
    t = loop("anneal:100%:50%:7")
    straight = t.init()
    for i in range(20):
        straight = t.update(straight, reading(1.0 + 0.1 * (i % 3), 10.0 + i), act=i % 4 == 3)
        if i == 9:
            saved = json.dumps(to_json(straight))
    resumed = t.restore(json.loads(saved))
    for i in range(10, 20):
        resumed = t.update(resumed, reading(1.0 + 0.1 * (i % 3), 10.0 + i), act=i % 4 == 3)
    assert resumed == straight


def test_every_below_one_is_refused():
    with pytest.raises(ValueError, match="every must be >= 1"):
        loop(every=0)
