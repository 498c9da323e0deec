"""From rewards ``[p g]`` to a loss per token ``[b t]``, in pure torch; only ``reduce`` divides by a count."""
