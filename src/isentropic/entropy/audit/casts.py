"""The effect of rounding one step of the head on log-probs, importance ratios and entropy.

Errors are measured against the dtype of the arithmetic, float64 for a reference. Theorem 3 of arXiv:2603.11682
[paper]: ratios from bf16 log-probabilities are biased upwards. With a rounding error e of the log-ratio,
``E[exp e] ≈ 1 + Var(e)/2`` [derived].
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PLACES = ("hidden", "weights", "logits", "log_softmax", "logp")
WIDTHS = (0.1, 0.2, 0.28)
GSPO_BAND = (-3e-4, 4e-4)


def rounded(x: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Round x to the values that dtype represents, and return it in its own dtype.

    >>> rounded(torch.tensor([1.001, 20.03]), torch.bfloat16)
    tensor([ 1., 20.])
    """
    return x.to(dtype).to(x.dtype)


def half_ulp(x: float, dtype: torch.dtype) -> float:
    """The largest rounding error of a number of x's size.

    >>> half_ulp(20.0, torch.bfloat16), half_ulp(20.0, torch.float16)
    (0.0625, 0.0078125)
    """
    return 2.0 ** math.floor(math.log2(abs(x))) * torch.finfo(dtype).eps / 2


def independent_bias(a: float) -> float:
    """The bias of a ratio whose two log-probs are rounded independently, each uniformly within ±a nats.

    ``E[exp(e_new − e_old)] − 1 = (sinh a / a)² − 1 ≈ a²/3``

    An upper bound: the roundings of two near policies agree in part, and equal errors cancel. [derived]

    >>> independent_bias(half_ulp(40.0, torch.bfloat16))
    0.00522
    """
    return (math.sinh(a) / a) ** 2 - 1 if a else 0.0


def from_logits(
    logits: Float[Tensor, "n v"],
    ids: Int[Tensor, " n"],
    places: tuple[str, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Compute the log-prob of each sampled token and the entropy of its row, with rounding to dtype at given places.

    Args:
        logits: [n v]; everything that is not rounded is computed in their dtype, float64 for a reference.
        ids: [n] sampled tokens.
        places: any of ``logits``, ``log_softmax`` (which also sums the entropy in dtype) and ``logp`` (both results).
        dtype: the dtype that values are rounded to.
        temperature: the logits are divided by it after they are rounded.

    Returns:
        Log-probs and entropies, [n] each, nats.

    Raises:
        ValueError: an unknown place.

    >>> logp, entropy = from_logits(torch.tensor([[0.0, 1.003]]), torch.tensor([1]), ("logits",))
    >>> logp, torch.tensor([[0.0, 1.0]]).log_softmax(-1)[:, 1]
    (tensor([-0.3133]), tensor([-0.3133]))
    """
    _check_places(places, PLACES[2:])
    z = rounded(logits, dtype) if "logits" in places else logits
    logp = (z / temperature).log_softmax(-1)
    row_logp = logp.to(dtype) if "log_softmax" in places else logp
    p = row_logp.exp()
    entropy = -(p * row_logp.masked_fill(p == 0, 0.0)).sum(-1).to(logp.dtype)
    token_logp = row_logp.to(logp.dtype).gather(1, ids.long()[:, None])[:, 0]
    if "logp" in places:
        token_logp, entropy = rounded(token_logp, dtype), rounded(entropy, dtype)
    return token_logp, entropy


def _check_places(places: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    for place in places:
        if place not in allowed:
            raise ValueError(f"places must be of {', '.join(allowed)}, got {place!r}; leave it out")


def head(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    ids: Int[Tensor, " n"],
    places: tuple[str, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
    temperature: float = 1.0,
    chunk: int = 32,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """``from_logits`` of ``hidden · weightᵀ``, with rounding of the hidden states and the head's weights as well.

    Args:
        hidden, weight: [n d] final hidden states and [v d] head, of one dtype, which is that of the arithmetic.
        ids: [n] sampled tokens.
        places: any of ``PLACES``.
        dtype, temperature: as in ``from_logits``.
        chunk: rows computed at once; small chunks stay in the processor's cache.

    Returns:
        Log-probs and entropies, [n] each, nats.

    Raises:
        ValueError: an unknown place.

    >>> head(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))[0]
    tensor([-0.3133, -0.3133])
    """
    _check_places(places, PLACES)
    rounded_weight = rounded(weight, dtype) if "weights" in places else weight
    logit_places = tuple(place for place in places if place in PLACES[2:])
    results = []
    for chunk_hidden, chunk_ids in zip(hidden.split(chunk), ids.split(chunk), strict=True):
        chunk_hidden = rounded(chunk_hidden, dtype) if "hidden" in places else chunk_hidden
        results.append(
            torch.stack(from_logits(chunk_hidden @ rounded_weight.T, chunk_ids, logit_places, dtype, temperature))
        )
    logp, entropy = torch.cat(results, dim=1)
    return logp, entropy


class RatioError(NamedTuple):
    """The effect of rounding on importance ratios.

    Attributes:
        num_tokens: number of tokens that were compared.
        std: standard deviation of ``e = log r − log r*``, nats.
        bias, bias_se: ``E[r/r*] − 1`` and its standard error.
        half_var: ``Var(e)/2``, the bias to second order of an error with mean zero (Jensen's inequality).
        wrong_high, wrong_low: share of tokens with r above ``1 + ε`` (below ``1 − ε``) although r* is not; one entry
            per width.
        stuck: share of tokens with r exactly 1 in fp32 although r* is not.
    """

    num_tokens: int
    std: float
    bias: float
    bias_se: float
    half_var: float
    wrong_high: tuple[float, ...]
    wrong_low: tuple[float, ...]
    stuck: float


def ratio_error(
    log_ratio: Float[Tensor, " n"], true: Float[Tensor, " n"], widths: tuple[float, ...] = WIDTHS
) -> RatioError:
    """Compare log-ratios that went through a cast with the true ones.

    Args:
        log_ratio: [n] log-ratios after the cast, nats.
        true: [n] log-ratios without it, nats.
        widths: clip widths ε, each on both sides of 1.

    Returns:
        The error statistics.

    Raises:
        ValueError: fewer than two tokens.

    >>> ratio_error(torch.tensor([0.0, 0.25]), torch.tensor([0.01, 0.01])).wrong_high
    (0.5, 0.5, 0.5)
    """
    if log_ratio.numel() < 2:
        raise ValueError(f"log_ratio must hold at least 2 tokens, got {log_ratio.numel()}; give more")
    error = (log_ratio - true).double()
    relative = error.exp()
    ratio, true_ratio = log_ratio.double().exp(), true.double().exp()

    def share(condition: Bool[Tensor, " n"]) -> float:
        return condition.double().mean().item()

    return RatioError(
        num_tokens=error.numel(),
        std=error.std().item(),
        bias=relative.mean().item() - 1,
        bias_se=relative.std().item() / math.sqrt(error.numel()),
        half_var=error.var().item() / 2,
        wrong_high=tuple(share((ratio > 1 + width) & (true_ratio <= 1 + width)) for width in widths),
        wrong_low=tuple(share((ratio < 1 - width) & (true_ratio >= 1 - width)) for width in widths),
        stuck=share((ratio.float() == 1) & (true_ratio.float() != 1)),
    )


class SequenceError(NamedTuple):
    """The effect of rounding on ratios of whole sequences, for an unchanged policy.

    Attributes:
        std: standard deviation of the mean error over a sequence, nats.
        outside: share of sequences whose geometric mean ratio lies outside the band.
        median, mean: of the product of the ratios.
    """

    std: float
    outside: float
    median: float
    mean: float


def sequence_error(
    error: Float[Tensor, " n"],
    length: int,
    num: int = 4096,
    band: tuple[float, float] = GSPO_BAND,
    generator: torch.Generator | None = None,
) -> SequenceError:
    """Draw the errors of sequences independently from a pool of token errors, and measure their ratios.

    ``s = exp(Σ_t e_t / length)`` against ``[1 + low, 1 + high]``, and ``exp(Σ_t e_t)``; the true ratios are 1

    Args:
        error: [n] errors of log-ratios, nats.
        length: tokens per sequence.
        num: number of sequences drawn.
        band: bounds of the ratio, as distances from 1; the default is GSPO's (arXiv:2507.18071).
        generator: the random generator of the draws.

    Returns:
        The error statistics.

    Raises:
        ValueError: length not positive.

    >>> sequence_error(torch.tensor([0.0]), length=8)
    SequenceError(std=0.0, outside=0.0, median=1.0, mean=1.0)
    """
    if length < 1:
        raise ValueError(f"length must be >= 1 token, got {length}; sequences of 256 to 1024 are common")
    mean_error = torch.stack(
        [error[torch.randint(len(error), (length,), generator=generator)].double().mean() for _ in range(num)]
    )
    ratio, product = mean_error.exp(), (mean_error * length).exp()
    outside = (ratio < 1 + band[0]) | (ratio > 1 + band[1])
    return SequenceError(
        mean_error.std().item(), outside.double().mean().item(), product.median().item(), product.mean().item()
    )
