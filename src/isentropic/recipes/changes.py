"""What :func:`~isentropic.recipes.compose` may change, by name, for type checkers and editors.

A test holds it to the fields of a recipe and to the constants of the tables. A constant of a custom component goes
under ``constants``.
"""

from __future__ import annotations

from typing import Any, TypedDict

from .recipe import Choice


class Changes(TypedDict, total=False):
    """Fields of a recipe, then the constants of its components; None leaves one as it is."""

    formula: str | None
    source: str | None
    baseline: Choice | None
    dynamic_sampling: bool | None
    overlong_buffer: int | None
    redraw: float | None
    redraw_high: float | None
    redraw_low: float | None
    selection: Choice | None
    shaping: Choice | None
    objective: Choice | None
    bounds: Choice | None
    penalty: Choice | None
    reduction: str | None
    on_policy: bool | None
    clip_low: float | None
    clip_high: float | None
    entropy_coef: float | None
    penalty_coef: float | None
    constants: dict[str, float] | None
    knob: str | None
    knob_low: float | None
    knob_high: float | None
    knob_start: float | None
    controller: Any
    target: Any
    every: int | None
    initial_readings: int | None

    quantile: float | None
    pass_k: float | None
    rank_penalty: float | None
    uniform_share: float | None
    cov_share: float | None
    cov_low: float | None
    cov_high: float | None
    entropy_share: float | None
    erc_width: float | None
    beta: float | None
    zeta: float | None
    alpha: float | None
    reject: float | None
    steer_least: float | None
    tilt: float | None
    temper_high: float | None
    temper_low: float | None
    boost: float | None
    surprisal_share: float | None
    slope: float | None
    ratio_cap: float | None
    positive_share: float | None
    lower_to: float | None
    upper_to: float | None
    lower_step: float | None
    upper_step: float | None
    grad_low: float | None
    grad_high: float | None
    tau_positive: float | None
    tau_negative: float | None
    kl_share: float | None
    lp_share: float | None
    lp_kappa: float | None
    aent_drop: float | None
    tre_mass: float | None
    tre_keep: float | None
