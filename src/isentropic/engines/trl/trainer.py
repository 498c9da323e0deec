"""Entropy control inside TRL's GRPOTrainer: the native loss is wrapped, never copied.

Inside one micro-batch the current log-probs and entropies are seen once, by the native method that computes them. From
them the advantages are rewritten to ``[b t]`` and the clip bounds set before the native loss reads them; a penalty is
added after it; (sum, count) pairs accumulate. At the optimizer step one reduction over ranks gives the reading, and
every rank updates the same controller.

With nothing under control and no shaping, training is bit-identical to TRL's.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ...control.thermostat import to_json
from ...losses.advantages import overlong_penalty
from ...recipes.compose import Recipe, build_thermostat, check, with_knob
from ...recipes.terms import wide
from ...runs.record import CHECKPOINT_FILE, Record, write_json
from ...types import EntropyReading, TokenBatch
from ..loop import MAX_REFUSED, EntropyReadingError, restored, row_of, saved_in
from ..rewrite import Handed, add_terms, hand
from .explain import Explainer, check_explain
from .head import install
from .rows import FROM_TRL, SUMS, TURN_SUMS, by_turn, native_facts, native_ratio, sums_of, turn_sums
from .samples import Samples
from .sampling import local_advantages, resample
from .settings import (
    adopt,
    boundary,
    clip_settings,
    is_native,
    resolve_recipe,
    round_save_steps,
    updates_per_batch,
    write_header,
)
from .signals import stop_signals
from .vocabulary import Rows

SUPPORTED = (1, 16)


def _require_trl() -> None:
    try:
        got = version("trl")
    except PackageNotFoundError:
        raise ImportError(
            "isentropic.engines.trl needs trl, which is not installed; pip install 'isentropic[trl]'"
        ) from None
    if tuple(int(part) for part in got.split(".")[:2]) != SUPPORTED:
        raise ImportError(
            f"isentropic.engines.trl wraps private methods of trl {SUPPORTED[0]}.{SUPPORTED[1]}, got trl {got}; "
            "pip install 'isentropic[trl]' brings the supported one"
        )


_require_trl()

from trl import GRPOConfig, GRPOTrainer  # noqa: E402  (after the version check, whose message is the better one)

logger = logging.getLogger("isentropic")


@dataclass
class EntropyControlConfig:
    """The fields that any GRPOConfig gains: ``class MyConfig(EntropyControlConfig, MyGRPOConfig)``.

    Attributes:
        recipe: a name of ``isentropic recipes``; it sets loss_type, scale_rewards, importance_sampling_level and the
            clip bounds. None leaves TRL's settings as they are, and adds only the knob.
        knob, controller, target: what is turned, how, and to what; None is the recipe's own. ``controller="none"``
            only monitors.
        recipe_options: any other field of :class:`isentropic.Recipe`, as a dict or a JSON string.
        samples_logged: completions written to samples.jsonl for each generated batch.
        explain_every: optimizer steps between two whose predicted entropy change is computed and attributed; 0 never.
            None is every step where the moments of the rows cost little, else every tenth.
        head: ``auto`` scores tokens by the fused head of ``isentropic.entropy.kernels`` where that is faster and its kind is
            known; ``trl`` by TRL's own, whose training is reproduced bit for bit.
    """

    recipe: str | None = field(default=None, metadata={"help": "Named algorithm; see `isentropic recipes`."})
    knob: str | None = field(default=None, metadata={"help": "What is turned; see `isentropic recipes`."})
    controller: str | None = field(default=None, metadata={"help": "none, fixed, double_halve, pi, ..."})
    target: str | None = field(default=None, metadata={"help": "initial, 0.8, 80%, anneal:..., band:..."})
    recipe_options: dict[str, Any] | str | None = field(default=None, metadata={"help": "Other fields of a Recipe."})
    samples_logged: int = field(default=2, metadata={"help": "Completions kept for each generated batch."})
    explain_every: int | None = field(default=None, metadata={"help": "Steps between explained ones; 0 is never."})
    head: str = field(default="auto", metadata={"help": "auto: the fused head where it is faster; trl: TRL's own."})

    def __post_init__(self) -> None:
        self.entropy_recipe, owned = resolve_recipe(self)
        check_explain(self.entropy_recipe, self.explain_every, self.head)
        adopt(self, owned)
        super().__post_init__()  # type: ignore[misc]
        check(self.entropy_recipe, updates_per_batch(self))
        round_save_steps(self)


@dataclass
class IsentropicConfig(EntropyControlConfig, GRPOConfig):
    """TRL's GRPOConfig with entropy control; see :class:`EntropyControlConfig`."""


class _Length(TrainerCallback):
    """A target that goes over the whole run is told its length as training begins: by epochs it is known no sooner."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.thermostat = build_thermostat(self.trainer.recipe, state.max_steps)


# To a type checker the mixin is a GRPOTrainer; at run time it stands before one.
_Trainer = GRPOTrainer if TYPE_CHECKING else object


class EntropyControlMixin(_Trainer):
    """Entropy control for a GRPOTrainer subclass of your own: ``class Mine(EntropyControlMixin, MyTrainer)``.

    Its ``args`` must carry :class:`EntropyControlConfig`; with a plain GRPOConfig it only monitors. The run directory
    is ``args.output_dir``.
    """

    _tag_names = ["trl", "grpo", "isentropic"]  # noqa: RUF012  (TRL's convention)
    args: Any
    model: Any
    processing_class: Any
    control_state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self.args, "entropy_recipe"):
            self.args.entropy_recipe, _ = resolve_recipe(self.args)
        self.recipe: Recipe = self.args.entropy_recipe
        self.thermostat = build_thermostat(self.recipe, max(self.args.max_steps, 1))
        self.add_callback(_Length(self))
        self.control_state = self.thermostat.init() if self.thermostat else None
        self.record = Record(self.args.output_dir)
        self._boundary = boundary(self.args)
        self.samples = Samples(getattr(self.args, "samples_logged", 0))
        fused = getattr(self.args, "head", "trl") == "auto" and install(self)
        self.explainer = Explainer(self, getattr(self.args, "explain_every", None), fused)
        self._live: dict[str, Any] | None = None
        self.native = is_native(self.args, self.recipe)
        self._rows = Rows(self) if self.recipe.needs_rows else None
        # The batch that the loss under way is computed from, with gradients, and what it was handed.
        self._seen: tuple[TokenBatch, Handed] | None = None
        # The rows of the batch that is being generated: TRL gives a rollout_func their prompts alone.
        self.rollout_rows: list[dict[str, Any]] | None = None
        self._scored: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._window: torch.Tensor | None = None
        self._rewards: torch.Tensor | None = None
        self._row: dict[str, Any] | None = None
        self._batch_facts: dict[str, float] = {}
        self._refused = self._generated = 0
        self._stop_requested = False
        self._failure: str | None = None
        self._began = time.monotonic()
        if self.args.mask_truncated_completions:
            logger.warning(
                "mask_truncated_completions: TRL does not score truncated completions, so entropy omits them"
            )
        self._refuse_two_bonuses()

    def _refuse_two_bonuses(self) -> None:
        if self.recipe.knob == "entropy_coef" and (self.args.use_adaptive_entropy or self.args.entropy_coef):
            raise ValueError(
                "knob entropy_coef and TRL's own entropy bonus are both on, and would add up; "
                "leave use_adaptive_entropy and entropy_coef out of the config"
            )

    # Generation: baselines that TRL does not have, and dynamic sampling.

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1)
        rewards[torch.isnan(per_function).all(dim=1)] = torch.nan
        if self.recipe.overlong_buffer:
            lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=rewards.device)
            limit, buffer = int(self.args.max_completion_length), self.recipe.overlong_buffer
            rewards = rewards + overlong_penalty(self.accelerator.gather(lengths), limit, buffer)
        self._rewards = rewards
        return per_function

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.rollout_rows = inputs
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        output = local_advantages(self, self._roll_out(inputs))
        if self.recipe.dynamic_sampling:
            output = resample(self, inputs, output, self._roll_out)
        self._generated += len(inputs) * self.accelerator.num_processes
        seen = self._metrics["train"]
        self._batch_facts = {ours: seen[name][-1] for name, ours in FROM_TRL.items() if seen.get(name)}
        self.samples.clear()
        return output

    def _roll_out(self, inputs: Any) -> dict[str, Any]:
        """TRL's generation, with the entropies that its pass for the old log-probs computes and drops."""
        self._scored, self.rollout_rows = [], inputs
        try:
            output = super()._generate_and_score_completions(inputs)
            old = output.get("old_per_token_logps")
            for logp, entropy in self._scored:
                if logp is old:
                    output["old_entropies"] = entropy
        finally:
            self._scored = None
        return output

    # The loss.

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        if self._scored is not None:
            out = super()._get_per_token_logps_and_entropies(*args, **{**kwargs, "compute_entropy": True})
            self._scored.append((out[0], out[1]))
            return out
        if self._live is None or self._seen is not None:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.explainer.watching(args[0]), self._rows.watching(args[0]) if self._rows else nullcontext():
            out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._observe(self._live, out[0], out[1])
        return out

    def _observe(self, inputs: dict[str, Any], logp: torch.Tensor, entropy: torch.Tensor) -> None:
        """Count this micro-batch, and rewrite what the native loss is about to read."""
        mask = (
            inputs["completion_mask"] if "tool_mask" not in inputs else inputs["completion_mask"] * inputs["tool_mask"]
        )
        batch = TokenBatch(
            logp.detach(),
            inputs.get("old_per_token_logps"),
            inputs["advantages"],
            mask,
            entropy.detach(),
            inputs.get("old_entropies"),
        )
        rows = self._rows.take(logp.shape[1]) if self._rows else None
        ratio = native_ratio(self, batch)
        # A token whose entropy is broken is left unshaped (L = 0): a faulty head must not reach the weights.
        usable = torch.where(entropy.isfinite(), entropy.detach(), -batch.logp)
        handed = hand(self._recipe_now(), batch._replace(entropy=usable), ratio, self.native)
        self._seen = (batch._replace(logp=logp, entropy=entropy, logp_rows=rows), handed)
        facts = handed.facts or native_facts(self, ratio, wide(batch.adv, ratio))
        sums = torch.cat([sums_of(self, batch, facts, self.native), turn_sums(batch, "tool_mask" in inputs)])
        self._window = sums if self._window is None else self._window + sums
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            self.samples.keep(inputs, batch, entropy.detach())
        if self.native and self.recipe.plain:
            return
        inputs["advantages"] = handed.given
        if handed.logp_old is not None:
            inputs["old_per_token_logps"] = handed.logp_old
        if self.explainer.due() and self.control_state is not None:
            # The derivative by the knob goes through the advantages.
            inputs["advantages"] = inputs["advantages"].detach().requires_grad_()

    def _recipe_now(self) -> Recipe:
        """The recipe with its knob as it stands."""
        return with_knob(self.recipe, self.control_state.value if self.control_state else None)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        self._set_bounds()
        # A shallow copy: the dict is a slice of the generation buffer and comes back in the next iteration.
        self._live, self._seen = dict(inputs), None
        try:
            loss = super()._compute_loss(model, self._live)
            if self._seen is not None:
                batch, handed = self._seen
                loss, term = add_terms(self, self._recipe_now(), loss, batch, inputs)
                if self.explainer.due():
                    self.explainer.add(loss, self._live, batch, handed, term)
        finally:
            # The entropies hold the graph: let it go with the loss.
            self._live = self._seen = None
        if self._window is None:
            raise RuntimeError(
                "the native loss never asked for log-probabilities; this trainer's loss cannot be wrapped"
            )
        self._window[SUMS.index("loss")] += loss.detach()
        if self.accelerator.sync_gradients:
            self._close_window()
        return loss

    def _set_bounds(self) -> None:
        if self.control_state is None or self.recipe.knob not in ("clip_low", "clip_high"):
            return
        bounds = clip_settings(self._recipe_now())
        self.epsilon_low, self.epsilon_high = bounds["epsilon"], bounds["epsilon_high"]

    # The optimizer step.

    def _close_window(self) -> None:
        totals: dict[str, float] = dict(
            zip(SUMS + TURN_SUMS, self.accelerator.reduce(self._window, reduction="sum").tolist(), strict=True)
        )
        self._window = None
        step = self.state.global_step + 1
        at_boundary = step % self._boundary == 0
        reading = EntropyReading(totals["entropy"], totals["tokens"], "exact", float(self.temperature))
        before = self.control_state
        explained = self.explainer.close(self._rate())
        if explained:
            predicted, gain = explained["predict/change"], explained["predict/gain"]
            reading = reading._replace(predicted=predicted, gain=gain, steps=1)
        self._regulate(reading, at_boundary)
        self._report(step, totals, reading, before, explained)
        if totals["stop"] and at_boundary:
            logger.warning("stopping after optimizer step %s with a checkpoint, as asked", step)
            self._save_and_stop()

    def _rate(self) -> float:
        """The learning rate of the step under way."""
        return self.optimizer.param_groups[0]["lr"] if self.optimizer is not None else 0.0

    def _regulate(self, reading: EntropyReading, at_boundary: bool) -> None:
        problem = reading.problem()
        self._refused = self._refused + 1 if problem else 0
        if self.thermostat is None:
            if problem and self._refused == 1:
                logger.warning("entropy reading refused: %s", problem)
            return
        if problem and self.control_state.target.readings == 0 and self.control_state.refused == 0:
            raise ValueError(f"the first entropy reading is refused: {problem}; nothing was trained on it")
        self.control_state = self.thermostat.update(self.control_state, reading, act=at_boundary)
        if problem:
            logger.warning("entropy reading refused (%s in a row), the knob is held: %s", self._refused, problem)
            if self._refused >= MAX_REFUSED:
                self._failure = f"{self._refused} entropy readings in a row were refused: {problem}"
                self._save_and_stop()

    def _save_and_stop(self) -> None:
        self.control.should_save = self.control.should_training_stop = True

    def _report(
        self, step: int, totals: dict[str, float], reading: EntropyReading, before: Any, explained: dict[str, Any]
    ) -> None:
        controlled = (self.recipe, self.thermostat, before, self.control_state)
        row = row_of(totals, reading, self._refused, *controlled) | explained | by_turn(totals)
        if totals["compared"]:
            row["theorem2/violated_frac"] = totals["violated"] / totals["compared"]
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._metrics["train"][name].append(value)
        self._flush()
        self._row = {
            "step": step,
            "seconds": round(time.monotonic() - self._began, 3),
            **row,
            "loss": totals["loss"] / self.accelerator.num_processes,
            "samples/total": self._generated,
            **self._batch_facts,
        }
        if self.accelerator.is_main_process:
            self.record.append("samples", *self.samples.rows(step, self.processing_class.decode))

    # The run directory.

    def _flush(self) -> None:
        if self._row is not None and self.accelerator.is_main_process:
            self.record.append("metrics", self._row)
        self._row = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._row is not None and "grad_norm" in logs and self.state.global_step == self._row["step"]:
            self._row |= {name: float(logs[name]) for name in ("grad_norm", "learning_rate") if name in logs}
            self._flush()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._flush()
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            state = to_json(self.control_state) if self.control_state else None
            saved = {"step": self.state.global_step, "recipe": asdict(self.recipe), "state": state}
            write_json(folder / CHECKPOINT_FILE, {**saved, "generated": self._generated})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        saved = saved_in(checkpoint)
        if saved is None:
            return
        self._generated = saved["generated"]
        if self.accelerator.is_main_process:
            self.record.rewind(saved["step"])
        if self.thermostat is not None:
            self.control_state = restored(saved, self.recipe, self.thermostat)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, but the first Ctrl-C or SIGTERM saves at the end of the generated batch, then stops.

        Raises:
            EntropyReadingError: ten readings in a row were refused; a checkpoint was saved.
        """
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        self._began, self._failure, self._stop_requested = time.monotonic(), None, False
        write_header(self)
        with stop_signals(self):
            result = super().train(*args, **kwargs)
        self._flush()
        if self._failure:
            raise EntropyReadingError(self._failure)
        return result


class IsentropicTrainer(EntropyControlMixin, GRPOTrainer):
    """TRL's GRPOTrainer with the entropy of the policy monitored and, by its config, held.

    Example::

        args = IsentropicConfig(recipe="repo-r-loop", target="80%", steps_per_generation=4, output_dir="run")
        IsentropicTrainer(model, reward, args=args, train_dataset=dataset).train()
    """

    _name = "isentropic"
