"""What the report reads: run directories, and the columns of their rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..runs.record import Record, is_number
from ..runs.summary import summary

# Names in page.css: Okabe and Ito's colours, which colour-blind eyes can distinguish, lighter on a dark page.
COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
SEVERITIES = ("serious", "warning", "note")
# Settings in which two runs of one recipe may differ.
_PER_RUN = ("seed", "out")


class Audit(NamedTuple):
    """Findings, worst first; what was checked, by name; measured figures, by name, in nats."""

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
    def shade(self) -> str:
        """Its colour made translucent, for a band."""
        return self.colour.replace("@c", "@b")

    @property
    def dash(self) -> str:
        """The dash of its recipe, which distinguishes it without colour."""
        return DASHES[(self.group + self.group // len(COLOURS)) % len(DASHES)]

    @property
    def symbol(self) -> str:
        """The marker of its recipe."""
        return SYMBOLS[(self.group + self.group // len(COLOURS)) % len(SYMBOLS)]

    @property
    def task(self) -> str:
        """What it is trained on, in order.

        Example:
            >>> header = {"task": "expr", "config": {"then": ["expr:need=no-plus"]}}
            >>> Run(Path("r"), "r", 0, 0, header, [], [], [], None, True).task
            'expr, then expr:need=no-plus'
        """
        config = self.header.get("config")
        then = config.get("then") if isinstance(config, dict) else None
        names = [self.header.get("task") or "a task", *(then if isinstance(then, list) else [])]
        return ", then ".join(map(str, names))

    @property
    def steps(self) -> int:
        """Optimizer steps the run is to take; 0 if its config does not say."""
        return planned_steps(self.header)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The closing figures of the run so far, as :func:`isentropic.runs.summary.summary` defines them."""
        return summary(self.metrics, self.evaluations)

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, at the steps that have it.

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


def planned_steps(header: dict[str, Any]) -> int:
    """Optimizer steps that a run.json announces, on all its tasks; 0 if it does not say.

    Example:
        >>> planned_steps({"config": {"steps": 480, "then": ["b", "c"], "then_steps": 400}})
        1280
    """
    config = header.get("config")
    settings: dict[str, Any] = config if isinstance(config, dict) else {}
    first, later, then = (settings.get(key) for key in ("steps", "then_steps", "then"))
    if not isinstance(first, int) or isinstance(first, bool):
        return 0
    later = later if isinstance(later, int) and not isinstance(later, bool) else first
    return first + later * (len(then) if isinstance(then, list) else 0)


def read(paths: Iterable[str | Path]) -> list[Run]:
    """The runs in these directories.

    Args:
        paths: run directories, or directories that hold run directories; a run that is named twice is read once.

    Returns:
        Runs in the order of the paths.

    Raises:
        ValueError: no path; one that is neither a run directory nor holds any; a run.json that cannot be read.
    """
    folders = list(dict.fromkeys(folder.resolve() for path in paths for folder in _expand(Path(path))))
    if not folders:
        raise ValueError("a report needs at least one run directory, got none; name the directory of `train --out`")
    headers = [_header(folder) for folder in folders]
    groups = _group(headers)
    labels = _label(folders, headers, groups)
    return [
        _run(folder, label, group, groups[:i].count(group), header)
        for i, (folder, label, group, header) in enumerate(zip(folders, labels, groups, headers, strict=True))
    ]


def _expand(path: Path) -> list[Path]:
    if not (path / "run.json").exists() and path.is_dir():
        inside = sorted(file.parent for file in path.glob("*/run.json"))
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
    """What a run directory's audit.json holds; None if no audit ran."""
    try:
        audit = json.loads((path / "audit.json").read_text(encoding="utf-8"))
        rank = {name: i for i, name in enumerate(SEVERITIES)}
        findings = [finding for finding in audit["findings"] if isinstance(finding, dict)]
        findings.sort(key=lambda finding: rank.get(str(finding.get("severity")), 1))
        more = [value if isinstance(value := audit.get(name), dict) else {} for name in ("checked", "figures")]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        unreadable = {"severity": "warning", "what": "audit.json cannot be read", "remedy": "run the audit again"}
        return Audit([unreadable], {}, {})
    return Audit(findings, *more)


def _group(headers: Sequence[dict[str, Any]]) -> list[int]:
    """The number of each run's group: runs with the same settings, except for the seed."""
    numbers: dict[str, int] = {}
    groups = []
    for header in headers:
        config = {k: v for k, v in header["config"].items() if k not in _PER_RUN}
        key = json.dumps([config, header["recipe"]], sort_keys=True, default=str)
        groups.append(numbers.setdefault(key, len(numbers)))
    return groups


def _label(paths: Sequence[Path], headers: Sequence[dict[str, Any]], groups: Sequence[int]) -> list[str]:
    """Recipe, the settings in which its group differs, and the seed if a group has several; else the directory."""
    first = {group: headers[groups.index(group)] for group in groups}
    differ = [key for key in first[groups[0]]["config"] if key not in (*_PER_RUN, "recipe", "recipe_options")]
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
