"""Training on several tasks, one after the other, in one run.

At a switch the optimizer's moments are cleared and the learning rate starts again, as in a new run from the
model so far; the controller and its target continue.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, get_scheduler

from .compat import Trainer, limit_to, stop_at
from .rollout import Rollout
from .trainer import IsentropicTrainer


class CompletionRules(NamedTuple):
    """How completions of a task are generated.

    Attributes:
        stop: ids of tokens that end a completion, besides the end of the sequence.
        limit: its tokens at most.
        rollout: plays the episodes of a task with an environment; None if the task has none.
    """

    stop: list[int]
    limit: int
    rollout: Rollout | None = None

    def apply(self, trainer: Trainer) -> None:
        """Let a GRPO trainer generate by these rules from its next batch on."""
        stop_at(trainer, self.stop)
        limit_to(trainer, self.limit)
        trainer.rollout_func = self.rollout


class SequentialTrainer(IsentropicTrainer):
    """An :class:`IsentropicTrainer` whose rows are of one task after the other.

    Every row has a column ``task``, the name of its task (see :func:`isentropic.tasks.sequence.in_order`). Set both
    attributes before training.

    Attributes:
        starts: optimizer steps done before each task, the first of them 0.
        rules: for completions of each task.
    """

    starts: tuple[int, ...]
    rules: tuple[CompletionRules, ...]

    def place(self, step: int) -> int:
        """The index of the task that is trained on after a number of optimizer steps."""
        return bisect_right(self.starts, step) - 1

    def generate_batch(self, native: Callable[[Any], dict[str, Any]], inputs: Any) -> dict[str, Any]:
        output = super().generate_batch(native, inputs)
        self.run_log.of_batch["task"] = inputs[0]["task"]
        return output

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The configured schedule for each task, one after the other."""
        scheduled: Any = self.optimizer if optimizer is None else optimizer
        ends = (*self.starts[1:], num_training_steps)
        factors = [self._factor(end - start) for start, end in zip(self.starts, ends, strict=True)]

        def factor(step: int) -> float:
            place = self.place(step)
            return factors[place](step - self.starts[place])

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, factor)
        return self.lr_scheduler

    def _factor(self, steps: int) -> Callable[[int], float]:
        """The configured schedule over a number of steps: step -> factor on the learning rate."""
        unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        warmup = self.args.get_warmup_steps(steps)
        scheduler: Any = get_scheduler(self.args.lr_scheduler_type, unused, warmup, steps)
        return scheduler.lr_lambdas[0]


class SwitchTask(TrainerCallback):
    """Apply the rules of the current task; before the first step on a later one, clear the optimizer's state.

    Args:
        trainer: the trainer.
        on_switch: called with the number of optimizer steps done, when a task is over.
    """

    def __init__(self, trainer: SequentialTrainer, on_switch: Callable[[int], None]):
        self.trainer, self.on_switch = trainer, on_switch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.rules[self.trainer.place(state.global_step)].apply(self.trainer)
        if state.global_step in self.trainer.starts[1:]:
            optimizer: Any = self.trainer.optimizer
            optimizer.state.clear()
            self.on_switch(state.global_step)
