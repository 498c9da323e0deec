"""The components of a recipe: one table for each stage, and one entry for each component. Needs no torch.

An entry has everything about a component: the formula, what it reads of a batch, its constants with their defaults,
the knobs that reach it, and where the function is. Code, checks, listings and docs read it here. A component of your
own is an entry around your function::

    MINE = Shaping("A + γ·surprisal", at=my_function, constants={"gamma": 0.0}, knobs={"gamma": Knob(Range(0, 0, 1))})

or the function alone, whose entry is then read off its signature (:mod:`isentropic.recipes.custom`).

A function gets what its parameters name: fields of :class:`~isentropic.types.TokenBatch`, ``batch`` and ``recipe``
themselves, constants of the component, ``clip_low`` and ``clip_high``, and what :mod:`isentropic.recipes.apply` derives
(``predicted``, ``clipped``, ``bounds``, ``gradient``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..control.controllers import Range
from ..control.names import suggest
from ..types import TokenBatch

if TYPE_CHECKING:
    from .recipe import Recipe


# Stages that act once per batch, before its loss: no derivative by a number of theirs is ever taken.
WITHOUT_KNOB = ("baseline", "selection")
NO_KNOB = "it acts once per batch, before the loss; take a number of a shaping, bounds, objective or penalty"


class Knob(NamedTuple):
    """A number that a controller may turn, as a thermostat turns a valve.

    Attributes:
        range: its values; or a function of the recipe, for a range that follows the recipe's own number.
        source: where it is from.
        needs: ``clip`` or ``penalty``, if it acts through one.
    """

    range: Range | Callable[[Recipe], Range]
    source: str = "yours"
    needs: str | None = None


def number(name: str, value: Any) -> float:
    """A number as Python's own, NumPy's among them.

    Raises:
        ValueError: it is none, or NaN.

    Example:
        >>> number("cov_low", 2), number("cov_low", 0.5)
        (2, 0.5)
    """
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}; write {name}=0.1")
    return int(value) if isinstance(value, Integral) else float(value)


@dataclass(frozen=True)
class Component:
    """One entry of a stage's table.

    Attributes:
        formula: as text.
        at: ``module:function`` below ``isentropic``, a function, or None if the stage does nothing.
        reads: fields of the batch that it needs, besides ``logp``, ``adv`` and ``mask``.
        constants: its numbers with their defaults, those under ``knobs`` included.
        knobs: which of them a controller may turn.
        options: arguments of the function that this entry fixes.
        per_batch: it ranks or adds up the tokens of a call, so that weighted answers differ from sampled ones.
        needs_ratio: it does nothing while the ratio is 1.
        needs_logp: it reads ``logp_mean``, the log-probabilities of sampling time.
        written: the name of a custom component in run.json, with a digest of its file.
    """

    formula: str
    at: str | Callable[..., Any] | None = field(hash=False)
    reads: frozenset[str] | set[str] = frozenset()
    constants: Mapping[str, float] = field(default_factory=dict, hash=False)
    knobs: Mapping[str, Knob] = field(default_factory=dict, hash=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    per_batch: bool = False
    needs_ratio: bool = False
    needs_logp: bool = False
    written: str = ""

    stage: ClassVar[str] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", frozenset(self.reads))
        object.__setattr__(self, "constants", {name: number(name, x) for name, x in self.constants.items()})
        for name in sorted(self.reads - set(TokenBatch._fields)):
            close = suggest(name, TokenBatch._fields)
            raise ValueError(f"reads must name fields of a batch, {', '.join(TokenBatch._fields)}; got {name!r}{close}")
        missing = sorted(set(self.knobs) - set(self.constants))
        if missing:
            raise ValueError(f"knob {missing[0]} needs a default; add it to constants, as in {{{missing[0]!r}: 0.0}}")
        if self.knobs and self.stage in WITHOUT_KNOB:
            raise ValueError(f"a {self.stage} can have no knob, got {', '.join(self.knobs)}; {NO_KNOB}")

    @property
    def function(self) -> Callable[..., Any]:
        """The function, imported on first use."""
        return _import(self.at) if isinstance(self.at, str) else self.at  # type: ignore[return-value]

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of what its function takes."""
        loose = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return tuple(p.name for p in inspect.signature(self.function).parameters.values() if p.kind not in loose)

    def __deepcopy__(self, memo: Any) -> Component:
        return self

    def __str__(self) -> str:
        return self.written or self.formula


@cache
def _import(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(import_module(f"isentropic.{module}"), name)


class Baseline(Component):
    """``rewards [p g], logp_mean [p g], **constants -> advantages [b]``, of which it names what it takes."""

    stage = "baseline"


class Selection(Component):
    """Factors ``[b t]`` on the advantages, without a gradient and without a knob."""

    stage = "selection"


class Shaping(Component):
    """Advantages ``[b t]``; what it reads comes without a gradient."""

    stage = "shaping"


@dataclass(frozen=True)
class Bounds(Component):
    """``clip_low, clip_high, facts, **constants -> (lowest ratio, highest ratio)``.

    Attributes:
        objectives: those that it works with; None is all that clip.
        below_one: whether ``clip_low`` must be below 1.
    """

    objectives: tuple[str, ...] | None = None
    below_one: bool = False

    stage: ClassVar[str] = "bounds"


@dataclass(frozen=True)
class Objective(Component):
    """``(loss [b t], TokenFacts)``.

    Attributes:
        clips: whether clip bounds act on it. Bounds live on the importance ratio: a loss without one has no clip.
    """

    clips: bool = False

    stage: ClassVar[str] = "objective"


class Penalty(Component):
    """``[b t]``, which times ``penalty_coef`` is added to the loss."""

    stage = "penalty"


BASELINES: dict[str, Component] = {
    "none": Baseline("R", "losses.advantages:none"),
    "signed": Baseline("1 if R > 0, else −1", "losses.advantages:signed"),
    "mean": Baseline("R − mean", "losses.advantages:group_mean"),
    "mean_std": Baseline("(R − mean)/std", "losses.advantages:mean_std"),
    "leave_one_out": Baseline("R − mean of the others", "losses.advantages:leave_one_out"),
    "quantile": Baseline("R − quantile of the group", "losses.advantages:quantile", constants={"quantile": 0.4}),
    "pass_at_k": Baseline(
        "(1−ρ)/σ if right, (1−ρ−C(n−c−1,k−1)/C(n−1,k−1))/σ if wrong, ρ = 1−C(n−c,k)/C(n,k), σ = √(ρ(1−ρ))",
        "losses.advantages:pass_at_k",
        constants={"pass_k": 4},
    ),
    "unlikeliness": Baseline(
        "(R' − mean)/std, R' = R·(1 − β·(n−k)/n) if right, k the rank by probability, 0 the likeliest",
        "losses.advantages:unlikeliness",
        constants={"rank_penalty": 0.25},
        per_batch=True,
        needs_logp=True,
    ),
    "uniform_correct": Baseline(
        "c·w·(R − mean)/std for the c right ones, w = (1−τ)/c + τ·(1/q)/Σ 1/q, q their shares of probability",
        "losses.advantages:uniform_correct",
        constants={"uniform_share": 0.2},
        per_batch=True,
        needs_logp=True,
    ),
}

SELECTIONS: dict[str, Component] = {
    "none": Selection("every token", None),
    "clip_cov": Selection(
        "all but a few, drawn from those with cov_low < (A−Ā)(log π − mean log π) < cov_high",
        "losses.selection:clip_cov",
        constants={"cov_share": 2e-4, "cov_low": 1.0, "cov_high": 5.0},
        per_batch=True,
    ),
    "high_entropy": Selection(
        "the share of the tokens whose row has the highest entropy",
        "losses.selection:high_entropy",
        reads={"entropy"},
        constants={"entropy_share": 0.2},
        per_batch=True,
    ),
    "erc": Selection(
        "those with 1−w < H/H_old < 1+w",
        "losses.selection:erc",
        reads={"entropy", "entropy_old"},
        constants={"erc_width": 0.05},
        needs_ratio=True,
    ),
}

_RAW = Knob(Range(1e-3, -0.05, 0.05, 1e-4), "REPO, arXiv:2603.11682; raw ±[1e-4, 0.05] [paper], centred ±1 [ours]")
_CENTRED = _RAW._replace(range=Range(0.0, -1.0, 1.0, 1e-3))
_REJECT = Knob(
    Range(0.0, -1.0, 1.0, 1e-3, rest=0.0), "1 drops A>0, −1 drops A<0, Entrocraft arXiv:2604.26326 [between: ours]"
)
_DIRECTED = _RAW._replace(range=Range(1.0, 0.0, 64.0, 0.01))

SHAPINGS: dict[str, Component] = {
    "none": Shaping("A", None),
    "repo": Shaping(
        "A − β·L",
        "losses.shaping:repo",
        reads={"entropy"},
        constants={"beta": 0.0},
        knobs={"beta": Knob(Range(0.0, -1.0, 1.0, 1e-3), "A − βL of arXiv:2603.11682 [range ours]")},
    ),
    "repo_failing": Shaping(
        "A − β·(1 − ρ)·L, ρ the success rate of the group",
        "losses.shaping:repo_failing",
        reads={"entropy", "group_rate"},
        constants={"beta": 0.0},
        knobs={"beta": Knob(Range(0.0, -1.0, 1.0, 1e-3), "A − βL of arXiv:2603.11682 [range ours]")},
    ),
    "repo_r": Shaping(
        "A − ζ|A|·L, clamped to the sign of A",
        "losses.shaping:repo_r",
        reads={"entropy"},
        constants={"zeta": 0.0},
        knobs={"zeta": _CENTRED},
    ),
    "repo_r_raw": Shaping(
        "A − ζ|A|·log π, clamped to the sign of A",
        "losses.shaping:repo_r",
        constants={"zeta": 0.0},
        knobs={"zeta": _RAW},
        options={"entropy": None},
    ),
    "repo_r_positive": Shaping(
        "A − ζ·max(A,0)·log π",
        "losses.shaping:repo_r",
        constants={"zeta": 0.0},
        knobs={"zeta": _RAW},
        options={"entropy": None, "positive_only": True},
    ),
    "repo_d": Shaping(
        "A − ζ·max(−mean ΔĤ, 0)·L",
        "losses.shaping:repo_d",
        reads={"entropy"},
        constants={"zeta": 0.0},
        knobs={"zeta": _DIRECTED},
        options={"per": "batch"},
    ),
    "repo_d_token": Shaping(
        "A − ζ·max(−ΔĤ, 0)·L, ΔĤ by token",
        "losses.shaping:repo_d",
        reads={"entropy"},
        constants={"zeta": 0.0},
        knobs={"zeta": _DIRECTED},
        options={"per": "token"},
    ),
    "sign_weight": Shaping(
        "A·(1 + α·sign A)",
        "losses.shaping:sign_weight",
        constants={"alpha": 0.0},
        knobs={
            "alpha": Knob(
                Range(0.0, -1.0, 1.0, 1e-3, -1, rest=0.0),
                "weights 1±α by the sign of A, EntroPIC arXiv:2511.15248 [range ours]",
            )
        },
    ),
    "one_sided": Shaping(
        "A·(1 − max(ρ,0)) for A>0, A·(1 − max(−ρ,0)) for A<0",
        "losses.shaping:one_sided",
        constants={"reject": 0.0},
        knobs={"reject": _REJECT},
    ),
    "one_sided_reward": Shaping(
        "(1−|ρ|)·A + max(ρ,0)·min(R,0) + max(−ρ,0)·max(R,0), R = ±1 by the reward",
        "losses.shaping:one_sided_reward",
        reads={"reward"},
        constants={"reject": 0.0},
        knobs={"reject": _REJECT},
    ),
    "steer": Shaping(
        "A·exp(−k|Ω|), Ω = A·r·(1−π)·L, k = −log(least)/max(max|Ω|, 0.02)",
        "losses.shaping:steer",
        reads={"entropy"},
        constants={"steer_least": 0.8},
        per_batch=True,
    ),
    "entropy_balance": Shaping(
        "(1+λ)·A where ΔĤ > 0, (1−λ)·A where ΔĤ < 0, λ = −Σ ΔĤ/Σ |ΔĤ|",
        "losses.shaping:entropy_balance",
        reads={"entropy"},
        per_batch=True,
    ),
    "tempered": Shaping(
        "(A + a·1[right]·π_T/π)/(1 + a), a = |κ|/share of right answers, T > 1 if κ > 0, T < 1 if κ < 0",
        "losses.shaping:tempered",
        reads={"logp_rows", "reward"},
        constants={"tilt": 0.0, "temper_high": 1.2, "temper_low": 0.8},
        knobs={"tilt": Knob(Range(0.0, -0.1, 0.1, 1e-3), "κ of arXiv:2601.12730, its released code")},
        per_batch=True,
    ),
    "surprisal_boost": Shaping(
        "W·A on the rarest tokens with A>0",
        "losses.shaping:surprisal_boost",
        constants={"boost": 1.0, "surprisal_share": 0.1},
        knobs={
            "boost": Knob(Range(1.0, 1.0, 1.5, 1.0, rest=1.0), "weight of rare rewarded tokens, STARE arXiv:2606.19236")
        },
        per_batch=True,
    ),
}

OBJECTIVES: dict[str, Objective] = {
    "reinforce": Objective("−A·log π", "losses.objectives:reinforce"),
    "importance": Objective("−r·A", "losses.objectives:importance"),
    "clipped": Objective("−min(r·A, clip(r)·A)", "losses.objectives:clipped", clips=True),
    "sequence_clipped": Objective("−min(s·A, clip(s)·A)", "losses.objectives:sequence_clipped", clips=True),
    "cispo": Objective(
        "−sg(min(r, 1+ε_high))·A·log π",
        "losses.objectives:cispo",
        options={"clip_low": None, "ceiling": None},
        clips=True,
    ),
    "gradient_preserving": Objective(
        "−r·A, with a bounded gradient where a clip removes it",
        "losses.objectives:gradient_preserving",
        constants={"grad_low": 0.5, "grad_high": 1.0},
        clips=True,
    ),
    "unbounded_positive": Objective(
        "−A·π/sg(π) for A>0, −min(r·A, clip(r)·A) for A<=0", "losses.objectives:unbounded_positive", clips=True
    ),
    "sapo": Objective(
        "−(4/τ)·σ(τ(r−1))·A", "losses.objectives:sapo", constants={"tau_positive": 1.0, "tau_negative": 1.05}
    ),
}

_OF_TOKENS = ("clipped", "cispo", "gradient_preserving")
BOUNDS: dict[str, Bounds] = {
    "additive": Bounds("[1−ε_low, 1+ε_high]", "losses.clipping:additive", below_one=True),
    "reciprocal": Bounds("[1/(1+ε_low), 1+ε_high]", "losses.clipping:reciprocal"),
    "linear": Bounds(
        "[1−ε_low, 1+max(slope·p_old + ε_high, 0)]",
        "losses.clipping:linear",
        constants={"slope": -0.2},
        objectives=_OF_TOKENS,
        below_one=True,
    ),
    "dcpo": Bounds(
        "−ε_low ≤ (r−1)·p ≤ ε_high", "losses.clipping:dcpo", constants={"ratio_cap": 10.0}, objectives=_OF_TOKENS
    ),
    "balanced": Bounds(
        "widened from [1−ε_low, 1+ε_high] until positive advantages carry their share of the loss",
        "losses.clipping:balanced",
        constants={
            "positive_share": 0.5,
            "lower_to": 0.9,
            "upper_to": 3.0,
            "lower_step": 0.02,
            "upper_step": 0.05,
        },
        per_batch=True,
        objectives=("clipped", "gradient_preserving"),
        below_one=True,
    ),
}

PENALTIES: dict[str, Component] = {
    "none": Penalty("nothing", None),
    "kl_cov": Penalty(
        "|log r| on the tokens of the largest (A−Ā)(log π − mean log π)",
        "losses.penalties:kl_cov",
        constants={"kl_share": 2e-3},
        per_batch=True,
        needs_ratio=True,
    ),
    "lp_reg": Penalty(
        "KL(min-p filter of π ‖ π) on the least likely tokens with A<0",
        "losses.penalties:lp_reg",
        reads={"logp_rows"},
        constants={"lp_share": 0.01, "lp_kappa": 0.02},
        per_batch=True,
    ),
    "aent": Penalty(
        "−H over the likeliest tokens of the row",
        "losses.penalties:aent",
        reads={"logp_rows"},
        constants={"aent_drop": 0.3},
    ),
    "tre_p": Penalty(
        "−(log v/log n)·H over the n likeliest tokens that reach a mass",
        "losses.penalties:tre_p",
        reads={"logp_rows"},
        constants={"tre_mass": 0.99},
    ),
    "tre_k": Penalty(
        "−(log v/log k)·H over the k likeliest tokens",
        "losses.penalties:tre_k",
        reads={"logp_rows"},
        constants={"tre_keep": 2},
    ),
}

REDUCTIONS: dict[str, str] = {
    "token": "mean over tokens",
    "sequence": "mean over sequences of their token means",
    "constant": "sum over tokens, divided by the generation limit and the number of sequences",
}

# In the order in which data flows.
STAGES: dict[str, Mapping[str, Component]] = {
    "baseline": BASELINES,
    "selection": SELECTIONS,
    "shaping": SHAPINGS,
    "bounds": BOUNDS,
    "objective": OBJECTIVES,
    "penalty": PENALTIES,
}
KINDS: dict[str, type[Component]] = {
    kind.stage: kind for kind in (Baseline, Selection, Shaping, Bounds, Objective, Penalty)
}
