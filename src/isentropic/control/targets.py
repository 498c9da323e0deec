"""What entropy is held at: pure pairs ``init() -> TargetState``, ``update(state, entropy, tokens) -> TargetState``.

A target is told every reading. ``level(state)`` is H*, nats per token, or ``None`` while the start is still being
measured; ``hold(state)`` is true if the knob must not move although a reading came in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class TargetState(NamedTuple):
    """State of a target.

    Attributes:
        readings: number of readings so far.
        sum, count: Σ H and tokens of the first readings, whose mean is the initial entropy.
        active: of a band: 1 while steering up, -1 while steering down, 0 while left alone.
        done: of a level that moves: the share of its way that it has covered.
    """

    readings: int = 0
    sum: float = 0.0
    count: float = 0.0
    active: int = 0
    done: float = 0.0


class Target(NamedTuple):
    """A pair of pure functions, and two views of the state."""

    init: Callable[[], TargetState]
    update: Callable[[TargetState, float, float], TargetState]
    level: Callable[[TargetState], float | None]
    hold: Callable[[TargetState], bool]


class Level(NamedTuple):
    """A height in nats, or as a share of the initial entropy."""

    amount: float
    of_initial: bool

    def at(self, state: TargetState) -> float:
        """Nats per token, once the initial entropy is measured."""
        return self.amount * (state.sum / state.count if self.of_initial else 1.0)


MAX_NATS = 20.0  # log of a vocabulary of 485 million tokens
MAX_SHARE = 2.0


def feasible(nats: float, vocabulary: int | None = None) -> float:
    """A level that a policy over a vocabulary can have, ``0 < H* < log v``.

    Args:
        nats: the level, nats per token.
        vocabulary: number of tokens that the model chooses from, v; None if it is not known.

    Returns:
        ``nats``.

    Raises:
        ValueError: a level that is not positive, above log v, or above 20 nats, log of any vocabulary.

    Example:
        >>> feasible(0.8, vocabulary=32)
        0.8
        >>> feasible(4.0, vocabulary=32)
        Traceback (most recent call last):
        ...
        ValueError: an entropy target must be below log of the vocabulary, 3.466 nats for 32 tokens, got 4; lower it

    [ours]
    """
    if not 0 < nats < math.inf:
        raise ValueError(f"an entropy level must be > 0 and finite, got {nats:g} nats; sampling cannot reach it")
    if nats > MAX_NATS:
        share = f"; did you mean {nats:g}%?" if nats <= 100 * MAX_SHARE else "; 0.2 to 2 nats are usual"
        raise ValueError(
            f"an entropy level is at most {MAX_NATS:g} nats a token in any vocabulary, got {nats:g}{share}"
        )
    if vocabulary is not None and nats >= math.log(vocabulary):
        raise ValueError(
            f"an entropy target must be below log of the vocabulary, {math.log(vocabulary):.4g} nats for "
            f"{vocabulary} tokens, got {nats:.4g}; lower it"
        )
    return nats


def parse_level(text: str, vocabulary: int | None = None) -> Level:
    """``"0.8"`` is 0.8 nats a token; ``"80%"`` is a share of the initial entropy.

    A share may be up to 200 %: entropy can rise, but training lowers it, so that a target above the start is held
    against the reward, and at three times the start the guard stops a run. More than that can be written in nats.

    Args:
        text: the form.
        vocabulary: number of tokens that the model chooses from, if known: a level in nats must be below its log.

    Raises:
        ValueError: anything else; a level that is not positive, or cannot be had.

    Example:
        >>> parse_level("80%")
        Level(amount=0.8, of_initial=True)
        >>> parse_level("80")
        Traceback (most recent call last):
        ...
        ValueError: an entropy level is at most 20 nats a token in any vocabulary, got 80; did you mean 80%?
    """
    share = text.strip().endswith("%")
    try:
        amount = float(text.strip().removesuffix("%")) / (100 if share else 1)
    except ValueError:
        raise ValueError(
            f"an entropy level must be nats (0.8) or a share of the initial entropy (80%), got {text!r}"
        ) from None
    if not 0 < amount < math.inf:
        raise ValueError(f"an entropy level must be > 0 and finite, got {text!r}; sampling cannot reach it")
    if not share:
        return Level(feasible(amount, vocabulary), False)
    if amount > MAX_SHARE:
        raise ValueError(
            f"an entropy level may be at most {MAX_SHARE:.0%} of the initial entropy, got {text!r}: training lowers "
            "entropy, and few knobs raise it so far; take a lower share, or write the level in nats"
        )
    return Level(amount, True)


def _measure(first: int, state: TargetState, entropy: float, tokens: float) -> TargetState:
    state = state._replace(readings=state.readings + 1)
    if state.readings <= first:
        state = state._replace(sum=state.sum + entropy * tokens, count=state.count + tokens)
    return state


def _check_first(first: int) -> None:
    if first < 1:
        raise ValueError(f"initial readings must be >= 1, got {first}; the first reading already measures the start")


def constant(level: Level, first: int = 1) -> Target:
    """Hold one level: nats, or a share of the mean of the first ``first`` readings (the knob is held meanwhile).

    Example:
        >>> t = constant(parse_level("50%"), first=2)
        >>> s = t.update(t.init(), 1.0, 10)
        >>> t.hold(s), t.level(s)
        (True, None)
        >>> s = t.update(s, 2.0, 10)
        >>> t.hold(s), t.level(s)
        (True, 0.75)
        >>> t.hold(t.update(s, 9.0, 10))
        False
    """
    return anneal(level, level, 1, first)


def anneal(start: Level, end: Level, steps: int, first: int = 1) -> Target:
    """Move linearly from ``start`` to ``end`` over ``steps`` readings, the first of them at ``start``, then stay.

    ``start + (end − start)·(n − 1)/(steps − 1)`` at reading n, and ``end`` from the last of the steps on

    The level of a run that is resumed with more steps never moves back: it stays until the schedule reaches it.

    Raises:
        ValueError: ``steps`` or ``first`` below 1.

    Example:
        >>> t = anneal(parse_level("2.0"), parse_level("1.0"), steps=3)
        >>> s = t.init()
        >>> for h in (2.0, 2.0, 2.0, 2.0):
        ...     s = t.update(s, h, 1); print(t.level(s))
        2.0
        1.5
        1.0
        1.0
    """
    _check_first(first)
    if steps < 1:
        raise ValueError(f"anneal steps must be >= 1, got {steps}; count optimizer steps")
    measured = start.of_initial or end.of_initial

    def level(state: TargetState) -> float | None:
        if state.readings < first and measured:
            return None
        a, b = start.at(state), end.at(state)
        return a + (b - a) * state.done

    def hold(state: TargetState) -> bool:
        return measured and state.readings <= first

    def update(state: TargetState, entropy: float, tokens: float) -> TargetState:
        state = _measure(first, state, entropy, tokens)
        return state._replace(done=max(state.done, min((state.readings - 1) / max(steps - 1, 1), 1.0)))

    return Target(TargetState, update, level, hold)


def band(low: Level, high: Level, first: int = 1) -> Target:
    """Leave entropy alone inside ``[low, high]``; once it leaves, steer until it has come back to the middle.

    The hysteresis keeps a controller from chattering at an edge. ``level`` is the middle.

    Of a level in nats and a share of the initial entropy, which is the lower is known once the start is measured: the
    band is what lies between the two, in whichever order they are.

    Raises:
        ValueError: ``low`` not below ``high``, both of one kind.

    Example:
        >>> t = band(parse_level("1.0"), parse_level("3.0"))
        >>> s, seen = t.init(), []
        >>> for h in (2.5, 0.9, 1.5, 2.1, 2.9):
        ...     s = t.update(s, h, 1); seen.append(t.hold(s))
        >>> seen
        [True, False, False, True, True]
    """
    _check_first(first)
    if low.of_initial == high.of_initial and not low.amount < high.amount:
        raise ValueError(f"a band needs low < high, got {low.amount} and {high.amount}; swap them")
    measured = low.of_initial or high.of_initial

    def middle(state: TargetState) -> float | None:
        return None if measured and state.readings < first else (low.at(state) + high.at(state)) / 2

    def update(state: TargetState, entropy: float, tokens: float) -> TargetState:
        state = _measure(first, state, entropy, tokens)
        if state.readings < first and measured:
            return state._replace(active=0)
        a, b = sorted((low.at(state), high.at(state)))
        centre = (a + b) / 2
        # Which edge was crossed is the sign carried in `active`: below the band 1, above it -1.
        side = 1 if entropy < a else -1 if entropy > b else 0
        if side == 0 and state.active and (entropy - centre) * state.active < 0:
            side = state.active
        return state._replace(active=side)

    def hold(state: TargetState) -> bool:
        return state.active == 0 or (measured and state.readings <= first)

    return Target(TargetState, update, middle, hold)


TARGETS: dict[str, str] = {
    "initial": "the entropy before training, measured over the first readings",
    "NATS (0.8)": "a constant, nats per token",
    "SHARE% (80%)": "a share of the initial entropy",
    "anneal:FROM:TO[:STEPS]": "linear from one NATS or SHARE% to another; at TO in the last of the steps or of the run",
    "band:LOW:HIGH": "leave it alone between two NATS or SHARE%, steer back to the middle when it leaves",
}


def parse_target(text: str, first: int = 1, steps: int | None = None, vocabulary: int | None = None) -> Target:
    """A target from its text form, as the command line and config files write it (see :data:`TARGETS`).

    Args:
        text: the form.
        first: readings that the initial entropy is the mean of.
        steps: optimizer steps of the whole run, for a target that goes over it.
        vocabulary: number of tokens that the model chooses from, if known. A level in nats is checked against it here;
            one that is a share is nats only once the start is measured, and :func:`feasible` checks it then.

    Raises:
        ValueError: with what was got and the forms that are allowed; a level that cannot be had.

    Example:
        >>> t = parse_target("anneal:100%:50%:10")
        >>> t.level(t.update(t.init(), 2.0, 1))
        2.0
    """
    kind, *parts = str(text).strip().split(":")
    if kind == "anneal" and (len(parts) == 2 or (len(parts) == 3 and _is_count(parts[2]))):
        over = int(parts[2]) if len(parts) == 3 else steps
        if over is None:
            raise ValueError(
                f"target {text!r} goes over a whole run, and its optimizer steps are not known here, got steps=None; "
                f"pass steps, or write {text}:STEPS"
            )
        return anneal(parse_level(parts[0], vocabulary), parse_level(parts[1], vocabulary), over, first)
    if kind == "band" and len(parts) == 2:
        return band(parse_level(parts[0], vocabulary), parse_level(parts[1], vocabulary), first)
    if not parts and kind == "initial":
        return constant(Level(1.0, True), first)
    if not parts and kind[:1].isdigit():
        return constant(parse_level(kind, vocabulary), first)
    raise ValueError(f"target must be one of {', '.join(TARGETS)}; got {text!r}")


def _is_count(text: str) -> bool:
    """Whether a text is a number of steps: decimal digits, and no more of them than a run could have."""
    return text.isascii() and text.isdigit() and len(text) <= 12
