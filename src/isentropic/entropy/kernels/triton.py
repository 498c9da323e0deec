"""The sweeps for CUDA devices (sm80, sm90): row sums in the epilogue of a product that is never stored.

One kernel multiplies a tile of rows by a tile of the weight, with fp32 accumulators on chip. It then reduces the logits
to five row sums, or to their maximum, or writes e or the gradient of the logits into a buffer of some rows, which
torch's own products read. The sums of several splits of the vocabulary add up. Checked against float64 through Triton's
interpreter, and compiled for sm80 and sm90; not yet run or measured on a device: none takes this path before
``ops.TRITON_TESTED`` names it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cpu import EXCLUDED, WIDE_ROWS, HeadGradients, SampledLogits, Upstream, final_logits, sampled_logits, spans
from .head import MASKED_LOGIT, Head, Rows

__all__ = [
    "accumulate",
    "final_logits",
    "gradients",
    "max_logits",
    "product_dtype",
    "sampled_logits",
    "sweep",
    "tile_shape",
]

COLUMNS = 32768  # of the vocabulary, in one product of a buffer
BUFFER = 2**28  # bytes of e or of gradients at once
PROGRAMS = 512  # at least, if the vocabulary is large enough: some four per multiprocessor
# What the kernel does; constants of a call, since a compiled kernel reads no globals of Python.
MODES = ("sums", "keep", "top", "gradient")


@triton.jit
def _tile(
    hidden, weight, rows, columns, n, v, d, hidden_stride, weight_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Raw logits of a tile, fp32."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    offsets = tl.arange(0, BLOCK_D)
    for start in range(0, d, BLOCK_D):
        depth = start + offsets
        a = tl.load(
            hidden + rows[:, None].to(tl.int64) * hidden_stride + depth[None, :],
            mask=(rows[:, None] < n) & (depth[None, :] < d),
            other=0.0,
        )
        b = tl.load(
            weight + columns[None, :].to(tl.int64) * weight_stride + depth[:, None],
            mask=(columns[None, :] < v) & (depth[:, None] < d),
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _kernel(
    hidden, weight, bias, ids, inv_t, shift, entropy, sampled_grad, g, g_entropy, out, buffer,
    n, v, d, split, hidden_stride, weight_stride, scale, softcap,
    TOP: tl.constexpr, KEEP: tl.constexpr, GRADIENT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    SLOPED: tl.constexpr, X_EXCLUDED: tl.constexpr, B_MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some rows by one split of the vocabulary: ``out`` [splits 5 n] or [splits n], ``buffer`` [n v]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split_index = tl.program_id(1)
    inside = rows < n
    t = tl.load(inv_t + rows, mask=inside, other=1.0)
    c = tl.load(shift + rows, mask=inside, other=0.0)
    a = tl.load(ids + rows, mask=inside, other=-1)
    s0 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    s1, s2, s3, s4 = s0, s0, s0, s0
    top = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    for start in range(split_index * split, tl.minimum(v, (split_index + 1) * split), BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        in_tile = inside[:, None] & (columns[None, :] < v)
        y = _tile(hidden, weight, rows, columns, n, v, d, hidden_stride, weight_stride, BLOCK_N, BLOCK_V, BLOCK_D)
        if HAS_BIAS:
            b = tl.load(bias + columns, mask=columns < v, other=0.0).to(tl.float32)
            y += tl.maximum(b, B_MASKED)[None, :]
        y = y * scale
        slope = 1.0
        if HAS_CAP:
            tanh = 2.0 * tl.sigmoid(2.0 * y / softcap) - 1.0
            slope = 1.0 - tanh * tanh
            y = softcap * tanh
        x = y * t[:, None] - c[:, None]
        is_sampled = columns[None, :] == a[:, None]
        position = rows[:, None].to(tl.int64) * v + columns[None, :]
        if TOP:
            top = tl.maximum(top, tl.max(tl.where(in_tile, x, -float("inf")), axis=1))
        elif GRADIENT:
            slope_e = -tl.load(g + rows, mask=inside, other=0.0)[:, None]
            if HAS_ENTROPY:
                centred = x + tl.load(entropy + rows, mask=inside, other=0.0)[:, None]
                slope_e -= tl.load(g_entropy + rows, mask=inside, other=0.0)[:, None] * centred
            grad = tl.where(
                is_sampled, tl.load(sampled_grad + rows, mask=inside, other=0.0)[:, None], tl.exp(x) * slope_e
            )
            grad = grad * slope * scale * t[:, None]
            tl.store(buffer + position, grad.to(buffer.dtype.element_ty), mask=in_tile)
        else:
            x = tl.where(in_tile & (columns[None, :] != a[:, None]), x, X_EXCLUDED)
            e = tl.exp(x)
            ex = e * x
            s0 += tl.sum(e, axis=1)
            s1 += tl.sum(ex, axis=1)
            s2 += tl.sum(e * e, axis=1)
            s3 += tl.sum(e * ex, axis=1)
            s4 += tl.sum(ex * ex, axis=1)
            if KEEP:
                stored = e * slope if SLOPED else e
                tl.store(buffer + position, stored.to(buffer.dtype.element_ty), mask=in_tile)
    if TOP:
        tl.store(out + split_index * n + rows, top, mask=inside)
    elif not GRADIENT:
        tl.store(out + (split_index * 5 + 0) * n + rows, s0, mask=inside)
        tl.store(out + (split_index * 5 + 1) * n + rows, s1, mask=inside)
        tl.store(out + (split_index * 5 + 2) * n + rows, s2, mask=inside)
        tl.store(out + (split_index * 5 + 3) * n + rows, s3, mask=inside)
        tl.store(out + (split_index * 5 + 4) * n + rows, s4, mask=inside)


def _launch(
    head: Head, rows: Rows, shift: Tensor, mode: str, buffer: Tensor | None = None, upstream: Upstream | None = None,
    sloped: bool = False,
) -> Tensor:  # fmt: skip
    """Run the kernel over all tiles in a mode, and return the results of the splits, [splits 5 n] or [splits n]."""
    assert mode in MODES
    (n, d), v = rows.hidden.shape, len(head.weight)
    half_precision = rows.hidden.dtype.itemsize == 2
    block_n, block_v, block_d = (128, 128, 64) if half_precision else (64, 64, 32)
    num_row_blocks = triton.cdiv(n, block_n)
    splits = max(1, min(triton.cdiv(PROGRAMS, max(1, num_row_blocks)), triton.cdiv(v, block_v)))
    split = triton.cdiv(triton.cdiv(v, splits), block_v) * block_v
    splits = triton.cdiv(v, split)
    shape = (splits, n) if mode == "top" else (splits, 5, n)
    out = torch.empty(shape if mode != "gradient" else (1,), dtype=torch.float32, device=rows.hidden.device)
    if n == 0:
        return out
    inv_t = rows.inv_t if isinstance(rows.inv_t, Tensor) else torch.full_like(shift, rows.inv_t)
    dtype = torch.promote_types(rows.hidden.dtype, head.weight.dtype)
    if dtype == torch.bfloat16 and not rows.hidden.is_cuda:
        dtype = torch.float32  # the interpreter would multiply the bit patterns of bf16
    hidden, weight = rows.hidden.to(dtype).contiguous(), head.weight.to(dtype).contiguous()
    row_values = [rows.ids, inv_t, shift]
    row_values += (
        [shift] * 4 if upstream is None else [upstream.entropy, upstream.sampled_grad, upstream.g, upstream.g_entropy]
    )
    # The kernel reads contiguous rows; an incoming gradient may be one expanded number.
    row_values = [(shift if values is None else values).contiguous() for values in row_values]
    _kernel[(num_row_blocks, splits)](
        hidden, weight, shift if head.bias is None else head.bias.contiguous(), *row_values, out,
        shift if buffer is None else buffer, n, v, d, split, d, d, head.scale, head.softcap or 1.0,
        TOP=mode == "top", KEEP=mode == "keep", GRADIENT=mode == "gradient",
        HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap is not None,
        HAS_ENTROPY=upstream is not None and upstream.g_entropy is not None, SLOPED=sloped,
        X_EXCLUDED=EXCLUDED, B_MASKED=MASKED_LOGIT,
        BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_D=block_d, num_warps=8 if half_precision else 4,
    )  # fmt: skip
    return out


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with x: its own, with fp32 accumulators."""
    return x.dtype


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in fp32, without rounding the product to the dtype of its factors first."""
    if a.is_cuda and a.dtype.itemsize == 2:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def tile_shape(head: Head) -> tuple[int, int]:
    """Rows and columns that a product of a buffer takes at once."""
    return WIDE_ROWS, COLUMNS


def _row_spans(head: Head, rows: Rows) -> list[slice]:
    size = max(1, BUFFER // (len(head.weight) * head.weight.element_size()))
    return list(spans(len(rows.ids), size))


def sweep(
    head: Head,
    rows: Rows,
    sampled: SampledLogits,
    shift: Tensor,
    exp_out: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Tensor:
    """As :func:`isentropic.entropy.kernels.cpu.sweep`; logits are fp32 for either ``arithmetic``."""
    if weight_sum is None:
        sums = _launch(head, rows, shift, "sums" if exp_out is None else "keep", exp_out)
        return sums.double().sum(0)
    dtype = torch.bfloat16 if head.weight.dtype == torch.bfloat16 else torch.float32
    sums = torch.zeros(5, len(rows.ids), dtype=torch.float64, device=shift.device)
    for span in _row_spans(head, rows):
        span_rows = rows.take(span)
        buffer = torch.empty(len(span_rows.ids), len(head.weight), dtype=dtype, device=shift.device)
        sums[:, span] = _launch(head, span_rows, shift[span], "keep", buffer, sloped=True).double().sum(0)
        accumulate(weight_sum[span], buffer, head.weight.to(dtype))
    return sums


def max_logits(head: Head, rows: Rows) -> Tensor:
    """The largest z of each row on this shard, [n]."""
    no_shift = torch.zeros(len(rows.ids), dtype=torch.float32, device=rows.ids.device)
    return _launch(head, rows, no_shift, "top").amax(0)


def gradients(head: Head, rows: Rows, upstream: Upstream, needs: tuple[bool, bool, bool]) -> HeadGradients:
    """As :func:`isentropic.entropy.kernels.cpu.gradients`: logit gradients of some rows at once, then the products."""
    device, dtype = rows.ids.device, torch.promote_types(head.weight.dtype, rows.hidden.dtype)
    hidden_grad = torch.zeros(rows.hidden.shape, dtype=head.wide, device=device) if needs[0] else None
    weight_grad = torch.zeros(head.weight.shape, dtype=head.wide, device=device) if needs[1] else None
    bias_grad = (
        torch.zeros(head.bias.shape, dtype=head.wide, device=device) if needs[2] and head.bias is not None else None
    )
    for span in _row_spans(head, rows):
        span_rows, span_upstream = rows.take(span), upstream.take(span)
        buffer = torch.empty(len(span_rows.ids), len(head.weight), dtype=dtype, device=device)
        _launch(head, span_rows, span_upstream.log_z, "gradient", buffer, span_upstream)
        if hidden_grad is not None:
            accumulate(hidden_grad[span], buffer, head.weight.to(dtype))
        if weight_grad is not None:
            accumulate(weight_grad, buffer.t(), span_rows.hidden.to(dtype))
        if bias_grad is not None:
            bias_grad += buffer.sum(0, dtype=head.wide)
    weight_grad = None if weight_grad is None else weight_grad.to(head.weight.dtype)
    return HeadGradients(
        hidden_grad, weight_grad, None if bias_grad is None or head.bias is None else bias_grad.to(head.bias.dtype)
    )
