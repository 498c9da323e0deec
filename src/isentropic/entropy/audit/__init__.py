"""Numerics of log-probabilities: the cost of a cast, and errors in a set-up before it trains.

- ``casts`` rounds one step of the head (hidden state, weights, logits, log-softmax, returned log-prob) and measures the
  effect on the importance ratio.
- ``checks`` makes findings from plain tensors.
- ``probe`` runs a model on a batch, as they are configured, and compares it with fp64: :func:`audit`.

The audits of a trainer are in ``engines.trl.audit`` and ``engines.verl.audit``.
"""

from .casts import (
    GSPO_BAND,
    PLACES,
    WIDTHS,
    RatioError,
    SequenceError,
    from_logits,
    half_ulp,
    head,
    independent_bias,
    ratio_error,
    rounded,
    sequence_error,
)
from .checks import (
    Clip,
    Finding,
    Report,
    cast_effect,
    effective_dtype,
    entropy_findings,
    fitted_temperature,
    grade,
    kept_tokens,
    mask_findings,
    num_experts,
    ratio_findings,
    routing_findings,
    sampler_findings,
    shape_findings,
    truncation_findings,
)
from .probe import AuditBatch, Scored, audit, audit_rows

__all__ = [
    "GSPO_BAND",
    "PLACES",
    "WIDTHS",
    "AuditBatch",
    "Clip",
    "Finding",
    "RatioError",
    "Report",
    "Scored",
    "SequenceError",
    "audit",
    "audit_rows",
    "cast_effect",
    "effective_dtype",
    "entropy_findings",
    "fitted_temperature",
    "from_logits",
    "grade",
    "half_ulp",
    "head",
    "independent_bias",
    "kept_tokens",
    "mask_findings",
    "num_experts",
    "ratio_error",
    "ratio_findings",
    "rounded",
    "routing_findings",
    "sampler_findings",
    "sequence_error",
    "shape_findings",
    "truncation_findings",
]
