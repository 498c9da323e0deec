r"""Verifiers of texts that a model wrote, `exact`, `numeric` and `math`, and extraction of the answer from a text.

Nothing here raises or hangs on any text: an answer that cannot be read is wrong. Numbers are compared exactly, as
fractions of integers, and words as words; other mathematics is compared by math-verify, in a separate process with a
hard time limit.
"""

import re
from fractions import Fraction

from .quantities import number, quantity, spelled, unwrapped
from .worker import ask

MAX_ANSWER = 1000  # characters; no right answer of any set here is half as long
MAX_TEXT = 100_000
_MARKS = re.compile(
    r"####|answer[\s*_]*(?:is\b[\s*_]*:?|[:=])[*_]*|\*\*\s*(?:final\s+)?answer\s*\*\*\s*[:=]?|^#+\s*(?:final\s+)?answer\s*$",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE = re.compile(r"(?<=[^.\s])\.\s+(?=[A-Z])")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9]+|[A-Za-z]+|\S")
_FRAC = re.compile(r"\\[dt]?frac(?![A-Za-z])(?:\s*([0-9])\s*([0-9]))?")
_BASE = re.compile(r"([0-9A-Fa-f]+)_(?:\{([0-9]+)\}|([0-9]))")
_TWO_NUMBERS = re.compile(r"[0-9]\s+[0-9]")
_WORD = re.compile(r"\(?[A-Za-z]\)?|[A-Za-z][A-Za-z '’-]*[A-Za-z]")


def boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{...}`, its braces balanced; None without one.

    `\fbox` and `\framebox` are boxes too.

    Example:
        >>> boxed(r"so \boxed{1}, no: \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
    """
    for opening in reversed([m.end() for m in re.finditer(r"\\(?:boxed|fbox|framebox)\s*\{", text[-MAX_TEXT:])][-50:]):
        depth, tail = 1, text[-MAX_TEXT:][opening : opening + MAX_ANSWER + 1]
        for index, char in enumerate(tail):
            depth += (char == "{") - (char == "}")
            if depth == 0:
                return tail[:index].strip()
    return None


def answer_in(text: str) -> str | None:
    r"""Return the answer that a text gives: the last box; without one the text after the last mark, or its only line.

    A mark is `####`, `answer is`, `answer:` or a heading such as `**Final answer**`; after it one sentence is read.
    None if the text has several lines and none of these.

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
        answer = _SENTENCE.split(answer)[0] if answer and marked else answer
    return (answer, marked) if answer and len(answer) <= MAX_ANSWER else (None, marked)


def exact(completion: str, answer: str) -> bool:
    """Return whether the completion is the answer, ignoring white space.

    Example:
        >>> exact(" the  sea\\n", "the sea"), exact("the sea, yes", "the sea")
        (True, False)
    """
    return len(completion) <= MAX_TEXT and bool(answer.split()) and completion.split() == answer.split()


def numeric(completion: str, answer: str) -> bool:
    r"""Return whether the number that the completion gives has the value of the answer.

    `answer_in` extracts the answer. It is a number alone; if it is boxed or marked, it may have a unit, a scale or a
    few words beside it: see `quantity`. A number inside an expression is not the answer.

    Example:
        >>> numeric(r"6 eggs make \$12, so \boxed{12.00}", "12"), numeric(r"\boxed{\sqrt{12}}", "12")
        (True, False)
    """
    wanted = quantity(answer)
    return wanted is not None and _stated_number(completion) == wanted


def _stated_number(completion: str) -> Fraction | None:
    if len(completion) > MAX_TEXT:
        return None
    stated, marked = _answer_in(completion)
    if stated is None:
        return None
    return quantity(stated) if marked else number(stated)


def math(completion: str, answer: str) -> bool:
    r"""Return whether the answer that the completion gives equals the right one.

    `answer_in` extracts the answer; a completion in several lines without box or mark is wrong. Two numbers are
    compared exactly, and two words as words. Everything else is compared by math-verify, with three seconds of
    processor time; an answer that takes longer is wrong.

    Example:
        >>> math(r"\boxed{\frac{2}{4}}", r"\frac12"), math(r"\boxed{2 3}", "23"), math("WON", "NOW")
        (True, False, False)
    """
    stated = answer_in(completion)
    if stated is None or not answer.strip():
        return False
    decided = _decided(stated, answer)
    return ask("isentropic.tasks.equality:equal", stated, answer) is True if decided is None else decided


def _decided(stated: str, answer: str) -> bool | None:
    """Whether two answers are equal, if their texts decide it; None if mathematics must decide."""
    if tidy(stated) == tidy(answer):
        return True
    left, right = number(stated), number(answer)
    if left is not None and right is not None:
        return left == right
    words = _words(stated), _words(answer)
    if None not in words and any(_is_word(text) for text in (stated, answer)):
        return words[0] == words[1]
    stated_base, base = _based(stated), _based(answer)
    if stated_base is not None:
        return stated_base == base
    # math-verify may read two numbers side by side as one of them, and reads `X` as `x`.
    if _two_numbers(stated) or _two_numbers(answer):
        return False
    left, right = quantity(stated), quantity(answer)
    named = "=" in stated and "=" in answer
    if left is not None and left == right and not named:
        return True
    return False if _both_cases(stated + answer) else None


def _based(text: str) -> tuple[str, str] | None:
    """The digits and the base of a number such as `52_8`; math-verify drops the base."""
    match = _BASE.fullmatch(tidy(text))
    return None if match is None else (match[1], match[2] or match[3])


def _words(text: str) -> str | None:
    """The letters of an answer that has nothing else, such as a name or a choice; None for any other."""
    text = spelled(text).strip()
    return " ".join(text.strip("()").casefold().split()) if _WORD.fullmatch(text) else None


def _is_word(text: str) -> bool:
    """Whether letters are a word and not a product: set as text, with a capital, or four and more."""
    letters = spelled(text).strip("()")
    return unwrapped(text) != text or (len(letters) > 1 and not (letters.islower() and len(letters) < 4))


def _two_numbers(text: str) -> bool:
    """Whether two numbers are side by side, with a space only; `\\frac 1 2` does not count."""
    text = re.sub(r"\\(?:[dt]?frac|[dt]?binom)\s*[0-9]\s*[0-9]|_\s*[0-9]", "", text)
    return bool(_TWO_NUMBERS.search(re.sub(r"\\[,;: ]|\\q?quad|[~\u00a0\u2009\u202f]", " ", text)))


def _both_cases(text: str) -> bool:
    """Whether one letter is a variable in both cases."""
    letters = set("".join(token for token in _TOKEN.findall(unwrapped(text)) if token.isalpha()))
    return any(letter.upper() in letters for letter in letters if letter.islower())


VERIFIERS = {"exact": exact, "numeric": numeric, "math": math}


def tidy(text: str) -> str:
    r"""Return a canonical text of an answer: the same for two spellings of one answer in most cases, and never for two
    answers.

    Example:
        >>> tidy(r"\dfrac{1}{2}"), tidy("$1,000.0$"), tidy(r"\left( 3, x \right)"), tidy("2 3"), tidy(r"\dfrac x2")
        ('1/2', '1000', '(3,x)', '2 3', '\\frac x2')
    """
    value = number(text)
    if value is not None:
        return str(value)
    text = unwrapped(_FRAC.sub(_braced, text.strip())).strip("$").rstrip(".")
    tokens = [token for token in _TOKEN.findall(text) if token not in _BLANK]
    # Letters and digits that a space separates are no longer one run.
    return "".join(
        f" {token}" if before[-1:].isalnum() and _runs_on(before, token) else token
        for before, token in zip(["", *tokens], tokens, strict=False)
    )


_BLANK = frozenset({r"\left", r"\right", r"\displaystyle", r"\!", r"\,", r"\;", r"\:", "\\ ", "$"})


def _runs_on(before: str, token: str) -> bool:
    """Whether two tokens would be read as one without a space."""
    return token[0].isdigit() if before.isdigit() else token[0].isalpha()


def _braced(match: re.Match[str]) -> str:
    return rf"\frac{{{match[1]}}}{{{match[2]}}}" if match[1] else r"\frac"


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
