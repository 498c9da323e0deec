"""Tasks by name: options, files, mixtures, generators; what is wrong is said in one line."""

import json
import sys

import pytest

from isentropic.experiments.config import load
from isentropic.tasks import KINDS, Task, load_task
from isentropic.tasks import spec as spec_module
from isentropic.tasks.checks import best_constant, constant_line, training_rows
from isentropic.tasks.mixture import members, mixture

SUMS = "rg:chain_sum:min_terms=2:max_terms=2:min_digits=1:max_digits=1"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def apples(tmp_path):
    """GSM8K's form, in words of our own."""
    rows = [
        {"question": f"Ann has {i} apples and eats one.", "answer": f"{i}-1\n#### {i - 1:,}"} for i in range(1, 1301)
    ]
    write(tmp_path / "gsm8k_train.jsonl", rows[:1000])
    write(tmp_path / "gsm8k_test.jsonl", rows[1000:])
    return tmp_path


def test_gsm8k_from_a_directory(apples):
    task = load_task(f"gsm8k:path={apples}")
    row = next(r for r in task.heldout() if "1300 apples" in r["prompt"][0]["content"])
    assert row["answer"] == "1299"
    assert row["prompt"][0]["content"].startswith("Ann has 1300 apples and eats one.\n\nReason step by step")
    assert (len(task.train(0)), len(task.heldout()), task.max_completion_length) == (1000, 300, 512)
    assert task.train(0) != task.train(1)
    assert sorted(r["answer"] for r in task.train(0)) == sorted(r["answer"] for r in task.train(1))
    assert [r["answer"] for r in task.heldout()[:50]] != sorted(r["answer"] for r in task.heldout()[:50])
    texts = [r"\boxed{1299}", r"#### 1,299", r"\boxed{1300}"]
    assert task.reward(texts, answer=["1299"] * 3) == [1.0, 1.0, 0.0]


def test_plain_prompts_and_the_end_of_their_answers(apples):
    task = load_task(f"gsm8k:path={apples}:prompt=plain:tokens=64")
    assert task.max_completion_length == 64
    assert task.heldout()[0]["prompt"].endswith("\nAnswer:")
    assert task.reward(["It is \\boxed{4}\n\nQuestion: \\boxed{5}"], answer=["5"]) == [0.0]


def test_math_reads_the_box_of_the_solution_and_aime_cannot_train(tmp_path):
    pytest.importorskip("math_verify")
    rows = [{"problem": f"Halve {i}.", "solution": f"It is \\boxed{{\\frac{{{i}}}{{2}}}}."} for i in range(3, 60, 2)]
    write(tmp_path / "train.jsonl", rows[:20])
    write(tmp_path / "math500.jsonl", [{**r, "answer": "x"} for r in rows[20:]])
    write(tmp_path / "aime24.jsonl", [{"problem": "Three digits?", "answer": "025"}])
    task = load_task(f"math:path={tmp_path}")
    assert "\\frac{3}{2}" in {r["answer"] for r in task.train(0)}
    assert {r["answer"] for r in task.heldout()} == {"x"}
    aime = load_task(f"aime24:path={tmp_path}")
    assert aime.reward([r"so \boxed{25}"], answer=["025"]) == [1.0]
    with pytest.raises(ValueError, match=r"no rows to train on; use it with `isentropic eval"):
        aime.train(0)


def test_two_spellings_of_a_number_are_one_answer():
    task = load_task(SUMS)
    assert {task.normalise(text) for text in (" 12", " 12.", "12.0\nQuestion")} == {"12"}
    assert task.normalise(" 12  apples") == "12 apples"


def test_rows_of_ones_own_in_both_formats(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"ask": f"Say {i}", "reply": f"{i}"} for i in range(200)]
    write(tmp_path / "a.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    names = [f"file:{tmp_path / f'a.{kind}'}:prompt=ask:answer=reply:stop=line" for kind in ("jsonl", "parquet")]
    tasks = [load_task(name) for name in names]
    assert tasks[0].heldout() == tasks[1].heldout()
    train, heldout = tasks[0].train(0), tasks[0].heldout()
    assert len(train) + len(heldout) == 200
    assert 10 <= len(heldout) <= 30
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in heldout}
    assert tasks[0].reward(["7\n8", "8"], answer=["7", "7"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt": ', "line 2: .* every line must be a JSON object"),
        ('{"prompt": "a"}', "row 1 has no column 'answer', got prompt"),
        ('{"prompt": "a", "answer": " "}', "row 1 has an empty 'answer'"),
        ("[1]", r"line 1: got \[1\], must be a JSON object"),
        ("", "there are no rows"),
    ],
)
def test_bad_rows_are_told_by_their_line(tmp_path, text, says):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=says):
        load_task(f"file:{tmp_path}/a.jsonl").heldout()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gsm8k:pat=x", r"unknown option 'pat' \(did you mean path\?\); allowed: path, prompt, tokens"),
        ("gsm8k:path=nowhere", "path: got 'nowhere', must be a directory or a file, and does not exist"),
        ("gsm8k:prompt=chta", "prompt: got 'chta', must be one of chat, plain"),
        ("gsm8k:tokens=many", "tokens: got 'many', must be an integer"),
        ("file:a.csv", "must end in .jsonl or .parquet"),
        ("file:a.jsonl", "there is no such file"),
        ("hub:name", "must be hub:ORG/NAME"),
        ("mix:expr", "must be mix:TASK@WEIGHT"),
        ("mix:expr@0+expr-digit@1", "weights must be > 0"),
        ("mix:expr@1+expr@2", "is named twice"),
        ("mix:expr@1+textarena:FrozenLake-v0@1", r"'textarena:FrozenLake-v0', which is played.*--then"),
        ("my_tasks.py:short", "there is no such file"),
    ],
)
def test_bad_names_are_refused_before_anything_is_read(name, says):
    with pytest.raises(ValueError, match=says):
        load_task(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rg:chain_smu", "did you mean chain_sum"),
        ("rg:chain_sum:min_trms=2", r"unknown option 'min_trms' \(did you mean min_terms\?\)"),
        ("rg:chain_sum:min_terms=5:max_terms=2", "the generator refuses its options"),
        ("rg:chain_sum:heldout=0", "heldout: got 0, must be from 1"),
        ("rg:mini_sudoku", "answers have several lines.*use prompt=chat"),
    ],
)
def test_bad_generators_are_refused(name, says):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=says):
        load_task(name)


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setattr(spec_module, "find_spec", lambda name: None)
    for name in ("rg:chain_sum", "math:path=."):
        with pytest.raises(ValueError, match=r"which is not installed; pip install 'isentropic\[tasks\]'"):
            load_task(name)


def test_a_generator_in_few_shots():
    pytest.importorskip("reasoning_gym")
    task = load_task(f"{SUMS}:shots=2:rows=60:heldout=30")
    rows, heldout = task.train(0), task.heldout()
    prompt = heldout[0]["prompt"]
    assert prompt.count("Question: ") == 3
    assert prompt.endswith("=\nAnswer:")
    # Every prompt begins with the same shots, and no shot is asked.
    shots = prompt[: prompt.rindex("Question: ")]
    assert all(
        r["prompt"].startswith(shots) and r["prompt"].removeprefix(shots) not in shots for r in [*rows, *heldout]
    )
    assert task.heldout() == heldout
    assert task.train(1) != rows
    assert task.reward([f" {heldout[0]['answer']}\nand more"], item=[heldout[0]["item"]]) == [1.0]
    assert task.reward([" 1000"], item=[heldout[0]["item"]]) == [0.0]


def test_a_generator_in_a_chat():
    pytest.importorskip("reasoning_gym")
    (row,) = (task := load_task(f"{SUMS}:prompt=chat:heldout=1")).heldout()
    assert "between <answer> and </answer>" in row["prompt"][0]["content"]
    right, item = row["answer"], [row["item"]]
    assert task.reward([f"hm\n<answer> {right} </answer>"], item=item) == [1.0]
    assert task.reward([f"<answer>{right}</answer> no: <answer>1000</answer>"], item=item) == [0.0]
    assert task.reward([right], item=item) == [0.0]
    assert task.max_completion_length == 512


def test_a_task_in_a_file_may_import_its_neighbour(tmp_path):
    (tmp_path / "neighbour_of_task.py").write_text("operands = 3\n")
    (tmp_path / "own_task_file.py").write_text(
        "from isentropic.tasks.expressions import expressions\n"
        "from neighbour_of_task import operands\nshort = expressions(operands)\n"
    )
    try:
        assert load_task(f"{tmp_path}/own_task_file.py:short").name == "expr:operands=3"
    finally:
        sys.path.remove(str(tmp_path))


def test_a_mixture_keeps_its_shares_and_asks_the_right_judge():
    assert members("rg:a:ops=[1,2]@0.5+b@1.5", "m") == [("rg:a:ops=[1,2]", 0.25), ("b", 0.75)]
    task = load_task("mix:expr@1+expr-digit@3")
    rows = task.heldout()
    names = [r["member"] for r in rows]
    assert names.count("expr") / len(names) == pytest.approx(0.25, abs=0.005)
    assert [r["member"] for r in rows[:40]].count("expr") == 10
    answer = {"target": [3], "digit": [9]}
    assert task.reward(["1*1+1+1"], member=["expr"], **answer) == [1.0]
    assert task.reward(["1*1+1+1"], member=["expr-digit"], **answer) == [0.0]
    assert {r["member"] for r in task.train(0)} == {"expr", "expr-digit"}


def test_a_mixture_with_different_columns_and_one_end():
    def made(name, column, stop=""):
        rows = [{"prompt": f"{name} {i}", column: i} for i in range(10)]
        verify = eval(f"lambda completion, {column}: completion == str({column})")
        return Task(name, "", lambda seed: rows, lambda: rows, verify, str.strip, 4, stop=stop)

    task = mixture("m", {"a": made("a", "x"), "b": made("b", "y")}, [0.5, 0.5])
    row = next(r for r in task.heldout() if r["member"] == "b")
    assert row["x"] is None
    columns = {key: [value] for key, value in row.items() if key != "prompt"}
    assert task.reward([str(row["y"])], **columns) == [1.0]


def test_nothing_held_out_is_trained_on(caplog):
    def task(train, heldout):
        rows = [[{"prompt": p} for p in each] for each in (train, heldout)]
        return Task("t", "", lambda s: rows[0], lambda: rows[1], lambda c: True, str, 4)

    assert training_rows(task(["a  b", "c"], ["A b\n"]), 0) == [{"prompt": "c"}]
    assert "1 of 2 training rows are held out too" in caplog.text
    other = task(["x"], ["c"])
    assert training_rows(task(["c", "d"], ["e"]), 0, [other]) == [{"prompt": "d"}]
    with pytest.raises(ValueError, match="all 1 training rows are held out too, and none is left"):
        training_rows(task(["a"], ["a"]), 0)


def test_the_best_constant_answer(caplog):
    rows = [{"prompt": str(i), "answer": a} for i, a in enumerate("7734577")]
    task = Task(
        "t", "", lambda s: rows, lambda: rows, lambda c, answer: c == answer, str, 4, gold=lambda r: r["answer"]
    )
    assert best_constant(task, rows) == ("7", 4 / 7)
    assert constant_line(task, rows) == "best constant answer '7': 0.57 of the held-out rows of t"
    assert "always answering '7' is right on 57%" in caplog.text
    lax = Task("t", "", lambda s: rows, lambda: rows, lambda c, answer: not c, str, 4, gold=lambda r: r["answer"])
    assert best_constant(lax, rows) == ("", 1.0)


def test_no_constant_solves_the_embedded_task():
    task = load_task("expr")
    answer, score = best_constant(task, task.heldout())
    assert score == 0.05
    assert len(answer) == 7


def test_every_kind_is_listed_and_a_config_names_it(capsys, apples):
    from isentropic.cli import main

    assert main(["tasks"]) == 0
    text = capsys.readouterr().out
    assert all(kind.form in text for kind in KINDS.values())
    assert load(None, {"task": f"gsm8k:path={apples}"}).task.startswith("gsm8k")
