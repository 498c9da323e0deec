"""First-order prediction of how a step changes entropy, one sampled token at a time.

Notation: ``L(b) = log π(b) + H`` is the centred log-probability of token b in its row, so that ``Σ_b π L = 0``. The
weight of a token is ``w = −∂loss/∂log π(a)``: positive where the step pushes the sampled token a up. Multiply a
prediction by the step size; sum or average predictions as the loss does.
"""

from jaxtyping import Float
from torch import Tensor


def predicted_change(
    weight: Float[Tensor, "b t"],
    logp: Float[Tensor, "b t"],
    entropy: Float[Tensor, "b t"],
    sum_p2: Float[Tensor, "b t"] | None = None,
    sum_p2_logp: Float[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t"]:
    """Predict the entropy change of each row under a unit gradient step on its logits.

    ``ΔH = −w·{π(a) L(a) − Σ_b π(b)² L(b)}``, ``Σ π² L = Σ π² log π + H·Σ π²`` (both moments given)
    ``ΔH = −w·π(a)·L(a)`` (neither given)

    Derivation: the step moves the logits by ``Δz = w·(e_a − π)`` and ``∂H/∂z_b = −π(b) L(b)``; the first form is their
    scalar product. It assumes a small step and that each row moves by its own token alone: a network shares its
    parameters between rows. The second form drops ``Σ π² L``, which is never negative; it further assumes that
    the score functions of different tokens of a row are orthogonal, or that weights average to 0 in every row.

    For logits divided by a temperature T before the softmax, divide by T² for a unit step on the undivided ones.

    Args:
        weight: [b t] ``−∂loss/∂logp``.
        logp: [b t] log-probabilities of the sampled tokens, nats.
        entropy: [b t] entropy of their rows, nats.
        sum_p2: [b t] ``Σ π²`` of the rows.
        sum_p2_logp: [b t] ``Σ π² log π`` of the rows, nats.

    Returns:
        [b t] nats per unit step size.

    Raises:
        ValueError: one moment without the other.

    arXiv:2603.11682, Theorem 1: without moments [paper], with them [derived].

    >>> import torch
    >>> p = torch.tensor([0.75, 0.25])
    >>> logp, H = p.log()[None, :1], -(p * p.log()).sum()[None, None]
    >>> predicted_change(torch.ones(1, 1), logp, H)  # −¾·(log ¾ + 0.5623)
    tensor([[-0.2060]])
    >>> predicted_change(torch.ones(1, 1), logp, H, (p**2).sum()[None, None], (p**2 * p.log()).sum()[None, None])
    tensor([[-0.1030]])
    """
    if (sum_p2 is None) != (sum_p2_logp is None):
        got = "sum_p2_logp" if sum_p2 is None else "sum_p2"
        raise ValueError(f"sum_p2 and sum_p2_logp go together, got only {got}; give both, or neither to drop the term")
    change = logp.exp() * (logp + entropy)
    if sum_p2 is not None and sum_p2_logp is not None:
        change = change - (sum_p2_logp + entropy * sum_p2)
    return -weight * change


def natural_change(
    weight: Float[Tensor, "b t"], logp: Float[Tensor, "b t"], entropy: Float[Tensor, "b t"]
) -> Float[Tensor, "b t"]:
    """Predict the entropy change of each row under a unit natural-gradient step.

    ``ΔH = −w·L(a)``, in expectation ``−Cov_π(w, log π)``

    Derivation: the Fisher matrix of a row of logits is ``F = diag(π) − π πᵀ``; the natural step solves
    ``F Δz = w·(e_a − π)``, so ``Δz = w·e_a/π(a)`` up to a constant, and ``∂H/∂z_b = −π(b) L(b)``. It assumes a small
    step and that each row moves by its own token alone, but no orthogonality within a row.

    Args:
        weight: [b t] ``−∂loss/∂logp``.
        logp: [b t] log-probabilities of the sampled tokens, nats.
        entropy: [b t] entropy of their rows, nats.

    Returns:
        [b t] nats per unit step size.

    Cui et al. (arXiv:2505.22617), here for one sampled token [derived].

    >>> import torch
    >>> natural_change(torch.tensor([[2.0]]), torch.tensor([[-0.5]]), torch.tensor([[0.75]]))
    tensor([[-0.5000]])
    """
    return -weight * (logp + entropy)
