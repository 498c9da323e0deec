"""What is checked of a task's rows before a run: nothing held out is trained on, and no constant answer wins."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from . import Task

logger = logging.getLogger("isentropic")
CANDIDATES = 3
CONSTANT_ROWS = 200
EASY = 0.3


def mark(prompt: Any) -> str:
    """Return the hash of what is asked; spaces and the case of letters make no difference.

    Example:
        >>> mark("One  apple?") == mark("one apple?\\n"), mark("1") == mark("2")
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
    heldout = {mark(each.asked(row)) for each in (task, *others) for row in each.heldout()}
    kept = [row for row in rows if mark(task.asked(row)) not in heldout]
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
    """Return the best constant answer and the share of rows that it gets right; None where no right answer is known.

    What is tried: the most frequent right answers, and no answer at all.

    Args:
        task: whose verifier judges.
        rows: held-out ones; of many, the first 200 count.

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
    """Return the line about the best constant answer that a run prints, and warn where it is too good."""
    found = best_constant(task, rows)
    if found is None:
        return None
    answer, score = found
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
