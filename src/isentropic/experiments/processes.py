"""The processes of a grid: started, watched, stopped; the line of each run that ends goes into the results file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..runs.record import Record, append_row
from ..runs.text import duration, one_line
from .config import ConfigError, RunConfig, as_dict, total_steps
from .lines import line_of

_STATUS_EVERY = 30.0  # seconds between two status lines if stderr is not a terminal
_PR_SET_PDEATHSIG = 1


class Run(Protocol):
    """A run to start: a cell of a grid."""

    @property
    def name(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def config(self) -> RunConfig: ...
    @property
    def print(self) -> str: ...

    def folder(self, out: Path) -> Path:
        """The run directory."""
        ...


@contextlib.contextmanager
def exclusive(out: Path, say: Callable[[str], None], patience: float = 60.0) -> Iterator[int]:
    """Lock a directory for one comparison; yields the lock, which its runs inherit and hold until the last one ends.

    Raises:
        ConfigError: another comparison holds the lock.
    """
    with (out / ".lock").open("w") as file:
        for second in range(int(patience)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if second == 0:
                    say(f"waiting for runs in {out} that have not ended yet")
                time.sleep(1)
        else:
            raise ConfigError(f"--out: another comparison works in {out}; wait for it, or name another directory")
        yield file.fileno()


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Raise KeyboardInterrupt inside the block on SIGTERM, as on Ctrl-C."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop_with_parent() -> None:
    """On Linux: a run whose comparison was killed outright gets SIGTERM, and saves a checkpoint."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Processes:
    """Runs, a process each, at most ``jobs`` of them at a time.

    Args:
        out: directory of the run directories.
        results: the results file.
        runs: to do, in order.
        jobs: processes at a time.
        lock: file descriptor that they inherit.
        say: called with lines of progress.
    """

    def __init__(self, out: Path, results: Path, runs: Sequence[Run], jobs: int, lock: int, say: Callable[[str], None]):
        self.out, self.results, self.jobs, self.lock, self.say = out, results, jobs, lock, say
        self.waiting = list(runs)
        self.running: dict[subprocess.Popen[bytes], Run] = {}
        self.num_runs, self.num_ended, self.failed = len(runs), 0, list[str]()
        self.started = self.last_status = time.monotonic()
        self.steps_at_start = sum(self._steps_left(run) for run in runs)

    def run(self) -> list[str]:
        """Run all; returns the errors, a line for each failed run."""
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.jobs:
                    self._start(self.waiting.pop(0))
                time.sleep(0.2)
                for process in [p for p in self.running if p.poll() is not None]:
                    self._finish(process)
                self._show_status()
        except KeyboardInterrupt:
            self._stop()
            raise
        return self.failed

    def _start(self, run: Run) -> None:
        folder = run.folder(self.out)
        if (folder / "summary.json").exists():
            self._write_line(run)
            return
        command = [sys.executable, "-m", "isentropic.cli", "train"]
        if (folder / "run.json").exists():
            command += ["--resume"]
        else:
            folder.mkdir(parents=True, exist_ok=True)
            import tomli_w

            settings = {k: v for k, v in as_dict(run.config).items() if v is not None and k != "out"}
            (folder / "cell.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
            command.append(str(folder / "cell.toml"))
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [*command, "--out", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
                pass_fds=(self.lock,),
                preexec_fn=_stop_with_parent,
            )
        self.running[process] = run

    def _finish(self, process: subprocess.Popen[bytes]) -> None:
        run = self.running.pop(process)
        folder = run.folder(self.out)
        if (folder / "summary.json").exists():
            self._write_line(run)
            return
        self.num_ended += 1
        log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        self.failed.append(f"{run.name}, {run.task}, seed {run.seed}: {log[-1] if log else 'no output'}")
        self.say(f"failed: {self.failed[-1]} (exit code {process.returncode}; {folder / 'log.txt'})")

    def _write_line(self, run: Run) -> None:
        """Append the run's line to the results file, and print its figures."""
        self.num_ended += 1
        line = line_of(Record(run.folder(self.out)), run.name)
        # The cell's fingerprint: the one of run.json may differ if a user's recipe is in a file at another path.
        line |= {"fingerprint": run.print}
        append_row(self.results, line)
        figures = line["figures"]
        shown = [f"{k} {figures[k]:.3f}" for k in ("entropy/end", "reward/end", "pass@1") if figures.get(k) is not None]
        stopped = f"; stopped: {line['stopped']}" if line.get("stopped") else ""
        self.say(
            f"[{self.num_ended}/{self.num_runs}] {run.name}, {run.task}, seed {run.seed}: {', '.join(shown)}, "
            f"{duration(figures['seconds'])}{stopped}; {self._time_left()}"
        )

    def _steps_done(self, run: Run) -> int:
        path = run.folder(self.out) / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            tail = file.read().decode(errors="replace").splitlines()
        for text in reversed(tail):
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                return int(json.loads(text)["step"])
        return 0

    def _steps_left(self, run: Run) -> int:
        return total_steps(run.config) - self._steps_done(run)

    def _time_left(self) -> str:
        """Time left for all runs, from the optimizer steps since this object was created."""
        left = sum(self._steps_left(run) for run in [*self.running.values(), *self.waiting])
        done = self.steps_at_start - left
        if done <= 0:
            return f"{left} optimizer steps left"
        return f"eta {duration((time.monotonic() - self.started) / done * left)}"

    def _show_status(self) -> None:
        is_terminal = sys.stderr.isatty()
        if time.monotonic() - self.last_status < (1.0 if is_terminal else _STATUS_EVERY):
            return
        self.last_status = time.monotonic()
        current = ", ".join(
            f"{r.name} s{r.seed} {self._steps_done(r)}/{total_steps(r.config)}" for r in self.running.values()
        )
        text = f"{self.num_ended}/{self.num_runs} runs, {self._time_left()}: {current}"
        if is_terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            print(f"\r\x1b[K{one_line(text)[:width]}\r", end="", file=sys.stderr, flush=True)
        else:
            self.say(text)

    def _stop(self) -> None:
        """Ask every run to save and stop, and wait for it; a second Ctrl-C kills them."""
        self.say("stopping: the current runs save a checkpoint; press Ctrl-C again to end them at once")
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        try:
            for process in self.running:
                process.wait()
        except KeyboardInterrupt:
            for process in self.running:
                process.kill()
            raise
