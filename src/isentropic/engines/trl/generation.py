"""What TRL's generation step lacks: other baselines, group rates, entropies at sampling time, second batches."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from ...losses.advantages import (
    group_distinct,
    group_rate,
    group_repeats,
    group_reward,
    informative_groups,
    overlong_penalty,
)
from ...recipes.apply import advantages
from .compat import Trainer, sampling_at, scores_old_logps, unlogged
from .explain import completion_groups
from .rollout import Rollout
from .settings import warn_once

logger = logging.getLogger("isentropic")
MAX_ROUNDS = 10
# AEPO's released code: the share of prompts that are drawn again, and the advantage from which an answer is right.
REDRAWN_PROMPTS = 1 / 4
RIGHT = 0.05
_NATIVE_BASELINES = ("mean", "mean_std")
_LEFT_PADDED = ("prompt_ids", "prompt_mask")
# What TRL gives of images is not one row per completion, or is padded on both sides.
_OF_IMAGES = ("pixel_values", "num_images", "token_type_ids", "mm_token_type_ids")

Generate = Callable[[Any], dict[str, Any]]


class GeneratedBatches:
    """The generated batches of a trainer.

    Attributes:
        rows: of the batch that is being generated: TRL gives a ``rollout_func`` their prompts alone.
        num_generated: completions so far.
        sampled_at: optimizer steps done when the latest batch was sampled.
        scoring: whether the batch under way is being generated, so that scores are of its sampling time.
        num_unscored: completions of the latest batch without a finite reward, on all processes.
        redraws: whether a second batch may be drawn; an audit, which looks at one, switches it off.
        redrawn: share of the latest batch, over all processes, that answers of another temperature replaced.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.rows: list[dict[str, Any]] | None = None
        self.num_generated = self.sampled_at = 0
        self.scoring = False
        self.num_unscored = 0
        self.redraws, self.redrawn = trainer.recipe.redraws, 0.0
        if self.redraws:
            check_redraw(trainer)
        self._rewards: torch.Tensor | None = None
        self._answers: torch.Tensor | None = None
        self._entropies: torch.Tensor | None = None
        self._keeps_entropies = False

    def rewarded(self, per_function: torch.Tensor, completion_ids: Any) -> torch.Tensor:
        """Keep the rewards of all processes' samples, as TRL adds them up, with the overlong penalty.

        An infinite reward counts as none: it would make an advantage, and then every weight, NaN.

        Returns:
            The rewards for TRL, ``[samples, functions]``, NaN if one is not finite.
        """
        trainer = self.trainer
        infinite = per_function.isinf()
        per_function = per_function.masked_fill(infinite, torch.nan)
        rewards = (per_function * trainer.reward_weights.to(per_function.device)).nansum(dim=1)
        rewards[torch.isnan(per_function).all(dim=1)] = torch.nan
        if trainer.recipe.overlong_buffer:
            lengths = torch.tensor([len(ids) for ids in completion_ids], device=rewards.device)
            limit, buffer = int(trainer.args.max_completion_length), trainer.recipe.overlong_buffer
            rewards = rewards + overlong_penalty(trainer.accelerator.gather(lengths), limit, buffer)
        self._rewards = rewards
        # The hash of a tuple of integers is the same in every process.
        answers = torch.tensor([hash(tuple(map(int, ids))) for ids in completion_ids], device=rewards.device)
        self._answers = trainer.accelerator.gather(answers)
        unscored = rewards.isnan()
        before, self.num_unscored = self.num_unscored, int(unscored.sum())
        if self.num_unscored and not before:
            what = "an infinite reward" if bool(infinite.any()) else "no reward"
            logger.warning(
                "%s of %s completions are not scored, the first with %s: they get no advantage; reward/unscored counts "
                "them",
                self.num_unscored,
                len(rewards),
                what,
            )
        return per_function

    def generate(self, native: Generate, inputs: list[Any]) -> dict[str, Any]:
        """A batch that is trained on: generated again in part if the recipe asks for it.

        Raises:
            ValueError: dynamic sampling over groups that span processes, or over a dataset that cannot be indexed; a
                part of a batch with images that is to be replaced; what :func:`check_redraw` refuses.
        """
        self.sampled_at = int(self.trainer.state.global_step)
        output = self._roll_out(native, inputs)
        if self.trainer.recipe.dynamic_sampling:
            output = self._resample(native, inputs, output)
        if self.redraws:
            output = self._redraw(native, self.rows or inputs, output)
        self.num_generated += len(inputs) * self.trainer.accelerator.num_processes
        return output | completion_groups(self.trainer, output)

    def score(self, native: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's scoring of a new batch: its first call is the policy's, whose entropies TRL would not compute."""
        if not self._keeps_entropies or self._entropies is not None:
            return native(*args, **kwargs)
        scores = native(*args, **{**kwargs, "compute_entropy": True})
        self._entropies = scores[1]
        return scores

    def _roll_out(self, native: Generate, inputs: Any) -> dict[str, Any]:
        """TRL's generation with rewards, group rates, our baselines, and entropies beside the old log-probs."""
        self.rows, self.scoring, self._entropies = inputs, True, None
        # Without old log-probs the first score is the reference model's, whose head may have no entropies.
        self._keeps_entropies = scores_old_logps(self.trainer)
        try:
            output = native(inputs)
            if output.get("old_per_token_logps") is not None:
                output["old_entropies"] = self._entropies
        finally:
            self.scoring, self._entropies = False, None
        return self._with_rewards(output)

    def _with_rewards(self, output: dict[str, Any]) -> dict[str, Any]:
        trainer, rewards, recipe = self.trainer, self._rewards, self.trainer.recipe
        assert rewards is not None
        size = len(output["advantages"])
        rank = trainer.accelerator.process_index
        local = slice(rank * size, (rank + 1) * size)
        groups = rewards.view(-1, trainer.num_generations)
        output["rewards"] = rewards[local]
        output["group_rate"] = group_rate(groups)[local]
        output["group_reward"] = group_reward(groups)[local]
        assert self._answers is not None
        answers = self._answers.view_as(groups)
        output["group_distinct"] = group_distinct(groups, answers)[local]
        output["group_repeats"] = group_repeats(groups, answers)[local]
        named = getattr(trainer.args, "recipe", None) is not None
        if named and (recipe.baseline not in _NATIVE_BASELINES or recipe.overlong_buffer):
            output["advantages"] = advantages(recipe, groups, self._logp_mean(output, groups)).to(rewards.dtype)[local]
        return output

    def _logp_mean(self, output: dict[str, Any], groups: torch.Tensor) -> torch.Tensor | None:
        """Mean log-probability of each completion when it was drawn, on all processes, ``[p g]``, if it is needed."""
        if not self.trainer.recipe.component("baseline").needs_logp:
            return None
        mask = (output["completion_mask"] * output.get("tool_mask", 1)).bool()
        mean = torch.where(mask, output["old_per_token_logps"], 0.0).sum(1) / mask.sum(1).clamp(min=1)
        return self.trainer.accelerator.gather(mean).view_as(groups)

    def _resample(self, native: Generate, inputs: list[Any], output: dict[str, Any]) -> dict[str, Any]:
        """Replace prompts whose answers all got one reward by fresh ones, in rounds of a batch (arXiv:2503.14476).

        Fresh prompts are drawn by (seed, optimizer step, round, rank), so that a resumed run draws the same. After
        ``MAX_ROUNDS`` the rest stays, with advantages of zero.
        """
        trainer, group, accelerator = self.trainer, self.trainer.num_generations, self.trainer.accelerator
        rank, dataset = accelerator.process_index, trainer.train_dataset
        _check_groups("dynamic_sampling", len(inputs), group)
        if not hasattr(dataset, "__getitem__"):
            raise ValueError("dynamic_sampling draws prompts by index, got an iterable dataset; load it whole")
        good, kept = self._informative(), list(inputs)
        for turn in range(MAX_ROUNDS):
            if bool(good.all()):
                break
            draw = random.Random(f"{trainer.args.seed}/{trainer.state.global_step}/{turn}/{rank}")
            rows = [dataset[draw.randrange(len(dataset))] for _ in range(len(inputs) // group)]
            fresh = self._roll_out(native, [row for row in rows for _ in range(group)])
            self.num_generated += len(inputs) * accelerator.num_processes
            swaps = [_pairs(~old, new) for old, new in zip(good, self._informative(), strict=True)]
            output = _replace_groups(output, fresh, swaps[rank], group)
            for to, source in swaps[rank]:
                kept[to * group : (to + 1) * group] = [rows[source]] * group
            for of_rank, pairs in zip(good, swaps, strict=True):
                of_rank[[to for to, _ in pairs]] = True
        self.rows = kept
        return self._counted(output)

    def _redraw(self, native: Generate, inputs: list[Any], output: dict[str, Any]) -> dict[str, Any]:
        """Put right answers of a second batch, drawn at another temperature, in the place of the first completions.

        Each has an advantage of 1. ``redrawn`` marks them, ``[b]``: entropy is not read from them.
        """
        trainer, group, recipe = self.trainer, self.trainer.num_generations, self.trainer.loop.recipe_now
        check_redraw(trainer)
        size = len(output["advantages"])
        output["redrawn"] = torch.zeros(size, dtype=torch.bool, device=output["advantages"].device)
        self.redrawn = 0.0
        wanted = redrawn_here(recipe.redraw, size, trainer.accelerator.num_processes, trainer.accelerator.process_index)
        if wanted is None:
            return output
        again = inputs[: group * math.ceil(REDRAWN_PROMPTS * size / group)]
        # Unscored answers of this batch alone are no news: a count that is not 0 keeps `rewarded` silent.
        unscored, self.num_unscored = self.num_unscored, -1
        with unlogged(trainer), sampling_at(trainer, recipe.redraw_high if recipe.redraw > 0 else recipe.redraw_low):
            fresh = self._roll_out(native, again)
        self.num_unscored = unscored
        self.num_generated += len(again) * trainer.accelerator.num_processes
        right = (fresh["advantages"] > RIGHT).nonzero()[:, 0][:wanted]
        num_right = torch.tensor([len(right)], dtype=torch.float32, device=right.device)
        self.redrawn = float(trainer.accelerator.gather(num_right).mean()) / size
        ones = torch.ones_like(fresh["advantages"])
        fresh = {**fresh, "advantages": ones, "redrawn": ones.bool()}
        if "importance_sampling_ratio" in fresh:
            # The sampler's ratio would weigh the answers back to the first temperature.
            fresh["importance_sampling_ratio"] = torch.ones_like(fresh["importance_sampling_ratio"])
        return self._counted(_replace_rows(output, fresh, torch.arange(len(right)), right.cpu()))

    def _counted(self, output: dict[str, Any]) -> dict[str, Any]:
        """The batch with its number of tokens, on all processes, after some of it was replaced."""
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        return output | {"num_items_in_batch": self.trainer.accelerator.gather(mask.sum()).sum()}

    def _informative(self) -> torch.Tensor:
        """The groups that teach something, on every process: ``[ranks, groups of a rank]``, on the CPU."""
        assert self._rewards is not None
        keep = informative_groups(self._rewards.view(-1, self.trainer.num_generations)).cpu()
        return keep.view(self.trainer.accelerator.num_processes, -1)


def redrawn_here(share: float, size: int, num_processes: int, rank: int) -> int | None:
    """How many completions of a process are to be replaced; None if there are none on any process.

    Args:
        share: of the whole batch, of either sign.
        size: completions of a process.
        num_processes, rank: the count of the whole batch is dealt out to them in turn.

    Example:
        >>> [redrawn_here(-0.0234, 64, 2, rank) for rank in (0, 1)], redrawn_here(0.0234, 16, 1, 0)
        ([2, 1], None)
    """
    count = round(abs(share) * size * num_processes)
    if share and not count:
        warn_once(
            f"redraw replaces nothing: {abs(share):.2%} of {size * num_processes} completions is less than one; "
            "generate more at a time, or raise knob_high and lower knob_low"
        )
    return count // num_processes + (rank < count % num_processes) if count else None


def check_redraw(trainer: Trainer) -> None:
    """Refuse a trainer that cannot draw a second batch at another temperature.

    Raises:
        ValueError: what was got, and the remedy.
    """
    args, group = trainer.args, trainer.num_generations
    _check_groups("redraw", int(args.per_device_train_batch_size * args.steps_per_generation), group)
    if trainer.rollout_func is not None and not isinstance(trainer.rollout_func, Rollout):
        raise ValueError(
            "redraw samples at another temperature, which a rollout_func of your own is not told; use Rollout of "
            "isentropic.engines.trl.rollout, or another recipe"
        )
    if "temperature" in (args.generation_kwargs or {}):
        raise ValueError(
            f"redraw changes the sampling temperature, got generation_kwargs with a temperature of "
            f"{args.generation_kwargs['temperature']}, which would override it; set temperature in the config instead"
        )


def _check_groups(name: str, num_completions: int, group: int) -> None:
    if num_completions % group:
        raise ValueError(
            f"{name} needs whole groups on each process, got {num_completions} completions in groups of "
            f"{group}; make per_device_train_batch_size * steps_per_generation a multiple of num_generations"
        )


def _pairs(wanting: torch.Tensor, offered: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(wanting.nonzero()[:, 0].tolist(), offered.nonzero()[:, 0].tolist(), strict=False))


def _replace_groups(
    output: dict[str, Any], fresh: dict[str, Any], pairs: list[tuple[int, int]], group: int
) -> dict[str, Any]:
    """Copy whole groups of rows from one batch into another."""
    to = torch.tensor([t * group + i for t, _ in pairs for i in range(group)])
    source = torch.tensor([s * group + i for _, s in pairs for i in range(group)])
    return _replace_rows(output, fresh, to, source)


def _replace_rows(
    output: dict[str, Any], fresh: dict[str, Any], to: torch.Tensor, source: torch.Tensor
) -> dict[str, Any]:
    """Copy rows from one batch into another, padding both to one length."""
    if not len(to):
        return output
    if images := [name for name in _OF_IMAGES if output.get(name) is not None]:
        raise ValueError(
            f"dynamic_sampling and redraw replace a part of a generated batch, which is not possible with images, got "
            f"{images[0]}; leave them out"
        )
    rows = len(output["advantages"])
    merged = dict(output)
    for name, old in output.items():
        if not isinstance(old, torch.Tensor) or old.dim() == 0 or len(old) != rows:
            continue
        new = fresh[name]
        if old.dim() > 1 and old.shape[1] != new.shape[1]:
            width = max(old.shape[1], new.shape[1])
            old, new = (_widen(x, width, left=name in _LEFT_PADDED) for x in (old, new))
        old = old.clone()
        old[to.to(old.device)] = new[source.to(old.device)].to(old.dtype)
        merged[name] = old
    return merged


def _widen(x: torch.Tensor, width: int, left: bool) -> torch.Tensor:
    missing = width - x.shape[1]
    return pad(x, (missing, 0) if left else (0, missing))
