"""The report: one page that shows a run, or several side by side, without a network.

``write`` reads run directories (their schema is in :mod:`isentropic.runs.record`) and writes one HTML file that holds
all it needs. A panel without data is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import about, answers, compared, control, why
from .compared import Compared
from .figures import Panel
from .html import Html
from .page import document
from .runs import Run, read

# In the order of the page: the most common questions first.
PANELS: tuple[Callable[[Sequence[Run]], Panel | None], ...] = (
    control.hold,
    control.phase,
    control.knob,
    answers.sequence,
    answers.frontier,
    answers.pass_at,
    answers.distinct,
    why.quadrants,
    why.places,
    why.predicted,
    why.clip,
    why.covariance,
    answers.length,
    answers.samples,
    about.precision,
    about.config,
)


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The panels for which these runs have data, in the order of the page."""
    return [panel for build in PANELS if (panel := build(runs)) is not None]


def render(paths: Iterable[str | Path], live: str | None = None) -> str:
    """The page of runs as text.

    Args:
        paths: run directories, or directories of run directories.
        live: a mark of the state of the files: the page then asks its server for a newer one, and loads plotly from it.

    Returns:
        A whole HTML document.

    Raises:
        ValueError: no run there.
        ImportError: plotly is missing.
    """
    runs = read(paths)
    return document(runs, about.key_numbers(runs), panels(runs), live)


def render_comparison(found: Compared) -> str:
    """The page of a comparison as text: its own panels, then those of one run of each cell.

    Args:
        found: what `isentropic compare` found.

    Returns:
        A whole HTML document.

    Raises:
        ImportError: plotly is missing.
    """
    runs = compared.read_cells(found)
    single = panels(runs) if runs else []
    if single:
        note = "The panels below show the first run of each cell; the means above are over all of its runs."
        single = [Panel("single", "One run of each cell", note, []), *single]
    title = f"{len(found.cells)} cells, {len(found.lines)} runs compared"
    return document(runs, Html(""), [*compared.panels(found, runs), *single], None, title)


def write(paths: Iterable[str | Path], out: str | Path) -> Path:
    """Write the page of these runs to ``out``, whole or not at all.

    Args:
        paths: run directories, or directories of run directories.
        out: the HTML file; its directory is created if it is missing.

    Returns:
        The path that was written.

    Raises:
        ValueError: no run there.
        ImportError: plotly is missing.
    """
    return _write(render(paths), out)


def write_comparison(found: Compared, out: str | Path) -> Path:
    """Write the page of a comparison to ``out``, whole or not at all; returns the path that was written."""
    return _write(render_comparison(found), out)


def _write(text: str, out: str | Path) -> Path:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.draft")
    draft.write_text(text, encoding="utf-8")
    return draft.replace(out)
