"""The trainer: TRL's GRPOTrainer with the entropy of the policy monitored and, by its config, held.

Inside one micro-batch the current log-probs and entropies are seen once, by the native method that computes them. From
them the advantages are rewritten to ``[b t]`` and the clip bounds set before the native loss reads them; a penalty is
added after it; sums accumulate. At the optimizer step one reduction over ranks gives the reading, and every rank
updates the same controller.

With nothing under control and no shaping, training is bit-identical to TRL's.

An entropy that is not finite enters no term of the loss. A head whose entropies are broken may still return a gradient
that is not: a step with such an entropy, whose loss has a gradient through entropies or whole rows, trains nothing.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...recipes import Recipe, check
from ...recipes.apply import finite, per_token
from ...runs.record import CHECKPOINT_FILE, write_json
from ...runs.summary import closing_table
from ...runs.text import show
from ...types import EntropyReading, TokenBatch
from ..card import model_card
from ..groups import group_sums
from ..loop import ControlLoop, EntropyReadingError, off_policy_row, off_policy_sums, saved_in
from ..rewrite import CLIP_KNOBS, Rewritten
from .audit import StartAudit
from .callbacks import EntropyGuard, Opening, StopRequest, bound_of, print_six_figures
from .compat import GRPOConfig, GRPOTrainer, TrainerHooks, opens_batch
from .explain import Explainer, check_explain
from .generation import GeneratedBatches
from .head import WholeRows, install
from .log import RunLog, StepSums, by_turn, close_run, page_of, step_sums, trained
from .loss import add_terms, deselected, native_facts, native_ratio, rewrite_for_trl
from .settings import (
    adopt,
    boundary,
    check_context,
    check_switches,
    clip_settings,
    is_native,
    refuse_bypass,
    refuse_two_bonuses,
    resolve_recipe,
    round_save_steps,
    updates_per_batch,
    vocabulary_of,
)

logger = logging.getLogger("isentropic")


@dataclass
class EntropyControlConfig:
    """The fields that any GRPOConfig gains: ``class MyConfig(EntropyControlConfig, MyGRPOConfig)``.

    Attributes:
        recipe: a name of ``isentropic recipes``, ``FILE.py:NAME`` of your own, or a composed
            :class:`~isentropic.recipes.Recipe`; it sets loss_type, scale_rewards, importance_sampling_level and the
            clip bounds. None leaves TRL's settings as they are, and adds only the knob.
        knob, controller, target: what is turned, how, and to what; None is the recipe's own. ``controller="none"``
            only monitors. A controller and a target may be custom: a function, an object, or ``FILE.py:NAME``.
        recipe_options: any other field of a Recipe, or constant of its components, as a dict or a JSON string.
        samples_logged: completions written to samples.jsonl for each generated batch.
        explain_every: optimizer steps between predictions of the entropy change with their attribution; 0 never.
            None is every step if the moments of the rows cost little, else every tenth.
        head: ``auto`` scores tokens by the fused head of ``isentropic.entropy.kernels`` if that is faster and its kind
            is known; ``trl`` by TRL's own, whose training is reproduced bit for bit.
        audit: check for errors of precision and sampling when training starts; see :class:`~.audit.StartAudit`.
        stop_above: save and stop if entropy stays above its target times this factor; 0 never, None is 3 with a knob.
        report: write report.html when the run ends.
    """

    # HfArgumentParser reads a flag as the second type of a union: text.
    recipe: Recipe | str | None = field(default=None, metadata={"help": "Named algorithm; see `isentropic recipes`."})
    knob: str | None = field(default=None, metadata={"help": "What is turned; see `isentropic recipes`."})
    controller: Callable[..., Any] | str | None = field(
        default=None, metadata={"help": "pi, fixed, ...; none monitors."}
    )
    target: Callable[..., Any] | str | float | None = field(
        default=None, metadata={"help": "initial, 0.8, 80%, band:..."}
    )
    recipe_options: dict[str, Any] | str | None = field(default=None, metadata={"help": "Other fields of a Recipe."})
    samples_logged: int = field(default=2, metadata={"help": "Completions kept for each generated batch."})
    explain_every: int | None = field(default=None, metadata={"help": "Explain every so many steps; 0 never."})
    head: str = field(default="auto", metadata={"help": "auto: the fused head if it is faster; trl: TRL's own."})
    audit: bool = field(default=True, metadata={"help": "Audit precision and sampling when training starts."})
    stop_above: float | None = field(default=None, metadata={"help": "Stop above the target times this; 0 never."})
    report: bool = field(default=True, metadata={"help": "Write report.html when the run ends."})

    def __post_init__(self) -> None:
        self.take_settings(super().__post_init__)  # type: ignore[misc]

    def take_settings(self, native: Callable[[], None]) -> None:
        """Compose the recipe, and take over the fields that it sets.

        Args:
            native: checks the fields of TRL, and completes them.

        Raises:
            ValueError: settings that cannot work, or contradict one another.
        """
        self.entropy_recipe, owned = resolve_recipe(self)
        check_explain(self.explain_every, self.head)
        check_switches(self)
        adopt(self, owned)
        native()
        args: Any = self
        check(self.entropy_recipe, updates_per_batch(args), args.num_generations)
        round_save_steps(self)

    def __getstate__(self) -> dict[str, Any]:
        """Plain values, for training_args.bin: a custom function may not be picklable."""
        recipe = self.entropy_recipe.as_dict()
        texts = {
            name: recipe[name]
            for name in ("controller", "target")
            if not isinstance(getattr(self, name), str | int | float | None)
        }
        named = self.recipe if isinstance(self.recipe, str | None) else recipe
        return {**self.__dict__, **texts, "recipe": named, "recipe_options": None, "entropy_recipe": recipe}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for loggers: a recipe, and parts of your own, by their names."""
        plain = self.__getstate__()
        return super().to_dict() | {name: plain[name] for name in ("recipe", "controller", "target")}  # type: ignore[misc]

    def __copy__(self) -> Any:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


@dataclass
class IsentropicConfig(EntropyControlConfig, GRPOConfig):
    """TRL's GRPOConfig with entropy control; see :class:`EntropyControlConfig`."""


class MicroBatch:
    """The micro-batch whose loss is being computed.

    Attributes:
        inputs: what the native loss reads; a shallow copy, since TRL uses its own again in the next iteration.
        batch: with gradients, once the native loss has asked for log-probabilities.
        rewritten: what the native loss reads in place of its own.
        sums: what it adds to the optimizer step, but for its loss.
    """

    def __init__(self, inputs: dict[str, Any]):
        self.inputs = dict(inputs)
        self.batch: TokenBatch | None = None
        self.rewritten: Rewritten | None = None
        self.sums: StepSums | None = None


class EntropyControlMixin(TrainerHooks):
    """Entropy control for a GRPOTrainer subclass of your own: ``class Mine(EntropyControlMixin, MyTrainer)``.

    Its ``args`` must carry :class:`EntropyControlConfig`; with a plain GRPOConfig it only monitors, without an audit or
    a report. The run directory is ``args.output_dir``.

    Attributes:
        recipe: the algorithm, as composed.
        native: whether the loss is one of TRL's own.
        loop: the controller and its state.
        batches: what is generated.
        run_log: what is written.
        record: the run directory.
        explainer: what is predicted.
        guard: stops a run whose entropy explodes.
        say: called with each line that the run prints.
        closes: whether the run ends with :meth:`train`; if not, the caller closes the run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.take_control()

    def take_control(self) -> None:
        """Put the trainer under control after it is made.

        Raises:
            ValueError: a trainer that replaces the steps in which entropy is read.
        """
        if not hasattr(self.args, "entropy_recipe"):
            self.args.entropy_recipe, _ = resolve_recipe(self.args)
        self.recipe: Recipe = self.args.entropy_recipe
        refuse_two_bonuses(self.args, self.recipe)
        refuse_bypass(type(self), self.recipe)
        trainer: Any = self
        self.native = is_native(self.args, self.recipe)
        self.loop = ControlLoop(
            self.recipe, max(self.args.max_steps, 1), self._save_and_stop, vocabulary_of(self.model)
        )
        self.say: Callable[[str], None] = show
        self.closes = True
        self.batches, self.run_log = GeneratedBatches(trainer), RunLog(trainer)
        self.record = self.run_log.record
        fused = getattr(self.args, "head", "trl") == "auto" and install(self)
        self.explainer = Explainer(trainer, getattr(self.args, "explain_every", None), fused)
        self._rows = WholeRows(trainer) if "logp_rows" in self.recipe.reads else None
        self._micro_batch: MicroBatch | None = None
        self._stop = StopRequest()
        self._failure: str | None = None
        self._trains = True
        if self.args.mask_truncated_completions:
            self.loop.masked_by = (
                "mask_truncated_completions masks what max_completion_length cuts: raise the length, or leave it out"
            )
            logger.warning(
                "mask_truncated_completions: TRL does not score truncated completions, so entropy omits them"
            )
        self.add_callback(Opening(trainer))
        if getattr(self.args, "audit", False):
            self.add_callback(StartAudit(trainer))
        self.guard = EntropyGuard(trainer, bound_of(self.recipe, getattr(self.args, "stop_above", None)))
        self.add_callback(self.guard)
        print_six_figures(trainer)

    # Generation.

    def rewards_calculated(self, rewards: torch.Tensor, completion_ids: Any) -> torch.Tensor:
        return self.batches.rewarded(rewards, completion_ids)

    def generate_batch(self, native: Callable[[Any], dict[str, Any]], inputs: Any) -> dict[str, Any]:
        self.batches.rows = inputs
        if not self.model.training:
            return native(inputs)
        output = self.batches.generate(native, inputs)
        check_context(self.model, output["prompt_ids"].shape[1], int(self.args.max_completion_length))
        self.run_log.batch_generated(self.batches.num_unscored)
        return output

    # The loss.

    def score_tokens(self, native: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.batches.scoring:
            return self.batches.score(native, model, *args, **kwargs)
        micro_batch = self._micro_batch
        if micro_batch is None or micro_batch.batch is not None:
            return native(model, *args, **kwargs)
        with self.explainer.watching(model), self._rows.watching(model) if self._rows else nullcontext():
            scores = native(model, *args, **kwargs)
        logp, entropy, *more = scores
        self._observe(micro_batch, logp, entropy)
        return logp, finite(entropy), *more

    def _observe(self, micro_batch: MicroBatch, logp: torch.Tensor, entropy: torch.Tensor) -> None:
        """Count this micro-batch, and rewrite what the native loss is about to read."""
        inputs, trainer = micro_batch.inputs, self._as_trainer()
        mask = (
            inputs["completion_mask"] if "tool_mask" not in inputs else inputs["completion_mask"] * inputs["tool_mask"]
        )
        batch = TokenBatch(
            logp=logp.detach(),
            logp_old=inputs.get("old_per_token_logps"),
            adv=inputs["advantages"],
            mask=mask,
            entropy=entropy.detach(),
            entropy_old=inputs.get("old_entropies"),
            reward=inputs.get("rewards"),
            group_rate=inputs.get("group_rate"),
            group_reward=inputs.get("group_reward"),
            group_distinct=inputs.get("group_distinct"),
            group_repeats=inputs.get("group_repeats"),
        )
        rows = self._rows.take(logp.shape[1]) if self._rows else None
        ratio = native_ratio(trainer, batch)
        # A token whose entropy is broken is left unshaped (L = 0): a faulty head must not reach the weights.
        usable = torch.where(entropy.isfinite(), entropy.detach(), -batch.logp)
        still = batch._replace(entropy=usable, logp_rows=None if rows is None else rows.detach())
        rewritten = rewrite_for_trl(trainer, self.loop.recipe_now, still, ratio)
        micro_batch.batch = batch._replace(logp=logp, entropy=entropy, logp_rows=rows)
        micro_batch.rewritten = rewritten
        facts = rewritten.facts or native_facts(trainer, ratio, per_token(rewritten.adv, ratio))
        # Samples at another temperature say nothing of the policy's entropy.
        own = batch._replace(mask=mask * ~inputs["redrawn"][:, None]) if "redrawn" in inputs else batch
        off_policy = off_policy_sums(
            own,
            facts,
            self.state.global_step - self.batches.sampled_at,
            deselected(inputs, rewritten.factors, logp),
            inputs.get("sampling_per_token_logps"),
        )
        groups = group_sums(own, self.loop.take_held_out())
        micro_batch.sums = step_sums(trainer, own, facts, off_policy, groups, "tool_mask" in inputs, self._stop.made)
        if opens_batch(self):
            self.run_log.samples.keep(inputs, batch)
        if self.native and self.recipe.plain:
            return
        inputs["advantages"] = rewritten.advantages
        if rewritten.logp_old is not None:
            inputs["old_per_token_logps"] = rewritten.logp_old
        if self.explainer.due() and self.loop.state is not None:
            # The derivative by the knob is taken through the advantages.
            inputs["advantages"] = inputs["advantages"].detach().requires_grad_()

    def micro_batch_loss(self, native: Callable[..., torch.Tensor], model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if not self.model.training:
            return native(model, inputs)
        self._set_bounds()
        self._trains = True
        micro_batch = self._micro_batch = MicroBatch(inputs)
        try:
            loss = native(model, micro_batch.inputs)
            if micro_batch.batch is None or micro_batch.rewritten is None or micro_batch.sums is None:
                raise RuntimeError(
                    "the native loss never asked for log-probabilities; this trainer's loss cannot be wrapped"
                )
            recipe = self.loop.recipe_now
            loss, term = add_terms(self._as_trainer(), recipe, loss, micro_batch.batch, inputs)
            if self.explainer.due():
                self.explainer.add(loss, micro_batch.inputs, micro_batch.batch, micro_batch.rewritten, term)
        finally:
            # The entropies hold the graph: let it go with the loss.
            self._micro_batch = None
        sums = micro_batch.sums
        self.loop.observe(sums._replace(loss=sums.loss + loss.detach()))
        if self.accelerator.sync_gradients:
            self._end_step()
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not self._trains:
            # Zeros and not None, which a scaler of fp16 gradients refuses.
            self.model.zero_grad(set_to_none=False)
        return loss

    def _reads_entropies(self) -> bool:
        """Whether the loss has a gradient through entropies or whole rows."""
        recipe, args = self.loop.recipe_now, self.args
        return bool(recipe.entropy_coef or recipe.penalty != "none" or args.entropy_coef or args.use_adaptive_entropy)

    def _set_bounds(self) -> None:
        if self.loop.state is not None and self.recipe.knob in CLIP_KNOBS:
            bounds = clip_settings(self.loop.recipe_now)
            self.epsilon_low, self.epsilon_high = bounds["epsilon"], bounds["epsilon_high"]

    def _as_trainer(self) -> Any:
        """This trainer, as :class:`~isentropic.engines.trl.compat.Trainer` has it."""
        return self

    # The optimizer step.

    def _end_step(self) -> None:
        sums: StepSums = self.loop.reduced(lambda vector: self.accelerator.reduce(vector, reduction="sum"))
        tokens = sums.of_tokens
        step = self.state.global_step + 1
        at_boundary = step % boundary(self.args) == 0
        rate = self.optimizer.param_groups[0]["lr"] if self.optimizer is not None else 0.0
        reading = EntropyReading(tokens.entropy, tokens.tokens, "exact", float(self.temperature), rate=rate)
        reading = reading._replace(groups=sums.of_groups)
        self._trains = math.isfinite(reading.sum) or not self._reads_entropies()
        before = self.loop.state
        explained = self.explainer.close(rate)
        # What is drawn next is in no prediction of this step: a controller of `redraw` learns from readings alone.
        if explained and self.recipe.knob != "redraw":
            predicted, gain = explained["predict/change"], explained["predict/gain"]
            reading = reading._replace(predicted=predicted, gain=gain, steps=1)
        self.loop.regulate(reading, at_boundary)
        row = self.loop.row(tokens, reading, before) | off_policy_row(tokens, sums.off_policy)
        row |= {"redraw/frac": self.batches.redrawn} if self.recipe.redraws else {}
        row |= explained | by_turn(sums.turn_entropy, sums.turn_tokens)
        if sums.compared:
            row["theorem2/violated_frac"] = sums.violated / sums.compared
        self.run_log.step_done(step, row, sums.loss, self.batches.num_generated)
        if sums.stop and at_boundary:
            logger.warning("stopping after optimizer step %s with a checkpoint, as asked", step)
            self.control.should_save = self.control.should_training_stop = True

    def _save_and_stop(self, reason: str) -> None:
        """Save and stop after this step; :meth:`train` raises the reason once the checkpoint is written."""
        self._failure = reason
        self.control.should_save = self.control.should_training_stop = True

    # The run directory.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.run_log.logged(logs)
        super().log(logs, start_time)

    def before_checkpoint(self) -> None:
        self.run_log.flush()

    def after_checkpoint(self, folder: Path) -> None:
        state = {"step": self.state.global_step, **self.loop.as_dict(), "generated": self.batches.num_generated}
        write_json(folder / CHECKPOINT_FILE, state)

    def checkpoint_loaded(self, folder: str) -> None:
        state = saved_in(folder)
        if state is None:
            return
        self.batches.num_generated = state["generated"]
        if self.accelerator.is_main_process:
            self.record.rewind(state["step"])
        self.loop.restore(state)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, but the first Ctrl-C or SIGTERM saves at the end of the generated batch, then stops.

        A run that was not stopped is closed: its table is printed, and its summary and its report are written.

        Raises:
            EntropyReadingError: ten readings in a row were refused; a checkpoint was saved.
        """
        self._failure = None
        with self._stop.listening():
            result = super().train(*args, **kwargs)
        self.run_log.flush()
        if self._failure:
            raise EntropyReadingError(self._failure)
        if self.closes and self.accelerator.is_main_process:
            self._close()
        return result

    def _close(self) -> None:
        done, steps = self.state.global_step, self.state.max_steps
        if self._stop.made and done < steps:
            self.say(f"stopped at step {done}/{steps}; continue by trainer.train(resume_from_checkpoint=True)")
            return
        page = page_of if getattr(self.args, "report", False) else None
        figures = close_run(self.record, self.run_log.seconds, self.guard.message, self.say, page)
        self.renew_card()
        self.say(closing_table(figures, str(self.record.path)))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write README.md: what was trained, by which recipe to which target, with what result."""
        if not self.is_world_process_zero():
            return
        more = [tags] if isinstance(tags, str) else list(tags or ())
        facts = trained(self._as_trainer(), model_name, dataset_name, [*self._tag_names, *more])
        self.record.path.mkdir(parents=True, exist_ok=True)
        (self.record.path / "README.md").write_text(model_card(facts), encoding="utf-8")

    def renew_card(self) -> None:
        """Write README.md again, if a checkpoint has brought one."""
        if (self.record.path / "README.md").is_file():
            self.create_model_card()


class IsentropicTrainer(EntropyControlMixin, GRPOTrainer):
    """TRL's GRPOTrainer with the entropy of the policy monitored and, by its config, held.

    Example::

        args = IsentropicConfig(recipe="repo-r-loop", target="80%", steps_per_generation=4, output_dir="run")
        IsentropicTrainer(model, reward, args=args, train_dataset=dataset).train()
    """
