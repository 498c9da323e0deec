"""Mathematical equality by math-verify. Imported by a worker process, which has the time limit; see `worker`."""

from math_verify import LatexExtractionConfig, parse, verify

# Its other extractions find a number in any text, even in a line of code.
_WHOLE = [LatexExtractionConfig()]


def equal(stated: str, answer: str) -> bool:
    r"""Return whether two answers in LaTeX or plain text are equal.

    math-verify's own time limits are off: they are signals, which Python allows in the main thread only.

    Example:
        >>> equal(r"\frac{2}{4}", "0.5"), equal("x + 1", "1 - x")
        (True, False)
    """
    gold, got = (parse(rf"\boxed{{{t}}}", extraction_config=_WHOLE, parsing_timeout=None) for t in (answer, stated))
    return bool(gold and got and verify(gold, got, timeout_seconds=None))
