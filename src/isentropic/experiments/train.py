"""One whole run: task, model, trainer, evaluation at start and end, and the closing table.

The run directory is the result; what is printed is read from it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)

from ..engines.trl.audit import StartAudit, audit_trainer
from ..engines.trl.guard import EntropyGuard, bound_of
from ..engines.trl.rollout import Rollout, limited
from ..engines.trl.stop import line_breaks, stop_at
from ..engines.trl.trainer import IsentropicConfig, IsentropicTrainer
from ..entropy.audit import Report
from ..models import check_head, resolve_model
from ..runs.record import Record, write_json
from ..runs.statistics import rms_relative_error
from ..tasks import Task, load_task
from ..tasks.checks import constant_line, training_rows
from ..tasks.environments import EnvironmentTask
from .config import ConfigError, RunConfig, as_dict, recipe_of, total_steps
from .evaluate import check_prompts, evaluate
from .sequence import Manner, SequentialTrainer, Switch, in_order

SETTLED = 20  # optimizer steps before the entropy error counts
SMALL_MODEL = 10_000_000  # parameters


def train(config: RunConfig, resume: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run a config to its end; returns the summary that summary.json holds.

    Raises:
        ConfigError: a model, task or run directory that cannot be used.
    """
    began = time.monotonic()
    main = os.environ.get("RANK", "0") == "0"
    record = Record(str(config.out))
    task = load_task(config.task)
    tasks = [task, *([load_task(config.then)] if config.then else [])]
    model, tokenizer = load_checked(config, tasks)
    checkpoint = _checkpoint_to_resume(record, main) if resume else None
    if main and not resume:
        record.start(as_dict(config), asdict(recipe_of(config)), config.seed, task=config.task, model=config.model)
    suit_threads(model)
    trainer = _trainer(config, tasks, model, tokenizer, say)
    guard = EntropyGuard(trainer, bound_of(trainer.recipe, config.stop_above))
    trainer.add_callback(guard)
    if config.audit == "on":
        trainer.add_callback(StartAudit(trainer))

    def score(step: int) -> None:
        """Evaluate on every task; what a killed run has evaluated already stays."""
        if not main or config.eval_k == 0:
            return
        if trainer.is_fsdp_enabled:
            say("no evaluation: the weights lie on several devices; evaluate a checkpoint by `isentropic eval`")
            return
        known = {(row["step"], row["task"]) for row in record.rows("evaluations")}
        trained = trainer.accelerator.unwrap_model(trainer.model)
        for each in tasks:
            if (step, each.name) not in known:
                record.append("evaluations", {"step": step, **_evaluate(trained, tokenizer, each, config)})

    if isinstance(trainer, SequentialTrainer):
        trainer.add_callback(Switch(trainer, then=score))
    if main and checkpoint is None:
        for line in filter(None, (constant_line(each, each.heldout()) for each in tasks)):
            say(line)
    if checkpoint is None:
        score(0)
    step = _run(trainer, checkpoint, total_steps(config))
    if step < total_steps(config) and guard.message is None:
        raise KeyboardInterrupt
    score(step)
    result = summary(record, time.monotonic() - began)
    if guard.message is not None:
        result["stopped"] = guard.message
    if main:
        write_json(record.path / "summary.json", result)
        _write_report(record, say)
    return result


def _run(trainer: Any, checkpoint: Path | None, steps: int) -> int:
    """Train, and return the optimizer steps taken; from a checkpoint of the last step only its weights are taken."""
    if checkpoint is not None and int(checkpoint.name.rpartition("-")[2]) >= steps:
        # TRL's own loop would take one step more.
        trainer._load_from_checkpoint(str(checkpoint))
        return steps
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.state.global_step


def _evaluate(model: Any, tokenizer: Any, task: Task, config: RunConfig) -> dict[str, Any]:
    """Under the arithmetic of training, before the trainer has wrapped the model as after."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "mixed"):
        return evaluate(
            model,
            tokenizer,
            task,
            config.eval_k,
            rows=task.heldout()[: config.eval_rows],
            temperature=config.temperature,
            seed=config.seed,
            max_tokens=config.max_completion_length,
        )


def _write_report(record: Record, say: Callable[[str], None]) -> None:
    """The page of a run that has ended; nothing that goes wrong here may fail the run."""
    from ..report import write

    try:
        say(f"report: {write([record.path], record.path / 'report.html')}")
    except Exception as error:
        say(f"no report: {error}")


def audit(config: RunConfig) -> Report:
    """Audit a config's trainer as it would start, in a directory that is thrown away.

    Raises:
        ConfigError: a model or task that cannot be used.
    """
    task = load_task(config.task)
    model, tokenizer = load_checked(config, [task])
    with TemporaryDirectory() as out:
        return audit_trainer(_trainer(replace(config, out=out), [task], model, tokenizer, say=print))


def _checkpoint_to_resume(record: Record, main: bool) -> Path | None:
    found = record.checkpoints()
    if found:
        return found[-1][1]
    if main:
        record.rewind(-1)
    return None


def load_checked(config: RunConfig, tasks: list[Task]) -> tuple[Any, Any]:
    """The model of a config and its tokenizer, once the tokenizer is known to serve the tasks.

    Raises:
        ConfigError: a model that cannot be used, rows that cannot be read, prompts without a chat template.
    """
    try:
        path = resolve_model(config.model)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    tokenizer = load_tokenizer(path)
    for task in tasks:
        check_prompts(task, tokenizer, config.model)
    return load_weights(path, "float32" if config.dtype == "mixed" else config.dtype), tokenizer


def load_model(path: str, dtype: str = "float32") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, padded on the left.

    Raises:
        ConfigError: what could not be loaded, and why, in one line.
    """
    tokenizer = load_tokenizer(path)
    return load_weights(path, dtype), tokenizer


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model, padded on the left.

    Raises:
        ConfigError: what could not be loaded, and why, in one line.
    """
    _reach(path)
    with _loading(path):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def suit_threads(model: Any) -> None:
    """One thread for a tiny model, unless OMP_NUM_THREADS says.

    Threads that meet at every small operation make a tiny model many times slower on a busy machine.
    """
    if "OMP_NUM_THREADS" not in os.environ and model.num_parameters() < SMALL_MODEL:
        torch.set_num_threads(1)


def load_weights(path: str, dtype: str = "float32") -> Any:
    """A causal language model, whose head must be among the saved weights.

    Args:
        path: directory or hub id.
        dtype: a name of torch's, or `auto`, as it was saved.

    Raises:
        ConfigError: what could not be loaded, and why, in one line.
    """
    if (Path(path) / "adapter_config.json").is_file():
        return _with_adapter(path, dtype)
    with _loading(path):
        check_head(path, AutoConfig.from_pretrained(path).architectures)
        chosen = dtype if dtype == "auto" else getattr(torch, dtype)
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=chosen, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"model: {path!r} was saved without {', '.join(missing[:3])}, which would be random; "
            "name a causal language model that was saved whole"
        )
    return model


def _with_adapter(path: str, dtype: str) -> Any:
    """The base model of a saved adapter, with the adapter's weights added to its own."""
    from peft import PeftConfig, PeftModel

    with _loading(path):
        base = load_weights(str(PeftConfig.from_pretrained(path).base_model_name_or_path), dtype)
        return PeftModel.from_pretrained(base, path).merge_and_unload()  # type: ignore[operator]


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """What a loader says, in one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model: {path!r} cannot be loaded: {reason}; name a saved model's directory or a hub id"
        ) from None


def _reach(name: str) -> None:
    """Ask the hub once about a model that is not here: its own loader goes on asking for more than a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE or Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model: {name!r} is neither a directory nor in the hub's cache, and the hub does not give it: {reason}; "
            "check the name and the network, or name a saved model's directory"
        ) from None


def _trainer(
    config: RunConfig, tasks: list[Task], model: Any, tokenizer: Any, say: Callable[[str], None]
) -> IsentropicTrainer:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = config.prompts * config.generations
    if batch % (config.updates * ranks):
        raise ConfigError(
            f"prompts x generations = {batch} must be a multiple of updates x processes = {config.updates * ranks}"
        )
    task = tasks[0]
    try:
        if len(tasks) > 1:
            num_first, num_all = (n // config.updates * config.prompts for n in (config.steps, total_steps(config)))
            task = in_order(tasks[0], tasks[1], num_first, num_all - num_first)
            rows = task.train(config.seed)
        else:
            rows = training_rows(task, config.seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    peft = None
    if config.lora_rank:
        from peft import LoraConfig

        peft = LoraConfig(
            r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    first, *then = [_manner(config, each, tokenizer) for each in tasks]
    trainer = (SequentialTrainer if len(tasks) > 1 else IsentropicTrainer)(
        model,
        task.reward,
        args=_trl_config(config, task, in_turn=len(tasks) > 1, ranks=ranks),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft,
        callbacks=[StepLines(say)],
        rollout_func=first.rollout,
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    stop_at(trainer, first.stop)
    if isinstance(trainer, SequentialTrainer):
        trainer.switch, trainer.manners = config.steps, (first, then[0])
    return trainer


def _manner(config: RunConfig, task: Task, tokenizer: Any) -> Manner:
    stop = list(line_breaks(tokenizer)) if task.stop == "\n" else []
    plays = Rollout(limited(task, config.max_completion_length)) if isinstance(task, EnvironmentTask) else None
    return Manner(stop, config.max_completion_length or task.max_completion_length, plays)


def _trl_config(config: RunConfig, task: Task, in_turn: bool, ranks: int) -> IsentropicConfig:
    """A run's settings as TRL has them."""
    batch, steps = config.prompts * config.generations, total_steps(config)
    a_step = batch // config.updates // ranks
    at_once = config.micro_batch or a_step
    if a_step % at_once:
        raise ConfigError(
            f"micro_batch: got {at_once}, which does not divide the {a_step} completions that a process has of a step; "
            "choose a divisor"
        )
    use_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    return IsentropicConfig(
        output_dir=str(config.out),
        recipe=config.recipe,
        knob=config.knob,
        controller=config.controller,
        target=config.target,
        recipe_options={
            **{k: v for k, v in (("every", config.every), ("shaping", config.shaping)) if v is not None},
            **config.recipe_options,
        },
        explain_every=config.explain_every,
        head=config.head,
        max_steps=steps,
        seed=config.seed,
        use_cpu=use_cpu,
        bf16=config.dtype == "mixed" or (config.dtype == "bfloat16" and not use_cpu),
        activation_checkpointing=config.checkpointing == "on",
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=config.warmup,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=a_step // at_once,
        steps_per_generation=config.updates * (a_step // at_once),
        use_vllm=config.vllm != "off",
        vllm_mode="server" if config.vllm == "server" else "colocate",
        vllm_server_base_url=config.vllm_server if config.vllm == "server" else None,
        vllm_gpu_memory_utilization=config.vllm_memory,
        num_generations=config.generations,
        temperature=config.temperature,
        max_completion_length=config.max_completion_length or task.max_completion_length,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        shuffle_dataset=not in_turn,
        save_strategy="steps",
        save_steps=config.save_every or -(-steps // config.updates) * config.updates,
        save_total_limit=config.keep,
    )


class StepLines(TrainerCallback):
    """One line a step: step, time left, reward, entropy against target, knob."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.began = time.monotonic()
        self.first = 0
        self.reward: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "entropy/mean" not in logs:
            return
        self.reward = logs.get("reward", self.reward)  # TRL logs it once a generated batch
        done = max(state.global_step - self.first, 1)
        left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
        self.say(step_line(state.global_step, state.max_steps, left, {**logs, "reward": self.reward}))


def step_line(step: int, steps: int, seconds_left: float, row: dict[str, Any]) -> str:
    """The line of one step.

    Example:
        >>> step_line(7, 800, 61.0, {"entropy/mean": 0.91, "entropy/target": 1.0, "knob/value": 0.02, "reward": 0.5})
        'step   7/800  eta 1:01  reward 0.500  entropy 0.910 (target 1.000)  knob 0.02'
    """
    width = len(str(steps))
    parts = [f"step {step:{width}d}/{steps}", f"eta {int(seconds_left) // 60}:{int(seconds_left) % 60:02d}"]
    if row.get("reward") is not None:
        parts.append(f"reward {row['reward']:.3f}")
    target = row.get("entropy/target")
    against = f" (target {target:.3f})" if target is not None else ""
    parts.append(f"entropy {row['entropy/mean']:.3f}{against}")
    if row.get("knob/value") is not None:
        parts.append(f"knob {row['knob/value']:.3g}" + (" at its bound" if row.get("knob/saturated") else ""))
    return "  ".join(parts)


def summary(record: Record, seconds: float) -> dict[str, Any]:
    """The closing figures, from the run directory alone."""
    rows = record.rows("metrics")
    settled = [r for r in rows if r["step"] > SETTLED and r.get("entropy/target") is not None] or None
    tail = rows[-max(1, len(rows) // 10) :]
    bound = [row["knob/saturated"] for row in rows[SETTLED:] if row.get("knob/saturated") is not None]
    result: dict[str, Any] = {
        "steps": rows[-1]["step"],
        "seconds": round(seconds, 1),
        "samples": rows[-1]["samples/total"],
        "entropy/start": rows[0]["entropy/mean"],
        "entropy/target": rows[-1].get("entropy/target"),
        "entropy/end": sum(r["entropy/mean"] for r in tail) / len(tail),
        "entropy/mean": sum(r["entropy/mean"] for r in rows[SETTLED:] or rows) / len(rows[SETTLED:] or rows),
        "entropy/rms_error": None,
        "knob/saturated": sum(bound) / len(bound) if bound else None,
        "reward/start": rows[0]["reward/mean"],
        "reward/end": sum(r["reward/mean"] for r in tail) / len(tail),
    }
    if settled:
        pairs = [(r["entropy/mean"], r["entropy/target"]) for r in settled]
        result["entropy/rms_error"] = float(rms_relative_error(*map(list, zip(*pairs, strict=True))))
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in record.rows("evaluations"):
        scores = {key: value for key, value in row.items() if key == "distinct" or key.startswith("pass@")}
        by_task.setdefault(row["task"], []).append({"step": row["step"], **scores})
    if by_task:
        *others, last = by_task.values()
        result |= dict(zip(("start", "end"), [last[0], last[-1]] if len(last) > 1 else last, strict=False))
        # Of tasks before the last: at the start, at the switch, at the end.
        result |= {"before": dict(zip(by_task, others, strict=False))} if others else {}
    return result


def table(result: dict[str, Any], out: str) -> str:
    """The closing table as text."""

    def line(name: str, start: Any = None, target: Any = None, end: Any = None) -> tuple[str, ...]:
        return name, *("" if x is None else x if isinstance(x, str) else f"{x:.3f}" for x in (start, target, end))

    lines = [line("", "start", "target", "end")]
    lines.append(
        line("entropy (nats a token)", result["entropy/start"], result["entropy/target"], result["entropy/end"])
    )
    if result["entropy/rms_error"] is not None:
        lines.append(line(f"RMS entropy error after {SETTLED} steps", end=f"{result['entropy/rms_error']:.1%}"))
    if result["knob/saturated"]:
        lines.append(line("steps with the knob at its bound", end=f"{result['knob/saturated']:.0%}"))
    lines.append(line("reward (training prompts)", result["reward/start"], None, result["reward/end"]))
    before, after = result.get("start", {}), result.get("end", {})
    scores = [key for key in after if key.startswith("pass@")]
    for key in dict.fromkeys([*scores[:1], *scores[-1:]]):
        lines.append(line(f"{key} (held-out)", before.get(key), None, after[key]))
    if after:
        lines.append(line("distinct right answers (held-out)", before.get("distinct"), None, after["distinct"]))
    for name, row in result.get("before", {}).items():
        lines += [
            line(f"{key}, {name} (start, switch, end)", row[0][key], f"{row[len(row) // 2][key]:.3f}", row[-1][key])
            for key in (*scores[:1], "distinct")
        ]
    lines.append(line("seconds", end=f"{result['seconds']:.0f}"))
    width = max(len(row[0]) for row in lines)
    text = "\n".join(f"{a:{width}}  {b:>8}  {c:>8}  {d:>8}".rstrip() for a, b, c, d in lines)
    stopped = f"\n\nstopped early: {result['stopped']}" if result.get("stopped") else ""
    return f"\n{text}{stopped}\n\nrun directory: {out}"


def quiet() -> None:
    """Keep libraries' chatter off the terminal; warnings of ours stay."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import warnings

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.WARNING)
