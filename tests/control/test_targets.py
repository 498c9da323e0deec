"""Targets: levels, measuring the start, annealing, and the band's hysteresis."""

import pytest

from isentropic.control.targets import feasible, parse_level, parse_target


def levels(text, *entropies, first=1, steps=None):
    target = parse_target(text, first, steps)
    state = target.init()
    seen = []
    for entropy in entropies:
        state = target.update(state, entropy, 10.0)
        seen.append((target.level(state), target.hold(state)))
    return seen


def test_initial_is_the_token_weighted_mean_of_the_first_readings():
    target = parse_target("initial", 2)
    state = target.update(target.init(), 1.0, 10.0)
    assert target.level(state) is None
    state = target.update(state, 2.0, 30.0)
    assert target.level(state) == pytest.approx(1.75)
    assert target.hold(state)
    assert not target.hold(target.update(state, 5.0, 10.0))


def test_constant_acts_at_once():
    assert levels("0.8", 2.0) == [(0.8, False)]


def test_share_of_initial():
    assert levels("80%", 2.0, 1.0) == [(1.6, True), (1.6, False)]


def test_anneal_from_the_start_to_a_constant():
    seen = levels("anneal:100%:0.5:4", 1.5, 1.5, 1.5, 1.5, 1.5, 1.5)
    assert [level for level, _ in seen] == pytest.approx([1.5, 1.5 - 1 / 3, 1.5 - 2 / 3, 0.5, 0.5, 0.5])
    assert [hold for _, hold in seen] == [True] + [False] * 5


def test_a_target_over_the_whole_run_needs_its_length():
    assert levels("anneal:2.0:1.0", *[1.5] * 6, steps=4) == levels("anneal:2.0:1.0:4", *[1.5] * 6)
    assert levels("anneal:2.0:1.0:2", 1.5, 1.5, steps=4) == levels("anneal:2.0:1.0:2", 1.5, 1.5)
    # The first step of the run is at FROM, the last one at TO.
    assert [level for level, _ in levels("anneal:2.0:1.0", *[1.5] * 5, steps=5)] == [2.0, 1.75, 1.5, 1.25, 1.0]
    assert levels("anneal:2.0:1.0", 1.5, steps=1) == [(2.0, False)]
    with pytest.raises(ValueError, match=r"got steps=None; pass steps, or write anneal:100%:50%:STEPS"):
        parse_target("anneal:100%:50%")


def test_a_longer_run_goes_on_from_where_the_level_is():
    short, long = (parse_target("anneal:2.0:1.0", steps=steps) for steps in (5, 9))
    state = short.init()
    for _ in range(4):
        state = short.update(state, 1.5, 1.0)
    assert short.level(state) == 1.25
    seen = []
    for _ in range(5):
        state = long.update(state, 1.5, 1.0)
        seen.append(long.level(state))
    assert seen == [1.25, 1.25, 1.25, 1.125, 1.0]


def test_band_waits_inside_and_comes_back_to_the_middle():
    # Middle 2: below 1 it steers up until 2 is passed, above 3 down until 2 is passed.
    seen = [hold for _, hold in levels("band:1.0:3.0", 1.5, 0.9, 1.9, 2.05, 2.9, 3.1, 2.1, 1.9)]
    assert seen == [True, False, False, True, True, False, False, True]


@pytest.mark.parametrize(("start", "low", "high"), [(3.0, 1.5, 2.0), (1.0, 0.5, 2.0), (6.0, 2.0, 3.0)])
def test_a_band_of_nats_and_a_share_lies_between_them(start, low, high):
    """2 nats and half of the start: below the lower one it steers up, above the higher one down, inside it waits."""
    for text in ("band:2.0:50%", "band:50%:2.0"):
        target = parse_target(text)
        begun = target.update(target.init(), start, 10.0)
        for entropy, side in ((low - 0.1, 1), (low + 0.1, 0), (high - 0.1, 0), (high + 0.1, -1)):
            state = target.update(begun._replace(active=0), entropy, 10.0)
            assert (target.level(state), state.active) == (pytest.approx((low + high) / 2), side)


def test_state_is_plain_numbers():
    target = parse_target("band:80%:120%")
    state = target.update(target.init(), 1.0, 5.0)
    assert type(state)(**state._asdict()) == state
    assert all(isinstance(x, int | float) for x in state)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "initail",
        "-1",
        "0",
        "0%",
        "nan",
        "anneal:1",
        "anneal:1:2:3:4",
        "anneal:1:2:0",
        "band:2:1",
        "band:x:1",
        "inf",
        "1e400",
        "²",
        "anneal:1:2:²",
        "anneal:1:2:" + "9" * 5000,
    ],
)
def test_bad_targets_are_refused(text):
    with pytest.raises(ValueError, match=r"got|>="):
        parse_target(text)


@pytest.mark.parametrize("form", ["{}", "anneal:1:{}:10", "anneal:{}:1:10", "band:0.1:{}"])
@pytest.mark.parametrize(
    ("level", "says"),
    [
        ("80", "at most 20 nats per token in any vocabulary, got 80; did you mean 80%?"),
        ("200", "got 200; did you mean 200%?"),
        ("1000", "got 1000; 0.2 to 2 nats are usual"),
        ("300%", "at most 200% of the initial entropy, got '300%'"),
        ("3.5", "below log of the vocabulary, 3.466 nats for 32 tokens, got 3.5; lower it"),
    ],
)
def test_a_level_that_cannot_be_had_is_refused_wherever_it_stands(form, level, says):
    with pytest.raises(ValueError, match="entropy") as refused:
        parse_target(form.format(level), vocabulary=32)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_levels_that_can_be_had():
    assert parse_level("19.9").amount == 19.9
    assert parse_level("200%").amount == 2.0
    assert parse_level("3.4", vocabulary=32).amount == 3.4
    assert feasible(1.6, 5) == 1.6  # log 5 = 1.609
    with pytest.raises(ValueError, match=r"1.609 nats for 5 tokens, got 1.61"):
        feasible(1.61, 5)
    with pytest.raises(ValueError, match="finite"):
        feasible(float("nan"))


def test_first_must_be_positive():
    with pytest.raises(ValueError, match="initial readings must be >= 1"):
        parse_target("initial", 0)
