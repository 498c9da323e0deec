"""From logits or hidden states to a reading of entropy: exact statistics, predicted change, fused kernels, audits."""
