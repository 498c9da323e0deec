"""The guard: steps in a row above its bound, the reference, and the cap by the vocabulary."""

import math

from isentropic.control.guard import Guard, GuardState


def above(guard, *entropies, target=None):
    state = GuardState()
    for entropy in entropies:
        state = guard.update(state, entropy, target)
    return state.above


def test_counts_steps_in_a_row():
    guard = Guard(2.0, patience=3)
    assert above(guard, 1.0, 2.1, 2.1, 1.9, 2.1) == 1
    assert above(guard, 1.0, 2.1, float("nan"), None, 2.1, 2.1) == 3
    assert guard.exceeded(GuardState(1.0, 3))
    assert not guard.exceeded(GuardState(1.0, 2))
    assert above(guard, 1.0, 2.1, target=1.2) == 0
    # A target below the start is no reference: 1.5 is below 2 × 1.0.
    assert above(guard, 1.0, 1.5, 1.5, target=0.6) == 0
    assert not Guard(0.0).exceeded(GuardState(1.0, 99))


def test_it_speaks_at_the_last_step_of_its_patience():
    guard, state = Guard(2.0), GuardState()
    for entropy in (1.0, *[2.1] * 19):
        state = guard.update(state, entropy, None)
    assert not guard.exceeded(state)
    assert guard.exceeded(guard.update(state, 2.1, None))


def test_the_bound_is_capped_by_log_of_the_vocabulary():
    # 3 × 1.5 is above log 32 = 3.466, which no policy exceeds; at 0.9 of it the guard counts.
    log = math.log(32)
    assert above(Guard(3.0), 1.5, log) == 0
    assert above(Guard(3.0, ceiling=log), 1.5, 0.91 * log, 0.91 * log) == 2
    assert above(Guard(3.0, ceiling=log), 1.5, 0.89 * log) == 0
    assert Guard(3.0, ceiling=log).limit(0.5) == 1.5
    # A policy that starts uniform stays as it is.
    assert above(Guard(3.0, ceiling=log), 0.95 * log, 0.99 * log) == 0
