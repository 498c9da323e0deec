"""Numerics of log-probabilities: what a cast costs, and what is wrong in a set-up before it trains.

``casts`` rounds one step of the head (hidden state, weights, logits, log-softmax, returned log-prob) and measures what
the importance ratio makes of it. ``checks`` turns plain tensors into findings. ``audit`` asks a model and a batch, as
they are configured, and measures against fp64. What asks an engine lives in ``engines/``.
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
    entropy_findings,
    fitted_temperature,
    grade,
    held_in,
    kept_tokens,
    mask_findings,
    ratio_findings,
    sampler_findings,
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
    "entropy_findings",
    "fitted_temperature",
    "from_logits",
    "grade",
    "half_ulp",
    "head",
    "held_in",
    "independent_bias",
    "kept_tokens",
    "mask_findings",
    "ratio_error",
    "ratio_findings",
    "rounded",
    "sampler_findings",
    "sequence_error",
    "truncation_findings",
]
