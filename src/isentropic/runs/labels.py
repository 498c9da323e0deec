"""What the fields of a run directory are called where people read them: one set of words for every view.

Colours, hatches and line styles are in ``report/``.
"""

from __future__ import annotations

# Fields of metrics.jsonl, with their units, as captions.
METRICS = {
    "entropy/mean": "Entropy, nats per token",
    "reward/mean": "Mean reward of the training prompts",
    "predict/knob": "What the knob adds to entropy, predicted, nats per token and step",
    "predict/gain": "Predicted change by one unit of the knob, nats per token and step",
    "clip/low_frac": "Share of tokens stopped by the lower bound (A < 0)",
    "clip/high_frac": "Share of tokens stopped by the upper bound (A > 0)",
    "ratio/outside_frac": "Share of ratios outside the bounds",
    "theorem2/violated_frac": "Share of rows outside the entropy bounds of Theorem 2",
    "cov/adv_logp": "cov(A, log π), nats",
    "length/mean": "Mean length, tokens",
    "length/truncated_frac": "Share cut at the limit",
    "numerics/logp_rms": "RMS difference of log π from that of an fp32 head, nats",
    "numerics/entropy_bias": "Mean difference of entropy from that of an fp32 head, nats",
}
# Splits of the predicted change: names after ``predict/``.
QUADRANTS = {
    "likely_up": "likely tokens pushed up",
    "rare_up": "rare tokens pushed up",
    "likely_down": "likely tokens pushed down",
    "rare_down": "rare tokens pushed down",
    "bonus": "the entropy term itself",
}
SIGNS = {
    "positive": "answers better than the baseline",
    "negative": "answers worse than the baseline",
    "neutral": "answers at the baseline",
}
CLIP_STATES = {
    "unclipped": "tokens inside the clip",
    "clipped_high": "tokens above the upper bound",
    "clipped_low": "tokens below the lower bound",
    "removed_high": "what the upper bound took away, estimated",
    "removed_low": "what the lower bound took away, estimated",
}
POSITIONS = {f"position_{i}": f"{i}/8" for i in range(1, 9)}
FORMS = {
    "change": "exact form",
    "change_simple": "without moments",
    "change_natural": "of a natural-gradient step",
}
# Heads of narrow columns.
COLUMNS = {
    "change": "predicted",
    "likely_up": "likely ↑",
    "rare_up": "rare ↑",
    "likely_down": "likely ↓",
    "rare_down": "rare ↓",
    "by_knob": "knob",
}
