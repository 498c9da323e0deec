"""A watchdog over the knob: a pure pair over the readings that says when a controller can do no more, and why.

A controller that cannot reach its target ends at a bound. Either the knob is too weak there, or the target is out of
reach, or the knob's effect has changed its sign, and then the controller stays at the wrong bound.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..types import EntropyReading
from .controllers import Range

PATIENCE = 50  # optimizer steps in a row at a bound
SURE = 20  # such steps before measured and predicted change are compared
RECENT = 10  # readings
CLEAR = 0.1  # change of entropy over a stay that is taken for one, as a share of the target
OFF = 0.05  # error that is held well enough, as a share of the target
DEVIATIONS = 4.0  # of the fitted slope from 0


class WatchdogState(NamedTuple):
    """State of the watchdog: plain numbers about the time at a bound.

    Attributes:
        side: of the bound: 1 upper, -1 lower, 0 while the knob is at neither or the error does not push against it.
        steps: in a row at the bound.
        value: of the knob.
        target: in force, nats per token.
        first, recent: entropy of its first reading, and the mean of about the last ten, nats per token.
        sum, weighted, squares: Σ x, Σ i·x and Σ x² over its readings i = 0, 1, …, x their distance from the first.
        predicted, gain: Σ predicted change, and Σ of its derivative by the knob.
        forecasts: optimizer steps that carried a prediction.
        due: 1 if a message is due at this step.
        next: steps at which the next message is due; it doubles, so that the log does not fill up.
        turned: 1 after a message in this stay that the effect has changed its sign.
    """

    side: int = 0
    steps: int = 0
    value: float = 0.0
    target: float = 0.0
    first: float = 0.0
    recent: float = 0.0
    sum: float = 0.0
    weighted: float = 0.0
    squares: float = 0.0
    predicted: float = 0.0
    gain: float = 0.0
    forecasts: int = 0
    due: int = 0
    next: int = PATIENCE
    turned: int = 0

    def rate(self) -> tuple[float, float]:
        """The fitted change of entropy in a step of the stay, and its standard error; infinite below three steps.

        Example:
            >>> WatchdogState(steps=3, sum=3.0, weighted=5.0, squares=5.0).rate()  # 0, 1, 2 above the first
            (1.0, 0.0)
        """
        n = self.steps
        if n < 3:
            return 0.0, math.inf
        spread = n * (n * n - 1) / 12
        slope = (self.weighted - (n - 1) / 2 * self.sum) / spread
        rest = max(self.squares - self.sum**2 / n - slope**2 * spread, 0.0)
        return slope, math.sqrt(rest / (n - 2) / spread)


class Watchdog(NamedTuple):
    """Says that a knob has been at the bound that its error pushes against for ``patience`` optimizer steps in a row.

    With predictions it says already after 20 steps that the effect of the knob has changed its sign: entropy has
    clearly moved away from its target (by a tenth of it, and four standard errors of the fitted slope) although it was
    predicted to come nearer. Without predictions only the declared sign is known, and a knob whose effect has changed
    its sign looks like one that is too weak: both are named, at ``patience``.

    It does not warn if entropy is within 5 % of its target, or gets there in ``patience`` steps at its rate.

    Attributes:
        knob: its name.
        range: its range and declared sign.
        patience: optimizer steps in a row.

    Reference: [ours]

    Example:
        >>> dog, state = Watchdog("zeta", Range(0.0, -1.0, 1.0), patience=3), WatchdogState()
        >>> for entropy in (0.70, 0.71, 0.70):
        ...     state = dog.update(state, EntropyReading(entropy, 1.0), target=1.0, value=1.0)
        >>> print(dog.message(state))
        knob zeta has been at its upper bound 1 for 3 optimizer steps in a row: entropy is 0.7 nats per token, its
        target 1, and this bound does not raise it further; lower the target, widen the range by knob_high, or turn
        another knob
    """

    knob: str
    range: Range
    patience: int = PATIENCE

    def update(
        self, state: WatchdogState, reading: EntropyReading, target: float | None, value: float
    ) -> WatchdogState:
        """Take in an optimizer step.

        Args:
            state: after the step before.
            reading: of this step; one that is refused changes nothing.
            target: in force; None while nothing is steered: measured at the start, held by a band, under a controller
                that goes by no reading. It ends a stay.
            value: of the knob during the step.

        Returns:
            The state, with ``due`` 1 if :meth:`message` has something to say at this step.
        """
        if reading.problem():
            return state._replace(due=0)
        side = self._side(value)
        if target is None or not side:
            return WatchdogState()
        # A reading that noise puts beyond the target does not end a stay.
        known = state.recent if state.side == side and state.steps >= RECENT else reading.mean
        if (target - known) * self.range.sign * side <= 0:
            return WatchdogState()
        return self._said(_longer(state, side, reading, target, value, self.patience))

    def message(self, state: WatchdogState) -> str | None:
        """The message of this step: knob, bound, entropy, target and remedies, in one line; None if none is due."""
        if not state.due:
            return None
        upper, below = state.side > 0, state.target > state.recent
        wanted, got = ("raise", "falling") if below else ("lower", "rising")
        text = (
            f"knob {self.knob} has been at its {'upper' if upper else 'lower'} bound {state.value:g} for {state.steps} "
            f"optimizer steps in a row: entropy is {state.recent:.3g} nats per token, its target {state.target:.3g}, "
        )
        reached = (
            f"{'lower' if below else 'raise'} the target, widen the range by {'knob_high' if upper else 'knob_low'}"
        )
        back = f"keep the knob where it works by a {'lower knob_high' if upper else 'higher knob_low'}"
        if self._turned(state):
            how = f"and it is {got} although a change of {state.predicted:+.3g} was predicted over these steps"
            why = "the knob's effect has changed sign here, or is smaller than something that predictions do not see"
            return f"{text}{how}: {why}; {back}, {reached}, or turn another knob"
        if self._predicted_turned(state):
            how = "and predictions give the knob the opposite of its sign: its effect has changed sign here"
            return f"{text}{how}; {back}, or turn another knob"
        if self._away(state):
            how = f"and it is {got} although this bound should {wanted} it"
            why = "the knob is too weak, or its effect has changed sign here"
            return f"{text}{how}: {why}; {reached}, {back}, or turn another knob"
        if self._moved(state):
            left = (state.target - state.recent) / state.rate()[0]
            return f"{text}about {left:.0f} more steps away at this rate; wait, {reached}, or turn another knob"
        return f"{text}and this bound does not {wanted} it further; {reached}, or turn another knob"

    def _side(self, value: float) -> int:
        span = self.range
        if span.one_way:
            return span.sign if span.saturated(value) else 0
        # A controller that multiplies stops at the least magnitude, which is its lower bound.
        low = value <= span.low or value == span.least or (span.low >= 0 and value < span.least)
        return 1 if value >= span.high else -1 if low else 0

    def _said(self, state: WatchdogState) -> WatchdogState:
        """Decide whether there is something to say."""
        if self._arrives(state):
            return state._replace(due=0)
        turned = not state.turned and state.steps >= SURE and (self._turned(state) or self._predicted_turned(state))
        if not turned and state.steps < state.next:
            return state._replace(due=0)
        return state._replace(due=1, turned=int(turned or state.turned), next=max(2 * state.steps, self.patience))

    def _moved(self, state: WatchdogState) -> bool:
        rate, error = state.rate()
        return abs(rate) * state.steps > CLEAR * state.target and abs(rate) > DEVIATIONS * error

    def _away(self, state: WatchdogState) -> bool:
        return self._moved(state) and state.rate()[0] * self.range.sign * state.side < 0

    def _turned(self, state: WatchdogState) -> bool:
        return self._away(state) and state.predicted * self.range.sign * state.side > 0

    def _predicted_turned(self, state: WatchdogState) -> bool:
        return state.forecasts >= SURE and state.gain * self.range.sign < 0

    def _arrives(self, state: WatchdogState) -> bool:
        """Whether entropy is near its target, or soon will be."""
        left, rate = state.target - state.recent, state.rate()[0]
        near = abs(left) <= OFF * state.target
        return near or (self._moved(state) and rate * left > 0 and left / rate <= self.patience)


def _longer(
    state: WatchdogState, side: int, reading: EntropyReading, target: float, value: float, patience: int
) -> WatchdogState:
    """The stay with a step more, or a new one."""
    if state.side != side:
        state = WatchdogState(side=side, first=reading.mean, recent=reading.mean, next=patience)
    off = reading.mean - state.first
    told = reading.steps > 0 and math.isfinite(reading.predicted) and math.isfinite(reading.gain)
    return state._replace(
        steps=state.steps + 1,
        value=value,
        target=target,
        recent=state.recent + (reading.mean - state.recent) / min(state.steps + 1, RECENT),
        sum=state.sum + off,
        weighted=state.weighted + state.steps * off,
        squares=state.squares + off * off,
        predicted=state.predicted + (reading.predicted if told else 0.0),
        gain=state.gain + (reading.gain if told else 0.0),
        forecasts=state.forecasts + (reading.steps if told else 0),
    )
