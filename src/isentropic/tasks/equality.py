"""Mathematical equality by math-verify. Imported by a worker, whose clock is the only one; see `worker`."""

from math_verify import parse, verify


def equal(stated: str, answer: str) -> bool:
    r"""Return whether two answers in LaTeX or plain text are equal.

    Its own time limits are off: they are signals, which Python allows in a main thread alone.

    Example:
        >>> equal(r"\frac{2}{4}", "0.5"), equal("x + 1", "1 - x")
        (True, False)
    """
    gold, got = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (answer, stated))
    return bool(gold and got and verify(gold, got, timeout_seconds=None))
