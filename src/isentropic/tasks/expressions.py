"""Write an arithmetic expression of k digits that has a given value: many right answers, all of them countable.

The prompt `73 5>` gives a target and a digit; `9*8-3+4` answers it. In `expr` the digit has no meaning. Options of the
name make the task harder, or easier, by a chosen amount: `expr:need=last,product` asks for an expression whose last
operand is the digit and which has a product, `expr:within=1` accepts a value that is off by one, and `expr:rate=0.02`
chooses among such tasks by the share of right answers that the tiny model gives before training. All of them have the
same prompts and held-out targets, so a policy trained on one can be evaluated on the others: diversity lost on the
first shows as lost pass@k on the second. `expr:shots=8` puts solved examples before each prompt, for pretrained models.

With k = 4 there are 177,147 expressions; 113,208 of them have a value from 0 to 99, between 72 and 3,467 a target. To
the verifier a policy that knows one answer a target is as good as one that knows them all; counting distinct answers
distinguishes them.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from math import log, nan
from typing import Any, NamedTuple

import numpy as np

from ..control.names import choose
from . import Task
from .spec import options as options_of

DIGITS = "123456789"
OPERATORS = "+-*"
TARGETS = 100
MAX_OPERANDS = 5
# 37 is coprime to 100, so i -> 37 i + 11 permutes the targets; the first 20 are evenly spread, each last digit twice.
HELD_OUT = tuple((37 * i + 11) % TARGETS for i in range(20))
MAX_WITHIN = 10
MAX_SHOTS = 32
SHOTS_SEED = 20260101


class Property(NamedTuple):
    """What may be asked of an expression besides its value.

    Attributes:
        meaning: in words.
        holds: (texts [n, 2k-1] as ASCII codes, the ASCII code of the prompt's digit) -> [n] bool.
    """

    meaning: str
    holds: Callable[[np.ndarray, int], np.ndarray]


def _has(operator: str, texts: np.ndarray) -> np.ndarray:
    return (texts[:, 1::2] == ord(operator)).any(axis=1)


def _any_equal(sorted_digits: np.ndarray) -> np.ndarray:
    return (sorted_digits[:, 1:] == sorted_digits[:, :-1]).any(axis=1)


PROPERTIES: dict[str, Property] = {
    "digit": Property("the prompt's digit is an operand", lambda t, d: (t[:, 0::2] == d).any(axis=1)),
    "first": Property("the prompt's digit is the first operand", lambda t, d: np.equal(t[:, 0], d)),
    "last": Property("the prompt's digit is the last operand", lambda t, d: np.equal(t[:, -1], d)),
    "plus": Property("a sum", lambda t, d: _has("+", t)),
    "minus": Property("a difference", lambda t, d: _has("-", t)),
    "product": Property("a product", lambda t, d: _has("*", t)),
    "no-plus": Property("no sum", lambda t, d: ~_has("+", t)),
    "no-minus": Property("no difference", lambda t, d: ~_has("-", t)),
    "no-product": Property("no product", lambda t, d: ~_has("*", t)),
    "all-operators": Property("each of the three operators", lambda t, d: _has("+", t) & _has("-", t) & _has("*", t)),
    "different": Property("no digit twice", lambda t, d: ~_any_equal(np.sort(t[:, 0::2], axis=1))),
    "rising": Property("no operand below the one before", lambda t, d: np.all(t[:, 2::2] >= t[:, :-2:2], axis=1)),
    "odd": Property("odd digits alone", lambda t, d: (t[:, 0::2] % 2 == 1).all(axis=1)),
}


class Rung(NamedTuple):
    """A task of the family, with the figures of one build of the tiny model on all its held-out rows at temperature 1.

    Attributes:
        rate, pass64, distinct: share of right samples; share of prompts with one among 64; distinct right among 64.
        need, within: options of the task.
    """

    rate: float
    pass64: float
    distinct: float
    need: tuple[str, ...] = ()
    within: int = 0

    @property
    def name(self) -> str:
        """The name of the task.

        Example:
            >>> Rung(0.5, 1.0, 27.0, ("product",), 1).name
            'expr:need=product:within=1'
        """
        return _name(4, self.need, self.within)


# From easy to hard; `isentropic eval tiny --task NAME --k 64` measures one again.
RUNGS: tuple[Rung, ...] = (
    Rung(0.47, 1.00, 26.9, ("product",), 1),
    Rung(0.37, 1.00, 20.3),
    Rung(0.29, 1.00, 15.6, ("product",)),
    Rung(0.19, 0.97, 10.3, ("digit",)),
    Rung(0.15, 0.92, 9.0, ("different",)),
    Rung(0.12, 0.91, 7.1, ("minus", "product")),
    Rung(0.085, 0.85, 5.0, ("digit", "different")),
    Rung(0.066, 0.90, 3.6, ("first",)),
    Rung(0.048, 0.94, 2.7, ("last",)),
    Rung(0.039, 0.86, 2.1, ("last", "product")),
    Rung(0.030, 0.56, 1.8, ("odd",)),
    Rung(0.024, 0.76, 1.4, ("last", "minus")),
    Rung(0.017, 0.58, 1.0, ("last", "different")),
    Rung(0.013, 0.49, 0.8, ("no-plus",)),
    Rung(0.0078, 0.32, 0.4, ("first", "last")),
    Rung(0.0058, 0.28, 0.3, ("digit", "no-plus")),
    Rung(0.0043, 0.22, 0.3, ("first", "last", "minus")),
    Rung(0.0023, 0.11, 0.1, ("first", "no-plus")),
    Rung(0.0019, 0.11, 0.1, ("last", "no-plus")),
)
EASIEST, HARDEST = 0.5, 0.002  # rates that may be asked for


def _name(operands: int, need: tuple[str, ...], within: int) -> str:
    parts = [f"need={','.join(need)}"] if need else []
    parts += [f"within={within}"] if within else []
    parts += [f"operands={operands}"] if operands != 4 else []
    return ":".join(["expr", *parts])


@cache
def enumerate_expressions(operands: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return the values [n] and the texts [n, 2k-1], as ASCII codes, of all expressions with a value from 0 to 99.

    Multiplication binds first: a sum is kept beside the current product, and each `+` or `-` adds the product to the
    sum. Generated, never stored: 20 ms for k = 4.

    Raises:
        ValueError: `operands` is not from 1 to 5 (6 would be 129 million expressions).

    Example:
        >>> values, texts = enumerate_expressions(2)
        >>> bytes(texts[0]).decode(), int(values[0])
        ('1+1', 2)
    """
    if not 1 <= operands <= MAX_OPERANDS:
        raise ValueError(f"operands must be from 1 to {MAX_OPERANDS}, got {operands}; 4 is the built-in task")
    digits = np.stack(np.meshgrid(*[np.arange(1, 10, dtype=np.int32)] * operands, indexing="ij"), -1)
    digits = digits.reshape(-1, operands)
    all_values, all_texts = [], []
    for ops in product(OPERATORS, repeat=operands - 1):
        total, term = np.zeros(len(digits), dtype=np.int32), digits[:, 0]
        for i, op in enumerate(ops, start=1):
            if op == "*":
                term = term * digits[:, i]
            else:
                total, term = total + term, digits[:, i] if op == "+" else -digits[:, i]
        values = total + term
        kept = (values >= 0) & (values < TARGETS)
        texts = np.empty((int(kept.sum()), 2 * operands - 1), dtype=np.uint8)
        texts[:, 0::2] = digits[kept] + ord("0")
        texts[:, 1::2] = [ord(op) for op in ops]
        all_values.append(values[kept])
        all_texts.append(texts)
    values, texts = np.concatenate(all_values), np.concatenate(all_texts)
    # All callers share the cached arrays.
    values.setflags(write=False)
    texts.setflags(write=False)
    return values, texts


def has_properties(texts: np.ndarray, digit: int, need: tuple[str, ...]) -> np.ndarray:
    """Return which expressions [n, 2k-1] have all properties [n] for a prompt's digit from 1 to 9."""
    held = np.ones(len(texts), dtype=bool)
    for name in need:
        held &= PROPERTIES[name].holds(texts, ord("0") + digit)
    return held


@cache
def count_right(operands: int = 4, need: tuple[str, ...] = (), within: int = 0) -> np.ndarray:
    """Return the number of right answers to each prompt, [target, digit − 1].

    Example:
        >>> int(count_right()[73, 4]), int(count_right(need=("last", "product"))[73, 4])
        (305, 21)
    """
    values, texts = enumerate_expressions(operands)
    by_digit = []
    for digit in range(1, 10):
        exact = np.bincount(values[has_properties(texts, digit, need)], minlength=TARGETS)
        padded = np.pad(exact, within)
        by_digit.append(sum(padded[i : i + TARGETS] for i in range(2 * within + 1)))
    counts = np.stack(by_digit, axis=1)
    counts.setflags(write=False)
    return counts


def format_prompt(target: int, digit: int) -> str:
    """Return the prompt: two digits of target, the digit, and `>`, after which the answer starts.

    Example:
        >>> format_prompt(7, 5)
        '07 5>'
    """
    return f"{target:02d} {digit}>"


def evaluate(text: str) -> int | None:
    """Return the value of an expression such as `9*8-3+4`, or None if the text is anything else.

    The grammar is one digit 1-9, then any number of (operator, digit) pairs: no brackets, no signs, no spaces, no other
    alphabets. The text comes from a model, so it is read character by character and never passed to an evaluator.

    Example:
        >>> evaluate("9*8-3+4"), evaluate("9*8-"), evaluate("12+3")
        (73, None, None)
    """
    if len(text) % 2 == 0 or any(c not in DIGITS for c in text[0::2]) or any(c not in OPERATORS for c in text[1::2]):
        return None
    total, term = 0, int(text[0])
    for op, digit in zip(text[1::2], text[2::2], strict=True):
        if op == "*":
            term *= int(digit)
        else:
            total, term = total + term, int(digit) if op == "+" else -int(digit)
    return total + term


def verify(
    completion: str, target: int, digit: int, *, operands: int = 4, need: tuple[str, ...] = (), within: int = 0
) -> bool:
    """Return whether the text is an expression of k digits with the value `target` and the properties needed.

    Args:
        completion: the text.
        target, digit: of the prompt.
        operands: k.
        need: names among `PROPERTIES`.
        within: how far the value, from 0 to 99, may be from the target.

    Example:
        >>> verify("9*8-3+4", 73, 5), verify("9*8-3+4", 73, 4, need=("last", "product")), verify("9*8-3+4", 74, 5)
        (True, True, False)
    """
    # The length first: a long text must neither be parsed nor evaluated.
    if len(completion) != 2 * operands - 1:
        return False
    value = evaluate(completion)
    if value is None or not 0 <= value < TARGETS or abs(value - target) > within:
        return False
    return not need or bool(has_properties(np.frombuffer(completion.encode(), np.uint8)[None], digit, need)[0])


def _rows(targets: list[int], variant: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all askable (target, digit) pairs; each run of len(targets) rows has every target once."""
    reachable = count_right(**variant) > 0
    pairs = [(t, 1 + (turn + place) % 9) for turn in range(9) for place, t in enumerate(targets)]
    return [{"prompt": format_prompt(t, d), "target": t, "digit": d} for t, d in pairs if reachable[t, d - 1]]


def _train(seed: int, **variant: Any) -> list[dict[str, Any]]:
    """Return every askable pair whose target is not held out, in an order that the seed decides."""
    rows = _rows([t for t in range(TARGETS) if t not in HELD_OUT], variant)
    random.Random(seed).shuffle(rows)
    return rows


def _heldout(**variant: Any) -> list[dict[str, Any]]:
    """Return every askable pair whose target is held out; the first 20 rows have each target once."""
    return _rows(list(HELD_OUT), variant)


def _gold(row: dict[str, Any], *, operands: int, need: tuple[str, ...], within: int) -> str:
    """Return the first right answer to a row."""
    values, texts = enumerate_expressions(operands)
    right = (abs(values - row["target"]) <= within) & has_properties(texts, row["digit"], need)
    return bytes(texts[np.argmax(right)]).decode()


def _unchanged(text: str) -> str:
    return text


def _first_line(completion: str) -> str:
    """The answer to a few-shot prompt: a pretrained model puts spaces where it likes."""
    return "".join(completion.partition("\n")[0].split())


def _line(target: int, digit: int) -> str:
    return f"target {target}, digit {digit}:"


def _solved(shots: int, operands: int) -> str:
    """Solved examples, a line each, whose targets are not held out."""
    values, texts = enumerate_expressions(operands)
    order = random.Random(SHOTS_SEED)
    candidates = np.flatnonzero(~np.isin(values, HELD_OUT)).tolist()
    shown = order.sample(candidates, min(shots, len(candidates)))
    return "".join(f"{_line(int(values[i]), order.randint(1, 9))} {bytes(texts[i]).decode()}\n" for i in shown)


def _asked(rows: Callable[..., list[dict[str, Any]]], examples: str, *args: Any) -> list[dict[str, Any]]:
    return [{**row, "prompt": examples + _line(row["target"], row["digit"])} for row in rows(*args)]


def _verify_line(judge: Callable[..., bool], completion: str, target: int, digit: int) -> bool:
    return judge(_first_line(completion), target, digit)


def _few_shot(task: Task, shots: int, operands: int) -> Task:
    """A task of the family, asked by solved examples.

    The examples have the right value, and whatever properties chance gave them: all tasks of the family have the same
    prompts.
    """
    examples = _solved(shots, operands)
    return replace(
        task,
        name=f"{task.name}:shots={shots}",
        description=f"{task.description} {shots} solved examples come first.",
        train=partial(_asked, task.train, examples),
        heldout=partial(_asked, task.heldout, examples),
        verify=partial(_verify_line, task.verify),
        normalise=_first_line,
        # A token a character, perhaps a space before each, and the end of the line.
        max_completion_length=4 * operands,
        stop="\n",
    )


def expressions(
    operands: int = 4, *, need: tuple[str, ...] = (), within: int = 0, shots: int = 0, name: str | None = None
) -> Task:
    """Return a task of the family.

    Only prompts that have an answer are asked. Twenty targets are held out, the same for all tasks and for every k; the
    other 80, each with nine digits, are for training.

    Two right answers are distinct if their texts differ. The verifier accepts one spelling of an expression (no spaces,
    no brackets), so there is nothing to normalise; `1+2` and `2+1` count as two on purpose, because a policy has to put
    probability on both.

    Args:
        operands: k, from 1 to 5.
        need: names among `PROPERTIES`, which every right answer must have.
        within: how far the value may be from the target, from 0 to 10.
        shots: solved examples before each prompt, from 0 to 32, for a pretrained model.
        name: of the task; by default the name that `load` reads, with the properties in the order of `PROPERTIES`.

    Raises:
        ValueError: an argument out of its range, no such property, or properties that no expression has.

    Example:
        >>> task = expressions()
        >>> task.heldout()[0]
        {'prompt': '11 1>', 'target': 11, 'digit': 1}
        >>> task.reward(["9*8-3+4", "9*8-3+5"], target=[73, 73], digit=[5, 5])
        [1.0, 0.0]
    """
    if not 1 <= operands <= MAX_OPERANDS:
        raise ValueError(f"operands must be from 1 to {MAX_OPERANDS}, got {operands}; 4 is the built-in task")
    if not 0 <= within <= MAX_WITHIN:
        raise ValueError(f"within must be from 0 to {MAX_WITHIN}, got {within}; 0 asks for the exact value")
    if not 0 <= shots <= MAX_SHOTS:
        raise ValueError(f"shots must be from 0 to {MAX_SHOTS}, got {shots}; 8 are enough for a small model")
    for one in need:
        choose("need", one, PROPERTIES)
    need = tuple(one for one in PROPERTIES if one in need)
    variant = {"operands": operands, "need": need, "within": within}
    if need and not count_right(**variant)[list(HELD_OUT)].any():
        raise ValueError(f"need: got {','.join(need)}, which no expression of {operands} digits has; leave one out")
    value = f"that has the given value, give or take {within}" if within else "that has the given value"
    asked = f", with: {'; '.join(PROPERTIES[one].meaning for one in need)}" if need else ""
    task = Task(
        name=name or _name(operands, need, within),
        description=f"Write an expression of {operands} digits 1-9 with + - * {value}{asked}.",
        train=partial(_train, **variant),
        heldout=partial(_heldout, **variant),
        verify=partial(verify, **variant),
        normalise=_unchanged,
        # One token a character, and the end of the sequence.
        max_completion_length=2 * operands,
        gold=partial(_gold, **variant),
    )
    return _few_shot(task, shots, operands) if shots else task


def load(rest: str, name: str) -> Task:
    """Return the task of `expr:option=value...`.

    Args:
        rest: the name after `expr:`. The options are `need`, names among `PROPERTIES` with commas between them;
            `within`; `operands`; `shots`; and `rate`, in place of `need` and `within`: the rung whose rate is nearest.
        name: the whole name, for messages.

    Raises:
        ValueError: an option or a value that is not allowed.

    Example:
        >>> load("rate=0.04", "").name, load("need=odd:operands=3", "").description
        ('expr:need=last,product', 'Write an expression of 3 digits 1-9 with + - * that has the given value, with: odd \
digits alone.')
    """
    values = options_of(name, rest, {"need": "", "within": 0, "operands": 4, "shots": 0, "rate": ""})
    rate = values.pop("rate")
    try:
        if rate:
            if values["need"] or values["within"] or values["shots"] or values["operands"] != 4:
                raise ValueError("rate chooses need and within for 4 operands; leave them out, or leave rate out")
            rung = nearest_rung(rate)
            return expressions(need=rung.need, within=rung.within)
        return expressions(need=tuple(filter(None, values.pop("need").split(","))), **values)
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from None


def nearest_rung(rate: Any) -> Rung:
    """Return the rung whose rate is nearest, as a ratio.

    Raises:
        ValueError: not a number from 0.002 to 0.5.

    Example:
        >>> nearest_rung(0.02).need
        ('last', 'different')
    """
    try:
        share = float(rate)
    except ValueError:
        share = nan
    if not HARDEST <= share <= EASIEST:
        raise ValueError(
            f"rate: got {rate}, must be a share from {HARDEST} to {EASIEST} of right answers before training; "
            "`isentropic tasks` lists the rates there are"
        )
    return min(RUNGS, key=lambda rung: abs(log(rung.rate / share)))


expr = expressions()
expr_digit = expressions(need=("digit",), name="expr-digit")
