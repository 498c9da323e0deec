"""Measured on predicted change over blocks: by hand, through noise, and what cannot be calibrated."""

import pytest

from isentropic.runs.calibration import block_changes, calibrate


def rows_of(changes, slope=1.0, drift=0.0, noise=0.0):
    level, rows = 5.0, []
    for t, change in enumerate(changes):
        rows.append({"step": t + 1, "entropy/mean": level + (noise if t % 2 else -noise), "predict/change": change})
        level += slope * change + drift
    return rows


def test_block_changes_by_hand():
    rows = rows_of([-1.0, -1.0, -3.0, -3.0, 5.0], slope=2.0)
    # Entropy 5, 3, 1, −5, −11; predictions so far 0, −1, −2, −5, −8: means of two 4, −2 and −0.5, −3.5.
    assert block_changes(rows, block=2) == [(-3.0, -6.0)]


def test_a_prediction_counts_until_the_next():
    rows = rows_of([-1.0, -1.0, -1.0, -1.0])
    rows[1]["predict/change"] = None
    del rows[2]["predict/change"]
    assert block_changes(rows, block=2) == [(-2.0, -2.0)]


def test_slope_and_drift_are_found_through_noise():
    rows = rows_of([-1e-4 * (1 + (t // 100) % 3) for t in range(600)], slope=7, drift=2e-4, noise=0.01)
    calibration = calibrate(rows)
    assert calibration.slope == pytest.approx(7, rel=1e-6)
    assert calibration.drift == pytest.approx(2e-4, rel=1e-6)
    assert calibration.correlation == pytest.approx(1.0)
    assert calibration.blocks == 29


def test_another_form_has_its_own_slope():
    rows = [
        row | {"predict/change_simple": row["predict/change"] / 2} for row in rows_of([-1e-4 * t for t in range(99)])
    ]
    assert calibrate(rows, "predict/change").slope == pytest.approx(1)
    assert calibrate(rows, "predict/change_simple").slope == pytest.approx(2)


def test_what_cannot_be_calibrated():
    rows = rows_of([-1e-4 * t for t in range(99)])
    assert calibrate(rows[:79]) is None
    assert calibrate(rows[:80]).blocks == 3
    assert calibrate([{"step": 1, "entropy/mean": 1.0}] * 200) is None
    assert calibrate(rows_of([0.0] * 99, drift=0.1)) is None
