"""Named algorithms as compositions: baseline × selection × shaping × objective × penalty × reduction, and one knob.

A recipe is data. ``RECIPES`` is the whole catalogue; ``compose`` changes any part by name and refuses what cannot work;
``advantages``, ``loss`` and ``build_thermostat`` run it in a hand-written loop, and an engine reads the same fields.
Importing this room needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from .controllers import Range, parse_controller
from .targets import parse_target
from .thermostat import Thermostat, thermostat

if TYPE_CHECKING:
    from torch import Tensor

    from .reduce import SumCount
    from .types import TokenBatch, TokenFacts

# Which objectives a clip bound acts on. Bounds live on the importance ratio, so a loss without one has no clip.
OBJECTIVES = {"reinforce": False, "importance": False, "clipped": True, "sequence_clipped": True, "cispo": True}
SHAPINGS = {
    "none": "A",
    "repo": "A − β·L",
    "repo_r": "A − ζ|A|·L, clamped to the sign of A",
    "repo_r_raw": "A − ζ|A|·log π, clamped to the sign of A",
    "repo_r_positive": "A − ζ·max(A,0)·log π",
    "repo_d": "A + ζ·mean(ΔĤ)·L",
    "repo_d_token": "A + ζ·ΔĤ·L, ΔĤ by token",
}
BASELINES = {"none", "mean", "mean_std", "leave_one_out", "quantile"}
REDUCTIONS = {"token", "sequence", "constant"}


@dataclass(frozen=True)
class Recipe:
    """One algorithm.

    Attributes:
        formula, source: for people; ``source`` says what is the paper's and what is ours.
        baseline: how rewards become advantages.
        quantile: K of the quantile baseline.
        dynamic_sampling: sample again for prompts whose answers all got one reward (DAPO).
        overlong_buffer: tokens before the length limit over which a reward penalty grows to −1 (DAPO); 0 is off.
        shaping: how the advantage changes by token.
        objective, bounds: surrogate, and whether its clip is [1−low, 1+high] or [1/(1+low), 1+high].
        reduction: what a sum over tokens is divided by.
        on_policy: exactly one optimizer step per generated batch.
        clip_low, clip_high, beta, zeta, entropy_coef: numbers, each of which may be the knob.
        knob, knob_low, knob_high, knob_start: which of them is under control, and its range (None: the knob's own).
        controller, target, every: text forms; ``every`` is in optimizer steps, None is a generation batch.
        initial_readings: how many readings measure the initial entropy.
    """

    formula: str
    source: str
    baseline: str = "mean_std"
    quantile: float = 0.4
    dynamic_sampling: bool = False
    overlong_buffer: int = 0
    shaping: str = "none"
    objective: str = "clipped"
    bounds: str = "additive"
    reduction: str = "token"
    on_policy: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    zeta: float = 0.0
    entropy_coef: float = 0.0
    knob: str | None = None
    knob_low: float | None = None
    knob_high: float | None = None
    knob_start: float | None = None
    controller: str = "fixed"
    target: str = "initial"
    every: int | None = None
    initial_readings: int = 1


class Knob(NamedTuple):
    """One number that a controller may turn."""

    range: Callable[[Recipe], Range]
    shaping: str | None
    needs_clip: bool
    source: str


def _scaled(name: str, sign: int) -> Callable[[Recipe], Range]:
    """A clip bound may go to a quarter and to four times where the recipe puts it."""

    def range_of(recipe: Recipe) -> Range:
        start = getattr(recipe, name)
        high = min(4 * start, 0.95) if name == "clip_low" and recipe.bounds == "additive" else 4 * start
        return Range(start, start / 4, high, start / 4, sign)

    return range_of


def _zeta_range(recipe: Recipe) -> Range:
    if recipe.shaping.startswith("repo_d"):
        return Range(recipe.zeta or 1.0, 0.0, 64.0, 0.01)
    if recipe.shaping == "repo_r":
        return Range(recipe.zeta, -1.0, 1.0, 1e-3)
    return Range(recipe.zeta or 1e-3, -0.05, 0.05, 1e-4)


KNOBS: dict[str, Knob] = {
    "clip_high": Knob(_scaled("clip_high", 1), None, True, "ADAPO arXiv:2603.11682 [paper: direction; range ours]"),
    "clip_low": Knob(
        _scaled("clip_low", -1), None, True, "arXiv:2509.26114: a tighter low clip raises entropy [range ours]"
    ),
    "beta": Knob(lambda r: Range(r.beta, -1.0, 1.0, 1e-3), "repo", False, "A − βL of arXiv:2603.11682 [range ours]"),
    "zeta": Knob(_zeta_range, "repo_r", False, "REPO, arXiv:2603.11682; raw ±[1e-4, 0.05] [paper], centred ±1 [ours]"),
    "entropy_coef": Knob(
        lambda r: Range(r.entropy_coef, 0.0, 0.1, 1e-4),
        None,
        False,
        "loss − c·H, under the recipe's reduction [range ours]",
    ),
}

_REPO = "arXiv:2603.11682"
_BASES: dict[str, Recipe] = {
    "reinforce": Recipe(
        "−R·log π", "Williams 1992", baseline="none", objective="reinforce", on_policy=True, reduction="constant"
    ),
    "rloo": Recipe(
        "−(R − mean of the others)·log π, strictly on-policy",
        "arXiv:2402.14740",
        baseline="leave_one_out",
        objective="reinforce",
        on_policy=True,
        reduction="constant",
    ),
    "grpo": Recipe(
        "−min(rA, clip(r)A), A = (R−mean)/std, mean over sequences", "arXiv:2402.03300", reduction="sequence"
    ),
    "dr-grpo": Recipe(
        "GRPO without the std and without the length mean", "arXiv:2503.20783", baseline="mean", reduction="constant"
    ),
    "loop": Recipe(
        "−min(rA, clip(r)A), leave-one-out A, r in [1/(1+ε), 1+ε], ε=0.1",
        "arXiv:2502.01600; ε and the token mean are [ours]",
        baseline="leave_one_out",
        bounds="reciprocal",
        clip_low=0.1,
        clip_high=0.1,
    ),
    "dapo": Recipe("GRPO with ε_high=0.28 > ε_low=0.2 and a token mean", "arXiv:2503.14476", clip_high=0.28),
    "gspo": Recipe(
        "clip of the sequence ratio exp(mean log r)",
        "arXiv:2507.18071",
        objective="sequence_clipped",
        reduction="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    "cispo": Recipe(
        "−sg(min(r, 1+ε_high))·A·log π, ε_high=4",
        "arXiv:2506.13585; the ceiling of 5 is TRL's advice, the paper's is unknown",
        objective="cispo",
        clip_high=4.0,
    ),
}


def _on(base: str, suffix: str, source: str, **changes: Any) -> Recipe:
    recipe = _BASES[base]
    return replace(recipe, formula=f"{base} with {suffix}", source=f"{source}; {recipe.source}", **changes)


RECIPES: dict[str, Recipe] = {
    "isentropic": _on(
        "loop",
        "centred REPO-R, A − ζ|A|·L, ζ by prediction on every optimizer step",
        f"ours; REPO-R is of {_REPO}",
        shaping="repo_r",
        knob="zeta",
        controller="predictive",
        target="75%",
        every=1,
    ),
    **_BASES,
    "entropy-bonus": _on("grpo", "loss − c·mean H, c fixed", "common practice", entropy_coef=0.003),
    "entropy-bonus-adaptive": _on(
        "grpo",
        "loss − c·mean H while H<H*; c ± δ by the sign of H*−H",
        "Skywork-OR1 arXiv:2505.22312 (their H* is 0.2 nats)",
        knob="entropy_coef",
        knob_start=0.0,
        knob_high=0.005,
        controller="gated_step:step=1e-4",
        every=1,
    ),
    "adapo": _on(
        "dapo",
        "ε_high raised below the target, lowered above",
        f"{_REPO} [paper: direction; step and bounds ours]",
        knob="clip_high",
        controller="multiplicative:rate=0.05",
    ),
    **{
        f"repo-r-{base}": _on(
            base,
            "REPO-R: A − ζ|A|·log π",
            f"{_REPO} [paper]",
            shaping="repo_r_raw",
            knob="zeta",
            controller="double_halve",
        )
        for base in ("rloo", "loop", "grpo", "dapo", "gspo")
    },
    **{
        f"repo-d-{base}": _on(
            base,
            "REPO-D: A + ζ·mean(ΔĤ)·L",
            f"{_REPO} [a reconstruction, ours]",
            shaping="repo_d",
            knob="zeta",
            controller="multiplicative:rate=0.1",
        )
        for base in ("rloo", "loop", "grpo", "dapo", "gspo")
    },
}


def _choose(what: str, got: str, allowed: Any) -> None:
    if got not in allowed:
        close = get_close_matches(str(got), list(allowed), n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{what} must be one of {', '.join(sorted(allowed))}; got {got!r}{meant}")


def compose(recipe: str | Recipe, **changes: Any) -> Recipe:
    """A recipe by name with parts replaced, checked.

    A knob brings the shaping it acts through (``zeta`` brings centred REPO-R where the recipe shapes nothing), and a
    knob named without a controller is steered by ``pi``.

    Args:
        recipe: a name in :data:`RECIPES`, or a recipe.
        **changes: fields of :class:`Recipe`; ``None`` leaves a field as it is.

    Raises:
        ValueError: an unknown name, or a composition that cannot work, by name.

    Example:
        >>> compose("loop", knob="zeta", target="75%").shaping
        'repo_r'
        >>> compose("rloo", knob="clip_high")
        Traceback (most recent call last):
        ...
        ValueError: knob clip_high needs a clip, and objective reinforce has none; ...
    """
    if isinstance(recipe, str):
        _choose("recipe", recipe, RECIPES)
        recipe = RECIPES[recipe]
    changes = {key: value for key, value in changes.items() if value is not None}
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in fields(Recipe)}
    for key, value in changes.items():
        _choose("a field of a recipe", key, kinds)
        allowed = ("int", "float") if kinds[key] == "float" else (kinds[key],)
        if type(value).__name__ not in allowed:
            raise ValueError(f"{key} must be of type {kinds[key]}, got {value!r}")
    knob = changes.get("knob")
    if knob is not None and knob != "none":
        _choose("knob", knob, KNOBS)
        if knob != recipe.knob:
            # Bounds and steps of the recipe's own knob mean nothing for another one.
            recipe = replace(recipe, knob_low=None, knob_high=None, knob_start=None, controller="pi")
        wanted = KNOBS[knob].shaping
        if wanted and "shaping" not in changes and not recipe.shaping.startswith(wanted.removesuffix("_r")):
            changes["shaping"] = wanted
    elif knob == "none":
        changes["knob"] = None
        recipe = replace(recipe, knob=None, controller="fixed")
        changes = {key: value for key, value in changes.items() if key != "knob"}
    made = check(replace(recipe, **changes))
    idle = [key for key in ("target", "every", "initial_readings") if key in changes and made.knob is None]
    if idle and knob != "none":
        raise ValueError(f"{idle[0]} has no effect without a knob under control; name one of {', '.join(KNOBS)}")
    return made


def check(recipe: Recipe, updates: int | None = None) -> Recipe:
    """Refuse a composition that cannot work.

    Args:
        recipe: what to check.
        updates: optimizer steps per generated batch, where known.

    Raises:
        ValueError: what is wrong, what is allowed, the remedy.
    """
    _choose("baseline", recipe.baseline, BASELINES)
    _choose("shaping", recipe.shaping, SHAPINGS)
    _choose("objective", recipe.objective, OBJECTIVES)
    _choose("reduction", recipe.reduction, REDUCTIONS)
    _choose("bounds", recipe.bounds, {"additive", "reciprocal"})
    for name in ("clip_low", "clip_high"):
        if not getattr(recipe, name) > 0:
            raise ValueError(f"{name} must be > 0, got {getattr(recipe, name)}; it is the distance of the bound from 1")
    if recipe.bounds == "additive" and recipe.clip_low >= 1:
        raise ValueError(f"clip_low must be < 1 with additive bounds, got {recipe.clip_low}; a ratio is never negative")
    if recipe.on_policy and updates is not None and updates != 1:
        raise ValueError(
            f"this recipe is strictly on-policy: one optimizer step a generated batch, got {updates}; "
            "make the batch one step, or choose a clipped recipe such as loop"
        )
    if recipe.controller.split(":")[0] != "fixed" and recipe.knob is None:
        raise ValueError(f"controller {recipe.controller} has no knob to turn; name one of {', '.join(KNOBS)}")
    parse_target(recipe.target, recipe.initial_readings)
    if recipe.knob is not None:
        _check_knob(recipe, updates)
    return recipe


def _check_knob(recipe: Recipe, updates: int | None) -> None:
    name = str(recipe.knob)
    _choose("knob", name, KNOBS)
    free = ", ".join(sorted(k for k, knob in KNOBS.items() if not knob.needs_clip))
    if KNOBS[name].needs_clip and not OBJECTIVES[recipe.objective]:
        raise ValueError(
            f"knob {name} needs a clip, and objective {recipe.objective} has none; "
            f"use clipped, cispo or sequence_clipped, or a knob of {free}"
        )
    if KNOBS[name].needs_clip and (recipe.on_policy or updates == 1):
        raise ValueError(
            f"knob {name} has no effect where every update is on-policy, since no ratio leaves 1; "
            f"take several optimizer steps a generated batch, or a knob of {free}"
        )
    wanted = KNOBS[name].shaping
    if wanted and not recipe.shaping.startswith(wanted.removesuffix("_r")):
        raise ValueError(f"knob {name} needs a shaping that it scales, got shaping {recipe.shaping}; leave shaping out")
    parse_controller(recipe.controller, knob_range(recipe))


def knob_range(recipe: Recipe) -> Range:
    """The range of the recipe's knob: the knob's own, with what the recipe overrides.

    Raises:
        ValueError: no knob, or bounds that exclude one another.

    Example:
        >>> knob_range(RECIPES["adapo"])
        Range(start=0.28, low=0.07, high=1.12, least=0.07, sign=1)
    """
    _choose("knob", recipe.knob or "none", KNOBS)
    span = KNOBS[str(recipe.knob)].range(recipe)
    low = span.low if recipe.knob_low is None else recipe.knob_low
    high = span.high if recipe.knob_high is None else recipe.knob_high
    start = min(max(span.start, low), high) if recipe.knob_start is None else recipe.knob_start
    return Range(start, low, high, min(span.least, high), span.sign).check()


def build_thermostat(recipe: Recipe) -> Thermostat | None:
    """The recipe's controller and target, joined; ``None`` where nothing is under control.

    Example:
        >>> t = build_thermostat(compose("adapo", target="0.5"))
        >>> t.init().value
        0.28
    """
    if recipe.knob is None:
        return None
    controller = parse_controller(recipe.controller, knob_range(recipe))
    return thermostat(controller, parse_target(recipe.target, recipe.initial_readings), recipe.every)


def with_knob(recipe: Recipe, value: float | None) -> Recipe:
    """The recipe with its knob at a value, unchanged where it has none or the value is ``None``.

    Example:
        >>> with_knob(compose("adapo"), 0.5).clip_high
        0.5
    """
    if recipe.knob is None or value is None:
        return recipe
    turned: dict[str, Any] = {recipe.knob: value}
    return replace(recipe, **turned)


def advantages(recipe: Recipe, rewards: Tensor) -> Tensor:
    """Rewards ``[p g]`` to advantages ``[b]`` by the recipe's baseline."""
    from .advantages import BASELINES as functions

    options: dict[str, Any] = {"k": recipe.quantile} if recipe.baseline == "quantile" else {}
    return functions[recipe.baseline](rewards, **options)


def shape(recipe: Recipe, batch: TokenBatch) -> Tensor:
    """Advantages after the recipe's shaping, from detached log-probs and entropies of the current policy.

    Returns:
        ``[b t]``, or ``batch.adv`` itself where the recipe shapes nothing.

    Raises:
        ValueError: a centred shaping without entropies.
    """
    from . import dynamics, shaping

    if batch.entropy is None and recipe.shaping in ("repo", "repo_r", "repo_d", "repo_d_token"):
        raise ValueError(f"shaping {recipe.shaping} needs batch.entropy, got None; pass the entropies of the rows")
    logp = batch.logp.detach()
    entropy = -logp if batch.entropy is None else batch.entropy.detach()

    def repo_d(per: str) -> Tensor:
        adv = batch.adv.unsqueeze(1) if batch.adv.dim() == 1 else batch.adv
        change = dynamics.predicted_change(adv.expand(logp.shape), logp, entropy)
        return shaping.repo_d(batch.adv, logp, entropy, change, recipe.zeta, batch.mask, per=per)

    shapers: dict[str, Callable[[], Tensor]] = {
        "none": lambda: batch.adv,
        "repo": lambda: shaping.repo(batch.adv, logp, entropy, recipe.beta),
        "repo_r": lambda: shaping.repo_r(batch.adv, logp, recipe.zeta, entropy),
        "repo_r_raw": lambda: shaping.repo_r(batch.adv, logp, recipe.zeta),
        "repo_r_positive": lambda: shaping.repo_r(batch.adv, logp, recipe.zeta, positive_only=True),
        "repo_d": lambda: repo_d("batch"),
        "repo_d_token": lambda: repo_d("token"),
    }
    return shapers[recipe.shaping]()


def loss(
    recipe: Recipe, batch: TokenBatch, knob: float | None = None, length: int | None = None
) -> tuple[SumCount, TokenFacts]:
    """The recipe's loss as (sum, count), to be added over micro-batches and ranks before the division.

    Args:
        recipe: composed and checked.
        batch: token facts; ``entropy`` is needed for centred shapings and the entropy bonus.
        knob: value from the thermostat; ``None`` leaves the recipe's own number.
        length: generation limit in tokens, for the constant reduction; default ``t``.

    Returns:
        (sum, count) whose quotient is minimised, and the objective's per-token facts.

    Raises:
        ValueError: an entropy bonus or a centred shaping without entropies.
    """
    from . import objectives, reduce

    recipe = with_knob(recipe, knob)
    clip = {"clip_low": recipe.clip_low, "clip_high": recipe.clip_high, "bounds": recipe.bounds}
    options: dict[str, dict[str, Any]] = {
        "clipped": clip,
        # Advantages that differ by token need a gradient by token, or their sequence mean is all that acts.
        "sequence_clipped": {**clip, "gradient": "sequence" if recipe.shaping == "none" else "token"},
        "cispo": {"clip_high": recipe.clip_high},
    }
    per_token, facts = objectives.OBJECTIVES[recipe.objective](
        batch._replace(adv=shape(recipe, batch)), **options.get(recipe.objective, {})
    )
    if recipe.entropy_coef:
        if batch.entropy is None:
            raise ValueError("an entropy bonus needs batch.entropy, got None; pass the rows' entropies, with gradient")
        per_token = per_token - recipe.entropy_coef * batch.entropy
    sums: dict[str, Callable[[], SumCount]] = {
        "token": lambda: reduce.token(per_token, batch.mask),
        "sequence": lambda: reduce.sequence(per_token, batch.mask),
        "constant": lambda: reduce.constant(per_token, batch.mask, length or per_token.shape[1]),
    }
    return sums[recipe.reduction](), facts
