"""From an entropy reading to the knob of the next step, in plain Python: no torch, and states of plain numbers."""
