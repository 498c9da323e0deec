"""Errors of the machine in one line: paths that cannot be used, and a full disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..experiments.config import ConfigError

_PATHS = (
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What torch's and safetensors' own writers say of a disk that is full; their errors have no number.
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos")


class Failure(NamedTuple):
    """One line about it, and the exit code."""

    line: str
    code: int


def failure(error: BaseException) -> Failure | None:
    """What the machine refused; None for any other error.

    Example:
        >>> failure(OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")).code
        1
        >>> failure(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300)).line[:35]
        'File name too long: xxxxxxxxxxxxxxx'
        >>> failure(KeyError("a"))
    """
    errors = list(_chain(error))
    full = next((e for e in errors if getattr(e, "errno", None) in _FULL or _says_full(e)), None)
    if full is not None:
        where = f" ({full.filename})" if isinstance(full, OSError) and full.filename else ""
        return Failure(
            f"the disk is full{where}; what was written before is intact: free some space and run it again, "
            "or continue a run by train --resume",
            1,
        )
    if isinstance(error, OSError) and error.errno in _PATHS and error.filename is not None:
        return Failure(f"{error.strerror}: {_short(error.filename)}; name another path, or correct its permissions", 2)
    return None


def make_folder(flag: str, path: str | Path) -> None:
    """Make a directory before the work whose results go there.

    Args:
        flag: that named it.
        path: of the directory.

    Raises:
        ConfigError: it cannot be made, or it is a file.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(f"{flag}: {_short(path)} cannot be made: {reason}; name another directory") from None


def check_file(flag: str, path: str | Path) -> None:
    """Refuse a file that cannot be written, before the work whose results go there; its directory is made.

    Args:
        flag: that named it.
        path: of the file.

    Raises:
        ConfigError: such a file.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_folder, there = file.is_dir(), file.exists()
    except OSError as error:
        raise ConfigError(f"{flag}: {_short(path)} cannot be written: {error.strerror}; name another file") from None
    if is_folder or not os.access(file if there else file.parent, os.W_OK):
        reason = "it is a directory" if is_folder else "permission denied"
        raise ConfigError(f"{flag}: {_short(path)} cannot be written: {reason}; name another file")


def _short(path: object) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _says_full(error: BaseException) -> bool:
    return isinstance(error, Exception) and any(text in str(error) for text in _FULL_TEXTS)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
