r"""A table of answers and their verdicts, and what every verifier must do with any of them."""

import pytest
from answer_pairs import PAIRS

from isentropic.tasks import worker
from isentropic.tasks.equality import equal
from isentropic.tasks.quantities import number, quantity
from isentropic.tasks.rows import completion_of
from isentropic.tasks.verifiers import VERIFIERS, normal, numeric, tidy


@pytest.fixture(scope="module", autouse=True)
def _ended():
    yield
    worker.close()


def test_the_table_is_large_and_even():
    rights = sum(right for *_, right in PAIRS)
    assert len(set(PAIRS)) == len(PAIRS) >= 150
    assert 0.4 < rights / len(PAIRS) < 0.6
    assert {style for style, *_ in PAIRS} == {"gsm8k", "math", "aime"}


@pytest.mark.parametrize(("style", "verifier", "text", "gold", "right"), PAIRS)
def test_an_answer_is_right_or_wrong(style, verifier, text, gold, right):
    if verifier == "math":
        pytest.importorskip("math_verify")
    assert VERIFIERS[verifier](text, gold) is right


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_every_gold_is_right_by_its_own_verifier(verifier):
    golds = {gold for _, of, _, gold, _ in PAIRS if of == verifier}
    assert [gold for gold in golds if not VERIFIERS[verifier](completion_of(verifier, gold), gold)] == []


def test_texts_that_tidy_makes_one_are_one_answer():
    pytest.importorskip("math_verify")
    wrong = [(text, gold) for _, of, text, gold, right in PAIRS if of == "math" and not right]
    assert [pair for pair in wrong if normal("math", pair[0]) == tidy(pair[1])] == []
    # Twice the same text in two spellings, and two texts that a lost space or arrow would make one.
    assert tidy(r"\left( 3,\, x \right)") == tidy("(3, x)")
    for one, other in [
        ("2 3", "23"),
        (r"\leftarrow", r"\rightarrow"),
        ("1 1/2", "11/2"),
        ("x y", "xy"),
        ("5 6x", "56x"),
    ]:
        assert tidy(one) != tidy(other)


def test_numbers_in_every_spelling():
    for text in ("1200", "1,200", "1{,}200", r"1,\!200", r"1\,200", "$1200$", r"\$1,200.00", "1200.", r"\text{1200}"):
        assert number(text) == 1200, text
    for text in ("-5", "\u22125", "\uff0d5", "-$5", "$-5", r"-\$5", r"\$-5", "- 5"):
        assert number(text) == -5, text
    for text in (r"\frac12", r"\dfrac{1}{2}", r"\frac{1}2", r"\frac1{2}", r"\frac 1 2", "1/2", "½", ".5", "0.50"):
        assert number(text) == number("0.5"), text
    for text in ("1,2", "1,20", "1/0", "--5", "1 2", "1 3/2", "5 cm", r"\frac123", "1e3", "\u0667", "", "9" * 100):
        assert number(text) is None, text
    assert quantity("9" * 400) is None


def test_a_difference_that_is_rounded_away_is_one():
    pytest.importorskip("math_verify")
    assert equal("2^{-98}", r"\frac{1}{2^{98}}")
    assert equal(r"x + \sqrt{8}", r"2\sqrt{2} + x")
    for one, other in [
        ("2^{-98}", "2^{-99}"),
        (r"\{2^{-98}, 1\}", r"\{2^{-99}, 1\}"),
        ("(0, 2^{-98})", "(0, 2^{-99})"),
        (r"\begin{pmatrix} 2^{-98} \\ 1 \end{pmatrix}", r"\begin{pmatrix} 2^{-99} \\ 1 \end{pmatrix}"),
    ]:
        assert not equal(one, other)


def test_a_hedge_earns_nothing():
    for text in (r"\boxed{49, 50}", r"\boxed{49 or 50}", "Answer: 49 (or 50)", "#### 49 50", "49\n50"):
        assert not numeric(text, "49")
        assert not numeric(text, "50")
