"""A policy at any temperature: points, frontier, its own best temperature, and the best step of a run."""

from itertools import pairwise

import pytest

from isentropic.runs.frontier import Frontier, Point, best_step, best_temperature, by_temperature, frontier, points

HOT = {"pass@1": 0.4, "pass@4": 0.9, "distinct": 3.0}
WARM = {"pass@1": 0.6, "pass@4": 0.8, "distinct": 2.0, "majority": 0.7}
COLD = {"pass@1": 0.8, "pass@4": 0.85, "distinct": 1.0}
ROW = {"k": 4, "temperature": 1.0, **WARM, "at": {"0.5": COLD, "1.5": HOT}, "greedy": 0.7}


def test_temperatures_fall_and_greedy_is_last():
    assert list(by_temperature(ROW)) == [1.5, 1.0, 0.5]
    assert points(ROW) == [
        Point(1.5, 0.4, 0.9, 3.0),
        Point(1.0, 0.6, 0.8, 2.0, 0.7),
        Point(0.5, 0.8, 0.85, 1.0),
        Point(0.0, 0.7, 0.7, 0.7, 0.7),
    ]
    assert [point.temperature for point in points({**ROW, "at": None, "greedy": None})] == [1.0]


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [
        (0.0, (3.0, 0.9)),
        (0.4, (3.0, 0.9)),
        (0.5, (2.5, 0.85)),  # halfway from hot to warm
        (0.7, (1.5, 0.85)),  # distinct halfway from warm to cold, pass@4 of the cold one
        (0.8, (1.0, 0.85)),
    ],
)
def test_the_frontier_mixes_neighbouring_temperatures(at_least, expected):
    assert frontier(ROW, at_least) == pytest.approx(Frontier(*expected))


def test_an_accuracy_out_of_reach_has_no_frontier():
    assert frontier(ROW, 0.81) is None


def test_the_frontier_never_rises_with_the_accuracy():
    values = [frontier(ROW, i / 100) for i in range(81)]
    for a, b in pairwise(values):
        assert a.distinct >= b.distinct
        assert a.search >= b.search


def counts(cold, warm=(1, 1, 1, 1), **more):
    return {"temperature": 1.0, "num_samples": [2] * 4, "num_correct": list(warm), **more} | {
        "at": {"0.5": {"num_correct": list(cold), "num_distinct": [1, 2, 3, 4]}}
    }


def test_a_temperature_is_chosen_on_one_half_and_scored_on_the_other():
    # Even prompts choose 0.5 and odd ones 1.0: each is scored where it was not chosen, and loses.
    best = best_temperature(counts((2, 0, 2, 0)))
    assert best.temperatures == (0.5, 1.0)
    assert best.accuracy == pytest.approx((0.5 + 0 + 0.5 + 0) / 4)
    assert best_temperature(counts((2, 2, 2, 2))) == (1.0, (0.5, 0.5))


def test_one_prompt_has_a_best_temperature_too():
    row = {"temperature": 1.0, "num_samples": [4], "num_correct": [3]}
    assert best_temperature(row) == (0.75, (1.0, 1.0))


def test_the_best_step_is_chosen_on_even_prompts_and_scored_on_odd_ones():
    rows = [
        counts((0, 0, 0, 0), step=0, num_distinct=[1] * 4),
        counts((2, 1, 2, 0), step=4, greedy_correct=[1, 1, 1, 0]),
    ]
    best = best_step([*rows, rows[1] | {"step": 8}])  # of equals the first
    assert (best.step, best.greedy, best.accuracy, best.distinct) == (4, 0.5, 0.25, 3.0)
    assert best.search == 0.5
    assert best_step([]) is None
    assert best_step([{"step": 0, "temperature": 1.0, "num_samples": [2], "num_correct": [1]}]) is None
