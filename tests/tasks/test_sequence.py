"""Two tasks as one: rows in order, and every completion judged by the task of its row."""

import pytest
from task_cases import letters, spaces

from isentropic.tasks import Task
from isentropic.tasks.sequence import in_order


def test_rows_come_in_order_and_every_one_is_judged_by_its_own_task():
    both = in_order(letters, spaces, num_first=70, num_then=8)
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
        in_order(letters, letters, 1, 1)


def test_tasks_in_order_must_ask_alike():
    chat = Task("c", "", lambda s: [{"prompt": [{"role": "user", "content": "a"}]}], list, lambda c: True, str, 4)
    text = Task("t", "", lambda s: [{"prompt": "a"}], list, lambda c: True, str, 4)
    with pytest.raises(ValueError, match="c and t need prompts of one form"):
        in_order(chat, text, 2, 2).train(0)
