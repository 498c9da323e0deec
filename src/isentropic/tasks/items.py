"""The items of reasoning-gym's generators and their scores. Needs reasoning-gym; scores are computed in a worker."""

import json
from functools import lru_cache
from typing import Any

import reasoning_gym


@lru_cache(maxsize=64)
def _dataset(generator: str, config: str, seed: int, size: int) -> Any:
    return reasoning_gym.create_dataset(generator, seed=seed, size=size, **json.loads(config))


@lru_cache(maxsize=100_000)
def item_of(generator: str, config: str, seed: int, size: int, index: int) -> Any:
    """Return one item: question, answer and metadata.

    Args:
        generator: its name.
        config: its options, as JSON.
        seed, size: of the data set; some generators draw all ``size`` items at once.
        index: of the item.

    Example:
        >>> item_of("gcd", '{"max_value": 9}', 0, 1, 0)["answer"].isdigit()
        True
    """
    return _dataset(generator, config, seed, size)[index]


def score(generator: str, config: str, seed: int, size: int, index: int, answer: str) -> float:
    """Return the generator's score of an answer to its item, in [0, 1].

    Args:
        generator, config, seed, size, index: of the item.
        answer: stripped; for a trailing space some generators give half the score.
    """
    dataset = _dataset(generator, config, seed, size)
    return float(dataset.score_answer(answer, item_of(generator, config, seed, size, index)))
