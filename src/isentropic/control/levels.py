"""Levels of entropy, and what a target is: a pure pair ``init()`` and ``update(state, entropy, tokens)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


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
    """A pair of pure functions, and views of the state.

    Attributes:
        init, update: the pair; ``update(state, entropy, tokens)``, and with ``reads_groups`` also ``groups``, the
            :class:`~isentropic.types.GroupFacts` of the reading or None.
        level: H* in force, nats per token; None while the start is being measured.
        hold: whether the knob must not move although a reading came in.
        reads_groups: whether ``update`` takes the group facts.
        why: the reason for the current level, as text; None if it does not depend on the run.
        reads_rate: whether ``update`` takes ``rate=``, the learning rate of the reading or None.
        one_way: it is a floor: the knob raises entropy to it, and does nothing while entropy is above it.
    """

    init: Callable[[], Any]
    update: Callable[..., Any]
    level: Callable[[Any], float | None]
    hold: Callable[[Any], bool]
    reads_groups: bool = False
    why: Callable[[Any], str] | None = None
    reads_rate: bool = False
    one_way: bool = False


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
            f"an entropy level is at most {MAX_NATS:g} nats per token in any vocabulary, got {nats:g}{share}"
        )
    if vocabulary is not None and nats >= math.log(vocabulary):
        raise ValueError(
            f"an entropy target must be below log of the vocabulary, {math.log(vocabulary):.4g} nats for "
            f"{vocabulary} tokens, got {nats:.4g}; lower it"
        )
    return nats


def parse_level(text: str, vocabulary: int | None = None) -> Level:
    """``"0.8"`` is 0.8 nats per token; ``"80%"`` is a share of the initial entropy.

    A share may be up to 200 %: entropy can rise, but training lowers it, so that a target above the start is held
    against the reward, and at three times the start the guard stops a run. More than that can be written in nats.

    Args:
        text: the form.
        vocabulary: number of tokens that the model chooses from, if known: a level in nats must be below its log.

    Raises:
        ValueError: anything else; a level that is not positive, or is out of reach.

    Example:
        >>> parse_level("80%")
        Level(amount=0.8, of_initial=True)
        >>> parse_level("80")
        Traceback (most recent call last):
        ...
        ValueError: an entropy level is at most 20 nats per token in any vocabulary, got 80; did you mean 80%?
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


def measure(first: int, state: Any, entropy: float, tokens: float) -> Any:
    """Count a reading; the first ones measure the initial entropy."""
    state = state._replace(readings=state.readings + 1)
    if state.readings <= first:
        state = state._replace(sum=state.sum + entropy * tokens, count=state.count + tokens)
    return state


def check_first(first: int) -> None:
    """Refuse a number of initial readings below 1."""
    if first < 1:
        raise ValueError(f"initial readings must be >= 1, got {first}; the first reading already measures the start")
