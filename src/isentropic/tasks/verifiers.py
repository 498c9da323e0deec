r"""Whether a text that a model wrote is right: `exact`, `numeric` and `math`, and where in the text the answer stands.

Nothing here raises or hangs on any text: what cannot be read is wrong. Numbers are compared exactly, as fractions of
integers; mathematics is compared by math-verify, in a process of its own with a hard time limit.
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
    r"""Return what the last complete `\boxed{...}` holds, its braces balanced; None without one.

    Example:
        >>> boxed(r"so \boxed{1}, no: \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
    """
    for opening in reversed([m.end() for m in re.finditer(r"\\f?boxed\s*\{", text[-MAX_TEXT:])][-50:]):
        depth, tail = 1, text[-MAX_TEXT:][opening : opening + MAX_ANSWER + 1]
        for at, char in enumerate(tail):
            depth += (char == "{") - (char == "}")
            if depth == 0:
                return tail[:at].strip()
    return None


def answer_in(text: str) -> str | None:
    r"""Return the answer that a text gives: what is boxed last; else what follows the last mark; else its only line.

    A mark is `####`, `answer is` or `answer:`. None where the text has several lines and none of these.

    Example:
        >>> answer_in("It is 3. The answer is: 4."), answer_in(" 17\n"), answer_in("first\nsecond")
        ('4.', '17', None)
    """
    return _answer_in(text)[0]


def _answer_in(text: str) -> tuple[str | None, bool]:
    """The answer, and whether it was marked as one."""
    text = text[-MAX_TEXT:]
    found, marked = boxed(text), True
    if found is None:
        marks = [m.end() for m in _MARKS.finditer(text)]
        lines = text[marks[-1] if marks else 0 :].strip().splitlines()
        marked = bool(marks)
        found = lines[0].strip() if lines and (marked or len(lines) == 1) else None
    return (found, marked) if found and len(found) <= MAX_ANSWER else (None, marked)


def number(text: str) -> Fraction | None:
    """Return the number that a text is, currency and thousands signs aside; None if it is anything else.

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
    """Return whether the completion is the answer, but for white space.

    Example:
        >>> exact(" the  sea\\n", "the sea"), exact("the sea, yes", "the sea")
        (True, False)
    """
    return len(completion) <= MAX_TEXT and bool(answer.split()) and completion.split() == answer.split()


def numeric(completion: str, answer: str) -> bool:
    r"""Return whether the number that the completion gives has the value of the answer.

    The answer is where `answer_in` finds it. It is a number alone; boxed or marked, it may have words beside it, such
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

    The answer is where `answer_in` finds it; a completion in several lines without box or mark is wrong. One answer has
    three seconds of processor time; what takes longer is wrong, and only that.

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
    r"""Return an answer in the form in which two spellings of one answer are most often the same text.

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
    """Return the canonical text of the answer in a completion, by which distinct answers and votes are counted.

    Args:
        verifier: a key of `VERIFIERS`.
        completion: right or wrong.

    Returns:
        The text; empty where there is no answer.

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
