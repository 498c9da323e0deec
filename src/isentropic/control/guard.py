"""A guard against exploding entropy: a pure pair over the readings, like a controller."""

from __future__ import annotations

import math
from typing import NamedTuple

PATIENCE = 20  # optimizer steps in a row
USUAL_BOUND = 3.0
NEARLY_UNIFORM = 0.9  # share of log of the vocabulary


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

    The reference is the larger of the target in force and the entropy of the first step, so that a run which is steered
    down to a low target is not mistaken for one that explodes.

    No policy exceeds the log of the vocabulary, so a bound above that would have no effect. If ``ceiling`` is known,
    the limit is at most nine tenths of it, unless the reference is itself as high: such a policy is uniform already.

    Attributes:
        bound: times the reference; 0 never.
        patience: optimizer steps in a row.
        ceiling: log of the vocabulary, nats; None if it is not known.

    Example:
        >>> guard, state = Guard(bound=2.0, patience=2), GuardState()
        >>> for entropy in (1.0, 2.1, 2.2):
        ...     state = guard.update(state, entropy, target=0.6)
        >>> state.above, guard.exceeded(state)
        (2, True)
        >>> Guard(3.0).limit(1.5), Guard(3.0, ceiling=math.log(32)).limit(1.5)
        (4.5, 3.12)
    """

    bound: float
    patience: int = PATIENCE
    ceiling: float | None = None

    def limit(self, reference: float) -> float:
        """Nats per token above which a step counts."""
        high = math.inf if self.ceiling is None else NEARLY_UNIFORM * self.ceiling
        return min(self.bound * reference, high) if reference < high else self.bound * reference

    def update(self, state: GuardState, entropy: float | None, target: float | None) -> GuardState:
        """Take in the reading of a step; one that is not a number changes nothing."""
        if not self.bound or entropy is None or math.isnan(entropy):
            return state
        start = entropy if state.start is None else state.start
        reference = max(start, target or 0.0)
        return GuardState(start, state.above + 1 if entropy > self.limit(reference) else 0, reference)

    def exceeded(self, state: GuardState) -> bool:
        """Whether the run should stop."""
        return bool(self.bound) and state.above >= self.patience
