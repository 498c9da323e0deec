"""What the trainer writes into the run directory: a row for each optimizer step, and a few completions of a batch.

At the end a run is closed: its summary says that it has ended, and the report shows it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...entropy.prediction import bound_violations
from ...losses.reduce import sum_dtype
from ...recipes import Recipe
from ...runs.record import Record, write_json
from ...runs.summary import summary
from ...types import GroupFacts, TokenBatch, TokenFacts
from ..card import Trained
from ..loop import OffPolicySums, TokenSums, token_sums
from .compat import Trainer, metrics, model_id
from .settings import recipe_name

# The figures that a row carries from the latest generated batch, by TRL's names.
FROM_TRL = {
    "reward": "reward/mean",
    "reward_std": "reward/std",
    "frac_reward_zero_std": "reward/zero_std_frac",
    "completions/mean_length": "length/mean",
    "completions/clipped_ratio": "length/truncated_frac",
    # Of episodes with an environment, by the names that rollout.py gives them.
    **{f"episode/{name}": f"episode/{name}" for name in ("win_frac", "return", "turns", "calls", "truncated_frac")},
}
TURNS = 8  # the last of them holds all that come after it
# What `datasets` calls a data set that was made from files or in the script.
_UNNAMED = ("json", "csv", "parquet", "arrow", "text", "pandas", "generator", "default")
_SAMPLED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "rewards", "redrawn")


class StepSums(NamedTuple):
    """The sums of an optimizer step in TRL.

    Attributes:
        of_tokens, off_policy: over the tokens.
        of_groups: what is known of the groups.
        violated, compared: rows whose entropy left Theorem 2's bounds, and rows that were compared.
        loss: Σ of the micro-batches' losses.
        stop: processes that were asked to stop.
        turn_entropy, turn_tokens: ``[TURNS]`` Σ H and tokens by turn.
    """

    of_tokens: TokenSums
    off_policy: OffPolicySums
    of_groups: GroupFacts
    violated: Any
    compared: Any
    loss: Any
    stop: Any
    turn_entropy: Any
    turn_tokens: Any


def step_sums(
    trainer: Trainer,
    batch: TokenBatch,
    facts: TokenFacts,
    off_policy: OffPolicySums,
    of_groups: GroupFacts,
    has_turns: bool,
    stop: bool,
) -> StepSums:
    """What a micro-batch adds to its optimizer step, but for its loss, without a synchronisation."""
    assert batch.entropy is not None
    of_tokens, kind = token_sums(batch, facts), sum_dtype(batch.logp.device)
    zero = torch.zeros((), dtype=kind, device=batch.logp.device)
    violated = compared = zero
    if batch.entropy_old is not None and trainer.native and trainer.recipe.objective == "clipped":
        low, high = trainer.epsilon_low, trainer.epsilon_high
        pair = bound_violations(batch.entropy, batch.entropy_old, batch.mask, low, high)
        violated, compared = (x.to(kind) for x in pair)
    entropy, tokens = turn_sums(batch) if has_turns else (zero.new_zeros(TURNS), zero.new_zeros(TURNS))
    return StepSums(of_tokens, off_policy, of_groups, violated, compared, zero, zero + float(stop), entropy, tokens)


def turn_sums(batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and tokens by turn, ``[TURNS]`` each: a turn is a run of tokens that the policy wrote."""
    assert batch.entropy is not None
    kind = sum_dtype(batch.logp.device)
    inside = batch.mask.bool()
    begins = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    turn = (begins.cumsum(1) - 1).clamp(0, TURNS - 1)
    of_turn = torch.nn.functional.one_hot(turn, TURNS).to(kind) * inside[..., None]
    entropy = torch.where(inside, batch.entropy, 0.0).to(kind)
    return (of_turn * entropy[..., None]).sum((0, 1)), of_turn.sum((0, 1))


def by_turn(entropy: list[float], tokens: list[float]) -> dict[str, float]:
    """``entropy/turn_1`` and on, as far as there were turns; nothing if a completion is one turn.

    Example:
        >>> by_turn([3.0, 0.0], [2.0, 0.0])
        {'entropy/turn_1': 1.5}
    """
    pairs = enumerate(zip(entropy, tokens, strict=True), start=1)
    return {f"entropy/turn_{i}": total / count for i, (total, count) in pairs if count}


class Samples:
    """Up to ``wanted`` completions of the latest generated batch, on the device until they are written."""

    def __init__(self, wanted: int):
        self.wanted = wanted
        self.kept: list[dict[str, torch.Tensor]] = []
        self.written = False

    def clear(self) -> None:
        """A new batch was generated."""
        self.kept, self.written = [], False

    def keep(self, inputs: dict[str, Any], batch: TokenBatch) -> None:
        """Copy the first rows of a micro-batch, while some are wanted."""
        rows = slice(0, self.wanted - len(self.kept))
        if rows.stop <= 0:
            return
        assert batch.entropy is not None
        kept = {name: inputs[name][rows].detach().clone() for name in _SAMPLED if name in inputs}
        kept |= {"logp": batch.logp[rows], "entropy": batch.entropy[rows], "mask": batch.mask[rows]}
        self.kept += [{name: value[i] for name, value in kept.items()} for i in range(len(kept["mask"]))]

    def rows(self, step: int, decode: Callable[..., str]) -> list[dict[str, Any]]:
        """Rows of samples.jsonl, once for each batch."""
        if self.written:
            return []
        self.written = bool(self.kept)
        return [_sample_row(sample, step, decode) for sample in self.kept]


def _sample_row(sample: dict[str, torch.Tensor], step: int, decode: Callable[..., str]) -> dict[str, Any]:
    keep = sample["mask"].bool()
    ids = sample["completion_ids"][keep].tolist()
    # The environment's words belong to the text, but have no surprisal.
    completion = sample["completion_ids"][sample["completion_mask"].bool()].tolist()
    prompt = sample["prompt_ids"][sample["prompt_mask"].bool()].tolist()
    return {
        "step": step,
        "prompt": decode(prompt, skip_special_tokens=True),
        "completion": decode(completion, skip_special_tokens=True),
        "reward": sample["rewards"].item() if "rewards" in sample else None,
        "advantage": sample["advantages"].mean().item(),
        **({"redrawn": sample["redrawn"].item()} if "redrawn" in sample else {}),
        "tokens": [decode([i]) for i in ids],
        "surprisal": [round(-x, 4) for x in sample["logp"][keep].tolist()],
        "entropy": [round(x, 4) for x in sample["entropy"][keep].tolist()],
    }


def model_of(trainer: Trainer) -> str:
    """The name of the model: its hub id, its directory, or its class if it was made in the script."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model_id(base) or type(base).__name__


def task_of(trainer: Trainer) -> str:
    """The name of the task: of the data set, if it has one, and of what gives the rewards."""
    owners = [getattr(getattr(f, "__self__", None), "name", None) for f in trainer.reward_funcs]
    rewards = [
        owner if isinstance(owner, str) else name for owner, name in zip(owners, trainer.reward_func_names, strict=True)
    ]
    data = getattr(getattr(trainer.train_dataset, "info", None), "dataset_name", None)
    named = [data] if data and data not in _UNNAMED else []
    return ": ".join([*named, ", ".join(dict.fromkeys(rewards))]) if rewards else data or "a task"


def recipe_of(trainer: Trainer) -> str:
    """The name of the recipe as it was asked for, else its formula."""
    asked, record = getattr(trainer.args, "recipe", None), trainer.run_log.record
    if isinstance(asked, Recipe) and record.begun():
        # A run of `isentropic train` has composed the recipe that its header names.
        named = (record.header().get("config") or {}).get("recipe")
        return named if isinstance(named, str) else asked.formula
    return recipe_name(asked or trainer.recipe)


def trained(trainer: Trainer, name: str | None, dataset: str | None, tags: list[str]) -> Trained:
    """What the card of a trainer's model says: of a run that has ended, or of the run so far.

    Args:
        trainer: the trainer.
        name: of the model; None takes the hub's, or the directory's.
        dataset: hub id of the data set, if it is known.
        tags: of the model.
    """
    args, record = trainer.args, trainer.run_log.record
    header = record.header() if record.begun() else {}
    ended = record.path / "summary.json"
    if ended.is_file():
        figures = json.loads(ended.read_text(encoding="utf-8"))
    else:
        figures = summary(record.rows("metrics"), record.rows("evaluations"), trainer.run_log.seconds)
    hub, saved = args.hub_model_id, record.checkpoints()
    whole = any((record.path / f"{kind}.json").is_file() for kind in ("config", "adapter_config"))
    last = saved[-1][1] if saved else record.path / f"checkpoint-{trainer.state.global_step}"
    return Trained(
        name or (hub or record.path.name).split("/")[-1],
        header.get("model") or model_of(trainer),
        hub or str(record.path if whole else last),
        header.get("task") or task_of(trainer),
        recipe_of(trainer),
        trainer.recipe,
        figures,
        float(trainer.temperature),
        getattr(trainer.processing_class, "chat_template", None) is not None,
        tags,
        dataset,
    )


def closing_figures(record: Record, seconds: float, stopped: str | None) -> dict[str, Any]:
    """The summary of a run: its closing figures, and why it ended itself early, if it did.

    Args:
        record: the run directory.
        seconds: that the run took.
        stopped: the reason, or None.
    """
    figures = summary(record.rows("metrics"), record.rows("evaluations"), seconds)
    return figures if stopped is None else {**figures, "stopped": stopped}


def close_run(
    record: Record,
    seconds: float,
    stopped: str | None,
    say: Callable[[str], None],
    write_report: Callable[[Record], Path] | None,
) -> dict[str, Any]:
    """End a run: write its summary, then its report; returns the summary.

    Args:
        record: the run directory.
        seconds: that the run took.
        stopped: why the run ended itself early, if it did.
        say: called with a line on the report.
        write_report: writes a page and returns its path; an error in it does not fail the run.
    """
    figures = closing_figures(record, seconds, stopped)
    write_json(record.path / "summary.json", figures)
    if write_report is not None:
        try:
            say(f"report: {write_report(record)}")
        except Exception as error:
            say(f"no report: {error}")
    return figures


def page_of(record: Record) -> Path:
    """Write the report of a run into its directory."""
    from ...report import write

    return write([record.path], record.path / "report.html")


class RunLog:
    """The run directory of a trainer: the row of the latest optimizer step waits here for TRL's gradient norm.

    Attributes:
        record: the directory.
        row: of the latest step, until it is written.
        of_batch: what every row carries from the latest generated batch.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.record = Record(trainer.args.output_dir)
        self.samples = Samples(getattr(trainer.args, "samples_logged", 0))
        self.row: dict[str, Any] | None = None
        self.of_batch: dict[str, Any] = {}
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since training began in this process."""
        return time.monotonic() - self._began

    def begin(self, steps: int) -> None:
        """Training begins: write run.json, with the changed settings and the recipe, unless the run is resumed.

        Args:
            steps: optimizer steps of the whole run.
        """
        self._began = time.monotonic()
        trainer, args, record = self.trainer, self.trainer.args, self.record
        record.path.mkdir(parents=True, exist_ok=True)
        if not trainer.accelerator.is_main_process:
            return
        # A run that is resumed has not ended any more.
        (record.path / "summary.json").unlink(missing_ok=True)
        if record.begun():
            return
        private = ("output_dir", "run_name", "logging_dir", "seed", "recipe")
        default = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(args) if f.init
        }
        changed = {
            name: getattr(args, name)
            for name, value in default.items()
            if name not in private and "token" not in name and getattr(args, name) != value
        }
        recipe = getattr(args, "recipe", None)
        name = recipe if isinstance(recipe, str) else args.loss_type if recipe is None else recipe.formula
        known = {"steps": steps, "recipe": name, "out": args.output_dir}
        about = {"task": task_of(trainer), "model": model_of(trainer)}
        record.start({**changed, **known}, trainer.recipe.as_dict(), args.seed, **about)

    def batch_generated(self, num_unscored: int = 0) -> None:
        """Take the figures that TRL logs of a generated batch, and the number of completions without a reward."""
        logged = metrics(self.trainer)
        self.of_batch = {ours: logged[name][-1] for name, ours in FROM_TRL.items() if logged.get(name)}
        if num_unscored:
            self.of_batch["reward/unscored"] = num_unscored
        self.samples.clear()

    def step_done(self, step: int, row: dict[str, Any], loss: float, generated: int) -> None:
        """Log the row of an optimizer step, and keep it for metrics.jsonl until TRL's gradient norm is there."""
        trainer = self.trainer
        seen = metrics(trainer)
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                seen[name].append(value)
        self.flush()
        self.row = {
            "step": step,
            "seconds": round(self.seconds, 3),
            **row,
            "loss": loss / trainer.accelerator.num_processes,
            "samples/total": generated,
            **self.of_batch,
        }
        if trainer.accelerator.is_main_process:
            self.record.append("samples", *self.samples.rows(step, trainer.processing_class.decode))

    def logged(self, logs: dict[str, float]) -> None:
        """TRL logs: complete the waiting row, and write it."""
        if self.row is not None and "grad_norm" in logs and self.trainer.state.global_step == self.row["step"]:
            self.row |= {name: float(logs[name]) for name in ("grad_norm", "learning_rate") if name in logs}
            self.flush()

    def flush(self) -> None:
        """Write the waiting row."""
        if self.row is not None and self.trainer.accelerator.is_main_process:
            self.record.append("metrics", self.row)
        self.row = None
