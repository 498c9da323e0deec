"""Entropy control of one verl worker: verl's loss on rewritten advantages, the sums of a step, and its end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...losses.reduce import sum_dtype
from ...recipes import Recipe
from ...recipes.apply import finite, per_token, token_weights
from ...runs.record import CHECKPOINT_FILE, Record, write_json
from ...types import EntropyReading, GroupFacts, TokenBatch
from ..groups import group_sums
from ..loop import (
    ControlLoop,
    EntropyReadingError,
    OffPolicySums,
    TokenSums,
    off_policy_row,
    off_policy_sums,
    saved_in,
    stop_unsaved,
    token_sums,
)
from ..rewrite import Rewritten, predicted_sums, rewrite
from .compat import (
    Engine,
    Keys,
    actor_config,
    answer_lengths,
    answer_limit,
    answers_of,
    holds,
    in_layout_of,
    with_config,
)
from .loss import (
    add_penalty,
    check_fields,
    correction,
    generated_mask,
    native_config,
    native_mode,
    normaliser,
    read_batch,
    sampler_logp,
)
from .rows import Logits, rows_of

logger = logging.getLogger("isentropic")


class AnswerSums(NamedTuple):
    """Sums over the answers of an optimizer step that have a token to train on.

    Attributes:
        num: their number.
        length: Σ of their tokens, those of an environment too.
        truncated, limited: answers that reached the limit of tokens, and answers whose limit is known.
        reward, scored: Σ of rewards, and answers that have one.
    """

    num: Any
    length: Any
    truncated: Any
    limited: Any
    reward: Any
    scored: Any


def answer_sums(batch: TokenBatch, data: Any) -> AnswerSums:
    """What a micro-batch adds to the sums of its step, without a synchronisation.

    Args:
        batch: ``mask`` and ``reward``.
        data: verl's micro-batch.
    """
    kind, lengths, limit = sum_dtype(batch.logp.device), answer_lengths(data), answer_limit(data)
    lengths = lengths.to(batch.mask.device)
    # verl fills a batch up by rows without a token to train on.
    real = batch.mask.bool().any(1)
    cut = torch.zeros_like(real) if limit is None else lengths >= limit
    reward = torch.full_like(lengths, math.nan, dtype=kind) if batch.reward is None else batch.reward.to(kind)
    scored = real & reward.isfinite()
    rows = [real, lengths * real, cut & real, real & (limit is not None), torch.where(scored, reward, 0.0), scored]
    return AnswerSums(*(x.sum(dtype=kind) for x in rows))


def answer_row(sums: AnswerSums) -> dict[str, float]:
    """The sums of a step, over all ranks, as fields of its row; what is not known is absent.

    Example:
        >>> answer_row(AnswerSums(num=4.0, length=10.0, truncated=1.0, limited=4.0, reward=0.0, scored=0.0))
        {'length/mean': 2.5, 'length/truncated_frac': 0.25}
    """
    row = {}
    if sums.num:
        row["length/mean"] = sums.length / sums.num
    if sums.limited:
        row["length/truncated_frac"] = sums.truncated / sums.limited
    if sums.scored:
        row["reward/mean"] = sums.reward / sums.scored
    return row


class StepSums(NamedTuple):
    """The sums of an optimizer step in verl.

    Attributes:
        of_tokens, off_policy: over the tokens.
        of_answers: over the answers.
        of_groups: what is known of the groups.
        change: Σ of the predicted entropy change, per unit of learning rate.
        gain: Σ of its derivative by the knob.
    """

    of_tokens: TokenSums
    off_policy: OffPolicySums
    of_answers: AnswerSums
    of_groups: GroupFacts
    change: Any
    gain: Any


class Control:
    """The controller of one worker; every rank has the same state.

    Args:
        recipe: composed and checked.
        monitors: leave verl's own loss and settings as they are, and read.
        folder: where rank 0 writes the run directory; None writes none.
        steps: optimizer steps of the whole run, if known.
        save: the engine's ``save_checkpoint``, for a run that ends itself; None ends it unsaved.

    Attributes:
        loop: the controller and its state.
        step: optimizer steps done.
        age: optimizer steps done on the generated batch under way.
        logits: those of the micro-batch under way, for components that read whole rows.
        audit: looks at the next micro-batch, once.
    """

    def __init__(
        self,
        recipe: Recipe,
        monitors: bool = False,
        folder: str | None = None,
        steps: int | None = None,
        save: Callable[..., None] | None = None,
    ):
        self.recipe, self.monitors = recipe, monitors
        self.loop = ControlLoop(recipe, steps, self._stop_after_row)
        self.step = self.age = 0
        self.record = Record(folder) if folder else None
        self.logits = Logits("logp_rows" in recipe.reads)
        self.audit: Callable[..., None] | None = None
        self._save = save
        self._failure: str | None = None
        self._began = time.monotonic()

    # The loss.

    def wrap(self, loss_function: Any) -> Callable[..., Any]:
        """The loss function that the engine calls on each micro-batch, around verl's own."""
        recipe, config = self.loop.recipe_now, actor_config(loss_function)
        if not self.monitors:
            config = native_config(recipe, config)
            loss_function = with_config(loss_function, config)

        def wrapped(model_output: Any, data: Any, dp_group: Any = None) -> Any:
            batch, logits = read_batch(model_output, data), self.logits.take()
            check_fields(recipe, batch)
            if self.audit is not None:
                self.audit(batch, logits, data)
                self.audit = None
            rows = rows_of(logits, data) if "logp_rows" in recipe.reads else None
            # A token whose entropy is broken is left unshaped (L = 0): a faulty head must not reach the weights.
            entropy = _present(batch.entropy)
            usable = torch.where(entropy.isfinite(), entropy, -batch.logp)
            still = batch._replace(entropy=usable, logp_rows=None if rows is None else rows.detach())
            rewritten = rewrite(recipe, still, native_mode(recipe) is not None)
            read = model_output[Keys.ENTROPY] if config.entropy_coeff else model_output[Keys.ENTROPY].detach()
            loss, metrics = loss_function(
                model_output={**model_output, Keys.ENTROPY: read if self.monitors else finite(read)},
                data=data if self.monitors else self._rewritten_data(data, rewritten, batch),
                dp_group=dp_group,
            )
            if recipe.penalty != "none" and not self.monitors:
                logp, entropy = (answers_of(model_output[key], data) for key in (Keys.LOGP, Keys.ENTROPY))
                moving = still._replace(logp=logp, entropy=entropy, logp_rows=rows)
                loss = add_penalty(recipe, loss, moving, config)
            self._observe(recipe, batch, still, rewritten, config, data)
            return loss, metrics

        return wrapped

    def _rewritten_data(self, data: Any, rewritten: Rewritten, batch: TokenBatch) -> Any:
        """The micro-batch with its advantages rewritten; itself if the recipe does not change them."""
        if rewritten.facts is None and self.recipe.plain:
            return data
        changed = data.copy()
        changed[Keys.ADV] = in_layout_of(data[Keys.ADV], per_token(rewritten.advantages, batch.logp), data)
        if rewritten.logp_old is not None:
            changed[Keys.LOGP_OLD] = in_layout_of(data[Keys.LOGP_OLD], rewritten.logp_old, data)
        return changed

    def _observe(
        self, recipe: Recipe, batch: TokenBatch, still: TokenBatch, rewritten: Rewritten, config: Any, data: Any
    ) -> None:
        """Add one micro-batch to the sums of its optimizer step, without a synchronisation.

        Entropy is the trainer's, over all tokens that the policy generated; verl's correction for the sampler weighs
        the loss, and with it the prediction. This is of the recipe's objective alone, without the moments of the rows.
        """
        weights, facts = rewritten.advantages, rewritten.facts
        if facts is None:
            weights, facts = token_weights(recipe, still, rewritten.factors)
        corrected = correction(data, batch.mask.shape[1])

        def weights_of(end: Recipe) -> torch.Tensor:
            by_token = weights if end is recipe else token_weights(end, still, rewritten.factors)[0]
            return by_token if corrected is None else by_token * corrected

        share = normaliser(batch.mask, config)
        sums = predicted_sums(self.recipe, recipe, self.loop.value, still, share, weights_of)
        out = [x == 0 for x in (rewritten.factors, corrected) if x is not None]
        mask = generated_mask(data, batch.mask)
        batch, still = batch._replace(mask=mask), still._replace(mask=mask)
        # A batch's first step has the weights that verl calls the old ones, whatever it takes for their log-probs.
        sampled = batch if self.age else batch._replace(logp_old=None)
        sampler = sampler_logp(data, mask.shape[1])
        off_policy = off_policy_sums(sampled, facts, self.age, torch.stack(out).any(0) if out else None, sampler)
        if holds(data, Keys.LEAD):
            lead = (data[Keys.LEAD] * mask.bool().sum(1)).sum(dtype=off_policy.age.dtype)
            off_policy = off_policy._replace(age=off_policy.age + lead)
        answers = answer_sums(batch, data)
        self.loop.observe(StepSums(token_sums(batch, facts), off_policy, answers, group_sums(still), *sums))

    # The optimizer step.

    def end_step(self, engine: Engine, rate: float, act: bool, temperature: float) -> dict[str, float]:
        """Add up the micro-batches of all ranks, move the knob, and return what is logged.

        Args:
            engine: whose ranks.
            rate: the learning rate of the step.
            act: whether a generated batch ends here.
            temperature: of sampling.

        Raises:
            EntropyReadingError: ten readings in a row were refused; a checkpoint was saved if there is a folder.
            ValueError: the first one was.
        """
        sums: StepSums = self.loop.reduced(lambda vector: _over_ranks(vector, engine.get_data_parallel_group()))
        tokens = sums.of_tokens
        # verl's loss is a mean over ranks: each rank's weights are that many times too large.
        scale = rate / engine.get_data_parallel_size()
        reading = EntropyReading(tokens.entropy, tokens.tokens, "exact", temperature, rate=rate, groups=sums.of_groups)
        reading = reading._replace(predicted=scale * sums.change, gain=scale * sums.gain, steps=1)
        before, self.step, self.age = self.loop.state, self.step + 1, 0 if act else self.age + 1
        self.loop.regulate(reading, act)
        row = self.loop.row(tokens, reading, before) | answer_row(sums.of_answers)
        row |= off_policy_row(tokens, _known(sums.off_policy))
        if not self.monitors:
            row |= {"predict/change": reading.predicted, "predict/gain": reading.gain, "predict/moments": 0}
        if self.record is not None and torch.distributed.get_rank() == 0:
            seconds = round(time.monotonic() - self._began, 3)
            self.record.append("metrics", {"step": self.step, "seconds": seconds, "learning_rate": rate, **row})
        if self._failure is not None:
            self._save_and_stop(self._failure)
        return {k: float(v) for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}

    def _stop_after_row(self, reason: str) -> None:
        """The run ends with this step, once its row is written."""
        self._failure = reason

    def _save_and_stop(self, reason: str) -> None:
        if self.record is None or self._save is None:
            stop_unsaved(reason)
        folder = self.record.path / f"refused-step-{self.step}"
        self._save(str(folder), global_step=self.step)
        raise EntropyReadingError(f"{reason}; the actor as it is was saved to {folder}")

    # The run directory and checkpoints.

    def start(self, config: dict[str, Any]) -> None:
        """Write run.json if there is none, and take out the rows after the step that training goes on from."""
        if self.record is not None and torch.distributed.get_rank() == 0:
            if not (self.record.path / "run.json").exists():
                self.record.start(config, self.recipe.as_dict(), config.get("seed", 0))
            self.record.rewind(self.step)

    def save(self, folder: str) -> None:
        """Write the controller beside a checkpoint."""
        write_json(Path(folder) / CHECKPOINT_FILE, {"step": self.step, **self.loop.as_dict()})

    def restore(self, folder: str) -> None:
        """Continue from a checkpoint; start anew, with a warning, if it lacks our part, or has another knob."""
        saved = saved_in(folder)
        if saved is not None:
            self.step = saved["step"]
            self.loop.restore(saved)


def _known(sums: OffPolicySums) -> OffPolicySums:
    """Without the sampler's part if verl took the sampler's log-probs for the old ones: they differ nowhere."""
    return sums if sums.kl else sums._replace(known=0.0, kl_entropy=0.0)


def _over_ranks(vector: torch.Tensor, group: Any) -> torch.Tensor:
    torch.distributed.all_reduce(vector, group=group)
    return vector


def _present(x: torch.Tensor | None) -> torch.Tensor:
    assert x is not None
    return x
