"""Why the target of a run moved: its course as a few phases, each with the reason that was in force."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from .record import is_number

SMALL = 0.03  # share of its level by which a target moves without a phase of its own


class Phase(NamedTuple):
    """Consecutive optimizer steps over which the target had one reason.

    Attributes:
        first, last: steps.
        start, end: the target, nats per token.
        why: the reason at the last of them, with its figures.
    """

    first: int
    last: int
    start: float
    end: float
    why: str


def phases(rows: Sequence[dict[str, Any]], most: int = 8) -> list[Phase]:
    """The phases of a target that finds its own level; none if it gives no reasons.

    Reasons that differ in their figures alone are one. A move by less than 3 % that follows another becomes part of it,
    and so do two moves in the same direction. A level that is held before such a small move and after it is one. While
    there are more phases than ``most``, the shortest one becomes part of the one before it.

    Args:
        rows: of metrics.jsonl, in order of steps.
        most: phases at most.

    Example:
        >>> row = {"entropy/target": 1.0, "entropy/target_why": "lowered: 71% of groups mixed, accuracy rising"}
        >>> rows = [{**row, "step": 1}, {**row, "step": 2, "entropy/target": 0.9}]
        >>> phases(rows)[0].start, phases(rows)[0].end
        (1.0, 0.9)
    """
    told = [row for row in rows if row.get("entropy/target_why") and is_number(row.get("entropy/target"))]
    found = []
    for _, group in groupby(told, key=lambda row: re.sub(r"[-+.\d]+%?", "#", row["entropy/target_why"])):
        of_one = list(group)
        first, last = of_one[0], of_one[-1]
        ends = first["entropy/target"], last["entropy/target"]
        found.append(Phase(first["step"], last["step"], *ends, last["entropy/target_why"]))
        if len(found) > 1 and (whole := _one_move(*found[-2:])):
            found[-2:] = [whole]
        if len(found) > 2 and _held_throughout(*found[-3:]):
            found[-3:] = [found[-1]._replace(first=found[-3].first, start=found[-3].start)]
    while len(found) > max(most, 1):
        at = min(range(1, len(found)), key=lambda i: found[i].last - found[i].first)
        found[at - 1 : at + 1] = [found[at - 1]._replace(last=found[at].last, end=found[at].end)]
    return found


def _one_move(before: Phase, after: Phase) -> Phase | None:
    """Two moves as one, if the second is small or goes on in the same direction."""
    words = [phase.why.split(":")[0] for phase in (before, after)]
    if not {"raised", "lowered"}.issuperset(words):
        return None
    whole = before._replace(last=after.last, end=after.end)
    if words[0] == words[1]:
        return whole._replace(why=after.why)
    return whole if abs(after.end / after.start - 1) < SMALL else None


def _held_throughout(before: Phase, between: Phase, after: Phase) -> bool:
    """Whether a level is held as before, after a move too small to have a phase of its own."""
    words = [phase.why.split(":")[0] for phase in (before, after)]
    return words[0] == words[1] and words[0].startswith("held") and abs(between.end / before.end - 1) < SMALL


def phase_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The phases as lines of text.

    Example:
        >>> why = "held at its ceiling: no group has both right and wrong answers"
        >>> phase_lines([{"step": 3, "entropy/target": 1.0, "entropy/target_why": why}])
        ['target 1.000, step 3: held at its ceiling: no group has both right and wrong answers']
    """
    lines = []
    for phase in phases(rows):
        level = f"{phase.start:.3f}" if phase.start == phase.end else f"{phase.start:.3f} → {phase.end:.3f}"
        steps = f"step {phase.first}" if phase.first == phase.last else f"steps {phase.first} to {phase.last}"
        lines.append(f"target {level}, {steps}: {phase.why}")
    return lines
