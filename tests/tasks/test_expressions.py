"""The expression tasks: an exact verifier, a clean split, and a loader that says what is wrong."""

import ast
import operator
import pickle
import random
import subprocess
import sys
from itertools import product

import pytest
from task_cases import count_solutions

from isentropic.tasks import TASKS, Task, load_task
from isentropic.tasks.expressions import (
    DIGITS,
    EASIEST,
    HARDEST,
    HELD_OUT,
    OPERATORS,
    PROPERTIES,
    RUNGS,
    count_right,
    enumerate_expressions,
    evaluate,
    expr,
    expr_digit,
    expressions,
    format_prompt,
    has_properties,
    nearest_rung,
    verify,
)

BOTH = pytest.mark.parametrize("task", [expr, expr_digit], ids=lambda task: task.name)
BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def independent_value(text: str) -> int:
    """The value by Python's own grammar, walked over its syntax tree."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            return node.value
        return BINARY[type(node.op)](walk(node.left), walk(node.right))

    return walk(ast.parse(text, mode="eval").body)


def random_expression(rng: random.Random, operands: int) -> str:
    pairs = "".join(rng.choice(OPERATORS) + rng.choice(DIGITS) for _ in range(operands - 1))
    return rng.choice(DIGITS) + pairs


def test_evaluate_agrees_with_an_independent_evaluator():
    rng = random.Random(0)
    for _ in range(5000):
        text = random_expression(rng, rng.randint(1, 6))
        assert evaluate(text) == independent_value(text)


def test_verify_agrees_with_an_independent_evaluator():
    rng = random.Random(1)
    for _ in range(2000):
        text, digit = random_expression(rng, 4), rng.randint(1, 9)
        value = independent_value(text)
        # Targets are from 0 to 99, and so is a value that is right.
        assert verify(text, value, digit) == (0 <= value < 100)
        assert not verify(text, value + 1, digit)
        assert not verify(text, value, digit, operands=3)
        assert verify(text, value, digit, need=("digit",)) == (0 <= value < 100 and str(digit) in text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2+3*4", 14), ("2*3+4", 10), ("9-8-7", -6), ("9-2*3-1", 2), ("1*2*3*4", 24), ("5", 5), ("1-9*9", -80)],
)
def test_multiplication_binds_first_and_minus_associates_to_the_left(text, value):
    assert evaluate(text) == value


NO_EXPRESSIONS = [
    "",
    "+",
    "12",
    "1+",
    "+1",
    "-1+2",
    "1++2",
    "1+2+",
    "0+1",
    "10+2",
    "1 + 2",
    " 1+2",
    "1+2\n",
    "1/2",
    "(1)",
]
LOOKALIKES = ["١+٢", "１+２", "²+1", "1−2", "1×2", "1.2", "1e5", "\x00", "1\x002", "1+a", "__import__('os')"]


@pytest.mark.parametrize("text", NO_EXPRESSIONS + LOOKALIKES)
def test_everything_else_is_no_expression(text):
    assert evaluate(text) is None
    assert not any(verify(text, target, 1) for target in range(100))


def test_long_texts_are_wrong_and_cost_nothing():
    for text in ["9*" * 5000 + "9", "1" * 10_000, "+" * 9_999, "9*8-3+4" + " " * 10_000]:
        assert not verify(text, 73, 5)


def test_enumeration_matches_brute_force():
    values, texts = enumerate_expressions(3)
    found = {bytes(text).decode(): int(value) for value, text in zip(values, texts, strict=True)}
    every = [a + o + b + p + c for a in DIGITS for b in DIGITS for c in DIGITS for o in OPERATORS for p in OPERATORS]
    assert len(values) == len(found)
    assert found == {text: value for text in every if 0 <= (value := independent_value(text)) < 100}


def test_counts():
    values, _ = enumerate_expressions(4)
    assert len(values) == 113_208
    counts = [count_solutions(t) for t in range(100)]
    assert (min(counts), max(counts), sum(counts)) == (72, 3467, 113_208)
    # One digit is its own only solution; 1+1 = 2*1 = 1*2 = 3-1 = ... = 9-7.
    assert [count_solutions(t, 1) for t in (0, 1, 9, 10)] == [0, 1, 1, 0]
    assert count_solutions(2, 2) == 3 + 7
    # 1+2 2+1 1*3 3*1 4-1 5-2 6-3 7-4 8-5 9-6
    assert (count_solutions(3, 2), count_solutions(3, 2, digit=9)) == (10, 1)


@BOTH
def test_all_that_is_asked_can_be_answered(task):
    needs_digit = task is expr_digit
    for row in task.train(0) + task.heldout():
        assert row["prompt"] == format_prompt(row["target"], row["digit"])
        assert count_solutions(row["target"], digit=row["digit"] if needs_digit else None) > 0


@pytest.mark.parametrize("operands", [1, 2, 3, 4])
@pytest.mark.parametrize("need", [(), ("digit",)])
def test_reachable_is_what_the_verifier_accepts(operands, need):
    task = expressions(operands, need=need)
    values, texts = enumerate_expressions(operands)
    answers = {}
    for value, text in zip(values.tolist(), texts, strict=True):
        for digit in {int(c) - 48 for c in text[::2]} if need else range(1, 10):
            answers.setdefault((value, digit), bytes(text).decode())
    rows = task.train(0) + task.heldout()
    assert {(row["target"], row["digit"]) for row in rows} == set(answers)
    assert all(task.verify(answers[row["target"], row["digit"]], row["target"], row["digit"]) for row in rows)


@BOTH
def test_held_out_targets_are_never_trained_on(task):
    assert len(set(HELD_OUT)) == 20
    assert {row["target"] for row in task.heldout()} == set(HELD_OUT)
    assert {row["target"] for seed in range(3) for row in task.train(seed)} == set(range(100)) - set(HELD_OUT)


@BOTH
def test_the_first_twenty_rows_have_every_held_out_target(task):
    assert {row["target"] for row in task.heldout()[:20]} == set(HELD_OUT)


@BOTH
def test_the_seed_decides_the_order_only(task):
    def key(row):
        return row["target"], row["digit"]

    assert task.train(1) == task.train(1)
    assert task.train(1) != task.train(2)
    assert sorted(task.train(1), key=key) == sorted(task.train(2), key=key)


@BOTH
def test_rows_are_a_dataset_and_the_reward_fits_trl(task):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(task.train(0)[:4])
    assert rows.column_names == ["prompt", "target", "digit"]
    rewards = task.reward(
        prompts=["73 9>", "73 5>", "07 1>"],
        completions=["9*8-3+4", "9*8-3+4", "9*8-3+4"],
        completion_ids=[[1], [2], [3]],
        target=[73, 73, 7],
        digit=[9, 5, 1],
        trainer_state=object(),
        log_extra=print,
        log_metric=print,
    )
    assert rewards == ([1.0, 1.0, 0.0] if task is expr else [1.0, 0.0, 0.0])
    assert task.reward.__name__ == "reward"


def test_conversations_are_judged_by_their_last_message():
    completions = [[{"role": "assistant", "content": "9*8-3+4"}]]
    assert expr.reward(completions, target=[73], digit=[5]) == [1.0]


def test_missing_and_short_columns_are_refused():
    with pytest.raises(ValueError, match="verify needs the column 'digit'"):
        expr.reward(["1+1+1+1"], target=[4])
    with pytest.raises(ValueError, match="2 completions and target has 1"):
        expr.reward(["1+1+1+1", "2"], target=[4], digit=[1, 1])


def test_a_verifier_that_takes_all_columns_gets_the_columns_only():
    seen = []

    def verify_all(completion, **columns):
        seen.append(columns)
        return True

    task = Task("all", "", lambda seed: [], list, verify_all, str.strip, 4)
    assert task.reward(["a", "b"], prompts=["p", "q"], word=["x", "y"], trainer_state=None) == [1.0, 1.0]
    assert seen == [{"prompt": "p", "word": "x"}, {"prompt": "q", "word": "y"}]


@BOTH
def test_tasks_survive_pickling(task):
    copy = pickle.loads(pickle.dumps(task))
    assert copy.train(3) == task.train(3)
    assert copy.max_completion_length == 8


@pytest.mark.parametrize("name", TASKS)
def test_built_in_tasks_load_by_name(name):
    assert load_task(name).name == name
    assert load_task(TASKS[name]) is load_task(name)


def test_a_task_of_ones_own_loads(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "from isentropic.tasks.expressions import expressions\nshort = expressions(3)\nnumber = 3\n"
    )
    (tmp_path / "broken_tasks.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_task("my_tasks:short").name == "expr:operands=3"
    with pytest.raises(ValueError, match=r"must be a Task, got a int; Tasks in my_tasks: \['short'\]"):
        load_task("my_tasks:number")
    with pytest.raises(ValueError, match=r"got no such attribute \(did you mean short\?\); Tasks in my_tasks"):
        load_task("my_tasks:shrot")
    with pytest.raises(ValueError, match=r"cannot be loaded: ModuleNotFoundError: .*'a_module_that_is_missing'"):
        load_task("broken_tasks:short")


def test_unknown_tasks_are_refused():
    with pytest.raises(
        ValueError, match=r"must be one of expr, expr-digit, .* got 'expr_digit' \(did you mean expr-digit\?\)"
    ):
        load_task("expr_digit")
    with pytest.raises(ValueError, match="there is no module 'no_such_module'"):
        load_task("no_such_module:task")


@pytest.mark.parametrize("operands", [0, 6])
def test_operands_out_of_range_are_refused(operands):
    with pytest.raises(ValueError, match=f"operands must be from 1 to 5, got {operands}"):
        expressions(operands)


def test_importing_tasks_needs_neither_torch_nor_numpy():
    code = "import sys, isentropic.tasks; print([m for m in ('torch', 'numpy', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Of an expression's text and the prompt's digit, as a text.
PREDICATES = {
    "digit": lambda text, digit: digit in text[::2],
    "first": lambda text, digit: text.startswith(digit),
    "last": lambda text, digit: text.endswith(digit),
    "plus": lambda text, digit: "+" in text,
    "minus": lambda text, digit: "-" in text,
    "product": lambda text, digit: "*" in text,
    "no-plus": lambda text, digit: "+" not in text,
    "no-minus": lambda text, digit: "-" not in text,
    "no-product": lambda text, digit: "*" not in text,
    "all-operators": lambda text, digit: set(text[1::2]) == set("+-*"),
    "different": lambda text, digit: len(set(text[::2])) == len(text[::2]),
    "rising": lambda text, digit: list(text[::2]) == sorted(text[::2]),
    "odd": lambda text, digit: set(text[::2]) <= set("13579"),
}


def every_expression(operands):
    """Texts and values of all expressions from 0 to 99, by Python alone."""
    texts = [
        a + "".join(rest)
        for a in DIGITS
        for rest in product(*[[o + d for o in OPERATORS for d in DIGITS]] * (operands - 1))
    ]
    return {text: value for text in texts if 0 <= (value := eval(text)) < 100}


THREE = every_expression(3)


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_property_is_what_it_says_of_every_expression(name):
    assert set(PREDICATES) == set(PROPERTIES)
    # All expressions of 3 digits, which are too short for three operators, and some of 4.
    for texts in (enumerate_expressions(3)[1], enumerate_expressions(4)[1][::37]):
        words = [bytes(text).decode() for text in texts]
        for digit in range(1, 10):
            expected = [PREDICATES[name](word, str(digit)) for word in words]
            assert has_properties(texts, digit, (name,)).tolist() == expected
            assert 0 < sum(expected) < len(words) or (name == "all-operators" and len(words[0]) == 5)


VARIANTS = [
    ((), 0, 3),
    ((), 2, 3),
    (("last", "product"), 1, 3),
    (("first", "no-plus"), 0, 3),
    (("digit", "different", "odd"), 10, 3),
    (("rising",), 0, 2),
    (("minus",), 3, 2),
]


@pytest.mark.parametrize(("need", "within", "operands"), VARIANTS)
def test_right_is_what_an_enumeration_holds(need, within, operands):
    """The verifier, the counts, the prompts that are asked and the gold answers, against Python's own arithmetic."""
    values = THREE if operands == 3 else every_expression(operands)
    task = expressions(operands, need=need, within=within)
    counts = count_right(operands, need, within)
    rng = random.Random(0)
    for target, digit in [(0, 1), (99, 9), *((rng.randrange(100), rng.randint(1, 9)) for _ in range(12))]:
        right = {
            text
            for text, value in values.items()
            if abs(value - target) <= within and all(PREDICATES[one](text, str(digit)) for one in need)
        }
        assert {text for text in values if task.verify(text, target, digit)} == right
        assert counts[target, digit - 1] == len(right)
    rows = task.train(0) + task.heldout()
    assert {(row["target"], row["digit"] - 1) for row in rows} == set(zip(*map(list, counts.nonzero()), strict=True))
    assert all(task.verify(task.gold(row), row["target"], row["digit"]) for row in rows)


def test_a_value_below_0_or_above_99_is_wrong_however_near():
    assert verify("1-2", 0, 1, operands=2, within=1) is False
    assert verify("1-1", 1, 1, operands=2, within=1) is True
    assert verify("9*9+9+9", 98, 1, within=1) is True
    assert verify("9*9+9*2+1", 99, 1, operands=5, within=1) is False


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_a_rung_asks_what_can_be_answered_and_loads_by_its_name(rung):
    task = load_task(rung.name)
    assert task.name == rung.name
    assert {row["target"] for row in task.heldout()} <= set(HELD_OUT)
    assert not {row["target"] for row in task.train(0)} & set(HELD_OUT)
    assert all(task.verify(task.gold(row), row["target"], row["digit"]) for row in task.heldout()[::60])
    assert load_task(f"expr:rate={rung.rate}").name == rung.name if rung.rate >= HARDEST else rung is RUNGS[-1]


def test_the_ladder_leads_down():
    rates = [rung.rate for rung in RUNGS]
    assert rates == sorted(set(rates), reverse=True)
    assert len({rung.name for rung in RUNGS}) == len(RUNGS)
    assert all(rung.pass64 >= rung.rate and rung.distinct <= 64 for rung in RUNGS)


@pytest.mark.parametrize(
    ("rate", "name"),
    [
        (EASIEST, "expr:need=product:within=1"),
        (0.37, "expr"),
        # Nearest as a ratio: 0.0275 lies nearer to 0.030 than to 0.024 by a hair, 0.0265 to 0.024.
        (0.0275, "expr:need=odd"),
        (0.0265, "expr:need=last,minus"),
        # 0.418 is nearer to 0.37 than to 0.47, and its ratio to 0.47 is the smaller one.
        (0.418, "expr:need=product:within=1"),
        (HARDEST, "expr:need=last,no-plus"),
    ],
)
def test_a_rate_chooses_the_nearest_rung(rate, name):
    assert nearest_rung(rate).name == name
    assert load_task(f"expr:rate={rate}").name == name


@pytest.mark.parametrize("name", ["expr:need=last,product", "expr:need=odd:within=2", "expr:need=minus:operands=3"])
def test_a_name_is_canonical_and_loads_again(name):
    task = load_task(name)
    assert task.name == name
    again = pickle.loads(pickle.dumps(load_task(task.name)))
    assert (again.train(5), again.heldout()) == (task.train(5), task.heldout())


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("expr:", "expr"),
        ("expr:need=product,last,product", "expr:need=last,product"),
        ("expr:within=0:need=odd:operands=4", "expr:need=odd"),
        ("expr:operands=3:within=1", "expr:within=1:operands=3"),
    ],
)
def test_spellings_of_a_name_are_one_task(written, name):
    assert load_task(written).name == name
    assert load_task(written).heldout() == load_task(name).heldout()


def test_expr_digit_is_expr_with_a_needed_digit():
    task = load_task("expr:need=digit")
    assert task.heldout() == expr_digit.heldout()
    assert task.train(2) == expr_digit.train(2)
    assert (expr.name, expr_digit.name) == ("expr", "expr-digit")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("expr:need=lst", r"need must be one of .*got 'lst' \(did you mean last\?\)"),
        ("expr:need=plus,no-plus", "need: got plus,no-plus, which no expression of 4 digits has; leave one out"),
        ("expr:need=all-operators:operands=2", "which no expression of 2 digits has"),
        ("expr:within=11", "within must be from 0 to 10, got 11"),
        ("expr:within=-1", "within: got -1, must be an integer"),
        ("expr:within=true", "within: got True, must be an integer"),
        ("expr:shots=33", "shots must be from 0 to 32, got 33; 8 are enough"),
        ("expr:shots=x", "shots: got 'x', must be an integer"),
        ("expr:operands=6", "operands must be from 1 to 5, got 6"),
        ("expr:nead=last", r"unknown option 'nead' \(did you mean need\?\)"),
        ("expr:last", "got 'last', must be OPTION=VALUE"),
        *(
            (f"expr:rate={rate}", "rate: got .*, must be a share from 0.002 to 0.5")
            for rate in (0.9, 0.0001, "true", "x", "NaN", 0)
        ),
        *(
            (f"expr:rate=0.02:{more}", "rate chooses need and within.*leave them out")
            for more in ("need=last", "within=1", "operands=3", "shots=4")
        ),
    ],
)
def test_bad_options_are_one_line(name, says):
    with pytest.raises(ValueError, match=says) as refused:
        load_task(name)
    assert "\n" not in str(refused.value)
    assert name in str(refused.value)


def test_a_description_says_what_is_asked():
    assert expr.description == "Write an expression of 4 digits 1-9 with + - * that has the given value."
    text = load_task("expr:need=last,odd:within=2:operands=3").description
    assert "3 digits" in text
    assert "give or take 2" in text
    assert "the prompt's digit is the last operand; odd digits alone" in text


@pytest.mark.parametrize("rate", ["null", "true", "[0.1]", "nan", ".", "0"])
def test_a_rate_that_is_given_is_never_left_out(rate):
    with pytest.raises(ValueError, match=r"must be a share from 0\.002 to 0\.5"):
        load_task(f"expr:rate={rate}")
    assert load_task("expr:rate=2e-2").name == load_task("expr:rate=0.02").name != "expr"


def test_solved_examples_come_first():
    task = load_task("expr:need=no-plus:shots=4")
    examples, _, asked = task.heldout()[0]["prompt"].rpartition("\n")
    assert asked == "target 11, digit 1:"
    assert len(examples.split("\n")) == 4
    for line in examples.split("\n"):
        target, _, answer = line.removeprefix("target ").partition(", digit ")[0], *line.partition(": ")[1:]
        assert independent_value(answer) == int(target)
        assert int(target) not in HELD_OUT
    # All tasks of the family have the same prompts, so that a policy of one can be evaluated on the others.
    assert load_task("expr:shots=4").heldout()[0] == task.heldout()[0]


def test_a_few_shot_answer_is_its_first_line_without_spaces():
    task = load_task("expr:need=no-plus:shots=4")
    answers = [" 9*8-3-4\ntarget 1", "9 * 8 -3- 4", "9*8-3+4", "\n9*8-3-4"]
    assert task.reward(answers, target=[65, 65, 73, 65], digit=[5] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert task.normalise(answers[0]) == task.normalise(answers[1]) == "9*8-3-4"
    assert task.cut(answers[0]) == " 9*8-3-4"
    row = task.train(0)[0]
    assert task.verify(task.gold(row), row["target"], row["digit"])
    assert pickle.loads(pickle.dumps(task)).heldout() == task.heldout()
