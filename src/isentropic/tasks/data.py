r"""Tasks from existing data: GSM8K, MATH, MATH-500 and AIME 2024 by name, files of your own, data sets of the hub.

Named sets come from the hub, or from JSON lines on this machine by `path=`. Nothing is read until rows are asked for.
"""

import hashlib
import json
import random
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from . import Task
from .rows import Columns, Rows, distinct, read_file, task_rows
from .spec import one_line, path_of, require, resolve, split
from .verifiers import VERIFIERS, normal

BOXED = "\n\nReason step by step, and put the final answer in \\boxed{}."
HELD_OUT_SHARE = 10  # of a single file, one row in so many is held out, by the hash of its prompt
ORDER_SEED = 20240917  # held-out rows are shuffled: any beginning of the list is a fair sample


class Source(NamedTuple):
    """The location of a named set, and its columns.

    Attributes:
        hub: repository, configuration and split, to train on and held out; None if there is nothing to train on.
        files: names of files in a directory, to train on and held out.
        columns: of the question and of the answer; `solution` is read if the answer's is missing.
        verifier: a key of `VERIFIERS`.
        tokens: limit of a completion.
    """

    hub: tuple[tuple[str, str | None, str] | None, tuple[str, str | None, str]]
    files: tuple[tuple[str, ...], tuple[str, ...]]
    columns: tuple[str, str]
    verifier: str
    tokens: int


_MATH500 = ("HuggingFaceH4/MATH-500", None, "test")
_MATH500_FILES = ("math500.jsonl", "math_test.jsonl", "test.jsonl")
SOURCES = {
    "gsm8k": Source(
        (("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")),
        (("gsm8k_train.jsonl", "train.jsonl"), ("gsm8k_test.jsonl", "test.jsonl")),
        ("question", "answer"),
        "numeric",
        512,
    ),
    "math": Source(
        (("DigitalLearningGmbH/MATH-lighteval", "default", "train"), _MATH500),
        (("math_train.jsonl", "train.jsonl"), _MATH500_FILES),
        ("problem", "answer"),
        "math",
        1024,
    ),
    "math500": Source((None, _MATH500), ((), _MATH500_FILES), ("problem", "answer"), "math", 1024),
    "aime24": Source(
        (None, ("HuggingFaceH4/aime_2024", None, "train")),
        ((), ("aime24.jsonl", "test.jsonl")),
        ("problem", "answer"),
        "numeric",
        2048,
    ),
}
NAMED_OPTIONS: dict[str, Any] = {"path": "", "prompt": ("chat", "plain"), "tokens": 0}
CUSTOM_OPTIONS: dict[str, Any] = {
    "prompt": "prompt",
    "answer": "answer",
    "verifier": ("exact", "numeric", "math"),
    "format": ("plain", "chat"),
    "stop": ("none", "line"),
    "heldout": "",
    "tokens": 512,
}
HUB_OPTIONS = {**CUSTOM_OPTIONS, "config": "", "split": "train"}


def named(rest: str, name: str) -> Task:
    """Return the task of `gsm8k`, `math`, `math500` or `aime24`, from the hub or from `path=`.

    Raises:
        ValueError: an unknown option, a path that does not exist, or a verifier that needs math-verify without it.
    """
    kind = name.partition(":")[0]
    source = SOURCES[kind]
    words, options = split(rest)
    if words:
        raise ValueError(f"task {name!r}: got {words[0]!r} after {kind}, must be options such as path=DIRECTORY")
    settings = resolve(name, options, NAMED_OPTIONS)
    if source.verifier == "math":
        require(name, ["math_verify"])
    sources: tuple[Any, Any] = source.hub
    if settings["path"]:
        sources = _files(name, path_of(name, settings["path"]), source)
    else:
        require(name, ["datasets"])
    question, answer = source.columns
    columns = Columns(question, answer, settings["prompt"] == "chat", BOXED, source.verifier)
    return _task(
        name,
        f"{kind}, from {settings['path'] or 'the hub'}.",
        sources,
        columns,
        tokens=settings["tokens"] or source.tokens,
        # A base model continues with a question that it makes up.
        stop="" if settings["prompt"] == "chat" else "\n\nQuestion:",
        boxes=True,
    )


def _files(name: str, path: Path, source: Source) -> tuple[Path | None, Path]:
    """The files to train on and held out: the file itself, or those of a directory that have a known name."""
    if path.is_file():
        return (None if source.hub[0] is None else path), path
    if not path.is_dir():
        raise ValueError(f"task {name!r}: path: got {str(path)!r}, must be a directory or a file, and does not exist")
    files = [next((path / n for n in names if (path / n).is_file()), None) for names in source.files]
    if files[1] is None:
        raise ValueError(f"task {name!r}: path: {path} has none of {', '.join(source.files[1])}; name the file itself")
    return files[0], files[1]


def from_file(rest: str, name: str) -> Task:
    """Return the task of `file:PATH:prompt=COLUMN:answer=COLUMN:verifier=...`, JSON lines or Parquet.

    Without `heldout=PATH`, one row in ten is held out, chosen by the hash of its prompt.

    Raises:
        ValueError: an unknown option, a path that does not exist, or a verifier that needs math-verify without it.
    """
    words, options = split(rest)
    if len(words) != 1:
        raise ValueError(f"task {name!r} must be file:PATH[:option=value...], got {len(words)} words after file")
    settings = resolve(name, options, CUSTOM_OPTIONS)
    paths = [path_of(name, p) for p in (words[0], settings["heldout"] or words[0])]
    for path in paths:
        if path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"task {name!r}: got {str(path)!r}, must end in .jsonl or .parquet")
        if not path.is_file():
            raise ValueError(f"task {name!r}: got {str(path)!r}, and there is no such file")
    return _custom(name, f"Rows of {words[0]}.", (paths[0], paths[1]), settings, "verifier" in options)


def from_hub(rest: str, name: str) -> Task:
    """Return the task of `hub:ORG/NAME:prompt=COLUMN:...`, with `config=`, `split=` and `heldout=SPLIT`.

    Raises:
        ValueError: an unknown option, a missing extra, or a name that is not ORG/NAME.
    """
    words, options = split(rest)
    if len(words) != 1 or words[0].count("/") != 1:
        raise ValueError(f"task {name!r} must be hub:ORG/NAME[:option=value...], got {':'.join(words)!r} after hub")
    settings = resolve(name, options, HUB_OPTIONS)
    require(name, ["datasets"])
    config = str(settings["config"]) or None
    train = (words[0], config, str(settings["split"]))
    heldout = (words[0], config, str(settings["heldout"] or settings["split"]))
    return _custom(name, f"Rows of {words[0]}.", (train, heldout), settings, "verifier" in options)


def _custom(
    name: str, description: str, sources: tuple[Any, Any], settings: dict[str, Any], verifier_named: bool
) -> Task:
    if settings["verifier"] == "math":
        require(name, ["math_verify"])
    chat = settings["format"] == "chat"
    columns = Columns(settings["prompt"], settings["answer"], chat, None, settings["verifier"], verifier_named)
    stop = "\n" if settings["stop"] == "line" else ""
    return _task(name, description, sources, columns, settings["tokens"] or 512, stop, boxes=False)


def _task(
    name: str,
    description: str,
    sources: tuple[Any, Any],
    columns: Columns,
    tokens: int,
    stop: str,
    boxes: bool,
) -> Task:
    def rows(source: Any) -> Rows:
        return task_rows(name, _read(name, source), columns, ours=isinstance(source, Path))

    @cache
    def split_rows() -> tuple[Rows, Rows]:
        """Rows to train on and held out; split by the hash of the prompt if both are of one source."""
        if sources[0] == sources[1]:
            all_rows = rows(sources[0])
            to_train = [row for row in all_rows if not is_held_out(row["prompt"])]
            return to_train, _heldout(name, [row for row in all_rows if is_held_out(row["prompt"])])
        to_train = [] if sources[0] is None else rows(sources[0])
        return to_train, _heldout(name, rows(sources[1]))

    def train(seed: int) -> Rows:
        to_train = list(split_rows()[0])
        if not to_train:
            raise ValueError(f"task {name!r} has no rows to train on; use it with `isentropic eval --task`")
        random.Random(seed).shuffle(to_train)
        return to_train

    return Task(
        name=name,
        description=description,
        train=train,
        heldout=lambda: list(split_rows()[1]),
        verify=VERIFIERS[columns.verifier],
        normalise=partial(normal, columns.verifier),
        max_completion_length=tokens,
        stop=stop,
        gold=lambda row: rf"\boxed{{{row['answer']}}}" if boxes else str(row["answer"]),
    )


def is_held_out(prompt: Any) -> bool:
    """Return whether a row of a single file is held out, which depends on its prompt alone.

    Example:
        >>> sum(is_held_out(f"question {i}") for i in range(1000))
        115
    """
    return int(hashlib.sha256(json.dumps(prompt).encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def _heldout(name: str, rows: Rows) -> Rows:
    rows = distinct(name, rows)
    random.Random(ORDER_SEED).shuffle(rows)
    return rows


def _read(name: str, source: Any) -> Iterable[dict[str, Any]]:
    if isinstance(source, Path):
        return read_file(name, source)
    from datasets import load_dataset

    repository, config, split = source
    try:
        return load_dataset(repository, config, split=split)  # type: ignore[return-value]
    except Exception as error:
        raise ValueError(
            f"task {name!r}: the hub does not give {repository} ({split}): {one_line(error)}; check the name and the "
            "network, or give rows on this machine by path= or file:"
        ) from None
