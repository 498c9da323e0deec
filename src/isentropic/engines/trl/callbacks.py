"""Callbacks and signals: the lines that a run prints, a guard against exploding entropy, and the request to stop."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ...control.guard import PATIENCE, USUAL_BOUND, Guard, GuardState
from ...recipes import Recipe, build_controller
from ...runs.summary import NOT_KNOWN
from ...runs.text import duration, visible
from .compat import Trainer
from .log import recipe_of
from .settings import boundary

logger = logging.getLogger("isentropic")


class Opening(TrainerCallback):
    """Opens the run directory when training starts, and prints what is controlled."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        starts = getattr(self.trainer, "starts", (0,))
        self.trainer.loop.extend_to(*starts[1:], state.max_steps)
        self.trainer.run_log.begin(state.max_steps)
        if state.is_world_process_zero:
            self.trainer.say(opening_line(self.trainer))


def opening_line(trainer: Trainer) -> str:
    """What is controlled by what, and how often entropy is read and explained."""
    recipe, explainer = trainer.recipe, trainer.explainer
    target = getattr(recipe.target, "written", recipe.target)
    held = "only monitored" if recipe.knob is None else f"knob {recipe.knob}"
    if recipe.knob is not None:
        held += f", target {target}" if build_controller(recipe).steers else " without a target"
    head = "fused head" if explainer.fused else "TRL's head"
    rare = f"read each step, explained every {explainer.every} steps" if explainer.every else "read each step"
    how = "read and explained each step" if explainer.every == 1 else rare
    return f"isentropic: {recipe_of(trainer)}, {held}, {head}; entropy {how}"


def step_line(step: int, steps: int, seconds_left: float, row: dict[str, Any], knob: str | None) -> str:
    """The line of an optimizer step: six figures, as far as they are known.

    Args:
        step, steps: steps done, and steps in all.
        seconds_left: of training.
        row: of metrics.jsonl, with ``reward``.
        knob: its name.

    Example:
        >>> row = {"entropy/mean": 0.91, "entropy/target": 1.0, "knob/value": 0.02, "reward": 0.5}
        >>> step_line(7, 800, 61.0, {**row, "clip/low_frac": 0.01, "clip/high_frac": 0.002}, "zeta")
        'step   7/800  eta 1:01  reward 0.500  entropy 0.910 (target 1.000)  zeta 0.02  clip 1.2%'
    """
    columns = [f"step {step:{len(str(steps))}d}/{steps}", f"eta {duration(seconds_left)}"]
    if row.get("reward") is not None:
        columns.append(f"reward {row['reward']:.3f}")
    entropy, target = row.get("entropy/mean"), row.get("entropy/target")
    against = f" (target {target:.3f})" if target is not None else ""
    columns.append(f"entropy {NOT_KNOWN if entropy is None else f'{entropy:.3f}'}{against}")
    if row.get("knob/value") is not None:
        columns.append(f"{knob} {row['knob/value']:.3g}" + (" at its bound" if row.get("knob/saturated") else ""))
    if row.get("clip/low_frac") is not None and row.get("clip/high_frac") is not None:
        columns.append(f"clip {row['clip/low_frac'] + row['clip/high_frac']:.1%}")
    return "  ".join(columns)


class _StepLines(TrainerCallback):
    """Prints six figures of a logged step in place of all that TRL logs of it; other logs are printed as ever."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.trainer = trainer
        self._started, self._first = time.monotonic(), 0
        self._reward: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._started, self._first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # At its end transformers logs the run time, which is in the closing table.
        if not logs or "train_runtime" in logs:
            return
        if "loss" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)
            return
        self._reward = logs.get("reward", self._reward)  # TRL logs it once per generated batch
        done = max(state.global_step - self._first, 1)
        left = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
        row = {**logs, "reward": self._reward}
        if state.is_world_process_zero:
            self.write(step_line(state.global_step, state.max_steps, left, row, self.trainer.recipe.knob))

    def write(self, line: str) -> None:
        self.trainer.say(line)


class StepPrinter(_StepLines, PrinterCallback):
    """transformers' printer, which prints the six figures."""


class StepBar(_StepLines, ProgressCallback):
    """transformers' progress bar, above which the six figures are printed."""

    def write(self, line: str) -> None:
        bar: Any = self.training_bar
        bar.write(visible(line))


def print_six_figures(trainer: Trainer) -> None:
    """Replace a trainer's printer or progress bar by ours; a trainer without one stays silent."""
    for native, ours in ((PrinterCallback, StepPrinter), (ProgressCallback, StepBar)):
        if trainer.pop_callback(native) is not None:
            trainer.add_callback(ours(trainer))


def bound_of(recipe: Recipe, asked: float | None) -> float:
    """The guard's bound in force: the requested one, else 3 if entropy is held and 0 (none) if it is not.

    Example:
        >>> from isentropic.recipes import RECIPES
        >>> bound_of(RECIPES["adapo"], None), bound_of(RECIPES["grpo"], None), bound_of(RECIPES["grpo"], 2.0)
        (3.0, 0.0, 2.0)
    """
    return asked if asked is not None else (USUAL_BOUND if recipe.knob else 0.0)


def _ceiling(vocabulary: int | None) -> float | None:
    return None if vocabulary is None else math.log(vocabulary)


class EntropyGuard(TrainerCallback):
    """Save a checkpoint and stop if :class:`isentropic.control.guard.Guard` says that entropy explodes.

    Attributes:
        message: what happened and what to try; None before that.
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
        return f"try {', '.join(tries)}; `isentropic explain` says what moved it; stop_above = 0 continues regardless"


class StopRequest:
    """The first Ctrl-C or SIGTERM of a run: all ranks see it at their next reduction, then save and stop.

    Attributes:
        made: whether the request was made.
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
        logger.warning("will save and stop at the end of this generated batch; press again to stop now, without saving")

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
