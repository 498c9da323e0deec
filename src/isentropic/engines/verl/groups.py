"""What a sample's group knows: its reward, and how well the samples of its prompt did.

verl cuts a generated batch over ranks, mini-batches and micro-batches, and groups with it. Here they are put together
once, before the cut, and every sample takes its figures along.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch

from ...losses.advantages import group_distinct, group_rate, group_reward
from .compat import Engine, Keys, answer_hashes, groups_of, holds, padded


class OfGroup(NamedTuple):
    """What is known of a group: its rate, its mean reward, and the share of distinct answers among its right ones."""

    rate: float
    mean: float
    distinct: float


def by_group(samples: Iterable[tuple[Hashable, float, int]]) -> dict[Hashable, OfGroup]:
    """What is known of each group, by :mod:`isentropic.losses.advantages`; groups may differ in size.

    Args:
        samples: group, reward and hash of every sample of a generated batch; the reward is NaN if it was not scored.

    Example:
        >>> by_group([("a", 1.0, 7), ("b", 0.0, 7), ("a", 0.0, 8), ("a", 1.0, 7), ("a", 0.0, 9)])["a"]
        OfGroup(rate=0.5, mean=0.5, distinct=0.5)
    """
    members: dict[Hashable, list[tuple[float, int]]] = {}
    for group, reward, answer in samples:
        members.setdefault(group, []).append((reward, answer))
    size = max(map(len, members.values()))
    # What is missing in a smaller group does not count.
    table = [[*pairs, *[(math.nan, 0)] * (size - len(pairs))] for pairs in members.values()]
    rewards = torch.tensor([[reward for reward, _ in pairs] for pairs in table])
    answers = torch.tensor([[answer for _, answer in pairs] for pairs in table])
    columns = group_rate(rewards), group_reward(rewards), group_distinct(rewards, answers)
    rows = zip(*(column.view(-1, size)[:, 0].tolist() for column in columns), strict=True)
    return {name: OfGroup(*row) for name, row in zip(members, rows, strict=True)}


def attach_groups(engine: Engine, data: Any) -> None:
    """Attach the reward and what is known of the group to this rank's share of a generated batch, ``[b]``, in fp32.

    Groups are put together over the data-parallel ranks. Nothing is attached if the data holds no groups or no rewards.
    """
    names, key = groups_of(data), next((key for key in Keys.REWARDS if holds(data, key)), None)
    if names is None or key is None:
        return
    reward = padded(data[key]).sum(-1).float()
    group = engine.get_data_parallel_group()
    shares: list[Any] = [None] * torch.distributed.get_world_size(group)
    share = list(zip(names, reward.tolist(), answer_hashes(data), strict=True))
    torch.distributed.all_gather_object(shares, share, group)
    known = by_group(sample for share in shares for sample in share)
    columns = torch.tensor([known[name] for name in names], device=reward.device).unbind(1)
    data[Keys.REWARD] = reward
    data[Keys.GROUP_RATE], data[Keys.GROUP_REWARD], data[Keys.GROUP_DISTINCT] = columns
