"""From logits or hidden states to a reading of entropy: exact statistics, the predicted change, fused kernels, audits."""
