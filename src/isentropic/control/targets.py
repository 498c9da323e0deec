"""Targets of entropy: pure pairs ``init() -> TargetState``, ``update(state, entropy, tokens) -> TargetState``.

A target gets every reading. ``level(state)`` is H*, nats per token, or ``None`` while the start is still being
measured; ``hold(state)`` is true if the knob must not move although a reading came in. A target that finds its level
from the run is in :mod:`isentropic.control.auto`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .auto import AUTO, DEFAULT_RULE, parse_auto
from .levels import Level, Target, TargetState, check_first, feasible, measure, parse_level

__all__ = [
    "TARGETS",
    "Level",
    "Settled",
    "Target",
    "TargetState",
    "anneal",
    "band",
    "constant",
    "feasible",
    "parse_level",
    "parse_target",
    "settle",
]


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
    check_first(first)
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
        state = measure(first, state, entropy, tokens)
        return state._replace(done=max(state.done, min((state.readings - 1) / max(steps - 1, 1), 1.0)))

    return Target(TargetState, update, level, hold)


def band(low: Level, high: Level, first: int = 1) -> Target:
    """Leave entropy alone inside ``[low, high]``; if it leaves the band, steer until it is back at the middle.

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
    check_first(first)
    if low.of_initial == high.of_initial and not low.amount < high.amount:
        raise ValueError(f"a band needs low < high, got {low.amount} and {high.amount}; swap them")
    measured = low.of_initial or high.of_initial

    def middle(state: TargetState) -> float | None:
        return None if measured and state.readings < first else (low.at(state) + high.at(state)) / 2

    def update(state: TargetState, entropy: float, tokens: float) -> TargetState:
        state = measure(first, state, entropy, tokens)
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


class Settled(NamedTuple):
    """State of a target that settles.

    Attributes:
        inner: state of the target itself.
        readings: number of readings so far.
        rate: learning rate of the last reading of this task; 0 before the first one.
        spent: Σ of the learning rates of this task so far.
        left: Σ of those that are still to come, by the schedule as it goes.
        window: what was left of them when the level began to fall; 0 before.
    """

    inner: Any
    readings: int = 0
    rate: float = 0.0
    spent: float = 0.0
    left: float = 0.0
    window: float = 0.0

    @property
    def progress(self) -> float:
        """How far the level has fallen, from 0 to 1."""
        return min(max(1 - self.left / self.window, 0.0), 1.0) if self.window else 0.0


def settle(target: Target, ends: Sequence[int], share: float = 0.1, to: float = 0.4) -> Target:
    """Let the level of a target down toward the end of the run, or of each task of a sequence.

    ``H* · (1 − (1 − to)·p)``, p from 0 to 1 over the last ``share`` of the task's learning

    It is for policies that are sampled at temperature 1, where every nat that was held counts as error: entropy is held
    while it serves learning, and let down before the policy is used.

    Learning is the sum of the learning rates, since what a knob can move in a step is proportional to its rate. At a
    constant rate a tenth of it is the last tenth of the steps; if the rate falls linearly to 0, it is the last third
    (√0.1). The rates to come follow from those of the last two readings, on a straight line that ends at 0.

    Args:
        target: whose level is let down.
        ends: optimizer steps done at the end of each task, in order; of a single task, the steps of the run.
        share: of a task's learning, over which the level falls.
        to: the level at the end of a task, as a share of the target's own.

    Raises:
        ValueError: shares that make no sense.

    Example:
        >>> t = settle(constant(parse_level("1.0")), ends=[10], share=0.2, to=0.5)
        >>> s, seen = t.init(), []
        >>> for _ in range(10):
        ...     s = t.update(s, 1.0, 1.0); seen.append(t.level(s))
        >>> seen[-4:]
        [1.0, 1.0, 0.75, 0.5]

    [ours]
    """
    for name, value in (("settle", share), ("settle_to", to)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {value:g}; write {name}=10%")

    def update(state: Settled, entropy: float, tokens: float, *groups: Any, rate: float | None = None) -> Settled:
        told = {"rate": rate} if target.reads_rate else {}
        inner = target.update(state.inner, entropy, tokens, *groups, **told)
        if state.readings in ends:
            state = Settled(inner, state.readings)
        readings, rate = state.readings + 1, 1.0 if rate is None else rate
        end = next((end for end in ends if end >= readings), None)
        if end is None:
            return Settled(inner, readings)
        left, spent = _to_come(rate, state.rate - rate, end - readings), state.spent + rate
        total = spent + left
        window = state.window if left <= state.window else 0.0  # a run may be resumed with more steps
        if left <= share * total * (1 + 1e-9):  # rounding must not move the step at which the level begins to fall
            window = window or share * total
        return Settled(inner, readings, rate, spent, left, window)

    def level(state: Settled) -> float | None:
        nats = target.level(state.inner)
        return None if nats is None else nats * (1 - (1 - to) * state.progress)

    def hold(state: Settled) -> bool:
        # A band that leaves entropy alone still lets it down.
        return target.hold(state.inner) and (state.progress == 0 or target.level(state.inner) is None)

    def why(state: Settled) -> str:
        if state.progress:
            return f"let down: {state.progress:.0%} of the way, at the end of the task"
        return "" if target.why is None else target.why(state.inner)

    return Target(lambda: Settled(target.init()), update, level, hold, target.reads_groups, why, reads_rate=True)


def _to_come(rate: float, fall: float, steps: int) -> float:
    """Σ of the learning rates of the next ``steps``, each ``fall`` below the one before and none below 0."""
    fall = max(fall, 0.0)
    if fall * steps > rate:
        steps = int(rate / fall)
    return rate * steps - fall * steps * (steps + 1) / 2


TARGETS: dict[str, str] = {
    "initial": "the entropy before training, measured over the first readings",
    "NATS (0.8)": "a constant, nats per token",
    "SHARE% (80%)": "a share of the initial entropy",
    "anneal:FROM:TO[:STEPS]": "linear from one NATS or SHARE% to another; at TO in the last of the steps or of the run",
    "floor:LEVEL (floor:60%)": "raise entropy to NATS or SHARE% if it is below, and never push it down",
    "band:LOW:HIGH": "leave it alone between two NATS or SHARE%, steer back to the middle when it leaves",
    "auto": f"found from the run, by the rule {DEFAULT_RULE}; options follow, as in auto:floor=20%",
    **{f"auto:{name}": kind.what for name, kind in AUTO.items()},
    "...:settle=10%": "any of these, let down over the last tenth of each task's learning, to settle_to=40% of it",
}


def parse_target(
    text: str, first: int = 1, steps: int | Sequence[int] | None = None, vocabulary: int | None = None
) -> Target:
    """A target from its text form, as the command line and config files write it (see :data:`TARGETS`).

    Args:
        text: the form.
        first: readings that the initial entropy is the mean of.
        steps: optimizer steps of the whole run, for a target that covers it; of a sequence of tasks, the steps done at
            the end of each.
        vocabulary: number of tokens that the model chooses from, if known. A level in nats is checked against it here;
            one that is a share is nats only once the start is measured, and :func:`feasible` checks it then.

    Raises:
        ValueError: with what was got and the forms that are allowed; a level that is out of reach.

    Example:
        >>> t = parse_target("anneal:100%:50%:10")
        >>> t.level(t.update(t.init(), 2.0, 1))
        2.0
    """
    ends = [steps] if isinstance(steps, int) else list(steps or ())
    plain, options = _settling(str(text).strip())
    target = _parse_plain(plain, first, ends[-1] if ends else None, vocabulary)
    if not options:
        return target
    if not ends:
        raise ValueError(_needs_steps(text, "pass steps, or leave settle out"))
    share, to = (_share_of(key, options.get(key, usual)) for key, usual in (("settle", "10%"), ("settle_to", "40%")))
    return settle(target, ends, share, to)


def _settling(text: str) -> tuple[str, dict[str, str]]:
    """A form without its options for settling, and these."""
    parts, options, kept = text.split(":"), {}, []
    for part in parts:
        key, equals, value = part.partition("=")
        if not (equals and key.strip() in ("settle", "settle_to")):
            kept.append(part)
        elif key.strip() in options:
            raise ValueError(f"target option {key} is given twice, got {text!r}; keep one")
        else:
            options[key.strip()] = value
    if options and "settle" not in options:
        raise ValueError(f"settle_to has no effect without settle, got {text!r}; write settle=10% too")
    return ":".join(kept), options


def _share_of(key: str, text: str) -> float:
    level = parse_level(text) if text.strip().endswith("%") else None
    if level is None:
        raise ValueError(f"{key} must be a share, got {text!r}; write {key}=10%")
    return level.amount


def _needs_steps(text: str, remedy: str) -> str:
    return f"target {text!r} covers a whole run, and its optimizer steps are not known here, got steps=None; {remedy}"


def _parse_plain(text: str, first: int, steps: int | None, vocabulary: int | None) -> Target:
    kind, *parts = text.split(":")
    if kind == "auto":
        return parse_auto(text, first)
    if kind == "anneal" and (len(parts) == 2 or (len(parts) == 3 and _is_count(parts[2]))):
        over = int(parts[2]) if len(parts) == 3 else steps
        if over is None:
            raise ValueError(_needs_steps(text, f"pass steps, or write {text}:STEPS"))
        return anneal(parse_level(parts[0], vocabulary), parse_level(parts[1], vocabulary), over, first)
    if kind == "floor" and len(parts) == 1:
        return constant(parse_level(parts[0], vocabulary), first)._replace(one_way=True)
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
