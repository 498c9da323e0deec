"""Verifiers against answers worked out by hand, and against what a policy may write instead of an answer."""

import os
import signal
import threading
import time

import pytest

from isentropic.tasks import Task, load_task, worker
from isentropic.tasks.quantities import number
from isentropic.tasks.verifiers import VERIFIERS, answer_in, boxed, exact, numeric, tidy

NESTED = "\\frac{1}{" * 400 + "2" + "}" * 400
ADVERSARIAL = {
    "empty": "",
    "white space": " \n\t \r\n",
    "nested latex": f"\\boxed{{{NESTED}}}",
    "open braces": "\\boxed{" * 5000,
    "10,000 digits": "\\boxed{" + "7" * 10_000 + "}",
    "10,000 digits alone": "7" * 10_000,
    "a tower": "\\boxed{9^{9^{9^{9^9}}}}",
    "a script": "<script>alert('7')</script>",
    "python": "__import__('os').system('exit 7')",
    "control characters": "\x00\x01\x02\x1b[2J\x07 7 7\x7f",
    "a surrogate": "\ud800\udfff\ud800",
    "wrong encoding": "7".encode("utf-16").decode("latin-1"),
    "other digits": "\u0667",
    "right to left": "\u202e7\u202c and 8",
    "all answers": "\\boxed{6} or \\boxed{7} or \\boxed{8}",
    "a list": "\\boxed{1, 2, 3, 4, 5, 6, 7, 8}",
    "true": "True",
    "nan": "\\boxed{nan}",
    "infinity": "\\boxed{\\infty}",
    "the question": "Answer: what is 3 + 4?",
    "very long": "so " * 200_000,
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", 0.5)


@pytest.fixture(scope="module", autouse=True)
def _ended():
    yield
    worker.close()


@pytest.mark.parametrize("name", VERIFIERS)
def test_no_text_hangs_crashes_or_scores(name):
    if name == "math":
        pytest.importorskip("math_verify")
    scored = [label for label, text in ADVERSARIAL.items() if VERIFIERS[name](text, "7")]
    assert scored == []
    assert VERIFIERS[name]("7", "7")


def test_no_text_hangs_crashes_or_scores_in_a_generator():
    pytest.importorskip("reasoning_gym")
    task = load_task("rg:chain_sum:shots=1:heldout=3")
    row = next(r for r in task.heldout() if r["answer"] != "7")
    texts = [*ADVERSARIAL.values(), "7"]
    columns = {key: [row[key]] * len(texts) for key in row if key != "prompt"}
    assert task.reward(texts, prompts=[row["prompt"]] * len(texts), **columns) == [0.0] * len(texts)
    assert task.verify(f" {row['answer']}\nQuestion: and?", item=row["item"])


def test_a_generator_that_evaluates_answers_does_so_elsewhere():
    pytest.importorskip("reasoning_gym")
    task = load_task("rg:puzzle24:shots=0:heldout=1")
    (row,) = task.heldout()
    before = os.getpid()
    for text in ("9**9**9**9", "24"):
        assert task.reward([text], item=[row["item"]]) == [0.0]
    assert os.getpid() == before
    assert task.reward([row["answer"]], item=[row["item"]]) == [1.0]


def test_an_answer_in_the_prompt_is_none_in_the_completion():
    task = Task("t", "", lambda s: [], list, numeric, str, 9)
    asked = "The answer is \\boxed{5}. Repeat it."
    assert task.reward(["", "I will not."], prompts=[asked] * 2, answer=["5", "5"]) == [0.0, 0.0]


def test_where_the_answer_stands():
    assert boxed(r"\boxed{a} then \fbox{z} then \boxed {\text{b {c}}}") == r"\text{b {c}}"
    assert boxed(r"\boxed{1} and \boxed{2") == "1"
    assert answer_in("6 + 1 = 7\n#### 7") == "7"
    assert answer_in("The answer is 7\nNo wait") == "7"
    assert answer_in("one\ntwo") is None


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("#### 1,200", "1200", True),
        ("\\boxed{\\$18.00}", "18", True),
        ("The answer is 2/4", "0.5", True),
        ("I paid 3 and got 7.", "7", False),
        ("#### 7 apples", "7", True),
        ("#### 3 and 4, so 7", "7", False),
        ("\\boxed{7} apples, not 8", "7", True),
        ("7 or 8", "7", False),
        ("\\boxed{8}, but 7", "7", False),
        ("1e3", "1000", False),
        ("1,2,3", "123", False),
        ("-7", "7", False),
    ],
)
def test_numeric(completion, answer, right):
    assert numeric(completion, answer) is right


def test_a_number_is_exact_where_floats_are_not():
    assert number("0.1") + number("0.2") == number("0.3")
    assert number("1/0") is None
    assert number(".") is None
    assert not numeric("0.30000000000000004", "0.3")


def test_exact_is_not_moved_by_an_empty_answer():
    assert exact(" the\nsea ", "the sea")
    assert not exact("", "")


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"\boxed{\dfrac{1}{2}}", r"\frac12", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{x=5}", "5", True),
        (r"\boxed{2x+1}", "1 + 2x", True),
        (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", True),
        (r"\boxed{2\sqrt{2}}", r"2\sqrt{3}", False),
        (r"the value is \frac{1}{2}" + "\nor so", r"\frac12", False),
    ],
)
def test_math(completion, answer, right):
    pytest.importorskip("math_verify")
    assert VERIFIERS["math"](completion, answer) is right


def test_one_late_answer_costs_one_mark_and_the_pool_survives():
    pool = worker.Pool(size=1)
    try:
        assert pool.ask("operator:add", 1, 2) == 3
        began = time.monotonic()
        assert pool.ask("time:sleep", 60, seconds=0.05) is None
        assert time.monotonic() - began < 10
        assert pool.ask("os:_exit", 3) is None
        assert pool.ask("operator:truediv", 1, 0) is None
        assert pool.ask("operator:mul", 6, 7) == 42
        assert len(pool.workers) == 1
    finally:
        pool.close()


def test_workers_serve_any_thread_and_end_with_the_pool():
    pool = worker.Pool(size=2)
    found = {}

    def work(i):
        found[i] = pool.ask("operator:mul", i, i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    processes = [each.process for each in pool.workers]
    pool.close()
    assert found == {i: i * i for i in range(8)}
    assert 1 <= len(processes) <= 2
    assert all(process.poll() is not None for process in processes)


def test_a_worker_that_was_killed_is_replaced():
    pool = worker.Pool(size=1)
    try:
        pool.ask("operator:add", 1, 2)
        pool.workers[0].process.send_signal(signal.SIGKILL)
        pool.workers[0].process.wait()
        assert pool.ask("operator:add", 1, 2) is None
        assert pool.ask("operator:add", 1, 2) == 3
    finally:
        pool.close()


def test_tidy_makes_spellings_one():
    assert tidy(r"\dfrac{ 1 }{2}") == tidy(r"\tfrac{1}{2}") == "1/2"
    assert tidy("0.50") == tidy("1/2") == "1/2"
    assert tidy("x + 1") != tidy("x - 1")
