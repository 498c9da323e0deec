"""The values that cross packages, and the axis legend that every signature uses.

Axes: ``b`` sequences, ``t`` response tokens, ``v`` vocabulary, ``p`` prompts, ``g`` samples per prompt, ``d`` hidden.
Units: log-probabilities and entropies are in nats, the unit of the natural logarithm. This module imports no torch:
controllers and the command line need an :class:`EntropyReading` and nothing heavier.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class TokenBatch(NamedTuple):
    """The input of an objective: per-token facts of the sampled tokens.

    Attributes:
        logp: ``[b t]`` log-probabilities under the current policy, with gradient, nats.
        logp_old: ``[b t]`` log-probabilities when the tokens were sampled; ``None`` means exactly on-policy
            (``logp`` without its gradient is used).
        adv: ``[b t]``, ``[b 1]`` or ``[b]`` advantages.
        mask: ``[b t]`` 1 where the policy generated the token, 0 for padding and environment tokens.
        entropy: ``[b t]`` entropy of the row each token was sampled from, nats; needed only by centred shapings, by
            selections that use it and by an entropy bonus.
        entropy_old: ``[b t]`` entropy of the same rows when the tokens were sampled, nats; ``None`` means that they
            have not changed.
        logp_rows: ``[b t v]`` log-probabilities of the whole rows under the current policy, with gradient, nats; needed
            only by penalties that use more than the sampled token.
        reward: ``[b]`` reward of each completion, NaN if it was not scored; needed only by components that name it.
        group_rate: ``[b]`` how well the samples of its prompt did, in [0, 1]: the share of right answers if all rewards
            are 0 or 1, else the mean reward scaled by the group's range (``losses.advantages.group_rate``).
        group_reward: ``[b]`` mean reward of the samples of its prompt.
        group_distinct: ``[b]`` distinct right answers among the samples of its prompt, as a share of the right ones;
            NaN if none is right.
        group_repeats: ``[b]`` the chance that two of these right answers are the same; NaN if fewer than two are right.
    """

    logp: Tensor
    logp_old: Tensor | None
    adv: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    entropy_old: Tensor | None = None
    logp_rows: Tensor | None = None
    reward: Tensor | None = None
    group_rate: Tensor | None = None
    group_reward: Tensor | None = None
    group_distinct: Tensor | None = None
    group_repeats: Tensor | None = None


class TokenFacts(NamedTuple):
    """Per-token facts an objective reports beside its loss, all ``[b t]``.

    Attributes:
        ratio: importance ratio ``π_new/π_old`` as the objective used it (a sequence ratio is repeated along ``t``).
        clipped_low: true where ``A < 0`` and the lower bound removed the gradient.
        clipped_high: true where ``A > 0`` and the upper bound removed (or capped) the gradient.
        outside: true where the ratio lies outside the bounds, for either sign of A; ``None`` means clipped low or high.
    """

    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    outside: Tensor | None = None


class TokenStats(NamedTuple):
    """The statistics of a sampled token a and its row π that predict the entropy change, ``[...]``, fp32 or float64.

    The three moments come together; they are None if only the first two were computed.

    Attributes:
        logp: ``log π(a)``, nats.
        entropy: ``H = −Σ_v π log π``, nats.
        sum_p2: ``Σ_v π²``, the probability that two draws agree.
        sum_p2_logp: ``Σ_v π² log π``, nats.
        sum_p2_logp2: ``Σ_v π² log² π``, nats².
    """

    logp: Tensor
    entropy: Tensor
    sum_p2: Tensor | None = None
    sum_p2_logp: Tensor | None = None
    sum_p2_logp2: Tensor | None = None


class GroupFacts(NamedTuple):
    """Facts about the groups of a step, the samples of one prompt: sums over completions and tokens, on all ranks.

    Plain numbers; 0-d tensors while the step runs.

    ``L = log π + H`` is the centred log-probability of a sampled token, nats.

    Attributes:
        completions: number of completions whose group is known.
        failed, solved: those whose group has no right answer, and those whose group has no wrong one.
        rate: Σ of the groups' success rates.
        reward: Σ of the rewards.
        right, distinct: completions whose group has a right answer, and Σ over them of the share of distinct answers
            among the right ones.
        paired, repeats: completions whose group has two right answers or more, and Σ over them of the chance that two
            of these are the same.
        pull: Σ (reward − mean of the group)·L over the tokens of groups that are neither failed nor solved.
        spread: Σ L² over the same tokens, nats².
        failing_entropy, failing_tokens: Σ (1 − ρ)·H and Σ (1 − ρ) over all tokens, ρ the success rate of the group.
        held_out, held_out_count: right answers and answers of an evaluation on held-out prompts since the last step.
    """

    completions: Any = 0.0
    failed: Any = 0.0
    solved: Any = 0.0
    rate: Any = 0.0
    reward: Any = 0.0
    right: Any = 0.0
    distinct: Any = 0.0
    paired: Any = 0.0
    repeats: Any = 0.0
    pull: Any = 0.0
    spread: Any = 0.0
    failing_entropy: Any = 0.0
    failing_tokens: Any = 0.0
    held_out: Any = 0.0
    held_out_count: Any = 0.0

    @property
    def mixed(self) -> Any:
        """Completions whose group has right and wrong answers."""
        return self.completions - self.failed - self.solved


class EntropyReading(NamedTuple):
    """The entropy of one optimizer step: (sum, count) over every token the policy generated, on all ranks.

    Attributes:
        sum: Σ H over tokens, nats.
        count: number of tokens.
        estimator: ``exact`` (H of each row) or ``sampled`` (−log p of the sampled token).
        temperature: the sampling temperature the rows were scaled with.
        dtype: dtype of the arithmetic, for example ``float32``.
        tokens: the token set; a controller may use ``generated`` only.
        predicted: Σ over optimizer steps of the predicted entropy change, nats per token, as
            ``entropy.prediction`` computes it, times the learning rate.
        gain: Σ over the same steps of its derivative by the controlled knob.
        steps: number of optimizer steps with a prediction; 0 if none was predicted.
        rate: learning rate of the step, the same on every rank; ``None`` if it is not known or stays the same. What a
            knob can move falls with it, and controllers allow for that.
        groups: facts about the groups; ``None`` if the engine has none.

    Example:
        >>> EntropyReading(sum=6.0, count=4.0).mean
        1.5
        >>> EntropyReading(sum=6.0, count=4.0, rate=0.1)
        EntropyReading(sum=6.0, count=4.0, rate=0.1)
        >>> EntropyReading(sum=0.0, count=4.0).problem()
        'entropy is exactly 0 over 4 tokens; expected a positive number of nats: the head did not deliver entropies'
    """

    sum: float
    count: float
    estimator: str = "exact"
    temperature: float = 1.0
    dtype: str = "float32"
    tokens: str = "generated"
    predicted: float = 0.0
    gain: float = 0.0
    steps: int = 0
    rate: float | None = None
    groups: GroupFacts | None = None

    @property
    def mean(self) -> float:
        """Mean entropy, nats per token; NaN if no token was counted."""
        return self.sum / self.count if self.count > 0 else math.nan

    def __repr__(self) -> str:
        """The fields that differ from their defaults."""
        plain = type(self)(self.sum, self.count)
        more = {name: value for name, value in self._asdict().items() if value != getattr(plain, name)}
        shown = {"sum": self.sum, "count": self.count, **more}
        return f"EntropyReading({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def problem(self) -> str | None:
        """The reason why this reading must not move a knob, or ``None`` if it may."""
        if not self.count > 0:
            return f"entropy was read over {self.count:g} tokens; expected at least 1: every token is masked"
        if not math.isfinite(self.sum):
            return f"entropy is {self.sum} over {self.count:g} tokens; expected a finite number: check the logits"
        if self.sum == 0.0:
            return (
                f"entropy is exactly 0 over {self.count:g} tokens; expected a positive number of nats: "
                "the head did not deliver entropies"
            )
        if self.sum < 0.0 and self.estimator == "exact":
            return f"entropy is negative ({self.mean:g} nats per token); expected >= 0: the head's arithmetic is wrong"
        return None

    def __add__(self, other: EntropyReading) -> EntropyReading:  # type: ignore[override]
        """Add two readings of the same kind: sums and counts add up."""
        return self._replace(
            sum=self.sum + other.sum,
            count=self.count + other.count,
            predicted=self.predicted + other.predicted,
            gain=self.gain + other.gain,
            steps=self.steps + other.steps,
            groups=_added(self.groups, other.groups),
        )


def _added(one: GroupFacts | None, other: GroupFacts | None) -> GroupFacts | None:
    if one is None or other is None:
        return one or other
    return GroupFacts(*(a + b for a, b in zip(one, other, strict=True)))
