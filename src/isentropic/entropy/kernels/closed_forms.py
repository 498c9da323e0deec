"""Closed forms of the statistics from row sums, and a second pass over rows whose sums cancelled or overflowed.

With a shift c, ``x = z − c`` and ``e = exp x``, one sweep gives ``S = Σ e``, ``T = Σ e·x``, ``Q = Σ e²``,
``U = Σ e²·x`` and ``R = Σ e²·x²``. With ``L = log S``::

    log π(a) = x_a − L            H = L − T/S            Σπ² = Q/S²
    Σπ² log π = (U − L·Q)/S²      Σπ² log² π = (R − 2·L·U + L²·Q)/S²

for any c. With ``c = z_a``, the logit of the sampled token, no maximum is needed and ``log π(a) = −log(1 + Σ_{v≠a} e)``
keeps its relative precision as π(a) → 1. For a very unlikely token the closed forms cancel, and in the extreme e²
overflows. The sums show this, and its row is computed again with ``c = max z``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...types import TokenStats
from .head import MASKED_LOGIT, Head, Rows, no_autocast

# Nats: fp32 sums of e²·x² overflow from L = 43.
UNLIKELY = -20.0
# The second moment is a difference of terms of L²·Σπ², rounded by 4e-7 of themselves: its error stays below 5e-6.
CANCELS = 12.0


def stats_tuple(stats: TokenStats) -> tuple[Tensor, ...]:
    """The statistics as a tuple: all five in this package, although the type allows fewer."""
    return tuple(value for value in stats if value is not None)


class RowStats(NamedTuple):
    """The statistics of some rows and the values that their gradients need, [n] each.

    Attributes:
        stats: the five statistics.
        log_z: log-normaliser.
        shift: c.
        sum_others: the sum of e without the sampled token, in float64.
        sum_all: the sum of e with it, in float64.
        sampled_z: z of the sampled token.
    """

    stats: TokenStats
    log_z: Tensor
    shift: Tensor
    sum_others: Tensor
    sum_all: Tensor
    sampled_z: Tensor


def stats_from_sums(sums: Tensor, sampled_z: Tensor, shift: Tensor) -> RowStats:
    """Compute the statistics from sums [5 n] that exclude the sampled token."""
    x = sampled_z.double() - shift
    e = x.exp()
    sum_others = sums[0]
    sum_all = sum_others + e
    sum_ex, sum_e2 = sums[1] + e * x, sums[2] + e * e
    sum_e2x, sum_e2x2 = sums[3] + e * e * x, sums[4] + (e * x).square()
    log_sum = torch.where(x == 0, sum_others.log1p(), sum_all.log())
    logp = x - log_sum
    stats = TokenStats(
        logp=logp.masked_fill(logp < MASKED_LOGIT / 1e6, -torch.inf),
        entropy=log_sum - sum_ex / sum_all,
        sum_p2=sum_e2 / sum_all / sum_all,
        sum_p2_logp=(sum_e2x - log_sum * sum_e2) / sum_all / sum_all,
        sum_p2_logp2=(sum_e2x2 - 2 * log_sum * sum_e2x + log_sum.square() * sum_e2) / sum_all / sum_all,
    )
    log_z = (shift + log_sum).to(shift.dtype)
    return RowStats(
        TokenStats(*(value.to(shift.dtype) for value in stats_tuple(stats))),
        log_z,
        shift,
        sum_others,
        sum_all,
        sampled_z,
    )


def read_rows(
    backend: Any, head: Head, rows: Rows, exp_out: Tensor | None = None, weight_sum: Tensor | None = None
) -> RowStats:
    """Sweep over the head once, and again for the rows that cancelled or overflowed.

    Args:
        backend: the module whose ``sweep`` and ``max_logits`` run.
        exp_out, weight_sum: as for the backend's ``sweep``.
    """
    with no_autocast(head.weight):
        sampled = backend.sampled_logits(head, rows)
        sampled_z = backend.final_logits(head, sampled.raw, rows.inv_t)
        shift = sampled_z.clone()
        sums = head.reduce(backend.sweep(head, rows, sampled, shift, exp_out, weight_sum))
        row_stats = stats_from_sums(sums, sampled_z, shift)
        logp, _, sum_p2, *_ = stats_tuple(row_stats.stats)
        repeated = ~sums.isfinite().all(0) | (logp < UNLIKELY) | (logp.square() * sum_p2 > CANCELS)
        if not repeated.any():
            return row_stats
        repeated = repeated.nonzero()[:, 0]
        repeated_rows = rows.take(repeated)
        shift[repeated] = max_z = torch.maximum(
            head.reduce(backend.max_logits(head, repeated_rows), "max"), sampled_z[repeated]
        )
        repeated_exp = None if exp_out is None else exp_out.new_empty(len(repeated), exp_out.shape[1])
        repeated_weight_sum = None if weight_sum is None else torch.zeros_like(weight_sum[repeated])
        sampled = type(sampled)(*(None if value is None else value[repeated] for value in sampled))
        sums[:, repeated] = head.reduce(
            backend.sweep(head, repeated_rows, sampled, max_z, repeated_exp, repeated_weight_sum)
        )
        for output, repeated_output in ((exp_out, repeated_exp), (weight_sum, repeated_weight_sum)):
            if output is not None and repeated_output is not None:
                output[repeated] = repeated_output
        return stats_from_sums(sums, sampled_z, shift)
