"""What a recipe is made of: its fields, the names each part may have, and the way to parts of your own. Needs no torch.

A part is a name, or a function of yours with the signature in :data:`SIGNATURES`; a name with a colon is loaded, from
``file.py:NAME`` or ``package.module:NAME``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

Part = str | Callable[..., Any]

BASELINES = {"none", "mean", "mean_std", "leave_one_out", "quantile"}
SELECTIONS = {
    "none": "every token",
    "clip_cov": "all but a few, drawn from those with cov_low < (A−Ā)(log π − mean log π) < cov_high",
    "high_entropy": "the share of the tokens whose row has the highest entropy",
    "erc": "those with 1−w < H/H_old < 1+w",
}
SHAPINGS = {
    "none": "A",
    "repo": "A − β·L",
    "repo_r": "A − ζ|A|·L, clamped to the sign of A",
    "repo_r_raw": "A − ζ|A|·log π, clamped to the sign of A",
    "repo_r_positive": "A − ζ·max(A,0)·log π",
    "repo_d": "A + ζ·mean(ΔĤ)·L",
    "repo_d_token": "A + ζ·ΔĤ·L, ΔĤ by token",
    "sign_weight": "A·(1 + α·sign A)",
    "one_sided": "A·(1 − max(ρ,0)) for A>0, A·(1 − max(−ρ,0)) for A<0",
    "surprisal_boost": "W·A on the rarest tokens with A>0",
}
# Which objectives a clip bound acts on. Bounds live on the importance ratio, so a loss without one has no clip.
OBJECTIVES = {
    "reinforce": False,
    "importance": False,
    "clipped": True,
    "sequence_clipped": True,
    "cispo": True,
    "gradient_preserving": True,
    "sapo": False,
}
BOUNDS = {
    "additive": "[1−ε_low, 1+ε_high]",
    "reciprocal": "[1/(1+ε_low), 1+ε_high]",
    "linear": "[1−ε_low, 1+max(slope·p_old + ε_high, 0)]",
    "dcpo": "−ε_low ≤ (r−1)·p ≤ ε_high",
    "balanced": "widened from [1−ε_low, 1+ε_high] until positive advantages carry their share of the loss",
}
# Rules that need the ratio of single tokens, and the objectives that have it.
BY_TOKEN = {
    "linear": ("clipped", "cispo", "gradient_preserving"),
    "dcpo": ("clipped", "cispo", "gradient_preserving"),
    "balanced": ("clipped", "gradient_preserving"),
}
PENALTIES = {
    "none": "nothing",
    "kl_cov": "|log r| on the tokens of the largest (A−Ā)(log π − mean log π)",
    "lp_reg": "KL(min-p filter of π ‖ π) on the least likely tokens with A<0",
    "aent": "−H over the likeliest tokens of the row",
}
REDUCTIONS = {"token", "sequence", "constant"}

# What a part reads of a batch beside logp, adv and mask. A function of yours may say ``needs_rows = True``.
NEEDS_ENTROPY = {"repo", "repo_r", "repo_d", "repo_d_token", "high_entropy", "erc"}
NEEDS_OLD_ENTROPY = {"erc"}
NEEDS_ROWS = {"lp_reg", "aent"}
# Without a ratio that has left 1, these do nothing.
NEEDS_RATIO = {"erc", "kl_cov"}
# Read off the tokens of a call together, so that answers with weights are not the same as answers drawn.
BATCHWISE = {"clip_cov", "high_entropy", "surprisal_boost", "kl_cov", "lp_reg", "balanced"}

# Numbers of a part that no controller turns, with their defaults. A name belongs to one part.
CONSTANTS: dict[str, dict[str, float]] = {
    "clip_cov": {"cov_share": 2e-4, "cov_low": 1.0, "cov_high": 5.0},
    "high_entropy": {"entropy_share": 0.2},
    "erc": {"erc_width": 0.05},
    "surprisal_boost": {"surprisal_share": 0.1},
    "gradient_preserving": {"grad_low": 0.5, "grad_high": 1.0},
    "sapo": {"tau_positive": 1.0, "tau_negative": 1.05},
    "linear": {"slope": -0.2},
    "dcpo": {"ratio_cap": 10.0},
    "balanced": {
        "positive_share": 0.5,
        "lower_to": 0.9,
        "upper_to": 3.0,
        "lower_step": 0.02,
        "upper_step": 0.05,
    },
    "kl_cov": {"kl_share": 2e-3},
    "lp_reg": {"lp_share": 0.01, "lp_kappa": 0.02},
    "aent": {"aent_drop": 0.3},
}

# Parts of your own: what they are called with. ``batch`` is a TokenBatch with advantages [b t], whose ``logp_old`` is
# None where the batch is exactly on-policy; ``recipe`` is the Recipe with its knob in force.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "baseline": ("rewards",),  # [p g] -> [b]
    "selection": ("batch", "recipe"),  # -> [b t] factors on the advantage, not differentiated, no knob
    "shaping": ("batch", "recipe"),  # -> [b t] advantages; logp and entropy come without gradient
    "objective": ("batch", "recipe"),  # -> (loss [b t], TokenFacts)
    "penalty": ("batch", "recipe"),  # -> [b t], times penalty_coef added to the loss
}


class Own:
    """A function of yours as a part: equal to itself, and named by its module where it is written down."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Own) and other.function == self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __deepcopy__(self, memo: Any) -> Own:
        return self

    def __str__(self) -> str:
        kind = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        return f"{kind.__module__}.{kind.__qualname__}"

    __repr__ = __str__

    @property
    def written(self) -> str:
        """The name, and eight characters of what it does: a function that was edited is another one."""
        return f"{self}@{hashlib.sha256(_source_of(self.function).encode()).hexdigest()[:8]}"


def _source_of(function: Any) -> str:
    """The text of a function, or of an object's class, and of all that it goes on to name in its own module."""
    texts: dict[str, str] = {}
    if isinstance(function, partial):
        texts["partial"], function = repr((function.args, sorted(function.keywords.items()))), function.func
    waiting = [function if inspect.isroutine(function) or isinstance(function, type) else type(function)]
    while waiting:
        found = waiting.pop()
        try:
            texts[found.__qualname__] = inspect.getsource(found)
        except (OSError, TypeError):  # built in, or typed at a prompt
            continue
        module = sys.modules.get(found.__module__)
        scope = getattr(found, "__globals__", None) or vars(module or object)
        for name in sorted(set(re.findall(r"\w+", texts[found.__qualname__])) & set(scope)):
            value = scope[name]
            if isinstance(value, int | float | str | tuple | list | dict) and " at 0x" not in repr(value):
                texts[name] = repr(value)
            elif getattr(value, "__module__", None) == found.__module__ and hasattr(value, "__qualname__"):
                waiting += [] if value.__qualname__ in texts else [value]
    return "\n".join(texts[name] for name in sorted(texts))


@dataclass(frozen=True)
class Recipe:
    """One algorithm.

    Attributes:
        formula, source: for people; ``source`` says what is the paper's and what is ours.
        baseline: how rewards become advantages.
        quantile: K of the quantile baseline, which interpolates linearly between samples.
        dynamic_sampling: sample again for prompts whose answers all got one reward (DAPO).
        overlong_buffer: tokens before the length limit over which a reward penalty grows to −1 (DAPO); 0 is off.
        selection: which tokens' advantages count.
        shaping: how the advantage changes by token.
        objective: surrogate.
        bounds: how the two widths of its clip become bounds of the ratio.
        penalty: what is added to the loss beside it, times ``penalty_coef``.
        reduction: what a sum over tokens is divided by.
        on_policy: exactly one optimizer step per generated batch.
        clip_low, clip_high, beta, zeta, alpha, reject, boost, entropy_coef, penalty_coef: numbers, each of which may be
            the knob.
        constants: other numbers of the parts, where they differ from :data:`CONSTANTS`.
        knob, knob_low, knob_high, knob_start: which of them is under control, and its range (None: the knob's own).
        controller, target, every: text forms; ``every`` is in optimizer steps, None is a generation batch.
        initial_readings: how many readings measure the initial entropy.
    """

    formula: str
    source: str
    baseline: Part = "mean_std"
    quantile: float = 0.4
    dynamic_sampling: bool = False
    overlong_buffer: int = 0
    selection: Part = "none"
    shaping: Part = "none"
    objective: Part = "clipped"
    bounds: str = "additive"
    penalty: Part = "none"
    reduction: str = "token"
    on_policy: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    zeta: float = 0.0
    alpha: float = 0.0
    reject: float = 0.0
    boost: float = 1.0
    entropy_coef: float = 0.0
    penalty_coef: float = 1.0
    constants: dict[str, float] = field(default_factory=dict, hash=False)
    knob: str | None = None
    knob_low: float | None = None
    knob_high: float | None = None
    knob_start: float | None = None
    controller: str = "fixed"
    target: str = "initial"
    every: int | None = None
    initial_readings: int = 1

    def __post_init__(self) -> None:
        for name in SIGNATURES:
            value = getattr(self, name)
            if callable(value) and not isinstance(value, Own):
                object.__setattr__(self, name, Own(value))

    def parts(self) -> tuple[Part, ...]:
        """Its selection, shaping, objective, bounds and penalty."""
        return self.selection, self.shaping, self.objective, self.bounds, self.penalty

    def constants_of(self, part: Part) -> dict[str, float]:
        """The constants of one of its parts, none for one of your own.

        Example:
            >>> Recipe("", "", constants={"cov_low": 2.0}).constants_of("clip_cov")
            {'cov_share': 0.0002, 'cov_low': 2.0, 'cov_high': 5.0}
        """
        known = CONSTANTS.get(part, {}) if isinstance(part, str) else {}
        return {name: self.constants.get(name, default) for name, default in known.items()}

    @property
    def plain(self) -> bool:
        """Whether the advantage reaches the objective as the baseline made it."""
        return self.selection == "none" and self.shaping == "none"

    @property
    def needs_rows(self) -> bool:
        """Whether a part reads whole rows of log-probabilities."""
        own = (part.function for part in self.parts() if isinstance(part, Own))
        return self.penalty in NEEDS_ROWS or any(getattr(function, "needs_rows", False) for function in own)


def choose(what: str, got: Any, allowed: Iterable[str]) -> None:
    """Refuse a name that is not allowed, naming those that are, and one that is close.

    Raises:
        ValueError: as said.
    """
    allowed = list(allowed)
    if got not in allowed:
        close = get_close_matches(str(got), allowed, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{what} must be one of {', '.join(sorted(allowed))}; got {got!r}{meant}")


def check_part(what: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuse a part that is neither an allowed name nor a function that can be called as such parts are.

    Raises:
        ValueError: what was got, and what is allowed.
    """
    if not callable(value):
        return choose(what, value, allowed)
    try:
        inspect.signature(value.function if isinstance(value, Own) else value).bind(*SIGNATURES[what])
    except TypeError as error:
        raise ValueError(
            f"{what} {value} must be callable as {what}({', '.join(SIGNATURES[what])}): {error}; see isentropic.recipes.parts"
        ) from None
    return None


@lru_cache(maxsize=64)
def _run(path: Path, changed: int) -> Any:
    """A file as a module, once for each of its versions."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def load(text: str, what: str) -> Any:
    """What stands at ``file.py:NAME`` or ``package.module:NAME``.

    Args:
        text: where.
        what: for messages: what was to be found there.

    Raises:
        ValueError: no such file, module or name, or a file that cannot be run; in one line.

    Example:
        >>> load("math:pi", "shaping")
        3.141592653589793
        >>> load("mine.py:LOOP", "recipe")
        Traceback (most recent call last):
        ...
        ValueError: recipe 'mine.py:LOOP': there is no file mine.py; name one that is here, or package.module:NAME
    """
    place, _, name = text.rpartition(":")
    path = Path(place).expanduser()
    try:
        if place.endswith(".py"):
            if not path.is_file():
                raise ValueError(f"there is no file {place}; name one that is here, or package.module:NAME")
            module = _run(path.resolve(), path.stat().st_mtime_ns)
        else:
            module = importlib.import_module(place)
    except ValueError as error:
        raise ValueError(f"{what} {text!r}: {error}") from None
    except Exception as error:  # a file of the user's may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what} {text!r}: {place} cannot be loaded: {reason}; run it alone to see where") from error
    if not hasattr(module, name):
        close = get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1)
        meant = f"did you mean {close[0]}?" if close else "assign it there"
        raise ValueError(f"{what} {text!r}: {place} has no {name!r}; {meant}")
    return getattr(module, name)
