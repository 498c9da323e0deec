"""What the controller ``predictive`` knows between its updates: a Kalman filter in plain numbers.

Three unknowns, ``x = (Ĥ, s, d)``: the entropy, the slope of measured on predicted change, and the drift of a step that
no prediction explains. Over n steps ``Ĥ ← Ĥ + s·n·(p₀ + g·knob) + n·d``; a reading is Ĥ with noise of a variance that
is estimated too. Every constant is relative to the target, so that the scale of entropy does not matter. [ours]
"""

from __future__ import annotations

from typing import NamedTuple

HORIZON = 8.0  # steps in which an error is to be gone: the filtered entropy, not the reading, so it may be short
MEMORY = 20  # readings over which predictions are averaged
AUTHORITY = 0.01  # first guess: what the whole range of the knob moves in a step, as a share of the target


class Forecast(NamedTuple):
    """What ``entropy.prediction`` predicted over the optimizer steps since the last update.

    Attributes:
        change: Σ predicted entropy change, nats per token, with the knob as it stood.
        gain: Σ its derivative by the knob.
        steps: optimizer steps that carried a prediction; 0 if none did.
        readings: optimizer steps in all.
    """

    change: float
    gain: float
    steps: int
    readings: int


class PredictiveState(NamedTuple):
    """State of the predictive controller.

    Attributes:
        value: the knob.
        updates: how often it was updated with a forecast.
        entropy, slope, drift: estimates: nats; measured per predicted change; nats a step that no prediction explains.
        entropy_var, entropy_slope_cov, entropy_drift_cov, slope_var, slope_drift_cov, drift_var: their covariance.
        noise: variance of a reading, nats²; 0 before the first one.
        base, gain: running means of the prediction of one step with the knob at 0, and of its derivative by the knob.
        unit: the slope at which the whole range of the knob moves entropy by ``AUTHORITY`` of the target a step.
    """

    value: float
    updates: int = 0
    entropy: float = 0.0
    slope: float = 0.0
    drift: float = 0.0
    entropy_var: float = 0.0
    entropy_slope_cov: float = 0.0
    entropy_drift_cov: float = 0.0
    slope_var: float = 0.0
    slope_drift_cov: float = 0.0
    drift_var: float = 0.0
    noise: float = 0.0
    base: float = 0.0
    gain: float = 0.0
    unit: float = 0.0


def follow(
    state: PredictiveState, entropy: float, target: float, forecast: Forecast, span: float, sign: int
) -> PredictiveState:
    """The estimates as they stand after a reading and the steps that it was taken over; the knob is as it was.

    Args:
        state: of the controller.
        entropy: mean of the readings, nats per token.
        target: nats per token.
        forecast: of the same steps; with ``steps=0`` it says only how many there were.
        span: width of the knob's range.
        sign: of the knob's effect, for as long as no forecast has come.

    Example:
        >>> state = follow(PredictiveState(0.5), 1.0, 1.0, Forecast(0.0, 0.0, 0, 2), span=2.0, sign=-1)
        >>> state.gain, state.slope, state.entropy  # 1 + 2 · (−0.005 · 0.5)
        (-0.005, 1.0, 0.995)
    """
    starts = state.noise == 0 or (state.updates == 0 and forecast.steps > 0)
    if state.updates == 0 and forecast.steps == 0:
        state = state._replace(gain=sign * AUTHORITY * target / span)
    state = _learn(state, forecast, target, span)
    state = _start(state, entropy, target) if starts else _correct(state, entropy, target)
    return _advance(state, forecast.readings, target)


def _learn(state: PredictiveState, forecast: Forecast, target: float, span: float) -> PredictiveState:
    """Average the predictions of one step, and put the first guess of the slope on their scale."""
    if forecast.steps:
        state = state._replace(updates=state.updates + 1)
        share = 1 / min(state.updates, MEMORY)
        gain = forecast.gain / forecast.steps
        base = forecast.change / forecast.steps - gain * state.value
        state = state._replace(
            base=state.base + share * (base - state.base), gain=state.gain + share * (gain - state.gain)
        )
    reach = abs(state.gain) * span
    return state._replace(unit=AUTHORITY * target / reach if reach else state.unit)


def _start(state: PredictiveState, entropy: float, target: float) -> PredictiveState:
    noise = (0.05 * target) ** 2
    return state._replace(
        entropy=entropy,
        slope=state.unit,
        drift=0.0,
        noise=noise,
        entropy_var=noise,
        entropy_slope_cov=0.0,
        entropy_drift_cov=0.0,
        slope_var=state.unit**2,
        slope_drift_cov=0.0,
        drift_var=(2e-3 * target) ** 2,
    )


def _correct(state: PredictiveState, entropy: float, target: float) -> PredictiveState:
    """Take in a reading."""
    off, variance = entropy - state.entropy, state.entropy_var + state.noise
    if off * off > 25 * variance:
        return state._replace(entropy=entropy, entropy_var=state.noise, entropy_slope_cov=0.0, entropy_drift_cov=0.0)
    share = 1 / min(state.updates + 20, 100)
    noise = state.noise + share * (max(off * off - state.entropy_var, 0.1 * state.noise) - state.noise)
    h, s, d = state.entropy_var / variance, state.entropy_slope_cov / variance, state.entropy_drift_cov / variance
    return state._replace(
        entropy=state.entropy + h * off,
        slope=state.slope + s * off,
        drift=state.drift + d * off,
        noise=max(noise, (1e-4 * target) ** 2),
        entropy_var=state.entropy_var - h * state.entropy_var,
        entropy_slope_cov=state.entropy_slope_cov - h * state.entropy_slope_cov,
        entropy_drift_cov=state.entropy_drift_cov - h * state.entropy_drift_cov,
        slope_var=state.slope_var - s * state.entropy_slope_cov,
        slope_drift_cov=state.slope_drift_cov - s * state.entropy_drift_cov,
        drift_var=state.drift_var - d * state.entropy_drift_cov,
    )


def _advance(state: PredictiveState, n: int, target: float) -> PredictiveState:
    """Move the estimates over the n steps just taken, with the knob that was in force."""
    x = n * (state.base + state.gain * state.value)
    entropy_slope_cov = state.entropy_slope_cov + x * state.slope_var + n * state.slope_drift_cov
    entropy_drift_cov = state.entropy_drift_cov + x * state.slope_drift_cov + n * state.drift_var
    wander = 0.02 * max(abs(state.slope), 0.1 * state.unit)
    return state._replace(
        entropy=state.entropy + state.slope * x + n * state.drift,
        entropy_var=state.entropy_var
        + x * (state.entropy_slope_cov + entropy_slope_cov)
        + n * (state.entropy_drift_cov + entropy_drift_cov)
        + n * (1e-2 * target) ** 2,
        entropy_slope_cov=entropy_slope_cov,
        entropy_drift_cov=entropy_drift_cov,
        slope_var=state.slope_var + n * wander**2,
        drift_var=state.drift_var + n * (2e-4 * target) ** 2,
    )
