"""Tasks as one: rows in order, and every completion judged by the task of its row."""

import pytest
from task_cases import empty, letters, spaces

from isentropic.tasks import Task, load_task
from isentropic.tasks.sequence import SEQUENCES, in_order


def test_rows_come_in_order_and_every_one_is_judged_by_its_own_task():
    both = in_order([letters, spaces], [70, 8])
    rows = both.train(3)
    assert [row["task"] for row in rows] == ["letters"] * 70 + ["spaces"] * 8
    # A pass over a task's prompts is a shuffle of all of them.
    first = [row["prompt"] for row in rows[:64]]
    assert sorted(first) == sorted(row["prompt"] for row in letters.train(3))
    assert first != [row["prompt"] for row in letters.train(3)]
    assert {row["prompt"] for row in rows[70:75]} == {row["prompt"] for row in spaces.train(3)}
    assert rows == both.train(3)
    assert rows != both.train(4)
    assert all(set(row) == {"prompt", "task", "digit", "other"} for row in rows)
    columns = {"task": ["letters", "spaces"], "digit": [1, None], "other": [None, 0]}
    assert both.reward(["1", "1"], prompts=["a", "b"], **columns) == [1.0, 0.0]
    assert both.reward(["x", "x"], prompts=["a", "b"], **columns) == [0.0, 1.0]
    assert both.max_completion_length == 6
    with pytest.raises(ValueError, match="different names"):
        in_order([letters, letters], [1, 1])


def test_tasks_in_order_must_ask_alike():
    chat = Task("c", "", lambda s: [{"prompt": [{"role": "user", "content": "a"}]}], list, lambda c: True, str, 4)
    text = Task("t", "", lambda s: [{"prompt": "a"}], list, lambda c: True, str, 4)
    with pytest.raises(ValueError, match="c and t need prompts of the same form"):
        in_order([chat, text], [2, 2]).train(0)
    with pytest.raises(ValueError, match="t and c need prompts of the same form"):
        in_order([text, empty, chat], [2, 2, 2]).train(0)


def test_three_tasks_come_in_order_and_each_judges_its_own():
    three = in_order([letters, spaces, empty], [4, 7, 3])
    rows = three.train(1)
    assert [row["task"] for row in rows] == ["letters"] * 4 + ["spaces"] * 7 + ["empty"] * 3
    assert all(set(row) == {"prompt", "task", "digit", "other", "place"} for row in rows)
    columns = {"task": ["letters", "spaces", "empty"], "digit": [1, None, None], "other": [None, 0, None]}
    columns |= {"place": [None, None, 0], "prompts": ["a", "b", "c"]}
    assert three.reward(["1", "1", "1"], **columns) == [1.0, 0.0, 0.0]
    assert three.reward(["x", "x", "x"], **columns) == [0.0, 1.0, 0.0]
    assert three.reward(["", "", ""], **columns) == [0.0, 1.0, 1.0]
    assert three.name == "letters then spaces then empty"
    assert three.heldout() == empty.heldout()
    assert (three.max_completion_length, three.normalise) == (6, empty.normalise)
    with pytest.raises(ValueError, match="need different names, got 'letters' twice"):
        in_order([letters, spaces, letters], [1, 1, 1])


def test_no_task_of_a_sequence_is_trained_on_what_another_holds_out():
    def task(name, train, heldout):
        rows = [[{"prompt": p} for p in prompts] for prompts in (train, heldout)]
        return Task(name, "", lambda seed: rows[0], lambda: rows[1], lambda c: True, str, 4)

    tasks = [task("a", "uvw", "x"), task("b", "xuv", "y"), task("c", "uyz", "w")]
    rows = in_order(tasks, [4, 4, 4]).train(0)
    asked = {name: {row["prompt"] for row in rows if row["task"] == name} for name in "abc"}
    assert asked == {"a": {"u", "v"}, "b": {"u", "v"}, "c": {"u", "z"}}


@pytest.mark.parametrize("name", [name for name, one in SEQUENCES.items() if one.tasks[0].startswith("expr")])
def test_a_named_sequence_is_of_tasks_that_can_follow_one_another(name):
    tasks = [load_task(one) for one in SEQUENCES[name].tasks]
    rows = in_order(tasks, [3] * len(tasks)).train(0)
    assert [row["task"] for row in rows] == [task.name for task in tasks for _ in range(3)]
    assert SEQUENCES[name].meaning
    # What is right in the second task of a reversal is right in the first one too, and a sum is right in that alone.
    assert tasks[0].verify("9*8-3-4", 65, 5)
    assert tasks[0].verify("9*8-3+4", 73, 5)
    assert tasks[1].verify("9*8-3-4", 65, 5)
    assert not tasks[1].verify("9*8-3+4", 73, 5)


def test_the_name_of_a_sequence_is_suggested_and_is_no_task():
    with pytest.raises(ValueError, match=r"is a sequence.* name one of its tasks: expr, expr:need=no-plus"):
        load_task("reversal")
    with pytest.raises(ValueError, match=r"got 'reversl' \(did you mean reversal\?\)"):
        load_task("reversl")
