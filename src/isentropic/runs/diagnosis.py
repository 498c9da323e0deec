"""What is wrong with a run, from its record alone: rules on measured quantities, the cause before its symptoms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from statistics import median
from typing import Any, NamedTuple

from .record import is_number
from .summary import SETTLED, steps_at_bound

# Thresholds of the rules, from runs on the embedded task: a step at the default learning rate moves ratios by 4 % rms,
# and at ten times that by 22 %, whereupon reward collapses.
_STEP_MOVES, _USUAL_MOVE = 0.15, 0.05
_WIDE_CLIP = 8.0  # largest allowed ratio over the smallest; the widest published clip of two bounds has 6.25
_IDLE_CLIP = 0.05  # share of gradients that a clip stops at least, if it does anything
_MOSTLY = 0.5  # share of steps
_OFF_TARGET = 0.1  # relative error
_LEFT_CLIP, _LEFT_BOUND = 0.2, 0.25  # shares of tokens, of rows
_MIN_BATCHES = 6
_SYMPTOMS = {"theorem2", "ratios", "reward", "knob", "oscillation", "target"}

Row = dict[str, Any]


class Problem(NamedTuple):
    """Something that is wrong with a run.

    Attributes:
        code: a stable name, which is that of the section in docs/troubleshooting.md.
        headline: the cause, in one line of at most 100 characters.
        detail: the measured quantities that show it.
        remedy: what to do.
    """

    code: str
    headline: str
    detail: str
    remedy: str


class Collapse(NamedTuple):
    """A reward that fell to less than half of its best, and did not recover.

    Attributes:
        step: the first optimizer step of the first batch that lies below the middle of best and end.
        best, end: mean rewards of the best few batches and of the last few.
    """

    step: int
    best: float
    end: float


class _Facts(NamedTuple):
    """What the rules read: settings, recipe, rows in order of steps, and whether reward collapsed."""

    config: dict[str, Any]
    recipe: dict[str, Any]
    rows: Sequence[Row]
    collapse: Collapse | None

    @property
    def before(self) -> Sequence[Row]:
        """The rows before reward collapsed: afterwards there is no gradient that could show a cause."""
        return self.rows if self.collapse is None else [row for row in self.rows if row["step"] <= self.collapse.step]

    def values(self, name: str, rows: Sequence[Row] | None = None) -> list[float]:
        return [row[name] for row in (self.rows if rows is None else rows) if is_number(row.get(name))]

    def off_policy(self) -> Sequence[Row]:
        """The steps whose samples are of other weights: the others have ratios of 1."""
        rows = [row for row in self.before if is_number(row.get("ratio/ess_frac"))]
        return [row for row in rows if row.get("policy/age", row["ratio/ess_frac"] < 1) > 0]

    def and_reward(self) -> str:
        return "" if self.collapse is None else f", and reward collapsed at step {self.collapse.step}"


def diagnose(header: dict[str, Any], rows: Sequence[Row]) -> list[Problem]:
    """The problems of a run, causes before symptoms; none for a healthy one.

    Args:
        header: run.json.
        rows: of metrics.jsonl, readable, in order of steps.

    Example:
        >>> rows = [{"step": t, "entropy/mean": 0.7, "entropy/target": 0.5} for t in range(1, 41)]
        >>> header = {"config": {"temperature": 0.6}, "recipe": {"knob": "zeta"}}
        >>> [problem.code for problem in diagnose(header, rows)]
        ['temperature']

    [ours]
    """
    config, recipe = (value if isinstance(value := header.get(k), dict) else {} for k in ("config", "recipe"))
    facts = _Facts(config, recipe, rows, collapse_of(rows))
    found = (rule(facts) for rule in (_learning_rate, _clip, _ratios, _target, _reward, _temperature, _knob))
    problems = [problem for problem in found if problem is not None]
    # Steps that are too large move ratios, reward and knob: these are symptoms, which the cause before them names.
    symptoms = {"learning_rate": _SYMPTOMS, "clip": _SYMPTOMS}.get(problems[0].code, {"reward"}) if problems else set()
    return [p for i, p in enumerate(problems) if i == 0 or p.code not in symptoms]


def collapse_of(rows: Sequence[Row]) -> Collapse | None:
    """Whether reward collapsed, and when; the rewards of one task are compared with one another alone.

    Args:
        rows: of metrics.jsonl, in order of steps.

    Example:
        >>> collapse_of([{"step": t, "reward/mean": 0.5 if t < 9 else 0.001 * t} for t in range(1, 17)])
        Collapse(step=9, best=0.5, end=0.0155)
    """
    rewarded = [row for row in rows if is_number(row.get("reward/mean"))]
    for _, group in groupby(rewarded, key=lambda row: row.get("task")):
        if (collapse := _collapse(list(group))) is not None:
            return collapse
    return None


def _collapse(rows: Sequence[Row]) -> Collapse | None:
    # All steps of a generated batch have its reward: a batch counts once.
    batches = list({row.get("samples/total", -row["step"]): row for row in reversed(rows)}.values())[::-1]
    rewards = [row["reward/mean"] for row in batches]
    if len(rewards) < _MIN_BATCHES:
        return None
    width = max(2, len(rewards) // 10)
    means = [math.fsum(rewards[i : i + width]) / width for i in range(len(rewards) - width + 1)]
    best, end = max(means), means[-1]
    noise = median(abs(b - a) for a, b in pairwise(rewards))
    scale = best / 2 if min(rewards) >= 0 else _mean([row["reward/std"] for row in rows if row.get("reward/std")])
    if scale is None or best - end <= max(scale, 3 * noise):
        return None
    start = means.index(best)
    at = next(i for i in range(start, len(rewards)) if rewards[i] < (best + end) / 2)
    return Collapse(batches[at]["step"], best, end)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def spread(row: Row) -> float:
    """The root mean square by which the ratios of a step differ, relative to their mean: ``√(1/ESS − 1)``.

    Example:
        >>> spread({"ratio/ess_frac": 0.8})
        0.5
    """
    return math.sqrt(max(0.0, 1 / max(row["ratio/ess_frac"], 1e-12) - 1))


def _learning_rate(facts: _Facts) -> Problem | None:
    """Ratios after one step from the samples: no clip acts on that step, so its size is the learning rate's alone."""
    after_one = [row for row in facts.off_policy() if row.get("policy/age") == 1]
    if len(after_one) < 3 or (moved := median(map(spread, after_one))) < _STEP_MOVES:
        return None
    rates = facts.values("learning_rate", after_one)
    rate = median(rates) if rates else None
    outside, left = (_mean(facts.values(n, after_one)) for n in ("ratio/outside_frac", "theorem2/violated_frac"))
    at = "After one step," if rate is None else f"After one step at a learning rate of {rate:.2g},"
    shown = [f"{outside:.0%} of the ratios lie outside the clip"] if outside is not None else []
    shown += [f"{left:.0%} of the rows have left Theorem 2's bound"] if left is not None else []
    shown = shown or [f"ratios differ by {moved:.0%}"]
    lower = "" if rate is None else f" near {rate * _USUAL_MOVE / moved:.1g}, which moves them by {_USUAL_MOVE:.0%}"
    return Problem(
        "learning_rate",
        f"Learning rate too high: one step moves ratios by {moved:.0%} rms{facts.and_reward()}.",
        f"{at} {' and '.join(shown)}.",
        f"a lower learning_rate{lower}; resume from an earlier checkpoint",
    )


def _clip(facts: _Facts) -> Problem | None:
    """A clip of two bounds that allows almost any ratio, and was seen to stop almost none."""
    allowed = clip_range(facts.recipe)
    rows = facts.off_policy()
    if allowed is None or not rows or allowed[1] <= _WIDE_CLIP * allowed[0]:
        return None
    stopped = [math.fsum(row.get(f"clip/{side}_frac") or 0.0 for side in ("low", "high")) for row in rows]
    share, most = math.fsum(stopped) / len(stopped), max(map(spread, rows))
    if share >= _IDLE_CLIP:
        return None
    last = max(row.get("policy/age", 1) for row in rows)
    return Problem(
        "clip",
        f"Clip too wide: it allows ratios from {allowed[0]:.2g} to {allowed[1]:.3g} and stops {share:.1%}"
        f"{facts.and_reward()}.",
        f"Ratios differ by up to {most:.0%} rms within the {last:.0f} steps on one generated batch.",
        "clip_low and clip_high of 0.1 to 0.3, or fewer updates of each batch",
    )


def clip_range(recipe: dict[str, Any]) -> tuple[float, float] | None:
    """The ratios that a recipe's clip allows; None if they differ by token, if a knob turns them, or with one bound.

    Example:
        >>> clip_range({"objective": "clipped", "bounds": "additive", "clip_low": 0.25, "clip_high": 0.5})
        (0.75, 1.5)
    """
    low, high = recipe.get("clip_low"), recipe.get("clip_high")
    fixed = recipe.get("objective") == "clipped" and recipe.get("knob") not in ("clip_low", "clip_high")
    if not (fixed and is_number(low) and is_number(high)):
        return None
    lowest = {"additive": max(0.0, 1 - low), "reciprocal": 1 / (1 + low)}.get(str(recipe.get("bounds")))
    return None if lowest is None else (lowest, 1 + high)


def _off_target(facts: _Facts) -> tuple[float, float, float] | None:
    """Share of steps at a bound, target and closing entropy of a run whose knob is mostly at a bound."""
    share, targets, entropies = steps_at_bound(facts.rows), *map(facts.values, ("entropy/target", "entropy/mean"))
    if share is None or share < _MOSTLY or not targets or not entropies or targets[-1] <= 0:
        return None
    tail = entropies[-max(1, len(entropies) // 10) :]
    return share, targets[-1], math.fsum(tail) / len(tail)


def _target(facts: _Facts) -> Problem | None:
    found = _off_target(facts)
    if found is None:
        return None
    share, target, end = found
    entropies = facts.values("entropy/mean")
    if not (target > (1 + _OFF_TARGET) * entropies[0] and end < (1 - _OFF_TARGET) * target):
        return None
    return Problem(
        "target",
        f"Target out of reach: {target:.3g} nats per token is {target / entropies[0]:.0%} of the start, "
        f"{max(entropies):.3g} the most reached.",
        f"The knob was at its bound in {share:.0%} of the steps after {SETTLED}{facts.and_reward()}.",
        "a target below the start, such as 80%: training lowers entropy, and what raises it works against the reward",
    )


def _knob(facts: _Facts) -> Problem | None:
    found = _off_target(facts)
    if found is None or _target(facts) is not None:
        return None
    share, target, end = found
    name, error = str(facts.recipe.get("knob") or "the knob"), end / target - 1
    values = [row["knob/value"] for row in facts.rows if row.get("knob/saturated") and is_number(row.get("knob/value"))]
    middle = (min(values) + max(values)) / 2 if values else 0.0
    upper = math.fsum(value > middle for value in values) / max(len(values), 1)
    if 0.2 <= upper <= 0.8 and min(values, default=0) < max(values, default=0):
        return Problem(
            "oscillation",
            f"Knob swings between its bounds: {name} is at one in {share:.0%} of the steps after {SETTLED}.",
            f"At the upper one in {upper:.0%} of these, at the lower one in {1 - upper:.0%}: the gain is too high.",
            'controller="predictive", or a gain ten times smaller',
        )
    if abs(error) <= _OFF_TARGET:
        return None
    side = "above" if error > 0 else "below"
    return Problem(
        "knob",
        f"Knob at its bound: {name} is at {values[-1] if values else math.nan:.3g} in {share:.0%} of the steps after "
        f"{SETTLED}.",
        f"Entropy is {abs(error):.0%} {side} its target of {target:.3g} nats per token, and the knob can do no more.",
        "a wider knob_low and knob_high, another knob, or a target closer to where entropy is",
    )


def _reward(facts: _Facts) -> Problem | None:
    if facts.collapse is None:
        return None
    step, best, end = facts.collapse
    entropies, rates = facts.values("entropy/mean"), facts.values("learning_rate", facts.before)
    tail = entropies[-max(1, len(entropies) // 10) :]
    last = math.fsum(tail) / max(len(tail), 1)
    rose = bool(entropies) and last > 1.3 * entropies[0]
    at = f", at a learning rate of {rates[-1]:.2g}" if rates and not rose else ""
    at = f", while entropy rose to {last:.3g} nats" if rose else at
    shown = [f"From {best:.3g} at its best to {end:.3g} at the end."]
    shown += [f"Entropy went from {entropies[0]:.3g} to {last:.3g} nats per token."] if entropies else []
    shown += [] if facts.off_policy() else ["Every step was on-policy: no ratio shows how far a step moved."]
    remedy = "a smaller entropy_coef, or a target that a knob holds" if rose else "a lower learning_rate first"
    return Problem("reward", f"Reward collapsed at step {step}{at}.", " ".join(shown), remedy)


def _temperature(facts: _Facts) -> Problem | None:
    temperature = facts.config.get("temperature")
    if not is_number(temperature) or temperature == 1 or not facts.recipe.get("knob"):
        return None
    targets = facts.values("entropy/target")
    if not targets:
        return None
    cooler = "lower" if temperature < 1 else "higher"
    return Problem(
        "temperature",
        f"Sampling temperature {temperature:g}, not 1: entropy and its target are those of the tempered policy.",
        f"The target of {targets[-1]:.3g} nats per token is {cooler} than it would be at temperature 1, and so is what "
        "is read.",
        "temperature = 1 while training; an answer may be sampled at any temperature afterwards",
    )


def _ratios(facts: _Facts) -> Problem | None:
    rows = facts.off_policy()
    outside, left = (_mean(facts.values(n, rows)) for n in ("ratio/outside_frac", "theorem2/violated_frac"))
    last = max((row.get("policy/age", 1) for row in rows), default=0)
    remedy = "fewer updates of each generated batch, or a lower learning rate"
    if left is not None and left >= _LEFT_BOUND:
        return Problem(
            "theorem2",
            f"Theorem 2's bound is violated: the entropy of {left:.0%} of the rows has left it{facts.and_reward()}.",
            f"{outside or 0:.0%} of the ratios lie outside the clip, within {last:.0f} steps on one generated batch.",
            remedy,
        )
    if outside is not None and outside >= _LEFT_CLIP:
        return Problem(
            "ratios",
            f"Ratios outside the clip: {outside:.0%} of the tokens of off-policy steps{facts.and_reward()}.",
            f"Within {last:.0f} steps on one generated batch the policy moves further than the clip allows.",
            remedy,
        )
    return None
