"""Masked sums with their counts, and the only normalisers of the library.

Every aggregate travels as a (sum, count) pair, so that micro-batches, gradient accumulation and ranks add up to
exactly what one large batch would have given: add the sums, add the counts, divide once at the end.

A mask says *which* entries count: any non-zero entry does. Weights belong in the values. Entries outside the mask may
have any value, NaN and infinities included; they affect neither the value nor the gradient.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


class SumCount(NamedTuple):
    """A sum and the number of summands, both 0-d tensors of the same floating dtype.

    >>> SumCount(torch.tensor(6.0), torch.tensor(4.0)).mean()
    tensor(1.5000)
    """

    sum: Float[Tensor, ""]
    count: Float[Tensor, ""]

    def mean(self) -> Float[Tensor, ""]:
        """Return ``sum / count``, and 0 with a zero gradient if the count is 0.

        An empty micro-batch thus adds nothing to a loss. For an entropy *reading* a count of 0 is an error: code that
        reads it checks ``count`` and refuses it.

        >>> SumCount(torch.tensor(0.0), torch.tensor(0.0)).mean()
        tensor(0.)
        """
        return self.sum / torch.where(self.count > 0, self.count, torch.ones_like(self.count))


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype that sums over tokens are kept in: float64 if the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def merge(*pairs: SumCount) -> SumCount:
    """Add up pairs from micro-batches or ranks.

    ``(Σᵢ sumᵢ, Σᵢ countᵢ)``

    A loss accumulated over micro-batches divides each sum by the merged count: ``Σᵢ sumᵢ / Σⱼ countⱼ``.

    Args:
        pairs: one or more pairs, in the unit of their sums.

    Returns:
        The pair that one call on all the data would have given.

    Raises:
        ValueError: no pair is given; an empty sum would have no device.

    >>> one, two = SumCount(torch.tensor(1.0), torch.tensor(1.0)), SumCount(torch.tensor(5.0), torch.tensor(3.0))
    >>> merge(one, two).mean()
    tensor(1.5000)
    """
    if not pairs:
        raise ValueError("merge needs at least one pair, got none; start from the pair of the first micro-batch")
    total = pairs[0]
    for pair in pairs[1:]:
        total = SumCount(total.sum + pair.sum, total.count + pair.count)
    return total


def _masked(x: Float[Tensor, "b t"], mask: Shaped[Tensor, "b t"]) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]:
    """Return x with zeros outside the mask, and the mask as numbers, both at least in fp32."""
    inside = mask.bool()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(inside, x, torch.zeros_like(x)), inside.to(x.dtype)


def token(x: Float[Tensor, "b t"], mask: Shaped[Tensor, "b t"]) -> SumCount:
    """Sum over tokens and count tokens: every token weighs the same.

    ``(Σ_bt x·m, Σ_bt m)``

    Args:
        x: [b t] values, in any unit.
        mask: [b t] non-zero where the token counts.

    Returns:
        The sum in the unit of x and the number of tokens, in fp32, or in float64 if x is.

    DAPO's token-level loss (arXiv:2503.14476).

    >>> x = torch.tensor([[1.0, 2.0, 3.0], [6.0, float("nan"), 0.0]])
    >>> token(x, torch.tensor([[1, 1, 1], [1, 0, 0]])).mean()
    tensor(3.)
    """
    masked, inside = _masked(x, mask)
    return SumCount(masked.sum(), inside.sum())


def sequence(x: Float[Tensor, "b t"], mask: Shaped[Tensor, "b t"]) -> SumCount:
    """Sum the token means of the sequences and count the sequences: every sequence weighs the same.

    ``(Σ_b (Σ_t x·m) / max(Σ_t m, 1), b)``

    A sequence without tokens adds 0 to the sum and 1 to the count, as in TRL's ``grpo`` loss. The caller must therefore
    leave out filler rows that are not sequences.

    Args:
        x: [b t] values, in any unit.
        mask: [b t] non-zero where the token counts.

    Returns:
        The sum in the unit of x and the number of sequences, empty ones included.

    GRPO's loss (arXiv:2402.03300).

    >>> x = torch.tensor([[1.0, 2.0, 3.0], [6.0, float("nan"), 0.0]])
    >>> sequence(x, torch.tensor([[1, 1, 1], [1, 0, 0]])).mean()
    tensor(4.)
    """
    masked, inside = _masked(x, mask)
    means = masked.sum(dim=1) / inside.sum(dim=1).clamp(min=1.0)
    return SumCount(means.sum(), torch.ones_like(means.detach()).sum())


def constant(x: Float[Tensor, "b t"], mask: Shaped[Tensor, "b t"], length: int | float) -> SumCount:
    """Divide the sum over tokens by a fixed length and count the sequences: response lengths do not weigh tokens.

    ``((Σ_bt x·m) / length, b)``

    Args:
        x: [b t] values, in any unit.
        mask: [b t] non-zero where the token counts.
        length: tokens; commonly the longest response allowed.

    Returns:
        The sum in the unit of x and the number of sequences, empty ones included.

    Raises:
        ValueError: length is not positive.

    Dr. GRPO's loss (arXiv:2503.20783).

    >>> x = torch.tensor([[1.0, 2.0, 3.0], [6.0, float("nan"), 0.0]])
    >>> constant(x, torch.tensor([[1, 1, 1], [1, 0, 0]]), length=4).mean()
    tensor(1.5000)
    """
    if not length > 0:
        raise ValueError(f"length must be > 0 tokens, got {length}; give the longest response allowed")
    masked, _ = _masked(x, mask)
    return SumCount(masked.sum() / length, masked.detach().new_ones(masked.shape[0]).sum())
