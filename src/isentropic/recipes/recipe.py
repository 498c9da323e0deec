"""A recipe: one algorithm as data, a few fields that name its components. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..control.names import choose
from . import custom
from .stages import BASELINES, SHAPINGS, STAGES, Component, Objective

# A component is a name in its stage's table, an entry around a custom function, or the function itself.
Choice = str | Component | Callable[..., Any]

# Numbers that run.json holds under a name of their own, whichever component is chosen.
_NAMED_NUMBERS = {
    **{name: x for baseline in BASELINES.values() for name, x in baseline.constants.items()},
    **{name: shaping.constants[name] for shaping in SHAPINGS.values() for name in shaping.knobs},
}
FIELD_NUMBERS = ("redraw", "clip_low", "clip_high", "entropy_coef", "penalty_coef")


@dataclass(frozen=True)
class Recipe:
    """One algorithm.

    Attributes:
        formula, source: for people; ``source`` says what is the paper's and what is ours.
        baseline: how rewards become advantages.
        dynamic_sampling: sample again for prompts whose answers all got one reward (DAPO).
        overlong_buffer: tokens before the length limit over which a reward penalty grows to −1 (DAPO); 0 is off.
        redraw: share of a batch that right answers of a second batch replace, each with an advantage of 1 (AEPO); the
            second batch is drawn at a higher temperature if the share is positive, at a lower one if it is negative.
        redraw_high, redraw_low: the two temperatures, in units of that of the first batch.
        selection: which tokens' advantages count.
        shaping: how the advantage changes by token.
        objective: surrogate.
        bounds: how the two widths of its clip become bounds of the ratio.
        penalty: what is added to the loss beside it, times ``penalty_coef``.
        reduction: what a sum over tokens is divided by.
        on_policy: exactly one optimizer step per generated batch.
        clip_low, clip_high, entropy_coef, penalty_coef: numbers, each of which may be the knob; ``redraw`` too.
        constants: numbers of the components, if they differ from the defaults in :mod:`isentropic.recipes.stages`;
            the knobs of components among them.
        knob, knob_low, knob_high, knob_start: which number is under control, and its range (None: the knob's own).
        controller, target: text forms, or a custom controller and target.
        every: optimizer steps between two updates of the knob; None is a generated batch.
        initial_readings: how many readings measure the initial entropy.
    """

    formula: str
    source: str
    baseline: Choice = "mean_std"
    dynamic_sampling: bool = False
    overlong_buffer: int = 0
    redraw: float = 0.0
    redraw_high: float = 1.2
    redraw_low: float = 0.8
    selection: Choice = "none"
    shaping: Choice = "none"
    objective: Choice = "clipped"
    bounds: Choice = "additive"
    penalty: Choice = "none"
    reduction: str = "token"
    on_policy: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    entropy_coef: float = 0.0
    penalty_coef: float = 1.0
    constants: dict[str, float] = field(default_factory=dict, hash=False)
    knob: str | None = None
    knob_low: float | None = None
    knob_high: float | None = None
    knob_start: float | None = None
    controller: str | Any = "fixed"
    target: str | Any = "initial"
    every: int | None = None
    initial_readings: int = 1

    def __post_init__(self) -> None:
        for stage, table in STAGES.items():
            value = getattr(self, stage)
            if not isinstance(value, str):
                name = next((key for key, listed in table.items() if listed is value), None)
                object.__setattr__(self, stage, name or custom.entry(stage, value))
        for name in ("controller", "target"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, custom.factory(name, value))

    def __repr__(self) -> str:
        """The fields that differ from their defaults, without the texts for people."""
        given = {
            f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.name not in ("formula", "source")
        }
        shown = [f"{name}={_short(value)}" for name, (value, default) in given.items() if value not in (default, {})]
        return f"Recipe({', '.join(shown)})"

    def component(self, stage: str) -> Component:
        """The entry of a stage's component.

        Raises:
            ValueError: a name that the stage's table does not have.

        Example:
            >>> Recipe("", "", shaping="repo_r").component("shaping").constants
            {'zeta': 0.0}
        """
        chosen = getattr(self, stage)
        if isinstance(chosen, Component):
            return chosen
        choose(stage, chosen, STAGES[stage])
        return STAGES[stage][chosen]

    def components(self) -> dict[str, Component]:
        """The entries of all stages, in the order in which data flows."""
        return {stage: self.component(stage) for stage in STAGES}

    def number(self, name: str) -> float:
        """A number of the recipe by its name: a field, or a constant of one of its components.

        Raises:
            KeyError: it has no such number.

        Example:
            >>> recipe = Recipe("", "", selection="clip_cov", constants={"cov_low": 2.0})
            >>> recipe.number("cov_low"), recipe.number("cov_high"), recipe.number("clip_high")
            (2.0, 5.0, 0.2)
        """
        if name in FIELD_NUMBERS:
            return getattr(self, name)
        if name in self.constants:
            return self.constants[name]
        return next(c.constants[name] for c in self.components().values() if name in c.constants)

    def constants_of(self, stage: str) -> dict[str, float]:
        """The constants of a stage's component, as they are in force.

        Example:
            >>> Recipe("", "", selection="clip_cov", constants={"cov_low": 2.0}).constants_of("selection")
            {'cov_share': 0.0002, 'cov_low': 2.0, 'cov_high': 5.0}
        """
        return {name: self.constants.get(name, x) for name, x in self.component(stage).constants.items()}

    @property
    def plain(self) -> bool:
        """Whether the advantage reaches the objective as the baseline made it."""
        return self.selection == "none" and self.shaping == "none"

    @property
    def redraws(self) -> bool:
        """Whether a second batch may be drawn, at another temperature."""
        return self.redraw != 0 or self.knob == "redraw"

    @property
    def clips(self) -> bool:
        """Whether clip bounds act on its objective; a custom objective is assumed to have a clip."""
        objective = self.component("objective")
        return objective.clips if isinstance(objective, Objective) else True

    @property
    def reads(self) -> frozenset[str]:
        """The fields of a batch that its components cannot do without, besides ``logp``, ``adv`` and ``mask``."""
        return frozenset().union(*(c.reads for c in self.components().values()))

    def as_dict(self) -> dict[str, Any]:
        """Its fields as plain values, as run.json holds them; a custom component by name and digest.

        Example:
            >>> Recipe("", "", shaping="repo", constants={"beta": 0.5}).as_dict()["beta"]
            0.5
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in (*STAGES, "controller", "target"):
            if not isinstance(values[name], str):
                values[name] = values[name].written
        owned = {name: x for component in self.components().values() for name, x in component.constants.items()}
        numbers = {name: self.constants.get(name, owned.get(name, x)) for name, x in _NAMED_NUMBERS.items()}
        rest = {name: value for name, value in self.constants.items() if name not in numbers}
        return {**values, **numbers, "constants": rest}


def _short(value: Any) -> str:
    """A field as `Recipe` shows it: a custom part by its name."""
    return getattr(value, "written", "") or repr(value)
