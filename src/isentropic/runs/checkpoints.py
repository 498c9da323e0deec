"""Checkpoints that are known to be complete: sizes and digests of their files, and which one to continue from.

`checkpoint.json` is written into a checkpoint last. It holds the size and the CRC-32 of every file: of the whole file
up to 64 MiB, and of a larger one 64 blocks of 1 MiB, evenly spaced, both ends included. So a file that was cut short,
or whose pages a crash left empty, is found, and a checkpoint of any size costs at most a tenth of a second per file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from .record import CHECKPOINT_FILE, Record, write_json

MANIFEST = "checkpoint.json"
_BLOCK, _BLOCKS = 2**20, 64


class Choice(NamedTuple):
    """The checkpoint to continue from: its path, or None if none is complete; and why newer ones are skipped."""

    path: Path | None
    damaged: list[str]


def seal(folder: Path) -> None:
    """Write `checkpoint.json`, once every other file of a checkpoint is there.

    Args:
        folder: of the checkpoint. The files that other processes write, each when it comes to it, are left out.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "model.safetensors").write_bytes(b"abc")
        >>> seal(folder)
        >>> damage(folder) is None
        True
        >>> _ = (folder / "model.safetensors").write_bytes(b"ab")
        >>> damage(folder)
        'model.safetensors has 2 of 3 bytes'
    """
    files = {name: [path.stat().st_size, digest(path)] for name, path in _own_files(folder)}
    write_json(folder / MANIFEST, {"digest": f"crc32, {_BLOCKS} blocks of {_BLOCK} bytes", "files": files})


def _own_files(folder: Path) -> Iterator[tuple[str, Path]]:
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for path in sorted(folder.rglob("*") if alone else folder.iterdir()):
        name = path.relative_to(folder).as_posix()
        others = not alone and re.fullmatch(r"rng_state_[1-9]\d*\.pth", name)
        if path.is_file() and name != MANIFEST and not path.name.startswith(f".{MANIFEST}") and not others:
            yield name, path


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, block by block; of one above 64 MiB 64 blocks of 1 MiB, spread evenly over it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a"
        >>> _ = path.write_bytes(b"123456789")
        >>> b"".join(blocks(path))
        b'123456789'
    """
    size = path.stat().st_size
    is_large = size > _BLOCK * _BLOCKS
    with path.open("rb", buffering=0) as file:
        for i in range(_BLOCKS if is_large else -(-size // _BLOCK)):
            if is_large:
                file.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
            yield file.read(_BLOCK)


def digest(path: Path) -> int:
    """The CRC-32 of a file, or of the blocks of a large one.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a"
        >>> _ = path.write_bytes(b"123456789")
        >>> hex(digest(path))
        '0xcbf43926'
    """
    return reduce(lambda value, block: zlib.crc32(block, value), blocks(path), 0)


def damage(folder: Path, digests: bool = True) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is complete.

    A checkpoint without `checkpoint.json`, of an older run or of a run that was killed just then, is judged by what its
    files say of themselves: JSON that can be read, the offsets of a safetensors file, the directory of a zip archive.

    Args:
        folder: of the checkpoint.
        digests: compare digests too; else sizes alone.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return next((text for path in sorted(folder.iterdir()) if (text := _unreadable(path))), None)
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"].items()
        known = [(str(name), int(size), int(crc)) for name, (size, crc) in files]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, size, crc in known:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        if digests and digest(path) != crc:
            return f"{name} is not what was written"
    sealed = {name for name, *_ in known}
    rest = (path for path in sorted(folder.iterdir()) if path.name not in (*sealed, MANIFEST))
    return next((text for path in rest if (text := _unreadable(path))), None)


def _unreadable(path: Path) -> str | None:
    """Why a file cannot be what its name says, judged by itself; None if it can, or if nothing is known of its kind."""
    if not path.is_file() or path.name.startswith("."):
        return None
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return f"{path.name} cannot be read"
    if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
        return f"{path.name} was cut short"
    if path.suffix == ".safetensors" and path.stat().st_size != _announced(path):
        return f"{path.name} was cut short"
    return None


def _announced(path: Path) -> int:
    """The size of a safetensors file by its own header; −1 if that cannot be read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
            return 8 + length + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return -1


def choose(record: Record) -> Choice:
    """The last complete checkpoint of a run, and what is wrong with the newer ones.

    Args:
        record: the run directory.
    """
    damaged = []
    for _, path in reversed(record.checkpoints()):
        problem = damage(path)
        if problem is None:
            return Choice(path, damaged)
        damaged.append(f"{path.name}: {problem}")
    return Choice(None, damaged)


def clear_unfinished(record: Record) -> None:
    """Delete checkpoints whose writing a kill or a full disk ended: they have no isentropic.json.

    Args:
        record: the run directory.
    """
    for _, path in _numbered(record):
        if not (path / CHECKPOINT_FILE).is_file():
            shutil.rmtree(path, ignore_errors=True)


def _numbered(record: Record) -> Iterator[tuple[int, Path]]:
    for path in record.path.glob("checkpoint-*"):
        if number := re.fullmatch(r"checkpoint-(\d+)", path.name):
            yield int(number[1]), path


def rotate(record: Record, keep: int, spare: int | None = None) -> None:
    """Delete the checkpoints before the last ``keep`` whole ones, and those before them that were never completed.

    Args:
        record: the run directory.
        keep: whole checkpoints that stay, at least 1.
        spare: the step of a further one that stays.
    """
    whole = [step for step, path in record.checkpoints() if damage(path, digests=False) is None]
    if len(whole) < keep:
        return
    for step, path in _numbered(record):
        if step < whole[-keep] and step != spare:
            # Its marks go first: a checkpoint that is half deleted is none.
            for name in (CHECKPOINT_FILE, MANIFEST):
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
