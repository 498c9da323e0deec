"""Control through verl's loss alone, for actors whose engine is not wrapped: Megatron and others.

verl's loss gets log-probabilities, and nothing else: entropy is the sampled estimate −log π, the end of an
optimizer step is seen by a hook of torch, and nothing goes into checkpoints. That is said once, as the run starts.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...losses.reduce import SumCount
from ...recipes import RECIPES, Recipe
from ...recipes.apply import per_token
from ...types import EntropyReading, TokenBatch
from ..loop import ControlLoop, masked_sums
from ..rewrite import rewrite
from .compat import get_policy_loss_fn, set_field
from .loss import add_penalty, native_config, native_mode

logger = logging.getLogger("isentropic")
LACKS = (
    "the actor's engine (%s) is not wrapped, so that isentropic acts through verl's loss alone: entropy is estimated "
    "by −log π of the sampled tokens (entropy/sampled), the controller is not saved with checkpoints and starts anew "
    "on resume, an optimizer step that the engine skips is read with the next one, there is no run directory, no "
    "predicted change and no audit; actor_rollout_ref.actor.strategy=fsdp2 has all of it"
)
NOT_THERE = {
    "entropy": "the entropies of the rows",
    "entropy_old": "the entropies of sampling time",
    "logp_rows": "whole rows of log-probabilities",
    "reward": "the rewards of the answers",
    "group_rate": "the success rates of the groups",
}


def why_not(recipe: Recipe) -> str | None:
    """What a recipe needs that the loss alone does not give, or None.

    Example:
        >>> why_not(RECIPES["isentropic"]), why_not(RECIPES["adapo"])
        ('repo_r reads the entropies of the rows', None)
    """
    for stage, component in recipe.components().items():
        for field, name in NOT_THERE.items():
            if field in component.reads:
                return f"{getattr(recipe, stage)} reads {name}"
    if recipe.entropy_coef or recipe.knob == "entropy_coef":
        return "the entropy bonus needs entropies with a gradient"
    return None


def check(recipe: Recipe, strategy: str, pipeline: int = 1) -> None:
    """Refuse what the loss alone does not give.

    Args:
        recipe: composed.
        strategy: of verl's actor.
        pipeline: its pipeline stages.

    Raises:
        ValueError: what, got, allowed, remedy.
    """
    reason = why_not(recipe)
    if reason:
        held = {name: known for name, known in RECIPES.items() if known.knob and not known.redraws}
        able = ", ".join(name for name, known in held.items() if not why_not(known))
        raise ValueError(
            f"{reason}, which verl's loss does not get, got actor_rollout_ref.actor.strategy={strategy}; set it to "
            f"fsdp or fsdp2, or take one of {able}"
        )
    if pipeline > 1:
        raise ValueError(
            "the controller must see the loss on every rank, and with pipeline parallelism only the last stage has it, "
            f"got pipeline_model_parallel_size={pipeline}; set it to 1"
        )


class ByLoss:
    """The controller of one worker, behind the loss that verl calls; every rank has the same state.

    Args:
        recipe: composed and checked.
        config: the actor's.
        updates: optimizer steps per generated batch, if known.
        steps: of the whole run, if known.

    Attributes:
        loop: the controller and its state.
        step: optimizer steps done.
        last: the latest sampled estimate, nats per token.
    """

    def __init__(self, recipe: Recipe, config: Any, updates: int | None, steps: int | None = None):
        strategy = str(config.strategy)
        megatron = getattr(config, "megatron", None)
        check(recipe, strategy, getattr(megatron, "pipeline_model_parallel_size", 1))
        self.loop, self.updates = ControlLoop(recipe, steps), updates or 1
        self.step, self.last = 0, math.nan
        register_optimizer_step_post_hook(self.end_step)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            logger.warning(LACKS, strategy)

    def loss(self, logp: torch.Tensor, batch: TokenBatch, config: Any, mode: str, weights: Any) -> tuple[Any, Any]:
        """verl's loss of one micro-batch on rewritten advantages, with the recipe's penalty, and what is logged.

        Args:
            logp: ``[b t]`` with gradient.
            batch: token facts without gradients.
            config: the actor's.
            mode: verl's reduction.
            weights: verl's weights for the rollout correction, or None.
        """
        recipe = self.loop.recipe_now
        config = native_config(recipe, config)
        rewritten = rewrite(recipe, batch, native_mode(recipe) is not None)
        native = get_policy_loss_fn(config.policy_loss.loss_mode)
        loss, metrics = native(
            old_log_prob=batch.logp_old if rewritten.logp_old is None else rewritten.logp_old,
            log_prob=logp,
            advantages=per_token(rewritten.advantages, batch.logp),
            response_mask=batch.mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=weights,
        )
        if recipe.penalty != "none":
            loss = add_penalty(recipe, loss, batch._replace(logp=logp), config)
        surprisal = torch.stack([-batch.logp, torch.ones_like(batch.logp)])
        self.loop.observe(SumCount(*masked_sums(surprisal, batch.mask).unbind()))
        value = self.loop.value
        logged = {"entropy/sampled": self.last, "knob/value": math.nan if value is None else value}
        return loss, {**metrics, **{name: x for name, x in logged.items() if math.isfinite(x)}}

    def end_step(self, optimizer: Any = None, *args: Any) -> None:
        """After an optimizer's step: add up all ranks, and move the knob; nothing if no loss was computed.

        Args:
            optimizer: has the learning rate of the step.
            args: of the step, which torch hands over.

        Raises:
            EntropyReadingError: ten readings in a row were refused; there is nothing here to save with.
            ValueError: the first one was.
        """
        if not self.loop.observed:
            return
        sums: SumCount = self.loop.reduced(_over_ranks)
        rate = None if optimizer is None else float(optimizer.param_groups[0]["lr"])
        reading = EntropyReading(float(sums.sum), float(sums.count), estimator="sampled", rate=rate)
        self.step, self.last = self.step + 1, reading.mean
        self.loop.regulate(reading, act=self.step % self.updates == 0)


def _over_ranks(vector: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(vector)
    return vector


def by_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """What verl calls as its loss ``isentropic`` if our engine does not wrap it."""
    settings = config.policy_loss
    control: ByLoss | None = settings.fallback
    if control is None:
        control = ByLoss(settings.checked(config), config, settings.updates(config), settings.steps(config))
        # This config lives as long as the worker's loss does.
        set_field(settings, "fallback", control)
    batch = TokenBatch(log_prob.detach().float(), old_log_prob.float(), advantages.float(), response_mask)
    return control.loss(log_prob, batch, config, loss_agg_mode, rollout_is_weights)
