"""Targets that find their level from the run: ``auto`` asks nobody for a number.

The level is a share of the initial entropy. Each reading multiplies it by ``exp(rate·move)``, within a floor and a
ceiling. A rule
says the move, between −1 and 1, from what the run shows. The ceiling is what keeps a price of entropy from running away
where no answer is right: there, nothing opposes it.

A nat is the unit of entropy taken with the natural logarithm. *Worth* is what one nat of the mean entropy per token is
worth, in reward per answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import NamedTuple

from ..types import GroupFacts
from .levels import Target, check_first, measure
from .names import choose


class AutoState(NamedTuple):
    """State of an automatic target: plain numbers.

    Attributes:
        readings, sum, count: as in :class:`~isentropic.control.levels.TargetState`.
        share: the level, as a share of the initial entropy.
        move: the latest move, between −1 and 1.
        cause: which of the rule's reasons is in force, and
        shown, beside: the figures that it quotes.
        a, b, c, d, e, f: what the rule remembers.
    """

    readings: int = 0
    sum: float = 0.0
    count: float = 0.0
    share: float = 1.0
    move: float = 0.0
    cause: int = 0
    shown: float = 0.0
    beside: float = 0.0
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    e: float = 0.0
    f: float = 0.0


Step = Callable[[AutoState, float, float, GroupFacts], AutoState]


class Rule(NamedTuple):
    """A rule in force.

    Attributes:
        step: from a state and a reading to a state with the move and what the rule remembers.
        reasons: formats of ``shown`` and ``beside``, by ``cause``.
        places: whether the rule sets the share itself, in place of a move.
        explore: share of the initial entropy that the rule may ask for whatever the run shows.
    """

    step: Step
    reasons: tuple[str, ...]
    places: bool = False
    explore: float = 0.0


def _keep(memory: float) -> float:
    return 1.0 - 1.0 / memory


def _towards(worth: float, price: float) -> float:
    """The move for a price: up if a nat costs less than it is worth, down if it costs more.

    >>> _towards(0.3, 0.3), _towards(0.3, 0.9), _towards(0.3, 0.0), _towards(0.3, -0.1)
    (0.0, -0.5, 1.0, 1.0)
    """
    return 1.0 if price <= 0 else (worth - price) / (worth + price)


def price(worth: float = 0.5, memory: float = 50.0) -> Rule:
    """Rule 1, a constant price of entropy: hold it where one nat costs what it is worth.

    Maximise ``E[R] + λ·Σ_t H_t``. A step along ``A − λ·L``, ``L = log π + H`` (arXiv:2603.11682), climbs it. At its
    optimum ``π ∝ exp(A/λ)``, so that ``A = λ·L`` up to a constant of the row: **the price at which the policy stands
    still is the slope of the advantage on the centred log-probability**,

        λ̂ = Σ (R − R̄)·L / Σ L²,

    by least squares over the tokens of groups that are neither failed nor solved, and with T tokens an answer a nat of
    the mean entropy costs ``T·λ̂`` of reward. While it costs more than ``worth``, the reward gains more by the fall of
    entropy than entropy is worth, and the level falls; else it rises. Groups that fail altogether, or are solved, say
    nothing of the price and enter neither sum; upward moves are scaled by the share of groups that do not fail, so that
    where all fail, the price is capped at nothing.

    Args:
        worth: reward of an answer for one nat of the mean entropy per token.
        memory: readings over which the two sums are remembered.

    [derived: the slope; ours: the rule]
    """

    def step(state: AutoState, entropy: float, tokens: float, groups: GroupFacts) -> AutoState:
        length, keep = tokens / groups.completions, _keep(memory)
        state = state._replace(a=keep * state.a + length * groups.pull, b=keep * state.b + groups.spread)
        if not groups.mixed > 0 or not state.b > 0:
            return state._replace(move=0.0, cause=1)
        cost = state.a / state.b
        move = _towards(worth, cost)
        move *= 1 - groups.failed / groups.completions if move > 0 else 1.0
        return state._replace(move=move, cause=0, shown=cost, beside=worth)

    return Rule(step, ("a nat costs {0:.2f} of reward and is worth {1:g}", "no group has both right and wrong answers"))


def success(failing: float = 0.5, memory: float = 20.0) -> Rule:
    """Rule 2, by success: raise the level while groups that fail altogether are many and grow no fewer; lower it slowly
    while mixed groups turn right.

    A group that fails altogether teaches nothing, and only exploration changes that: ``P(some right answer in g) =
    1 − (1 − q)^g``. A mixed group teaches, and what it teaches lowers entropy. With f, m and s the shares of failed and
    of mixed groups and the success rate, each remembered over ``memory`` readings and over four times as many,

        raise by f      if f ≥ ``failing`` and f_fast > f_slow − 0.01,
        raise by 1      if the held-out accuracy is more than two standard errors below its best,
        lower by m/2    if s_fast > s_slow,
        stay            otherwise.

    Args:
        failing: share of groups from which they are many.
        memory: readings of the fast means.

    [ours]
    """

    def step(state: AutoState, entropy: float, tokens: float, groups: GroupFacts) -> AutoState:
        n = groups.completions
        failed, rate, mixed = groups.failed / n, groups.rate / n, groups.mixed / n
        begins = state.a == state.b == state.c == state.d == 0.0
        fast, slow = (1.0, 1.0) if begins else (1 / memory, 1 / (4 * memory))
        state = state._replace(
            a=state.a + fast * (failed - state.a),
            b=state.b + slow * (failed - state.b),
            c=state.c + fast * (rate - state.c),
            d=state.d + slow * (rate - state.d),
        )
        if groups.held_out_count > 0:
            accuracy = groups.held_out / groups.held_out_count
            error = math.sqrt(max(accuracy * (1 - accuracy), 1 / groups.held_out_count) / groups.held_out_count)
            # f remembers by how much the latest one is below the best, less two standard errors.
            best = max(state.e, accuracy)
            state = state._replace(e=best, f=max(best - accuracy - 2 * error, 0.0))
        if state.f > 0:
            return state._replace(move=1.0, cause=3, shown=state.e, beside=0.0)
        if state.a >= failing and state.a > state.b - 0.01:
            return state._replace(move=state.a, cause=0, shown=state.a)
        if state.c > state.d:
            return state._replace(move=-mixed / 2, cause=1, shown=mixed)
        return state._replace(move=0.0, cause=2, shown=mixed)

    return Rule(
        step,
        (
            "{0:.0%} of groups fail altogether, no fewer than before",
            "{0:.0%} of groups mixed, accuracy rising",
            "{0:.0%} of groups mixed, accuracy not rising",
            "held-out accuracy is below its best of {0:.3f} by more than two standard errors",
        ),
    )


def fit(worth: float = 0.5, memory: float = 100.0, sure: float = 2.0) -> Rule:
    """Rule 3, by the run's own curve: lower the level only while a marginal nat buys more reward than ``worth``.

    Runs trace ``R = b − a·e^H`` (arXiv:2505.22617 fits it to its runs). Least squares of the readings' rewards on
    ``x = e^H``, remembered over ``memory`` readings with weights ``w``, gives ``a = −S_xy/S_xx`` with the standard
    error ``√(S_rr/(S_xx·(n − 2)))``, ``S_rr = S_yy − S_xy²/S_xx`` and n the effective number of readings,
    ``(Σw)²/Σw²``. A nat less buys ``−dR/dH = a·e^H``. The fit is believed if a is more than ``sure`` standard errors
    above 0; until then the level stays.

    Args:
        worth: reward of an answer for one nat of the mean entropy per token.
        memory: readings that the fit remembers.
        sure: standard errors.

    [derived: the slope and its error; ours: the rule]
    """

    def step(state: AutoState, entropy: float, tokens: float, groups: GroupFacts) -> AutoState:
        x, y, keep = math.exp(min(entropy, 20.0)), groups.reward / groups.completions, _keep(memory)
        weight = keep * state.a + 1
        # Means and centred sums, updated with decay: sums of raw squares would cancel.
        dx, dy = x - state.b, y - state.c
        state = state._replace(
            a=weight,
            b=state.b + dx / weight,
            c=state.c + dy / weight,
            d=keep * state.d + dx * dx * (1 - 1 / weight),
            e=keep * state.e + dx * dy * (1 - 1 / weight),
            f=keep * state.f + dy * dy * (1 - 1 / weight),
        )
        # The weights are a geometric series, of which Σw and Σw² are known.
        last = 1 - weight * (1 - keep)
        count = weight * weight * (1 - keep * keep) / max(1 - last * last, 1e-12)
        if not state.d > 0 or count < 10:
            return state._replace(move=0.0, cause=1, shown=0.0)
        slope = -state.e / state.d
        residual = max(state.f - state.e * state.e / state.d, 0.0)
        error = math.sqrt(residual / (state.d * (count - 2)))
        if slope <= sure * error:
            return state._replace(move=0.0, cause=1, shown=slope / error if error else 0.0)
        buys = slope * x
        move = min(_towards(worth, buys), 0.0)
        return state._replace(move=move, cause=0 if move else 2, shown=buys, beside=worth)

    return Rule(
        step,
        (
            "one nat less buys {0:.2f} of reward, and is worth {1:g}",
            "the fit is not significant, its slope is {0:.1f} standard errors",
            "one nat less buys {0:.2f} of reward, which is less than {1:g}",
        ),
    )


def failing(level: float = 0.6) -> Rule:
    """Rule 4, two levels: entropy is held over groups that fail, and left alone over groups that are solved.

    Give every token the weight ``1 − ρ``, ρ being the success rate of its group. With w the mean weight, and H_f and
    H_s the means of H under the weights ``1 − ρ`` and ρ, ``H = w·H_f + (1 − w)·H_s``. The target

        H* = w·h + (1 − w)·H_s,   h = ``level`` of the initial entropy,

    makes the error ``H − H* = w·(H_f − h)``: it is that of the failing groups alone, and where all are solved there is
    none, whatever their entropy is.

    Args:
        level: share of the initial entropy at which failing groups are held.

    [ours]
    """

    def step(state: AutoState, entropy: float, tokens: float, groups: GroupFacts) -> AutoState:
        initial = state.sum / state.count
        rest = max(tokens * entropy - groups.failing_entropy, 0.0)
        nats = (groups.failing_tokens * level * initial + rest) / tokens
        return state._replace(move=0.0, share=max(nats / initial, 1e-3), shown=groups.failing_tokens / tokens)

    return Rule(step, ("{0:.0%} of tokens, by the failure of their groups, are held",), places=True)


def variety(explore: float = 0.6, slack: float = 2.0, memory: float = 20.0) -> Rule:
    """Rule 5, by the variety of right answers: hold what they can carry, and enough to find those that are missing.

    Let q be the chance of a right answer and S the entropy of whole answers, which is T·H at T tokens an answer. By the
    chain rule,

        S = h(q) + q·S_right + (1 − q)·S_wrong.

    As q goes to 1, S goes to S_right, which is at most the logarithm of the number of right answers. A level above
    S_right/T can then be kept by wrong answers alone (Fano's inequality). While answers are wrong, entropy is what
    finds the right ones. Hence the level that a policy moves towards, with the success rate q of its groups,

        H* = q·slack·(−log c)/T + (1 − q)·h,   h = ``explore`` of the initial entropy.

    c is the chance that two right answers to a prompt are the same; the share of equal ones among the pairs of a group
    estimates it without bias. ``−log c`` is the collision entropy, which is below Shannon's S_right: ``slack`` makes up
    for that. It also keeps the rule from following its own fall, where S_right falls more slowly than H. A move is
    smaller than ``rate`` within a tenth of H*.

    Args:
        explore: share of the initial entropy at which a policy that has no right answer is held.
        slack: what right answers are given, over their collision entropy.
        memory: readings over which sums are remembered.

    [derived: the bound; ours: the rule]
    """

    def step(state: AutoState, entropy: float, tokens: float, groups: GroupFacts) -> AutoState:
        keep = _keep(memory)
        state = state._replace(
            a=keep * state.a + groups.repeats,
            b=keep * state.b + groups.paired,
            c=keep * state.c + groups.rate,
            d=keep * state.d + groups.completions,
        )
        if not state.b > 0:
            return state._replace(move=0.0, cause=1)
        initial, rate = state.sum / state.count, state.c / state.d
        same = min(max(state.a / state.b, 1e-9), 1.0)
        carried = slack * -math.log(same) * groups.completions / (tokens * initial)
        goal = rate * carried + (1 - rate) * explore
        move = min(max(10 * math.log(max(goal, 1e-9) / state.share), -1.0), 1.0)
        return state._replace(move=move, cause=0, shown=same, beside=goal)

    return Rule(
        step,
        (
            "two right answers are the same with a chance of {0:.2f}, which asks for {1:.0%} of the start",
            "no group has two right answers yet",
        ),
        explore=explore,
    )


class Kind(NamedTuple):
    """What a rule's name stands for.

    Attributes:
        make: the rule; its arguments are options of the name.
        what: it does, in words.
        usual: options of :func:`auto` that differ from its defaults under this rule.
    """

    make: Callable[..., Rule]
    what: str
    usual: dict[str, float] = {}  # noqa: RUF012  (never changed)


AUTO: dict[str, Kind] = {
    "price": Kind(price, "where one nat costs the reward that it is worth"),
    "success": Kind(success, "up while groups fail altogether, slowly down while mixed groups turn right"),
    "fit": Kind(fit, "down while the fitted curve of reward against entropy says that it pays"),
    "variety": Kind(
        variety,
        "what the variety of right answers can carry, and enough to find those that are missing",
        {"ceiling": 0.6, "rate": 0.005},
    ),
    "failing": Kind(failing, "held over groups that fail, left alone over groups that are solved"),
}
DEFAULT_RULE = "variety"


def auto(
    rule: Rule,
    start: float = 0.6,
    floor: float = 0.3,
    ceiling: float = 1.0,
    rate: float = 0.002,
    first: int = 1,
) -> Target:
    """A target that a rule moves, within a floor and a ceiling. A reading without groups moves nothing.

    It works one way: what a rule finds is worth holding, and no reason to push entropy down faster than learning does.

    Args:
        rule: what says the move.
        start, floor, ceiling: shares of the initial entropy.
        rate: the most that the logarithm of the level moves by in a reading.
        first: readings that the initial entropy is the mean of; the knob is held meanwhile.

    Raises:
        ValueError: shares or a rate that make no sense.

    Example:
        >>> target = auto(price(worth=0.3), start=1.0, rate=0.1)
        >>> state = target.update(target.init(), 2.0, 100.0, None)
        >>> facts = GroupFacts(completions=10.0, failed=5.0, pull=0.9, spread=10.0)
        >>> state = target.update(state, 2.0, 100.0, facts)  # ten tokens an answer: a nat costs 0.9
        >>> round(target.level(state), 4), target.why(state)
        (1.9025, 'lowered: a nat costs 0.90 of reward and is worth 0.3')
    """
    check_first(first)
    if not 0 < floor <= start <= ceiling:
        raise ValueError(
            f"an automatic target needs 0 < floor <= start <= ceiling, got {floor:g}, {start:g} and {ceiling:g}; "
            "give shares such as floor=30%:start=60%"
        )
    if rule.explore > ceiling:
        raise ValueError(
            f"explore of an automatic target must be at most its ceiling, {ceiling:.0%}, got {rule.explore:.0%}; lower "
            "explore, or raise ceiling"
        )
    if not 0 < rate <= 1:
        raise ValueError(f"rate of an automatic target must lie in (0, 1] per reading, got {rate:g}; 0.002 is usual")

    def init() -> AutoState:
        return AutoState(share=start)

    def update(state: AutoState, entropy: float, tokens: float, groups: GroupFacts | None = None) -> AutoState:
        state = measure(first, state, entropy, tokens)
        if state.readings <= first or groups is None or not groups.completions > 0:
            return state
        state = rule.step(state, entropy, tokens, groups)
        if rule.places:
            return state
        return state._replace(share=min(max(state.share * math.exp(rate * state.move), floor), ceiling))

    def level(state: AutoState) -> float | None:
        return None if state.readings < first else state.share * state.sum / state.count

    def hold(state: AutoState) -> bool:
        return state.readings <= first

    def why(state: AutoState) -> str:
        if state.readings <= first:
            return "measuring the start"
        word = "raised" if state.move > 0 else "lowered" if state.move < 0 else "held"
        at = ""
        if not rule.places:
            at = " at its ceiling" if state.share >= ceiling else " at its floor" if state.share <= floor else ""
        return f"{'held' if at else word}{at}: {rule.reasons[state.cause].format(state.shown, state.beside)}"

    return Target(init, update, level, hold, True, why, one_way=True)


def parse_auto(text: str, first: int = 1) -> Target:
    """An automatic target from its text form, ``auto[:RULE][:OPTION=VALUE...]``.

    Args:
        text: the form; options are those of the rule and of :func:`auto`. Shares may be written as ``30%``.
        first: readings that the initial entropy is the mean of.

    Raises:
        ValueError: an unknown rule or option, a value that is no number, or numbers that make no sense.

    Example:
        >>> parse_auto("auto:success:floor=30%").reads_groups
        True
        >>> parse_auto("auto:price:worht=0.2")
        Traceback (most recent call last):
        ...
        ValueError: an option of target auto:price must be one of ceiling, floor, ...; got 'worht' (did you mean worth?)
    """
    _, *parts = text.strip().split(":")
    name = parts.pop(0) if parts and "=" not in parts[0] else DEFAULT_RULE
    choose("rule of an automatic target", name, AUTO)
    make, _, usual = AUTO[name]
    of_rule = list(signature(make).parameters)
    own = ["start", "floor", "ceiling", "rate"]
    options: dict[str, float] = {}
    for part in parts:
        key, _, value = part.partition("=")
        choose(f"an option of target auto:{name}", key, [*of_rule, *own])
        if key in options:
            raise ValueError(f"target option {key} is given twice, got {text!r}; keep one")
        options[key] = _number(key, value)
    for key in of_rule:
        least = 2.0 if key == "memory" else 0.0
        if key in options and not options[key] >= least:
            raise ValueError(
                f"target option {key} must be >= {least:g}, got {options[key]:g}; leave it out for its usual value"
            )
    rule = make(**{key: value for key, value in options.items() if key in of_rule})
    return auto(rule, **{**usual, **{key: value for key, value in options.items() if key in own}}, first=first)


def _number(key: str, text: str) -> float:
    share = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100 if share else 1)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"target option {key} must be a number or a share, got {text!r}; write {key}=0.3 or {key}=30%")
    return value
