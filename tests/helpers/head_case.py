"""The head in float64 by plain autograd, and hidden states whose rows go from flat to almost certain."""

from typing import NamedTuple

import torch


class Case(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    ids: torch.Tensor
    bias: torch.Tensor | None
    temperature: torch.Tensor
    softcap: float | None
    scale: float

    def options(self):
        return {"bias": self.bias, "softcap": self.softcap, "scale": self.scale}

    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]


def case(n=90, d=16, v=2500, dtype=torch.float32, bias=False, softcap=None, scale=1.0, frozen=False, seed=0):
    """Half of the tokens are the likeliest of their rows, the others any: log-probabilities from 0 to some −100."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=gen)

    hidden = (randn(n, d) * torch.logspace(-2, 0.6, n)[:, None]).to(dtype).requires_grad_()
    weight = randn(v, d).to(dtype).requires_grad_(not frozen)
    offset = randn(v).to(dtype).requires_grad_(not frozen) if bias else None
    temperature = torch.rand(n, generator=gen) + 0.5
    ids = torch.randint(v, (n,), generator=gen)
    made = Case(hidden, weight, ids, offset, temperature, softcap, scale)
    ids[::2] = plain_logits(made).argmax(-1)[::2]
    return made


def plain_logits(c):
    raw = c.hidden.double() @ c.weight.double().T
    raw = (raw if c.bias is None else raw + c.bias.double()) * c.scale
    raw = raw if c.softcap is None else c.softcap * torch.tanh(raw / c.softcap)
    return raw / c.temperature.double()[:, None]


def plain(c):
    """logp, H, Σπ², Σπ² log π, Σπ² log² π in float64, with gradients."""
    logp = plain_logits(c).log_softmax(-1)
    p, finite = logp.exp(), torch.where(logp.isfinite(), logp, 0.0)
    own = logp.gather(1, c.ids[:, None])[:, 0]
    return own, -(p * finite).sum(-1), p.square().sum(-1), (p**2 * finite).sum(-1), (p * finite).square().sum(-1)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())
