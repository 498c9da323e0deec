"""The control loop: a controller and a target joined into one pure pair ``init()``, ``update(state, reading)``.

An engine, or a hand-written loop, passes one :class:`~isentropic.types.EntropyReading` per optimizer step and reads
``state.value``, the knob of the next step. A refused reading never moves the knob: it is counted in ``state.refused``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..types import EntropyReading
from .controllers import Controller, Range
from .predictive import Forecast
from .targets import Target

CUT_OUT = 1.5  # times the larger of the target and the first reading


class ThermostatState(NamedTuple):
    """Plain numbers; goes into a checkpoint as JSON.

    Attributes:
        controller: the controller's own state; its ``value`` is the knob.
        target: the target's state.
        sum, count: Σ H and tokens since the controller last acted.
        waited: readings since the controller last acted.
        predicted, gain, steps: Σ of those readings' predictions, and how many optimizer steps had one.
        refused: readings refused in a row.
        readings: readings accepted in all.
        rate: the largest learning rate so far; 0 before a reading carries one.
        time: Σ of the learning rates since the controller last acted, each as a share of the largest so far; a reading
            without a rate counts as 1.
        first: the first accepted reading, nats per token; 0 before it.
        cut_out: whether the knob was kept from raising entropy when the controller last acted.
    """

    controller: Any
    target: Any
    sum: float = 0.0
    count: float = 0.0
    waited: int = 0
    refused: int = 0
    predicted: float = 0.0
    gain: float = 0.0
    steps: int = 0
    readings: int = 0
    rate: float = 0.0
    time: float = 0.0
    first: float = 0.0
    cut_out: bool = False

    @property
    def value(self) -> float:
        """The knob."""
        return self.controller.value

    def __repr__(self) -> str:
        return f"ThermostatState(value={self.value:g}, readings={self.readings}, refused={self.refused})"


class Thermostat(NamedTuple):
    """A pair of pure functions, the way back from JSON, and views of the state.

    Attributes:
        init, update: the pair.
        level: the target in force, nats per token; None while the start is being measured.
        restore: the state from what :func:`to_json` made of it.
        steers: whether the knob follows readings at this state: not while the target holds it, and never if the
            controller goes by none.
        why: the reason for the current target, as text; empty if the target does not depend on the run.
    """

    init: Callable[[], ThermostatState]
    update: Callable[..., ThermostatState]
    level: Callable[[ThermostatState], float | None]
    restore: Callable[[dict[str, Any]], ThermostatState]
    steers: Callable[[ThermostatState], bool]
    why: Callable[[ThermostatState], str]

    def __repr__(self) -> str:
        state = self.init()
        level = self.level(state)
        target = "measured at the start" if level is None else f"{level:g} nats per token"
        return f"<Thermostat: knob starts at {state.value:g}, target {target}>"


def thermostat(
    controller: Controller, target: Target, every: int | None = None, knob: Range | None = None
) -> Thermostat:
    """Join a controller and a target.

    Args:
        controller: from :mod:`isentropic.control.controllers`.
        target: from :mod:`isentropic.control.targets`.
        every: act once in so many readings (optimizer steps), on their token-weighted mean; ``None`` acts when the
            caller says ``act=True``, which engines do at the end of a generation batch (REPO's published rule).
        knob: of the controller. With it there is a **cut-out**: while the mean entropy is above ``CUT_OUT`` times both
            the target and the first reading, a controller that steers cannot raise it any further. Its knob is at most
            at rest, whatever its estimates say. A custom controller has one if its state is a NamedTuple with a
            ``value``. [ours]

    Returns:
        ``update(state, reading, act=True)``. The target gets every accepted reading. A controller that counts is told
        how many the mean is of, one that forecasts gets their predictions; one that is not finite is left out.

    Raises:
        ValueError: ``every`` below 1.

    Example:
        >>> from isentropic.control.controllers import Range, sign_step
        >>> from isentropic.control.targets import parse_target
        >>> t = thermostat(sign_step(Range(0.0, -1.0, 1.0), step=0.1), parse_target("1.0"))
        >>> state = t.update(t.init(), EntropyReading(sum=8.0, count=10.0))
        >>> state.value, t.level(state)
        (0.1, 1.0)
        >>> t.update(state, EntropyReading(sum=float("nan"), count=10.0)).refused
        1
    """
    if every is not None and every < 1:
        raise ValueError(f"every must be >= 1 optimizer steps or None (a generation batch), got {every}")

    def init() -> ThermostatState:
        return ThermostatState(controller.init(), target.init())

    def update(state: ThermostatState, reading: EntropyReading, act: bool = True) -> ThermostatState:
        if reading.problem():
            return state._replace(refused=state.refused + 1)
        groups = (reading.groups,) if target.reads_groups else ()
        rate = {"rate": reading.rate} if target.reads_rate else {}
        heard = target.update(state.target, reading.mean, reading.count, *groups, **rate)
        state = _added(state, reading)._replace(target=heard)
        if not (act if every is None else state.waited >= every):
            return state
        level = target.level(state.target)
        if level is not None and not target.hold(state.target):
            mean = state.sum / state.count
            updated = controller.update(state.controller, mean, level, *_told(controller, state))
            limited = knob is not None and controller.steers and "value" in getattr(updated, "_fields", ())
            hot = limited and mean > CUT_OUT * max(level, state.first)
            if hot and knob is not None:
                updated = updated._replace(value=knob.not_raising(updated.value))
            state = state._replace(controller=updated, cut_out=hot)
        return state._replace(sum=0.0, count=0.0, waited=0, predicted=0.0, gain=0.0, steps=0, time=0.0)

    def restore(saved: dict[str, Any]) -> ThermostatState:
        blank = init()
        saved = _tuples(saved)
        return _like(blank, saved)

    def steers(state: ThermostatState) -> bool:
        return controller.steers and target.level(state.target) is not None and not target.hold(state.target)

    def why(state: ThermostatState) -> str:
        return "" if target.why is None else target.why(state.target)

    return Thermostat(init, update, lambda state: target.level(state.target), restore, steers, why)


def _added(state: ThermostatState, reading: EntropyReading) -> ThermostatState:
    """The sums with a reading more; a prediction that is not finite is none."""
    if not (math.isfinite(reading.predicted) and math.isfinite(reading.gain)):
        reading = reading._replace(predicted=0.0, gain=0.0, steps=0)
    share = 1.0
    if reading.rate is not None:
        state = state._replace(rate=max(state.rate, reading.rate))
        share = reading.rate / state.rate if state.rate else 0.0
    return state._replace(
        sum=state.sum + reading.sum,
        count=state.count + reading.count,
        waited=state.waited + 1,
        refused=0,
        predicted=state.predicted + reading.predicted,
        gain=state.gain + reading.gain,
        steps=state.steps + reading.steps,
        readings=state.readings + 1,
        first=state.first or reading.mean,
        time=state.time + share,
    )


def _told(controller: Controller, state: ThermostatState) -> tuple[Any, ...]:
    """What a controller takes beside the entropy and the target."""
    told: tuple[Any, ...] = ()
    if controller.forecasts:
        told += (Forecast(state.predicted, state.gain, state.steps, state.waited, state.time),)
    return (*told, state.time) if controller.counts else told


def _tuples(saved: Any) -> Any:
    """What JSON made lists of, as tuples again."""
    if isinstance(saved, dict):
        return {name: _tuples(value) for name, value in saved.items()}
    return tuple(map(_tuples, saved)) if isinstance(saved, list) else saved


def to_json(state: ThermostatState) -> dict[str, Any]:
    """The state as nested plain dicts; ``Thermostat.restore`` takes them back.

    Example:
        >>> from isentropic.control.controllers import Range, fixed
        >>> from isentropic.control.targets import parse_target
        >>> t = thermostat(fixed(Range(0.2, 0.1, 0.4)), parse_target("initial"))
        >>> t.restore(to_json(t.init())) == t.init()
        True
    """
    return _plain(state)


def _plain(value: Any) -> Any:
    """NamedTuples as dicts, within one another too."""
    return {k: _plain(v) for k, v in value._asdict().items()} if hasattr(value, "_asdict") else value


def _like(blank: Any, saved: Any) -> Any:
    """A NamedTuple of the same type as ``blank``, and within it, from what :func:`_plain` made of it."""
    if not hasattr(blank, "_asdict"):
        return saved
    return type(blank)(**{name: _like(getattr(blank, name, None), value) for name, value in saved.items()})
