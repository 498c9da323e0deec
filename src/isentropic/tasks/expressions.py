"""Write an arithmetic expression of k digits that has a given value: many right answers, all of them countable.

The prompt `73 5>` gives a target and a digit; `9*8-3+4` answers it. In `expr` the digit has no meaning; in the related
task `expr-digit` it must be one of the operands. Both have the same prompt format and held-out targets, so a policy
trained on one can be evaluated on the other: diversity lost on the first shows as lost pass@k on the second.

With k = 4 there are 177,147 expressions; 113,208 of them have a value from 0 to 99, between 72 and 3,467 a target. To
the verifier a policy that knows one answer a target is as good as one that knows them all; counting distinct answers
distinguishes them.
"""

import random
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np

from . import Task

DIGITS = "123456789"
OPERATORS = "+-*"
TARGETS = 100
MAX_OPERANDS = 5
# 37 is coprime to 100, so i -> 37 i + 11 permutes the targets; the first 20 are evenly spread, each last digit twice.
HELD_OUT = tuple((37 * i + 11) % TARGETS for i in range(20))


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


@cache
def _counts(operands: int) -> np.ndarray:
    """Return the number of expressions [target, digit] that use the digit; in column 0, of all."""
    values, texts = enumerate_expressions(operands)
    used = [np.ones(len(values), dtype=bool)]
    used += [(texts[:, 0::2] == ord(d)).any(axis=1) for d in DIGITS]
    counts = np.stack([np.bincount(values[mask], minlength=TARGETS) for mask in used], axis=1)
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


def verify(completion: str, target: int, digit: int, *, operands: int = 4, digit_required: bool = False) -> bool:
    """Return whether the text is an expression of k digits with the value `target` (that uses `digit`, if required).

    Example:
        >>> verify("9*8-3+4", 73, 5), verify("9*8-3+4", 73, 5, digit_required=True)
        (True, False)
    """
    # The length first: a long text must neither be parsed nor evaluated.
    if len(completion) != 2 * operands - 1 or evaluate(completion) != target:
        return False
    return not digit_required or str(digit) in completion


def _rows(targets: list[int], operands: int, digit_required: bool) -> list[dict[str, Any]]:
    """Return all askable (target, digit) pairs; each run of len(targets) rows has every target once."""
    column = slice(1, None) if digit_required else slice(0, 1)
    reachable = np.broadcast_to(_counts(operands)[:, column] > 0, (TARGETS, 9))
    pairs = [(t, 1 + (turn + place) % 9) for turn in range(9) for place, t in enumerate(targets)]
    return [{"prompt": format_prompt(t, d), "target": t, "digit": d} for t, d in pairs if reachable[t, d - 1]]


def _train(seed: int, *, operands: int, digit_required: bool) -> list[dict[str, Any]]:
    """Return every askable pair whose target is not held out, in an order that the seed decides."""
    rows = _rows([t for t in range(TARGETS) if t not in HELD_OUT], operands, digit_required)
    random.Random(seed).shuffle(rows)
    return rows


def _heldout(*, operands: int, digit_required: bool) -> list[dict[str, Any]]:
    """Return every askable pair whose target is held out; the first 20 rows have each target once."""
    return _rows(list(HELD_OUT), operands, digit_required)


def _gold(row: dict[str, Any], *, operands: int, digit_required: bool) -> str:
    """Return the first right answer to a row."""
    values, texts = enumerate_expressions(operands)
    right = texts[values == row["target"]]
    if digit_required:
        right = right[(right[:, 0::2] == ord(str(row["digit"]))).any(axis=1)]
    return bytes(right[0]).decode()


def _unchanged(text: str) -> str:
    return text


def expressions(operands: int = 4, *, digit_required: bool = False) -> Task:
    """Return the task for k operands: `expr`, or with `digit_required` the related task `expr-digit`.

    Only prompts that have an answer are asked. Twenty targets are held out, the same for both tasks and for every k;
    the other 80, each with nine digits, are for training.

    Two right answers are distinct if their texts differ. The verifier accepts one spelling of an expression (no spaces,
    no brackets), so there is nothing to normalise; `1+2` and `2+1` count as two on purpose, because a policy has to put
    probability on both.

    Raises:
        ValueError: `operands` is not from 1 to 5.

    Example:
        >>> task = expressions()
        >>> task.heldout()[0]
        {'prompt': '11 1>', 'target': 11, 'digit': 1}
        >>> task.reward(["9*8-3+4", "9*8-3+5"], target=[73, 73], digit=[5, 5])
        [1.0, 0.0]
    """
    if not 1 <= operands <= MAX_OPERANDS:
        raise ValueError(f"operands must be from 1 to {MAX_OPERANDS}, got {operands}; 4 is the built-in task")
    variant = {"operands": operands, "digit_required": digit_required}
    name = "expr-digit" if digit_required else "expr"
    required = ", the given digit among them" if digit_required else ""
    return Task(
        name=name if operands == 4 else f"{name}-{operands}",
        description=f"Write an expression of {operands} digits 1-9 with + - * that has the given value{required}.",
        train=partial(_train, **variant),
        heldout=partial(_heldout, **variant),
        verify=partial(verify, **variant),
        normalise=_unchanged,
        # One token a character, and the end of the sequence.
        max_completion_length=2 * operands,
        gold=partial(_gold, **variant),
    )


expr = expressions()
expr_digit = expressions(digit_required=True)
