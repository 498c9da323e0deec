"""``fused_policy_loss``: a loss on the statistics of sampled tokens, forward and backward in three GEMMs.

The sweep over a chunk of rows stores e, unnormalised, in one buffer. The loss of these rows and its gradients follow at
once: with ``e_a := −Σ_{v≠a} e`` the gradient of the logits through log π(a) is ``−(g/(T·S))·e``, so that its row factor
multiplies the hidden states, and the only passes over the vocabulary that remain are the two GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...losses.reduce import SumCount, merge
from ...types import TokenStats
from . import cpu
from .closed_forms import RowStats, read_rows, stats_tuple
from .cpu import Upstream
from .head import Head, Rows, Shard, no_autocast
from .ops import Call, backend, fused_logp, prepare, rows_with_gradient, upstream_of

BUFFER = 2**27  # bytes of e stored at once
# The index of one chunk's tokens in any [b t] tensor: some sequences, or (sequence, token) pairs [1 m].
TokenIndex = slice | tuple[Tensor, Tensor]
LossFn = Callable[[TokenStats, Any], SumCount]


class FusedLoss(NamedTuple):
    """The loss as (sum, count), and the statistics [b t] it was computed from, without gradient."""

    loss: SumCount
    stats: TokenStats


class _Chunk(NamedTuple):
    """One chunk of the rows inside the mask.

    Attributes:
        span: the rows of the chunk.
        where: the index of its tokens in a [b t] tensor.
        shape: the shape of its statistics.
        positions: the positions of its rows in those statistics, flat; None if they fill them.
    """

    span: slice
    where: TokenIndex
    shape: tuple[int, int]
    positions: Tensor | None

    def unflatten(self, stats: tuple[Tensor, ...]) -> TokenStats:
        if self.positions is None:
            return TokenStats(*(values.reshape(self.shape) for values in stats))
        size = self.shape[0] * self.shape[1]
        return TokenStats(
            *(values.new_zeros(size).index_put((self.positions,), values).reshape(self.shape) for values in stats)
        )


def _chunks(call: Call, level: str, size: int) -> Iterator[_Chunk]:
    """Split the rows inside the mask, at any token or between sequences."""
    b, t = call.shape
    kept = torch.arange(b * t, device=call.rows.ids.device) if call.kept is None else call.kept
    if level == "token":
        for span in [*cpu.spans(len(kept), size)] or [slice(0, 0)]:
            chunk_kept = kept[span]
            yield _Chunk(span, ((chunk_kept // t)[None], (chunk_kept % t)[None]), (1, len(chunk_kept)), None)
        return
    ends = [(row + 1) * t for row in range(b)]
    if call.kept is not None:
        ends = torch.searchsorted(kept, torch.tensor(ends, device=kept.device)).tolist()
    first_row = start = 0
    for row in range(b):
        if row + 1 == b or ends[row + 1] - start > size:
            span = slice(start, ends[row])
            positions = None if call.kept is None else kept[span] - first_row * t
            yield _Chunk(span, slice(first_row, row + 1), (row + 1 - first_row, t), positions)
            first_row, start = row + 1, ends[row]


def _exp_to_gradient(
    head: Head, rows: Rows, row_stats: RowStats, upstream: Upstream, e: Tensor, block: cpu.Block
) -> Tensor:
    """Turn a block of e into the gradient of the raw logits divided by ``−scale/(T·S)``, in place."""
    sum_all = row_stats.sum_all.to(head.wide)
    if upstream.g_entropy is not None or head.softcap is not None:
        x = e.clamp_min(torch.finfo(torch.float32).tiny).log_()
        slope = cpu.softcap_slope(head, x + row_stats.shift[:, None], rows)
        if upstream.g_entropy is not None:
            offset = upstream.entropy + row_stats.shift - row_stats.log_z
            x.add_(offset[:, None]).mul_(upstream.g_entropy[:, None]).add_(upstream.g[:, None])
            e.mul_(x)
        else:
            e.mul_(upstream.g[:, None])
        e.mul_(slope)
    else:
        e.mul_(upstream.g[:, None])
    slope = cpu.softcap_slope(head, row_stats.sampled_z, rows)
    return cpu.set_sampled(rows, block, e, -sum_all * upstream.sampled_grad * slope)


def _accumulate_gradients(
    head: Head,
    rows: Rows,
    row_stats: RowStats,
    upstream: Upstream,
    e: Tensor,
    accumulators: tuple[Tensor, Tensor | None],
) -> Tensor:
    """Add the gradients of weight and bias to their accumulators, and return that of hidden [n d], all wide."""
    (weight_grad, bias_grad), sweeps = accumulators, backend(head)
    index = rows_with_gradient(upstream)
    if index is not None:
        rows, upstream = rows.take(index), upstream.take(index)
        row_stats = RowStats(row_stats.stats, *(values[index] for values in row_stats[1:]))
    is_row_scaling = upstream.g_entropy is None and head.softcap is None
    factor = -head.scale * rows.inv_t / row_stats.sum_all.to(head.wide)
    factor = factor * upstream.g if is_row_scaling else factor
    dtype, num_columns = sweeps.product_dtype(e), sweeps.tile_shape(head)[1]
    scaled = (rows.hidden.to(head.wide) * factor[:, None]).to(dtype)

    def work(columns: slice) -> Tensor:
        hidden_grad = torch.zeros_like(scaled, dtype=head.wide)
        for span in cpu.spans(columns.stop - columns.start, num_columns):
            block_span = slice(columns.start + span.start, columns.start + span.stop)
            block = cpu.Block(block_span.start, head.weight[block_span].to(dtype), None)
            block_grad = e[:, block_span] if index is None else e[index, block_span]
            block_grad = block_grad.to(dtype if is_row_scaling else head.wide)
            if is_row_scaling:
                cpu.set_sampled(rows, block, block_grad, -row_stats.sum_others)
            else:
                block_grad = _exp_to_gradient(head, rows, row_stats, upstream, block_grad, block).to(dtype)
            sweeps.accumulate(hidden_grad, block_grad, block.weight)
            sweeps.accumulate(weight_grad[block_span], block_grad.t(), scaled)
            if bias_grad is not None:
                bias_grad[block_span].addmv_(block_grad.t().to(head.wide), factor)
        return hidden_grad

    with no_autocast(head.weight):
        hidden_grads = cpu.run_threaded(work, len(head.weight), num_columns, head.weight)
    hidden_grad = sum(hidden_grads[1:], hidden_grads[0]).mul_(factor[:, None])
    if index is None:
        return hidden_grad
    return hidden_grad.new_zeros(len(e), hidden_grad.shape[1]).index_copy_(0, index, hidden_grad)


def _loss_gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of a loss with respect to its leaves; None for leaves it does not depend on."""
    return torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None, None)


class _FusedLoss(torch.autograd.Function):
    """The loss and its gradients, both computed in the forward; the backward scales them by the incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call, chunks: list, loss_fn: LossFn
    ) -> tuple[Tensor, ...]:
        rows = call.rows._replace(hidden=hidden)
        head = call.head._replace(weight=weight, bias=bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        grads = (
            torch.zeros_like(weight, dtype=head.wide),
            None if bias is None else torch.zeros_like(bias, dtype=head.wide),
        )
        hidden_grad = torch.empty(hidden.shape, dtype=head.wide, device=hidden.device)
        stats_out = torch.zeros(5, len(hidden), dtype=head.wide, device=hidden.device)
        max_rows = max((chunk.span.stop - chunk.span.start for chunk in chunks), default=0)
        # fp16 cannot hold e.
        buffer_dtype = hidden.dtype if hidden.dtype == torch.bfloat16 else head.wide
        buffer = torch.empty(max_rows, len(weight), dtype=buffer_dtype, device=hidden.device)
        total = count = torch.zeros((), dtype=head.wide, device=hidden.device)
        for chunk in chunks:
            chunk_rows = rows.take(chunk.span)
            exp_out = buffer[: len(chunk_rows.ids)]
            row_stats = read_rows(backend(head), head, chunk_rows, exp_out=exp_out)
            with torch.enable_grad():
                stats = stats_tuple(row_stats.stats)
                leaves = [x.detach().requires_grad_() for x in stats[:2]]
                loss = loss_fn(chunk.unflatten((*leaves, *stats[2:])), chunk.where)
                upstream = upstream_of(row_stats, *_loss_gradients(loss.sum, leaves))
            total, count = total + loss.sum.detach(), count + loss.count.detach()
            stats_out[:, chunk.span] = torch.stack(stats)
            hidden_grad[chunk.span] = _accumulate_gradients(head, chunk_rows, row_stats, upstream, exp_out, grads)
        ctx.grads = [head.reduce(hidden_grad), *grads]
        stats_out = tuple(stats_out)
        ctx.mark_non_differentiable(count, *stats_out)
        ctx.set_materialize_grads(False)
        return total, count, *stats_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        g, grads = grad_outputs[0], ctx.grads
        if g is None:
            return (None,) * 6
        if grads is None:
            raise RuntimeError("a fused loss goes backward once: its gradients are used up; compute the loss again")
        ctx.grads, input_grads = None, []
        for dtype in ctx.dtypes:  # each wide gradient is freed before the next is converted
            grad = grads.pop(0)
            input_grads.append(None if grad is None else grad.mul_(g).to(dtype))
        return *input_grads, None, None, None


def fused_policy_loss(
    hidden: Shaped[Tensor, "..."],
    weight: Shaped[Tensor, "..."],
    ids: Shaped[Tensor, "..."],
    loss_fn: LossFn,
    temperature: float | Float[Tensor, "..."] = 1.0,
    *,
    level: str = "sequence",
    mask: Shaped[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    shard: Shard | None = None,
) -> FusedLoss:
    """Compute a loss on the statistics of sampled tokens, together with its gradients, in three GEMMs.

    ``Σ_chunks loss_fn(stats, where)``, ``loss_fn`` differentiable by log π(a) and H

    The loss of a chunk of rows is known as soon as their statistics are, so e is stored for these rows only, and the
    logits are never recomputed. Besides the gradients, memory holds 128 MB of e and, for a half-precision weight, the
    fp32 sums of its gradient. For a frozen head :func:`fused_logp` needs only two GEMMs and is used instead.

    Args:
        hidden: [b t d] final hidden states.
        weight, temperature, mask, bias, softcap, scale, shard: as in :func:`token_stats`; ``exact`` arithmetic.
        ids: [b t] sampled tokens.
        loss_fn: ``(stats, where) -> SumCount``. ``stats`` holds some of the tokens, log π(a) and H with a gradient;
            ``x[where]`` are the same tokens of any [b t] tensor x. The count must not depend on the statistics.
        level: how the batch is split. ``sequence`` splits it between sequences: stats are [b' t], 0 outside the mask,
            and any reduction of :mod:`isentropic.losses.reduce` and any sequence ratio is right. ``token`` splits it at
            any token: stats are [1 m], without the masked tokens, which suits losses of single tokens under
            ``reduce.token``, for sequences of any length.

    Returns:
        The loss as (sum, count), the sum with its gradient, to be divided once all micro-batches and ranks are added;
        and the statistics [b t].

    Raises:
        ValueError: as for :func:`token_stats`, or the level is unknown.
        RuntimeError: a second backward through one loss.

    The loss of a recipe can be the loss_fn. Quantities that a recipe computes over the whole batch, such as the mean of
    ``repo_d``, are computed over a chunk here.

    >>> from isentropic import TokenBatch, compose
    >>> from isentropic.recipes import loss
    >>> hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    >>> ids, adv, mask = torch.randint(7, (2, 3)), torch.tensor([[1.0], [-1.0]]), torch.ones(2, 3)
    >>> def grpo(stats, where):
    ...     batch = TokenBatch(stats.logp, None, adv[where], mask[where], stats.entropy)
    ...     return loss(compose("grpo"), batch)[0]
    >>> out = fused_policy_loss(hidden, weight, ids, grpo)
    >>> out.loss.mean().backward()
    >>> out.loss.count, weight.grad.shape
    (tensor(2.), torch.Size([7, 4]))
    """
    if level not in ("sequence", "token"):
        raise ValueError(f"level must be 'sequence' or 'token', got {level!r}; sequence is right for every loss")
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be [b t d], got {[*hidden.shape]}; loose tokens are [1 n d] with level='token'")
    call = prepare(hidden, weight, ids, temperature, mask, bias, softcap, scale, "exact", shard)
    head, rows = call.head, call.rows
    size = max(1, BUFFER // (head.weight.shape[0] * (2 if hidden.dtype == torch.bfloat16 else head.wide.itemsize)))
    chunks = list(_chunks(call, level, size))
    trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if trained and torch.is_grad_enabled():
        total, count, *stats = _FusedLoss.apply(rows.hidden, head.weight, head.bias, call, chunks, loss_fn)
        return FusedLoss(SumCount(total, count), call.unflatten(tuple(stats)))
    fused = fused_logp(
        hidden, weight, ids, temperature, mask=mask, bias=bias, softcap=softcap, scale=scale, shard=shard
    )
    flat = [values.reshape(-1) if call.kept is None else values.reshape(-1)[call.kept] for values in stats_tuple(fused)]
    losses = [loss_fn(chunk.unflatten(tuple(values[chunk.span] for values in flat)), chunk.where) for chunk in chunks]
    return FusedLoss(merge(*losses), TokenStats(*(values.detach() for values in stats_tuple(fused))))
