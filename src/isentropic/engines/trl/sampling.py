"""What TRL's generation step lacks: other baselines, and dynamic sampling that fills the batch again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from ...losses.advantages import informative_groups
from ...recipes.compose import advantages

MAX_ROUNDS = 10
_NATIVE_BASELINES = ("mean", "mean_std")
_LEFT_PADDED = ("prompt_ids", "prompt_mask")


def local_advantages(trainer: Any, output: dict[str, Any]) -> dict[str, Any]:
    """Attach this process's rewards, and replace the advantages where the recipe's baseline is not TRL's."""
    rewards = trainer._rewards
    size = len(output["advantages"])
    mine = slice(trainer.accelerator.process_index * size, (trainer.accelerator.process_index + 1) * size)
    output["rewards"] = rewards[mine].nan_to_num(nan=0.0)
    recipe = trainer.recipe
    named = getattr(trainer.args, "recipe", None) is not None
    if named and (recipe.baseline not in _NATIVE_BASELINES or recipe.overlong_buffer):
        output["advantages"] = advantages(recipe, rewards.view(-1, trainer.num_generations)).to(rewards.dtype)[mine]
    return output


def resample(
    trainer: Any, inputs: list[Any], output: dict[str, Any], generate: Callable[[list[Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Replace prompts whose answers all got one reward by fresh ones, in rounds of a whole batch (arXiv:2503.14476).

    Fresh prompts are drawn by (seed, optimizer step, round, rank), so that a resumed run draws the same. After
    ``MAX_ROUNDS`` what is left stays, with advantages of zero.

    Raises:
        ValueError: groups that span processes, or a dataset that cannot be indexed.
    """
    group, accelerator = trainer.num_generations, trainer.accelerator
    if len(inputs) % group:
        raise ValueError(
            f"dynamic_sampling needs whole groups on each process, got {len(inputs)} completions in groups of {group}; "
            "make per_device_train_batch_size * steps_per_generation a multiple of num_generations"
        )
    if not hasattr(trainer.train_dataset, "__getitem__"):
        raise ValueError("dynamic_sampling draws prompts by index, got an iterable dataset; load it whole")
    good = _informative(trainer)
    for turn in range(MAX_ROUNDS):
        if bool(good.all()):
            break
        draw = random.Random(f"{trainer.args.seed}/{trainer.state.global_step}/{turn}/{accelerator.process_index}")
        rows = [trainer.train_dataset[draw.randrange(len(trainer.train_dataset))] for _ in range(len(inputs) // group)]
        fresh = local_advantages(trainer, generate([row for row in rows for _ in range(group)]))
        trainer._generated += len(inputs) * accelerator.num_processes
        fresh_good = _informative(trainer)
        rank = accelerator.process_index
        takes = [_pairs(~g, f) for g, f in zip(good, fresh_good, strict=True)]
        output = _replace_groups(output, fresh, takes[rank], group)
        for row, pairs in zip(good, takes, strict=True):
            row[[to for to, _ in pairs]] = True
    mask = output["completion_mask"] * output.get("tool_mask", 1)
    output["num_items_in_batch"] = accelerator.gather(mask.sum()).sum()
    return output


def _informative(trainer: Any) -> torch.Tensor:
    """Which groups teach something, on every process: ``[ranks, groups of a rank]``, on the CPU."""
    keep = informative_groups(trainer._rewards.view(-1, trainer.num_generations)).cpu()
    return keep.view(trainer.accelerator.num_processes, -1)


def _pairs(wanting: torch.Tensor, offered: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(wanting.nonzero()[:, 0].tolist(), offered.nonzero()[:, 0].tolist(), strict=False))


def _replace_groups(
    output: dict[str, Any], fresh: dict[str, Any], pairs: list[tuple[int, int]], group: int
) -> dict[str, Any]:
    """Copy whole groups of rows from one batch into another, padding both to one length."""
    if not pairs:
        return output
    to = torch.tensor([t * group + i for t, _ in pairs for i in range(group)])
    source = torch.tensor([s * group + i for _, s in pairs for i in range(group)])
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
