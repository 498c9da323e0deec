"""What a sample's group knows: its reward, and how well the samples of its prompt did.

verl cuts a generated batch over ranks, mini-batches and micro-batches, and groups with it. Here they are put together
once, before the cut, and every sample takes its figures along.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any

import torch

from ...losses.advantages import group_rate
from .compat import Engine, Keys, groups_of, holds, padded


def rates(samples: Iterable[tuple[Hashable, float]]) -> dict[Hashable, float]:
    """The rate of each group, by :func:`~isentropic.losses.advantages.group_rate`; groups may differ in size.

    Args:
        samples: group and reward of every sample of a generated batch; NaN if it was not scored.

    Example:
        >>> rates([("a", 1.0), ("b", 0.0), ("a", 0.0), ("a", 1.0), ("a", 0.0)])
        {'a': 0.5, 'b': 0.0}
    """
    members: dict[Hashable, list[float]] = {}
    for group, reward in samples:
        members.setdefault(group, []).append(reward)
    size = max(len(rewards) for rewards in members.values())
    # What is missing in a smaller group does not count.
    table = [[*rewards, *[math.nan] * (size - len(rewards))] for rewards in members.values()]
    of_samples = group_rate(torch.tensor(table)).reshape(-1, size)
    return dict(zip(members, of_samples[:, 0].tolist(), strict=True))


def attach_groups(engine: Engine, data: Any) -> None:
    """Attach reward and group rate to this rank's share of a generated batch, ``[b]`` each, in fp32.

    Groups are put together over the data-parallel ranks. Nothing is attached if the data holds no groups or no rewards.
    """
    names, key = groups_of(data), next((key for key in Keys.REWARDS if holds(data, key)), None)
    if names is None or key is None:
        return
    reward = padded(data[key]).sum(-1).float()
    group = engine.get_data_parallel_group()
    shares: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(shares, list(zip(names, reward.tolist(), strict=True)), group)
    by_group = rates(sample for share in shares for sample in share)
    data[Keys.REWARD] = reward
    data[Keys.GROUP_RATE] = torch.tensor([by_group[name] for name in names], device=reward.device)
