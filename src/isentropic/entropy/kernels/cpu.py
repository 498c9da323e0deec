"""The sweeps over the vocabulary in plain torch, for any device: each tile of logits is reduced to sums and discarded.

The vocabulary is the outer loop, so that a block of the weight is converted once for all rows, and a block of the
weight's gradient is complete when the block ends: neither the logits nor an fp32 copy of the weight is ever stored
whole. On a CPU each thread takes a range of rows or of vocabulary blocks and has one intra-op thread: a tile is too
small to be shared by threads that wait for one another on a busy machine. On an accelerator tiles are larger, there is
one thread, and no operation waits for a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .head import MASKED_LOGIT, Head, Rows, on_cpu

# A tile is 2 MB in fp32: a core's cache holds two of them and the block of the weight.
ROWS, COLUMNS = 256, 2048
# An accelerator's tile, 128 MB, must occupy all of its units.
WIDE_ROWS, WIDE_COLUMNS = 4096, 8192
EXCLUDED = -1e4  # an x whose exp(x) and exp(x)·x are 0


class HeadGradients(NamedTuple):
    """Gradients of the hidden states [n d], the weight [v d] and the bias [v]; None for those not requested."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class SampledLogits(NamedTuple):
    """The sampled tokens' raw logits: exact [n], and rounded to the half precision of the ``shifted`` arithmetic."""

    raw: Tensor
    half: Tensor | None


def spans(total: int, size: int) -> Iterator[slice]:
    """Split ``range(total)`` into slices of at most ``size``."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def tile_shape(head: Head) -> tuple[int, int]:
    """Rows and columns of a tile on the head's device: more rows if the vocabulary has fewer columns than a tile."""
    num_rows, num_columns = (ROWS, COLUMNS) if on_cpu(head.weight) else (WIDE_ROWS, WIDE_COLUMNS)
    return num_rows * num_columns // min(num_columns, max(1, len(head.weight))), num_columns


def run_threaded(work: Callable[[slice], Any], total: int, unit: int, on: Tensor) -> list[Any]:
    """Run ``work`` on slices of ``range(total)`` that are multiples of ``unit``, one slice per thread.

    There are as many slices as torch has intra-op threads; inside each, torch uses one. Away from the CPU there is one
    slice: other threads would use other streams of the device than the caller's.

    Args:
        on: a tensor on the device.
    """
    if not on_cpu(on):
        return [work(slice(0, total))]
    num_threads = min(torch.get_num_threads(), -(-total // unit))
    if num_threads <= 1:
        return [work(slice(0, total))]
    size = -(-total // (num_threads * unit)) * unit
    previous = torch.get_num_threads()

    def on_one_thread(span: slice) -> Any:
        torch.set_num_threads(1)
        with torch.no_grad():
            return work(span)

    try:
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(on_one_thread, spans(total, size)))
    finally:
        torch.set_num_threads(previous)


def final_logits(head: Head, raw: Tensor, inv_t: float | Tensor) -> Tensor:
    """Compute the logits ``z`` from raw logits ``h·w + b``."""
    z = raw * head.scale
    if head.softcap is not None:
        z = (z / head.softcap).tanh_() * head.softcap
    return z * inv_t


def sampled_logits(head: Head, rows: Rows) -> SampledLogits:
    """Compute ``h·w_a + b_a`` of the sampled tokens, summed over the shards."""
    size, wide = head.weight.shape[0], head.wide
    raw = torch.empty(rows.ids.shape, dtype=wide, device=rows.ids.device)
    local_ids = rows.ids.clamp(0, size - 1)
    for span in spans(len(rows.ids), ROWS if on_cpu(head.weight) else WIDE_ROWS):
        torch.sum(rows.hidden[span].to(wide) * head.weight[local_ids[span]].to(wide), -1, out=raw[span])
    if head.bias is not None:
        raw += head.bias[local_ids].to(wide).clamp_(min=MASKED_LOGIT)
    if head.shard is not None:
        raw = head.reduce(raw.masked_fill_((rows.ids < 0) | (rows.ids >= size), 0.0))
    dtype = rows.hidden.dtype
    half = head.arithmetic == "shifted" and dtype == head.weight.dtype and dtype.itemsize == 2
    return SampledLogits(raw, raw.to(dtype) if half else None)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with x: fp32, or float64; half-precision products on a CPU are slow or inexact."""
    return torch.promote_types(x.dtype, torch.float32)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``."""
    total.addmm_(a, b)


class Block(NamedTuple):
    """A block of the head in the dtype of the GEMM, and the id of its first row."""

    start: int
    weight: Tensor
    bias: Tensor | None


class Tiles:
    """Two tiles of scratch memory, and the methods that fill them with logits."""

    def __init__(self, head: Head, num_rows: int) -> None:
        self.head = head
        rows_per_tile, self.num_columns = tile_shape(head)
        size = min(rows_per_tile, num_rows) * min(self.num_columns, len(head.weight))
        self.x, self.e = (torch.empty(size, dtype=head.wide, device=head.weight.device) for _ in "xe")

    def blocks(self, columns: slice, half: bool = False) -> Iterator[Block]:
        """Yield blocks of the weight, in the wide dtype, or in their own if ``half``."""
        for span in spans(columns.stop - columns.start, self.num_columns):
            block_columns = slice(columns.start + span.start, columns.start + span.stop)
            weight = self.head.weight[block_columns]
            bias = (
                None
                if self.head.bias is None
                else self.head.bias[block_columns].to(self.head.wide).clamp(min=MASKED_LOGIT)
            )
            yield Block(block_columns.start, weight if half else weight.to(self.head.wide), bias)

    def logits(self, rows: Rows, sampled_half: Tensor | None, shift: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Compute ``x = z − shift`` of one tile, the sampled token's column included; return it and an empty tile.

        With ``sampled_half``, the raw logits y come from a half-precision GEMM of ``y − sampled_half``: their rounding
        error is proportional to the distance from the sampled token's logit, not to the logit.
        """
        head, size = self.head, (len(rows.ids), len(block.weight))
        x, e = (tile[: size[0] * size[1]].view(size) for tile in (self.x, self.e))
        inv_t = rows.inv_t[:, None] if isinstance(rows.inv_t, Tensor) else rows.inv_t
        scale = head.scale * inv_t if head.softcap is None else head.scale / head.softcap
        if sampled_half is None:
            hidden = rows.hidden.to(head.wide)
            hidden = hidden if isinstance(scale, float) and scale == 1.0 else hidden * scale
            torch.mm(hidden, block.weight.t(), out=x)
            if block.bias is not None:
                x += scale * block.bias
        else:
            difference = (-sampled_half)[:, None].expand(size).clone().addmm_(rows.hidden, block.weight.t())
            x.copy_(difference)
            x += sampled_half[:, None] if block.bias is None else sampled_half[:, None] + block.bias
            x *= scale
        if head.softcap is not None:
            x.tanh_().mul_(head.softcap * inv_t)
        return x.sub_(shift[:, None]), e


def set_sampled(rows: Rows, block: Block, tile: Tensor, values: Tensor | float) -> Tensor:
    """Write a value, one for all or [n], at the sampled tokens that lie inside a tile [n m], and return the tile."""
    column, last = rows.ids - block.start, tile.shape[1] - 1
    is_inside = ((column >= 0) & (column <= last))[:, None]
    column = column.clamp(0, last)[:, None]
    values = values.to(tile.dtype)[:, None] if isinstance(values, Tensor) else values
    # Indices of the sampled columns alone, by nonzero, would wait for the device.
    return tile.scatter_(1, column, torch.where(is_inside, values, tile.gather(1, column)))


def softcap_slope(head: Head, z: Tensor, rows: Rows) -> Tensor | float:
    """``∂cap/∂y = 1 − (T·z/softcap)²`` of the logits z of some rows, [n] or [n m]; 1 without a softcap."""
    if head.softcap is None:
        return 1.0
    inv_t = rows.inv_t
    if isinstance(inv_t, Tensor) and z.dim() == 2:
        inv_t = inv_t[:, None]
    return (z / (head.softcap * inv_t)).square_().neg_().add_(1.0)


def _fold(x: Tensor, e: Tensor, sums: Tensor) -> None:
    """Add a tile's row sums of e, e·x, e², e²·x and e²·x² to ``sums`` [5 n]; x is overwritten."""
    sums[0] += e.sum(-1)
    sums[2] += torch.linalg.vector_norm(e, dim=-1).double().square_()
    sums[1] += x.mul_(e).sum(-1)
    sums[4] += torch.linalg.vector_norm(x, dim=-1).double().square_()
    sums[3] += x.mul_(e).sum(-1)


def sweep(
    head: Head,
    rows: Rows,
    sampled: SampledLogits,
    shift: Tensor,
    exp_out: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Tensor:
    """Sum ``e, e·x, e², e²·x, e²·x²`` over this shard, ``x = z − shift``, ``e = exp x``, without the sampled token.

    Args:
        shift: [n] in the wide dtype.
        exp_out: [n v] receives e, 0 at the sampled token.
        weight_sum: [n d], to which ``Σ_v e·∂cap/∂y·w_v`` is added.

    Returns:
        [5 n] in float64, not finite for rows that overflowed.
    """
    sums = torch.zeros(5, len(rows.ids), dtype=torch.float64, device=shift.device)
    rows_per_tile, _ = tile_shape(head)

    def work(span: slice) -> None:
        tiles, size = Tiles(head, span.stop - span.start), len(head.weight)
        # weight_sum needs the weight in the wide dtype anyway.
        sampled_half = sampled.half if weight_sum is None else None
        for block in tiles.blocks(slice(0, size), sampled_half is not None):
            for tile_span in spans(span.stop - span.start, rows_per_tile):
                row_span = slice(span.start + tile_span.start, span.start + tile_span.stop)
                tile_rows, columns = rows.take(row_span), slice(block.start, block.start + len(block.weight))
                x, e = tiles.logits(
                    tile_rows, None if sampled_half is None else sampled_half[row_span], shift[row_span], block
                )
                set_sampled(tile_rows, block, x, EXCLUDED)
                torch.exp(x, out=e)
                if exp_out is not None:
                    exp_out[row_span, columns] = e
                if weight_sum is not None:
                    slope = 1.0 if head.softcap is None else softcap_slope(head, x + shift[row_span, None], tile_rows)
                    weight_sum[row_span].addmm_(e if head.softcap is None else e * slope, block.weight)
                _fold(x, e, sums[:, row_span])

    run_threaded(work, len(rows.ids), rows_per_tile, shift)
    return sums


def max_logits(head: Head, rows: Rows) -> Tensor:
    """The largest z of each row on this shard, [n] in the wide dtype."""
    max_z = torch.full(rows.ids.shape, -torch.inf, dtype=head.wide, device=rows.ids.device)
    tiles, no_shift, (rows_per_tile, _) = Tiles(head, len(rows.ids)), torch.zeros_like(max_z), tile_shape(head)
    for block in tiles.blocks(slice(0, len(head.weight))):
        for span in spans(len(rows.ids), rows_per_tile):
            x, _ = tiles.logits(rows.take(span), None, no_shift[span], block)
            max_z[span] = torch.maximum(max_z[span], x.amax(-1))
    return max_z


class Upstream(NamedTuple):
    """Incoming gradients of rows, for ``∂loss/∂z = g·(1[v=a] − π) − g_H·π·(log π + H)``, [n] each in the wide dtype.

    Attributes:
        log_z: log-normaliser.
        entropy: H.
        sampled_grad: the gradient of the sampled token's z.
        g, g_entropy: the gradients of log π(a) and of H; None if H has none.
    """

    log_z: Tensor
    entropy: Tensor
    sampled_grad: Tensor
    g: Tensor
    g_entropy: Tensor | None

    def take(self, index: slice | Tensor) -> Upstream:
        g_entropy = None if self.g_entropy is None else self.g_entropy[index]
        return Upstream(self.log_z[index], self.entropy[index], self.sampled_grad[index], self.g[index], g_entropy)


def _logit_gradient(head: Head, rows: Rows, upstream: Upstream, x: Tensor, e: Tensor, block: Block) -> Tensor:
    """Compute the gradient of the raw logits of a tile from ``x = log π``."""
    inv_t = rows.inv_t[:, None] if isinstance(rows.inv_t, Tensor) else rows.inv_t
    slope = None if head.softcap is None else softcap_slope(head, x + upstream.log_z[:, None], rows)
    torch.exp(x, out=e)
    if upstream.g_entropy is None:
        e.mul_(-upstream.g[:, None])
    else:
        x.add_(upstream.entropy[:, None]).mul_(-upstream.g_entropy[:, None]).sub_(upstream.g[:, None])
        e.mul_(x)
    set_sampled(rows, block, e, upstream.sampled_grad)
    if slope is not None:
        e.mul_(slope)
    factor = head.scale * inv_t
    return e if isinstance(factor, float) and factor == 1.0 else e.mul_(factor)


def gradients(head: Head, rows: Rows, upstream: Upstream, needs: tuple[bool, bool, bool]) -> HeadGradients:
    """Recompute every tile, turn it into the gradient of its logits, and multiply that by weight and hidden states.

    Args:
        needs: whether hidden, weight and bias need a gradient.

    Returns:
        The gradients of this shard: hidden in the wide dtype, weight and bias in their own.
    """
    wide, (rows_per_tile, columns_per_tile) = head.wide, tile_shape(head)
    weight_grad = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if needs[1] else None
    bias_grad = torch.empty_like(head.bias) if needs[2] and head.bias is not None else None

    def work(columns: slice) -> Tensor | None:
        hidden_grad = torch.zeros(rows.hidden.shape, dtype=wide, device=rows.ids.device) if needs[0] else None
        tiles = Tiles(head, len(rows.ids))
        for block in tiles.blocks(columns):
            block_span = slice(block.start, block.start + len(block.weight))
            block_grad = torch.zeros_like(block.weight) if weight_grad is not None else None
            column_sum = torch.zeros_like(block.weight[:, 0])
            for span in spans(len(rows.ids), rows_per_tile):
                span_rows = rows.take(span)
                x, e = tiles.logits(span_rows, None, upstream.log_z[span], block)
                logit_grad = _logit_gradient(head, span_rows, upstream.take(span), x, e, block)
                if hidden_grad is not None:
                    hidden_grad[span].addmm_(logit_grad, block.weight)
                if block_grad is not None:
                    block_grad.addmm_(logit_grad.t(), span_rows.hidden.to(wide))
                if bias_grad is not None:
                    column_sum += logit_grad.sum(0)
            if weight_grad is not None and block_grad is not None:
                weight_grad[block_span] = block_grad
            if bias_grad is not None:
                bias_grad[block_span] = column_sum
        return hidden_grad

    hidden_grads = run_threaded(work, len(head.weight), columns_per_tile, head.weight)
    return HeadGradients(sum(hidden_grads[1:], hidden_grads[0]) if needs[0] else None, weight_grad, bias_grad)
