"""Entropy of token distributions: exact from logits, or estimated from the log-probabilities of sampled tokens.

Everything is in nats, at a given temperature, and computed in fp32 or better whatever the dtype of the logits: in bf16
an entropy over 50k tokens has an error of some 0.02 nats. Rows are processed in chunks, so that the fp32 copy of the
logits never exceeds one chunk. A logit of −inf is a token that cannot be sampled: it adds nothing.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..losses import reduce
from ..losses.reduce import SumCount
from ..types import TokenStats

CHUNK = 256


def _check(temperature: float, chunk: int) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; 1.0 leaves the logits as they are")
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1 row, got {chunk}; {CHUNK} is the default")


def _row_chunks(logits: Float[Tensor, "*rows v"], chunk: int) -> Iterator[Float[Tensor, "n v"]]:
    """Yield views of at most ``chunk`` rows in order, without a contiguous copy of sliced logits."""
    if logits.is_contiguous() or logits.dim() <= 2:
        yield from logits.reshape(-1, logits.shape[-1]).split(chunk)
    else:
        for sub_logits in logits.unbind(0):
            yield from _row_chunks(sub_logits, chunk)


def _log_probs(rows: Float[Tensor, "n v"], temperature: float) -> Float[Tensor, "n v"]:
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (rows / temperature).log_softmax(dim=-1)


def _probs_(logp: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Return π, and set log π to 0 in place where π is 0, so that no product of the two is 0 · ∞."""
    p = logp.exp()
    logp.masked_fill_(p == 0, 0.0)
    return p


@torch.no_grad()
def logits_stats(
    logits: Float[Tensor, "*rows v"], ids: Int[Tensor, "*rows"], temperature: float = 1.0, chunk: int = CHUNK
) -> TokenStats:
    """Compute the statistics of sampled tokens and their rows, exactly and without a gradient.

    ``log π(a)``, ``H``, ``Σ π²``, ``Σ π² log π``, ``Σ π² log² π`` with ``π = softmax(logits / temperature)``

    Args:
        logits: [... v] in any floating dtype.
        ids: [...] sampled tokens. A negative id, a common mark of padding, is read as 0.
        temperature: the sampling temperature.
        chunk: rows computed at once; the peak memory is a few fp32 tensors of [chunk v].

    Returns:
        The statistics, [...] each, in fp32, or in float64 if the logits are.

    Raises:
        ValueError: temperature or chunk is not positive.

    The moments are those of the exact form of Theorem 1 of arXiv:2603.11682 [derived].

    >>> stats = logits_stats(torch.tensor([[0.0, 0.0], [0.0, -float("inf")]]), torch.tensor([1, 0]))
    >>> stats.logp, stats.entropy, stats.sum_p2  # log ½, log 2, ½; and a certain token
    (tensor([-0.6931,  0.0000]), tensor([0.6931, 0.0000]), tensor([0.5000, 1.0000]))
    """
    _check(temperature, chunk)
    flat_ids, start, chunks = ids.reshape(-1, 1).long().clamp(min=0), 0, []
    for rows in _row_chunks(logits, chunk):
        chunk_ids = flat_ids[start : start + rows.shape[0]]
        start += rows.shape[0]
        logp = _log_probs(rows, temperature)
        token_logp = logp.gather(1, chunk_ids)[:, 0]
        p = _probs_(logp)
        p_logp = p * logp
        moments = (-p_logp.sum(-1), p.square().sum(-1), (p * p_logp).sum(-1), p_logp.square().sum(-1))
        chunks.append(torch.stack((token_logp, *moments)))
    return TokenStats(*torch.cat(chunks, dim=1).reshape(5, *ids.shape))


class _TokenEntropy(torch.autograd.Function):
    """Entropy by rows, which saves only the logits for its backward, ``∂H/∂z = −π (log π + H) / temperature``."""

    @staticmethod
    def forward(ctx, logits: Tensor, temperature: float, chunk: int) -> Tensor:
        chunks = []
        for rows in _row_chunks(logits, chunk):
            logp = _log_probs(rows, temperature)
            p = _probs_(logp)
            chunks.append(-(p * logp).sum(-1))
        entropy = torch.cat(chunks)
        ctx.save_for_backward(logits, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        return entropy.reshape(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        (entropy_grad,), (logits, entropy) = grad_outputs, ctx.saved_tensors
        logits_grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        flat_logits_grad, flat_entropy_grad, start = (
            logits_grad.view(-1, logits.shape[-1]),
            entropy_grad.reshape(-1, 1),
            0,
        )
        for rows in _row_chunks(logits, ctx.chunk):
            span = slice(start, start + rows.shape[0])
            start += rows.shape[0]
            logp = _log_probs(rows, ctx.temperature)
            p = _probs_(logp)
            chunk_grad = logp.add_(entropy[span, None]).mul_(p).mul_(-flat_entropy_grad[span] / ctx.temperature)
            # A row outside the mask may have any value: 0 · NaN must be 0.
            flat_logits_grad[span] = chunk_grad.masked_fill_(flat_entropy_grad[span] == 0, 0.0)
        return logits_grad, None, None


def token_entropy(
    logits: Float[Tensor, "*rows v"], temperature: float = 1.0, chunk: int = CHUNK
) -> Float[Tensor, "*rows"]:
    """Compute the exact entropy of each row, with a gradient.

    ``H = −Σ_v π log π``, ``∂H/∂z_v = −π_v (log π_v + H) / temperature``, ``π = softmax(z / temperature)``

    The backward recomputes each chunk, so that besides the logits and their gradient only one chunk is kept in fp32.
    A row whose incoming gradient is 0 gets a gradient of 0, whatever its values.

    Args:
        logits: [... v] in any floating dtype.
        temperature: the sampling temperature.
        chunk: rows computed at once.

    Returns:
        [...] entropies in nats, in fp32, or in float64 if the logits are.

    Raises:
        ValueError: temperature or chunk is not positive.

    >>> token_entropy(torch.zeros(2, 4))  # log 4
    tensor([1.3863, 1.3863])
    """
    _check(temperature, chunk)
    return _TokenEntropy.apply(logits, temperature, chunk)


def sampled_entropy(logp: Float[Tensor, "b t"], mask: Shaped[Tensor, "b t"]) -> SumCount:
    """Estimate entropy from the sampled tokens alone. This is not the exact entropy and is never called that.

    ``Ĥ = −Σ m·log π(a) / Σ m``, unbiased if a was drawn from the very π of logp, because ``E_π[−log π] = H``

    Variance: in addition to the spread of H between states, each token adds ``Var_π[log π]``, which is 0 for a
    uniform row and grows with the tail of the row; tokens of one response are correlated.

    Bias under truncated sampling. Top-k, top-p and min-p draw from ``q = π/Z`` on a kept set S with ``Z = Σ_S π``. With
    the logp of the untruncated π the expectation is

    ``E_q[−log π] = H(q) − log Z = H(π) − (1 − Z)·(E_π[−log π | not S] − E_π[−log π | S])``

    which is never above H(π), because the tokens outside S are no likelier than those inside; nor is it H(q), which it
    exceeds by ``−log Z``.

    Bias under another temperature. Tokens drawn at temperature ``T``, with the logp of temperature 1, give
    ``E_q[−log π] = H(q) + KL(q‖π)``, ``q ∝ π^(1/T)``: below H(π) for T < 1, above it for T > 1.

    Args:
        logp: [b t] log-probabilities of the sampled tokens, nats, at the sampling temperature.
        mask: [b t] non-zero where the policy generated the token.

    Returns:
        The sum in nats and the number of tokens.

    Both biases [derived].

    >>> sampled_entropy(torch.tensor([[-1.0, -2.0, float("-inf")]]), torch.tensor([[1, 1, 0]])).mean()
    tensor(1.5000)
    """
    return reduce.token(-logp, mask)
