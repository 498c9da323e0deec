"""The sweeps for CUDA devices (sm80, sm90): row sums in the epilogue of a product that is never written out.

One kernel multiplies a tile of rows with a tile of the weight, fp32 accumulators on chip, and either folds the logits
into five row sums, takes their maximum, or writes e or the gradient of the logits into a buffer of some rows, from
which torch's own products go on. Sums are plain, so splits of the vocabulary simply add. Checked against float64
through Triton's interpreter; not yet run or measured on a device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cpu import OUTSIDE, Gradients, Near, Pull, capped, sampled_raw, spans
from .head import NEVER, Head, Rows

__all__ = ["COLUMNS", "accumulate", "capped", "gradients", "largest", "product_dtype", "sampled_raw", "sweep"]

COLUMNS = 32768  # of the vocabulary, in one product of a buffer
BUFFER = 2**28  # bytes of e or of gradients at once
PROGRAMS = 512  # at least, where the vocabulary allows it: some four a multiprocessor
SUMS, KEEP, TOP, GRADIENT = 0, 1, 2, 3


@triton.jit
def _tile(
    hidden, weight, rows, columns, n, v, d, hidden_stride, weight_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Raw logits of a tile, fp32."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    inner = tl.arange(0, BLOCK_D)
    for start in range(0, d, BLOCK_D):
        at = start + inner
        a = tl.load(
            hidden + rows[:, None].to(tl.int64) * hidden_stride + at[None, :],
            mask=(rows[:, None] < n) & (at[None, :] < d),
            other=0.0,
        )
        b = tl.load(
            weight + columns[None, :].to(tl.int64) * weight_stride + at[:, None],
            mask=(columns[None, :] < v) & (at[:, None] < d),
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _kernel(
    hidden, weight, bias, ids, inv_t, shift, entropy, own, g, g_entropy, out, buffer,
    n, v, d, split, hidden_stride, weight_stride, scale, softcap,
    MODE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    SLOPED: tl.constexpr, LOW: tl.constexpr, NONE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some rows by one split of the vocabulary: ``out`` [splits 5 n] or [splits n], ``buffer`` [n v]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    inside = rows < n
    t = tl.load(inv_t + rows, mask=inside, other=1.0)
    c = tl.load(shift + rows, mask=inside, other=0.0)
    a = tl.load(ids + rows, mask=inside, other=-1)
    s0 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    s1, s2, s3, s4 = s0, s0, s0, s0
    top = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    for start in range(part * split, tl.minimum(v, (part + 1) * split), BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        here = inside[:, None] & (columns[None, :] < v)
        y = _tile(hidden, weight, rows, columns, n, v, d, hidden_stride, weight_stride, BLOCK_N, BLOCK_V, BLOCK_D)
        if HAS_BIAS:
            b = tl.load(bias + columns, mask=columns < v, other=0.0).to(tl.float32)
            y += tl.maximum(b, NONE)[None, :]
        y = y * scale
        slope = 1.0
        if HAS_CAP:
            bent = 2.0 * tl.sigmoid(2.0 * y / softcap) - 1.0
            slope = 1.0 - bent * bent
            y = softcap * bent
        x = y * t[:, None] - c[:, None]
        is_own = columns[None, :] == a[:, None]
        at = rows[:, None].to(tl.int64) * v + columns[None, :]
        if MODE == TOP:
            top = tl.maximum(top, tl.max(tl.where(here, x, -float("inf")), axis=1))
        elif MODE == GRADIENT:
            pull = -tl.load(g + rows, mask=inside, other=0.0)[:, None]
            if HAS_ENTROPY:
                level = x + tl.load(entropy + rows, mask=inside, other=0.0)[:, None]
                pull -= tl.load(g_entropy + rows, mask=inside, other=0.0)[:, None] * level
            grad = tl.where(is_own, tl.load(own + rows, mask=inside, other=0.0)[:, None], tl.exp(x) * pull)
            grad = grad * slope * scale * t[:, None]
            tl.store(buffer + at, grad.to(buffer.dtype.element_ty), mask=here)
        else:
            x = tl.where(here & (columns[None, :] != a[:, None]), x, LOW)
            e = tl.exp(x)
            ex = e * x
            s0 += tl.sum(e, axis=1)
            s1 += tl.sum(ex, axis=1)
            s2 += tl.sum(e * e, axis=1)
            s3 += tl.sum(e * ex, axis=1)
            s4 += tl.sum(ex * ex, axis=1)
            if MODE == KEEP:
                kept = e * slope if SLOPED else e
                tl.store(buffer + at, kept.to(buffer.dtype.element_ty), mask=here)
    if MODE == TOP:
        tl.store(out + part * n + rows, top, mask=inside)
    elif MODE != GRADIENT:
        tl.store(out + (part * 5 + 0) * n + rows, s0, mask=inside)
        tl.store(out + (part * 5 + 1) * n + rows, s1, mask=inside)
        tl.store(out + (part * 5 + 2) * n + rows, s2, mask=inside)
        tl.store(out + (part * 5 + 3) * n + rows, s3, mask=inside)
        tl.store(out + (part * 5 + 4) * n + rows, s4, mask=inside)


def _launch(
    head: Head, rows: Rows, shift: Tensor, mode: int, buffer: Tensor | None = None, pull: Pull | None = None,
    sloped: bool = False,
) -> Tensor:  # fmt: skip
    """Run the kernel over all tiles; returns what the splits found, [splits 5 n] or [splits n]."""
    (n, d), v = rows.hidden.shape, len(head.weight)
    small = rows.hidden.dtype.itemsize == 2
    block_n, block_v, block_d = (128, 128, 64) if small else (64, 64, 32)
    across = triton.cdiv(n, block_n)
    splits = max(1, min(triton.cdiv(PROGRAMS, max(1, across)), triton.cdiv(v, block_v)))
    split = triton.cdiv(triton.cdiv(v, splits), block_v) * block_v
    splits = triton.cdiv(v, split)
    shape = (splits, n) if mode == TOP else (splits, 5, n)
    out = torch.empty(shape if mode != GRADIENT else (1,), dtype=torch.float32, device=rows.hidden.device)
    if n == 0:
        return out
    inv_t = rows.inv_t if isinstance(rows.inv_t, Tensor) else torch.full_like(shift, rows.inv_t)
    dtype = torch.promote_types(rows.hidden.dtype, head.weight.dtype)
    if dtype == torch.bfloat16 and not rows.hidden.is_cuda:
        dtype = torch.float32  # the interpreter would multiply the bits of bf16
    hidden, weight = rows.hidden.to(dtype).contiguous(), head.weight.to(dtype).contiguous()
    row_values = [rows.ids, inv_t, shift]
    row_values += [shift] * 4 if pull is None else [pull.entropy, pull.own, pull.g, pull.g_entropy]
    # An incoming gradient may be one number expanded: the kernel reads rows one after the other.
    row_values = [(shift if x is None else x).contiguous() for x in row_values]
    _kernel[(across, splits)](
        hidden, weight, shift if head.bias is None else head.bias.contiguous(), *row_values, out,
        shift if buffer is None else buffer, n, v, d, split, d, d, head.scale, head.softcap or 1.0,
        MODE=mode, HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap is not None,
        HAS_ENTROPY=pull is not None and pull.g_entropy is not None, SLOPED=sloped, LOW=OUTSIDE, NONE=NEVER,
        BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_D=block_d, num_warps=8 if small else 4,
    )  # fmt: skip
    return out


def _check(head: Head) -> None:
    if head.wide != torch.float32:
        raise ValueError("float64 has no path on a CUDA device; move the tensors to the CPU, or use fp32")


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype products of x are done in: its own, fp32 accumulators within."""
    return x.dtype


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in fp32, without rounding the product to the dtype of its factors first."""
    if a.is_cuda and a.dtype.itemsize == 2:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _row_spans(head: Head, rows: Rows) -> list[slice]:
    size = max(1, BUFFER // (len(head.weight) * head.weight.element_size()))
    return list(spans(len(rows.ids), size))


def sweep(
    head: Head, rows: Rows, near: Near, shift: Tensor, keep: Tensor | None = None, mean: Tensor | None = None
) -> Tensor:
    """As :func:`isentropic.entropy.kernels.cpu.sweep`; logits are fp32 whatever the arithmetic."""
    _check(head)
    if mean is None:
        sums = _launch(head, rows, shift, SUMS if keep is None else KEEP, keep)
        return sums.double().sum(0)
    dtype = torch.bfloat16 if head.weight.dtype == torch.bfloat16 else torch.float32
    sums = torch.zeros(5, len(rows.ids), dtype=torch.float64, device=shift.device)
    for here in _row_spans(head, rows):
        some = rows.take(here)
        buffer = torch.empty(len(some.ids), len(head.weight), dtype=dtype, device=shift.device)
        sums[:, here] = _launch(head, some, shift[here], KEEP, buffer, sloped=True).double().sum(0)
        accumulate(mean[here], buffer, head.weight.to(dtype))
    return sums


def largest(head: Head, rows: Rows) -> Tensor:
    """The largest z of each row on this shard, [n]."""
    zero = torch.zeros(len(rows.ids), dtype=torch.float32, device=rows.ids.device)
    return _launch(head, rows, zero, TOP).amax(0)


def gradients(head: Head, rows: Rows, pull: Pull, want: tuple[bool, bool, bool]) -> Gradients:
    """As :func:`isentropic.entropy.kernels.cpu.gradients`: the gradient of the logits of some rows, then the products."""
    _check(head)
    device, dtype = rows.ids.device, torch.promote_types(head.weight.dtype, rows.hidden.dtype)
    hidden = torch.zeros(rows.hidden.shape, dtype=head.wide, device=device) if want[0] else None
    weight = torch.zeros(head.weight.shape, dtype=head.wide, device=device) if want[1] else None
    bias = torch.zeros(head.bias.shape, dtype=head.wide, device=device) if want[2] and head.bias is not None else None
    for here in _row_spans(head, rows):
        some, part = rows.take(here), pull.take(here)
        buffer = torch.empty(len(some.ids), len(head.weight), dtype=dtype, device=device)
        _launch(head, some, part.log_z, GRADIENT, buffer, part)
        if hidden is not None:
            accumulate(hidden[here], buffer, head.weight.to(dtype))
        if weight is not None:
            accumulate(weight, buffer.t(), some.hidden.to(dtype))
        if bias is not None:
            bias += buffer.sum(0, dtype=head.wide)
    weight = None if weight is None else weight.to(head.weight.dtype)
    return Gradients(hidden, weight, None if bias is None or head.bias is None else bias.to(head.bias.dtype))
