"""Checks of a task's rows before a run: nothing held out is trained on, and no constant answer wins."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from . import Task

logger = logging.getLogger("isentropic")
CANDIDATES = 3  # right answers that are tried as constants
CONSTANT_ROWS = 200
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
            f"task {task.name!r}: all {len(rows)} rows to train on are held out too, nothing is left; give other rows"
        )
    if len(kept) < len(rows):
        logger.warning(
            "task %s: %s of %s rows to train on are held out too, and are left out",
            task.name,
            len(rows) - len(kept),
            len(rows),
        )
    return kept


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
