r"""Rows of files and data sets in the form of a task: a prompt, as a text or a conversation, and the answer as a text.

Texts and numbers are read, and prompts that are lists of messages. What is neither has no text of its own, for its
Python spelling is none: it is refused with its row.
"""

import json
import logging
import math
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from .spec import EXTRA, one_line, short
from .verifiers import VERIFIERS, boxed

logger = logging.getLogger("isentropic")
Rows = list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")
VERL_ANSWER = "reward_model.ground_truth"
_MISSING = object()


class Columns(NamedTuple):
    """How rows become a task's.

    Attributes:
        question: column of the prompt; `a.b` is the field `b` of the column `a`.
        answer: column of the answer. If it is `answer` and missing, verl's `reward_model.ground_truth` is read, or what
            `solution` boxes.
        chat: whether a text is wrapped as a user's message.
        instruction: appended to a question; None leaves it as it is.
        verifier: a key of `VERIFIERS`.
        named: whether the user chose that verifier.
    """

    question: str
    answer: str
    chat: bool
    instruction: str | None
    verifier: str
    named: bool = True


def task_rows(name: str, source: Iterable[Any], columns: Columns, *, ours: bool = True) -> Rows:
    """Return the rows of a source as a task's, each with `prompt` and `answer`.

    Args:
        name: of the task, for messages.
        source: rows, numbered from 1 in messages.
        columns: what to read.
        ours: whether the user can correct the source. One prompt with two answers is refused then; of a set of the hub
            such rows are left out, with a warning.

    Raises:
        ValueError: a row that has no text where one is needed, a prompt with two answers, prompts of two forms, no
            rows, or no row whose answer can be right.
    """
    rows: Rows = []
    for number, row in enumerate(source, start=1):
        place = f"task {name!r}: row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{place}: got {_kind(row)}, must be an object with columns; write one object per line")
        prompt, answer = _prompt(place, row, columns), _answer(place, row, columns.answer)
        if rows and isinstance(prompt, str) != isinstance(rows[0]["prompt"], str):
            raise ValueError(
                f"{place}: {columns.question}: got {_kind(prompt)}, and row 1 has {_kind(rows[0]['prompt'])}; all "
                "prompts of a task must have one form: write them alike"
            )
        rows.append({"prompt": prompt, "answer": answer})
        if number == 1 and not columns.named and "data_source" in row:
            logger.warning(
                "task %s: data_source %s names a scorer of verl's, which is not used; verifier=%s judges, name another "
                "by verifier=",
                name,
                _kind(row["data_source"]),
                columns.verifier,
            )
    if not rows:
        raise ValueError(f"task {name!r}: there are no rows; check the file or the split")
    _check_answers(name, rows, columns)
    return _without_contradictions(name, rows, columns.verifier, ours)


def _value(row: dict[str, Any], column: str) -> Any:
    value: Any = row
    for key in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or key not in value:
            return _MISSING
        value = value[key]
    return value


def _missing(place: str, row: dict[str, Any], column: str) -> ValueError:
    return ValueError(
        f"{place} has no column {column!r}, got {short(', '.join(map(str, row)))}; name the columns by prompt= and "
        "answer=, a field of a column as COLUMN.FIELD"
    )


def _prompt(place: str, row: dict[str, Any], columns: Columns) -> Any:
    value = _value(row, columns.question)
    if value is _MISSING:
        raise _missing(place, row, columns.question)
    place = f"{place}: {columns.question}"
    if isinstance(value, list) and columns.instruction is None:
        return _messages(place, value)
    text = text_of(place, value, columns.question)
    if not text.strip():
        raise ValueError(f"{place} is empty; leave the row out")
    if columns.instruction is not None:
        text = f"{text}{columns.instruction}" if columns.chat else f"Question: {text}{columns.instruction}\nAnswer:"
    return [{"role": "user", "content": text}] if columns.chat else text


def _messages(place: str, messages: list[Any]) -> list[dict[str, str]]:
    """A conversation: messages with a role and a text, the last of them to be answered."""
    if not messages:
        raise ValueError(f"{place} is an empty list, must have messages; leave the row out")
    read = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES or "content" not in message:
            raise ValueError(
                f"{place}: message {number} is {_kind(message)}, must have a role, one of {', '.join(ROLES)}, and a "
                "content; write a text or a list of such messages"
            )
        content = message["content"]
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ValueError(
                f"{place}: message {number} has the content {_kind(content)}, must be a text; leave the row out"
            )
        read.append({"role": message["role"], "content": text_of(f"{place}: message {number}", content, "content")})
    if read[-1]["role"] == "assistant":
        raise ValueError(f"{place} ends with the assistant's message, must end with one to answer; leave that out")
    if not any(message["content"].strip() for message in read):
        raise ValueError(f"{place} is empty; leave the row out")
    return read


def _answer(place: str, row: dict[str, Any], column: str) -> str:
    """The answer: its column, after `####` if that occurs; by default also verl's column, or what a solution boxes."""
    value, read = _value(row, column), column
    if value is _MISSING and column == "answer":
        value, read = _value(row, VERL_ANSWER), VERL_ANSWER
        if value is _MISSING and isinstance(row.get("solution"), str):
            value, read = boxed(row["solution"]), "solution"
            if value is None:
                raise ValueError(f"{place}: solution has no \\boxed{{}}, and there is no column 'answer'; add one")
    if value is _MISSING:
        raise _missing(place, row, column)
    text = text_of(f"{place}: {read}", value, read)
    text = (text.rpartition("####")[2].replace(",", "") if "####" in text else text).strip()
    if not text:
        raise ValueError(f"{place} has an empty {read!r}; leave it out")
    return text


def text_of(place: str, value: Any, column: str = "") -> str:
    """Return a text or a number as a text.

    Args:
        place: names task, row and column in messages.
        value: of a column.
        column: to show how a field inside it is named.

    Raises:
        ValueError: it is neither, or it contains half of a character.

    Example:
        >>> text_of("row 1", "a"), text_of("row 1", 72.0), text_of("row 1", 1e-7)
        ('a', '72', '0.0000001')
        >>> text_of("row 1: answer", True)
        Traceback (most recent call last):
        ...
        ValueError: row 1: answer: got true, must be a text or a number; write it as a text
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{place}: got a lone surrogate, half of a character, at position {error.start}, must be a text; write "
                "the file again as UTF-8, or leave the row out"
            ) from None
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        # A column of integers with a gap in it becomes one of floats.
        return str(int(value)) if value == int(value) else format(Decimal(str(value)), "f")
    if isinstance(value, dict):
        field = next(iter(value), "FIELD")
        remedy = f"name a field of it, such as {column}.{field}"
    elif value is None or isinstance(value, float | Decimal):
        remedy = "leave the row out"
    elif isinstance(value, list):
        remedy = "write one text per row"
    else:
        remedy = "write it as a text"
    raise ValueError(f"{place}: got {_kind(value)}, must be a text or a number; {remedy}")


def _kind(value: Any) -> str:
    """A value in words for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"an object with {short(', '.join(map(str, value)))}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, float | Decimal):
        return str(value)
    return f"a text, {short(value)!r}" if isinstance(value, str) else f"a value of type {type(value).__name__}"


def _check_answers(name: str, rows: Rows, columns: Columns) -> None:
    """Try every answer on the verifier: one that can never be right is named, and if none can the rows are refused."""
    verify = VERIFIERS[columns.verifier]
    tried = {answer: verify(completion_of(columns.verifier, answer), answer) for answer in {r["answer"] for r in rows}}
    never = [number for number, row in enumerate(rows, start=1) if not tried[row["answer"]]]
    if not never:
        return
    others = "" if len(never) == 1 else f", and so for {len(never) - 1} more of {len(rows)} rows"
    line = (
        f"task {name!r}: row {never[0]}: no completion can be right for the answer "
        f"{short(rows[never[0] - 1]['answer'])!r} by verifier={columns.verifier}{others}"
    )
    if len(never) == len(rows):
        raise ValueError(f"{line}; choose another verifier, one of {', '.join(VERIFIERS)}")
    logger.warning("%s; leave such rows out, or choose another verifier", line)


def completion_of(verifier: str, answer: str) -> str:
    r"""Return a completion that gives an answer, in the form that a verifier reads best.

    Example:
        >>> completion_of("exact", "tea"), completion_of("math", "x+1")
        ('tea', '\\boxed{x+1}')
    """
    return answer if verifier == "exact" else rf"\boxed{{{answer}}}"


def _without_contradictions(name: str, rows: Rows, verifier: str, ours: bool) -> Rows:
    """The rows without those whose prompt has two answers, which are refused in a file of the user's own."""
    first: dict[str, int] = {}
    twice: dict[str, int] = {}
    for index, row in enumerate(rows):
        prompt = json.dumps(row["prompt"])
        answers = row["answer"], rows[first.setdefault(prompt, index)]["answer"]
        if answers[0] != answers[1] and not VERIFIERS[verifier](completion_of(verifier, answers[0]), answers[1]):
            twice.setdefault(prompt, index)
    if not twice:
        return rows
    prompt, index = next(iter(twice.items()))
    line = (
        f"task {name!r}: rows {first[prompt] + 1} and {index + 1} have the same prompt and two answers, "
        f"{short(rows[first[prompt]]['answer'])!r} and {short(rows[index]['answer'])!r}"
    )
    if ours:
        raise ValueError(f"{line}; a prompt must have one answer: leave one row out")
    logger.warning("%s; the rows of %s such prompts are left out", line, len(twice))
    return [row for row in rows if json.dumps(row["prompt"]) not in twice]


def distinct(name: str, rows: Rows) -> Rows:
    """Return held-out rows without those that ask the same once more, with a warning that counts them."""
    kept = {json.dumps(row["prompt"]): row for row in reversed(rows)}
    if len(kept) < len(rows):
        logger.warning(
            "task %s: %s of %s held-out rows have the prompt of another row, and are left out",
            name,
            len(rows) - len(kept),
            len(rows),
        )
    return list(reversed(kept.values()))


def read_file(name: str, path: Path) -> Iterable[Any]:
    """Return the rows of JSON lines or Parquet.

    Raises:
        ValueError: a file that cannot be read, or a line that is no JSON object.
    """
    try:
        return _parquet(name, path) if path.suffix == ".parquet" else _json_lines(name, path)
    except OSError as error:
        raise ValueError(f"task {name!r}: {path} cannot be read: {error.strerror or error}; check the file") from None


def _parquet(name: str, path: Path) -> Iterable[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"task {name!r} needs pyarrow to read {path}, which is not installed; {EXTRA}") from None
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"task {name!r}: {path} is not Parquet: {one_line(error)}; write it again") from None


def _json_lines(name: str, path: Path) -> Iterable[Any]:
    try:
        # Windows writes a byte-order mark.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"task {name!r}: {path} is not UTF-8: {error}; save it as UTF-8") from None
    return [_object(name, path, i, line) for i, line in enumerate(lines, start=1) if line.strip()]


def _object(name: str, path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"task {name!r}: {path}, line {number}: {one_line(error)}; every line must be a JSON object"
        ) from None
    if not isinstance(row, dict):
        shown = short(line.strip())
        raise ValueError(f"task {name!r}: {path}, line {number}: got {shown}, must be a JSON object; one per line")
    return row
