"""Why a target moved, as phases."""

from isentropic.runs.moves import Phase, phase_lines, phases


def rows(*pairs):
    return [{"step": i, "entropy/target": level, "entropy/target_why": why} for i, (level, why) in enumerate(pairs, 1)]


def test_reasons_that_differ_in_figures_are_one_phase():
    found = phases(rows((1.0, "lowered: 70% of groups"), (0.9, "lowered: 71.5% of groups"), (0.9, "held: 0.2")))
    assert found == [Phase(1, 2, 1.0, 0.9, "lowered: 71.5% of groups"), Phase(3, 3, 0.9, 0.9, "held: 0.2")]


def test_the_shortest_phases_are_merged_into_those_before():
    pairs = [(1.0, "a")] * 5 + [(0.9, "b")] + [(0.8, "c")] * 4 + [(0.7, "d")] * 2
    found = phases(rows(*pairs), most=3)
    assert [(p.first, p.last, p.why) for p in found] == [(1, 6, "a"), (7, 10, "c"), (11, 12, "d")]
    assert found[0].end == 0.9
    assert len(phases(rows(*pairs), most=1)) == 1


def test_small_moves_and_moves_in_one_direction_are_part_of_the_move_before():
    down, up = [(1.0, "lowered: 0.1"), (0.9, "lowered: 0.2")], [(0.9, "raised: 0.1"), (0.92, "raised: 0.1")]
    again = [(0.92, "lowered: 0.3"), (0.8, "lowered: 0.4")]
    assert phases(rows(*down, *up, *again)) == [Phase(1, 6, 1.0, 0.8, "lowered: 0.4")]
    back = [(0.92, "raised: 0.5"), (0.99, "raised: 0.6")]
    assert [(p.last, p.why) for p in phases(rows(*down, *back))] == [(2, "lowered: 0.2"), (4, "raised: 0.6")]
    held = [(0.9, "held at its floor: 0.7")] * 2
    assert [p.last for p in phases(rows(*down, *held, *up))] == [2, 4, 6]


def test_a_level_that_is_held_before_and_after_a_small_move_is_one_phase():
    held, small, back = (1.0, "held at its ceiling: 0.1"), (0.98, "lowered: 0.2"), (0.99, "raised: 0.1")
    again = (1.0, "held at its ceiling: 0.3")
    assert phases(rows(held, small, back, again, small, again)) == [Phase(1, 6, 1.0, 1.0, again[1])]
    assert [p.last for p in phases(rows(held, (0.96, "lowered: 0.2"), again))] == [1, 2, 3]
    assert [p.last for p in phases(rows(held, small, (0.98, "held at its floor: 0.3")))] == [1, 2, 3]
    assert [p.last for p in phases(rows(small, back, small))] == [3]


def test_a_target_without_reasons_has_no_phases():
    assert phases([{"step": 1, "entropy/target": 1.0}, {"step": 2, "entropy/mean": 1.0}]) == []
    assert phase_lines([]) == []


def test_lines():
    lines = phase_lines(rows((1.0, "raised: x"), (1.25, "raised: x")))
    assert lines == ["target 1.000 → 1.250, steps 1 to 2: raised: x"]
