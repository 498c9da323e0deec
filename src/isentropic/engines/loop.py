"""What every adapter does alike: the row of an optimizer step, and the way back from a checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..control.thermostat import Thermostat, ThermostatState
from ..recipes.compose import Recipe, knob_range
from ..runs.record import CHECKPOINT_FILE
from ..types import EntropyReading

logger = logging.getLogger("isentropic")
MAX_REFUSED = 10


class EntropyReadingError(RuntimeError):
    """Ten readings in a row were refused."""


def row_of(
    totals: dict[str, float],
    reading: EntropyReading,
    refused: int,
    recipe: Recipe,
    thermostat: Thermostat | None,
    before: ThermostatState | None,
    after: ThermostatState | None,
) -> dict[str, Any]:
    """The row of an optimizer step, as far as sums and the controller make it.

    Args:
        totals: sums over tokens of all ranks: ``tokens low high adv logp adv_logp ratio outside``.
        reading: the step's.
        refused: readings refused in a row, this one included.
        recipe, thermostat: what is under control; a thermostat of None only monitors.
        before, after: the controller's state during the step and after it.
    """
    n = max(totals["tokens"], 1.0)
    row: dict[str, Any] = {
        "entropy/mean": reading.mean,
        "entropy/tokens": reading.count,
        "entropy/refused": refused,
        "clip/low_frac": totals["low"] / n,
        "clip/high_frac": totals["high"] / n,
        "ratio/mean": totals["ratio"] / n,
        "ratio/outside_frac": totals["outside"] / n,
        "cov/adv_logp": totals["adv_logp"] / n - totals["adv"] / n * totals["logp"] / n,
        "adv/mean": totals["adv"] / n,
    }
    if thermostat is None or before is None or after is None:
        return row
    level = thermostat.level(after)
    return row | {
        "entropy/target": level,
        "entropy/error": None if level is None else (reading.mean - level) / level,
        "knob/value": before.value,
        "knob/saturated": int(knob_range(recipe).saturated(before.value)),
    }


def saved_in(folder: str | Path) -> dict[str, Any] | None:
    """What a checkpoint holds of ours; None, with a warning, where it holds nothing."""
    path = Path(folder) / CHECKPOINT_FILE
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    logger.warning("%s has no %s: the controller starts afresh", folder, CHECKPOINT_FILE)
    return None


def restored(saved: dict[str, Any], recipe: Recipe, thermostat: Thermostat) -> ThermostatState:
    """The controller's state of a checkpoint; a fresh one, with a warning, where it steered something else."""
    if saved["state"] is None:
        return thermostat.init()
    changed = [k for k in ("knob", "controller", "target") if saved["recipe"][k] != getattr(recipe, k)]
    if changed:
        logger.warning("%s changed since the checkpoint: the controller starts afresh", ", ".join(changed))
        return thermostat.init()
    return thermostat.restore(saved["state"])
