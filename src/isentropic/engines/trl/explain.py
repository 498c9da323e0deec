"""What the TRL engine adds to a row of metrics.jsonl about why entropy moves: weights read off the native loss.

On a step that is explained, one autograd call on the elementwise graph between TRL's loss and its log-probabilities
gives every token's weight. The moments of its row come with the fused head, or else from a second product of the last
hidden state with the head, in fp32 and without a gradient; beside the fused head that second product is made now and
then, to say how far its log-probabilities are from those.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ...entropy.prediction import (
    Weights,
    attribute,
    change_of,
    clip_gain,
    effective_weights,
    rows_change,
    token_totals,
)
from ...entropy.statistics import logits_stats
from ...recipes.compose import Recipe, knob_range, with_knob
from ...recipes.terms import wide
from ...types import TokenBatch, TokenFacts, TokenStats
from ..rewrite import Handed, Term, given_at
from .head import last_stats
from .rows import native_facts, native_ratio
from .settings import clip_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("isentropic")
TOP_TOKENS = 8
_CHUNK = 2**22  # logits held at once by the second product
CHEAP_HEAD = 0.05  # a head with at most this share of the parameters is read at every step
EVERY = 10


def head_of(model: Any) -> tuple[Any, Any] | None:
    """The backbone and the output embedding of a causal language model, PEFT or not; None where it is not known."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    find = getattr(base, "get_output_embeddings", None)
    head = find() if find is not None else None
    backbone = getattr(base, "base_model", None)
    known = isinstance(head, torch.nn.Module) and isinstance(getattr(head, "weight", None), torch.Tensor)
    return (backbone, head) if known and isinstance(backbone, torch.nn.Module) and backbone is not base else None


def interval(model: Any, wanted: int | None, fused: bool = False) -> int:
    """Optimizer steps between two explained ones: as asked; else 1 where moments cost little, and 10 where they do not.

    They cost little with the fused head, and where the head is small beside the model.
    """
    if wanted is not None or fused:
        return 1 if wanted is None else wanted
    found = head_of(model)
    if found is None:
        return EVERY
    return 1 if found[1].weight.numel() <= CHEAP_HEAD * sum(p.numel() for p in model.parameters()) else EVERY


def check_explain(recipe: Recipe, every: int | None, head: str) -> None:
    """Refuse an interval or a head that cannot be, or that leaves a controller without what it needs.

    Raises:
        ValueError: what was got, and what is allowed.
    """
    if every is not None and every < 0:
        raise ValueError(f"explain_every must be >= 0 optimizer steps, got {every}; 0 explains none, 1 every one")
    if head not in ("auto", "trl"):
        raise ValueError(f"head must be auto or trl, got {head!r}; auto takes the fused head where it is faster")
    if every == 0 and recipe.controller.split(":")[0] == "predictive":
        raise ValueError("controller predictive needs explained steps, got explain_every=0; leave it out, or choose pi")


def plain_logits(config: Any) -> bool:
    """Whether the model leaves its logits unscaled."""
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    return all(getattr(config, name, None) is None for name in names)


def _whole(x: torch.Tensor) -> torch.Tensor:
    """A parameter that FSDP2 has sharded, gathered."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # pyrefly: ignore


def logits_of(hidden: torch.Tensor, head: Any, config: Any) -> torch.Tensor:
    """``[... v]`` logits in fp32 from ``[... d]`` hidden states, by a plain product with the head."""
    logits = hidden.float() @ _whole(head.weight).float().T
    logits = logits if head.bias is None else logits + _whole(head.bias).float()
    softcap = getattr(config, "final_logit_softcapping", None)
    return logits if softcap is None else softcap * (logits / softcap).tanh()


@torch.no_grad()
def _plain_stats(hidden: torch.Tensor, head: Any, ids: torch.Tensor, temperature: float, config: Any) -> torch.Tensor:
    """``[5 n]`` statistics from ``[n d]`` hidden states by plain fp32 logits, a chunk of rows at a time.

    Not by the fused head: what is compared with it must not be it.
    """
    parts = [hidden.new_zeros(5, 0, dtype=torch.float32)]
    size = max(1, _CHUNK // len(_whole(head.weight)))
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, chosen in zip(*(x.split(size) for x in (hidden, ids)), strict=True):
            logits = logits_of(rows, head, config)
            stats = logits_stats(logits, chosen, temperature, chunk=max(1, len(logits)))
            parts.append(torch.stack([x for x in stats if x is not None]))
    return torch.cat(parts, dim=1)


class Explainer:
    """Explains the steps of one trainer; sums of a window stay on the device until the step ends."""

    def __init__(self, trainer: Any, every: int | None, fused: bool = False):
        self.trainer = trainer
        self.fused = fused
        self.every = interval(trainer.model, every, fused)
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None
        self._warned = False

    def due(self) -> bool:
        """Whether the optimizer step under way is explained."""
        return self.every > 0 and self.trainer.state.global_step % self.every == 0

    def _compares(self) -> bool:
        """Whether the step under way is scored a second time, by a plain product in fp32."""
        return not self.fused or self.trainer.state.global_step % EVERY == 0

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Keep the last hidden state of the forward pass inside, where it is wanted and the head is known."""
        if not (self.due() and self._compares()):
            yield
            return
        found = head_of(self.trainer.accelerator.unwrap_model(model))
        if found is None:
            self._warn("this model's head is not known: the predicted change is read without the moments of the rows")
            yield
            return

        def keep(module: Any, args: Any, output: Any) -> None:
            self._hidden = output.last_hidden_state.detach()

        handle = found[0].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _warn(self, message: str) -> None:
        if not self._warned:
            logger.warning(message)
        self._warned = True

    def _second(self, inputs: dict[str, Any], inside: torch.Tensor) -> TokenStats | None:
        """The rows' statistics by a plain product in fp32, ``[b t]``, or None where there is no hidden state."""
        hidden, self._hidden = self._hidden, None
        trainer, ids = self.trainer, inputs["completion_ids"]
        found = head_of(trainer.accelerator.unwrap_model(trainer.model))
        config = trainer.model.config.get_text_config()
        if hidden is None or found is None or hidden.shape[0] != len(ids) or not plain_logits(config):
            self._warn("no hidden state to read moments from: the predicted change is read without them")
            return None
        picked = hidden[:, -ids.shape[1] - 1 : -1][inside]
        flat = _plain_stats(picked, found[1], ids[inside], float(trainer.temperature), config)
        table = flat.new_zeros(5, *ids.shape)
        table[:, inside] = flat
        return TokenStats(*table)

    def add(self, loss: torch.Tensor, inputs: dict[str, Any], batch: TokenBatch, handed: Handed, term: Term) -> None:
        """Add one micro-batch: the loss, what it was computed from, and what it was handed and given beside it."""
        logp, entropy = batch.logp, batch.entropy
        assert entropy is not None
        inside = batch.mask.bool()
        second = self._second(inputs, inside) if self._compares() else None
        read = TokenStats(logp.detach().float(), entropy.detach().float())
        rows = self._from_head(logp.shape[1]) or second or read
        weights = effective_weights(loss, logp, entropy, differentiable=True)
        adv = wide(handed.adv.detach(), logp)
        still = batch._replace(logp=logp.detach(), entropy=entropy.detach())
        facts = handed.facts or native_facts(self.trainer, native_ratio(self.trainer, still), adv)
        through = _through_rows(loss, term.rows, -1.0)
        sums = {f"predict/{k}": v for k, v in attribute(weights, rows, adv, batch.mask, facts, through).items()}
        predicted = torch.where(inside, change_of(weights, rows), 0.0)
        clip = (weights, rows, adv, facts)
        gain = self._gain(predicted.sum(), clip, inputs, batch, handed, term)
        if through is not None:
            predicted = predicted + torch.where(inside, rows_change(*through), 0.0)
        exact = second or read
        error = torch.where(inside, read.logp - exact.logp, 0.0)
        slope = None if batch.logp_old is None else _slope(predicted.sum(), logp)
        sums |= {
            "predict/gain": gain,
            "predict/numerics": error.new_zeros(()) if slope is None else (slope * error).sum(),
            "numerics/squared": error.square().sum(),
            "numerics/entropy": torch.where(inside, read.entropy - exact.entropy, 0.0).sum(),
            "numerics/tokens": inside.sum() * (second is not None),
            "numerics/moments": inside.sum() * (rows.sum_p2 is not None),
        }
        self.names = list(sums)
        vector = torch.stack([value.detach().double() for value in sums.values()])
        self.sums = vector if self.sums is None else self.sums + vector
        size = int(self.trainer.model.config.get_text_config().vocab_size)
        totals = token_totals(predicted.detach(), inputs["completion_ids"], batch.mask, size)
        self.tokens = totals if self.tokens is None else self.tokens + totals

    def _from_head(self, length: int) -> TokenStats | None:
        """What the fused head read of the completions on its way."""
        stats = last_stats(self.trainer) if self.fused else None
        return None if stats is None else TokenStats(*(x[:, -length:] for x in stats if x is not None))

    def _gain(
        self,
        total: torch.Tensor,
        clip: tuple[Any, TokenStats, torch.Tensor, TokenFacts],
        inputs: dict[str, Any],
        batch: TokenBatch,
        handed: Handed,
        term: Term,
    ) -> torch.Tensor:
        """The derivative of the predicted change by the knob under control, per unit step size."""
        trainer, zero = self.trainer, total.new_zeros(())
        recipe, state = trainer.recipe, trainer.control_state
        if state is None:
            return zero
        inside, clips = batch.mask.bool(), recipe.knob in ("clip_low", "clip_high")
        if term.unit is not None:
            return torch.where(inside, _unit_change(term, batch, clip[1]), 0.0).sum()
        if clips and trainer.native:
            return self._clip_gain(recipe, state.value, clip, batch)
        slope = _slope(total, inputs["advantages"])
        if slope is None:
            return zero
        # Freed tokens are counted over a window of half the width of the clip; elsewhere the weights are smooth.
        span = knob_range(recipe)
        step = state.value / 4 if clips else 1e-3 * (span.high - span.low)
        still = batch._replace(logp=batch.logp.detach(), entropy=_detached(batch.entropy))
        up, down = (given_at(with_knob(recipe, state.value + x), still, handed) for x in (step, -step))
        return (torch.where(inside, slope * (up - down), 0.0)).sum() / (2 * step)

    def _clip_gain(
        self,
        recipe: Recipe,
        value: float,
        clip: tuple[Any, TokenStats, torch.Tensor, TokenFacts],
        batch: TokenBatch,
    ) -> torch.Tensor:
        name = "epsilon_high" if recipe.knob == "clip_high" else "epsilon"
        settings = clip_settings(with_knob(recipe, value))
        bound = settings[name] if recipe.objective == "cispo" else 1 + settings[name]
        bound = bound if name == "epsilon_high" else 1 - settings[name]
        ahead = clip_settings(with_knob(recipe, value * 1.001))[name]
        per_knob = (ahead - settings[name]) / (value * 0.001)
        return per_knob * clip_gain(*clip, batch.mask, bound, width=value / 2)

    def close(self, rate: float) -> dict[str, Any]:
        """The window as fields of a row: sums over ranks, times the learning rate; empty if nothing was explained."""
        if self.sums is None:
            return {}
        trainer = self.trainer
        ranks = trainer.accelerator.num_processes
        sums = dict(zip(self.names, trainer.accelerator.reduce(self.sums, reduction="sum").tolist(), strict=True))
        # TRL's loss is a mean over ranks: each rank's weights are that many times too large.
        row = {name: rate * value / ranks for name, value in sums.items() if name.startswith("predict/")}
        read = sums["numerics/tokens"]
        if read:
            row["numerics/logp_rms"] = (sums["numerics/squared"] / read) ** 0.5
            row["numerics/entropy_bias"] = sums["numerics/entropy"] / read
        else:
            row["predict/numerics"] = None
        row["predict/moments"] = int(sums["numerics/moments"] > 0)
        row["predict/knob"] = self._knob_part(row)
        row["predict/top_tokens"] = self._top(rate / ranks)
        self.sums = self.tokens = None
        return row

    def _knob_part(self, row: dict[str, Any]) -> float | None:
        """What the knob adds against its rest: exact where the loss is linear in it, unknown for a clip."""
        trainer = self.trainer
        if trainer.control_state is None or trainer.recipe.knob in ("clip_low", "clip_high"):
            return None
        return row["predict/gain"] * (trainer.control_state.value - (knob_range(trainer.recipe).rest or 0.0))

    def _top(self, scale: float) -> list[list[Any]]:
        """Text, predicted change and count of this process's tokens that moved entropy most, summed by token."""
        assert self.tokens is not None
        change, count = self.tokens
        top = change.abs().topk(min(TOP_TOKENS, len(change))).indices
        found = zip(top.tolist(), change[top].tolist(), count[top].tolist(), strict=True)
        decode = self.trainer.processing_class.decode
        return [[decode([i]), scale * x, int(n)] for i, x, n in found if n]


def _slope(total: torch.Tensor, source: torch.Tensor) -> torch.Tensor | None:
    if not (source.requires_grad and total.requires_grad):
        return None
    return torch.autograd.grad(total, source, retain_graph=True, allow_unused=True)[0]


def _detached(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach()


def _through_rows(
    value: torch.Tensor, rows: torch.Tensor | None, sign: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What a value pulls whole rows with, and the rows; ``sign`` is −1 for what is minimised."""
    if rows is None or not (rows.requires_grad and value.requires_grad):
        return None
    slope = torch.autograd.grad(value, rows, retain_graph=True, allow_unused=True)[0]
    return None if slope is None else (sign * slope, rows.detach())


def _unit_change(term: Term, batch: TokenBatch, rows: TokenStats) -> torch.Tensor:
    """The change of each row by a unit of a term that is maximised, ``[b t]``."""
    assert term.unit is not None
    assert batch.entropy is not None
    sources = (batch.logp, batch.entropy)
    slopes = torch.autograd.grad(term.unit, sources, retain_graph=True, allow_unused=True)
    change = change_of(
        Weights(*(torch.zeros_like(x) if s is None else s for x, s in zip(sources, slopes, strict=True))), rows
    )
    through = _through_rows(term.unit, term.rows, 1.0)
    return change if through is None else change + rows_change(*through)
