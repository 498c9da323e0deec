"""Targets that find their level: each rule by hand, the common walk, settling, and the way through a checkpoint."""

import json
import math

import pytest

from isentropic.control.auto import AUTO, auto, failing, fit, parse_auto, price, success, variety
from isentropic.control.controllers import Range, parse_controller
from isentropic.control.targets import parse_target
from isentropic.control.thermostat import thermostat, to_json
from isentropic.recipes import compose
from isentropic.recipes.knobs import build_thermostat
from isentropic.types import EntropyReading, GroupFacts

MIXED = GroupFacts(completions=10.0, failed=2.0, solved=1.0, rate=4.0, reward=4.0, pull=0.9, spread=10.0)


def walk(target, facts, num, entropy=2.0, tokens=100.0):
    state = target.update(target.init(), entropy, tokens, None)
    for one in [facts] * num if isinstance(facts, GroupFacts) else facts:
        state = target.update(state, entropy, tokens, one)
    return state


def test_a_price_by_hand():
    """Ten tokens an answer, so that a nat costs 10·0.9/10 = 0.9; worth 0.3 the move is (0.3 − 0.9)/(0.3 + 0.9)."""
    target = auto(price(worth=0.3), start=1.0, rate=0.1)
    state = walk(target, MIXED, 1)
    assert state.move == pytest.approx(-0.5)
    assert target.level(state) == pytest.approx(2.0 * math.exp(-0.05))
    assert target.why(state) == "lowered: a nat costs 0.90 of reward and is worth 0.3"


def test_a_price_is_remembered_as_a_ratio_of_sums():
    """After (0.9, 10) and (0.1, 40) with a memory of two readings: T·(0.45 + 0.1)/(5 + 40)."""
    target = auto(price(worth=0.3, memory=2.0))
    state = walk(target, [MIXED, MIXED._replace(pull=0.1, spread=40.0)], 2)
    assert state.shown == pytest.approx(10 * 0.55 / 45)


def test_a_price_rises_less_where_groups_fail_and_not_where_all_do():
    """A nat that costs nothing moves the level up by the share of groups that do not fail altogether."""
    cheap = MIXED._replace(pull=-0.1, failed=6.0)
    assert walk(auto(price(), start=0.5), cheap, 1).move == pytest.approx(0.4)
    lost = MIXED._replace(failed=10.0, solved=0.0, pull=0.0, spread=0.0)
    target = auto(price(), start=0.5)
    state = walk(target, lost, 50)
    assert target.level(state) == 1.0
    assert target.why(state) == "held: no group has both right and wrong answers"


def test_success_raises_lowers_and_stays():
    target = auto(success(memory=4.0), start=0.5, rate=0.1)
    failed = MIXED._replace(failed=8.0, rate=1.0, solved=0.0)
    state = walk(target, failed, 1)
    assert state.move == pytest.approx(0.8)
    assert target.why(state) == "raised: 80% of groups fail altogether, no fewer than before"
    # Fewer fail: the fast mean falls below the slow one, and the rate rises: half the share of mixed groups, 7 of 10.
    state = target.update(state, 2.0, 100.0, MIXED)
    assert state.move == pytest.approx(-0.35)
    assert target.why(state) == "lowered: 70% of groups mixed, accuracy rising"
    for _ in range(3):
        state = target.update(state, 2.0, 100.0, MIXED._replace(rate=0.5))
    assert state.move == 0.0
    assert target.why(state) == "held: 70% of groups mixed, accuracy not rising"


def test_success_hears_that_held_out_accuracy_has_fallen():
    """From 0.8 to 0.6 of 100 answers: 0.2 is more than twice √(0.6·0.4/100) = 0.049."""
    target = auto(success(), start=0.5)
    good, bad = (MIXED._replace(held_out=right, held_out_count=100.0) for right in (80.0, 60.0))
    state = walk(target, [good, bad], 2)
    assert (state.move, state.f) == (1.0, pytest.approx(0.2 - 2 * math.sqrt(0.24 / 100)))
    assert target.why(state).startswith("raised: held-out accuracy is below its best of 0.800")
    # It is believed until the next evaluation.
    state = target.update(state, 2.0, 100.0, MIXED)
    assert state.move == 1.0
    assert target.update(state, 2.0, 100.0, good).move != 1.0


def curve(entropy, noise=0.0):
    return MIXED._replace(reward=10 * (1.0 - 0.2 * math.exp(entropy) + noise))


@pytest.mark.parametrize(("worth", "lowered"), [(0.3, True), (2.0, False)])
def test_a_fit_finds_the_curve(worth, lowered):
    """R = 1 − 0.2·e^H exactly: one nat less buys 0.2·e^H, 0.54 at one nat."""
    target = auto(fit(worth=worth))
    state = target.update(target.init(), 2.0, 100.0, None)
    for i in range(30):
        entropy = 2.0 - i / 29
        state = target.update(state, entropy, 100.0, curve(entropy))
    assert state.shown == pytest.approx(0.2 * math.e, rel=1e-9)
    assert (state.move < 0) == lowered
    assert target.why(state).startswith(f"{'lowered' if lowered else 'held'}: one nat less buys 0.54")


def test_a_fit_is_weighted_least_squares_with_its_error():
    """Against the closed form with weights 0.9^age, on noisy points."""
    memory, xs = 10.0, [2.0 - 0.02 * i + 0.1 * math.sin(5 * i) for i in range(40)]
    noise = [0.05 * math.cos(3 * i) for i in range(40)]
    rule, state = fit(memory=memory), auto(fit()).init()
    for x, e in zip(xs, noise, strict=True):
        state = rule.step(state, x, 100.0, curve(x, e))
    w = [0.9 ** (39 - i) for i in range(40)]
    ex = [math.exp(x) for x in xs]
    ys = [1.0 - 0.2 * x + e for x, e in zip(ex, noise, strict=True)]
    mean = [sum(a * b for a, b in zip(w, v, strict=True)) / sum(w) for v in (ex, ys)]
    sxx, sxy, syy = (
        sum(k * (a - p) * (b - q) for k, a, b in zip(w, u, v, strict=True))
        for u, v, p, q in ((ex, ex, mean[0], mean[0]), (ex, ys, *mean), (ys, ys, mean[1], mean[1]))
    )
    assert (state.d, state.e, state.f) == pytest.approx((sxx, sxy, syy), rel=1e-9)
    count = sum(w) ** 2 / sum(k * k for k in w)
    error = math.sqrt((syy - sxy**2 / sxx) / (sxx * (count - 2)))
    sure = -sxy / sxx / error
    assert sure > 2
    strict = fit(memory=memory, sure=sure * 1.001).step(
        state._replace(**_before(state, memory, xs, noise)), xs[-1], 100.0, curve(xs[-1], noise[-1])
    )
    assert (strict.move, strict.cause) == (0.0, 1)
    assert strict.shown == pytest.approx(sure, rel=1e-6)


def _before(state, memory, xs, noise):
    rule, before = fit(memory=memory), auto(fit()).init()
    for x, e in zip(xs[:-1], noise[:-1], strict=True):
        before = rule.step(before, x, 100.0, curve(x, e))
    return {name: getattr(before, name) for name in "abcdef"}


def test_failing_groups_alone_make_the_error():
    """Half the weight fails, at 1.2 nats; the rest is at 0.4: H = 0.8, and H − H* = 0.5·(1.2 − 0.6·1.0)."""
    target = auto(failing(level=0.6))
    state = target.update(target.init(), 1.0, 100.0, None)
    state = target.update(state, 0.8, 100.0, MIXED._replace(failing_entropy=60.0, failing_tokens=50.0))
    assert 0.8 - target.level(state) == pytest.approx(0.5 * (1.2 - 0.6))
    # All solved: no error, whatever entropy is.
    state = target.update(state, 0.3, 100.0, MIXED._replace(failing_entropy=0.0, failing_tokens=0.0))
    assert target.level(state) == pytest.approx(0.3)
    assert target.why(state) == "held: 0% of tokens, by the failure of their groups, are held"


def test_variety_by_hand():
    """Two right answers are the same once in e²: 2 nats over ten tokens an answer, doubled, 0.4 nats of a start at 2.0.

    With 40 % right, the level goes towards 0.4·20 % + 0.6·60 %, from 60 % on by the whole rate.
    """
    target = auto(variety(), rate=0.1)
    facts = MIXED._replace(paired=5.0, repeats=5 * math.exp(-2))
    state = walk(target, facts, 1)
    assert (state.shown, state.beside) == pytest.approx((math.exp(-2), 0.4 * 0.2 + 0.6 * 0.6))
    assert target.level(state) == pytest.approx(2.0 * 0.6 * math.exp(-0.1))
    assert (
        target.why(state)
        == "lowered: two right answers are the same with a chance of 0.14, which asks for 44% of the start"
    )
    # Near the level that is asked for, the move is ten times the logarithm of what is missing.
    near = target.update(state._replace(share=0.45), 2.0, 100.0, facts)
    assert near.move == pytest.approx(10 * math.log(0.44 / 0.45))


def test_variety_of_answers_that_never_repeat_and_that_always_do():
    target = auto(variety(slack=1.0), rate=0.1)
    assert walk(target, MIXED._replace(paired=5.0), 1).move == 1.0
    # All right and always the same: nothing is left to hold.
    state = walk(target, MIXED._replace(paired=10.0, repeats=10.0, rate=10.0, failed=0.0, solved=10.0), 50)
    assert (state.beside, target.level(state)) == pytest.approx((0.0, 0.6))
    assert target.why(state).startswith("held at its floor: two right answers are the same with a chance of 1.00")
    assert target.why(walk(target, MIXED, 1)) == "held: no group has two right answers yet"


def test_variety_is_remembered_as_ratios_of_sums():
    target = auto(variety(memory=2.0))
    state = walk(
        target, [MIXED._replace(paired=4.0, repeats=1.0), MIXED._replace(paired=6.0, repeats=2.0, rate=8.0)], 2
    )
    assert state.shown == pytest.approx(2.5 / 8.0)
    assert state.c / state.d == pytest.approx((2.0 + 8.0) / (5.0 + 10.0))


@pytest.mark.parametrize("rule", AUTO)
def test_a_level_stays_within_floor_and_ceiling_and_without_groups_where_it_is(rule):
    target = parse_auto(f"auto:{rule}:floor=50%:ceiling=90%:start=80%:rate=0.5")
    up = MIXED._replace(pull=-1.0, failed=9.0, solved=0.0)
    down = MIXED._replace(pull=9.0)
    if rule != "failing":
        assert 1.0 <= target.level(walk(target, up, 30)) <= 1.8
        state = walk(target, [down._replace(rate=i / 10) for i in range(40)], 40)
        assert 1.0 <= target.level(state) <= 1.8
    state = walk(target, [None, MIXED._replace(completions=0.0)], 2)
    assert target.level(state) == pytest.approx(1.6)


def test_the_level_is_of_the_measured_start():
    target = parse_target("auto:price:start=100%", first=2)
    state = target.update(target.init(), 1.0, 10.0, MIXED)
    assert (target.level(state), target.hold(state)) == (None, True)
    state = target.update(state, 2.0, 30.0, MIXED)
    assert (target.level(state), target.hold(state)) == (1.75, True)
    assert not target.hold(target.update(state, 2.0, 30.0, MIXED))


def levels(text, num, ends):
    target, seen = parse_target(text, steps=ends), []
    state = target.init()
    for _ in range(num):
        state = target.update(state, 1.0, 10.0, *([None] if target.reads_groups else []))
        seen.append(target.level(state))
    return seen


def test_a_target_settles_at_the_end_of_each_task():
    seen = levels("0.8:settle=20%:settle_to=50%", 31, [10, 30])
    assert seen[:8] == [0.8] * 8
    assert seen[8:10] == pytest.approx([0.6, 0.4])
    assert seen[10:26] == [0.8] * 16
    assert seen[26:30] == pytest.approx([0.7, 0.6, 0.5, 0.4])
    # A run that is trained on after its end holds again.
    assert seen[30] == 0.8
    assert levels("auto:settle=50%", 4, 4) == pytest.approx([0.6, 0.6, 0.42, 0.24])


def test_settling_takes_its_share_of_the_learning_that_is_left():
    """Rates 10, 9, ..., 1, 0: 55 in all. 20 % of it is 11, which is left from the sixth reading on: 4 + 3 + 2 + 1."""
    target = parse_target("1.0:settle=20%:settle_to=50%", steps=11)
    state, seen = target.init(), []
    for rate in range(10, -1, -1):
        state = target.update(state, 1.0, 10.0, rate=float(rate))
        seen.append(target.level(state))
    assert seen[:5] == [1.0] * 5
    assert seen[5:] == pytest.approx([1 - 0.5 * (1 - left / 11) for left in (10, 6, 3, 1, 0, 0)])


def test_the_learning_of_a_task_does_not_count_in_the_next_one():
    target = parse_target("1.0:settle=20%:settle_to=50%", steps=(10, 20))
    state, seen = target.init(), []
    for i in range(20):
        state = target.update(state, 1.0, 10.0, rate=100.0 if i < 10 else 1.0)
        seen.append(target.level(state))
    assert seen[10:] == pytest.approx(seen[:10])


def test_a_run_that_is_resumed_with_more_steps_settles_at_its_new_end():
    short, long = (parse_target("1.0:settle=20%:settle_to=50%", steps=steps) for steps in (10, 20))
    state = short.init()
    for _ in range(10):
        state = short.update(state, 1.0, 10.0)
    assert short.level(state) == pytest.approx(0.5)
    seen = []
    for _ in range(10):
        state = long.update(state, 1.0, 10.0)
        seen.append(long.level(state))
    assert seen == pytest.approx([1.0] * 6 + [0.875, 0.75, 0.625, 0.5])


def test_a_band_that_leaves_entropy_alone_still_lets_it_down():
    target = parse_target("band:0.5:1.5:settle=50%", steps=4)
    state = target.init()
    holds = []
    for _ in range(4):
        state = target.update(state, 1.0, 10.0)
        holds.append(target.hold(state))
    assert holds == [True, True, False, False]
    assert "let down: 100% of the way" in target.why(state)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "auto:prise",
            r"rule of an automatic target must be one of failing, fit, price, success, variety; got 'prise' \(did you",
        ),
        (
            "auto:price:worht=1",
            r"an option of target auto:price must be one of .*worth; got 'worht' \(did you mean worth",
        ),
        ("auto:price:worth=much", r"target option worth must be a number or a share, got 'much'; write worth=0.3"),
        ("auto:price:worth=nan", r"got 'nan'"),
        ("auto:price:worth=1:worth=2", r"option worth is given twice"),
        ("auto:price:worth=-1", r"target option worth must be >= 0, got -1"),
        ("auto:fit:memory=1", r"memory must be >= 2, got 1"),
        ("auto:floor=90%:start=50%", r"0 < floor <= start <= ceiling, got 0.9, 0.5 and 0.6"),
        (
            "auto:explore=80%",
            r"explore .* must be at most its ceiling, 60%, got 80%; lower explore, or raise ceiling",
        ),
        ("auto:rate=2", r"rate of an automatic target must lie in \(0, 1\] per reading, got 2"),
        ("60%:settle=200%", r"settle must lie in \(0, 1\], got 2"),
        ("60%:settle=3", r"settle must be a share, got '3'; write settle=10%"),
        ("60%:settle=10%:settle=20%", r"settle is given twice"),
        ("60%:settle_to=10%", r"settle_to has no effect without settle"),
    ],
)
def test_what_makes_no_sense_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_target(text, steps=100)
    assert "\n" not in str(caught.value)


def test_settling_needs_the_length_of_the_run():
    with pytest.raises(ValueError, match=r"got steps=None; pass steps, or leave settle out"):
        parse_target("60%:settle=10%")


def readings(num):
    for i in range(num):
        facts = MIXED._replace(pull=0.05 * math.sin(i), failed=5 + 4 * math.cos(i), reward=3 + math.sin(2 * i))
        facts = facts._replace(failing_entropy=30.0 + i, failing_tokens=50.0, held_out=50.0 - i, held_out_count=50.0)
        yield EntropyReading(100 * (1 + 0.1 * math.sin(i)), 100.0, groups=facts)


@pytest.mark.parametrize("text", [*(f"auto:{rule}" for rule in AUTO), "auto:settle=50%", "60%:settle=30%"])
@pytest.mark.parametrize("controller", ["predictive", "pi", "sign_step"])
def test_a_run_continues_from_a_checkpoint_bit_for_bit(text, controller):
    knob = Range(0.0, -1.0, 1.0)
    whole = thermostat(parse_controller(controller, knob), parse_target(text, steps=40))
    state = whole.init()
    for i, reading in enumerate(readings(40)):
        if i == 17:
            state = whole.restore(json.loads(json.dumps(to_json(state))))
        state = whole.update(state, reading)
        if i == 16:
            saved = state
    other = thermostat(parse_controller(controller, knob), parse_target(text, steps=40))
    again = other.restore(json.loads(json.dumps(to_json(saved))))
    assert again == saved
    for i, reading in enumerate(readings(40)):
        if i > 16:
            again = other.update(again, reading)
    assert again == state
    assert other.why(again) == whole.why(state)


def test_a_thermostat_hands_the_groups_to_its_target():
    made = thermostat(parse_controller("pi", Range(0.0, -1.0, 1.0)), parse_target("auto:price:rate=0.1:worth=0.3"))
    start = made.update(made.init(), EntropyReading(200.0, 100.0))
    told, untold = (made.update(start, EntropyReading(200.0, 100.0, groups=groups)) for groups in (MIXED, None))
    assert made.level(untold) == pytest.approx(1.2)
    assert made.level(told) == pytest.approx(1.2 * math.exp(-0.05))
    assert made.why(told) == "lowered: a nat costs 0.90 of reward and is worth 0.3"


def test_a_thermostat_hands_the_learning_rate_to_its_target():
    made = thermostat(parse_controller("pi", Range(0.0, -1.0, 1.0)), parse_target("1.0:settle=20%", steps=11))
    state = made.init()
    for rate in range(10, 3, -1):
        state = made.update(state, EntropyReading(100.0, 100.0, rate=float(rate)))
    assert made.level(state) == pytest.approx(1 - 0.6 * (1 - 6 / 11))


@pytest.mark.parametrize("knob", ["zeta", "beta", "clip_high", "entropy_coef", "boost"])
def test_any_knob_takes_an_automatic_target(knob):
    recipe = compose("dapo", knob=knob, target="auto:success:settle=10%")
    made = build_thermostat(recipe, steps=(20, 40))
    state = made.init()
    for reading in readings(40):
        state = made.update(state, reading)
    assert made.level(state) < 1.0
    assert made.why(state).startswith("let down")
