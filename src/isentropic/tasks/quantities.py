r"""The number that a text states, exactly, as a fraction of integers; None for a text that merely contains one.

A number is decimal, grouped by thousands, a fraction, a mixed number or in scientific notation, in LaTeX or in plain
text. A currency, a unit, a scale such as `thousand` and a few words may be beside it; anything else makes the text
an expression, or a sentence about a number, and has no value here.
"""

import re
from fractions import Fraction

MAX_DIGITS = 64
MAX_TEXT = 300  # characters
MAX_UNIT = 12  # words
_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_VALUE = re.compile(
    r"(?P<sign>[-+]?) ?(?P<currency>[$€£¥]?) ?(?P<inner>[-+]?) ?"
    rf"(?:(?P<whole>[0-9]+) (?P<over>[0-9]+) ?/ ?(?P<under>[0-9]+)|(?P<top>{_DECIMAL})(?: ?/ ?(?P<bottom>{_DECIMAL}))?)"
    r"(?: ?(?:\\times|\\cdot|×|·|\*) ?10 ?\^ ?\{? ?(?P<power>[-+]?[0-9]{1,3}) ?\}?)?(?P<tail>.*)"
)
_MINUS = re.compile("[\u2010-\u2013\u2212\ufe63\uff0d]")
_SPACES = re.compile(r"\\[,;: ]|\\q?quad(?![A-Za-z])|[~\s\u00a0\u2009\u202f]")
_GROUPS = re.compile(r"(?<=[0-9])(?:\{,\}|\\text\{,\}|,?\s*\\!\s*|\\,|[\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_BRACKETS = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\!")
_ARGUMENT = r"\s*(?:\{{\s*(?P<{0}>[-+]?[0-9.,]+)\s*\}}|(?P<{0}_digit>[0-9]))"
_FRACTION = re.compile(rf"(?P<sign>-?)\s*\\[dtc]?frac{_ARGUMENT.format('top')}{_ARGUMENT.format('bottom')}")
_REPEATING = re.compile(r"(?<![0-9.,])(?<![0-9] )(?P<whole>[0-9]*)\.(?P<once>[0-9]*)\\overline\s*\{(?P<again>[0-9]+)\}")
_WRAPPED = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox|emph)\s*\{((?:[^{}\\]|\\.)*)\}")
_BOLD = re.compile(r"(?<![\w*])\*\*([^*]+)\*\*(?![\w*])")
_DEGREES = re.compile(r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|°|\\degree)(?![A-Za-z])")
_GLYPHS = {"¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
_NAME = re.compile(
    r"\\?[A-Za-z]+(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?(?:\([A-Za-z]\))?|[A-Za-z]{2,}(?: [A-Za-z]{2,})+"
    r"|[A-Za-z](?: ?\+ ?[A-Za-z])+"  # as competitions ask: find m + n
)
_ARITHMETIC = re.compile(r"(?:[-+0-9.,$%()=*/×·÷ ]|\\times|\\cdot|\\div)*")
_UNIT = re.compile(r"([A-Za-zµ]+(?:['’-][A-Za-z]+)*)(?:\^ ?(?:[23]|\{ ?[23] ?\})|[²³])?")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words before a number by which it is still the value that is stated.
_LEAD = frozenset(
    "a an answer are be cost costs earned earns equal equals exactly final gets had has have he is it just made makes "
    "must needs of only our paid pays she should so spends spent that the there therefore they thus to total was we "
    "were will you".split()
)
# Words after a number by which another value is stated: a factor, a relation, an alternative, a doubt.
_DENIED = frozenset(
    "abc also am and approx approximately are arccos arcsin arctan around as at base be because but choose cos cosh "
    "cot csc cubed det div divided dozen dozens either equals even except exp factorial false floor gcd give greater "
    "had half halves hundredth hundredths if incorrect infinity is isn't ish it lcm least less ln log max maybe min "
    "minus mod modulo most multiplied neither never no nor not odd or over percentile perhaps pi plus point power "
    "roughly score sec sin sinh sqrt squared tan tanh tenth tenths than then thirds thousandth thousandths times to "
    "unless until was were wrong xyz "
    "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty".split()
)
_OF_UNITS = frozenset({"squared", "cubed"})  # may follow a unit, and not the number itself
_SHORT = frozenset("cc cm dm ft gb hr hz in kb kg km kw lb mb mg mi ml mm ms oz pt qt yd yr a of".split())
_GLUED = _SHORT - {"a", "of"} | frozenset("hrs lbs mins mph kmh kph sec yds yrs degrees".split())
_LETTERS = frozenset("mgshLl")


def spelled(text: str) -> str:
    r"""Return a text with one spelling of signs, spaces, thousands, simple fractions and text in LaTeX.

    Example:
        >>> spelled(r"$-\frac12$"), spelled(r"1{,}200\text{ cm}^2."), spelled("**−5**")
        ('-1/2', '1,200 cm ^2', '-5')
    """
    text = _BOLD.sub(r"\1", _MINUS.sub("-", text.strip())).strip("`")
    text = re.sub(r"\\[()\[\]]", "", text).replace("\\$", "\x00")
    # A pair of dollar signs delimits mathematics; a single one is a currency.
    text = text.replace("$", "") if text.count("$") % 2 == 0 else text
    text = _BRACKETS.sub("", _GROUPS.sub(",", text.replace("\x00", "$").replace("\\%", "%")))
    text = _DEGREES.sub(" degrees ", unwrapped(text))
    text = _FRACTION.sub(_plain_fraction, text)
    text = _REPEATING.sub(_repeating, text)
    for glyph, plain in _GLYPHS.items():
        text = text.replace(glyph, plain)
    text = " ".join(_SPACES.sub(" ", text).split())
    while re.fullmatch(r"\{[^{}]*\}", text):
        text = text[1:-1].strip()
    return text if text.endswith("..") else text.rstrip(" .,;")


def unwrapped(text: str) -> str:
    r"""Return a text without `\text{}` and its like, their contents kept.

    Example:
        >>> unwrapped(r"\textbf{(C)}").strip()
        '(C)'
    """
    for _ in range(2):
        text = _WRAPPED.sub(r" \1 ", text)
    return text


def _plain_fraction(match: re.Match[str]) -> str:
    top, bottom = (match[name] or match[f"{name}_digit"] for name in ("top", "bottom"))
    negative = (match["sign"] + top + bottom).count("-") % 2
    # A space before it, for `1\frac12` is a mixed number; none after a sign.
    return f"{'-' if negative else ' '}{top.lstrip('+-')}/{bottom.lstrip('+-')} "


def _repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as 1/6: the digits less those before the period, over as many nines and zeros."""
    before = match["whole"] + match["once"]
    nines = "9" * len(match["again"]) + "0" * len(match["once"])
    return f"{int(before + match['again']) - int(before or '0')}/{nines}" if len(nines) < MAX_DIGITS else match[0]


def number(text: str) -> Fraction | None:
    r"""Return the number that a text is, with or without a currency; None if it is anything else.

    Example:
        >>> number("-$1,200.50"), number(r"\frac34"), number("1 1/2"), number("1 or 2"), number("5 cm")
        (Fraction(-2401, 2), Fraction(3, 4), Fraction(3, 2), None, None)
    """
    return _read(spelled(text), units=False) if len(text) <= MAX_TEXT else None


def quantity(text: str) -> Fraction | None:
    r"""Return the number that a text states, with a unit, a scale or words such as `she has` beside it, or as `x = 5`.

    The unit is not compared: `5 cm` and `5` are one quantity here, and `50%` is 50.

    Example:
        >>> quantity(r"12\text{ cm}^2"), quantity("x = 5"), quantity("2 thousand"), quantity("a total of 7 apples")
        (Fraction(12, 1), Fraction(5, 1), Fraction(2000, 1), Fraction(7, 1))
        >>> [quantity(text) for text in (r"\sqrt{49}", r"49\pi", "49x", "not 49", "less than 49", "7 or 8", "49!")]
        [None, None, None, None, None, None, None]
    """
    if len(text) > MAX_TEXT:
        return None
    text = spelled(text)
    left, equals, right = text.rpartition("=")
    if equals:
        named = _NAME.fullmatch(left.strip()) and not any(word.casefold() in _DENIED for word in left.split())
        if not named and not _ARITHMETIC.fullmatch(left):
            return None
        text = right
    words = text.split()
    while words and words[0].rstrip(",:").casefold() in _LEAD:
        words.pop(0)
    negative = bool(words) and words[0].casefold() in ("minus", "negative")
    value = _read(" ".join(words[negative:]), units=True)
    return -value if negative and value is not None and value > 0 else None if negative else value


def _read(text: str, units: bool) -> Fraction | None:
    match = _VALUE.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]) or sum(map(str.isdigit, text)) > MAX_DIGITS:
        return None
    if match["whole"]:
        whole, over, under = (int(match[name]) for name in ("whole", "over", "under"))
        if not 0 < over < under:
            return None
        value = whole + Fraction(over, under)
    else:
        top, bottom = (Fraction((match[name] or "1").replace(",", "")) for name in ("top", "bottom"))
        if bottom == 0:
            return None
        value = top / bottom
    scale = _scale(match["tail"], units)
    if scale is None:
        return None
    value *= scale * Fraction(10) ** int(match["power"] or 0)
    return -value if "-" in (match["sign"], match["inner"]) else value


def _scale(tail: str, units: bool) -> int | None:
    """The factor that the text after a number means; None if it is neither a scale nor a unit."""
    rest = tail.strip()
    if rest in ("", "$", "€", "£", "¥"):
        return 1
    if not units:
        return None
    scale, glued = 1, tail[0] != " "
    while not glued and rest.partition(" ")[0].casefold() in _SCALES:
        word, _, rest = rest.partition(" ")
        scale *= _SCALES[word.casefold()]
    if rest[:1] in ("%", "$", "€", "£", "/"):
        rest, glued = rest[1:].strip(), False
    return scale if not rest or _is_unit(rest, glued) else None


def _is_unit(text: str, glued: bool) -> bool:
    """Whether a text is words that may follow a number; `glued` if no space is between them."""
    parts = re.split(r", | ?/ ?| ", re.sub(r" (?=\^)", "", text))
    matches = [_UNIT.fullmatch(part) for part in parts]
    if len(parts) > MAX_UNIT or parts[-1] == "a" or None in matches:
        return False
    before = ""
    for match in matches:
        assert match is not None
        word = match[1].casefold()
        if word in _DENIED and not (before and word in _OF_UNITS):
            return False
        if glued and not before and word not in _GLUED:
            return False
        if len(word) < 3 and word not in _SHORT and match[1] not in _LETTERS and before != "degrees":
            return False
        before = word
    return True
