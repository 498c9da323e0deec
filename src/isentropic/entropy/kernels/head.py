"""A language-model head as the kernels see it: its parameters, its rows, and the checks before any heavy work.

A head turns a final hidden state h into ``z_v = cap(scale·(h·w_v + b_v)) / T`` with
``cap(y) = softcap·tanh(y/softcap)``, or the identity without a softcap. ``π = softmax(z)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

ARITHMETIC = ("exact", "shifted")
# The finite logit that replaces a bias of −∞, which masks a vocabulary entry: its e is 0, and 0·x stays 0.
MASKED_LOGIT = -1e30


class Shard(NamedTuple):
    """This process's shard of a vocabulary that is split over several processes.

    Attributes:
        start: the id of the first row of this process's weight.
        all_reduce: ``(tensor, "sum" or "max") -> tensor``, elementwise over the shards, with the same result on each.
            With torch.distributed this is a function of three lines: clone, ``dist.all_reduce``, return.
    """

    start: int
    all_reduce: Callable[[Tensor, str], Tensor]


class Head(NamedTuple):
    """A checked head: ``weight`` [v d], ``bias`` [v], ``wide`` the dtype of the arithmetic, fp32 or float64.

    ``shard`` is None if this process has the whole vocabulary.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    arithmetic: str
    shard: Shard | None
    wide: torch.dtype

    def reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Sum x, or take its maximum, over the shards; without shards, return x."""
        return x if self.shard is None else self.shard.all_reduce(x, op)


class Rows(NamedTuple):
    """The rows to compute: ``hidden`` [n d], ``ids`` [n] relative to the weight's first row, ``inv_t`` [n] or one."""

    hidden: Tensor
    ids: Tensor
    inv_t: float | Tensor

    def take(self, index: slice | Tensor) -> Rows:
        """Select rows."""
        inv_t = self.inv_t[index] if isinstance(self.inv_t, Tensor) else self.inv_t
        return Rows(self.hidden[index], self.ids[index], inv_t)


def full_tensor(parameter: Any) -> Any:
    """Gather a parameter that FSDP2 shards as a DTensor, with its gradient; return others unchanged."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def on_cpu(x: Tensor) -> bool:
    """Whether x is on the CPU, the only device whose small tiles and threads pay, and where reading a value is free."""
    return x.device.type == "cpu"


def no_autocast(x: Tensor) -> Any:
    """Disable autocast on x's device: the kernels choose the dtype of every product themselves."""
    return torch.autocast(x.device.type, enabled=False)


def check_shapes(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    """Raise if shapes or dtypes do not match."""
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden [... d] and weight [v d] must share d, got {[*hidden.shape]} and {[*weight.shape]}; "
            "pass the head's weight as nn.Linear stores it"
        )
    if ids.shape != hidden.shape[:-1]:
        raise ValueError(
            f"ids must be {[*hidden.shape[:-1]]}, one a hidden state, got {[*ids.shape]}; "
            "the state at position i predicts the token at i + 1: shift one of them"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {[*weight.shape[:1]]}, one per row of the weight, got {[*bias.shape]}")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"mask must be {[*ids.shape]}, as ids, got {[*mask.shape]}; one entry per token")
    for name, x in (("hidden", hidden), ("weight", weight)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be fp16, bf16, fp32 or float64, got {x.dtype}; dequantise it first")


def check_numbers(
    temperature: float | Tensor, ids: Tensor, softcap: float | None, scale: float, arithmetic: str
) -> None:
    """Raise if a setting is outside its range, or the ids are not integers."""
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    if isinstance(temperature, Tensor):
        if temperature.shape != ids.shape:
            raise ValueError(f"temperature must be a number or {[*ids.shape]}, as ids, got {[*temperature.shape]}")
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}; 1.0 leaves the logits as they are")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, got {softcap}; None leaves the logits uncapped")
    if scale == 0:
        raise ValueError("scale must not be 0, got 0; 1.0 leaves the logits as they are")
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETIC)}, got {arithmetic!r}")


def check_ids(ids: Tensor, num_rows: int, shard: Shard | None, masked: bool) -> None:
    """Refuse an id outside the vocabulary.

    With a mask on an accelerator, where the error's number would be waited for in every step, the device itself asserts
    it, as it does in torch's own indexing; the process then ends with "device-side assert triggered".

    Args:
        ids: [n] of the tokens that count.
        num_rows: v; other processes hold other ids if there is a shard, and then only negative ones are refused.
        shard: this process's part of the vocabulary.
        masked: whether a mask was given.

    Raises:
        ValueError: an id outside [0, v).
    """
    if ids.numel() == 0:
        return
    if masked and not on_cpu(ids):
        inside = (ids >= 0) if shard is not None else (ids >= 0) & (ids < num_rows)
        torch._assert_async(inside.all(), f"ids must be in [0, {num_rows}) where the mask is not 0")
        return
    smallest, largest = (int(x) for x in torch.stack(ids.aminmax()).tolist())
    if smallest < 0:
        where = "where the mask is not 0" if masked else "of padding"
        raise ValueError(
            f"ids must be in [0, {num_rows}), the rows of the weight, got {smallest} {where}; "
            + ("mask such tokens" if masked else "pass mask=ids >= 0, which leaves such tokens out")
        )
    if shard is None and largest >= num_rows:
        raise ValueError(
            f"ids must be in [0, {num_rows}), the rows of the weight, got {largest}; are they of this tokenizer?"
        )
