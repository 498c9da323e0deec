"""From row sums to statistics: closed forms, and the second pass over rows whose sums cancelled or overflowed.

With a shift c, ``x = z − c`` and ``e = exp x``, one sweep gives ``S = Σ e``, ``T = Σ e·x``, ``Q = Σ e²``,
``U = Σ e²·x`` and ``R = Σ e²·x²``. With ``L = log S``::

    log π(a) = x_a − L            H = L − T/S            Σπ² = Q/S²
    Σπ² log π = (U − L·Q)/S²      Σπ² log² π = (R − 2·L·U + L²·Q)/S²

for any c. With ``c = z_a``, the logit of the sampled token, no maximum is needed and ``log π(a) = −log(1 + Σ_{v≠a} e)``
keeps its relative precision as π(a) → 1. A token so unlikely that the closed forms cancel, and at last e² overflows,
shows in the sums: its row is done again with ``c = max z``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...types import TokenStats
from .head import NEVER, Head, Rows, unmixed

# Nats: fp32 sums of e²·x² overflow from L = 43.
UNLIKELY = -20.0
# The second moment is a difference of terms of L²·Σπ², rounded by 4e-7 of themselves: its error stays below 5e-6.
CANCELS = 12.0


def present(stats: TokenStats) -> tuple[Tensor, ...]:
    """The statistics as a tuple: all five here, though the type allows for fewer."""
    return tuple(x for x in stats if x is not None)


class Reading(NamedTuple):
    """The statistics of some rows and what their gradients need, [n] each.

    ``log_z`` is the log-normaliser; ``others`` the sum of e without the sampled token, ``total`` with it, in float64;
    ``own`` the sampled token's z.
    """

    stats: TokenStats
    log_z: Tensor
    shift: Tensor
    others: Tensor
    total: Tensor
    own: Tensor


def close(sums: Tensor, own: Tensor, shift: Tensor) -> Reading:
    """The statistics from sums [5 n] that leave the sampled token out."""
    x = own.double() - shift
    e = x.exp()
    others = sums[0]
    total = others + e
    cross, square = sums[1] + e * x, sums[2] + e * e
    square_x, square_x2 = sums[3] + e * e * x, sums[4] + (e * x).square()
    log_total = torch.where(x == 0, others.log1p(), total.log())
    logp = x - log_total
    stats = TokenStats(
        logp=logp.masked_fill(logp < NEVER / 1e6, -torch.inf),
        entropy=log_total - cross / total,
        sum_p2=square / total / total,
        sum_p2_logp=(square_x - log_total * square) / total / total,
        sum_p2_logp2=(square_x2 - 2 * log_total * square_x + log_total.square() * square) / total / total,
    )
    log_z = (shift + log_total).to(shift.dtype)
    return Reading(TokenStats(*(s.to(shift.dtype) for s in present(stats))), log_z, shift, others, total, own)


def read(backend: Any, head: Head, rows: Rows, keep: Tensor | None = None, mean: Tensor | None = None) -> Reading:
    """One sweep over the head, and a second over the rows that cancelled or overflowed in the first.

    Args:
        backend: the module whose ``sweep`` and ``largest`` run.
        keep, mean: as for the backend's ``sweep``.
    """
    with unmixed(head.weight):
        near = backend.sampled_raw(head, rows)
        own = backend.capped(head, near.raw, rows.inv_t)
        shift = own.clone()
        sums = head.reduce(backend.sweep(head, rows, near, shift, keep, mean))
        reading = close(sums, own, shift)
        logp, _, sum_p2, *_ = present(reading.stats)
        again = ~sums.isfinite().all(0) | (logp < UNLIKELY) | (logp.square() * sum_p2 > CANCELS)
        if not again.any():
            return reading
        again = again.nonzero()[:, 0]
        some = rows.take(again)
        shift[again] = top = torch.maximum(head.reduce(backend.largest(head, some), "max"), own[again])
        part_keep = None if keep is None else keep.new_empty(len(again), keep.shape[1])
        part_mean = None if mean is None else torch.zeros_like(mean[again])
        near = type(near)(*(None if x is None else x[again] for x in near))
        sums[:, again] = head.reduce(backend.sweep(head, some, near, top, part_keep, part_mean))
        for all_rows, part in ((keep, part_keep), (mean, part_mean)):
            if all_rows is not None and part is not None:
                all_rows[again] = part
        return close(sums, own, shift)
