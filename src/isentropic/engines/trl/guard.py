"""Entropy that explodes ends a run before it has spoiled the model: a bound on H over H*, and a checkpoint."""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import TrainerCallback

from ...recipes.compose import Recipe

logger = logging.getLogger("isentropic")
PATIENCE = 20  # optimizer steps in a row
USUAL = 3.0


def bound_of(recipe: Recipe, asked: float | None) -> float:
    """The bound in force: what was asked, else 3 where entropy is held and none (0) where it is not.

    Example:
        >>> from isentropic.recipes import RECIPES
        >>> bound_of(RECIPES["adapo"], None), bound_of(RECIPES["grpo"], None), bound_of(RECIPES["grpo"], 2.0)
        (3.0, 0.0, 2.0)
    """
    return asked if asked is not None else (USUAL if recipe.knob else 0.0)


class EntropyGuard(TrainerCallback):
    """Stop with a checkpoint once entropy has stood above ``bound`` times its reference for 20 optimizer steps.

    The reference is the larger of the target in force and the entropy of the first step, so that a run which is led
    down to a low target is not mistaken for one that explodes.

    Attributes:
        message: what happened and what to try, once it has; else None.
    """

    def __init__(self, trainer: Any, bound: float, patience: int = PATIENCE):
        self.trainer, self.bound, self.patience = trainer, bound, patience
        self.message: str | None = None
        self.start: float | None = None
        self.above = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = self.trainer.record.rows("metrics") if state.global_step else []
        self.start, self.above, self.message = (rows[0]["entropy/mean"] if rows else None), 0, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = self.trainer._row or {}
        entropy = row.get("entropy/mean")
        if not self.bound or entropy is None or math.isnan(entropy):
            return
        self.start = entropy if self.start is None else self.start
        reference = max(self.start, row.get("entropy/target") or 0.0)
        self.above = self.above + 1 if entropy > self.bound * reference else 0
        if self.above >= self.patience and state.global_step % self.trainer._boundary == 0 and self.message is None:
            self.message = (
                f"entropy stood above {self.bound:g} x {reference:.3f} nats for {self.above} optimizer steps, and is "
                f"{entropy:.3f} at step {state.global_step}; {self._remedy(row)}"
            )
            logger.warning("stopping with a checkpoint: %s", self.message)
            control.should_save = control.should_training_stop = True

    def _remedy(self, row: dict[str, Any]) -> str:
        recipe: Recipe = self.trainer.recipe
        tries = ["a lower learning rate"]
        if recipe.entropy_coef or recipe.knob == "entropy_coef":
            tries.insert(0, "a lower entropy_coef, or a lower knob_high for it")
        if recipe.knob is None:
            tries.insert(0, "a recipe with a target, such as isentropic")
        elif row.get("knob/saturated"):
            tries.insert(0, f"knob {recipe.knob} stands at its bound: a wider one by knob_low or knob_high")
        return f"try {', '.join(tries)}; `isentropic explain` says what moved it; `--stop-above 0` goes on regardless"
