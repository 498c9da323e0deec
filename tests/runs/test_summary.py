"""The closing figures, by hand: of what they are means, and what is missing."""

import pytest

from isentropic.runs.summary import summary


def row(step, **fields):
    return {"step": step, "entropy/mean": 1.0, "entropy/target": 1.0, "reward/mean": 0.0} | fields


def test_the_end_is_the_last_tenth():
    rows = [row(t, **{"entropy/mean": float(t), "reward/mean": t / 10, "samples/total": 8 * t}) for t in range(1, 31)]
    figures = summary(rows, seconds=3.14)
    assert figures["steps"] == 30
    assert figures["seconds"] == 3.1
    assert figures["samples"] == 240
    assert (figures["entropy/start"], figures["entropy/end"]) == (1.0, 29.0)  # mean of 28, 29, 30
    assert (figures["reward/start"], figures["reward/end"]) == (0.1, pytest.approx(2.9))
    assert figures["entropy/mean"] == 25.5  # of 21..30
    assert summary(rows[:5])["entropy/end"] == 5.0
    assert summary(rows[:5])["entropy/mean"] == 3.0


def test_error_and_share_at_a_bound_are_of_settled_steps():
    rows = [row(t, **{"entropy/mean": 9.0, "knob/saturated": 1}) for t in range(1, 21)]
    assert summary(rows)["entropy/rms_error"] is None
    assert summary(rows)["knob/saturated"] is None
    rows += [row(t, **{"entropy/mean": 1.1, "knob/saturated": int(t == 21)}) for t in range(21, 25)]
    rows[-1]["entropy/target"] = None
    figures = summary(rows)
    assert figures["entropy/rms_error"] == pytest.approx(0.1)
    assert figures["knob/saturated"] == 0.25
    assert figures["entropy/target"] is None


def test_evaluations_of_one_task():
    scores = [{"step": s, "task": "a", "k": 4, "pass@1": s / 10, "distinct": 2.0, "prompts": []} for s in (0, 4, 8)]
    figures = summary([row(1)], scores)
    assert figures["start"] == {"step": 0, "pass@1": 0.0, "distinct": 2.0}
    assert figures["end"] == {"step": 8, "pass@1": 0.8, "distinct": 2.0}
    assert "before" not in figures
    assert "end" not in summary([row(1)], scores[:1])


def test_evaluations_of_tasks_in_sequence():
    scores = [{"step": s, "task": task, "pass@1": s / 10} for s in (0, 4, 8) for task in ("a", "b")]
    figures = summary([row(1)], scores)
    assert figures["end"] == {"step": 8, "pass@1": 0.8}
    assert figures["before"] == {"a": [{"step": s, "pass@1": s / 10} for s in (0, 4, 8)]}


def test_what_is_missing_is_none():
    figures = summary([])
    assert figures.pop("steps") == 0
    assert set(figures.values()) == {None}
    figures = summary([{"step": 1}, {"step": 2, "reward/mean": None}])
    assert figures.pop("steps") == 2
    assert set(figures.values()) == {None}
    assert summary([row(t, **{"entropy/target": 0.0}) for t in range(1, 30)])["entropy/rms_error"] is None
