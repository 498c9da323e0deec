"""One whole run: task, model, trainer, evaluation at start and end, and the summary.

The run directory is the result; everything that is printed at the end is read from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback

from ..engines.trl import IsentropicTrainer, audit_trainer
from ..engines.trl.compat import load_weights as load_checkpoint_weights
from ..engines.trl.log import close_run, closing_figures
from ..engines.trl.sequence import SequentialTrainer, SwitchTask
from ..entropy.audit import Report
from ..models import resolve_model
from ..models.loading import load_tokenizer, load_weights, suit_threads
from ..runs.checkpoints import choose, clear_unfinished
from ..runs.lock import held
from ..runs.record import Record
from ..runs.text import show
from ..tasks import Task, load_task
from ..tasks.checks import constant_line
from .config import RunConfig, as_dict, config_errors, recipe_of, total_steps
from .devices import check_device
from .evaluate import check_prompts, evaluate
from .hub import push
from .origin import origin
from .terminal import Progress
from .trainer import build_trainer


def train(
    config: RunConfig,
    resume: bool = False,
    say: Callable[[str], None] = show,
    write_report: Callable[[Record], Path] | None = None,
) -> dict[str, Any]:
    """Run a config to its end; returns the summary that summary.json holds.

    Args:
        config: checked, with a run directory.
        resume: continue from the last complete checkpoint; start the run if there is none.
        say: called with lines of progress.
        write_report: called at the end, to write a page about the run; an error in it does not fail the run.

    Raises:
        ConfigError: a model, task or run directory that cannot be used.
        KeyboardInterrupt: stopped by a signal, with a checkpoint.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    with _hold(str(config.out)) if is_main else nullcontext():
        return _train(config, resume, say, write_report, is_main)


def _train(
    config: RunConfig,
    resume: bool,
    say: Callable[[str], None],
    write_report: Callable[[Record], Path] | None,
    is_main: bool,
) -> dict[str, Any]:
    started = time.monotonic()
    check_device(config.device)
    record = Record(str(config.out))
    recipe = recipe_of(config)
    tasks = tasks_of(config)
    model, tokenizer = _load_checked(config, tasks)
    checkpoint = _checkpoint_to_resume(record, say, is_main) if resume else None
    if is_main and not (resume and record.begun()):
        settings = as_dict(config)
        with config_errors():
            about = {"task": config.task, "model": config.model, "origin": origin(settings)}
        record.start(settings, recipe.as_dict(), config.seed, **about)
    suit_threads(model)
    trainer = build_trainer(config, recipe, tasks, model, tokenizer, say)
    evaluation = _Evaluation(config, tasks, trainer, tokenizer, record, say) if is_main else _no_evaluation
    if isinstance(trainer, SequentialTrainer):
        trainer.add_callback(SwitchTask(trainer, on_switch=evaluation))
    if config.eval_every:
        trainer.add_callback(EvaluateAlong(config.eval_every, evaluation))
    if checkpoint is None:
        if is_main:
            for line in filter(None, (constant_line(task, task.heldout()) for task in tasks)):
                say(line)
        evaluation(0)
    step = _run(trainer, checkpoint, total_steps(config))
    stopped = trainer.guard.message
    if step < total_steps(config) and stopped is None:
        raise KeyboardInterrupt
    evaluation(step)
    seconds = time.monotonic() - started
    if is_main:
        result = close_run(record, seconds, stopped, say, write_report)
        trainer.renew_card()
    else:
        result = closing_figures(record, seconds, stopped)
    if config.push_to_hub is not None:
        push(trainer, config.push_to_hub, say if is_main else _say_nothing)
    return result


def _run(trainer: IsentropicTrainer, checkpoint: Path | None, steps: int) -> int:
    """Train, and return the optimizer steps taken; from a checkpoint of the last step only its weights are loaded."""
    if checkpoint is not None and int(checkpoint.name.rpartition("-")[2]) >= steps:
        # TRL's own loop would take one more step.
        load_checkpoint_weights(trainer, str(checkpoint))
        return steps
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.state.global_step


class EvaluateAlong(TrainerCallback):
    """Evaluates every so many optimizer steps, and saves a checkpoint with each evaluation.

    Args:
        every: optimizer steps.
        evaluation: called with the steps done.
    """

    def __init__(self, every: int, evaluation: Callable[[int], None]):
        self.every, self.evaluation = every, evaluation

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.evaluation(state.global_step)
            control.should_save = True


def tasks_of(config: RunConfig) -> list[Task]:
    """The tasks of a config, in order, which ask under its system prompt if it has one."""
    tasks = [load_task(name) for name in (config.task, *config.then)]
    return [task.with_system_prompt(config.system_prompt) for task in tasks]


def _no_evaluation(step: int) -> None:
    """The evaluation of a process that is not the main one."""


def _say_nothing(line: str) -> None:
    """What a process that is not the main one says."""


class _Evaluation:
    """Evaluates the model on every task after an optimizer step, unless the run directory has that evaluation."""

    def __init__(
        self,
        config: RunConfig,
        tasks: Sequence[Task],
        trainer: IsentropicTrainer,
        tokenizer: Any,
        record: Record,
        say: Callable[[str], None],
    ):
        self.config, self.tasks, self.trainer, self.tokenizer = config, tasks, trainer, tokenizer
        self.record, self.say = record, say

    def __call__(self, step: int) -> None:
        if self.config.eval_k == 0:
            return
        if self.trainer.is_fsdp_enabled:
            self.say("no evaluation: the weights are on several devices; evaluate a checkpoint by `isentropic eval`")
            return
        known = {(row["step"], row["task"]) for row in self.record.rows("evaluations")}
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for place, task in enumerate(self.tasks):
            if (step, task.name) in known:
                continue
            figures = self._figures(model, task)
            self.record.append("evaluations", {"step": step, **figures})
            if place == (self.trainer.place(step) if isinstance(self.trainer, SequentialTrainer) else 0):
                # The coolest answers: what a target needs to know is whether the policy has become worse.
                coolest = min(figures["at"].items(), key=lambda pair: float(pair[0]), default=(None, figures))[1]
                prompts = len(task.heldout()[: self.config.eval_rows])
                self.trainer.loop.tell_held_out(prompts * coolest["pass@1"], prompts)

    def _figures(self, model: Any, task: Task) -> dict[str, Any]:
        """Evaluate under the arithmetic of training, before the trainer has wrapped the model as after."""
        config = self.config
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "mixed"):
            return evaluate(
                model,
                self.tokenizer,
                task,
                config.eval_k,
                rows=task.heldout()[: config.eval_rows],
                temperature=config.temperature,
                others=config.eval_temperatures,
                seed=config.seed,
                max_tokens=config.max_completion_length,
                progress=Progress(f"evaluation on {task.name}", self.say),
            )


def audit(config: RunConfig) -> Report:
    """Audit a config's trainer as it would start, in a temporary run directory.

    Raises:
        ConfigError: a model or task that cannot be used.
    """
    check_device(config.device)
    tasks = tasks_of(config)[:1]
    model, tokenizer = _load_checked(config, tasks)
    with TemporaryDirectory() as out:
        config = replace(config, out=out)
        return audit_trainer(build_trainer(config, recipe_of(config), tasks, model, tokenizer, say=show))


@contextmanager
def _hold(out: str) -> Iterator[None]:
    """Hold the lock of a run directory, whose problems are mistakes in the settings."""
    with ExitStack() as stack:
        with config_errors():
            stack.enter_context(held(out))
        yield


def _checkpoint_to_resume(record: Record, say: Callable[[str], None], is_main: bool) -> Path | None:
    """The last whole checkpoint, after what came later is deleted from the rows; None to begin at the first step."""
    choice = choose(record)
    if is_main:
        if not record.begun():
            say(f"--resume: there is no run in {record.path}; starting one with the settings given here")
        elif choice.damaged:
            taken = choice.path.name if choice.path else "step 0, since no other checkpoint is complete"
            say(f"--resume: continuing from {taken}; {'; '.join(choice.damaged)}")
        clear_unfinished(record)
        record.rewind(int(choice.path.name.rpartition("-")[2]) if choice.path else -1)
    return choice.path


def _load_checked(config: RunConfig, tasks: Sequence[Task]) -> tuple[Any, Any]:
    """The model of a config and its tokenizer, after a check that the tokenizer can encode the tasks' prompts.

    Raises:
        ConfigError: a model that cannot be used, rows that cannot be read, prompts without a chat template.
    """
    with config_errors():
        path = resolve_model(config.model)
        tokenizer = load_tokenizer(path)
        for task in tasks:
            check_prompts(task, tokenizer, config.model)
        return load_weights(path, "float32" if config.dtype == "mixed" else config.dtype), tokenizer
