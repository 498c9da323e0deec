"""What makes runs: their settings, one run, its evaluation, and grids of runs side by side."""
