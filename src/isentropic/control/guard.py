"""A guard against entropy that explodes: a pure pair over the readings, as a controller is."""

from __future__ import annotations

import math
from typing import NamedTuple

PATIENCE = 20  # optimizer steps in a row
USUAL_BOUND = 3.0


class GuardState(NamedTuple):
    """State of the guard.

    Attributes:
        start: entropy of the first step, nats; None before it.
        above: steps in a row with an entropy above the bound.
        reference: what the bound multiplies at this step, nats.
    """

    start: float | None = None
    above: int = 0
    reference: float = 0.0


class Guard(NamedTuple):
    """Says when entropy has been above ``bound`` times its reference for ``patience`` optimizer steps in a row.

    The reference is the larger of the target in force and the entropy of the first step, so that a run which is led
    down to a low target is not mistaken for one that explodes.

    Attributes:
        bound: times the reference; 0 never.
        patience: optimizer steps in a row.

    Example:
        >>> guard, state = Guard(bound=2.0, patience=2), GuardState()
        >>> for entropy in (1.0, 2.1, 2.2):
        ...     state = guard.update(state, entropy, target=0.6)
        >>> state.above, guard.exceeded(state)
        (2, True)
    """

    bound: float
    patience: int = PATIENCE

    def update(self, state: GuardState, entropy: float | None, target: float | None) -> GuardState:
        """Take in the reading of a step; one that is not a number changes nothing."""
        if not self.bound or entropy is None or math.isnan(entropy):
            return state
        start = entropy if state.start is None else state.start
        reference = max(start, target or 0.0)
        return GuardState(start, state.above + 1 if entropy > self.bound * reference else 0, reference)

    def exceeded(self, state: GuardState) -> bool:
        """Whether the run should stop."""
        return bool(self.bound) and state.above >= self.patience
