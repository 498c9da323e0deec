"""From the settings of a run to its trainer: TRL's fields, the rows, and the rules for completions."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from ..control.names import suggest
from ..engines.trl import IsentropicConfig, IsentropicTrainer, Rollout
from ..engines.trl.compat import stop_at
from ..engines.trl.sequence import CompletionRules, SequentialTrainer
from ..models.episodes import limited
from ..models.generation import line_break_tokens
from ..recipes import Recipe
from ..runs.checkpoints import rotate, seal
from ..runs.frontier import best_step
from ..runs.record import Record
from ..runs.summary import counted
from ..tasks import Task
from ..tasks.checks import training_rows
from ..tasks.environments import EnvironmentTask
from ..tasks.sequence import in_order
from .config import ConfigError, RunConfig, config_errors, steps_of, total_steps


def build_trainer(
    config: RunConfig,
    recipe: Recipe,
    tasks: Sequence[Task],
    model: Any,
    tokenizer: Any,
    say: Callable[[str], None],
) -> IsentropicTrainer:
    """The trainer of a run.

    Args:
        config: its settings.
        recipe: its algorithm, composed.
        tasks: one, or several that follow one another.
        model, tokenizer: to train.
        say: called with a line for each optimizer step.

    Raises:
        ConfigError: a batch that cannot be split over the processes, or rows that cannot be read.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    with config_errors():
        task, rows = _training_task(config, tasks)
    rules = [_completion_rules(config, t, tokenizer) for t in tasks]
    trainer = (SequentialTrainer if len(tasks) > 1 else IsentropicTrainer)(
        model,
        task.reward,
        args=trl_config(config, recipe, task, ranks, shuffle=len(tasks) == 1),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=_lora_config(config, model),
        callbacks=[Checkpoints(config.keep)],
        rollout_func=rules[0].rollout,
    )
    # After training comes the last evaluation, and then whoever called this ends the run.
    trainer.say, trainer.closes = say, False
    stop_at(trainer, rules[0].stop)
    if isinstance(trainer, SequentialTrainer):
        trainer.starts = tuple(accumulate(steps_of(config)[:-1], initial=0))
        trainer.rules = tuple(rules)
    return trainer


def _training_task(config: RunConfig, tasks: Sequence[Task]) -> tuple[Task, list[dict[str, Any]]]:
    """The task that judges, and the rows to train on, without those that are held out."""
    if len(tasks) == 1:
        rows = training_rows(tasks[0], config.seed)
        if len(rows) < config.prompts:
            # TRL drops a batch that is not full, and would take no step.
            raise ConfigError(
                f"prompts: got {config.prompts}, and task {tasks[0].name!r} has {len(rows)} training rows; "
                f"set prompts to {len(rows)} or less, or give it more rows"
            )
        return tasks[0], rows
    sequence = in_order(tasks, [steps // config.updates * config.prompts for steps in steps_of(config)])
    return sequence, sequence.train(config.seed)


def _completion_rules(config: RunConfig, task: Task, tokenizer: Any) -> CompletionRules:
    stop = list(line_break_tokens(tokenizer)) if task.stop == "\n" else []
    rollout = Rollout(limited(task, config.max_completion_length)) if isinstance(task, EnvironmentTask) else None
    return CompletionRules(stop, config.max_completion_length or task.max_completion_length, rollout)


def _lora_config(config: RunConfig, model: Any) -> Any:
    if not config.lora_rank:
        return None
    from peft import LoraConfig

    targets: Any = config.lora_targets
    if targets == ["all-linear"]:
        targets = "all-linear"
    else:
        _check_targets(targets, model)
    alpha = config.lora_alpha or 2 * config.lora_rank
    return LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")


def _check_targets(targets: Sequence[str], model: Any) -> None:
    """Refuse a module that the model does not have, which PEFT ignores beside one that it has."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names} | {"all-linear"})
            raise ConfigError(f"lora_targets: got {target!r}{suggest(target, known)}; allowed: {', '.join(known)}")


def trl_config(config: RunConfig, recipe: Recipe, task: Task, ranks: int, shuffle: bool = True) -> IsentropicConfig:
    """The settings of a run as TRL's fields: those that a setting names itself, and those that are computed here.

    Args:
        config: the settings.
        recipe: the algorithm, composed.
        task: to train on.
        ranks: processes.
        shuffle: whether rows are shuffled.

    Raises:
        ConfigError: a batch that cannot be split.
    """
    unchanged = {
        setting.metadata["trl"]: getattr(config, setting.name) for setting in fields(config) if setting.metadata["trl"]
    }
    use_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    steps = total_steps(config)
    return IsentropicConfig(
        **unchanged,
        **_batch_fields(config, ranks),
        recipe=recipe,
        max_steps=steps,
        use_cpu=use_cpu,
        bf16=config.dtype == "mixed" or (config.dtype == "bfloat16" and not use_cpu),
        activation_checkpointing=config.checkpointing == "on",
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        use_vllm=config.vllm != "off",
        vllm_mode="server" if config.vllm == "server" else "colocate",
        vllm_server_base_url=config.vllm_server if config.vllm == "server" else None,
        max_completion_length=config.max_completion_length or task.max_completion_length,
        # The correction is of TRL's own losses, which a recipe may not use: one meaning of KL for all of them.
        use_bias_correction_kl=not config.kl,
        push_to_hub=config.push_to_hub is not None,
        hub_strategy="end",
        audit=config.audit == "on",
        stop_above=config.stop_above,
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=shuffle,
        save_strategy="steps",
        save_steps=config.save_every or -(-steps // config.updates) * config.updates,
    )


def _batch_fields(config: RunConfig, ranks: int) -> dict[str, Any]:
    """A generated batch, split into optimizer steps, processes and micro-batches."""
    batch = config.prompts * config.generations
    if batch % (config.updates * ranks):
        raise ConfigError(
            f"prompts x generations = {batch} must be a multiple of updates x processes = {config.updates * ranks}"
        )
    per_step = batch // config.updates // ranks
    micro_batch = config.micro_batch or per_step
    if per_step % micro_batch:
        raise ConfigError(
            f"micro_batch: got {micro_batch}, which does not divide the {per_step} completions that a process has of a "
            "step; choose a divisor"
        )
    return {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": per_step // micro_batch,
        "steps_per_generation": config.updates * (per_step // micro_batch),
    }


class Checkpoints(TrainerCallback):
    """Seals every checkpoint, then deletes old ones: TRL would delete the last whole one before the new one is whole.

    Of a run that is evaluated along the way the best checkpoint stays too, see
    :func:`isentropic.runs.frontier.best_step`.

    Args:
        keep: whole checkpoints that stay.
    """

    def __init__(self, keep: int):
        self.keep = keep

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            record = Record(args.output_dir)
            seal(record.path / f"checkpoint-{state.global_step}")
            rows = record.rows("evaluations")
            last = [row for row in rows if row["task"] == rows[-1]["task"] and row["step"] and counted(row)]
            best = best_step(last)
            rotate(record, self.keep, None if best is None else best.step)
