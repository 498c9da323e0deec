"""What an audit reports: findings with their severity, the settings that were checked, and measured figures."""

import math
from collections.abc import Sequence
from json import dumps
from typing import Any, NamedTuple

# What makes an error serious: it moves one ratio in a thousand out of the clip, or every ratio by 5 % (rms), as much as
# an update does; or it moves mean entropy, which a target is held against, by 1 %. fp32 stays far below 1e-5 nats.
SERIOUS_SHARE, SERIOUS_NATS, SERIOUS_ENTROPY, VISIBLE = 1e-3, 0.05, 0.01, 1e-5
SEVERITIES = ("serious", "warning", "note")


class Finding(NamedTuple):
    """One error that an audit found.

    Attributes:
        severity: ``serious``, ``warning`` or ``note``.
        code: a stable name, such as ``logits_dtype``.
        what, where: the error in one sentence, and its place.
        effect: the measured effect, in words.
        remedy: how to correct it.
        nats: the measured error or mismatch, nats (root mean square over tokens unless ``effect`` says otherwise).
        clipped_frac: share of tokens that this error alone pushes outside the clip.
    """

    severity: str
    code: str
    what: str
    where: str
    effect: str
    remedy: str
    nats: float | None = None
    clipped_frac: float | None = None


class Clip(NamedTuple):
    """The clip that errors are compared with: ``[1 − low, 1 + high]``, of tokens, or of sequences of ``length`` tokens.

    The ratio of a sequence is the geometric mean of the ratios of its tokens, whose errors are assumed independent.
    """

    low: float = 0.2
    high: float = 0.2
    length: int = 1


CLIP = Clip()


def _without_nonfinite(value: Any) -> Any:
    """Replace numbers that are not finite by None, which JSON can express."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Report(NamedTuple):
    """The result of an audit: the findings, most severe first, the settings that were checked, and measured figures."""

    findings: list[Finding]
    checked: dict[str, str]
    figures: dict[str, float]

    @property
    def serious(self) -> list[Finding]:
        """The findings that make a run not worth starting."""
        return [f for f in self.findings if f.severity == "serious"]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        findings = [f._asdict() for f in self.findings]
        return {"serious": len(self.serious), "findings": findings, "checked": self.checked, "figures": self.figures}

    def json(self) -> str:
        """The report as JSON; a figure that is not finite is null."""
        return dumps(_without_nonfinite(self.as_dict()), indent=2, ensure_ascii=False)

    def text(self) -> str:
        """The report as text for people to read.

        >>> print(Report([], {"logits": "float32"}, {"logp_error": 2e-7}).text())
        checked
          logits      float32
          logp_error  2e-07
        no findings
        """
        width = max(len(name) for name in (*self.checked, *self.figures))
        lines = ["checked", *(f"  {name:{width}}  {value}" for name, value in self.checked.items())]
        lines += [f"  {name:{width}}  {value:.2g}" for name, value in self.figures.items()]
        for f in self.findings:
            lines += [f"{f.severity}: {f.what} [{f.code}]", f"  where   {f.where}"]
            lines += [f"  effect  {f.effect}", f"  remedy  {f.remedy}"]
        return "\n".join(lines if self.findings else [*lines, "no findings"])


def grade(nats: float, clipped_frac: float = 0.0) -> str:
    """The severity of an error of log-ratios, by its measured effect.

    Serious if it alone pushes one ratio in a thousand out of the clip, or is 0.05 nats or more; a note below 1e-5 nats.

    Args:
        nats: root mean square of the error.
        clipped_frac: share of ratios that the error alone pushes out of the clip.

    >>> grade(0.1), grade(0.02), grade(0.02, clipped_frac=0.01), grade(0.0)
    ('serious', 'warning', 'serious', 'note')
    """
    if nats >= SERIOUS_NATS or clipped_frac >= SERIOUS_SHARE or math.isnan(nats):
        return "serious"
    return "warning" if nats >= VISIBLE else "note"


def grade_entropy(shift: float, mean: float) -> str:
    """The severity of an error of entropies: serious if it moves their mean by 1 % or more.

    Args:
        shift: measured mean minus true mean, nats per token.
        mean: the true mean.

    >>> grade_entropy(-0.02, 1.0), grade_entropy(0.001, 1.0)
    ('serious', 'warning')
    """
    return "warning" if abs(shift) < SERIOUS_ENTROPY * abs(mean) else "serious"


def merged(reports: Sequence[Report]) -> Report:
    """The report of several batches: every finding once, as the batch shows it in which it is worst.

    Args:
        reports: of one set-up, a report for each batch.

    Returns:
        The findings, most severe first; the settings, with the tokens of all batches; the means of the figures over
        batches, each weighted by its tokens (root mean square for errors).

    >>> worst = [Finding(s, "dropout", "", "", "", "", x) for s, x in (("warning", 1e-4), ("serious", 0.1))]
    >>> reports = [Report([f], {"tokens": "10"}, {"logp_error": f.nats}) for f in worst]
    >>> both = merged(reports)
    >>> [f.severity for f in both.findings], both.checked, round(both.figures["logp_error"], 4)
    (['serious'], {'tokens': '20 in 2 batches'}, 0.0707)
    """
    by_code: dict[str, list[Finding]] = {}
    for report in reports:
        for finding in report.findings:
            by_code.setdefault(finding.code, []).append(finding)
    worst = [min(found, key=lambda f: (SEVERITIES.index(f.severity), -(f.nats or 0.0))) for found in by_code.values()]
    counts = [int(report.checked["tokens"]) for report in reports]
    checked = dict(reports[0].checked)
    if len(reports) > 1:
        checked["tokens"] = f"{sum(counts)} in {len(reports)} batches"
    figures = {}
    for name in reports[0].figures:
        power = 2 if name.endswith("_error") else 1
        known = [(n, report.figures[name]) for n, report in zip(counts, reports, strict=True) if name in report.figures]
        mean = sum(n * value**power for n, value in known) / max(sum(n for n, _ in known), 1)
        figures[name] = mean ** (1 / power)
    return Report(sorted(worst, key=lambda f: SEVERITIES.index(f.severity)), checked, figures)
