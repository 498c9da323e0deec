"""The state of the controller ``predictive`` between its updates: Kalman filters in plain numbers, one per delay.

Three unknowns, ``x = (Ĥ, s, d)``: the entropy, the slope of measured on predicted change, and the drift of a step that
no prediction explains. In a step ``Ĥ ← Ĥ + ρ·(s·(p₀ + g·u) + d)``, u the knob ``delay`` steps before, ρ the learning
rate as a share of its largest so far: **time is counted in steps at the full learning rate**. What is read is the mean
of Ĥ over the steps since the last update, with noise of a variance that is estimated too. The filters differ in the
delay that they suppose, and the readings say which to believe. Constants are relative to the target. [ours]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

HORIZON = 5.0  # steps in which an error is to be gone: the filtered entropy, not the reading, so it may be short
MEMORY = 20  # readings over which predictions are averaged
AUTHORITY = 0.01  # first guess: what the whole range of the knob moves in a step, as a share of the target
DELAYS = (0, 2, 4, 8, 16)  # steps from a knob to its effect that are tried, unless it is told
FORGET = 0.98  # what is left of the evidence for a delay after another update


class Forecast(NamedTuple):
    """What ``entropy.prediction`` predicted over the optimizer steps since the last update.

    Attributes:
        change: Σ predicted entropy change, nats per token, with the knob as it was.
        gain: Σ its derivative by the knob.
        steps: optimizer steps that carried a prediction; 0 if none did.
        readings: optimizer steps in all.
        time: Σ of their learning rates, each as a share of the largest so far; ``readings`` if no rate is known.
    """

    change: float
    gain: float
    steps: int
    readings: int
    time: float


class Filter(NamedTuple):
    """The estimates under one delay.

    Attributes:
        delay: optimizer steps from a knob to its effect.
        entropy, slope, drift: nats; measured per predicted change; nats per step that no prediction explains.
        hh, hs, hd, ss, sd, dd: covariance of these three, by their first letters but for the entropy's h.
        noise: variance of a reading, nats².
        evidence: log-likelihood of the readings, with less weight for older ones.
    """

    delay: int
    entropy: float
    slope: float
    drift: float
    hh: float
    hs: float
    hd: float
    ss: float
    sd: float
    dd: float
    noise: float
    evidence: float = 0.0

    def after(self, change: float, time: float) -> tuple[float, float, float, float, float]:
        """``H + s·change + d·time``: its estimate, its covariances with H, s and d, and its variance.

        Example:
            >>> Filter(0, 1.0, 2.0, 0.5, hh=1, hs=0, hd=0, ss=4, sd=0, dd=9, noise=1).after(change=0.1, time=2)
            (2.2, 1.0, 0.4, 18.0, 37.04)
        """
        h = self.hh + self.hs * change + self.hd * time
        s = self.hs + self.ss * change + self.sd * time
        d = self.hd + self.sd * change + self.dd * time
        return self.entropy + self.slope * change + self.drift * time, h, s, d, h + s * change + d * time


class PredictiveState(NamedTuple):
    """State of the predictive controller.

    Attributes:
        value: the knob.
        past: the knob of the last steps, newest last, as far back as the longest delay.
        filters: the fields of a :class:`Filter` for each delay; none before the first reading.
        updates: how often it was updated with a forecast.
        base, gain: running means of the prediction of one step with the knob at 0, and of its derivative by the knob.
        unit: the slope at which the whole range of the knob moves entropy by ``AUTHORITY`` of the target per step.
    """

    value: float
    past: tuple[float, ...] = ()
    filters: tuple[tuple[float, ...], ...] = ()
    updates: int = 0
    base: float = 0.0
    gain: float = 0.0
    unit: float = 0.0

    def estimates(self) -> list[Filter]:
        """The filters by name."""
        return [Filter(*fields) for fields in self.filters]  # type: ignore[arg-type]

    def best(self) -> Filter:
        """The filter that fits the readings best."""
        return max(self.estimates(), key=lambda one: one.evidence)

    def moves(self, knobs: tuple[float, ...], pace: float) -> list[float]:
        """Predicted change of one step after another at these values of the knob, at a share of the learning rate."""
        return [pace * (self.base + self.gain * knob) for knob in knobs]


def follow(
    state: PredictiveState,
    entropy: float,
    target: float,
    forecast: Forecast,
    span: float,
    sign: int,
    delays: tuple[int, ...],
) -> PredictiveState:
    """The estimates after a reading and the steps that it was taken over; the knob is as it was.

    Args:
        state: of the controller; its ``past`` is as long as the longest delay.
        entropy: mean of the readings, nats per token.
        target: nats per token.
        forecast: of the same steps; with ``steps=0`` it says only how many there were.
        span: width of the knob's range.
        sign: of the knob's effect, for as long as no forecast has come.
        delays: optimizer steps, one for each filter.

    Example:
        >>> state = follow(PredictiveState(0.5), 1.0, 1.0, Forecast(0, 0, 0, 2, 2), span=2.0, sign=-1, delays=(0,))
        >>> state.gain, state.best().slope, state.best().entropy  # 1 + 2 · (−0.005 · 0.5)
        (-0.005, 1.0, 0.995)
    """
    n, pace = forecast.readings, forecast.time / forecast.readings
    told = forecast.steps * pace
    starts = not state.filters or (state.updates == 0 and told > 0)
    if state.updates == 0 and not told:
        state = state._replace(gain=sign * AUTHORITY * target / span)
    state = _learn(state, forecast, told, target, span)
    knobs, filters = (*state.past, *[state.value] * n), []
    fresh = [_start(delay, entropy, target, state.unit) for delay in delays]
    for one in fresh if starts else state.estimates():
        first = len(state.past) - one.delay
        moves = state.moves(knobs[first : first + n], pace)
        if not starts:
            # The mean of the readings sees of a step's move the share that came after it.
            seen = sum(move * (n - 1 - i) for i, move in enumerate(moves)) / n
            one = _correct(one, entropy, seen, pace * (n - 1) / 2, target)
        filters.append(_advance(one, sum(moves), forecast.time, target, state.unit))
    return state._replace(past=knobs[n:], filters=tuple(tuple(one) for one in filters))


def _learn(state: PredictiveState, forecast: Forecast, told: float, target: float, span: float) -> PredictiveState:
    """Average the predictions of one step, ``told`` of which came, and put the slope's first guess on their scale."""
    if told:
        state = state._replace(updates=state.updates + 1)
        share = 1 / min(state.updates, MEMORY)
        gain = forecast.gain / told
        base = forecast.change / told - gain * state.value
        state = state._replace(
            base=state.base + share * (base - state.base), gain=state.gain + share * (gain - state.gain)
        )
    reach = abs(state.gain) * span
    return state._replace(unit=AUTHORITY * target / reach if reach else state.unit)


def _start(delay: int, entropy: float, target: float, unit: float) -> Filter:
    noise = (0.05 * target) ** 2
    # The slope is a guess, and may be several times as large: a narrow one would take long to learn from a strong knob.
    return Filter(delay, entropy, unit, 0.0, noise, 0.0, 0.0, (2 * unit) ** 2, 0.0, (2e-3 * target) ** 2, noise)


def _correct(one: Filter, entropy: float, change: float, time: float, target: float) -> Filter:
    """Take in a reading, which shows H as it was after ``change`` and ``time``."""
    expected, *_, variance = one.after(change, time)
    square, noise = (entropy - expected) ** 2, one.noise
    if square > 25 * (variance + noise):
        # A jump: a doubtful entropy answers for it, and the slope hardly.
        one = one._replace(hh=one.hh + square)
    else:
        noise = max(noise + 0.02 * (max(square - variance, 0.1 * noise) - noise), (1e-4 * target) ** 2)
    expected, h, s, d, variance = one.after(change, time)
    total = variance + one.noise
    off = (entropy - expected) / total
    return one._replace(
        entropy=one.entropy + h * off,
        slope=one.slope + s * off,
        drift=one.drift + d * off,
        hh=one.hh - h * h / total,
        hs=one.hs - h * s / total,
        hd=one.hd - h * d / total,
        ss=one.ss - s * s / total,
        sd=one.sd - s * d / total,
        dd=one.dd - d * d / total,
        noise=noise,
        evidence=FORGET * one.evidence - (math.log(total / target**2) + square / total) / 2,
    )


def _advance(one: Filter, change: float, time: float, target: float, unit: float) -> Filter:
    """Move the estimates over the steps just taken."""
    entropy, _, s, d, variance = one.after(change, time)
    wander = 0.02 * max(abs(one.slope), 0.1 * unit)
    return one._replace(
        entropy=entropy,
        hh=variance + time * (1e-2 * target) ** 2,
        hs=s,
        hd=d,
        ss=one.ss + time * wander**2,
        dd=one.dd + time * (2e-4 * target) ** 2,
    )


def plan(
    state: PredictiveState,
    target: float,
    forecast: Forecast,
    clip: Callable[[float], float],
    rest: float = 0.0,
    trust: float = math.inf,
) -> float:
    """The knob that takes entropy to its target in a horizon: the mean of what each filter asks for, by its evidence.

    ``u = ((H* − Ĥ)/τ − d − s·p₀) / (s·g)``, ``τ = (5 + n + delay/2)·(1 + Var s/s²)``

    Ĥ is the entropy when the knob begins to act: the steps up to then have knobs that are known. n and the delay are in
    steps at the full learning rate. The more doubtful the slope, the longer the horizon. A long one can make a brake of
    a push, as the drift stays what it is: if ``Var s/s²`` is above ``trust``, the knob is not turned to the other side
    of its rest than the same slope without doubt would ask for.

    Args:
        state: after :func:`follow`; its ``gain`` is not 0.
        target: nats per token.
        forecast: of the steps before; as many at the same learning rate are expected to come.
        clip: to the range of the knob.
        rest: the value at which the knob does nothing.
        trust: (standard deviation / slope)² up to which a slope is relied on.
    """
    filters, pace = state.estimates(), forecast.time / forecast.readings
    values, most = [], max(one.evidence for one in filters)
    for one in filters:
        coming = state.moves(state.past[len(state.past) - one.delay :], pace)
        begins, *_ = one.after(sum(coming), pace * one.delay)
        slope = max(one.slope, 0.1 * state.unit)
        horizon, doubt = HORIZON + forecast.time + pace * one.delay / 2, one.ss / slope**2
        wanted = (target - begins) / (horizon * (1 + doubt)) - one.drift
        value = (wanted / slope - state.base) / state.gain
        certain = (((target - begins) / horizon - one.drift) / slope - state.base) / state.gain
        turned = doubt > trust and (value - rest) * (certain - rest) < 0
        values.append(clip(rest if turned else value))
    weights = [math.exp(one.evidence - most) for one in filters]
    # From the first on, so that a bound that all ask for is met exactly.
    off = sum(weight * (value - values[0]) for weight, value in zip(weights, values, strict=True))
    return clip(values[0] + off / sum(weights))
