"""The closing figures, by hand: of what they are means, and what is missing."""

import math

import pytest

from isentropic.runs.summary import counted, scores, summary


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
    rows = [row(t, **{"entropy/error": 9.0, "knob/saturated": 1}) for t in range(1, 21)]
    assert summary(rows)["entropy/rms_error"] is None
    assert summary(rows)["knob/saturated"] is None
    errors = enumerate([0.0, -0.2, 0.2, None], 21)
    rows += [row(t, **{"entropy/error": error, "knob/saturated": int(t == 21)}) for t, error in errors]
    rows[-1]["entropy/target"] = None
    figures = summary(rows)
    assert figures["entropy/rms_error"] == pytest.approx(math.sqrt(0.08 / 3))
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


def evaluation(step, correct, **fields):
    """Of 4 prompts with 4 samples each."""
    pass_1 = sum(correct) / 16
    counts = {"num_correct": correct, "num_distinct": [min(c, 2) for c in correct], "num_samples": [4] * 4}
    return {
        "step": step,
        "task": "a",
        "k": 4,
        "temperature": 1.0,
        "pass@1": pass_1,
        "distinct": 1.0,
        **counts,
        **fields,
    }


def test_scores_are_an_evaluation_without_its_counts():
    cold = {
        "pass@1": 0.75,
        "pass@4": 0.75,
        "distinct": 0.5,
        "majority": 0.75,
        "num_correct": [4, 4, 0, 4],
        "num_tokens": 9,
    }
    row = evaluation(8, [4, 2, 4, 2], at={"0.5": cold}, greedy=0.25, majority=0.5, truncated_frac=0.1, intervals={})
    assert scores(row) == {
        "step": 8,
        "pass@1": 0.75,
        "distinct": 1.0,
        "majority": 0.5,
        "greedy": 0.25,
        "at": {"0.5": {"pass@1": 0.75, "pass@4": 0.75, "distinct": 0.5, "majority": 0.75}},
        # Even prompts are best at 1 (1 against 0.5), odd ones at 0.5; each is scored on the other half: 1 and 1/2 of
        # the halves at 1 and at 0.5.
        "best_pass@1": pytest.approx((0.5 + 0.5) / 2),
        "best_temperatures": [1.0, 0.5],
    }


def test_what_an_evaluation_lacks_its_scores_lack():
    row = {"step": 3, "pass@1": 0.5, "distinct": None, "greedy": None, "at": {"0.5": 3}}
    assert scores(row) == {"step": 3, "pass@1": 0.5, "at": {}}
    assert not counted(row)
    whole = evaluation(0, [1, 1, 1, 1])
    assert counted(whole)
    assert not counted({**whole, "num_samples": []})
    assert not counted({**whole, "num_correct": [1, 1]})
    assert not counted({**whole, "at": {"0.5": {"num_correct": [1]}}})
    assert counted({**whole, "at": {"0.5": {"num_correct": [1, 2, 3, 4]}}})


def test_the_best_evaluation_is_chosen_on_the_even_prompts_and_scored_on_the_odd_ones():
    rows = [evaluation(0, [4, 4, 4, 4]), evaluation(4, [3, 1, 3, 0]), evaluation(8, [2, 4, 2, 4])]
    figures = summary([row(1)], rows)
    # The start, before training, is no candidate; of the others step 4 is better on prompts 0 and 2.
    assert figures["best"] == {"step": 4, "greedy": None, "accuracy": 0.125, "distinct": 0.5, "search": 0.5}
    hot = {"num_correct": [0, 0, 0, 0], "num_distinct": [0, 0, 0, 0]}
    cold = {"num_correct": [4, 2, 4, 4], "num_distinct": [1, 1, 1, 1]}
    rows[2] |= {"at": {"1.5": hot, "0.5": cold}, "greedy_correct": [1, 0, 1, 1]}
    assert summary([row(1)], rows)["best"] == {"step": 8, "greedy": 0.5, "accuracy": 0.75, "distinct": 1, "search": 1}


def test_a_run_evaluated_at_its_ends_alone_has_no_best_evaluation():
    rows = [evaluation(0, [1, 1, 1, 1]), evaluation(8, [1, 1, 1, 1])]
    assert "best" not in summary([row(1)], rows)
    assert "best" in summary([row(1)], [*rows, evaluation(9, [1, 1, 1, 1])])
    assert "best" not in summary([row(1)], [*rows, {"step": 9, "task": "a", "pass@1": 0.5}])


def test_the_best_evaluation_is_of_the_last_task():
    rows = [evaluation(step, [4, 4, 4, 4], task=task) for step in (0, 4, 8) for task in ("a", "b")]
    rows[0::2] = [{**row, "num_correct": [1, 1, 1, 1]} for row in rows[0::2]]
    figures = summary([row(1)], rows)
    assert figures["best"]["accuracy"] == 1.0
    assert [list(scored) for scored in figures["before"].values()] == [[scores(row) for row in rows[0::2]]]
