"""Training on two tasks, one after the other, in one run.

At the switch the optimizer's moments are cleared and the learning rate starts again, as in a new run from the first
task's model; the controller and its target continue.
"""

from __future__ import annotations

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
    """An :class:`IsentropicTrainer` whose rows are first of one task, then of another.

    Every row has a column ``task``, the name of its task (see :func:`isentropic.tasks.sequence.in_order`). Set both
    attributes before training.

    Attributes:
        switch_step: optimizer steps on the first task.
        rules: for completions of the first task, and of the second.
    """

    switch_step: int
    rules: tuple[CompletionRules, CompletionRules]

    def generate_batch(self, native: Callable[[Any], dict[str, Any]], inputs: Any) -> dict[str, Any]:
        output = super().generate_batch(native, inputs)
        self.run_log.of_batch["task"] = inputs[0]["task"]
        return output

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The configured schedule for each task, one after the other."""
        scheduled: Any = self.optimizer if optimizer is None else optimizer
        factors = [self._factor(steps) for steps in (self.switch_step, num_training_steps - self.switch_step)]

        def factor(step: int) -> float:
            return factors[0](step) if step < self.switch_step else factors[1](step - self.switch_step)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, factor)
        return self.lr_scheduler

    def _factor(self, steps: int) -> Callable[[int], float]:
        """The configured schedule over a number of steps: step -> factor on the learning rate."""
        unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        warmup = self.args.get_warmup_steps(steps)
        scheduler: Any = get_scheduler(self.args.lr_scheduler_type, unused, warmup, steps)
        return scheduler.lr_lambdas[0]


class SwitchTask(TrainerCallback):
    """Apply the rules of the current task; before the first step on the second one, clear the optimizer's state.

    Args:
        trainer: the trainer.
        on_switch: called with the number of optimizer steps done, once the first task is over.
    """

    def __init__(self, trainer: SequentialTrainer, on_switch: Callable[[int], None]):
        self.trainer, self.on_switch = trainer, on_switch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.rules[state.global_step >= self.trainer.switch_step].apply(self.trainer)
        if state.global_step == self.trainer.switch_step:
            optimizer: Any = self.trainer.optimizer
            optimizer.state.clear()
            self.on_switch(state.global_step)
