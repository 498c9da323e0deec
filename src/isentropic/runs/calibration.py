"""How far entropy moves relative to its prediction: one regression, which `explain` and the page share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from .record import is_number

BLOCK = 20  # steps over which readings are averaged before measured and predicted changes are compared
MIN_PAIRS = 3  # of neighbouring blocks
MIN_CORRELATION = 0.3  # below, predictions say little about a run


class Calibration(NamedTuple):
    """Measured on predicted change, over blocks of steps of a whole run.

    Attributes:
        slope: measured nats per predicted one, by least squares with an intercept.
        drift: the intercept: nats per step that no prediction explains.
        correlation: of the two, over blocks.
        blocks: how many pairs of neighbouring blocks there are.
    """

    slope: float
    drift: float
    correlation: float
    blocks: int

    @property
    def factor(self) -> str:
        """The slope in readable form.

        >>> Calibration(1934.2, 0.0, 0.9, 5).factor, Calibration(0.5123, 0.0, 0.9, 5).factor
        ('1,934', '0.512')
        """
        return f"{self.slope:,.0f}" if abs(self.slope) >= 100 else f"{self.slope:.3g}"


def block_changes(
    rows: Sequence[dict[str, Any]], name: str = "predict/change", block: int = BLOCK
) -> list[tuple[float, float]]:
    """Predicted and measured change of entropy from one block of steps to the next.

    Both the entropies and the running sum of the predictions are averaged over blocks; a change is the difference of
    neighbouring averages. A prediction counts for every step until the next one.

    Args:
        rows: of metrics.jsonl, in order of steps.
        name: the field that holds the prediction, nats per token and step.
        block: steps of a block.

    Returns:
        (predicted, measured) for each pair of neighbouring blocks, nats per token; a last block that is not full is
        left out.

    Example:
        >>> rows = [{"entropy/mean": 1.0 - 0.5 * t, "predict/change": -0.25} for t in range(4)]
        >>> block_changes(rows, block=2)
        [(-0.5, -1.0)]
    """
    entropies, sums, total, change = [], [], 0.0, None
    for row in rows:
        change = row[name] if is_number(row.get(name)) else change
        if is_number(row.get("entropy/mean")) and change is not None:
            entropies.append(row["entropy/mean"])
            sums.append(total)
        total += change or 0.0

    def differences(values: list[float]) -> list[float]:
        starts = range(0, len(values) - block + 1, block)
        means = [math.fsum(values[i : i + block]) / block for i in starts]
        return [after - before for before, after in pairwise(means)]

    return list(zip(differences(sums), differences(entropies), strict=True))


def calibrate(rows: Sequence[dict[str, Any]], name: str = "predict/change", block: int = BLOCK) -> Calibration | None:
    """Regress measured on predicted changes of entropy over neighbouring blocks of steps.

    ``measured = slope · predicted + drift · block``, least squares

    Why blocks and an intercept, and no line through the origin over single steps: the noise of one reading is larger
    than the change of one step, and is in both the difference before it and the one after it, so that a fit to single
    steps mostly reads noise; means over a block of n readings have 1/n of its variance. And what no prediction covers
    (momentum, weight decay, second order) moves entropy steadily in one direction; without an intercept the slope
    would take it up.

    Args:
        rows: of metrics.jsonl, in order of steps.
        name: the field that holds the prediction.
        block: steps of a block.

    Returns:
        None with fewer than three pairs of blocks, or if nothing is predicted.

    Example:
        >>> rows = [{"entropy/mean": 1 - 0.02 * t * t / 100, "predict/change": -0.0002 * t / 100} for t in range(100)]
        >>> calibration = calibrate(rows)
        >>> round(calibration.slope), round(calibration.correlation, 3), calibration.blocks
        (200, 1.0, 4)
    """
    changes = block_changes(rows, name, block)
    num = len(changes)
    if num < MIN_PAIRS:
        return None
    mean_p, mean_m = (math.fsum(values) / num for values in zip(*changes, strict=True))
    cov = math.fsum((m - mean_m) * (p - mean_p) for p, m in changes)
    var_m = math.fsum((m - mean_m) ** 2 for _, m in changes)
    var_p = math.fsum((p - mean_p) ** 2 for p, _ in changes)
    if not var_m * var_p > 0:
        return None
    slope = cov / var_p
    return Calibration(slope, (mean_m - slope * mean_p) / block, cov / math.sqrt(var_m * var_p), num)


def distrust(calibration: Calibration | None) -> str | None:
    """Why not to trust the predictions of a run; None if there is no reason.

    Args:
        calibration: of the whole run, or None if it is too short for one.

    Example:
        >>> distrust(Calibration(-3.0, 0.0, -0.2, 5))
        'predictions have the wrong sign: measured = -3 × predicted, with a correlation of -0.20 over 5 pairs of blocks'
        >>> distrust(Calibration(3.0, 0.0, 0.9, 5)) is None
        True
    """
    # A slope has the sign of the correlation.
    if calibration is None or calibration.correlation >= MIN_CORRELATION:
        return None
    wrong = "have the wrong sign" if calibration.slope < 0 else "hardly follow what was measured"
    return (
        f"predictions {wrong}: measured = {calibration.factor} × predicted, with a correlation of "
        f"{calibration.correlation:.2f} over {calibration.blocks} pairs of blocks"
    )
