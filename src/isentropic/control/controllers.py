"""Feedback controllers: pure pairs ``init() -> State``, ``update(state, entropy, target) -> State``.

A controller turns the error between an entropy and its target, both in nats per token, into the value of one knob.
A state is a NamedTuple of plain numbers with a field ``value``: it goes into a checkpoint as JSON and resumes bit for
bit. Every rank that sees the same reading computes the same state.

Sources: arXiv:2603.11682 for the doubling rule and the direction of ADAPO; step sizes are named [ours] if the
published detail is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

from .names import suggest
from .predictive import DELAYS, MEMORY, Forecast, PredictiveState, follow, plan


class Range(NamedTuple):
    """The values a knob may take, and which way it moves entropy.

    Attributes:
        start: value before the first update.
        low, high: bounds; ``low < 0`` marks a knob that may change sign.
        least: smallest magnitude a multiplying controller may reach (multiplication cannot leave 0).
        sign: +1 if raising the value raises entropy, −1 if it lowers it.
        rest: value at which the knob does nothing; ``None`` is 0, or the bound nearest to it, for a knob that raises
            entropy, and the upper bound for one that lowers it.
        one_way: it may raise entropy and not lower it: one of the bounds is where the knob does nothing.
    """

    start: float
    low: float
    high: float
    least: float = 1e-4
    sign: int = 1
    rest: float | None = None
    one_way: bool = False

    def check(self) -> Range:
        """Return self, or raise ``ValueError`` naming the bound that is wrong."""
        for name in ("start", "low", "high", "least"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"knob {name} must be a finite number, got {getattr(self, name)}; give one")
        if not self.low < self.high:
            raise ValueError(f"knob low must be < high, got low={self.low}, high={self.high}; swap them or widen them")
        if not self.low <= self.start <= self.high:
            raise ValueError(f"knob start must lie in [{self.low}, {self.high}], got {self.start}; move it inside")
        most = max(self.high, -self.low)
        if not 0 < self.least <= most:
            raise ValueError(f"knob least must lie in (0, {most}], got {self.least}; it is a magnitude")
        if self.sign not in (1, -1):
            raise ValueError(f"knob sign must be 1 or -1, got {self.sign}")
        return self

    def neutral(self) -> float:
        """The allowed value that does least to entropy.

        Example:
            >>> Range(0.28, 0.07, 1.12).neutral(), Range(1.1, 1.0, 1.5, rest=1.0).neutral()
            (0.07, 1.0)
        """
        if self.rest is not None:
            return self.clip(self.rest)
        return self.clip(0.0) if self.sign > 0 else self.high

    def raising(self) -> Range:
        """The part of the range that raises entropy: from the value that does nothing, or the start if there is none.

        Example:
            >>> Range(-0.5, -1.0, 1.0).raising()[:3], Range(0.2, 0.05, 0.8, sign=-1).raising()[:3]
            ((0.0, 0.0, 1.0), (0.2, 0.05, 0.2))
        """
        rest = self._at_rest()
        low, high = (rest, self.high) if self.sign > 0 else (self.low, rest)
        return self._replace(low=low, high=high, start=min(max(self.start, low), high), one_way=True)

    def not_raising(self, value: float) -> float:
        """The value, or the one that does nothing (the start if there is none) in place of one that raises entropy.

        Example:
            >>> span = Range(0.0, -1.0, 1.0)
            >>> span.not_raising(0.7), span.not_raising(-0.2), Range(0.28, 0.07, 1.12).not_raising(0.5)
            (0.0, -0.2, 0.28)
        """
        rest = self._at_rest()
        return min(value, rest) if self.sign > 0 else max(value, rest)

    def _at_rest(self) -> float:
        return self.start if self.rest is None and not self.low <= 0 <= self.high else self.neutral()

    def clip(self, value: float) -> float:
        """The nearest allowed value."""
        return min(max(value, self.low), self.high)

    def saturated(self, value: float) -> bool:
        """Whether the knob is at a bound, and cannot move entropy any further in that direction.

        A knob that works one way is at rest at the other bound, and not saturated.

        Example:
            >>> Range(0.0, -1.0, 1.0).saturated(-1.0), Range(0.0, -1.0, 1.0).raising().saturated(0.0)
            (True, False)
        """
        low, high = value <= self.low, value >= self.high
        return (high if self.sign > 0 else low) if self.one_way else low or high


class ValueState(NamedTuple):
    """State of a controller whose only memory is its knob."""

    value: float


class IntegralState(NamedTuple):
    """State of the PI controller: the knob, and the accumulated relative error."""

    value: float
    integral: float


class Controller(NamedTuple):
    """A pair of pure functions, and what ``update`` takes after the state, the entropy and the target.

    Attributes:
        init, update: the pair.
        forecasts: it takes a :class:`Forecast`.
        counts: it takes, last, how many readings the entropy is the mean of: the optimizer steps since the last update,
            each counted by its learning rate as a share of the largest so far, if readings carry one.
        steers: the knob follows the readings; one that does not is at a bound because it was put there.
    """

    init: Callable[[], Any]
    update: Callable[..., Any]
    forecasts: bool = False
    counts: bool = False
    steers: bool = True


def relative_error(entropy: float, target: float) -> float:
    """``(H* − H)/H*``: positive when entropy is below its target.

    Raises:
        ValueError: a target that is not positive; a relative error has no meaning there.

    Example:
        >>> relative_error(0.8, 1.0)
        0.19999999999999996
    """
    if not target > 0:
        raise ValueError(f"an entropy target must be > 0 nats, got {target}; name one that sampling can reach")
    return (target - entropy) / target


def fixed(knob: Range) -> Controller:
    """Keep the knob at its start.

    Example:
        >>> c = fixed(Range(0.2, 0.1, 0.4))
        >>> c.update(c.init(), 0.5, 1.0)
        ValueState(value=0.2)
    """
    knob.check()
    return Controller(lambda: ValueState(knob.start), lambda state, entropy, target: state, steers=False)


def double_halve(knob: Range) -> Controller:
    """Double the knob if entropy is too low, halve it if it is too high, with a flip of sign.

    With ζ > 0: doubled below the target, halved above. With ζ < 0: |ζ| halved below, doubled above. If halving would
    pass ``least`` the sign flips, if the range allows the other sign; otherwise the value stays at ``least``.
    Bang-bang: a knob may take 18 updates from one bound of [1e-4, 0.05] to the other.

    Reference: arXiv:2603.11682, the controller of REPO's ζ [paper, completed from an implementation by others].

    Example:
        >>> c = double_halve(Range(start=0.01, low=-0.05, high=0.05, least=0.006))
        >>> low = c.update(c.init(), 0.5, 1.0)
        >>> low.value, c.update(c.init(), 2.0, 1.0).value
        (0.02, -0.006)
    """
    knob.check()
    if abs(knob.start) < knob.least:
        knob = knob._replace(start=knob.clip(knob.least))

    def update(state: ValueState, entropy: float, target: float) -> ValueState:
        error = relative_error(entropy, target) * knob.sign
        if error == 0:
            return state
        value = state.value
        grow = (error > 0) == (value > 0)
        if grow:
            return ValueState(knob.clip(value * 2))
        if abs(value) / 2 >= knob.least:
            return ValueState(knob.clip(value / 2))
        flipped = -knob.least if value > 0 else knob.least
        return ValueState(flipped if knob.low <= flipped <= knob.high else (knob.least if value > 0 else -knob.least))

    return Controller(lambda: ValueState(knob.start), update)


def multiplicative(knob: Range, rate: float = 0.05) -> Controller:
    """``knob ← knob · (1+rate)`` if entropy is below its target, ``/ (1+rate)`` above; positive values only.

    Reference: the direction is ADAPO's (arXiv:2603.11682) [paper]; rate and bounds are unknown there and [ours].

    Raises:
        ValueError: ``rate`` not positive or not finite, or a range without positive values.

    Example:
        >>> c = multiplicative(Range(0.28, 0.1, 1.0), rate=0.1)
        >>> round(c.update(c.init(), 0.5, 1.0).value, 4), round(c.update(c.init(), 2.0, 1.0).value, 4)
        (0.308, 0.2545)
    """
    knob.check()
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be > 0 and finite, got {rate}; 0.05 means 5 % per update")
    if not knob.least <= knob.high:
        raise ValueError(f"multiplicative needs positive values, got a knob up to {knob.high:g}; take pi or predictive")
    low = max(knob.low, knob.least)
    knob = knob._replace(low=low, start=max(knob.start, low))

    def update(state: ValueState, entropy: float, target: float) -> ValueState:
        error = relative_error(entropy, target) * knob.sign
        factor = 1.0 if error == 0 else (1 + rate if error > 0 else 1 / (1 + rate))
        return ValueState(knob.clip(state.value * factor))

    return Controller(lambda: ValueState(knob.start), update)


def sign_step(knob: Range, step: float | None = None) -> Controller:
    """``knob ← clip(knob + step · sign(H* − H))``; ``step`` defaults to a fiftieth of the range [ours].

    Reference: the rule of MAI-Thinking-1's clip (report, 2026-06) and of Skywork-OR1's coefficient (arXiv:2505.22312).

    Raises:
        ValueError: ``step`` not positive or not finite.

    Example:
        >>> c = sign_step(Range(0.0, 0.0, 0.005), step=1e-4)
        >>> c.update(c.init(), 0.1, 0.2).value
        0.0001
    """
    knob.check()
    size = (knob.high - knob.low) / 50 if step is None else step
    if not 0 < size < math.inf:
        raise ValueError(f"step must be > 0 and finite, got {step}; it is in units of the knob")

    def update(state: ValueState, entropy: float, target: float) -> ValueState:
        error = relative_error(entropy, target) * knob.sign
        return ValueState(knob.clip(state.value + size * ((error > 0) - (error < 0))))

    return Controller(lambda: ValueState(knob.start), update)


class GatedState(NamedTuple):
    """State of the gated step: the knob in force, and the coefficient behind the gate."""

    value: float
    coefficient: float


def gated_step(knob: Range, step: float | None = None) -> Controller:
    """A sign step whose knob is in force only while entropy is below its target.

    Above it the knob is off, at its neutral value: a coefficient at 0, a weight at 1.

    Reference: Skywork-OR1's adaptive entropy bonus (arXiv:2505.22312): ``c += δ`` below the target, ``c −= δ`` above;
    and the gate of STARE (arXiv:2606.19236), ``W += α·sign(H* − H)``.

    Example:
        >>> c = gated_step(Range(0.001, 0.0, 0.005), step=0.001)
        >>> c.update(c.init(), 0.1, 0.2), c.update(c.init(), 0.3, 0.2)
        (GatedState(value=0.002, coefficient=0.002), GatedState(value=0.0, coefficient=0.0))
    """
    inner = sign_step(knob, step)
    rest = knob.neutral()

    def update(state: GatedState, entropy: float, target: float) -> GatedState:
        coefficient = inner.update(ValueState(state.coefficient), entropy, target).value
        return GatedState(coefficient if entropy < target else rest, coefficient)

    return Controller(lambda: GatedState(rest, knob.start), update)


def switch(knob: Range, width: float = 0.05) -> Controller:
    """All the way to one bound if entropy is too low, to the other if it is too high, at rest in between.

    ``knob = high, low or neutral`` as ``(H* − H)/H*`` is above ``width``, below ``−width`` or inside (for a knob that
    raises entropy)

    Reference: Entrocraft's choice of rollouts (arXiv:2604.26326); its band is unknown (?), 5 % is [ours].

    Raises:
        ValueError: ``width`` negative or not finite.

    Example:
        >>> c = switch(Range(0.0, -1.0, 1.0), width=0.1)
        >>> [c.update(c.init(), h, 1.0).value for h in (0.8, 1.05, 1.2)]
        [1.0, 0.0, -1.0]
    """
    knob.check()
    if not 0 <= width < math.inf:
        raise ValueError(f"width must be >= 0 and finite, got {width}; 0.05 is a band of 5 % either side of the target")

    def update(state: ValueState, entropy: float, target: float) -> ValueState:
        error = relative_error(entropy, target)
        if abs(error) <= width:
            return ValueState(knob.neutral())
        return ValueState(knob.high if error * knob.sign > 0 else knob.low)

    return Controller(lambda: ValueState(knob.start), update)


SHAPES: dict[str, Callable[[float], float]] = {
    "up_down": lambda x: 1 - abs(2 * x - 1),
    "down_up_down": lambda x: -math.sin(3 * math.pi * x),
    "oscillate": lambda x: (1 - x) * math.sin(6 * math.pi * x),
}


class ScheduleState(NamedTuple):
    """State of a schedule: the knob, and how many updates it has seen."""

    value: float
    updates: int = 0


def schedule(knob: Range, shape: str = "up_down", steps: float = 800) -> Controller:
    """Turn the knob by a clock, whatever the readings, over ``steps`` updates, and keep it at its start afterwards.

    ``knob = start + s·(high − start)`` for s > 0, ``start + s·(start − low)`` for s < 0, s in [−1, 1] at the share x of
    the steps; towards more entropy is up. ``up_down``: ``1 − |2x − 1|``; ``down_up_down``: ``−sin 3πx``; ``oscillate``,
    which decays: ``(1 − x)·sin 6πx``. The target changes nothing.

    Reference: the schedules of dynamic clip thresholds (arXiv:2602.09782) by name; their numbers are unknown (?), and
    the curves are [ours].

    Raises:
        ValueError: an unknown shape; fewer steps than 1, or no end of them.

    Example:
        >>> c = schedule(Range(0.3, 0.1, 0.5), "up_down", steps=4)
        >>> state, seen = c.init(), []
        >>> for _ in range(5):
        ...     state = c.update(state, 1.0, 1.0); seen.append(round(state.value, 3))
        >>> seen
        [0.4, 0.5, 0.4, 0.3, 0.3]
    """
    knob.check()
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}{suggest(shape, SHAPES)}")
    if not 1 <= steps < math.inf:
        raise ValueError(f"steps must be >= 1 and finite, got {steps}; count the updates of the controller")

    def update(state: ScheduleState, entropy: float, target: float) -> ScheduleState:
        updates = state.updates + 1
        height = SHAPES[shape](updates / steps) * knob.sign if updates < steps else 0.0
        reach = knob.high - knob.start if height > 0 else knob.start - knob.low
        return ScheduleState(knob.clip(knob.start + height * reach), updates)

    return Controller(lambda: ScheduleState(knob.start), update, steers=False)


# Over many readings an update of pi removes a/REACH of the error, a what its whole range moves in a step.
REACH = 0.06


def pi(knob: Range, gain: float = 4.0, integral_gain: float = 0.05, delay: float = 0.0) -> Controller:
    """``knob = start + span·(gain·e/f + integral_gain·Σ n·e/(f·(3 + f)/4))``, ``f = 1 + 0.06·gain·(n − 1 + delay)``.

    e is the relative error of the mean of the n readings since the last update, span = high − low. Gains are per unit
    of relative error and in spans, so that one pair serves every knob. Entropy integrates the knob, so a large gain and
    a small integral gain settle without ringing.

    f is 1 if the controller acts at every step. Over n steps a knob moves entropy n times as far, and the mean that it
    answers is old by half as many. If the whole range moves entropy by a share a of its target per step, an update
    removes ``a·n·gain/f`` of the error: below 0.34 it comes back without a swing, from 2 on it oscillates from bound to
    bound. f keeps it below ``a/0.06`` for any n, 0.67 at 4 % a step; the loop is then f times as slow, and the sum
    (3 + f)/4 times, so that its swings stay damped. ``delay`` is what the readings do not show: optimizer steps from a
    knob to its effect, as momentum or an engine that samples ahead makes them.

    A step at a share ρ of the largest learning rate so far counts as ρ readings, and f is at least 1: while the rate
    decays the sum does not wind up.

    Anti-windup: the sum does not grow while the output is held at the bound that the error pushes against.

    Reference: [ours]; EntroPIC (arXiv:2511.15248) steers sample weights by PI, its gains are unknown.

    Raises:
        ValueError: a gain or delay that is negative or not finite, or both gains zero.

    Example:
        >>> c = pi(Range(0.0, -1.0, 1.0), gain=0.5, integral_gain=0.1)
        >>> state = c.update(c.init(), 0.9, 1.0)
        >>> round(state.value, 3), round(state.integral, 3)
        (0.12, 0.1)
        >>> round(c.update(c.init(), 0.9, 1.0, readings=101).value, 3)  # f = 4: 2 (0.5 · 0.1/4 + 0.1 · 101 · 0.1/7)
        0.314
    """
    knob.check()
    if not (gain >= 0 and integral_gain >= 0 and 0 < gain + integral_gain < math.inf):
        raise ValueError(
            f"gains must be >= 0, finite and not both 0, got {gain} and {integral_gain}; 4 and 0.05 are the defaults"
        )
    if not 0 <= delay < math.inf:
        raise ValueError(f"delay must be >= 0 and finite, got {delay}; count optimizer steps")
    span = knob.high - knob.low

    def update(state: IntegralState, entropy: float, target: float, readings: float = 1) -> IntegralState:
        error = relative_error(entropy, target) * knob.sign
        slower = 1 + REACH * gain * (max(readings - 1, 0) + delay)
        integral = state.integral + error * (readings / (slower * (3 + slower) / 4))
        value = knob.start + span * (gain / slower * error + integral_gain * integral)
        pushing = (value > knob.high and error > 0) or (value < knob.low and error < 0)
        return IntegralState(knob.clip(value), state.integral if pushing else integral)

    return Controller(lambda: IntegralState(knob.start, 0.0), update, counts=True)


def predictive(knob: Range, delay: float | None = None, trust: float = math.inf) -> Controller:
    """Solve for the knob whose predicted change is the wanted drift, corrected by the measured slope; no gain to tune.

    ``knob = ((H* − Ĥ)/τ − d − s·p₀) / (s·g)``, ``τ = (5 + n + delay/2)·(1 + Var s/s²)``, p₀ the predicted change of a
    step with the knob at 0, g its derivative by the knob, n the steps since the last update

    A Kalman filter of three numbers holds what a prediction lacks: the entropy Ĥ behind noisy readings, the slope s of
    measured on predicted change, and the drift d that no prediction explains. The slope never falls below a tenth of
    the first guess, and a doubtful one lengthens the horizon τ, so that it does not throw the knob about. The knobs
    that were really in force enter, so nothing winds up at a bound. If the prediction gives the knob no effect (g of
    the wrong sign, or 0), it drifts to the bound that its ``sign`` names. All constants are relative to the target.

    **Delay.** A filter for each delay of 0, 2, 4, 8 and 16 steps says where entropy will be when the knob begins to
    act; the knob is the mean of their answers, weighted by how well each predicted the readings. ``delay`` leaves one.

    **Trust.** A slope that noise has made small and doubtful can turn the knob far up while entropy is above its
    target, since the doubt lengthens the way to the target and leaves the drift. ``trust=25`` prevents that: if
    ``Var s/s²`` is above it, the knob is not turned to the other side of its rest than the slope without doubt
    would ask for.

    **Learning rate.** If readings carry it, a step at the share ρ of the largest rate so far counts as ρ steps. A
    decaying rate so stretches the horizon, and the knob is not turned up to make good what it can no longer move.

    A forecast is optional. An update without one keeps the means p₀ and g of those before it, and the filters continue.
    Before the first one, or if none ever comes, p₀ = 0 and g is a guess, ``g = sign · 0.01 · H* / (high − low)``: the
    whole range of the knob moves entropy by a hundredth of its target in a step. The filters then learn from readings
    alone how far from this guess the knob is. The first forecast restarts them on the scale of the predictions.

    Reference: [ours]; the predicted change is Theorem 1 of arXiv:2603.11682.

    Raises:
        ValueError: a range, a delay or a trust that is wrong; at an update, a target that is not positive.

    Example:
        >>> c = predictive(Range(0.0, -1.0, 1.0), delay=0)
        >>> state = c.update(c.init(), 0.9, 1.0, Forecast(change=-0.001, gain=0.005, steps=1, readings=1, time=1.0))
        >>> round(state.best().slope, 3), round(state.value, 3)  # (0.101/(6 · 5) + 0.001)/0.005
        (1.0, 0.873)
        >>> none = Forecast(change=0.0, gain=0.0, steps=0, readings=1, time=1.0)
        >>> round(c.update(c.init(), 0.9, 1.0, none).value, 3)  # by sign
        0.667
    """
    knob.check()
    if delay is not None and not 0 <= delay < math.inf:
        raise ValueError(f"delay must be >= 0 and finite, got {delay}; count optimizer steps, or leave it out")
    if not trust > 0:
        raise ValueError(f"trust must be > 0, got {trust}; 25 is usual, a standard deviation of five times the slope")
    delays = DELAYS if delay is None else (round(delay),)

    def update(state: PredictiveState, entropy: float, target: float, forecast: Forecast) -> PredictiveState:
        error = relative_error(entropy, target) * knob.sign
        state = follow(state, entropy, target, forecast, knob.high - knob.low, knob.sign, delays)
        if state.gain * knob.sign > 0:
            return state._replace(value=plan(state, target, forecast, knob.clip, knob.neutral(), trust))
        bound = knob.high if error > 0 else knob.low
        return state._replace(value=knob.clip(state.value + (bound - state.value) / MEMORY))

    return Controller(lambda: PredictiveState(knob.start, (knob.start,) * max(delays)), update, forecasts=True)


CONTROLLERS: dict[str, Callable[..., Controller]] = {
    "fixed": fixed,
    "double_halve": double_halve,
    "multiplicative": multiplicative,
    "sign_step": sign_step,
    "gated_step": gated_step,
    "switch": switch,
    "schedule": schedule,
    "pi": pi,
    "predictive": predictive,
}


def parse_controller(text: str, knob: Range) -> Controller:
    """A controller from its text form: a name, and options after colons, as in ``pi:gain=0.5:integral_gain=0.02``.

    Raises:
        ValueError: an unknown name or option, an option given twice, or a value that should be a finite number.

    Example:
        >>> c = parse_controller("sign_step:step=0.1", Range(0.0, -1.0, 1.0))
        >>> c.update(c.init(), 0.5, 1.0).value
        0.1
    """
    name, *pairs = text.strip().split(":")
    if name not in CONTROLLERS:
        raise ValueError(
            f"controller must be one of {', '.join(CONTROLLERS)}; got {name!r}{suggest(name, CONTROLLERS)}"
        )
    takes = signature(CONTROLLERS[name]).parameters
    allowed = list(takes)[1:]
    options: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in allowed:
            raise ValueError(f"controller {name} takes {', '.join(allowed) or 'no options'}; got {key!r}")
        if key in options:
            raise ValueError(f"controller option {key} is given twice, got {text!r}; keep one")
        options[key] = value if isinstance(takes[key].default, str) else _number(name, key, value)
    return CONTROLLERS[name](knob, **options)


def _number(name: str, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"controller option {key} must be a number, got {text!r}; write {name}:{key}=0.1") from None
    if not math.isfinite(value):
        raise ValueError(f"controller option {key} must be a finite number, got {text!r}; write {name}:{key}=0.1")
    return value
