"""Mathematical equality by math-verify. Imported by a worker process, which has the time limit; see `worker`.

math-verify finds two answers equal whose difference it rounds to zero, and an ordered pair equal to a list in another
order. What it finds equal is therefore compared once more, by relative difference and in order.
"""

import re
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr, FiniteSet, Interval, MatrixBase, Rational, Tuple

# Its other extractions find a number in any text, even in a line of code.
_WHOLE = [LatexExtractionConfig()]
DECIMALS = 12  # to which a decimal number is compared
DIGITS = 30  # of the arithmetic of the second comparison
TOLERANCE = 1e-12  # relative
_GLYPHS = {
    "\u2212": "-",
    "\u2013": "-",
    "²": "^2",
    "³": "^3",
    "π": r"\pi ",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "°": r"^\circ ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "∪": r"\cup ",
    "±": r"\pm ",
    "θ": r"\theta ",
}


def equal(stated: str, answer: str) -> bool:
    r"""Return whether two answers in LaTeX or plain text are equal.

    math-verify's own time limits are off: they are signals, which Python allows in the main thread only.

    Example:
        >>> equal(r"\frac{2}{4}", "0.5"), equal("x + 1", "1 - x"), equal("2^{-98}", "2^{-99}"), equal("√18", "3√2")
        (True, False, False, True)
    """
    gold, got = (
        parse(rf"\boxed{{{_latex(text)}}}", extraction_config=_WHOLE, parsing_timeout=None) for text in (answer, stated)
    )
    settings: dict[str, Any] = {"float_rounding": DECIMALS, "allow_set_relation_comp": True, "timeout_seconds": None}
    if not (gold and got and verify(gold, got, **settings)):
        return False
    return not _apart(gold[0], got[0])


def _latex(text: str) -> str:
    text = re.sub(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+|[A-Za-z]))", r"\\sqrt{\1\2\3}", text.strip().rstrip("."))
    text = re.sub(r"(?<![\\A-Za-z])(?:oo|inf|infinity)(?![A-Za-z])", r"\\infty ", text)
    for glyph, latex in _GLYPHS.items():
        text = text.replace(glyph, latex)
    return text


def _apart(gold: Any, got: Any) -> bool:
    """Whether two answers that were found equal have parts that are not."""
    if isinstance(gold, FiniteSet) and isinstance(got, FiniteSet):
        return not all(any(not _apart(a, b) for b in got.args) for a in gold.args)
    gold_parts, got_parts = _parts(gold), _parts(got)
    if gold_parts is not None and got_parts is not None:
        return len(gold_parts) != len(got_parts) or any(map(_apart, gold_parts, got_parts))
    if not isinstance(gold, Expr) or not isinstance(got, Expr) or gold.free_symbols != got.free_symbols:
        return False
    symbols = sorted(gold.free_symbols, key=str)
    for first in (5, 7):
        point = {symbol: Rational(7 + 10 * i, first + i) for i, symbol in enumerate(symbols)}
        if _far(gold.evalf(DIGITS, subs=point), got.evalf(DIGITS, subs=point)):
            return True
    return False


def _parts(answer: Any) -> list[Any] | None:
    """The parts of an answer in their order, for a pair, a tuple, a list, an interval or a matrix."""
    if isinstance(answer, Interval):
        return [answer.start, answer.end]
    if isinstance(answer, FiniteSet):
        # As they were written; `args` are sorted.
        return list(getattr(answer, "_unsorted_args", answer.args))
    if isinstance(answer, Tuple):
        return list(answer.args)
    return answer.flat() if isinstance(answer, MatrixBase) else None


def _far(gold: Any, got: Any) -> bool:
    if not (gold.is_number and got.is_number and gold.is_finite and got.is_finite):
        return False
    return bool(abs(gold - got) > TOLERANCE * max(abs(gold), abs(got)))
