"""``token_stats`` and ``fused_logp``: the statistics of sampled tokens from final hidden states, without logits."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...types import TokenStats
from . import cpu
from .closed_forms import RowStats, read_rows, stats_tuple
from .cpu import Upstream
from .head import Head, Rows, Shard, check_ids, check_numbers, check_shapes, full_tensor, no_autocast, on_cpu

# CUDA devices, by compute capability, on which bench/gpu.py has compared the Triton sweeps with float64.
TRITON_TESTED: frozenset[tuple[int, int]] = frozenset()


def backend(head: Head) -> Any:
    """The module with the sweeps: Triton's on a device where it was tested, else plain torch, which runs on any.

    Triton's sweeps are in fp32; float64 takes plain torch.
    """
    if head.weight.is_cuda and head.wide == torch.float32:
        if torch.cuda.get_device_capability(head.weight.device) not in TRITON_TESTED:
            return cpu
        try:
            from . import triton  # pyrefly: ignore[missing-module-attribute]
        except ModuleNotFoundError:
            return cpu
        return triton
    return cpu


class Call(NamedTuple):
    """The checked arguments of a call.

    Attributes:
        head: the head.
        rows: the rows inside the mask, flat.
        kept: their positions in the flat ids; None if the mask keeps all.
        shape: the shape of the ids.
    """

    head: Head
    rows: Rows
    kept: Tensor | None
    shape: torch.Size

    def unflatten(self, stats: tuple[Tensor, ...]) -> TokenStats:
        """Return [n] statistics in the shape of the ids, 0 outside the mask."""
        if self.kept is None:
            return TokenStats(*(values.reshape(self.shape) for values in stats))
        scattered = [values.new_zeros(self.shape.numel()).index_put((self.kept,), values) for values in stats]
        return TokenStats(*(values.reshape(self.shape) for values in scattered))


def prepare(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    arithmetic: str,
    shard: Shard | None,
) -> Call:
    """Check the arguments, flatten them, and select the rows inside the mask."""
    check_shapes(hidden, weight, ids, bias, mask)
    check_numbers(temperature, ids, softcap, scale, arithmetic)
    weight, bias = full_tensor(weight), full_tensor(bias)
    device = hidden.device.type
    if not on_cpu(hidden) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if arithmetic == "shifted" and (not on_cpu(hidden) or hidden.dtype != weight.dtype or hidden.dtype.itemsize != 2):
        warnings.warn(
            f"arithmetic='shifted' has no effect on {hidden.dtype} hidden states and a {weight.dtype} weight on "
            f"{device}; it is for half-precision inputs on a CPU: leave it out",
            stacklevel=3,
        )
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    flat_hidden, flat_ids = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1).long()
    inv_t = 1.0 / temperature.to(wide).reshape(-1) if isinstance(temperature, Tensor) else 1.0 / temperature
    rows, kept = Rows(flat_hidden, flat_ids, inv_t), None
    if mask is not None:
        kept = mask.reshape(-1).bool().nonzero()[:, 0]
        kept = kept if len(kept) < len(flat_ids) else None
        rows = rows if kept is None else rows.take(kept)
    check_ids(rows.ids, weight.shape[0], shard, mask is not None)
    rows = rows._replace(ids=rows.ids - (shard.start if shard else 0))
    head = Head(weight, bias, softcap, float(scale), arithmetic, shard, wide)
    return Call(head, rows, kept, ids.shape)


@torch.no_grad()
def token_stats(
    hidden: Shaped[Tensor, "..."],
    weight: Shaped[Tensor, "..."],
    ids: Shaped[Tensor, "..."],
    temperature: float | Float[Tensor, "..."] = 1.0,
    *,
    mask: Shaped[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    arithmetic: str = "exact",
    shard: Shard | None = None,
) -> TokenStats:
    """Compute the statistics of sampled tokens from the hidden states, in one pass over the head, without a gradient.

    ``log π(a)``, ``H``, ``Σ π²``, ``Σ π² log π``, ``Σ π² log² π`` with ``π = softmax(z)``,
    ``z_v = softcap·tanh(scale·(h·w_v + b_v)/softcap) / temperature``, or without the tanh

    Besides the result, a few tiles and blocks are stored, some 20 MB, or 300 MB on an accelerator, and never [n v]
    logits. Use it for old and reference log-probabilities, for metrics and for :mod:`isentropic.entropy.prediction`.
    :func:`fused_logp` is the same with a gradient.

    Args:
        hidden: [... d] final hidden states, after the last norm, in fp16, bf16, fp32 or float64.
        weight: [v d] the head's weight; may be tied, a DTensor, or of another dtype than hidden.
        ids: [...] sampled tokens, in [0, v); where the mask is 0, anything, such as the −100 of padding.
        temperature: the sampling temperature, a number or [...] by token.
        mask: [...] non-zero where the token counts. Other tokens are not computed, may have any value, and return 0.
        bias: [v]; −inf masks a vocabulary entry.
        softcap: cap of the logits, as in Gemma 2.
        scale: factor of the logits before the cap.
        arithmetic: ``exact``, fp32 logits (float64 for float64 inputs); or ``shifted``, for half-precision inputs on a
            CPU with half-precision instructions: the GEMM runs in half precision on logits minus the sampled token's,
            with an error of some 2e-3 nats in log π, against 2e-2 with plain half-precision logits.
        shard: this process's part of a vocabulary that is split over processes, and how to reduce over all of them.

    Returns:
        The statistics, [...] each, in fp32, or in float64 if hidden or weight is.

    Raises:
        ValueError: shapes or dtypes do not match, or an id or a number is outside its range. On an accelerator an id
            inside the mask is asserted by the device, so that nothing waits for it.

    The shift by the sampled token's logit and the one-pass sums are ours.

    >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 20.0], [0.0, 0.0], [0.0, 0.0]])
    >>> stats = token_stats(hidden, weight, torch.tensor([1, 0]))
    >>> stats.logp, stats.entropy, stats.sum_p2  # −log 3, log 3, ⅓; and an almost certain token
    (tensor([-1.0986e+00, -4.1223e-09]), tensor([1.0986e+00, 8.6568e-08]), tensor([0.3333, 1.0000]))
    """
    call = prepare(hidden, weight, ids, temperature, mask, bias, softcap, scale, arithmetic, shard)
    return call.unflatten(stats_tuple(read_rows(backend(call.head), call.head, call.rows).stats))


def upstream_of(row_stats: RowStats, g: Tensor | None, g_entropy: Tensor | None) -> Upstream:
    """Collect the incoming gradients of each row; that of the sampled token keeps its precision as π(a) → 1."""
    stats, wide = row_stats.stats, row_stats.log_z.dtype
    g = torch.zeros_like(row_stats.log_z) if g is None else g.to(wide)
    sampled_grad = g * (row_stats.sum_others / row_stats.sum_all).to(wide)
    if g_entropy is not None:
        g_entropy = g_entropy.to(wide)
        p = stats.logp.exp()
        sampled_grad = sampled_grad - g_entropy * p * torch.where(p == 0, 0.0, stats.logp + stats.entropy)
    return Upstream(row_stats.log_z, stats.entropy, sampled_grad, g, g_entropy)


def rows_with_gradient(upstream: Upstream) -> Tensor | None:
    """The rows with a non-zero gradient, or None if most have one: zero advantages and clipped tokens cost nothing."""
    if not on_cpu(upstream.g):
        return None  # counting them would synchronise with the device
    has_gradient = upstream.g != 0
    if upstream.g_entropy is not None:
        has_gradient |= upstream.g_entropy != 0
    rows = has_gradient.nonzero()[:, 0]
    return rows if len(rows) < 0.9 * len(has_gradient) else None


def backward_gradients(call: Call, row_stats: RowStats, g: Any, g_entropy: Any, needs: tuple[bool, bool, bool]) -> Any:
    """Compute the gradients of hidden [n d], weight and bias from those of logp and H, and recompute logits by tile."""
    head, rows, upstream = call.head, call.rows, upstream_of(row_stats, g, g_entropy)
    index = rows_with_gradient(upstream)
    if index is not None:
        rows, upstream = rows.take(index), upstream.take(index)
    with no_autocast(head.weight):
        gradients = backend(head).gradients(head, rows, upstream, needs)
    hidden = gradients.hidden
    if hidden is not None:
        hidden = head.reduce(hidden).to(rows.hidden.dtype)
        if index is not None:
            hidden = hidden.new_zeros(call.rows.hidden.shape).index_copy_(0, index, hidden)
    return hidden, gradients.weight, gradients.bias


def logp_gradient(call: Call, row_stats: RowStats, weight_sum: Tensor) -> Tensor:
    """``∂log π(a)/∂h = k·(s_a·w_a·Σ_{v≠a} e − Σ_{v≠a} e·s_v·w_v)/Σe``, [n d], over all shards.

    ``k = scale/T``; s is the slope of the softcap; ``weight_sum`` is the second sum and is overwritten.
    """
    head, rows = call.head, call.rows
    local_ids, size = rows.ids, head.weight.shape[0]
    sampled_factor = row_stats.sum_others.to(head.wide) * cpu.softcap_slope(head, row_stats.sampled_z, rows)
    sampled_factor = sampled_factor.masked_fill((local_ids < 0) | (local_ids >= size), 0.0)
    factor = head.scale * rows.inv_t / row_stats.sum_all.to(head.wide)
    for span in cpu.spans(len(local_ids), cpu.tile_shape(head)[0]):
        weight = head.weight[local_ids[span].clamp(0, size - 1)].to(head.wide)
        weight_sum[span] = (sampled_factor[span, None] * weight - weight_sum[span]) * factor[span, None]
    return head.reduce(weight_sum)


class _Logp(torch.autograd.Function):
    """Statistics of the rows of a call; the backward recomputes the logits, or scales a gradient from the forward.

    With a frozen head the gradient of log π(a) by h depends on the incoming gradient only by a factor per row, so the
    forward computes it while each tile is in memory: two GEMMs in total instead of three.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, ...]:
        call = call._replace(rows=call.rows._replace(hidden=hidden), head=call.head._replace(weight=weight, bias=bias))
        frozen_head = not any(ctx.needs_input_grad[1:3])
        weight_sum = torch.zeros(hidden.shape, dtype=call.head.wide, device=hidden.device) if frozen_head else None
        row_stats = read_rows(backend(call.head), call.head, call.rows, weight_sum=weight_sum)
        logp_grad = logp_gradient(call, row_stats, weight_sum) if weight_sum is not None else None
        logp, entropy, *moments = stats_tuple(row_stats.stats)
        saved = (logp, entropy, row_stats.log_z, row_stats.sum_others, row_stats.sum_all)
        ctx.save_for_backward(hidden, weight, bias, call.rows.ids, logp_grad, *saved)
        # Only save_for_backward may store the inputs: a reference elsewhere would keep their graph alive.
        empty = logp.new_zeros(())
        ctx.call = call._replace(
            rows=Rows(empty, empty, call.rows.inv_t), head=call.head._replace(weight=empty, bias=None)
        )
        ctx.mark_non_differentiable(*moments)
        ctx.set_materialize_grads(False)
        return logp, entropy, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        hidden, weight, bias, ids, logp_grad, logp, entropy, log_z, sum_others, sum_all = ctx.saved_tensors
        call = ctx.call._replace(
            rows=Rows(hidden, ids, ctx.call.rows.inv_t), head=ctx.call.head._replace(weight=weight, bias=bias)
        )
        empty = logp.new_zeros(())
        row_stats = RowStats(TokenStats(logp, entropy), log_z, empty, sum_others, sum_all, empty)
        g, g_entropy = grads[:2]
        if logp_grad is None:
            return *backward_gradients(call, row_stats, g, g_entropy, ctx.needs_input_grad[:3]), None
        hidden_grad = torch.zeros_like(logp_grad) if g is None else logp_grad * g.to(logp_grad.dtype)[:, None]
        if g_entropy is not None:
            hidden_grad += backward_gradients(call, row_stats, None, g_entropy, (True, False, False))[0]
        return hidden_grad.to(hidden.dtype), None, None, None


def fused_logp(
    hidden: Shaped[Tensor, "..."],
    weight: Shaped[Tensor, "..."],
    ids: Shaped[Tensor, "..."],
    temperature: float | Float[Tensor, "..."] = 1.0,
    *,
    mask: Shaped[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    arithmetic: str = "exact",
    shard: Shard | None = None,
) -> TokenStats:
    """Compute the statistics of sampled tokens from the hidden states, with gradients through log π(a) and H.

    ``∂log π(a)/∂z_v = 1[v=a] − π_v``, ``∂H/∂z_v = −π_v (log π_v + H)``; the other three have no gradient

    The backward recomputes the logits tile by tile: four GEMMs in total. If the head is frozen, so that neither weight
    nor bias requires a gradient (LoRA on the body), the forward computes the gradient of log π(a), and two GEMMs are
    enough; a gradient through H then costs two more. Rows whose incoming gradient is 0 are skipped in the backward.
    Gradient products are summed in fp32.

    Args:
        hidden, weight, ids, temperature, mask, bias, softcap, scale, arithmetic, shard: as in :func:`token_stats`.
            With a shard, each process gets the whole gradient of hidden, and the gradient of its own weight.

    Returns:
        The statistics, [...] each, in fp32, or in float64 if hidden or weight is.

    Raises:
        ValueError: as for :func:`token_stats`.

    For a head without bias and softcap, logits are linear in h, so ``H = ⟨h, ∂log π(a)/∂h⟩ − log π(a)`` and
    ``⟨h, ∂H/∂h⟩ = −Var_π[log π]``, at any temperature (Euler's identity; derived).

    >>> hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    >>> weight = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    >>> stats = fused_logp(hidden, weight, torch.tensor([0]))  # π = (½, ½)
    >>> stats.logp.sum().backward()
    >>> hidden.grad  # w_a − Σ π w
    tensor([[0.0000, 0.5000]])
    """
    call = prepare(hidden, weight, ids, temperature, mask, bias, softcap, scale, arithmetic, shard)
    head, rows = call.head, call.rows
    return call.unflatten(_Logp.apply(rows.hidden, head.weight, head.bias, call))
