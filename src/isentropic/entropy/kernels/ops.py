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
from .closed import Reading, present, read
from .cpu import Pull
from .head import Head, Rows, Shard, check_ids, check_numbers, check_shapes, unmixed, whole


def backend(weight: Tensor) -> Any:
    """The module that sweeps: Triton's on a CUDA device that has it, plain torch elsewhere."""
    if weight.device.type == "cuda":
        try:
            from . import triton  # pyrefly: ignore[missing-module-attribute]
        except ModuleNotFoundError:
            return cpu
        return triton
    return cpu


class Call(NamedTuple):
    """One call after its checks: the head and the rows that count, flat, and where they go."""

    head: Head
    rows: Rows
    kept: Tensor | None
    shape: torch.Size

    def spread(self, stats: tuple[Tensor, ...]) -> TokenStats:
        """[n] statistics back to the shape of ids, 0 where the mask is."""
        if self.kept is None:
            return TokenStats(*(x.reshape(self.shape) for x in stats))
        out = [x.new_zeros(self.shape.numel()).index_put((self.kept,), x) for x in stats]
        return TokenStats(*(x.reshape(self.shape) for x in out))


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
    """Check everything, flatten, and leave out what the mask leaves out."""
    check_shapes(hidden, weight, ids, bias, mask)
    check_numbers(temperature, ids, softcap, scale, arithmetic)
    check_ids(ids, weight.shape[0], shard)
    weight, bias = whole(weight), whole(bias)
    device = hidden.device.type
    if device == "cuda" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if arithmetic == "shifted" and (device != "cpu" or hidden.dtype != weight.dtype or hidden.dtype.itemsize != 2):
        warnings.warn(
            f"arithmetic='shifted' has no effect on {hidden.dtype} hidden states and a {weight.dtype} weight on "
            f"{device}; it is for half-precision inputs on a CPU: leave it out",
            stacklevel=3,
        )
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    flat_hidden, flat_ids = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1).long().clamp(min=0)
    inv_t = 1.0 / temperature.to(wide).reshape(-1) if isinstance(temperature, Tensor) else 1.0 / temperature
    rows = Rows(flat_hidden, flat_ids - (shard.start if shard else 0), inv_t)
    kept = None
    if mask is not None and not (mask := mask.reshape(-1).bool()).all():
        kept = mask.nonzero()[:, 0]
        rows = rows.take(kept)
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
    """Read the statistics of sampled tokens from the hidden states, in one pass over the head, without a gradient.

    ``log π(a)``, ``H``, ``Σ π²``, ``Σ π² log π``, ``Σ π² log² π`` with ``π = softmax(z)``,
    ``z_v = softcap·tanh(scale·(h·w_v + b_v)/softcap) / temperature``, or without the tanh

    Beside the result, a few tiles and blocks are held, some 20 MB: never [n v] logits. For old and reference
    log-probabilities, metrics and :mod:`isentropic.entropy.prediction`; :func:`fused_logp` is the same with a gradient.

    Args:
        hidden: [... d] final hidden states, after the last norm, in fp16, bf16, fp32 or float64.
        weight: [v d] the head's weight; may be tied, a DTensor, or of another dtype than hidden.
        ids: [...] sampled tokens. A negative id, a common mark of padding, is read as 0.
        temperature: the sampling temperature, a number or [...] by token.
        mask: [...] non-zero where the token counts. The others are not computed, may hold anything, and read 0.
        bias: [v]; −inf masks a vocabulary entry.
        softcap: cap of the logits, as in Gemma 2.
        scale: factor of the logits before the cap.
        arithmetic: ``exact``, fp32 logits (float64 for float64 inputs); or ``shifted``, for half-precision inputs on a
            CPU with half-precision instructions: the GEMM runs in half precision on logits less the sampled token's,
            which costs some 2e-3 nats of log π where plain half-precision logits cost 2e-2.
        shard: where the vocabulary is split over processes: this one's part, and how to add over all of them.

    Returns:
        The statistics, [...] each, in fp32, or float64 where hidden or weight is.

    Raises:
        ValueError: shapes, dtypes, ids or numbers that do not fit.

    The shift by the sampled token's logit and the one-pass sums are ours.

    >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 20.0], [0.0, 0.0], [0.0, 0.0]])
    >>> stats = token_stats(hidden, weight, torch.tensor([1, 0]))
    >>> stats.logp, stats.entropy, stats.sum_p2  # −log 3, log 3, ⅓; and an almost certain token
    (tensor([-1.0986e+00, -4.1223e-09]), tensor([1.0986e+00, 8.6568e-08]), tensor([0.3333, 1.0000]))
    """
    call = prepare(hidden, weight, ids, temperature, mask, bias, softcap, scale, arithmetic, shard)
    return call.spread(present(read(backend(call.head.weight), call.head, call.rows).stats))


def pull_of(reading: Reading, g: Tensor | None, g_entropy: Tensor | None) -> Pull:
    """What the backward needs of each row; the sampled token's own gradient keeps its precision as π(a) → 1."""
    stats, wide = reading.stats, reading.log_z.dtype
    g = torch.zeros_like(reading.log_z) if g is None else g.to(wide)
    own = g * (reading.others / reading.total).to(wide)
    if g_entropy is not None:
        g_entropy = g_entropy.to(wide)
        p = stats.logp.exp()
        own = own - g_entropy * p * torch.where(p == 0, 0.0, stats.logp + stats.entropy)
    return Pull(reading.log_z, stats.entropy, own, g, g_entropy)


def pulled(pull: Pull) -> Tensor | None:
    """The rows with a gradient at all, or None where most have one: zero advantages and clipped tokens are free."""
    if pull.g.device.type == "cuda":
        return None  # counting them would wait for the device
    some = pull.g != 0
    if pull.g_entropy is not None:
        some |= pull.g_entropy != 0
    rows = some.nonzero()[:, 0]
    return rows if len(rows) < 0.9 * len(some) else None


def backward_gradients(call: Call, reading: Reading, g: Any, g_entropy: Any, want: tuple[bool, bool, bool]) -> Any:
    """Gradients of hidden [n d], weight and bias from those of logp and H, recomputing the logits tile by tile."""
    head, rows, pull = call.head, call.rows, pull_of(reading, g, g_entropy)
    some = pulled(pull)
    if some is not None:
        rows, pull = rows.take(some), pull.take(some)
    with unmixed(head.weight):
        out = backend(head.weight).gradients(head, rows, pull, want)
    hidden = out.hidden
    if hidden is not None:
        hidden = head.reduce(hidden).to(rows.hidden.dtype)
        if some is not None:
            hidden = hidden.new_zeros(call.rows.hidden.shape).index_copy_(0, some, hidden)
    return hidden, out.weight, out.bias


def unit_gradient(call: Call, reading: Reading, mean: Tensor) -> Tensor:
    """``∂log π(a)/∂h = k·(s_a·w_a·Σ_{v≠a} e − Σ_{v≠a} e·s_v·w_v)/Σe``, [n d], over all shards; ``mean`` is used up.

    ``k = scale/T``; s is the slope of the softcap.
    """
    head, rows = call.head, call.rows
    local, size = rows.ids, head.weight.shape[0]
    own = reading.others.to(head.wide) * cpu.slope_of(head, reading.own, rows)
    own = own.masked_fill((local < 0) | (local >= size), 0.0)
    factor = head.scale * rows.inv_t / reading.total.to(head.wide)
    for part in cpu.spans(len(local), cpu.ROWS):
        weight = head.weight[local[part].clamp(0, size - 1)].to(head.wide)
        mean[part] = (own[part, None] * weight - mean[part]) * factor[part, None]
    return head.reduce(mean)


class _Logp(torch.autograd.Function):
    """Statistics of the rows of a call; the backward recomputes the logits, or scales a gradient made in the forward.

    With a frozen head the gradient of log π(a) by h does not depend on what comes later but for a factor a row, so it
    is made while the tile is there: two GEMMs in all instead of three.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, ...]:
        call = call._replace(rows=call.rows._replace(hidden=hidden), head=call.head._replace(weight=weight, bias=bias))
        frozen = not any(ctx.needs_input_grad[1:3])
        mean = torch.zeros(hidden.shape, dtype=call.head.wide, device=hidden.device) if frozen else None
        reading = read(backend(weight), call.head, call.rows, mean=mean)
        unit = unit_gradient(call, reading, mean) if mean is not None else None
        logp, entropy, *moments = present(reading.stats)
        facts = (logp, entropy, reading.log_z, reading.others, reading.total)
        ctx.save_for_backward(hidden, weight, bias, call.rows.ids, unit, *facts)
        # Inputs are kept by save_for_backward alone: held elsewhere they would keep their graph alive.
        nothing = logp.new_zeros(())
        ctx.call = call._replace(
            rows=Rows(nothing, nothing, call.rows.inv_t), head=call.head._replace(weight=nothing, bias=None)
        )
        ctx.mark_non_differentiable(*moments)
        ctx.set_materialize_grads(False)
        return logp, entropy, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        hidden, weight, bias, ids, unit, logp, entropy, log_z, others, total = ctx.saved_tensors
        call = ctx.call._replace(
            rows=Rows(hidden, ids, ctx.call.rows.inv_t), head=ctx.call.head._replace(weight=weight, bias=bias)
        )
        nothing = logp.new_zeros(())
        reading = Reading(TokenStats(logp, entropy), log_z, nothing, others, total, nothing)
        g, g_entropy = grads[:2]
        if unit is None:
            return *backward_gradients(call, reading, g, g_entropy, ctx.needs_input_grad[:3]), None
        out = torch.zeros_like(unit) if g is None else unit * g.to(unit.dtype)[:, None]
        if g_entropy is not None:
            out += backward_gradients(call, reading, None, g_entropy, (True, False, False))[0]
        return out.to(hidden.dtype), None, None, None


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
    """Read the statistics of sampled tokens from the hidden states, with gradients through log π(a) and H.

    ``∂log π(a)/∂z_v = 1[v=a] − π_v``, ``∂H/∂z_v = −π_v (log π_v + H)``; the other three carry none

    The backward makes the logits again, tile by tile: four GEMMs in all. With a frozen head, where neither weight nor
    bias requires a gradient (LoRA on the body), that of log π(a) is made in the forward and two GEMMs do;
    a gradient through H then costs two more. Rows whose incoming gradient is 0 are left out of the backward.
    Gradient products are summed in fp32.

    Args:
        hidden, weight, ids, temperature, mask, bias, softcap, scale, arithmetic, shard: as in :func:`token_stats`.
            With a shard, the gradient of hidden is the whole one on every process, that of weight the shard's own.

    Returns:
        The statistics, [...] each, in fp32, or float64 where hidden or weight is.

    Raises:
        ValueError: shapes, dtypes, ids or numbers that do not fit.

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
    return call.spread(_Logp.apply(rows.hidden, head.weight, head.bias, call))
