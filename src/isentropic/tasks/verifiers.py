r"""Verifiers of texts that a model wrote, `exact`, `numeric` and `math`, and extraction of the answer from a text.

Nothing here raises or hangs on any text: an answer that cannot be read is wrong. Numbers are compared exactly, as
fractions of integers; mathematics is compared by math-verify, in a separate process with a hard time limit.
"""

import re
from fractions import Fraction

from .worker import ask

MAX_ANSWER = 1000  # characters; no right answer of any set here is half as long
MAX_NUMBER = 64
MAX_TEXT = 100_000
_MARKS = re.compile(r"(?:####|answer\s+is\s*:?|answer\s*:)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?:/[0-9]+)?")
_ANY_NUMBER = re.compile(r"[-+]?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?")


def boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{...}`, its braces balanced; None without one.

    Example:
        >>> boxed(r"so \boxed{1}, no: \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
    """
    for opening in reversed([m.end() for m in re.finditer(r"\\f?boxed\s*\{", text[-MAX_TEXT:])][-50:]):
        depth, tail = 1, text[-MAX_TEXT:][opening : opening + MAX_ANSWER + 1]
        for index, char in enumerate(tail):
            depth += (char == "{") - (char == "}")
            if depth == 0:
                return tail[:index].strip()
    return None


def answer_in(text: str) -> str | None:
    r"""Return the answer that a text gives: the last box; without one the text after the last mark, or its only line.

    A mark is `####`, `answer is` or `answer:`. None if the text has several lines and none of these.

    Example:
        >>> answer_in("It is 3. The answer is: 4."), answer_in(" 17\n"), answer_in("first\nsecond")
        ('4.', '17', None)
    """
    return _answer_in(text)[0]


def _answer_in(text: str) -> tuple[str | None, bool]:
    """The answer, and whether it was boxed or marked."""
    text = text[-MAX_TEXT:]
    answer, marked = boxed(text), True
    if answer is None:
        marks = [m.end() for m in _MARKS.finditer(text)]
        lines = text[marks[-1] if marks else 0 :].strip().splitlines()
        marked = bool(marks)
        answer = lines[0].strip() if lines and (marked or len(lines) == 1) else None
    return (answer, marked) if answer and len(answer) <= MAX_ANSWER else (None, marked)


def number(text: str) -> Fraction | None:
    """Return the number that a text is, ignoring currency and thousands signs; None if it is anything else.

    Example:
        >>> number("$1,200.50"), number("3/4"), number("1 or 2")
        (Fraction(2401, 2), Fraction(3, 4), None)
    """
    text = text.strip().strip("$").removeprefix("\\$").rstrip(".").strip()
    if not 0 < len(text) <= MAX_NUMBER or not _NUMBER.fullmatch(text) or not text.isascii():
        return None
    try:
        top, _, bottom = text.replace(",", "").partition("/")
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def exact(completion: str, answer: str) -> bool:
    """Return whether the completion is the answer, ignoring white space.

    Example:
        >>> exact(" the  sea\\n", "the sea"), exact("the sea, yes", "the sea")
        (True, False)
    """
    return len(completion) <= MAX_TEXT and bool(answer.split()) and completion.split() == answer.split()


def numeric(completion: str, answer: str) -> bool:
    r"""Return whether the number that the completion gives has the value of the answer.

    `answer_in` extracts the answer. It is a number alone; if it is boxed or marked, it may have words beside it, such
    as a unit, but no second number.

    Example:
        >>> numeric(r"6 eggs make \$12, so \boxed{12.00}", "12"), numeric("the answer is 12 or 13", "12")
        (True, False)
    """
    wanted = number(answer)
    return wanted is not None and _stated_number(completion) == wanted


def _stated_number(completion: str) -> Fraction | None:
    if len(completion) > MAX_TEXT:
        return None
    stated, marked = _answer_in(completion)
    if stated is None:
        return None
    value = number(stated)
    numbers = _ANY_NUMBER.findall(stated) if value is None and marked else []
    return number(numbers[0].rstrip(",")) if len(numbers) == 1 else value


def math(completion: str, answer: str) -> bool:
    r"""Return whether the answer that the completion gives equals the right one, by math-verify.

    `answer_in` extracts the answer; a completion in several lines without box or mark is wrong. One answer has three
    seconds of processor time; an answer that takes longer is wrong.

    Example:
        >>> math(r"\boxed{\frac{2}{4}}", r"\frac12")  # doctest: +SKIP
        True
    """
    stated = answer_in(completion)
    if stated is None or not answer.strip():
        return False
    if tidy(stated) == tidy(answer):
        return True
    return ask("isentropic.tasks.equality:equal", stated, answer) is True


VERIFIERS = {"exact": exact, "numeric": numeric, "math": math}


def tidy(text: str) -> str:
    r"""Return a canonical text of an answer, in most cases the same for two spellings of one answer.

    Example:
        >>> tidy(r"\dfrac{1}{2}"), tidy("$1,000.0$"), tidy(r"\left( 3, x \right)")
        ('\\frac{1}{2}', '1000', '(3,x)')
    """
    value = number(text)
    if value is not None:
        return str(value)
    text = text.strip().strip("$").rstrip(".")
    for old, new in ((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\left", ""), (r"\right", ""), (r"\!", "")):
        text = text.replace(old, new)
    return re.sub(r"\s|\\[,;: ]", "", text)


def normal(verifier: str, completion: str) -> str:
    """Return the canonical text of the answer in a completion, which is compared to count distinct answers and votes.

    Args:
        verifier: a key of `VERIFIERS`.
        completion: right or wrong.

    Returns:
        The text; empty if there is no answer.

    Example:
        >>> normal("numeric", "#### 1,200"), normal("exact", " a  b ")
        ('1200', 'a b')
    """
    if verifier == "exact":
        return " ".join(completion[:MAX_TEXT].split())
    if verifier == "numeric":
        value = _stated_number(completion)
        return "" if value is None else str(value)
    return tidy(answer_in(completion) or "")
