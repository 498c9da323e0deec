"""Callbacks and signals: a guard against exploding entropy, the length of the run, and the request to stop."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from ...control.guard import PATIENCE, USUAL_BOUND, Guard, GuardState
from ...recipes import Recipe
from .compat import Trainer
from .settings import boundary

logger = logging.getLogger("isentropic")


class RunLength(TrainerCallback):
    """Tells a target over the whole run its length as training begins: by epochs it is known no sooner."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.loop.extend_to(state.max_steps)


def bound_of(recipe: Recipe, asked: float | None) -> float:
    """The guard's bound in force: what was asked, else 3 if entropy is held and none (0) if it is not.

    Example:
        >>> from isentropic.recipes import RECIPES
        >>> bound_of(RECIPES["adapo"], None), bound_of(RECIPES["grpo"], None), bound_of(RECIPES["grpo"], 2.0)
        (3.0, 0.0, 2.0)
    """
    return asked if asked is not None else (USUAL_BOUND if recipe.knob else 0.0)


def _ceiling(vocabulary: int | None) -> float | None:
    return None if vocabulary is None else math.log(vocabulary)


class EntropyGuard(TrainerCallback):
    """Stop with a checkpoint once :class:`isentropic.control.guard.Guard` says that entropy explodes.

    Attributes:
        message: what happened and what to try, once it has; else None.
    """

    def __init__(self, trainer: Trainer, bound: float, patience: int = PATIENCE):
        self.trainer, self.guard = trainer, Guard(bound, patience, _ceiling(trainer.loop.vocabulary))
        self.state = GuardState()
        self.message: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = self.trainer.run_log.record.rows("metrics") if state.global_step else []
        self.state, self.message = GuardState(rows[0]["entropy/mean"] if rows else None), None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = self.trainer.run_log.row or {}
        entropy = row.get("entropy/mean")
        self.state = self.guard.update(self.state, entropy, row.get("entropy/target"))
        if entropy is None or not self.guard.exceeded(self.state) or self.message is not None:
            return
        if state.global_step % boundary(self.trainer.args) == 0:
            self.message = (
                f"entropy was above {self._limit()} for {self.state.above} "
                f"optimizer steps, and is {entropy:.3f} at step {state.global_step}; {self._remedy(row)}"
            )
            logger.warning("stopping with a checkpoint: %s", self.message)
            control.should_save = control.should_training_stop = True

    def _limit(self) -> str:
        reference = self.state.reference
        times, limit = self.guard.bound * reference, self.guard.limit(reference)
        if limit < times:
            return f"{limit:.3f} nats, close to the log of the vocabulary,"
        return f"{self.guard.bound:g} x {reference:.3f} nats"

    def _remedy(self, row: dict[str, Any]) -> str:
        recipe: Recipe = self.trainer.recipe
        tries = ["a lower learning rate"]
        if recipe.entropy_coef or recipe.knob == "entropy_coef":
            tries.insert(0, "a lower entropy_coef, or a lower knob_high for it")
        if recipe.knob is None:
            tries.insert(0, "a recipe with a target, such as isentropic")
        elif row.get("knob/saturated"):
            tries.insert(0, f"knob {recipe.knob} is at its bound: a wider one by knob_low or knob_high")
        return f"try {', '.join(tries)}; `isentropic explain` says what moved it; `--stop-above 0` continues regardless"


class StopRequest:
    """The first Ctrl-C or SIGTERM of a run: all ranks see it at their next reduction, then save and stop.

    Attributes:
        made: whether it was made.
    """

    def __init__(self) -> None:
        self.made = False
        self._first = 0.0

    def _signalled(self, number: int, frame: Any) -> None:
        if self.made:
            # A launcher passes its own Ctrl-C on: two signals at once are one request.
            if time.monotonic() - self._first > 2:
                raise KeyboardInterrupt
            return
        self.made, self._first = True, time.monotonic()
        logger.warning("will save and stop at the end of this generated batch; once more to stop now, without saving")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests inside; does nothing outside the main thread."""
        self.made = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._signalled) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
