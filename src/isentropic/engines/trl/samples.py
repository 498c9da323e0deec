"""The few completions of a generated batch that samples.jsonl keeps, with surprisal and entropy by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...types import TokenBatch

_KEPT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "rewards")


class Samples:
    """Up to ``wanted`` completions of the latest generated batch, on the device until they are written."""

    def __init__(self, wanted: int):
        self.wanted = wanted
        self.kept: list[dict[str, torch.Tensor]] = []
        self.written = False

    def clear(self) -> None:
        """A new batch was generated."""
        self.kept, self.written = [], False

    def keep(self, inputs: dict[str, Any], batch: TokenBatch, entropy: torch.Tensor) -> None:
        """Copy the first rows of a micro-batch, while some are wanted."""
        rows = slice(0, self.wanted - len(self.kept))
        if rows.stop <= 0:
            return
        kept = {name: inputs[name][rows].detach().clone() for name in _KEPT if name in inputs}
        kept |= {"logp": batch.logp[rows], "entropy": entropy[rows], "mask": batch.mask[rows]}
        self.kept += [{name: value[i] for name, value in kept.items()} for i in range(len(kept["mask"]))]

    def rows(self, step: int, decode: Callable[..., str]) -> list[dict[str, Any]]:
        """Rows of samples.jsonl, once for each batch."""
        if self.written:
            return []
        self.written = bool(self.kept)
        return [_row(sample, step, decode) for sample in self.kept]


def _row(sample: dict[str, torch.Tensor], step: int, decode: Callable[..., str]) -> dict[str, Any]:
    keep = sample["mask"].bool()
    ids = sample["completion_ids"][keep].tolist()
    # The environment's words belong to the text, but have no surprisal.
    whole = sample["completion_ids"][sample["completion_mask"].bool()].tolist()
    prompt = sample["prompt_ids"][sample["prompt_mask"].bool()].tolist()
    return {
        "step": step,
        "prompt": decode(prompt, skip_special_tokens=True),
        "completion": decode(whole, skip_special_tokens=True),
        "reward": sample["rewards"].item() if "rewards" in sample else None,
        "advantage": sample["advantages"].mean().item(),
        "tokens": [decode([i]) for i in ids],
        "surprisal": [round(-x, 4) for x in sample["logp"][keep].tolist()],
        "entropy": [round(x, 4) for x in sample["entropy"][keep].tolist()],
    }
