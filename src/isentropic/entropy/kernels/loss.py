"""``fused_policy_loss``: a loss on the statistics of sampled tokens, forward and backward in three GEMMs.

A run of rows is swept with its e kept, unnormalised, in one buffer. The loss of these rows is then computed, and its
gradient by log π(a) multiplied out at once: with ``e_a := −Σ_{v≠a} e`` the gradient of the logits is ``−(g/T·S)·e``,
so its row factor goes onto the hidden states and no pass over the vocabulary is left but the two GEMMs.
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
from .closed import Reading, present, read
from .cpu import Pull
from .head import Head, Rows, Shard, unmixed
from .ops import Call, backend, fused_logp, prepare, pull_of, pulled

BUFFER = 2**27  # bytes of e kept at once
# What indexes any [b t] tensor to give the tokens of one call: some sequences, or (sequence, token) pairs [1 m].
Where = slice | tuple[Tensor, Tensor]
LossFn = Callable[[TokenStats, Any], SumCount]


class FusedLoss(NamedTuple):
    """The loss as (sum, count), and the statistics [b t] it was computed from, without gradient."""

    loss: SumCount
    stats: TokenStats


class _Chunk(NamedTuple):
    """Rows ``span`` of the kept ones, which belong to ``where`` in [b t] and fill ``holes`` of its statistics."""

    span: slice
    where: Where
    shape: tuple[int, int]
    holes: Tensor | None

    def spread(self, stats: tuple[Tensor, ...]) -> TokenStats:
        if self.holes is None:
            return TokenStats(*(x.reshape(self.shape) for x in stats))
        size = self.shape[0] * self.shape[1]
        return TokenStats(*(x.new_zeros(size).index_put((self.holes,), x).reshape(self.shape) for x in stats))


def _chunks(call: Call, level: str, size: int) -> Iterator[_Chunk]:
    """Cut the kept rows, at any token or between sequences."""
    b, t = call.shape
    kept = torch.arange(b * t, device=call.rows.ids.device) if call.kept is None else call.kept
    if level == "token":
        for span in [*cpu.spans(len(kept), size)] or [slice(0, 0)]:
            here = kept[span]
            yield _Chunk(span, ((here // t)[None], (here % t)[None]), (1, len(here)), None)
        return
    ends = torch.searchsorted(kept, torch.arange(1, b + 1, device=kept.device) * t).tolist()
    first = start = 0
    for row in range(b):
        if row + 1 == b or ends[row + 1] - start > size:
            span = slice(start, ends[row])
            holes = None if call.kept is None else kept[span] - first * t
            yield _Chunk(span, slice(first, row + 1), (row + 1 - first, t), holes)
            first, start = row + 1, ends[row]


def _unnormalised(head: Head, rows: Rows, reading: Reading, pull: Pull, e: Tensor, block: cpu.Block) -> Tensor:
    """Turn a block of e into the gradient of the raw logits over ``−scale/(T·S)``, in place."""
    own = cpu.own_columns(rows, block)
    total = reading.total.to(head.wide)
    if pull.g_entropy is not None or head.softcap is not None:
        x = e.clamp_min(torch.finfo(torch.float32).tiny).log_()
        slope = cpu.slope_of(head, x + reading.shift[:, None], rows)
        if pull.g_entropy is not None:
            level = pull.entropy + reading.shift - reading.log_z
            x.add_(level[:, None]).mul_(pull.g_entropy[:, None]).add_(pull.g[:, None])
            e.mul_(x)
        else:
            e.mul_(pull.g[:, None])
        e.mul_(slope)
    else:
        e.mul_(pull.g[:, None])
    e[own] = (-total * pull.own * cpu.slope_of(head, reading.own, rows))[own[0]]
    return e


def _multiply_out(
    head: Head, rows: Rows, reading: Reading, pull: Pull, e: Tensor, grads: tuple[Tensor, Tensor | None]
) -> Tensor:
    """Add the gradients of weight and bias to their accumulators, and return that of hidden [n d], all wide."""
    (weight, bias), on = grads, backend(head.weight)
    some = pulled(pull)
    if some is not None:
        rows, pull = rows.take(some), pull.take(some)
        reading = Reading(reading.stats, *(x[some] for x in reading[1:]))
    plain = pull.g_entropy is None and head.softcap is None
    factor = -head.scale * rows.inv_t / reading.total.to(head.wide)
    factor = factor * pull.g if plain else factor
    dtype = on.product_dtype(e)
    scaled = (rows.hidden.to(head.wide) * factor[:, None]).to(dtype)

    def work(columns: slice) -> Tensor:
        out = torch.zeros_like(scaled, dtype=head.wide)
        for part in cpu.spans(columns.stop - columns.start, on.COLUMNS):
            here = slice(columns.start + part.start, columns.start + part.stop)
            block = cpu.Block(here.start, head.weight[here].to(dtype), None)
            grad = e[:, here] if some is None else e[some, here]
            grad = grad.to(dtype if plain else head.wide)
            if plain:
                own = cpu.own_columns(rows, block)
                grad[own] = -reading.others.to(grad.dtype)[own[0]]
            else:
                grad = _unnormalised(head, rows, reading, pull, grad, block).to(dtype)
            on.accumulate(out, grad, block.weight)
            on.accumulate(weight[here], grad.t(), scaled)
            if bias is not None:
                bias[here].addmv_(grad.t().to(head.wide), factor)
        return out

    with unmixed(head.weight):
        parts = cpu.coarsely(work, len(head.weight), on.COLUMNS)
    hidden = sum(parts[1:], parts[0]).mul_(factor[:, None])
    if some is None:
        return hidden
    return hidden.new_zeros(len(e), hidden.shape[1]).index_copy_(0, some, hidden)


def _slopes(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradient of a loss by its leaves, None where it has none."""
    return torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None, None)


class _FusedLoss(torch.autograd.Function):
    """The loss and, made in the forward, its gradients; the backward scales them by what comes in."""

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
        outs = torch.zeros(5, len(hidden), dtype=head.wide, device=hidden.device)
        most = max((chunk.span.stop - chunk.span.start for chunk in chunks), default=0)
        # fp16 cannot hold e.
        kept_in = hidden.dtype if hidden.dtype == torch.bfloat16 else head.wide
        buffer = torch.empty(most, len(weight), dtype=kept_in, device=hidden.device)
        total = count = torch.zeros((), dtype=head.wide, device=hidden.device)
        for chunk in chunks:
            some = rows.take(chunk.span)
            keep = buffer[: len(some.ids)]
            reading = read(backend(weight), head, some, keep=keep)
            with torch.enable_grad():
                stats = present(reading.stats)
                leaves = [x.detach().requires_grad_() for x in stats[:2]]
                loss = loss_fn(chunk.spread((*leaves, *stats[2:])), chunk.where)
                pull = pull_of(reading, *_slopes(loss.sum, leaves))
            total, count = total + loss.sum.detach(), count + loss.count.detach()
            outs[:, chunk.span] = torch.stack(stats)
            hidden_grad[chunk.span] = _multiply_out(head, some, reading, pull, keep, grads)
        ctx.grads = [head.reduce(hidden_grad), *grads]
        outs = tuple(outs)
        ctx.mark_non_differentiable(count, *outs)
        ctx.set_materialize_grads(False)
        return total, count, *outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        g, grads = grad_outputs[0], ctx.grads
        if g is None:
            return (None,) * 6
        if grads is None:
            raise RuntimeError("a fused loss goes backward once: its gradients are used up; compute the loss again")
        ctx.grads, made = None, []
        for dtype in ctx.dtypes:  # each wide one goes before the next is converted
            x = grads.pop(0)
            made.append(None if x is None else x.mul_(g).to(dtype))
        return *made, None, None, None


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
    """Compute a loss on the statistics of sampled tokens, and its gradients on the way, in three GEMMs.

    ``Σ_chunks loss_fn(stats, where)``, ``loss_fn`` differentiable by log π(a) and H

    The loss of a run of rows is known as soon as their statistics are, so e needs to be kept for these rows only, and
    the logits are never made again. Beside the gradients, 128 MB of e and, for a half-precision weight, the fp32 sums
    of its gradient are held. With a frozen head :func:`fused_logp` does better, with two GEMMs, and is taken.

    Args:
        hidden: [b t d] final hidden states.
        weight, temperature, mask, bias, softcap, scale, shard: as in :func:`token_stats`; ``exact`` arithmetic.
        ids: [b t] sampled tokens.
        loss_fn: ``(stats, where) -> SumCount``. ``stats`` holds some of the tokens, log π(a) and H with a gradient;
            ``x[where]`` are the same tokens of any [b t] tensor x. The count must not depend on the statistics.
        level: where the batch is cut. ``sequence``: between sequences, so stats are [b' t], 0 outside the mask, and any
            reduction of :mod:`isentropic.losses.reduce` and any sequence ratio is right. ``token``: anywhere, so stats are
            [1 m] without the masked ones: for losses of single tokens under ``reduce.token``, whatever their length.

    Returns:
        The loss as (sum, count), the sum with its gradient, to be divided once all micro-batches and ranks are added;
        and the statistics [b t].

    Raises:
        ValueError: shapes, dtypes, ids, numbers or a level that do not fit.
        RuntimeError: a second backward through one loss.

    A recipe is a loss_fn. What a recipe takes from the whole batch, such as the mean of ``repo_d``, it takes from a
    chunk here.

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
        return FusedLoss(SumCount(total, count), call.spread(tuple(stats)))
    found = fused_logp(
        hidden, weight, ids, temperature, mask=mask, bias=bias, softcap=softcap, scale=scale, shard=shard
    )
    flat = [x.reshape(-1) if call.kept is None else x.reshape(-1)[call.kept] for x in present(found)]
    losses = [loss_fn(chunk.spread(tuple(x[chunk.span] for x in flat)), chunk.where) for chunk in chunks]
    return FusedLoss(merge(*losses), TokenStats(*(x.detach() for x in present(found))))
