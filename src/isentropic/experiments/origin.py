"""Where the numbers of a run come from besides its settings: its warm start, its tasks, and the code that makes them.

Two runs may be compared only if these agree. A line of a results file holds them, and a grid refuses lines whose origin
is another than the one its own runs would have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..models import resolve_model
from ..runs.checkpoints import blocks
from ..tasks import load_task

# Increment it with a change by which a run of the same settings, warm start and seed gives other numbers. The test of
# this module trains ten recipes in the tabular engine and fails if they gave other numbers than this constant promises.
NUMBERS = 1

KEYS = ("numbers", "model", "tasks")


def digest(parts: Iterable[bytes]) -> str:
    """Return twelve characters that change with any byte."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(hashlib.sha256(part).digest())
    return sha.hexdigest()[:12]


def model_digest(model: str) -> str:
    """The digest of the weights that a model name resolves to; of the name alone if they are not on this machine."""
    folder = Path(resolve_model(model))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return digest(b"".join(blocks(path)) for path in files) if files else digest([model.encode()])


def task_digest(name: str) -> str:
    """The digest of a task's name, held-out rows and training rows of seed 0."""
    task = load_task(name)
    rows = [task.name, task.max_completion_length, task.heldout(), task.train(0)]
    return digest([json.dumps(rows, sort_keys=True, default=str).encode()])


def origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """The origin of a run's numbers.

    Args:
        config: the resolved settings; ``model``, ``task`` and ``then`` are read.
    """
    names = [config["task"], *config["then"]]
    return {
        "numbers": NUMBERS,
        "model": model_digest(config["model"]),
        "tasks": digest(task_digest(name).encode() for name in names),
    }


def differs(one: Any, other: Any) -> str | None:
    """In words, by what two origins differ; None if they agree. A line without an origin differs from all others."""
    meanings = {"numbers": "of another version of the code", "model": "of another warm start", "tasks": "of other rows"}
    if not isinstance(one, dict) or not isinstance(other, dict):
        return None if one == other else "without a record of their warm start, rows and code"
    return next((meanings[key] for key in KEYS if one.get(key) != other.get(key)), None)
