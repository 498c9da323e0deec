"""A run while it trains: in the terminal, or as the report in a browser on this machine.

Only files are read, so that any run can be followed and none is disturbed; a row that is being written is left for
later.
"""

from __future__ import annotations

import http.server
import json
import os
import select
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..control.names import suggest
from ..runs.record import Record, is_number
from ..runs.text import duration, one_line, visible
from .figures import shade
from .runs import planned_steps, read_audit

HOST = "127.0.0.1"
_PERIOD = 0.5  # seconds between looks at the files
_SILENT = 120  # seconds without a row after which a run is called silent
_MIN_WIDTH = 40
_ROWS = 4  # of the picture of entropy
_BLOCKS = " ▁▂▃▄▅▆▇█"
_STYLES = {"serious": "bold red", "warning": "yellow", "note": "dim"}


def spark(values: Sequence[float], width: int) -> str:
    """Values as one line of blocks, the lowest value as the lowest block.

    Args:
        values: in order.
        width: characters at most; more values are averaged.

    Example:
        >>> spark([0, 1, 2, 3], 4)
        '▁▃▆█'
        >>> spark([1, 1], 4)
        '▄▄'
    """
    means = columns(values, width)
    if not means:
        return ""
    low, high = min(means), max(means)
    if high <= low:
        return _BLOCKS[4] * len(means)
    return "".join(_BLOCKS[1 + round((v - low) / (high - low) * 7)] for v in means)


def columns(values: Sequence[float], width: int) -> list[float]:
    """Means over at most ``width`` stretches of equal length.

    Example:
        >>> columns([1, 3, 5, 7], 2)
        [2.0, 6.0]
    """
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else [0]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


class Canvas(NamedTuple):
    """Rows of characters, and the values of the lowest and the highest row."""

    grid: list[list[str]]
    low: float
    high: float


def canvas(values: Sequence[float], target: Sequence[float | None], width: int, height: int) -> Canvas:
    """Entropy against its target on a grid of characters: ``•`` the value, ``─`` the target, ``◆`` both in one cell.

    Args:
        values: at least one.
        target: as many; None at a step without one.
        width, height: of the grid at most, in characters.

    Example:
        >>> ["".join(row) for row in canvas([2.0, 1.0], [1.0, 1.0], 2, 3).grid]
        ['• ', '  ', '─◆']
    """
    means = columns(values, width)
    goals = [sum(known) / len(known) if known else None for known in _known_by_column(target, width)]
    drawn = [*means, *[goal for goal in goals if goal is not None]]
    low, high = min(drawn), max(drawn)
    rise = (height - 1) / (high - low) if high > low else 0.0
    grid = [[" "] * len(means) for _ in range(height)]
    for x, (value, goal) in enumerate(zip(means, goals, strict=True)):
        row = height - 1 - round((value - low) * rise)
        if goal is not None:
            grid[height - 1 - round((goal - low) * rise)][x] = "─"
        grid[row][x] = "◆" if grid[row][x] == "─" else "•"
    return Canvas(grid, low, high)


def _known_by_column(values: Sequence[float | None], width: int) -> Iterator[list[float]]:
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else [0]
    for a, b in pairwise(edges):
        yield [value for value in values[a:b] if is_number(value)]


def time_left(rows: Sequence[dict[str, Any]], steps: int) -> float | None:
    """Seconds to the last step at the pace of the latest rows; None if it is not known.

    ``seconds`` counts from the start of the process, so it falls when a run is resumed: only rows since then are used.

    Args:
        rows: of metrics.jsonl.
        steps: that the run is to take; 0 if unknown.

    Example:
        >>> time_left([{"step": 1, "seconds": 10}, {"step": 3, "seconds": 14}], 13)
        20.0
    """
    recent = [
        (r["step"], r["seconds"]) for r in rows[-200:] if is_number(r.get("step")) and is_number(r.get("seconds"))
    ]
    since = max((i for i in range(1, len(recent)) if recent[i][1] < recent[i - 1][1]), default=0)
    recent = recent[since:]
    if len(recent) < 2 or not steps or recent[-1][0] <= recent[0][0]:
        return None
    pace = (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0])
    return max(0.0, pace * (steps - recent[-1][0]))


def check_path(run: str | Path, once: bool) -> Path:
    """The directory of a run that exists, or that can still begin.

    Args:
        run: as the user wrote it.
        once: the run must exist already.

    Raises:
        ValueError: no run can begin there; the message names one with a similar path.
    """
    path = Path(run)
    if (path / "run.json").is_file():
        return path
    neighbours = [str(file.parent) for file in path.parent.glob("*/run.json")]
    hint = suggest(path, neighbours) or "; name the directory of `train --out`"
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, not a run directory{hint}")
    if path.is_dir() and Record(path).strangers():
        raise ValueError(f"{path} is not a run directory: it has no run.json but has other files{hint}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no run can start there, {path.parent} does not exist{hint}")
    if once:
        raise ValueError(f"{path} holds no run yet{hint}; or leave --once out to wait for it")
    return path


class Snapshot:
    """What the files of a run say now."""

    def __init__(self, path: Path):
        self.path = path
        self.record = Record(path)
        self.started = (path / "run.json").exists()
        self.header: dict[str, Any] = self.record.header() if self.started else {}
        self.rows = [row for row in self.record.rows("metrics") if is_number(row.get("step"))]
        self.samples = self.record.rows("samples")[-3:]
        self.ended = (path / "summary.json").exists()
        audit = read_audit(path)
        self.findings = audit.findings if audit else []

    @property
    def steps(self) -> int:
        """Optimizer steps the run is to take; 0 if unknown."""
        return planned_steps(self.header)

    def values(self, name: str) -> list[float]:
        """A metric, at the steps that have it."""
        return [row[name] for row in self.rows if is_number(row.get(name))]

    def state(self) -> str:
        """``running``, ``finished``, or for how long no row was written."""
        if self.ended:
            return "finished"
        if not self.rows:
            return "no step yet"
        silent = time.time() - (self.path / "metrics.jsonl").stat().st_mtime
        return "running" if silent < _SILENT else f"silent for {duration(silent)}: slow, stopped or killed"


def stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of each file of a run: they change when a view of the run must be drawn again."""
    names = ("run.json", "metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "audit.json", "summary.json")
    files = []
    for name in names:
        try:
            stat = (path / name).stat()
        except OSError:
            continue
        files.append((name, stat.st_size, stat.st_mtime_ns))
    return tuple(files)


def frame(now: Snapshot, width: int) -> Any:
    """One picture of a run, for rich to draw.

    Args:
        now: what the files of the run hold.
        width: characters; at least 40 are used.

    Raises:
        ImportError: rich is missing.
    """
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    if not now.started:
        return Panel(Text(f"waiting for {one_line(now.path)} to begin"), title="isentropic", subtitle="q quits")
    width = max(width, _MIN_WIDTH)
    config = now.header.get("config")
    config = config if isinstance(config, dict) else {}
    # The rows of a sequence name the task that is trained on.
    task = (now.rows[-1].get("task") if now.rows else None) or now.header.get("task", "a task")
    name = f"{config.get('recipe', 'run')} on {task}, seed {now.header.get('seed')}"
    if isinstance(model := now.header.get("model"), str):
        name += f", model {Path(model).name}"
    lines: list[Any] = [_progress(now, width - 4)]
    lines += _entropy(now, width - 4)
    for label, metric in (("reward", "reward/mean"), ("knob", "knob/value")):
        values = now.values(metric)
        if values:
            bound = " at its bound" if metric == "knob/value" and now.rows[-1].get("knob/saturated") else ""
            line = Text(f"{label:8}{values[-1]:8.3f}  ")
            line.append(spark(values, width - 24), style="green" if label == "reward" else "magenta")
            line.append(bound, style="bold red")
            lines.append(line)
    lines += _warnings(now)
    lines += _texts(now)
    return Panel(Group(*lines), title=Text(one_line(name)), subtitle=Text(f"{one_line(now.path)}   q quits"))


def _progress(now: Snapshot, width: int) -> Any:
    from rich.text import Text

    done = now.rows[-1]["step"] if now.rows else 0
    left = time_left(now.rows, now.steps)
    line = Text().append(f"step {done}/{now.steps or '?'}  ", style="bold")
    filled = round(min(done / now.steps, 1.0) * 24) if now.steps else 0
    line.append("━" * filled, style="green").append("┈" * (24 - filled), style="dim")
    if not now.ended and left is not None:
        line.append(f"  eta {duration(left)}")
    seconds = now.values("seconds")
    if seconds:
        line.append(f"  {duration(seconds[-1])} gone", style="dim")
    state = now.state()
    line.append(f"  {state}", style="bold yellow" if state.startswith("silent") else "dim")
    line.truncate(width)
    return line


def _entropy(now: Snapshot, width: int) -> list[Any]:
    """Entropy against its target, a few rows high."""
    from rich.text import Text

    rows = [row for row in now.rows if is_number(row.get("entropy/mean"))]
    if not rows:
        return []
    values = [row["entropy/mean"] for row in rows]
    goals = [row.get("entropy/target") for row in rows]
    head = Text(f"entropy {values[-1]:8.3f}")
    if is_number(goals[-1]):
        head.append(f"  target {goals[-1]:.3f}  off by {values[-1] / goals[-1] - 1:+.1%}")
    head.append("  nats per token", style="dim")
    styles = {"•": "cyan", "◆": "bold green", "─": "yellow"}
    lines = [head]
    picture = canvas(values, goals, width - 10, _ROWS)
    edges = {0: f"{picture.high:8.3f} ", _ROWS - 1: f"{picture.low:8.3f} "}
    for i, row in enumerate(picture.grid):
        line = Text().append(edges.get(i, " " * 9), style="dim")
        for cell in row:
            line.append(cell, style=styles.get(cell, ""))
        lines.append(line)
    return lines


def _warnings(now: Snapshot) -> list[Any]:
    from rich.text import Text

    lines = []
    for finding in now.findings[:4]:
        severity = str(finding.get("severity", "note"))
        line = Text().append(f"{one_line(severity)}: ", style=_STYLES.get(severity, "yellow"))
        line.append(visible(" ".join(str(finding.get(key) or "") for key in ("what", "where"))))
        remedy = finding.get("remedy")
        if remedy:
            line.append(visible(f"; {remedy}"), style="dim")
        line.truncate(400)
        lines.append(line)
    return lines


def _texts(now: Snapshot) -> list[Any]:
    """The last completions, shaded by surprisal: what the policy did not expect is red."""
    from rich.text import Text

    lines = []
    for row in now.samples:
        reward = row.get("reward")
        head = f"step {row.get('step')}  " + (f"reward {reward:.3g}  " if is_number(reward) else "")
        line = Text().append(one_line(head), style="dim")
        line.append(one_line(row.get("prompt"))[-100:], style="bold")
        tokens, surprisal = row.get("tokens"), row.get("surprisal")
        if isinstance(tokens, list) and isinstance(surprisal, list) and len(tokens) == len(surprisal):
            for token, nats in list(zip(tokens, surprisal, strict=True))[:100]:
                red = shade(nats) if is_number(nats) else 0.0
                line.append(one_line(token), style=f"on rgb({round(40 + 150 * red)},40,40)" if red > 0.2 else "")
        else:
            line.append(one_line(row.get("completion"))[:300])
        lines.append(line)
    return [Text(""), *lines] if lines else []


@contextmanager
def _keys() -> Iterator[bool]:
    """Let single keys be read from the terminal, and restore it afterwards; yields False without a terminal."""
    if os.name != "posix" or not sys.stdin.isatty():
        yield False
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _quits(seconds: float, listening: bool) -> bool:
    """Wait; True as soon as q is pressed or the terminal is closed."""
    if not listening:
        time.sleep(seconds)
        return False
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    if not ready:
        return False
    try:
        typed = os.read(sys.stdin.fileno(), 64)
    except OSError:  # the terminal was closed
        return True
    return not typed or b"q" in typed.lower()


def watch(run: str | Path, once: bool = False) -> None:
    """Show a run in the terminal until q is pressed; if the output is not a terminal, print one picture.

    Args:
        run: the run directory; the run need not have started.
        once: print one picture and return.

    Raises:
        ValueError: no run is there or can begin there.
        ImportError: rich is missing.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        raise ImportError("watch needs rich, which is not installed; pip install 'isentropic[cli]'") from None
    console = Console()
    once = once or not console.is_terminal
    path = check_path(run, once)
    if once:
        console.print(frame(Snapshot(path), console.width))
        return
    with _keys() as listening, Live(console=console, screen=True, auto_refresh=False) as live:
        drawn: Any = None
        while True:
            state = stamp(path), console.size, int(time.time() / 10)
            if state != drawn:
                drawn = state
                live.update(frame(Snapshot(path), console.width), refresh=True)
            if _quits(_PERIOD, listening):
                return


class _Pages(http.server.BaseHTTPRequestHandler):
    """Answers requests for the report of one run."""

    server: Any

    def do_GET(self) -> None:
        """Answer requests for the page, its mark and plotly; anything else is not found."""
        from .page import PLOTLY_PATH, plotly_js

        # A page of another host whose name resolves to this machine must not read this one.
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in (HOST, "localhost"):
            return self._answer(403, "text/plain", "this page is for this machine alone")
        path = self.path.split("?")[0]
        if path == "/":
            return self._answer(200, "text/html", self.server.page())
        if path == "/mark":
            return self._answer(200, "application/json", json.dumps({"mark": self.server.mark()}))
        if path == PLOTLY_PATH:
            return self._answer(200, "text/javascript", plotly_js(), "max-age=86400")
        return self._answer(404, "text/plain", "not here")

    def _answer(self, status: int, kind: str, text: str, cache: str = "no-store") -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", cache)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


class Server(http.server.ThreadingHTTPServer):
    """The report of a run on this machine's loopback address, refreshed while the run trains.

    Args:
        run: the run directory.
        port: 0 chooses a free one.

    Raises:
        ValueError: not a run directory; a port that is taken.
        ImportError: plotly is missing.
    """

    daemon_threads = True

    def __init__(self, run: str | Path, port: int = 0):
        from .page import plotly_js

        plotly_js()
        self.run = check_path(run, once=True)
        self._lock = threading.Lock()
        self._rendered: tuple[str, str] = ("", "")  # mark and page
        try:
            super().__init__((HOST, port), _Pages)
        except OSError as error:
            raise ValueError(f"--port: {port} cannot be used: {error.strerror}; 0 takes a free one") from None

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def mark(self) -> str:
        """The state of the files, as a short text."""
        return format(hash(stamp(self.run)) & 0xFFFFFFFFFFFF, "x")

    def page(self) -> str:
        """The page, rendered once for each state of the files."""
        from . import render

        with self._lock:
            mark = self.mark()
            if self._rendered[0] != mark:
                self._rendered = mark, render([self.run], live=mark)
            return self._rendered[1]


def serve(run: str | Path, port: int) -> None:
    """Serve the report until Ctrl-C.

    Args:
        run: the run directory.
        port: 0 chooses a free one.

    Raises:
        ValueError: see :class:`Server`.
        ImportError: plotly is missing.
    """
    with Server(run, port) as server:
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
