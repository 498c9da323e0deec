"""The lock of a run directory: one run writes into it at a time, from its first moment.

The system holds the lock and releases it when the process ends, however it ends, so a dead owner's lock is free. The
file `.run.lock` says whose it is: process id, host, and when that process started. Where a file system has no locks,
the file alone decides: an owner on this machine is asked for, one on another machine is taken to be alive.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

LOCK_FILE = ".run.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_held: set[Path] = set()  # by this process, which may ask for a lock twice


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a run directory, which is created; one that is empty in the end is removed again.

    Args:
        folder: of the run.

    Raises:
        ValueError: another process holds the lock.
        OSError: the directory cannot be made or written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "run"
        >>> with held(folder):
        ...     owner_of(folder)["pid"] == os.getpid()
        True
        >>> folder.exists()
        False
    """
    folder = Path(folder)
    resolved = folder.resolve()
    if resolved in _held:
        yield
        return
    file = _take(folder)
    _held.add(resolved)
    try:
        yield
    finally:
        _held.discard(resolved)
        # Removed before it is released: whoever waits for this file finds that it is gone, and takes a new one.
        with suppress(OSError):
            (folder / LOCK_FILE).unlink()
        file.close()
        with suppress(OSError):
            folder.rmdir()


def owner_of(folder: str | Path) -> dict[str, Any]:
    """What the lock file of a run directory says: ``pid``, ``host``, ``started``; empty if there is none."""
    try:
        owner = json.loads((Path(folder) / LOCK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _take(folder: Path) -> IO[str]:
    """The lock file, open and locked, with this process as its owner."""
    path = folder / LOCK_FILE
    while True:
        with suppress(FileExistsError):  # the owner before may remove it between pathlib's two looks
            folder.mkdir(parents=True, exist_ok=True)
        owner = owner_of(folder)  # read before it is opened here: closing a file gives its locks up
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN or (owner and _alive(owner)):
                file.close()
                raise _refusal(folder, owner_of(folder)) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()  # the owner before removed this file: it guards nothing
    file.truncate(0)
    me = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
    file.write(json.dumps(me) + "\n")
    file.flush()
    return file


def _refusal(folder: Path, owner: dict[str, Any]) -> ValueError:
    who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"
    return ValueError(
        f"{folder} is in use by the run of {who}; wait until it ends, or name another directory by --out "
        f"(if it has ended, delete {folder / LOCK_FILE})"
    )


def _alive(owner: dict[str, Any]) -> bool:
    """Whether an owner's process may still run: the id may belong to another process by now."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid() and _started(pid) == owner.get("started")


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])
