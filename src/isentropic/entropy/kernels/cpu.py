"""The sweeps over the vocabulary in plain torch: a tile of logits is made, folded into row sums, and forgotten.

The vocabulary is the outer loop, so that a block of the weight is converted once for all rows, and a block of the
weight's gradient is complete when the block ends: neither the logits nor an fp32 copy of the weight is ever held.
Threads are coarse, one for a run of rows or of vocabulary blocks, each with one intra-op thread: a tile is too small
to be shared by threads that wait for one another on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .head import NEVER, Head, Rows

# A tile: 2 MB in fp32, two of which a core's cache holds beside the block of the weight.
ROWS, COLUMNS = 256, 2048
OUTSIDE = -1e4  # exp is 0 there, and so is exp(x)·x


class Gradients(NamedTuple):
    """Gradients of the hidden states [n d], the weight [v d] and the bias [v]; None where nobody asked."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Near(NamedTuple):
    """The sampled tokens' raw logits: exact [n], and rounded to the half precision they are subtracted in."""

    raw: Tensor
    half: Tensor | None


def spans(total: int, size: int) -> Iterator[slice]:
    """Cut ``range(total)`` into slices of at most size."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def tile_rows(head: Head) -> int:
    """Rows of a tile: more where the vocabulary has fewer columns than a tile."""
    return ROWS * COLUMNS // min(COLUMNS, max(1, len(head.weight)))


def coarsely(work: Callable[[slice], Any], total: int, unit: int) -> list[Any]:
    """Run ``work`` on coarse parts of ``range(total)``, whole units each, one part to a thread.

    As many parts as torch has intra-op threads; inside each torch has one.
    """
    num_threads = min(torch.get_num_threads(), -(-total // unit))
    if num_threads <= 1:
        return [work(slice(0, total))]
    size = -(-total // (num_threads * unit)) * unit
    before = torch.get_num_threads()

    def alone(part: slice) -> Any:
        torch.set_num_threads(1)
        with torch.no_grad():
            return work(part)

    try:
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(alone, spans(total, size)))
    finally:
        torch.set_num_threads(before)


def capped(head: Head, raw: Tensor, inv_t: float | Tensor) -> Tensor:
    """``z`` of raw logits ``h·w + b``."""
    z = raw * head.scale
    if head.softcap is not None:
        z = (z / head.softcap).tanh_() * head.softcap
    return z * inv_t


def sampled_raw(head: Head, rows: Rows) -> Near:
    """``h·w_a + b_a`` of the sampled tokens, added over the shards."""
    size, wide = head.weight.shape[0], head.wide
    raw = torch.empty(rows.ids.shape, dtype=wide, device=rows.ids.device)
    local = rows.ids.clamp(0, size - 1)
    for part in spans(len(rows.ids), ROWS):
        torch.sum(rows.hidden[part].to(wide) * head.weight[local[part]].to(wide), -1, out=raw[part])
    if head.bias is not None:
        raw += head.bias[local].to(wide).clamp_(min=NEVER)
    if head.shard is not None:
        raw = head.reduce(raw.masked_fill_((rows.ids < 0) | (rows.ids >= size), 0.0))
    dtype = rows.hidden.dtype
    half = head.arithmetic == "shifted" and dtype == head.weight.dtype and dtype.itemsize == 2
    return Near(raw, raw.to(dtype) if half else None)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype products of x are done in: fp32, or float64; half-precision products on a CPU are slow or inexact."""
    return torch.promote_types(x.dtype, torch.float32)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``."""
    total.addmm_(a, b)


class Block(NamedTuple):
    """A block of the head in the dtype of the GEMM, and where it begins."""

    start: int
    weight: Tensor
    bias: Tensor | None


class Tiles:
    """Two tiles of scratch memory, and what fills them with logits."""

    def __init__(self, head: Head, num_rows: int) -> None:
        self.head = head
        size = min(tile_rows(head), num_rows) * min(COLUMNS, len(head.weight))
        self.x, self.e = (torch.empty(size, dtype=head.wide, device=head.weight.device) for _ in "xe")

    def blocks(self, columns: slice, half: bool = False) -> Iterator[Block]:
        """Blocks of the weight, in fp32 or as they are."""
        for part in spans(columns.stop - columns.start, COLUMNS):
            here = slice(columns.start + part.start, columns.start + part.stop)
            weight = self.head.weight[here]
            bias = None if self.head.bias is None else self.head.bias[here].to(self.head.wide).clamp(min=NEVER)
            yield Block(here.start, weight if half else weight.to(self.head.wide), bias)

    def logits(self, rows: Rows, near: Tensor | None, shift: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """``x = z − shift`` of one tile, with the sampled token's own column where it is, and an empty tile.

        With ``near``, the raw logits are a half-precision GEMM of ``y − near``: rounded in proportion to the distance
        from the sampled token's logit rather than to the logit.
        """
        head, size = self.head, (len(rows.ids), len(block.weight))
        x, e = (tile[: size[0] * size[1]].view(size) for tile in (self.x, self.e))
        inv_t = rows.inv_t[:, None] if isinstance(rows.inv_t, Tensor) else rows.inv_t
        scale = head.scale * inv_t if head.softcap is None else head.scale / head.softcap
        if near is None:
            hidden = rows.hidden.to(head.wide)
            hidden = hidden if isinstance(scale, float) and scale == 1.0 else hidden * scale
            torch.mm(hidden, block.weight.t(), out=x)
            if block.bias is not None:
                x += scale * block.bias
        else:
            half = (-near)[:, None].expand(size).clone().addmm_(rows.hidden, block.weight.t())
            x.copy_(half)
            x += near[:, None] if block.bias is None else near[:, None] + block.bias
            x *= scale
        if head.softcap is not None:
            x.tanh_().mul_(head.softcap * inv_t)
        return x.sub_(shift[:, None]), e


def own_columns(rows: Rows, block: Block) -> tuple[Tensor, Tensor]:
    """Where in a tile the sampled tokens are: (row, column) pairs."""
    column = rows.ids - block.start
    row = ((column >= 0) & (column < len(block.weight))).nonzero()[:, 0]
    return row, column[row]


def slope_of(head: Head, z: Tensor, rows: Rows) -> Tensor | float:
    """``∂cap/∂y = 1 − (T·z/softcap)²`` of the logits z of some rows, [n] or [n m]; 1 without a softcap."""
    if head.softcap is None:
        return 1.0
    inv_t = rows.inv_t
    if isinstance(inv_t, Tensor) and z.dim() == 2:
        inv_t = inv_t[:, None]
    return (z / (head.softcap * inv_t)).square_().neg_().add_(1.0)


def _fold(x: Tensor, e: Tensor, sums: Tensor) -> None:
    """Add a tile's row sums of e, e·x, e², e²·x and e²·x² to ``sums`` [5 n]; x is used up."""
    sums[0] += e.sum(-1)
    sums[2] += torch.linalg.vector_norm(e, dim=-1).double().square_()
    sums[1] += x.mul_(e).sum(-1)
    sums[4] += torch.linalg.vector_norm(x, dim=-1).double().square_()
    sums[3] += x.mul_(e).sum(-1)


def sweep(
    head: Head, rows: Rows, near: Near, shift: Tensor, keep: Tensor | None = None, mean: Tensor | None = None
) -> Tensor:
    """Sum ``e, e·x, e², e²·x, e²·x²`` over this shard, ``x = z − shift``, ``e = exp x``, without the sampled token.

    Args:
        shift: [n] in the wide dtype.
        keep: [n v] takes e, 0 at the sampled token.
        mean: [n d] takes ``Σ_v e·∂cap/∂y·w_v`` (added to).

    Returns:
        [5 n] in float64, not finite in rows that overflowed.
    """
    sums = torch.zeros(5, len(rows.ids), dtype=torch.float64, device=shift.device)

    def work(part: slice) -> None:
        tiles, size = Tiles(head, part.stop - part.start), len(head.weight)
        # The mean needs the weight in the wide dtype anyhow.
        half = near.half if mean is None else None
        for block in tiles.blocks(slice(0, size), half is not None):
            for inner in spans(part.stop - part.start, tile_rows(head)):
                here = slice(part.start + inner.start, part.start + inner.stop)
                some, columns = rows.take(here), slice(block.start, block.start + len(block.weight))
                x, e = tiles.logits(some, None if half is None else half[here], shift[here], block)
                x[own_columns(some, block)] = OUTSIDE
                torch.exp(x, out=e)
                if keep is not None:
                    keep[here, columns] = e
                if mean is not None:
                    own_slope = 1.0 if head.softcap is None else slope_of(head, x + shift[here, None], some)
                    mean[here].addmm_(e if head.softcap is None else e * own_slope, block.weight)
                _fold(x, e, sums[:, here])

    coarsely(work, len(rows.ids), tile_rows(head))
    return sums


def largest(head: Head, rows: Rows) -> Tensor:
    """The largest z of each row on this shard, [n] in the wide dtype."""
    top = torch.full(rows.ids.shape, -torch.inf, dtype=head.wide, device=rows.ids.device)
    tiles, zero = Tiles(head, len(rows.ids)), torch.zeros_like(top)
    for block in tiles.blocks(slice(0, len(head.weight))):
        for here in spans(len(rows.ids), tile_rows(head)):
            x, _ = tiles.logits(rows.take(here), None, zero[here], block)
            top[here] = torch.maximum(top[here], x.amax(-1))
    return top


class Pull(NamedTuple):
    """What a row needs for ``∂loss/∂z = g·(1[v=a] − π) − g_H·π·(log π + H)``, [n] each in the wide dtype.

    ``log_z`` is the log-normaliser; ``own`` the gradient at the sampled token; g and g_H those of logp and of H.
    """

    log_z: Tensor
    entropy: Tensor
    own: Tensor
    g: Tensor
    g_entropy: Tensor | None

    def take(self, index: slice | Tensor) -> Pull:
        g_entropy = None if self.g_entropy is None else self.g_entropy[index]
        return Pull(self.log_z[index], self.entropy[index], self.own[index], self.g[index], g_entropy)


def _row_gradient(head: Head, some: Rows, pull: Pull, x: Tensor, e: Tensor, block: Block) -> Tensor:
    """The gradient of the raw logits of a tile, from ``x = log π``."""
    inv_t = some.inv_t[:, None] if isinstance(some.inv_t, Tensor) else some.inv_t
    slope = None if head.softcap is None else slope_of(head, x + pull.log_z[:, None], some)
    torch.exp(x, out=e)
    if pull.g_entropy is None:
        e.mul_(-pull.g[:, None])
    else:
        x.add_(pull.entropy[:, None]).mul_(-pull.g_entropy[:, None]).sub_(pull.g[:, None])
        e.mul_(x)
    own = own_columns(some, block)
    e[own] = pull.own[own[0]]
    if slope is not None:
        e.mul_(slope)
    factor = head.scale * inv_t
    return e if isinstance(factor, float) and factor == 1.0 else e.mul_(factor)


def gradients(head: Head, rows: Rows, pull: Pull, want: tuple[bool, bool, bool]) -> Gradients:
    """Recompute every tile, turn it into the gradient of its logits, and multiply that out.

    Args:
        want: whether hidden, weight and bias need a gradient.

    Returns:
        The gradients of this shard: hidden in the wide dtype, weight and bias in their own.
    """
    total, wide = len(head.weight), head.wide
    weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if want[1] else None
    bias = torch.empty_like(head.bias) if want[2] and head.bias is not None else None

    def work(columns: slice) -> Tensor | None:
        out = torch.zeros(rows.hidden.shape, dtype=wide, device=rows.ids.device) if want[0] else None
        tiles = Tiles(head, len(rows.ids))
        for block in tiles.blocks(columns):
            here = slice(block.start, block.start + len(block.weight))
            block_grad = torch.zeros_like(block.weight) if weight is not None else None
            column_sum = torch.zeros_like(block.weight[:, 0])
            for part in spans(len(rows.ids), tile_rows(head)):
                some = rows.take(part)
                x, e = tiles.logits(some, None, pull.log_z[part], block)
                grad = _row_gradient(head, some, pull.take(part), x, e, block)
                if out is not None:
                    out[part].addmm_(grad, block.weight)
                if block_grad is not None:
                    block_grad.addmm_(grad.t(), some.hidden.to(wide))
                if bias is not None:
                    column_sum += grad.sum(0)
            if weight is not None and block_grad is not None:
                weight[here] = block_grad
            if bias is not None:
                bias[here] = column_sum
        return out

    parts = coarsely(work, total, COLUMNS)
    return Gradients(sum(parts[1:], parts[0]) if want[0] else None, weight, bias)
