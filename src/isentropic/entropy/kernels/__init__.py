"""The fused head: log-probability, entropy and the moments for its predicted change in one pass, without logits."""

from .head import Shard
from .loss import FusedLoss, fused_policy_loss
from .ops import fused_logp, token_stats

__all__ = ["FusedLoss", "Shard", "fused_logp", "fused_policy_loss", "token_stats"]
