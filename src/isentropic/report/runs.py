"""What the report reads: run directories, and the columns of their rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from ..runs.record import Record

# Names in page.css: Okabe and Ito's colours, which colour-blind eyes tell apart, lightened where the page is dark.
COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
SEVERITIES = ("serious", "warning", "note")
# Settings in which two runs of one recipe may differ.
_OWN = ("seed", "out")


class Audit(NamedTuple):
    """Findings, worst first; what was looked at, by name; measured figures, by name, in nats."""

    findings: list[dict[str, Any]]
    checked: dict[str, Any]
    figures: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run directory in memory; ``group`` counts recipes, so that seeds of one recipe share it."""

    path: Path
    label: str
    group: int
    member: int
    header: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    audit: Audit | None
    ended: bool
    _columns: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict, repr=False)

    @property
    def colour(self) -> str:
        """The colour of its recipe, as figures name it."""
        return f"@{COLOURS[self.group % len(COLOURS)]}"

    @property
    def dash(self) -> str:
        """The dash of its recipe: what tells it apart where colour does not."""
        return DASHES[(self.group + self.group // len(COLOURS)) % len(DASHES)]

    @property
    def symbol(self) -> str:
        """The marker of its recipe."""
        return SYMBOLS[(self.group + self.group // len(COLOURS)) % len(SYMBOLS)]

    @property
    def steps(self) -> int:
        """Optimizer steps the run is to take; 0 where its config does not say."""
        steps = (self.header.get("config") or {}).get("steps")
        return steps if isinstance(steps, int) else 0

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it is known.

        Example:
            >>> run = Run(Path("r"), "r", 0, 0, {}, [{"step": 1, "a": 2}, {"step": 2, "a": None}], [], [], None, True)
            >>> run.column("a")
            ([1], [2])
        """
        if name not in self._columns:
            pairs = [(row["step"], row[name]) for row in self.metrics if is_number(row.get(name))]
            self._columns[name] = [x for x, _ in pairs], [y for _, y in pairs]
        return self._columns[name]

    def rows_with(self, *names: str) -> list[dict[str, Any]]:
        """Rows of metrics that hold a number under every name."""
        return [row for row in self.metrics if all(is_number(row.get(name)) for name in names)]

    def switches(self) -> list[tuple[float, str]]:
        """Step and name of every task that follows another."""
        tasks = [(row["step"], str(row["task"])) for row in self.metrics if row.get("task") is not None]
        return [b for a, b in pairwise(tasks) if a[1] != b[1]]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read(paths: Iterable[str | Path]) -> list[Run]:
    """The runs in these directories; a directory of run directories stands for all of them.

    Raises:
        ValueError: no path; one that is neither a run directory nor holds any; a run.json that cannot be read.
    """
    found = list(dict.fromkeys(path.resolve() for given in paths for path in _expand(Path(given))))
    if not found:
        raise ValueError("a report needs at least one run directory, got none; name what `train --out` was given")
    headers = [_header(path) for path in found]
    groups = _group(headers)
    labels = _label(found, headers, groups)
    return [
        _run(path, label, group, groups[:i].count(group), header)
        for i, (path, label, group, header) in enumerate(zip(found, labels, groups, headers, strict=True))
    ]


def _expand(path: Path) -> list[Path]:
    if not (path / "run.json").exists() and path.is_dir():
        inside = sorted(found.parent for found in path.glob("*/run.json"))
        if inside:
            return inside
    return [path]


def _header(path: Path) -> dict[str, Any]:
    try:
        header = Record(path).header()
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path / 'run.json'} is not the JSON of a run: {error}; name another run directory") from None
    for name in ("config", "recipe", "versions"):
        if not isinstance(header.get(name), dict):
            header[name] = {}
    return header


def _run(path: Path, label: str, group: int, member: int, header: dict[str, Any]) -> Run:
    record = Record(path)
    rows = (
        [row for row in record.rows(name) if is_number(row.get("step"))]
        for name in ("metrics", "samples", "evaluations")
    )
    ended = (path / "summary.json").exists()
    return Run(path, label, group, member, header, *rows, audit=read_audit(path), ended=ended)


def read_audit(path: Path) -> Audit | None:
    """What a run directory's audit.json holds; None where no audit ran."""
    try:
        found = json.loads((path / "audit.json").read_text(encoding="utf-8"))
        rank = {name: i for i, name in enumerate(SEVERITIES)}
        findings = [finding for finding in found["findings"] if isinstance(finding, dict)]
        findings.sort(key=lambda finding: rank.get(str(finding.get("severity")), 1))
        more = [value if isinstance(value := found.get(name), dict) else {} for name in ("checked", "figures")]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        what = {"severity": "warning", "what": "audit.json cannot be read", "remedy": "run the audit again"}
        return Audit([what], {}, {})
    return Audit(findings, *more)


def _group(headers: Sequence[dict[str, Any]]) -> list[int]:
    """Runs with the same settings but for the seed are one group."""
    keys: dict[str, int] = {}
    found = []
    for header in headers:
        config = {k: v for k, v in header["config"].items() if k not in _OWN}
        key = json.dumps([config, header["recipe"]], sort_keys=True, default=str)
        found.append(keys.setdefault(key, len(keys)))
    return found


def _label(paths: Sequence[Path], headers: Sequence[dict[str, Any]], groups: Sequence[int]) -> list[str]:
    """A recipe's name, what sets its group apart, and the seed where a group has several; else the directory's name."""
    first = {group: headers[groups.index(group)] for group in groups}
    differ = [key for key in first[groups[0]]["config"] if key not in (*_OWN, "recipe", "recipe_options")]
    differ = [key for key in differ if len({str(header["config"].get(key)) for header in first.values()}) > 1]
    labels = []
    for path, header, group in zip(paths, headers, groups, strict=True):
        config = header["config"]
        words = [str(config.get("recipe") or path.name)]
        alike = [h for h in first.values() if h["config"].get("recipe") == config.get("recipe")]
        if len(alike) > 1:
            words += [
                f"{key} {config.get(key)}" for key in differ if len({str(h["config"].get(key)) for h in alike}) > 1
            ]
        if groups.count(group) > 1:
            words.append(f"seed {header.get('seed')}")
        labels.append(", ".join(words))
    unclear = len(set(labels)) < len(labels)
    return [path.name for path in paths] if unclear else labels
