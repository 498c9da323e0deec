"""Facts about the groups of a step: sums over its completions and tokens, for targets that go by more than entropy."""

from __future__ import annotations

import torch

from ..losses.reduce import sum_dtype
from ..types import GroupFacts, TokenBatch


def group_sums(
    batch: TokenBatch, held_out: tuple[float, float] = (0.0, 0.0), weight: torch.Tensor | None = None
) -> GroupFacts:
    """What a micro-batch adds to the group facts of its step, as 0-d tensors and without a synchronisation.

    All are 0 if the batch has no rewards or no groups. Tokens whose entropy or log-probability is broken count in no
    sum over tokens.

    Args:
        batch: ``logp``, ``mask`` and ``entropy``, ``[b t]``, without gradients; ``reward``, ``group_rate``,
            ``group_reward``, ``group_distinct`` and ``group_repeats``, ``[b]``, as far as they are known.
        held_out: right answers and answers of an evaluation that no step has counted yet.
        weight: ``[b]`` how much each answer counts; None is 1.

    Example:
        >>> import torch
        >>> logp, one = torch.tensor([[-2.0], [-1.0]]), torch.ones(2, 1)
        >>> batch = TokenBatch(logp, None, one, one, one, reward=torch.tensor([0.0, 1.0]))
        >>> facts = group_sums(batch._replace(group_rate=torch.full((2,), 0.5), group_reward=torch.full((2,), 0.5)))
        >>> float(facts.mixed), float(facts.pull), float(facts.spread)  # L is −1 for the wrong one, 0
        (2.0, 0.5, 1.0)
    """
    kind, device = sum_dtype(batch.logp.device), batch.logp.device
    # Filled on the device: a copy of a number from the host would wait for it.
    told = [torch.full((), value, dtype=kind, device=device) for value in held_out]
    if batch.reward is None or batch.group_rate is None or batch.entropy is None:
        zero = torch.zeros((), dtype=kind, device=device)
        return GroupFacts(*[zero] * (len(GroupFacts._fields) - 2), *told)
    inside = batch.mask.bool()
    reward, rate = batch.reward.to(kind), batch.group_rate.to(kind)
    # An answer that is masked whole, as rows that fill a batch up are, belongs to no group.
    known = inside.any(1) & reward.isfinite()
    failed, solved = known & (rate <= 0), known & (rate >= 1)
    by_answer = [known, failed, solved, rate * known, _where(known, reward)]
    for of_right in (batch.group_distinct, batch.group_repeats):
        share = torch.full_like(rate, torch.nan) if of_right is None else of_right.to(kind)
        counted = known & share.isfinite()
        by_answer += [counted, _where(counted, share)]
    mean = reward if batch.group_reward is None else batch.group_reward.to(kind)
    centred = (batch.logp + batch.entropy).to(kind)
    usable = inside & centred.isfinite() & known[:, None]
    mixed = usable & ~(failed | solved)[:, None]
    failing = (1 - rate)[:, None] * usable
    by_token = [
        _where(mixed, (reward - mean)[:, None] * centred),
        _where(mixed, centred.square()),
        _where(usable, failing * batch.entropy.to(kind)),
        failing,
    ]
    if weight is not None:
        by_answer, by_token = [x * weight for x in by_answer], [x * weight[:, None] for x in by_token]
    sums = [x.sum(dtype=kind) for x in (*by_answer, *by_token)]
    return GroupFacts(*sums, *told)


def _where(inside: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.where(inside, x, torch.zeros_like(x))


def group_row(facts: GroupFacts | None, tokens: float) -> dict[str, float]:
    """The facts of a step, over all ranks, as fields of its row; what is not known is absent.

    Args:
        facts: sums.
        tokens: generated tokens of the step.

    Example:
        >>> from isentropic.types import GroupFacts
        >>> group_row(GroupFacts(completions=8, failed=4, solved=2, pull=1.0, spread=4.0), tokens=24)["price/nat"]
        0.75
    """
    if facts is None or not facts.completions:
        return {}
    n = facts.completions
    row = {f"group/{name}_frac": getattr(facts, name) / n for name in ("failed", "mixed", "solved")}
    if facts.right:
        row["group/distinct_frac"] = facts.distinct / facts.right
    if facts.paired:
        row["group/repeats_frac"] = facts.repeats / facts.paired
    if facts.spread:
        row["price/nat"] = facts.pull / facts.spread * tokens / n
    if facts.failing_tokens:
        row["entropy/failing"] = facts.failing_entropy / facts.failing_tokens
    return row
