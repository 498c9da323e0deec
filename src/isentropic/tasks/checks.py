"""Checks of a task's rows before a run: nothing held out is trained on, every answer can be right, and no constant
answer wins."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import Task
from .spec import short, users_code
from .verifiers import VERIFIERS

logger = logging.getLogger("isentropic")
CANDIDATES = 3  # right answers that are tried as constants
CONSTANT_ROWS = 200
GOLD_ROWS = 32  # whose right completion is tried; of a file or a data set, all are
EASY = 0.3  # a constant answer that is right more often is worth a warning


def prompt_hash(prompt: Any) -> str:
    """Return the hash of a prompt, for which white space and the case of letters make no difference.

    Example:
        >>> prompt_hash("One  apple?") == prompt_hash("one apple?\\n"), prompt_hash("1") == prompt_hash("2")
        (True, False)
    """
    text = prompt if isinstance(prompt, str) else json.dumps([m.get("content") for m in prompt], ensure_ascii=False)
    return hashlib.sha256(" ".join(text.casefold().split()).encode(errors="surrogatepass")).hexdigest()


def training_rows(task: Task, seed: int, others: Iterable[Task] = ()) -> list[dict[str, Any]]:
    """Return the rows to train on, without those whose prompt is held out, here or by other tasks of the run.

    Raises:
        ValueError: nothing is left.
    """
    rows = task.train(seed)
    heldout = {prompt_hash(other.question(row)) for other in (task, *others) for row in other.heldout()}
    kept = [row for row in rows if prompt_hash(task.question(row)) not in heldout]
    if not kept:
        raise ValueError(
            f"task {task.name!r}: all {len(rows)} training rows are held out too, and none is left; give other rows"
        )
    if len(kept) < len(rows):
        logger.warning(
            "task %s: %s of %s training rows are held out too, and are left out",
            task.name,
            len(rows) - len(kept),
            len(rows),
        )
    name_wrong_gold(task, kept)
    return kept


def own_rows(name: str, function: Callable[..., Any], *args: Any) -> list[dict[str, Any]]:
    """Return the rows of a task that a user wrote, once they are known to be rows.

    Args:
        name: of the task.
        function: its `train` or `heldout`.
        args: of the function.

    Raises:
        ValueError: the function raises, or returns anything but dicts with a prompt; in one line.
    """
    with users_code(name):
        rows = list(function(*args))
    for number, row in enumerate(rows, start=1):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        chat = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "content" in m for m in prompt)
        if not isinstance(prompt, str) and not chat:
            got = type(row).__name__ if not isinstance(row, dict) else f"the prompt {short(repr(prompt))}"
            raise ValueError(
                f"task {short(name)!r}: row {number}: got {got}, must be a dict with a prompt, a text or a list of "
                "messages; return such rows"
            )
    return rows


def name_wrong_gold(task: Task, rows: Sequence[dict[str, Any]]) -> None:
    """Warn of a row whose right completion the task's own verifier refuses; 32 rows are tried, evenly spread.

    The rows of files and data sets are all tried as they are read: see `rows.task_rows`.
    """
    if task.gold is None or not rows or task.verify in VERIFIERS.values():
        return
    for index in range(0, len(rows), max(1, len(rows) // GOLD_ROWS)):
        row = rows[index]
        columns = {key: [value] for key, value in row.items() if key != "prompt"}
        completion = task.gold(row)
        if not task.reward([completion], prompts=[row["prompt"]], **columns)[0]:
            logger.warning(
                "task %s: the right completion %r is wrong by its own verifier, for the row with the prompt %r; "
                "correct gold or verify, or leave the row out",
                task.name,
                short(completion),
                short(row["prompt"]),
            )
            return


def best_constant(task: Task, rows: Sequence[dict[str, Any]]) -> tuple[str, float] | None:
    """Return the best constant answer and the share of rows for which it is right; None if no right answer is known.

    The most frequent right answers are tried, and the empty answer.

    Args:
        task: whose verifier judges.
        rows: held-out ones; the first 200 are used.

    Example:
        >>> rows = [{"prompt": "1+1=", "sum": "2"}, {"prompt": "2+0=", "sum": "2"}, {"prompt": "1+2=", "sum": "3"}]
        >>> same = lambda completion, sum: completion == sum
        >>> best_constant(Task("sums", "", lambda s: rows, lambda: rows, same, str, 2, gold=lambda r: r["sum"]), rows)
        ('2', 0.6666666666666666)
    """
    if task.gold is None or not rows:
        return None
    rows = rows[:CONSTANT_ROWS]
    common = Counter(task.gold(row) for row in rows).most_common(CANDIDATES)
    scores = []
    for answer in ["", *(answer for answer, _ in common)]:
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        right = task.reward([answer] * len(rows), prompts=[row["prompt"] for row in rows], **columns)
        scores.append((sum(right) / len(rows), answer))
    score, answer = max(scores, key=lambda pair: pair[0])
    return answer, score


def constant_line(task: Task, rows: Sequence[dict[str, Any]]) -> str | None:
    """Return the line about the best constant answer that a run prints, and warn if it is too good."""
    name_wrong_gold(task, rows)
    best = best_constant(task, rows)
    if best is None:
        return None
    answer, score = best
    shown = answer.strip() if len(answer.strip()) <= 40 else f"{answer.strip()[:37]}..."
    if score > EASY:
        logger.warning(
            "task %s: always answering %r is right on %.0f%% of the held-out rows; a policy can learn that instead of "
            "the task",
            task.name,
            shown,
            100 * score,
        )
    return f"best constant answer {shown!r}: {score:.2f} of the held-out rows of {task.name}"
