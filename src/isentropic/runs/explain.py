"""Why did entropy move? The answer that a run directory gives, in figures and in one sentence.

Everything comes from metrics.jsonl: the entropies, and what was predicted of the steps that were explained. Between two
explained steps a prediction stands for the steps that follow it. This room needs no torch.
"""

from __future__ import annotations

import math
from itertools import pairwise
from textwrap import fill
from typing import Any, NamedTuple

from .record import Record

BLOCK = 20  # steps over which readings are averaged before measured and predicted changes are compared
SHOWN = 12  # rows of the table of steps
QUADRANTS = {
    "likely_up": "likely tokens pushed up",
    "rare_up": "rare tokens pushed up",
    "likely_down": "likely tokens pushed down",
    "rare_down": "rare tokens pushed down",
    "bonus": "the entropy term itself",
}
SAMPLES = {
    "positive": "answers better than the baseline",
    "negative": "answers worse than it",
    "neutral": "answers at the baseline",
}
CLIPPED = {
    "unclipped": "tokens inside the clip",
    "clipped_high": "tokens above the upper bound",
    "clipped_low": "tokens below the lower bound",
    "removed_high": "what the upper bound took away, estimated",
    "removed_low": "what the lower bound took away, estimated",
}


class Calibration(NamedTuple):
    """Measured on predicted change, over blocks of steps of a whole run.

    Attributes:
        slope: measured nats per predicted one, by least squares with an intercept.
        drift: the intercept: nats per step that no prediction explains.
        correlation: of the two, over blocks.
        blocks: how many pairs of neighbouring blocks there are.
    """

    slope: float
    drift: float
    correlation: float
    blocks: int


def parse_steps(text: str | None, last: int) -> tuple[int, int]:
    """``"a:b"``, ``"a:"``, ``":b"`` or one step, both ends included; all steps where there is no text.

    Raises:
        ValueError: anything else, or a range that holds no step of the run.

    Example:
        >>> parse_steps("100:", 800), parse_steps(None, 800), parse_steps("7", 800)
        ((100, 800), (1, 800), (7, 7))
    """
    if text is None:
        return 1, last
    first, colon, end = text.partition(":")
    parts = [first or "1", (end or str(last)) if colon else first]
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"steps must be A:B, A:, :B or one step, got {text!r}; as in 100:140")
    low, high = (int(part) for part in parts)
    if not 1 <= low <= high or low > last:
        raise ValueError(f"steps {text} hold no step of this run, which has 1:{last}; the first comes first")
    return low, min(high, last)


def calibrate(rows: list[dict[str, Any]], block: int = BLOCK) -> Calibration | None:
    """Compare measured with predicted change over neighbouring blocks of steps.

    Entropies are noisy from step to step, and so are their differences: both the entropies and the running sum of the
    predictions are averaged over blocks, and the differences of neighbouring averages are compared.

    Args:
        rows: of metrics.jsonl.
        block: steps of a block.

    Returns:
        None with fewer than three pairs, or where nothing is predicted.

    Example:
        >>> rows = [{"step": t + 1, "entropy/mean": 1 - 0.02 * t * t / 100, "predict/change": -0.0002 * t / 100}
        ...         for t in range(100)]
        >>> found = calibrate(rows)
        >>> round(found.slope), round(found.correlation, 3)
        (200, 1.0)
    """
    entropies, sums, total, change = [], [], 0.0, None
    for row in rows:
        change = row.get("predict/change", change) if row.get("predict/change") is not None else change
        if row.get("entropy/mean") is not None and change is not None:
            entropies.append(row["entropy/mean"])
            sums.append(total)
        total += change or 0.0
    count = len(entropies) // block
    if count < 4:
        return None

    def steps(values: list[float]) -> list[float]:
        means = [math.fsum(values[i * block : (i + 1) * block]) / block for i in range(count)]
        return [b - a for a, b in pairwise(means)]

    measured, predicted = steps(entropies), steps(sums)
    n = len(measured)
    mean_m, mean_p = math.fsum(measured) / n, math.fsum(predicted) / n
    cov = math.fsum((m - mean_m) * (p - mean_p) for m, p in zip(measured, predicted, strict=True))
    var_m = math.fsum((m - mean_m) ** 2 for m in measured)
    var_p = math.fsum((p - mean_p) ** 2 for p in predicted)
    if not var_m * var_p > 0:
        return None
    slope = cov / var_p
    return Calibration(slope, (mean_m - slope * mean_p) / block, cov / math.sqrt(var_m * var_p), n)


def explain(record: Record, steps: str | None = None) -> dict[str, Any]:
    """What moved entropy over some steps of a run, as plain numbers.

    Args:
        record: the run directory.
        steps: as :func:`parse_steps` reads it.

    Returns:
        ``steps``, ``entropy`` (first, last and change by the mean of a few readings at either end), ``predicted`` (Σ of
        every ``predict/`` field over the explained steps, each weighted by the steps it stands for), ``explained``,
        ``calibration``, ``knob``, ``tokens``, ``rows`` for the table, ``numerics``, ``theorem2``.

    Raises:
        ValueError: not a run directory, no steps yet, or steps that the run does not have.
    """
    record.header()
    rows = record.rows("metrics")
    if not rows:
        raise ValueError(f"{record.path} has no steps in metrics.jsonl yet; wait for the first, or name another run")
    low, high = parse_steps(steps, rows[-1]["step"])
    inside = [row for row in rows if low <= row["step"] <= high]
    # What a refused reading was read from predicts nothing either.
    found = [row for row in inside if row.get("predict/change") is not None and not row.get("entropy/refused")]
    spans = _spans(found, high)
    names = sorted({name for row in found for name, value in row.items() if _summed(name, value)})
    # A field may be null in some rows: what is not known adds nothing.
    predicted = {
        name.removeprefix("predict/"): math.fsum(
            row[name] * span for row, span in zip(found, spans, strict=True) if row.get(name) is not None
        )
        for name in names
    }
    # Rounding is compared in some of the explained steps only: its mean stands for the others.
    rounding = _mean(found, "predict/numerics")
    if rounding is not None:
        predicted["numerics"] = rounding * sum(spans)
    return {
        "run": str(record.path),
        "steps": [low, high],
        "explained": len(found),
        "refused": sum(bool(row.get("entropy/refused")) for row in inside),
        "entropy": _entropy(rows, low, high),
        "predicted": predicted,
        "calibration": (c := calibrate(rows)) and c._asdict(),
        "knob": _mean(inside, "knob/value"),
        "saturated": _mean(inside, "knob/saturated"),
        "tokens": _tokens(found, spans),
        "numerics": {name: _mean(found, f"numerics/{name}") for name in ("logp_rms", "entropy_bias")},
        "clip": {name: _mean(inside, f"clip/{name}") for name in ("low_frac", "high_frac")},
        "theorem2": {
            "outside_frac": _mean(inside, "ratio/outside_frac"),
            "violated_frac": _mean(inside, "theorem2/violated_frac"),
        },
        "rows": _blocks(inside, {row["step"]: span for row, span in zip(found, spans, strict=True)}),
    }


def _summed(name: str, value: Any) -> bool:
    skipped = ("predict/gain", "predict/moments", "predict/top_tokens")
    return name.startswith("predict/") and name not in skipped and isinstance(value, int | float)


def _spans(found: list[dict[str, Any]], high: int) -> list[int]:
    """How many steps each explained one stands for: itself and those up to the next."""
    if not found:
        return []
    ends = [*(row["step"] for row in found[1:]), high + 1]
    return [end - row["step"] for row, end in zip(found, ends, strict=True)]


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return math.fsum(values) / len(values) if values else None


def _entropy(rows: list[dict[str, Any]], low: int, high: int) -> dict[str, float | None]:
    """Before the first and after the last step, each a mean of up to ten readings inside the range."""
    # The reading of a step is taken before its update: the one after the last step shows what the last step did.
    end = min(high + 1, rows[-1]["step"])
    reach = max(1, min(10, (end - low + 1) // 2))
    first = _mean([row for row in rows if low <= row["step"] < low + reach], "entropy/mean")
    last = _mean([row for row in rows if end - reach < row["step"] <= end], "entropy/mean")
    change = None if first is None or last is None else last - first
    return {"first": first, "last": last, "change": change}


def _tokens(found: list[dict[str, Any]], spans: list[int]) -> list[dict[str, Any]]:
    totals: dict[str, list[float]] = {}
    for row, span in zip(found, spans, strict=True):
        for text, change, count in row.get("predict/top_tokens") or []:
            entry = totals.setdefault(text, [0.0, 0])
            entry[0] += change * span
            entry[1] += count * span
    ranked = sorted(totals.items(), key=lambda item: -abs(item[1][0]))
    return [{"text": text, "change": change, "count": int(count)} for text, (change, count) in ranked[:SHOWN]]


def _blocks(inside: list[dict[str, Any]], spans: dict[int, int]) -> list[dict[str, Any]]:
    size = max(1, -(-len(inside) // SHOWN))
    table = []
    for i in range(0, len(inside), size):
        part = inside[i : i + size]
        entry: dict[str, Any] = {"first": part[0]["step"], "last": part[-1]["step"]}
        entry["entropy"] = _mean(part, "entropy/mean")
        entry["knob"] = _mean(part, "knob/value")
        known = [row for row in part if row["step"] in spans]
        for name in ("change", *QUADRANTS, "knob"):
            values = [row[f"predict/{name}"] for row in known if row.get(f"predict/{name}") is not None]
            weights = [spans[row["step"]] for row in known if row.get(f"predict/{name}") is not None]
            key = "by_knob" if name == "knob" else name
            entry[key] = math.fsum(v * w for v, w in zip(values, weights, strict=True)) if values else None
        table.append(entry)
    for entry, after in pairwise(table):
        pair = (entry["entropy"], after["entropy"])
        entry["measured"] = None if None in pair else pair[1] - pair[0]
    return table


def render(found: dict[str, Any]) -> str:
    """The explanation as text, at most 100 columns wide.

    Args:
        found: what :func:`explain` returned.

    Returns:
        Lines for a terminal; a part without figures is absent.
    """
    low, high = found["steps"]
    lines = [f"{found['run']}, steps {low} to {high}", "", fill(verdict(found), 100), ""]
    if not found["explained"]:
        return "\n".join(lines).rstrip()
    lines += _calibration_lines(found)
    predicted = found["predicted"]
    scale = predicted.get("absolute") or 1.0
    parts = {
        "What moved entropy? (predicted nats a token, and share of all contributions)": QUADRANTS,
        "In which answers?": SAMPLES,
        "What did the clip do?": CLIPPED,
    }
    for title, names in parts.items():
        shown = [(label, predicted[name]) for name, label in names.items() if predicted.get(name)]
        lines += [title, *(_bar(label, value, scale) for label, value in shown), ""] if shown else []
    lines += _position_lines(predicted, scale)
    lines += _token_lines(found["tokens"])
    lines += _other_lines(found)
    return "\n".join([*lines, *_step_lines(found["rows"])]).rstrip()


def verdict(found: dict[str, Any]) -> str:
    """A few sentences: what entropy did, what did most of it, the part of the knob and of precision."""
    entropy, predicted = found["entropy"], found["predicted"]
    if entropy["change"] is None:
        return "Entropy was not read over these steps."
    moved = "fell" if entropy["change"] < 0 else "rose"
    text = (
        f"Entropy {moved} by {abs(entropy['change']):.3f} nats, from {entropy['first']:.3f} to {entropy['last']:.3f}."
    )
    if not found["explained"] and found["refused"]:
        return f"{text} {found['refused']} readings were refused, and explain nothing; run `isentropic audit`."
    if not found["explained"]:
        return f"{text} None of these steps was explained; train with --explain-every 1 to see why."
    total = predicted.get("absolute") or 1.0
    parts = {label: predicted.get(name, 0.0) for name, label in QUADRANTS.items()}
    lowers, raises = min(parts, key=lambda k: parts[k]), max(parts, key=lambda k: parts[k])
    if parts[lowers] < 0:
        text += f" What lowers it most is {lowers} ({-parts[lowers] / total:.0%} of all that was predicted to move it)."
    if parts[raises] > 0:
        text += f" What raises it most is {raises} ({parts[raises] / total:.0%})."
    if predicted.get("knob"):
        text += (
            f" The knob {'raises' if predicted['knob'] > 0 else 'lowers'} it by {abs(predicted['knob']) / total:.0%}."
        )
    error = found["numerics"]["logp_rms"]
    if error is not None:
        part = abs(predicted.get("numerics", 0.0)) > 0.01 * total or error > 1e-2
        blame = "is part of it: run `isentropic audit`" if part else "is not the cause"
        text += f" Precision {blame} (log π is off by {error:.0e} nats rms)."
    return text


def _bar(label: str, value: float, scale: float, width: int = 20) -> str:
    size = min(width, round(width * abs(value) / scale))
    return f"  {label:44} {value:+11.2e} {value / scale:+7.1%}  {'█' * size or '▏'}"


def _calibration_lines(found: dict[str, Any]) -> list[str]:
    predicted, entropy = found["predicted"], found["entropy"]
    lines = [
        f"measured {entropy['change']:+.3f} nats a token, predicted {predicted['change']:+.2e} to first order in the "
        f"logits ({found['explained']} steps explained)"
    ]
    if (c := found["calibration"]) is not None:
        lines += [
            f"over the whole run, by blocks of {BLOCK} steps: measured = {c['slope']:.3g} × predicted "
            f"{c['drift']:+.1e} a step,",
            f"with a correlation of {c['correlation']:.2f} over {c['blocks']} pairs of blocks",
        ]
    return [*lines, ""]


def _position_lines(predicted: dict[str, float], scale: float) -> list[str]:
    values = [predicted.get(f"position_{i}") for i in range(1, 9)]
    if any(value is None for value in values):
        return []
    shown = "  ".join(f"{value:+.1e}" for value in values)
    return ["Where in the answer? (by eighth)", f"  {shown}", ""]


def _token_lines(tokens: list[dict[str, Any]]) -> list[str]:
    if not tokens:
        return []
    lines = ["Which tokens?  (summed by token; change, times seen)"]
    return [*lines, *(f"  {t['text']!r:20} {t['change']:+11.2e}  {t['count']:>8}" for t in tokens), ""]


def _other_lines(found: dict[str, Any]) -> list[str]:
    predicted, lines = found["predicted"], []
    if found["knob"] is not None:
        part = f"adds {predicted['knob']:+.2e}" if "knob" in predicted else "acts through the clip"
        bound = f", at its bound in {found['saturated']:.0%} of the steps" if found["saturated"] else ""
        lines.append(f"knob       mean {found['knob']:.3g}, {part}{bound}")
    if found["clip"]["high_frac"] is not None:
        outside, left = found["theorem2"]["outside_frac"], found["theorem2"]["violated_frac"]
        more = "" if outside is None else f"; ratios outside the clip {outside:.2%}"
        more += "" if left is None else f"; rows whose entropy left Theorem 2's bound {left:.2%}"
        lines.append(f"clip       upper {found['clip']['high_frac']:.2%}, lower {found['clip']['low_frac']:.2%}{more}")
    if found["numerics"]["logp_rms"] is not None:
        lines.append(
            f"numerics   adds {predicted.get('numerics', 0.0):+.1e}; log π off by {found['numerics']['logp_rms']:.1e} "
            f"nats rms, entropy by {found['numerics']['entropy_bias']:+.1e} on average"
        )
    return [*lines, ""] if lines else []


def _step_lines(rows: list[dict[str, Any]]) -> list[str]:
    names = ["measured", "change", *(q for q in QUADRANTS if any(row.get(q) for row in rows)), "by_knob"]
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    heads = {"change": "predicted", "likely_up": "likely ↑", "rare_up": "rare ↑", "likely_down": "likely ↓"}
    heads |= {"rare_down": "rare ↓", "by_knob": "knob"}
    lines = [f"{'steps':>11}  {'entropy':>7}" + "".join(f"{heads.get(name, name):>11}" for name in names)]
    for row in rows:
        span = f"{row['first']}:{row['last']}" if row["first"] != row["last"] else str(row["first"])
        entropy = "" if row["entropy"] is None else f"{row['entropy']:.3f}"
        cells = "".join(f"{'' if row.get(name) is None else format(row[name], '+.2e'):>11}" for name in names)
        lines.append(f"{span:>11}  {entropy:>7}{cells}")
    return lines
