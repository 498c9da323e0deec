"""What a sample takes along through verl's cuts: what its group knows, and how far its weights are behind.

verl cuts a generated batch over ranks, mini-batches and micro-batches, and groups with it. Here they are put together
once, before the cut: the reward of each sample, how well the samples of its prompt did, and its lead.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch

from ...losses.advantages import group_distinct, group_rate, group_repeats, group_reward
from .compat import Engine, Keys, answer_hashes, groups_of, holds, padded, versions_of


class OfGroup(NamedTuple):
    """What is known of a group: its rate, its mean reward, the share of distinct answers among its right ones, and the
    chance that two of these are the same.
    """

    rate: float
    mean: float
    distinct: float
    repeats: float


def by_group(samples: Iterable[tuple[Hashable, float, int]]) -> dict[Hashable, OfGroup]:
    """What is known of each group, by :mod:`isentropic.losses.advantages`; groups may differ in size.

    Args:
        samples: group, reward and hash of every sample of a generated batch; the reward is NaN if it was not scored.

    Example:
        >>> by_group([("a", 1.0, 7), ("b", 0.0, 7), ("a", 0.0, 8), ("a", 1.0, 7), ("a", 0.0, 9)])["a"]
        OfGroup(rate=0.5, mean=0.5, distinct=0.5, repeats=1.0)
    """
    members: dict[Hashable, list[tuple[float, int]]] = {}
    for group, reward, answer in samples:
        members.setdefault(group, []).append((reward, answer))
    size = max(map(len, members.values()))
    # What is missing in a smaller group does not count.
    table = [[*pairs, *[(math.nan, 0)] * (size - len(pairs))] for pairs in members.values()]
    rewards = torch.tensor([[reward for reward, _ in pairs] for pairs in table])
    answers = torch.tensor([[answer for _, answer in pairs] for pairs in table])
    of_right = group_distinct(rewards, answers), group_repeats(rewards, answers)
    columns = group_rate(rewards), group_reward(rewards), *of_right
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
    of_answers = (Keys.GROUP_DISTINCT, Keys.GROUP_REPEATS) if holds(data, Keys.ANSWERS) else ()
    for key, column in zip((Keys.GROUP_RATE, Keys.GROUP_REWARD, *of_answers), columns, strict=False):
        data[key] = column


def attach_lead(data: Any, step: int, sent: dict[int, int]) -> None:
    """Attach the optimizer steps between the weights that sampled each answer and those of now, ``[b]``, in fp32.

    It is 0 if the trainer samples with the newest weights. Nothing is attached if the data holds no versions.

    Args:
        data: this rank's share of a generated batch.
        step: optimizer steps done.
        sent: those done when each version of the weights went to the sampler.
    """
    versions = versions_of(data)
    if versions is None or not sent:
        return
    # A version from before a resume is not known: it is as old as the oldest that is, or older.
    oldest = min(sent.values())
    numbers = {version for version in versions if version is not None}
    known = {n: max((at for version, at in sent.items() if version <= n), default=oldest) for n in numbers}
    leads = [0.0 if version is None else float(step - known[version]) for version in versions]
    data[Keys.LEAD] = torch.tensor(leads, device=data[Keys.ADV].device)
