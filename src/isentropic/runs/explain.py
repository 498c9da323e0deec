"""What is wrong, and why did entropy move? The answer from a run directory, in figures and in a few sentences.

Problems come first, by the rules of :mod:`isentropic.runs.diagnosis`. The rest comes from metrics.jsonl: the
entropies, and what was predicted of the steps that were explained. Between two explained steps a prediction counts for
the steps that follow it. This module needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from textwrap import fill
from typing import Any

from .calibration import BLOCK, Calibration, calibrate, distrust
from .diagnosis import diagnose
from .labels import CLIP_STATES, COLUMNS, POSITIONS, QUADRANTS, SIGNS
from .moves import phase_lines
from .record import Record, is_number
from .summary import SETTLED, steps_at_bound

COMPLETIONS = {"finished": "ended by themselves", "truncated": "cut at the limit"}
LENGTHS = {"short": "shortest third", "middle": "middle third", "long": "longest third"}
_LARGEST = 1e150  # sums of larger ones have no float
MAX_LINES = 12  # of the tables of tokens and of steps

Row = dict[str, Any]


def parse_steps(text: str | None, last: int) -> tuple[int, int]:
    """Read a range of steps, both ends included: ``"a:b"``, ``"a:"``, ``":b"`` or one step; all steps if it is None.

    Args:
        text: as the command line has it.
        last: step of the run.

    Returns:
        First and last step.

    Raises:
        ValueError: anything else, or a range that holds no step of the run.

    Example:
        >>> parse_steps("100:", 800), parse_steps(None, 800), parse_steps("7", 800)
        ((100, 800), (1, 800), (7, 7))
    """
    if text is None:
        return 1, last
    start, colon, end = text.partition(":")
    ends = [start or "1", (end or str(last)) if colon else start]
    if not all(number.strip().isdigit() for number in ends):
        raise ValueError(f"steps must be A:B, A:, :B or one step, got {text!r}; as in 100:140")
    low, high = (int(number) for number in ends)
    if not 1 <= low <= high or low > last:
        raise ValueError(f"steps {text} hold no step of this run, which has 1:{last}; the first comes first")
    return low, min(high, last)


def explain(record: Record, steps: str | None = None) -> dict[str, Any]:
    """What moved entropy over some steps of a run, as plain numbers.

    Args:
        record: the run directory.
        steps: as :func:`parse_steps` reads it.

    Returns:
        ``problems`` (see :func:`isentropic.runs.diagnosis.diagnose`), ``steps``, ``entropy`` (first, last and change by
        the mean of a few readings at either end), ``predicted`` (Σ of every ``predict/`` field over the explained
        steps, each weighted by the steps it counts for), ``explained``, ``shares`` (of the explained tokens, by end and
        by length of the completion, as far as known), ``calibration``, ``distrust`` (why predictions are not to be
        trusted, or None), ``knob``, ``saturated`` (see :func:`isentropic.runs.summary.steps_at_bound`), ``tokens``,
        ``rows`` for the table, ``numerics``, ``theorem2``, ``target`` (where an automatic target was, and why).

    Raises:
        ValueError: not a run directory, no steps yet, or steps that the run does not have.

    Example:
        >>> import tempfile
        >>> run = Record(tempfile.mkdtemp())
        >>> run.start(config={}, recipe={}, seed=0)
        >>> run.append("metrics", *({"step": t, "entropy/mean": 1 - 0.1 * t, "predict/change": -0.05} for t in (1, 2)))
        >>> explanation = explain(run)
        >>> round(explanation["entropy"]["change"], 6), explanation["predicted"]
        (-0.1, {'change': -0.1})
    """
    header = record.header()
    rows = readable(record.rows("metrics"))
    if not rows:
        raise ValueError(f"{record.path} has no steps in metrics.jsonl yet; wait for the first, or name another run")
    low, high = parse_steps(steps, rows[-1]["step"])
    inside = [row for row in rows if low <= row["step"] <= high]
    explained = _explained(inside)
    spans = _spans(explained, high)
    calibration = calibrate(rows)
    return {
        "problems": [problem._asdict() for problem in diagnose(header, inside)],
        "run": str(record.path),
        "steps": [low, high],
        "explained": len(explained),
        "refused": sum(bool(row.get("entropy/refused")) for row in inside),
        "entropy": _entropy(rows, low, high),
        "predicted": _predicted(explained, spans),
        "shares": _shares(explained, spans),
        "calibration": calibration and calibration._asdict(),
        "distrust": distrust(calibration),
        "knob": _mean(inside, "knob/value"),
        "saturated": steps_at_bound(inside),
        "target": phase_lines(inside),
        "tokens": top_tokens(inside),
        "numerics": {name: _mean(explained, f"numerics/{name}") for name in ("logp_rms", "entropy_bias")},
        "clip": {name: _mean(inside, f"clip/{name}") for name in ("low_frac", "high_frac")},
        "theorem2": {
            "outside_frac": _mean(inside, "ratio/outside_frac"),
            "violated_frac": _mean(inside, "theorem2/violated_frac"),
        },
        "rows": _blocks(inside, {row["step"]: span for row, span in zip(explained, spans, strict=True)}),
    }


def readable(rows: Sequence[Row]) -> list[Row]:
    """Rows in order of their steps, a step once, with the numbers alone: what a damaged file holds besides is left out.

    Args:
        rows: of metrics.jsonl, as they were read.

    Example:
        >>> readable([{"step": 2, "loss": "a"}, {"loss": 1.0}, {"step": 1, "loss": 2.0}])
        [{'step': 1, 'loss': 2.0}, {'step': 2}]
    """
    by_step = {int(row["step"]): row for row in rows if is_number(row.get("step")) and row["step"] >= 1}
    return [
        {
            name: value
            for name, value in {**by_step[step], "step": step}.items()
            if (is_number(value) and abs(value) < _LARGEST)
            or isinstance(value, bool)
            or name == "predict/top_tokens"
            or (name in ("task", "entropy/target_why") and isinstance(value, str))
        }
        for step in sorted(by_step)
    ]


def _token_triples(value: Any) -> list[tuple[str, float, float]]:
    """[text, change, count] of a row's tokens, as far as they can be read."""
    triples = [item for item in value if isinstance(item, list) and len(item) == 3] if isinstance(value, list) else []
    return [(str(text), change, count) for text, change, count in triples if is_number(change) and is_number(count)]


def top_tokens(rows: Sequence[Row], num: int = MAX_LINES) -> list[dict[str, Any]]:
    """The tokens that were predicted to move entropy most.

    Args:
        rows: of metrics.jsonl, in order of steps.
        num: tokens to return.

    Returns:
        ``text``, ``change`` (Σ over steps, nats per token) and ``count`` of each, the largest change first. An
        explained step counts for those up to the next.

    Example:
        >>> rows = [{"step": 1, "predict/change": -0.5, "predict/top_tokens": [["a", -0.5, 3]]}, {"step": 2}]
        >>> top_tokens(rows)
        [{'text': 'a', 'change': -1.0, 'count': 6}]
    """
    explained = _explained(rows)
    totals: dict[str, list[float]] = {}
    for row, span in zip(explained, _spans(explained, rows[-1]["step"] if rows else 0), strict=True):
        for text, change, count in _token_triples(row.get("predict/top_tokens")):
            total = totals.setdefault(text, [0.0, 0])
            total[0] += change * span
            total[1] += count * span
    ranked = sorted(totals.items(), key=lambda item: -abs(item[1][0]))
    return [{"text": text, "change": change, "count": int(count)} for text, (change, count) in ranked[:num]]


def _explained(rows: Sequence[Row]) -> list[Row]:
    """Rows with a prediction; a step whose reading was refused predicts nothing either."""
    return [row for row in rows if row.get("predict/change") is not None and not row.get("entropy/refused")]


def _spans(explained: Sequence[Row], high: int) -> list[int]:
    """How many steps each explained one counts for: itself and those up to the next."""
    if not explained:
        return []
    ends = [*(row["step"] for row in explained[1:]), high + 1]
    return [end - row["step"] for row, end in zip(explained, ends, strict=True)]


def _predicted(explained: Sequence[Row], spans: Sequence[int]) -> dict[str, float]:
    """Σ of every field over steps; a field may be null in some rows: what is not known adds nothing."""
    names = sorted({name for row in explained for name, value in row.items() if _is_summed(name, value)})
    predicted = {
        name.removeprefix("predict/"): math.fsum(
            row[name] * span for row, span in zip(explained, spans, strict=True) if row.get(name) is not None
        )
        for name in names
    }
    # Rounding is compared in some of the explained steps only: its mean is taken for the others.
    rounding = _mean(explained, "predict/numerics")
    if rounding is not None:
        predicted["numerics"] = rounding * sum(spans)
    return predicted


def _shares(explained: Sequence[Row], spans: Sequence[int]) -> dict[str, float]:
    """The share of tokens in completions of each kind: the mean over the steps that explained ones count for."""
    shares = {}
    for kind in (*COMPLETIONS, *LENGTHS):
        name = f"tokens/{kind}_frac"
        pairs = [(row[name], span) for row, span in zip(explained, spans, strict=True) if row.get(name) is not None]
        if pairs:
            shares[kind] = math.fsum(x * span for x, span in pairs) / sum(span for _, span in pairs)
    return shares


def _is_summed(name: str, value: Any) -> bool:
    skipped = ("predict/gain", "predict/moments", "predict/top_tokens")
    return name.startswith("predict/") and name not in skipped and isinstance(value, int | float)


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return math.fsum(values) / len(values) if values else None


def _entropy(rows: Sequence[Row], low: int, high: int) -> dict[str, float | None]:
    """Before the first and after the last step, each a mean of up to ten readings inside the range."""
    # The reading of a step is taken before its update: the one after the last step shows what the last step did.
    end = min(high + 1, rows[-1]["step"])
    reach = max(1, min(10, (end - low + 1) // 2))
    first = _mean([row for row in rows if low <= row["step"] < low + reach], "entropy/mean")
    last = _mean([row for row in rows if end - reach < row["step"] <= end], "entropy/mean")
    change = None if first is None or last is None else last - first
    return {"first": first, "last": last, "change": change}


def _blocks(rows: Sequence[Row], spans: dict[int, int]) -> list[dict[str, Any]]:
    """The table of steps: rows in blocks, with the changes that were predicted and measured; ``spans`` by step."""
    size = max(1, -(-len(rows) // MAX_LINES))
    table = []
    for i in range(0, len(rows), size):
        block = rows[i : i + size]
        line: dict[str, Any] = {"first": block[0]["step"], "last": block[-1]["step"]}
        line["entropy"] = _mean(block, "entropy/mean")
        line["knob"] = _mean(block, "knob/value")
        explained = [row for row in block if row["step"] in spans]
        for name in ("change", *QUADRANTS, "knob"):
            values = [row[f"predict/{name}"] for row in explained if row.get(f"predict/{name}") is not None]
            weights = [spans[row["step"]] for row in explained if row.get(f"predict/{name}") is not None]
            key = "by_knob" if name == "knob" else name
            line[key] = math.fsum(v * w for v, w in zip(values, weights, strict=True)) if values else None
        table.append(line)
    for line, following in pairwise(table):
        pair = (line["entropy"], following["entropy"])
        line["measured"] = None if None in pair else pair[1] - pair[0]
    return table


def render(explanation: dict[str, Any]) -> str:
    """The explanation as text, at most 100 columns wide.

    Args:
        explanation: what :func:`explain` returned.

    Returns:
        Lines for a terminal; a section without figures is absent.
    """
    low, high = explanation["steps"]
    lines = [line for problem in explanation["problems"] for line in _problem_lines(problem)]
    lines += [f"{explanation['run']}, steps {low} to {high}", "", fill(verdict(explanation), 100), ""]
    if explanation["target"]:
        lines += ["Where was the target, and why?"]
        lines += [fill(text, 100, initial_indent="  ", subsequent_indent="    ") for text in explanation["target"]]
        lines += [""]
    if not explanation["explained"]:
        return "\n".join(lines).rstrip()
    lines += _calibration_lines(explanation)
    if explanation["distrust"]:
        lines += [fill(f"Do not trust the attribution below: {explanation['distrust']}.", 100), ""]
    predicted = explanation["predicted"]
    scale = predicted.get("absolute") or 1.0
    sections = {
        "What moved entropy? (predicted nats per token, and share of all contributions)": QUADRANTS,
        "In which answers?": SIGNS,
        "What did the clip do?": CLIP_STATES,
    }
    for title, labels in sections.items():
        bars = [_bar(label, predicted[name], scale) for name, label in labels.items() if predicted.get(name)]
        lines += [title, *bars, ""] if bars else []
    lines += _position_lines(predicted)
    lines += _completion_lines(explanation, scale)
    lines += _token_lines(explanation["tokens"])
    lines += _other_lines(explanation)
    return "\n".join([*lines, *_step_lines(explanation["rows"])]).rstrip()


def _problem_lines(problem: dict[str, str]) -> list[str]:
    """The headline, what shows it, and the remedy; the sections of docs/troubleshooting.md have the same order."""
    texts = (problem["detail"], f"Remedy: {problem['remedy']}.")
    return [problem["headline"], *(fill(text, 100, initial_indent="  ", subsequent_indent="  ") for text in texts), ""]


def verdict(explanation: dict[str, Any]) -> str:
    """A few sentences: how entropy moved, what moved it most, the share of the knob and of precision.

    Args:
        explanation: what :func:`explain` returned.
    """
    entropy, predicted = explanation["entropy"], explanation["predicted"]
    if entropy["change"] is None:
        return "Entropy was not read over these steps."
    moved = "fell" if entropy["change"] < 0 else "rose"
    text = (
        f"Entropy {moved} by {abs(entropy['change']):.3f} nats, from {entropy['first']:.3f} to {entropy['last']:.3f}."
    )
    if not explanation["explained"] and explanation["refused"]:
        return f"{text} {explanation['refused']} readings were refused and are not explained; run `isentropic audit`."
    if not explanation["explained"]:
        return f"{text} None of these steps was explained; train with --explain-every 1 to see why."
    total = predicted.get("absolute") or 1.0
    changes = {label: predicted.get(name, 0.0) for name, label in QUADRANTS.items()}
    lowers, raises = min(changes, key=lambda k: changes[k]), max(changes, key=lambda k: changes[k])
    if changes[lowers] < 0:
        share = -changes[lowers] / total
        text += f" What lowers it most is {lowers} ({share:.0%} of all that was predicted to move it)."
    if changes[raises] > 0:
        text += f" What raises it most is {raises} ({changes[raises] / total:.0%})."
    if predicted.get("knob"):
        direction = "raises" if predicted["knob"] > 0 else "lowers"
        text += f" The knob {direction} it by {abs(predicted['knob']) / total:.0%}."
    error = explanation["numerics"]["logp_rms"]
    if error is not None:
        matters = abs(predicted.get("numerics", 0.0)) > 0.01 * total or error > 1e-2
        blame = "is part of it: run `isentropic audit`" if matters else "is not the cause"
        text += f" Precision {blame} (log π is off by {error:.0e} nats rms)."
    return text


def _bar(label: str, value: float, scale: float, width: int = 20) -> str:
    size = min(width, round(width * abs(value) / scale))
    return f"  {label:44} {value:+11.2e} {value / scale:+7.1%}  {'█' * size or '▏'}"


def _calibration_lines(explanation: dict[str, Any]) -> list[str]:
    predicted, entropy = explanation["predicted"], explanation["entropy"]
    lines = [
        f"measured {entropy['change']:+.3f} nats per token, predicted {predicted['change']:+.2e} to first order in the "
        f"logits ({explanation['explained']} steps explained)"
    ]
    if explanation["calibration"] is not None:
        calibration = Calibration(**explanation["calibration"])
        lines += [
            f"over the whole run, by blocks of {BLOCK} steps: measured = {calibration.factor} × predicted "
            f"{calibration.drift:+.1e} per step,",
            f"with a correlation of {calibration.correlation:.2f} over {calibration.blocks} pairs of blocks",
        ]
    return [*lines, ""]


def _position_lines(predicted: dict[str, float]) -> list[str]:
    values = [predicted[name] for name in POSITIONS if name in predicted]
    if len(values) < len(POSITIONS):
        return []
    return ["Where in the answer? (by eighth)", "  " + "  ".join(f"{value:+.1e}" for value in values), ""]


def _completion_lines(explanation: dict[str, Any], scale: float) -> list[str]:
    """By end and by length of the completion: a split of which two groups have a hundredth of the tokens or more."""
    predicted, shares, lines = explanation["predicted"], explanation["shares"], []
    for title, labels in {"Which completions?": COMPLETIONS, "Of which length?": LENGTHS}.items():
        groups = {name: label for name, label in labels.items() if shares.get(name, 0) >= 0.01 and name in predicted}
        if len(groups) > 1:
            bars = [_bar(f"{label} ({shares[k]:.0%} of tokens)", predicted[k], scale) for k, label in groups.items()]
            lines += [title, *bars, ""]
    return lines


def _token_lines(tokens: list[dict[str, Any]]) -> list[str]:
    if not tokens:
        return []
    lines = ["Which tokens?  (summed by token; change, times seen)"]
    return [*lines, *(f"  {t['text']!r:20} {t['change']:+11.2e}  {t['count']:>8}" for t in tokens), ""]


def _other_lines(explanation: dict[str, Any]) -> list[str]:
    predicted, lines = explanation["predicted"], []
    if explanation["knob"] is not None:
        effect = f"adds {predicted['knob']:+.2e}" if "knob" in predicted else "acts through the clip"
        share = explanation["saturated"]
        bound = f", at its bound in {share:.0%} of the steps after {SETTLED}" if share else ""
        lines.append(f"knob       mean {explanation['knob']:.3g}, {effect}{bound}")
    clip = explanation["clip"]
    if clip["high_frac"] is not None:
        outside, violated = explanation["theorem2"]["outside_frac"], explanation["theorem2"]["violated_frac"]
        more = "" if outside is None else f"; ratios outside the clip {outside:.2%}"
        more += "" if violated is None else f"; rows whose entropy left Theorem 2's bound {violated:.2%}"
        lines.append(f"clip       upper {clip['high_frac']:.2%}, lower {clip['low_frac']:.2%}{more}")
    numerics = explanation["numerics"]
    if numerics["logp_rms"] is not None:
        lines.append(
            f"numerics   adds {predicted.get('numerics', 0.0):+.1e}; log π off by {numerics['logp_rms']:.1e} "
            f"nats rms, entropy by {numerics['entropy_bias']:+.1e} on average"
        )
    return [*lines, ""] if lines else []


def _step_lines(table: list[dict[str, Any]]) -> list[str]:
    names = ["measured", "change", *(q for q in QUADRANTS if any(line.get(q) for line in table)), "by_knob"]
    names = [name for name in names if any(line.get(name) is not None for line in table)]
    lines = [f"{'steps':>11}  {'entropy':>7}" + "".join(f"{COLUMNS.get(name, name):>11}" for name in names)]
    for line in table:
        steps = f"{line['first']}:{line['last']}" if line["first"] != line["last"] else str(line["first"])
        entropy = "" if line["entropy"] is None else f"{line['entropy']:.3f}"
        cells = "".join(f"{'' if line.get(name) is None else format(line[name], '+.2e'):>11}" for name in names)
        lines.append(f"{steps:>11}  {entropy:>7}{cells}")
    return lines
