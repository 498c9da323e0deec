"""Numerics of log-probabilities: the cost of a cast, and errors in a set-up before it trains.

- ``casts`` rounds one step of the head (hidden state, weights, logits, log-softmax, returned log-prob) and measures the
  effect on the importance ratio.
- ``findings`` holds what an audit reports, and how severe an error is.
- ``checks`` makes findings from plain tensors.
- ``probe`` runs a model on a batch, as they are configured, and compares it with fp64: :func:`audit`; ``rows`` compares
  the logits of one forward pass.

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
    cast_effect,
    effective_dtype,
    entropy_findings,
    fitted_temperature,
    kept_tokens,
    mask_findings,
    num_experts,
    ratio_findings,
    routing_findings,
    sampler_findings,
    shape_findings,
    target_findings,
    truncation_findings,
)
from .findings import Clip, Finding, Report, grade, grade_entropy, merged
from .probe import AuditBatch, Scored, audit
from .rows import audit_rows

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
    "grade_entropy",
    "half_ulp",
    "head",
    "independent_bias",
    "kept_tokens",
    "mask_findings",
    "merged",
    "num_experts",
    "ratio_error",
    "ratio_findings",
    "rounded",
    "routing_findings",
    "sampler_findings",
    "sequence_error",
    "shape_findings",
    "target_findings",
    "truncation_findings",
]
