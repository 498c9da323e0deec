"""Any of reasoning-gym's generators as a task: `rg:NAME[:option=value...]`, scored by the generator itself.

Options are the generator's own, and ours: `prompt` (few-shot or chat), `shots`, `rows`, `heldout`, `tokens`.

Some generators evaluate the text that the model wrote, one of them by Python's `eval`: they score in a worker process
with a time limit and a memory limit, which is not a sandbox. A few give points for nonsense: right is a score of 0.99
or more.
"""

import json
import re
from dataclasses import fields
from typing import Any

from ..control.names import suggest
from . import Task
from .quantities import number
from .spec import require, resolve, split
from .worker import ask

OPTIONS: dict[str, Any] = {
    "prompt": ("few-shot", "chat"),
    "shots": 4,
    "rows": 2000,
    "heldout": 200,
    "tokens": 0,
}
RIGHT = 0.99
MAX_ANSWER = 20_000  # characters
# Item i of a generator is drawn by seed + i: the ranges that start here must not overlap, for any training seed.
HELDOUT_SEED, SHOTS_SEED, TRAIN_SEED = 0, 500_000, 1_000_000
MAX_ROWS = 400_000
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def load(rest: str, name: str) -> Task:
    """Return the task of `rg:NAME:option=value...`; the generator is created once, which checks its options.

    Args:
        rest: the name after `rg:`.
        name: the whole name, which is the task's.

    Raises:
        ValueError: no reasoning-gym, no such generator, an option that it does not have, or a value that it refuses.
    """
    require(name, ["reasoning_gym"])
    words, options = split(rest)
    if len(words) != 1 or not words[0]:
        raise ValueError(f"task {name!r} must be rg:GENERATOR[:option=value...], got {len(words)} words after rg")
    ours = resolve(name, {k: v for k, v in options.items() if k in OPTIONS}, OPTIONS)
    for key in ("rows", "heldout"):
        if not 1 <= ours[key] <= MAX_ROWS:
            raise ValueError(f"task {name!r}: {key}: got {ours[key]}, must be from 1 to {MAX_ROWS}")
    config = {k: v for k, v in options.items() if k not in OPTIONS}
    _check(name, words[0], config)
    return _task(name, words[0], json.dumps(config), ours)


def _check(name: str, generator: str, config: dict[str, Any]) -> None:
    from reasoning_gym.factory import DATASETS, create_dataset

    if generator not in DATASETS:
        raise ValueError(
            f"task {name!r}: reasoning-gym has no generator {generator!r}{suggest(generator, DATASETS)}; "
            "`isentropic tasks` lists them"
        )
    known = [f.name for f in fields(DATASETS[generator][1]) if f.name not in ("seed", "size")]
    for key in config:
        if key not in known:
            raise ValueError(
                f"task {name!r}: unknown option {key!r}{suggest(key, [*known, *OPTIONS])}; of the generator: "
                f"{', '.join(known)}; of the task: {', '.join(OPTIONS)}"
            )
    try:
        create_dataset(generator, seed=0, size=1, **config)[0]
    except (AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"task {name!r}: the generator refuses its options: {error}") from error


def _task(name: str, generator: str, config: str, ours: dict[str, Any]) -> Task:
    from .items import item_of

    chat = ours["prompt"] == "chat"
    shots = [item_of(generator, config, SHOTS_SEED, ours["shots"], i) for i in range(0 if chat else ours["shots"])]
    for item in shots:
        if "\n" in str(item["answer"]):
            raise ValueError(
                f"task {name!r}: answers have several lines, and a few-shot completion ends with its line; "
                "use prompt=chat"
            )
    prefix = "".join(f"Question: {item['question']}\nAnswer: {item['answer']}\n\n" for item in shots)
    used = {item["question"] for item in shots}

    def rows(seed: int, num: int) -> list[dict[str, Any]]:
        chosen = []
        for index in range(num):
            item = item_of(generator, config, seed, num, index)
            if item["question"] not in used:
                prompt = _chat(item["question"]) if chat else f"{prefix}Question: {item['question']}\nAnswer:"
                chosen.append({"prompt": prompt, "answer": str(item["answer"]), "item": [seed, num, index]})
        return chosen

    def verify(completion: str, item: list[int]) -> bool:
        answer = _answer(completion, chat)
        if not answer or len(answer) > MAX_ANSWER:
            return False
        score = ask("isentropic.tasks.items:score", generator, config, *item, answer)
        return score is not None and score >= RIGHT

    return Task(
        name=name,
        description=f"reasoning-gym's {generator}, {ours['prompt']}.",
        train=lambda seed: rows(TRAIN_SEED * (seed + 1), ours["rows"]),
        heldout=lambda: rows(HELDOUT_SEED, ours["heldout"]),
        verify=verify,
        normalise=lambda completion: _canonical(_answer(completion, chat)),
        max_completion_length=ours["tokens"] or (512 if chat else 32),
        stop="" if chat else "\n",
        gold=lambda row: f"<answer>{row['answer']}</answer>" if chat else f" {row['answer']}",
    )


def _chat(question: str) -> list[dict[str, str]]:
    text = f"{question}\n\nThink it over, then give the final answer alone between <answer> and </answer>."
    return [{"role": "user", "content": text}]


def _answer(completion: str, chat: bool) -> str:
    """The answer alone: the first line, or in a chat the text between the last pair of marks; empty without one."""
    if not chat:
        return completion.partition("\n")[0].strip()
    answers = _ANSWER.findall(completion[-100_000:])
    return answers[-1].strip() if answers else ""


def _canonical(answer: str) -> str:
    """One text for all spellings of a number, such as 5, 5. and 5.0."""
    value = number(answer)
    return " ".join(answer.split()) if value is None else str(value)


def names() -> list[str]:
    """Return the names of all generators."""
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)
