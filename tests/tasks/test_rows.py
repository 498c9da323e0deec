r"""Rows of users: what is read, what is refused in one line with its row, and what is left out with a warning."""

import json
import re
import time

import pytest

from isentropic.tasks import load_task
from isentropic.tasks.checks import name_wrong_gold, training_rows

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


def chat(i):
    return [CHAT[0], {"role": "user", "content": f"{i}+1?"}]


def verl(i):
    """verl's own layout, as its examples write GSM8K."""
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{i}+1?", "name": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
        "extra_info": {"index": i, "split": "train"},
    }


def load(tmp_path, rows, options="", text=None):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if text is None else text)
    task = load_task(f"file:{path}{options}")
    return task, [*task.train(0), *task.heldout()]


def refused(tmp_path, rows, options=""):
    with pytest.raises(ValueError, match=r"^task ") as error:
        load(tmp_path, rows, options)
    assert "\n" not in str(error.value)
    return str(error.value)


def plain(num=30, **changes):
    return [{"prompt": f"{i}+1?", "answer": str(i + 1), **changes} for i in range(num)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("answer", ["", ":answer=reward_model.ground_truth"])
def test_the_layout_of_verl_is_read(tmp_path, kind, answer):
    rows = [verl(i) for i in range(40)]
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(f"file:{path}:verifier=numeric{answer}")
    read = sorted([*task.train(0), *task.heldout()], key=lambda row: int(row["answer"]))
    assert read == [{"prompt": [{"role": "user", "content": f"{i}+1?"}], "answer": str(i + 1)} for i in range(40)]
    assert task.reward(["#### 3", "#### 4"], answer=["3", "3"]) == [1.0, 0.0]


def test_a_scorer_of_verl_is_not_chosen_in_silence(tmp_path, caplog):
    load(tmp_path, [verl(i) for i in range(30)])
    assert "openai/gsm8k" in caplog.text
    assert "verifier=exact judges" in caplog.text
    caplog.clear()
    load(tmp_path, [verl(i) for i in range(30)], ":verifier=numeric")
    assert caplog.text == ""


@pytest.mark.parametrize("format", ["plain", "chat"])
def test_conversations_stay_as_they_are(tmp_path, format):
    _, rows = load(tmp_path, [{"prompt": chat(i), "answer": "2"} for i in range(30)], f":format={format}")
    assert sorted(row["prompt"][1]["content"] for row in rows) == sorted(f"{i}+1?" for i in range(30))
    assert all(row["prompt"][0] == CHAT[0] for row in rows)


def test_parts_of_a_message_that_are_texts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    _, rows = load(tmp_path, [{"prompt": [{"role": "user", "content": parts}], "answer": "2"}])
    assert rows[0]["prompt"] == [{"role": "user", "content": "1+1?"}]


def test_fields_of_a_column_and_numbers_are_read(tmp_path):
    rows = [{"prompt": f"{i}?", "gold": {"value": value}} for i, value in enumerate([7, 7.0, 0.5, 1e-7, -0.0, 10**400])]
    _, read = load(tmp_path, rows, ":answer=gold.value")
    answers = {row["prompt"]: row["answer"] for row in read}
    assert [answers[f"{i}?"] for i in range(6)] == ["7", "7", "0.5", "0.0000001", "0", str(10**400)]


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n" for row in plain()).encode())
    task = load_task(f"file:{path}")
    assert len(task.train(0)) + len(task.heldout()) == 30


BAD_ANSWERS = [
    (True, "got true, must be a text or a number; write it as a text"),
    (None, "got null, must be a text or a number; leave the row out"),
    (float("nan"), "got nan, must be a text or a number; leave the row out"),
    (float("inf"), "got inf, must be a text or a number"),
    (["1"], "got a list of 1, must be a text or a number; write one text per row"),
    ({"ground_truth": "1"}, "got an object with ground_truth, .*; name a field of it, such as answer.ground_truth"),
    ("a \ud800 b", "got a lone surrogate, half of a character, at position 2"),
    ("  ", "has an empty 'answer'"),
]


@pytest.mark.parametrize(("value", "says"), BAD_ANSWERS, ids=[says[:24] for _, says in BAD_ANSWERS])
def test_an_answer_that_is_no_text_is_refused_with_its_row(tmp_path, value, says):
    rows = plain()
    rows[16]["answer"] = value
    message = refused(tmp_path, rows)
    assert "row 17" in message
    assert re.search(says, message)


BAD_PROMPTS = [
    (True, "got true"),
    (None, "got null"),
    ({"text": "q"}, "an object with text, .* such as prompt.text"),
    ("\udfff", "lone surrogate"),
    ("", "prompt is empty"),
    ([], "an empty list, must have messages"),
    (["q"], "message 1 is a text, 'q', must have a role"),
    ([{"role": "user"}], "message 1 is an object with role, must have a role, one of system"),
    ([{"role": "boss", "content": "q"}], "must have a role, one of system"),
    ([{"role": "user", "content": None}], "message 1 has the content null, must be a text"),
    ([{"role": "user", "content": [{"type": "image"}]}], "has the content a list of 1"),
    ([{"role": "user", "content": "\ud800"}], "message 1: got a lone surrogate"),
    ([*CHAT, {"role": "assistant", "content": "2"}], "ends with the assistant's message"),
    ([{"role": "user", "content": " "}], "is empty"),
]


@pytest.mark.parametrize(("value", "says"), BAD_PROMPTS, ids=[says[:24] for _, says in BAD_PROMPTS])
def test_a_prompt_that_is_neither_text_nor_conversation_is_refused_with_its_row(tmp_path, value, says):
    message = refused(tmp_path, [{"prompt": value, "answer": "1"}, *plain()])
    assert "row 1: prompt" in message
    assert re.search(says, message)


def test_prompts_of_two_forms_are_refused(tmp_path):
    message = refused(tmp_path, [*plain(3), {"prompt": CHAT, "answer": "2"}])
    assert "row 4: prompt: got a list of 2, and row 1 has a text" in message


def test_bytes_and_dates_of_parquet_are_refused(tmp_path):
    import datetime

    import pyarrow as pa
    from pyarrow import parquet

    for value, says in ((b"1", "type bytes"), (datetime.date(2024, 1, 1), "type date")):
        parquet.write_table(pa.table({"prompt": ["q"], "answer": [value]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=f"row 1: answer: got a value of {says}, must be a text or a number"):
            load_task(f"file:{tmp_path}/a.parquet").heldout()
    (tmp_path / "b.parquet").write_text("no parquet\n")
    with pytest.raises(ValueError, match=r"b.parquet is not Parquet: .*; write it again"):
        load_task(f"file:{tmp_path}/b.parquet").heldout()


@pytest.mark.parametrize(
    "text", ["[1]\n", "7\n", '"a"\n', "null\n", "[" * 100_000, "{'prompt': 1}\n", "prompt,answer\n"]
)
def test_lines_that_are_no_objects_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"line 1: .*must be a JSON object") as error:
        load(tmp_path, [], text=text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_misspelt_column_is_not_replaced(tmp_path):
    message = refused(tmp_path, [verl(1)], ":answer=anwser")
    assert "row 1 has no column 'anwser', got data_source, prompt, ability" in message
    message = refused(tmp_path, [verl(1)], ":answer=reward_model.gold")
    assert "no column 'reward_model.gold'" in message
    message = refused(tmp_path, [{"prompt": "q", "solution": "It is 3."}])
    assert "row 1: solution has no \\boxed{}" in message


def test_a_prompt_with_two_answers_is_refused(tmp_path):
    message = refused(tmp_path, [*plain(), {"prompt": "7+1?", "answer": "9"}])
    assert "rows 8 and 31 have the same prompt and two answers, '8' and '9'; a prompt must have one answer" in message
    # Two spellings of one answer are one.
    _, rows = load(tmp_path, [*plain(), {"prompt": "7+1?", "answer": "8.0"}], ":verifier=numeric")
    assert len(rows) == 31


def test_of_a_hub_they_are_left_out_with_a_warning(tmp_path, monkeypatch, caplog):
    datasets = pytest.importorskip("datasets")
    rows = [*plain(), {"prompt": "7+1?", "answer": "9"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows))
    task = load_task("hub:a/b")
    read = [*task.train(0), *task.heldout()]
    assert len(read) == 29
    assert not [row for row in read if row["prompt"] == "7+1?"]
    assert "rows 8 and 31 have the same prompt and two answers" in caplog.text


def test_held_out_rows_are_asked_once(tmp_path, caplog):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*plain(10), *plain(4)]))
    task, _ = load(tmp_path, [*plain(5), *plain(5)], f":heldout={tmp_path}/test.jsonl")
    assert len(task.train(0)) == 10
    assert len(task.heldout()) == 10
    assert "4 of 14 held-out rows have the prompt of another row" in caplog.text


@pytest.mark.parametrize(
    ("verifier", "bad"), [("numeric", "about seven"), ("math", "}{"), ("math", "x" * 1001), ("numeric", "49x")]
)
def test_an_answer_that_can_never_be_right_is_named(tmp_path, caplog, verifier, bad):
    if verifier == "math":
        pytest.importorskip("math_verify")
    rows = plain()
    rows[4]["answer"] = bad
    load(tmp_path, rows, f":verifier={verifier}")
    (line,) = caplog.messages
    assert f"row 5: no completion can be right for the answer {bad[:20]!r}"[:-1] in line
    assert f"by verifier={verifier}; leave such rows out, or choose another verifier" in line
    caplog.clear()
    message = refused(tmp_path, plain(answer=bad), f":verifier={verifier}")
    assert "row 1: no completion can be right" in message
    assert "and so for 29 more of 30 rows; choose another verifier, one of exact, numeric, math" in message


def test_trying_every_answer_is_fast(tmp_path):
    rows = [{"prompt": f"{i}?", "answer": f"{i}\n#### {i:,}"} for i in range(5000)]
    began = time.monotonic()
    load(tmp_path, rows, ":verifier=numeric")
    assert time.monotonic() - began < 5


OWN = """
from isentropic.tasks import Task

def make(rows, gold=None):
    return Task("own", "", lambda seed: rows, lambda: rows, lambda text, word: text == word, str, 4, gold=gold)

def fail(*args):
    raise KeyError("no such thing")

good = make([{"prompt": "a", "word": "b"}])
not_dicts = make(["a"])
no_prompt = make([{"word": "b"}])
no_text = make([{"prompt": 7, "word": "b"}])
none = make(None)
fails = Task("own", "", fail, fail, lambda c: True, str, 4)
wrong_gold = make([{"prompt": "Say b", "word": "b"}], gold=lambda row: "c")
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("not_dicts", "row 1: got str, must be a dict with a prompt"),
        ("no_prompt", "row 1: got the prompt None, must be a dict with a prompt"),
        ("no_text", "row 1: got the prompt 7, must be"),
        ("none", "TypeError: 'NoneType' object is not iterable"),
        ("fails", r"cannot be loaded: KeyError: 'no such thing' \(.*own_rows.py, line 8\); correct that file"),
    ],
)
def test_rows_of_a_task_of_ones_own(tmp_path, name, says):
    (tmp_path / "own_rows.py").write_text(OWN)
    task = load_task(f"{tmp_path}/own_rows.py:{name}")
    for rows in (lambda: task.train(0), task.heldout):
        with pytest.raises(ValueError, match=says) as error:
            rows()
        assert "\n" not in str(error.value)


def test_a_gold_that_its_own_verifier_refuses_is_named(tmp_path, caplog):
    (tmp_path / "own_rows.py").write_text(OWN)
    good = load_task(f"{tmp_path}/own_rows.py:good")
    assert good.heldout() == [{"prompt": "a", "word": "b"}]
    name_wrong_gold(good, good.heldout())
    name_wrong_gold(load_task("expr"), load_task("expr").train(0))
    assert caplog.text == ""
    wrong = load_task(f"{tmp_path}/own_rows.py:wrong_gold")
    name_wrong_gold(wrong, wrong.heldout())
    assert "the right completion 'c' is wrong by its own verifier, for the row with the prompt 'Say b'" in caplog.text
    with pytest.raises(ValueError, match="are held out too"):
        training_rows(wrong, 0)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def f(:\n", r"SyntaxError: .*broken_task.py, line 1\)"),
        ("x = 1\nx.y\n", r"AttributeError: .*broken_task.py, line 2\)"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("import a_module_that_is_missing\n", "ModuleNotFoundError: .*'a_module_that_is_missing'"),
        ("raise ValueError('one\\ntwo')\n", "ValueError: one two"),
        ("\x00", "SyntaxError|ValueError"),
        ("def f():\n    return f()\nf()\n", "RecursionError"),
    ],
)
def test_a_task_file_that_cannot_be_run_is_one_line(tmp_path, code, says):
    (tmp_path / "broken_task.py").write_text(code)
    with pytest.raises(ValueError, match=says) as error:
        load_task(f"{tmp_path}/broken_task.py:task")
    assert "\n" not in str(error.value)
    assert "cannot be loaded" in str(error.value)


LONG = "a" * 300
BAD_NAMES = [
    f"file:{LONG}.jsonl",
    f"file:rows.jsonl:heldout={LONG}.jsonl",
    f"gsm8k:path={LONG}",
    f"{LONG}.py:task",
    f"{LONG}:task",
    "a" * 10_000,
    f"file:{'a/' * 10_000}.jsonl",
    "file:~nobody_of_this_name/a.jsonl",
    "file:a\x00b.jsonl",
    "file:\ud800.jsonl",
    ":task",
    ".relative:task",
    "a..b:task",
    "a b:task",
    "\ud800:task",
    f"appworld:train={LONG}:test={LONG}:ports=8000",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=[ascii(name[:24]) for name in BAD_NAMES])
def test_a_name_that_cannot_be_is_one_line(name):
    with pytest.raises(ValueError, match=r"task|name") as error:
        load_task(name)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1200
