"""A simulated plant for trying out a controller: an entropy that responds to a knob, read with noise.

Relative to the target, with ``u`` the knob in its range (``u = (knob − rest)/(high − low)``), a step does
``H ← H + ρ·(a·sign·u(t − delay, lagged) − fall + wander·ξ)``, ρ the learning rate as a share of its peak, and what is
read of it is ``H·(1 + noise·ξ)``. [ours]
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from ..types import EntropyReading
from .controllers import Controller, Range
from .targets import parse_target
from .thermostat import thermostat

LOWEST, HIGHEST = 0.01, 5.0  # where entropy stops, as shares of the target


class Plant(NamedTuple):
    """What the knob acts on; shares are of the target.

    Attributes:
        authority: how far the whole range of the knob moves entropy per step, a share.
        fall: how much entropy falls per step with the knob at rest, a share.
        noise, wander: standard deviations, of a reading and of a step, shares.
        lag: steps over which the effect of a knob builds up, as an optimizer's momentum makes it; 1 at once.
        delay: steps until the effect begins.
        turns_at: step from which the knob does the opposite of its sign.
        start: entropy before the first step, a share.
        forecast_every: readings from one predicted change to the next; 0 for none.
        scale: measured change per predicted change.
        explained: share of the fall that is predicted.
        warm_up: steps over which the learning rate rises from 0 to its peak.
        decays_at: step at which it has fallen to 0, linearly from the end of the warm-up; it stays at its peak if None.
    """

    authority: float = 0.02
    fall: float = 0.002
    noise: float = 0.02
    wander: float = 0.0
    lag: int = 1
    delay: int = 0
    turns_at: int | None = None
    start: float = 1.2
    forecast_every: int = 1
    scale: float = 3.0
    explained: float = 0.5
    warm_up: int = 0
    decays_at: int | None = None

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of its peak.

        Example:
            >>> [Plant(warm_up=2, decays_at=6).rate(step) for step in (0, 1, 2, 3, 7)]
            [0.0, 0.5, 1.0, 0.75, 0.0]
        """
        if step < self.warm_up:
            return step / self.warm_up
        return 1.0 if self.decays_at is None else max(self.decays_at - step, 0) / (self.decays_at - self.warm_up)


class Step(NamedTuple):
    """A step: entropy before it and what was read of it, shares of the target, and the knob in force."""

    entropy: float
    reading: EntropyReading
    knob: float


def run(
    make: Callable[[Range], Controller],
    plant: Plant,
    knob: Range,
    *,
    steps: int = 800,
    every: int = 1,
    target: float = 1.0,
    seed: int = 0,
) -> list[Step]:
    """A controller on a plant, under the thermostat that engines use.

    Args:
        make: the controller of a knob.
        plant: what it acts on.
        knob: range and declared sign.
        steps: optimizer steps.
        every: steps from one update of the controller to the next.
        target: nats per token.
        seed: of the noise.

    Raises:
        ValueError: what the controller, the target or the thermostat refuses.

    Example:
        >>> from isentropic.control.controllers import pi
        >>> rows = run(pi, Plant(), Range(0.0, -1.0, 1.0), every=16)
        >>> rms_error(rows) < 0.03, bound_to_bound(rows, Range(0.0, -1.0, 1.0))
        (True, 0)
    """
    rng, loop = random.Random(seed), thermostat(make(knob), parse_target(str(target)), every)
    state, entropy, effect = loop.init(), plant.start, 0.0
    span, rest = knob.high - knob.low, knob.clip(0.0)
    waiting, rows = [0.0] * plant.delay, []
    for step in range(steps):
        rate = plant.rate(step)
        waiting.append((state.value - rest) / span)
        effect += (waiting.pop(0) - effect) / plant.lag
        sign = knob.sign if plant.turns_at is None or step < plant.turns_at else -knob.sign
        predicted, gain = 0.0, 0.0
        told = plant.forecast_every > 0 and step % plant.forecast_every == 0
        if told:
            gain = rate * plant.authority * knob.sign / span * target / plant.scale
            predicted = gain * (state.value - rest) - rate * plant.explained * plant.fall * target / plant.scale
        seen = max(entropy * (1 + plant.noise * rng.gauss(0, 1)), 1e-3) * target
        reading = EntropyReading(seen, 1.0, predicted=predicted, gain=gain, steps=int(told), rate=rate)
        rows.append(Step(entropy, reading, state.value))
        entropy += rate * (plant.authority * sign * effect - plant.fall + plant.wander * rng.gauss(0, 1))
        entropy = min(max(entropy, LOWEST), HIGHEST)
        state = loop.update(state, reading)
    return rows


def rms_error(rows: list[Step], after: int = 200) -> float:
    """Root mean square of ``(H − H*)/H*`` from a step on, with entropy before the noise of readings.

    Example:
        >>> rms_error([Step(1.3, EntropyReading(1.3, 1.0), 0.0), Step(0.7, EntropyReading(0.7, 1.0), 0.0)], after=0)
        0.3
    """
    errors = [(row.entropy - 1) ** 2 for row in rows[after:]]
    return (sum(errors) / len(errors)) ** 0.5


def bound_to_bound(rows: list[Step], knob: Range, after: int = 200) -> int:
    """How often the knob went from one of its bounds to the other, from a step on.

    Example:
        >>> rows = [Step(1.0, EntropyReading(1.0, 1.0), knob) for knob in (-1, 0, 1, 1, -1)]
        >>> bound_to_bound(rows, Range(0, -1, 1), after=0)
        2
    """
    ends = [row.knob for row in rows[after:] if knob.saturated(row.knob)]
    return sum(a != b for a, b in pairwise(ends))
