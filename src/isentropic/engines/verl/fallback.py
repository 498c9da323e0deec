"""Control through verl's loss alone, for actors whose engine is not wrapped: Megatron and others.

verl's loss is handed log-probabilities, and nothing else: entropy is the sampled estimate −log π, the end of an
optimizer step is seen by a hook of torch, and nothing goes into checkpoints. That is said once, as the run starts.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...recipes.compose import RECIPES, Recipe, build_thermostat, select, shape, with_knob
from ...recipes.parts import NEEDS_ENTROPY
from ...recipes.terms import penalty, selected, wide
from ...types import EntropyReading, TokenBatch
from ..loop import MAX_REFUSED, EntropyReadingError
from ..rewrite import weights_of
from .control import native_config, native_mode

logger = logging.getLogger("isentropic")
LACKS = (
    "the actor's engine (%s) is not wrapped, so that isentropic acts through verl's loss alone: entropy is estimated "
    "by −log π of the sampled tokens (entropy/sampled), the controller is not saved with checkpoints and starts afresh "
    "on resume, an optimizer step that the engine skips is read with the next one, there is no run directory, no "
    "predicted change and no audit; actor_rollout_ref.actor.strategy=fsdp2 has all of it"
)


def why_not(recipe: Recipe) -> str | None:
    """What of a recipe cannot be had through the loss alone, or None."""
    for part in (recipe.selection, recipe.shaping):
        if part in NEEDS_ENTROPY:
            return f"{part} reads the entropies of the rows"
    if recipe.needs_rows:
        return f"{recipe.penalty} reads whole rows of log-probabilities"
    if recipe.entropy_coef or recipe.knob == "entropy_coef":
        return "the entropy bonus needs entropies with a gradient"
    return None


def check(recipe: Recipe, strategy: str, pipeline: int = 1) -> None:
    """Refuse what cannot be had through the loss alone.

    Raises:
        ValueError: what, got, allowed, remedy.
    """
    reason = why_not(recipe)
    if reason:
        able = ", ".join(name for name, known in RECIPES.items() if known.knob and not why_not(known))
        raise ValueError(
            f"{reason}, which verl's loss is not handed, got actor_rollout_ref.actor.strategy={strategy}; set it to "
            f"fsdp or fsdp2, or take one of {able}"
        )
    if pipeline > 1:
        raise ValueError(
            "the controller must see the loss on every rank, and with pipeline parallelism only the last stage has it, "
            f"got pipeline_model_parallel_size={pipeline}; set it to 1"
        )


class ByLoss:
    """The controller of one worker, behind the loss that verl calls; every rank holds the same state."""

    def __init__(self, recipe: Recipe, config: Any, updates: int | None, steps: int | None = None):
        strategy = str(config.strategy)
        megatron = getattr(config, "megatron", None)
        check(recipe, strategy, getattr(megatron, "pipeline_model_parallel_size", 1))
        self.recipe, self.updates = recipe, updates or 1
        self.thermostat = build_thermostat(recipe, steps)
        self.state: Any = self.thermostat.init() if self.thermostat else None
        self.step = self.refused = 0
        self.window: torch.Tensor | None = None
        self.last = math.nan
        register_optimizer_step_post_hook(self.close)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            logger.warning(LACKS, strategy)

    def loss(self, logp: torch.Tensor, batch: TokenBatch, config: Any, mode: str, weights: Any) -> tuple[Any, Any]:
        """verl's loss of one micro-batch on rewritten advantages, with the recipe's penalty, and what is logged."""
        from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn

        recipe = with_knob(self.recipe, self.state.value if self.state else None)
        config, chosen = native_config(recipe, config), select(recipe, batch)
        if native_mode(recipe):
            adv, old = wide(selected(shape(recipe, batch), chosen), batch.logp), batch.logp_old
        else:
            adv, old = weights_of(recipe, batch, chosen)[0], batch.logp
        native = get_policy_loss_fn(config.policy_loss.loss_mode)
        given = {"old_log_prob": old, "log_prob": logp, "advantages": adv, "response_mask": batch.mask}
        loss, metrics = native(**given, loss_agg_mode=mode, config=config, rollout_is_weights=weights)
        if recipe.penalty != "none":
            cost = penalty(recipe, batch._replace(logp=logp))
            cost = torch.where(batch.mask.bool(), cost, torch.zeros_like(cost))
            loss = loss + recipe.penalty_coef * agg_loss(cost, batch.mask, mode, **config.global_batch_info)
        sums = torch.stack([-batch.logp, torch.ones_like(batch.logp)])
        sums = torch.where(batch.mask.bool(), sums, 0.0).sum((1, 2), dtype=torch.float64)
        self.window = sums if self.window is None else self.window + sums
        known = {"entropy/sampled": self.last, "knob/value": self.state.value if self.state else math.nan}
        return loss, {**metrics, **{name: x for name, x in known.items() if math.isfinite(x)}}

    def close(self, *args: Any) -> None:
        """After an optimizer's step: add up all ranks, and turn the knob; nothing where no loss was computed."""
        window, self.window = self.window, None
        if window is None:
            return
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(window)
        reading = EntropyReading(*window.tolist(), estimator="sampled")
        self.step, self.last = self.step + 1, reading.mean
        problem = reading.problem()
        self.refused = self.refused + 1 if problem else 0
        if problem:
            logger.warning("entropy reading refused (%s in a row), the knob is held: %s", self.refused, problem)
        if self.refused >= MAX_REFUSED:
            raise EntropyReadingError(f"{self.refused} entropy readings in a row were refused: {problem}")
        if self.thermostat is not None:
            self.state = self.thermostat.update(self.state, reading, act=self.step % self.updates == 0)


def by_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """What verl calls as its loss ``isentropic`` where no engine of ours stands around it."""
    chosen = config.policy_loss
    behind: ByLoss | None = chosen.fallback
    if behind is None:
        behind = ByLoss(chosen.checked(config), config, chosen.updates(config), chosen.steps(config))
        # The fields of verl's configs are frozen, and this one lives as long as the worker's loss does.
        object.__setattr__(chosen, "fallback", behind)
    batch = TokenBatch(log_prob.detach().float(), old_log_prob.float(), advantages.float(), response_mask)
    return behind.loss(log_prob, batch, config, loss_agg_mode, rollout_is_weights)
