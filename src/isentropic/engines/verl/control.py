"""Entropy control of one verl worker: what is read of a micro-batch, what the native loss is handed, and the update.

The native loss is called on rewritten advantages. An objective that it does not have goes in by its gradient, as in
:mod:`isentropic.engines.rewrite`: the weights as advantages, the current log-probabilities as the old ones.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...control.thermostat import to_json
from ...entropy.prediction import Weights, change_of
from ...recipes.compose import Recipe, build_thermostat, knob_range, select, shape, with_knob
from ...recipes.parts import NEEDS_OLD_ENTROPY
from ...recipes.terms import penalty, selected, wide
from ...runs.record import CHECKPOINT_FILE, Record, write_json
from ...types import EntropyReading, TokenBatch, TokenFacts, TokenStats
from ..loop import MAX_REFUSED, EntropyReadingError, restored, row_of, saved_in
from ..rewrite import weights_of
from .plugin import AGG_MODES
from .rows import Logits, aligned, rows_of

logger = logging.getLogger("isentropic")
NO_OLD_ENTROPY = (
    "selection erc compares entropies with those of sampling time, which verl leaves out where it takes the sampler's "
    "log-probs for the old ones, got algorithm.rollout_correction.bypass_mode=True; set it to False"
)
SUMS = tuple("entropy tokens low high adv logp adv_logp ratio outside change gain".split())


def native_mode(recipe: Recipe) -> str | None:
    """The verl loss that is the recipe's objective, or None where it takes the road by its gradient."""
    modes = {"clipped": "vanilla", "cispo": "cispo"}
    known = isinstance(recipe.objective, str) and recipe.bounds in ("additive", "reciprocal")
    return modes.get(str(recipe.objective)) if known else None


def native_config(recipe: Recipe, given: Any) -> Any:
    """verl's actor config as the native loss reads it under a recipe with its knob in force."""
    native, policy_loss = copy.copy(given), copy.copy(given.policy_loss)
    object.__setattr__(policy_loss, "loss_mode", native_mode(recipe) or "vanilla")
    low = recipe.clip_low if recipe.bounds == "additive" else 1 - 1 / (1 + recipe.clip_low)
    low = 1.0 if recipe.objective == "cispo" else low
    changes = {
        "policy_loss": policy_loss,
        "clip_ratio_low": low,
        "clip_ratio_high": recipe.clip_high,
        "loss_agg_mode": AGG_MODES[recipe.reduction],
        "entropy_coeff": recipe.entropy_coef,
    }
    for name, value in changes.items():
        # The fields of verl's configs are frozen; this copy is ours.
        object.__setattr__(native, name, value)
    return native


class Control:
    """The controller of one worker; every rank holds the same state.

    Args:
        recipe: composed and checked.
        monitors: leave verl's own loss and settings as they are, and read.
        folder: where rank 0 writes the run directory; None writes none.
        steps: optimizer steps of the whole run, where known.
    """

    def __init__(self, recipe: Recipe, monitors: bool, folder: str | None, steps: int | None = None):
        self.recipe, self.monitors = recipe, monitors
        self.thermostat = build_thermostat(recipe, steps)
        self.state: Any = self.thermostat.init() if self.thermostat else None
        self.step = self.refused = 0
        self.window: torch.Tensor | None = None
        self.record = Record(folder) if folder else None
        self.logits = Logits()
        self.audit: Callable[..., None] | None = None
        self._began = time.monotonic()

    def now(self) -> Recipe:
        """The recipe with its knob in force."""
        return with_knob(self.recipe, self.state.value if self.state else None)

    def wrap(self, loss_function: Any) -> Callable[..., Any]:
        """The loss function that the engine calls on each micro-batch, around verl's own."""
        config = loss_function.keywords["config"]
        config = config if self.monitors else native_config(self.now(), config)
        keywords = {**loss_function.keywords, "config": config}
        native = loss_function if self.monitors else partial(loss_function.func, *loss_function.args, **keywords)

        def wrapped(model_output: Any, data: Any, dp_group: Any = None) -> Any:
            batch, logits = read_batch(model_output, data), self.logits.take()
            if self.recipe.selection in NEEDS_OLD_ENTROPY and batch.entropy_old is None:
                raise ValueError(NO_OLD_ENTROPY)
            if self.audit is not None:
                self.audit(batch, logits, data)
                self.audit = None
            usable = torch.where(batch.entropy.isfinite(), batch.entropy, -batch.logp)
            recipe, still = self.now(), batch._replace(entropy=usable)
            rows = rows_of(logits, data) if recipe.needs_rows else None
            still = still if rows is None else still._replace(logp_rows=rows.detach())
            chosen = select(recipe, still)
            weights, facts = weights_of(recipe, still, chosen)
            handed = data if self.monitors else self._hand(recipe, still, weights, chosen, data)
            if not config.entropy_coeff:
                model_output = {**model_output, "entropy": model_output["entropy"].detach()}
            loss, metrics = native(model_output=model_output, data=handed, dp_group=dp_group)
            if recipe.penalty != "none" and not self.monitors:
                still = still._replace(logp_rows=rows)
                loss = loss + self._penalty(recipe, still, model_output, data, config)
            self._count(still._replace(logp_rows=None), batch.entropy, facts, weights, chosen, config)
            return loss, metrics

        return wrapped

    def _hand(self, recipe: Recipe, batch: TokenBatch, weights: Any, chosen: Any, data: Any) -> Any:
        """The micro-batch with its advantages rewritten; untouched where the recipe does not change them."""
        by_gradient = native_mode(recipe) is None
        if not by_gradient and recipe.plain:
            return data
        given = weights if by_gradient else wide(selected(shape(recipe, batch), chosen), batch.logp)
        handed = data.copy()
        handed["advantages"] = like(given, data["advantages"], data)
        if by_gradient:
            handed["old_log_probs"] = like(batch.logp, data["old_log_probs"], data)
        return handed

    def _penalty(self, recipe: Recipe, batch: TokenBatch, model_output: Any, data: Any, config: Any) -> torch.Tensor:
        from verl.trainer.ppo.core_algos import agg_loss
        from verl.workers.utils.padding import no_padding_2_padding

        logp = no_padding_2_padding(model_output["log_probs"], data)
        cost = penalty(recipe, batch._replace(logp=logp))
        cost = torch.where(batch.mask.bool(), cost, torch.zeros_like(cost))
        mean = agg_loss(cost, batch.mask, config.loss_agg_mode, **config.global_batch_info)
        return recipe.penalty_coef * mean

    def _count(
        self, batch: TokenBatch, entropy: torch.Tensor, facts: TokenFacts, weights: Any, chosen: Any, config: Any
    ) -> None:
        """Add one micro-batch to the reading of the optimizer step, without a synchronisation."""
        logp = batch.logp
        adv, ratio, ones = wide(batch.adv, logp), facts.ratio.expand_as(logp), torch.ones_like(logp)
        outside = facts.clipped_low | facts.clipped_high if facts.outside is None else facts.outside
        change, gain = self._predicted(batch, weights, chosen, config)
        table = torch.stack(
            [
                *(entropy, ones, facts.clipped_low, facts.clipped_high, adv),
                *(logp, adv * logp, ratio, outside, change, gain),
            ]
        )
        sums = torch.where(batch.mask.bool(), table, 0.0).sum((1, 2), dtype=torch.float64)
        self.window = sums if self.window is None else self.window + sums

    def _predicted(self, batch: TokenBatch, weights: torch.Tensor, chosen: Any, config: Any) -> tuple[Any, Any]:
        """The predicted change of each row, and its derivative by the knob, a unit of learning rate, ``[b t]``.

        Without the moments of the rows, and of the recipe's objective alone.
        """
        share = normaliser(batch.mask, config)
        assert batch.entropy is not None
        rows = TokenStats(batch.logp, batch.entropy)

        def change(recipe: Recipe, w: torch.Tensor) -> torch.Tensor:
            return change_of(Weights(share * w, share * recipe.entropy_coef), rows)

        recipe = self.now()
        here = change(recipe, weights)
        if self.state is None:
            return here, torch.zeros_like(here)
        span = knob_range(self.recipe)
        clips = self.recipe.knob in ("clip_low", "clip_high")
        half = self.state.value / 4 if clips else 1e-3 * (span.high - span.low)
        ends = [with_knob(self.recipe, self.state.value + x) for x in (half, -half)]
        up, down = (change(end, weights_of(end, batch, chosen)[0]) for end in ends)
        return here, (up - down) / (2 * half)

    # The optimizer step.

    def close(self, engine: Any, rate: float, act: bool, temperature: float) -> dict[str, float]:
        """Add up the micro-batches of all ranks, turn the knob, and say what is logged.

        Raises:
            EntropyReadingError: ten readings in a row were refused.
            ValueError: the first one was.
        """
        window, self.window = self.window, None
        assert window is not None
        torch.distributed.all_reduce(window, group=engine.get_data_parallel_group())
        totals: dict[str, float] = dict(zip(SUMS, window.tolist(), strict=True))
        # verl's loss is a mean over ranks: each rank's weights are that many times too large.
        scale = rate / engine.get_data_parallel_size()
        reading = EntropyReading(totals["entropy"], totals["tokens"], "exact", temperature)
        reading = reading._replace(predicted=scale * totals["change"], gain=scale * totals["gain"], steps=1)
        before, self.step = self.state, self.step + 1
        self._regulate(reading, act)
        row = row_of(totals, reading, self.refused, self.recipe, self.thermostat, before, self.state)
        if not self.monitors:
            row |= {"predict/change": reading.predicted, "predict/gain": reading.gain, "predict/moments": 0}
        if self.record is not None and torch.distributed.get_rank() == 0:
            seconds = round(time.monotonic() - self._began, 3)
            self.record.append("metrics", {"step": self.step, "seconds": seconds, "learning_rate": rate, **row})
        return {k: float(v) for k, v in row.items() if v is not None and math.isfinite(v)}

    def _regulate(self, reading: EntropyReading, act: bool) -> None:
        problem = reading.problem()
        self.refused = self.refused + 1 if problem else 0
        if problem:
            logger.warning("entropy reading refused (%s in a row), the knob is held: %s", self.refused, problem)
        if self.thermostat is None:
            return
        if problem and self.state.target.readings == 0 and self.state.refused == 0:
            raise ValueError(f"the first entropy reading is refused: {problem}")
        self.state = self.thermostat.update(self.state, reading, act=act)
        if self.refused >= MAX_REFUSED:
            raise EntropyReadingError(
                f"{self.refused} entropy readings in a row were refused: {problem}; resume from the last checkpoint"
            )

    # Checkpoints.

    def start(self, config: dict[str, Any]) -> None:
        """Write run.json, where there is none."""
        if self.record is not None and torch.distributed.get_rank() == 0:
            if not (self.record.path / "run.json").exists():
                self.record.start(config, asdict(self.recipe), config.get("seed", 0))
            self.record.rewind(self.step)

    def save(self, folder: str) -> None:
        state = to_json(self.state) if self.state else None
        saved = {"step": self.step, "refused": self.refused, "recipe": asdict(self.recipe), "state": state}
        write_json(Path(folder) / CHECKPOINT_FILE, saved)

    def restore(self, folder: str) -> None:
        """Go on from a checkpoint; where it has no state of ours, or of another knob, say so and start afresh."""
        saved = saved_in(folder)
        if saved is None:
            return
        self.step, self.refused = saved["step"], saved["refused"]
        if self.thermostat is not None:
            self.state = restored(saved, self.recipe, self.thermostat)


def like(x: torch.Tensor, given: torch.Tensor, data: Any) -> torch.Tensor:
    """``[b t]`` in the layout of what it replaces."""
    from verl.workers.utils.padding import response_to_nested

    return response_to_nested(x, data["response_mask"]) if given.is_nested else x.to(given.dtype)


def read_batch(model_output: Any, data: Any) -> Any:
    """The micro-batch as token facts ``[b t]`` without gradients, in fp32."""
    from verl.workers.utils.padding import no_padding_2_padding

    if model_output.get("entropy") is None:
        raise RuntimeError(
            "verl's engine delivered no entropy; set actor_rollout_ref.actor.calculate_entropy=True and leave "
            "actor_rollout_ref.actor.use_prefix_grouper out"
        )
    logp, entropy = (no_padding_2_padding(model_output[k].detach(), data).float() for k in ("log_probs", "entropy"))
    length = logp.shape[1]
    old, adv, mask = (aligned(data[k], length) for k in ("old_log_probs", "advantages", "response_mask"))
    before = aligned(data["entropy"], length).float() if "entropy" in data.keys() else None  # noqa: SIM118
    return TokenBatch(logp, old.float(), adv.float(), mask, entropy, before)


def normaliser(mask: torch.Tensor, config: Any) -> torch.Tensor:
    """The weight of each token in verl's aggregate, ``[b t]``: its derivative by the loss of the token."""
    from verl.trainer.ppo.core_algos import agg_loss

    with torch.enable_grad():
        zero = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
        total = agg_loss(zero, mask.bool(), config.loss_agg_mode, **config.global_batch_info)
        return torch.autograd.grad(total, zero)[0]
