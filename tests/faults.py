"""The fault campaign: runs that are killed, damaged, started twice or out of disk, each against one that was not.

``.venv/bin/python tests/faults.py [--moments 20] [--only train,then,...] [--seed 0]`` prints N of M for each kind and
exits with 1 if one failed. A run is equal if its rows (without seconds), evaluations, samples and summary are, and the
weights and the controller of its last checkpoint, bit for bit. Runs are forked from this process, which has imported
everything, so that moments fall into their work; those of ``start`` and ``compare`` are processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HELPERS = Path(__file__).parent / "helpers"
SETTINGS = {"steps": 24, "prompts": 4, "generations": 4, "eval_k": 2, "eval_rows": 4, "save_every": 8}
_ALL_CUTS = 8  # moments from which on every file of a checkpoint is cut, each in every way
STOP_AFTER = 240.0  # seconds
GRID = (
    'seeds = [0]\nrecipes = ["grpo"]\ntasks = ["task_cases:letters"]\njobs = 1\n[cells.held]\nrecipe = "isentropic"\n'
)


class Ended(NamedTuple):
    """A process that has ended: its exit code (negative for a signal), its output, and how long it ran."""

    code: int
    out: str
    err: str
    seconds: float


def forked(argv: list[str], home: Path, kill_after: float | None = None) -> Ended:
    """Run a command in a fork of this process; with ``kill_after``, kill it -9 after so many seconds."""
    return Fork(argv, home).end(kill_after)


class Fork:
    """A command in a fork of this process, under way."""

    def __init__(self, argv: list[str], home: Path):
        self.began = time.monotonic()
        self.files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115  (until it has ended)
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.chdir(home)
                for number, file in enumerate(self.files, start=1):
                    os.dup2(file.fileno(), number)
                code = _run_main(argv)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)

    def end(self, kill_after: float | None = None) -> Ended:
        """Wait until it ends, or kill it."""
        limit = STOP_AFTER if kill_after is None else kill_after
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - self.began > limit:
                os.kill(self.pid, signal.SIGKILL)
                _, status = os.waitpid(self.pid, 0)
                break
            time.sleep(0.003)
        seconds, texts = time.monotonic() - self.began, []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Ended(os.waitstatus_to_exitcode(status), *texts, seconds)


def _run_main(argv: list[str]) -> int:
    from isentropic.cli import main

    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


def process(argv: list[str], home: Path, kill_after: float | None = None, inside: bool = False) -> Ended:
    """Run a command as a process of its own; killed, its first child is killed instead if ``inside``."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = [sys.executable, "-m", "isentropic.cli", *argv]
        child = subprocess.Popen(command, cwd=home, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        try:
            child.wait(STOP_AFTER if kill_after is None else kill_after)
        except subprocess.TimeoutExpired:
            children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split() if inside else []
            os.kill(int(children[0]) if children else child.pid, signal.SIGKILL)
            child.wait(STOP_AFTER)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ended(child.returncode, *texts, time.monotonic() - began)


def state(run: Path) -> dict[str, Any]:
    """All that two equal runs have in common."""
    from isentropic.runs.record import Record

    record = Record(run)
    summary = json.loads((run / "summary.json").read_text())
    last = record.checkpoints()[-1][1]
    rows = {
        name: [{k: v for k, v in row.items() if k != "seconds"} for row in record.rows(name)]
        for name in ("metrics", "samples", "evaluations")
    }
    return {
        **rows,
        "summary": {k: v for k, v in summary.items() if k != "seconds"},
        "checkpoints": [step for step, _ in record.checkpoints()],
        "weights": (last / "model.safetensors").read_bytes(),
        "controller": json.loads((last / "isentropic.json").read_text()),
    }


def differs(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first part in which two states differ; empty if they are equal."""
    return next((name for name in a if a[name] != b[name]), "")


class Campaign:
    """The faults, a method a kind; each yields a line for a case that failed, and an empty one for a case that held."""

    def __init__(self, home: Path, moments: int, seed: int):
        from trl_case import save_model

        self.home, self.moments, self.random = home, moments, random.Random(seed)
        self.model = save_model(home / "model")
        self.references: dict[tuple[str, ...], tuple[dict[str, Any], float]] = {}

    def train_command(self, out: Path, *more: str) -> list[str]:
        settings = [word for k, v in SETTINGS.items() for word in (f"--{k.replace('_', '-')}", str(v))]
        flags = ["--model", self.model, "--task", "task_cases:letters", "--audit", "off", *settings]
        return ["train", *flags, *more, "--out", str(out)]

    def reference(self, *more: str) -> tuple[dict[str, Any], float]:
        """State and seconds of the run that nothing happens to."""
        if more not in self.references:
            out = self.home / f"whole{len(self.references)}"
            ended = forked(self.train_command(out, *more), self.home)
            assert ended.code == 0, ended.err
            self.references[more] = state(out), ended.seconds
        return self.references[more]

    def _instants(self, num: int, seconds: float) -> list[float]:
        """Seeded moments, one in each of equal parts of the time."""
        return [(i + self.random.random()) / num * seconds for i in range(num)]

    def train(self, *more: str, num: int | None = None, run: Callable[..., Ended] = forked) -> Iterator[str]:
        """Killed while it trains, and started again by the same command with --resume."""
        whole, seconds = self.reference(*more)
        if run is not forked:
            seconds = 8.0
        for i, instant in enumerate(self._instants(num or self.moments, seconds)):
            out = self.home / f"killed-{len(more)}-{run.__name__}-{i}"
            command = [*self.train_command(out, *more), "--resume"]
            first = run(command, self.home, instant)
            again = forked(command, self.home)
            yield self._compared(again, out, whole, f"killed after {instant:.2f} s (code {first.code})")
            shutil.rmtree(out)

    def _compared(self, ended: Ended, out: Path, whole: dict[str, Any], what: str) -> str:
        if ended.code:
            return f"{what}: resumed with code {ended.code}: {ended.err.strip().splitlines()[-1:]}"
        part = differs(state(out), whole)
        return f"{what}: {part} differ" if part else ""

    def then(self) -> Iterator[str]:
        """Killed in a run of two tasks."""
        yield from self.train("--then", "task_cases:spaces", "--then-steps", "16")

    def start(self) -> Iterator[str]:
        """Killed in its first seconds, as a process of its own."""
        yield from self.train(num=max(2, self.moments // 4), run=process)

    def compare(self) -> Iterator[str]:
        """A grid that is killed, or its run is; the same command finishes it."""
        grid = self.home / "grid.toml"
        settings = {**SETTINGS, "model": self.model, "audit": "off"}
        grid.write_text(GRID + "[settings]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))

        def command(out: Path) -> list[str]:
            return ["compare", str(grid), "--out", str(out)]

        def states(out: Path) -> dict[str, Any]:
            return {run.parent.name: state(run.parent) for run in sorted(out.glob("*/summary.json"))}

        first = process(command(self.home / "grid"), self.home)
        assert first.code == 0, first.err
        whole = states(self.home / "grid")
        assert len(whole) == 2
        for i, instant in enumerate(self._instants(self.moments, first.seconds)):
            out = self.home / f"grid-{i}"
            process(command(out), self.home, instant, inside=bool(i % 2))
            again = process(command(out), self.home)
            lines = (out / "results.jsonl").read_text().splitlines() if (out / "results.jsonl").exists() else []
            what = f"killed after {instant:.2f} s, code {again.code}, {len(lines)} lines"
            ok = again.code == 0 and len(lines) == 2 and states(out) == whole
            yield "" if ok else f"{what}: {again.err.strip().splitlines()[-1:]}"
            shutil.rmtree(out)

    def eval(self) -> Iterator[str]:
        """An evaluation that is killed: the same command continues it, and writes one row a model."""
        self.reference()

        def command(out: Path) -> list[str]:
            run = str(self.home / "whole0")
            return ["eval", self.model, run, "--task", "task_cases:letters", "--k", "64", "--out", str(out)]

        def rows(out: Path) -> list[dict[str, Any]]:
            from isentropic.runs.record import read_rows

            return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_rows(out)]

        ended = forked(command(self.home / "whole.jsonl"), self.home)
        assert ended.code == 0, ended.err
        whole = rows(self.home / "whole.jsonl")
        for i, instant in enumerate(self._instants(self.moments, ended.seconds)):
            out = self.home / f"rows-{i}.jsonl"
            forked(command(out), self.home, instant)
            ended_before = rows(out) == whole and not list((self.home / "cache").rglob("*.jsonl"))
            again = forked(command(out), self.home)
            ok = again.code == 0 and rows(out) == whole * (1 + ended_before)
            yield "" if ok else f"killed after {instant:.2f} s: code {again.code}, {again.err.splitlines()[-1:]}"

    def truncated(self) -> Iterator[str]:
        """Each file of the newest checkpoint cut in turn: to nothing, to a half, by two bytes."""
        whole, _ = self.reference()
        source = self.home / "whole0"
        files = sorted(p.name for p in (source / "checkpoint-24").iterdir() if p.stat().st_size > 1)
        cases = [(name, size) for name in files for size in (0.0, 0.5, 1.0)]
        if self.moments < _ALL_CUTS:
            cases = self.random.sample(cases, 3 * self.moments)
        for name, size in cases:
            out = self.home / "cut"
            shutil.copytree(source, out)
            path = out / "checkpoint-24" / name
            content = path.read_bytes()
            path.write_bytes(content[: int(size * len(content))] if size < 1 else content[:-2])
            ended = forked(["train", "--resume", "--out", str(out)], self.home)
            told = any("continuing from checkpoint-16" in line and name in line for line in ended.out.splitlines())
            problem = self._compared(ended, out, whole, f"{name} cut to {size:.0%}")
            yield problem or ("" if told else f"{name} cut to {size:.0%}: not told")
            shutil.rmtree(out)

    def twice(self) -> Iterator[str]:
        """Two runs started into one directory at once: one trains as if alone, the other is refused in one line."""
        whole, _ = self.reference()
        for i in range(max(2, self.moments // 4)):
            out = self.home / f"twice-{i}"
            pair = [Fork(self.train_command(out), self.home) for _ in range(2)]
            ends = sorted((run.end() for run in pair), key=lambda ended: ended.code)
            codes = [ended.code for ended in ends]
            refused = ends[1].err.strip().splitlines()
            ok = codes == [0, 2] and len(refused) == 1 and "in use by the run of process" in refused[0]
            part = differs(state(out), whole) if ok else "codes or lines"
            yield f"{codes}: {part} differ, {refused[-1:]}" if part else ""

    def disk_full(self) -> Iterator[str]:
        """A file system that is full at some moment: one line, and what was there resumes once there is room."""
        whole, _ = self.reference()
        needed = sum(path.stat().st_size for path in (self.home / "whole0").rglob("*") if path.is_file())
        for i in range(max(2, self.moments // 4)):
            share = (i + self.random.random()) / max(2, self.moments // 4)
            with small_disk(self.home / f"disk-{i}", int(share * needed)) as (disk, enlarge):
                if not disk:
                    print("  a file system of a given size cannot be mounted here: skipped")
                    return
                out = disk / "run"
                ended = forked(self.train_command(out), self.home)
                if ended.code == 0:  # there was no room for the page alone
                    yield self._compared(ended, out, whole, f"full at {share:.0%}")
                    continue
                told = [line for line in ended.err.splitlines() if line.startswith("isentropic: error: ")]
                if ended.code != 1 or len(told) != 1 or "disk is full" not in told[0] or "Traceback" in ended.err:
                    yield f"full at {share:.0%}: code {ended.code}, {ended.err.strip().splitlines()[-1:]}"
                    continue
                enlarge()
                again = forked([*self.train_command(out), "--resume"], self.home)
                yield self._compared(again, out, whole, f"full at {share:.0%}")


@contextlib.contextmanager
def small_disk(at: Path, size: int) -> Iterator[tuple[Path | None, Callable[[], None]]]:
    """A file system in memory with so many bytes, and what gives it more; None where it may not be mounted."""
    at.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", str(at)]
    done = subprocess.run(["mount", *options], capture_output=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        yield None, lambda: None
        return

    def enlarge() -> None:
        subprocess.run(["mount", "-o", "remount,size=512m", str(at)], check=True)

    try:
        yield at, enlarge
    finally:
        subprocess.run(["umount", "-l", str(at)], check=False)


KINDS = ("train", "then", "start", "compare", "eval", "truncated", "twice", "disk_full")


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, damage and start runs twice; each must end as if nothing was.")
    parser.add_argument("--moments", type=int, default=20, help="of each kind of run [20]")
    parser.add_argument("--only", default=",".join(KINDS), help=f"kinds [{','.join(KINDS)}]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := [kind for kind in args.only.split(",") if kind not in KINDS]:
        parser.error(f"--only: got {', '.join(unknown)}; allowed: {', '.join(KINDS)}")
    if args.moments < 1:
        parser.error(f"--moments: got {args.moments}, must be at least 1")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HELPERS)}
    sys.path.insert(0, str(HELPERS))
    import isentropic.experiments.evaluate
    import isentropic.experiments.train  # noqa: F401  (before the forks)

    held, num = 0, 0
    with tempfile.TemporaryDirectory() as home:
        os.environ["ISENTROPIC_CACHE"] = str(Path(home) / "cache")
        campaign = Campaign(Path(home), args.moments, args.seed)
        for kind in args.only.split(","):
            began = time.monotonic()
            results = []
            for line in getattr(campaign, kind)():
                results.append(not line)
                if line:
                    print(f"  {kind}: {line}", flush=True)
            held, num = held + sum(results), num + len(results)
            print(f"{kind:10} {sum(results)} of {len(results)}  ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"all        {held} of {num}")
    return 0 if held == num else 1


if __name__ == "__main__":
    raise SystemExit(main())
