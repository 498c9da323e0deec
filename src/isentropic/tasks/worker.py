"""Verification in worker processes: a hard time limit, safe in any thread, no process left behind.

A verifier that computes with the text of a model can run for ever, take all memory, or end its process. Here it does so
in another process: `ask` sends one call to a worker and waits; a worker that is late or dies is replaced, and the call
has no result. The limit is on the worker's processor time, so that no answer is marked wrong because the machine is
busy; a longer limit on wall-clock time backs it. A worker whose parent has ended ends too.

Importing this module imports no torch; a worker imports the module that it is asked to call.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from typing import Any

SECONDS = 3.0  # of processor time that an answer may take
PATIENCE = 10  # times as long in wall-clock time
START_SECONDS = 120.0  # that a worker may take to import its library
WORKERS = 4
MEMORY = 4 << 30  # bytes of address space


class Worker:
    """One process that answers calls, one at a time."""

    def __init__(self) -> None:
        path = os.pathsep.join([entry or os.getcwd() for entry in sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from isentropic.tasks.worker import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self.imported: set[str] = set()

    def call(self, function: str, args: tuple[Any, ...], seconds: float) -> Any:
        """The result; raises TimeoutError or EOFError if there is none."""
        module = function.partition(":")[0]
        if module not in self.imported:
            # The time that the import takes does not count against the answer.
            self._exchange({"module": module}, START_SECONDS)
            self.imported.add(module)
        return self._exchange({"function": function, "args": args, "seconds": seconds}, PATIENCE * seconds)

    def _exchange(self, message: dict[str, Any], seconds: float) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        until = time.monotonic() + seconds
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError
            received = os.read(self.process.stdout.fileno(), 65536)
            if not received:
                raise EOFError
            line += received
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class Pool:
    """Up to ``size`` workers, started when they are first needed; further threads wait for a free one."""

    def __init__(self, size: int = WORKERS) -> None:
        self.owner = os.getpid()
        self.free = threading.BoundedSemaphore(size)
        self.lock = threading.Lock()
        self.idle: list[Worker] = []
        self.workers: list[Worker] = []

    def ask(self, function: str, *args: Any, seconds: float | None = None) -> Any:
        """The result of ``module:function`` on plain values, or None if it raised, died or was late."""
        with self.free:
            with self.lock:
                worker = self.idle.pop() if self.idle else Worker()
                if worker not in self.workers:
                    self.workers.append(worker)
            try:
                result = worker.call(function, args, SECONDS if seconds is None else seconds)
            except BaseException as error:
                worker.kill()
                with self.lock:
                    self.workers.remove(worker)
                if isinstance(error, TimeoutError | EOFError | OSError | ValueError):
                    return None
                raise
            with self.lock:
                self.idle.append(worker)
        if "missing" in result:
            raise ValueError(f"the verifier needs {result['missing']}, which is not installed")
        return result.get("value")

    def close(self) -> None:
        """End all workers."""
        with self.lock:
            for worker in self.workers:
                worker.kill()
            self.workers, self.idle = [], []


_pools: list[Pool] = []
_pools_lock = threading.Lock()


def ask(function: str, *args: Any, seconds: float | None = None) -> Any:
    """Call ``module:function`` in a worker of this process's pool.

    Args:
        function: importable by a new process; module-level.
        args: plain values, as JSON has them.
        seconds: processor time that the call may take, without imports; None is `SECONDS`.

    Returns:
        The result of the function, as JSON has it; None if it raised, was late, or ended its process.

    Example:
        >>> ask("operator:add", 2, 3)
        5
    """
    return _pool().ask(function, *args, seconds=seconds)


def _pool() -> Pool:
    with _pools_lock:
        # A forked child must not write into its parent's pipes.
        if not _pools or _pools[-1].owner != os.getpid():
            _pools[:] = [Pool()]
            atexit.register(_pools[-1].close)
        return _pools[-1]


def close() -> None:
    """End the workers of this process; the next call starts new ones."""
    if _pools and _pools[-1].owner == os.getpid():
        _pools.pop().close()


def serve() -> None:
    """The loop of a worker process: a line in, a line out, until the parent closes the pipe."""
    calls, answers = sys.stdin.buffer, os.dup(1)
    # A library that prints must not write into the pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _limit()
    for line in calls:
        message = json.loads(line)
        reply: dict[str, Any] = {}
        try:
            if "module" in message:
                import_module(message["module"])
            else:
                module, _, name = message["function"].partition(":")
                _set_timers(message["seconds"])
                reply["value"] = getattr(import_module(module), name)(*message["args"])
                _set_timers(0.0)
        except ModuleNotFoundError as error:
            reply = {"missing": error.name}
        except Exception as error:
            _set_timers(0.0)
            reply = {"error": type(error).__name__}
        try:
            text = json.dumps(reply)
        except (TypeError, ValueError):
            text = "{}"
        os.write(answers, text.encode() + b"\n")


def _set_timers(seconds: float) -> None:
    """Let the system end this process after this time, even inside C code; 0 stops the timers."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, (PATIENCE + 1) * seconds)


def _limit() -> None:
    """Limit memory, write no core files, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        return
