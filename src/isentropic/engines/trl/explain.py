"""What the TRL engine adds to a row of metrics.jsonl about why entropy moves: weights read off the native loss.

On a step that is explained, one autograd call on the elementwise graph between TRL's loss and its log-probabilities
gives every token's weight. The moments of its row come with the fused head, or else from a second product of the last
hidden state with the head, in fp32 and without a gradient; beside the fused head that second product is made now and
then, to say how far its log-probabilities are from those.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
from ...recipes import Recipe, knob_range, with_knob
from ...recipes.apply import per_token
from ...types import TokenBatch, TokenFacts, TokenStats
from ..rewrite import CLIP_KNOBS, Rewritten, across_knob, advantages_at
from .compat import Trainer, tokenizer_of
from .head import head_of, last_stats, logits_of, plain_logits, whole
from .loss import Term, native_facts, native_ratio
from .settings import clip_settings

logger = logging.getLogger("isentropic")
TOP_TOKENS = 8
_CHUNK = 2**22  # logits held at once by the second product
CHEAP_HEAD = 0.05  # a head with at most this share of the parameters is read at every step
EVERY = 10
THIRDS = ("short", "middle", "long")


def interval(model: Any, wanted: int | None, fused: bool = False) -> int:
    """Optimizer steps between two explained ones: as asked; else 1 if moments cost little, else 10.

    They cost little with the fused head, and if the head is small beside the model.
    """
    if wanted is not None or fused:
        return 1 if wanted is None else wanted
    known = head_of(model)
    if known is None:
        return EVERY
    return 1 if known[1].weight.numel() <= CHEAP_HEAD * sum(p.numel() for p in model.parameters()) else EVERY


def check_explain(every: int | None, head: str) -> None:
    """Refuse an interval or a head that cannot be.

    Raises:
        ValueError: what was got, and what is allowed.
    """
    if every is not None and every < 0:
        raise ValueError(f"explain_every must be >= 0 optimizer steps, got {every}; 0 explains none, 1 every one")
    if head not in ("auto", "trl"):
        raise ValueError(f"head must be auto or trl, got {head!r}; auto takes the fused head if it is faster")


@torch.no_grad()
def _plain_stats(hidden: torch.Tensor, head: Any, ids: torch.Tensor, temperature: float, config: Any) -> TokenStats:
    """``[n]`` statistics of ``[n d]`` hidden states by plain fp32 logits, a chunk of rows at a time.

    Not by the fused head, which these statistics are compared with.
    """
    size = max(1, _CHUNK // len(whole(head.weight)))
    chunks = []
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, chosen in zip(*(x.split(size) for x in (hidden, ids)), strict=True):
            logits = logits_of(rows, head, config)
            chunks.append(logits_stats(logits, chosen, temperature, chunk=max(1, len(logits))))
    return TokenStats(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def completion_groups(trainer: Trainer, output: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a generated batch's completions are told apart by, ``[b]`` each.

    ``truncated`` is true if a completion ends without an end token, as TRL has it. ``length_third`` is 0, 1 or 2 by
    the number of the policy's tokens, ranked over the batch on all processes; equal lengths share their mean rank.
    """
    ids, mask = output["completion_ids"], output["completion_mask"]
    ends = torch.tensor([*trainer.eos_token_ids, tokenizer_of(trainer).pad_token_id], device=ids.device)
    last = ids.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0))
    lengths = (mask * output.get("tool_mask", 1)).sum(1)
    everyone = trainer.accelerator.gather(lengths)
    # TRL masks a truncated completion as a whole if it is told to: it is no short one.
    ranked = everyone[everyone > 0].sort().values
    twice_rank = torch.searchsorted(ranked, lengths) + torch.searchsorted(ranked, lengths, right=True)
    third = 3 * twice_rank // (2 * max(1, len(ranked)))
    return {"truncated": ~torch.isin(last[:, 0], ends), "length_third": third}


def by_completion(change: torch.Tensor, inputs: dict[str, Any], inside: torch.Tensor) -> dict[str, torch.Tensor]:
    """Predicted change and tokens by end and by length of the completion; empty if the batch does not tell.

    Args:
        change: ``[b t]``, 0 outside the mask.
        inputs: of the native loss, with what :func:`completion_groups` gave.
        inside: ``[b t]`` true where the token counts.
    """
    if "truncated" not in inputs:
        return {}
    cut, third = inputs["truncated"], inputs["length_third"]
    groups = {"finished": ~cut, "truncated": cut, **{name: third == i for i, name in enumerate(THIRDS)}}
    by_row, tokens = change.sum(1), inside.sum(1)
    sums = {f"predict/{name}": torch.where(group, by_row, 0.0).sum() for name, group in groups.items()}
    return sums | {f"tokens/{name}": torch.where(group, tokens, 0).sum() for name, group in groups.items()}


class Clipped(NamedTuple):
    """What a clip bound acts on: the weights of a loss, the rows, the advantages and the objective's facts."""

    weights: Weights
    rows: TokenStats
    adv: torch.Tensor
    facts: TokenFacts


class Explainer:
    """Explains the steps of one trainer; sums of a step stay on the device until it ends."""

    def __init__(self, trainer: Trainer, every: int | None, fused: bool = False):
        self.trainer = trainer
        self.fused = fused
        self.every = interval(trainer.model, every, fused)
        self.sums: dict[str, torch.Tensor] = {}
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
        """Keep the last hidden state of the forward pass inside, if it is wanted and the head is known."""
        if not (self.due() and self._compares()):
            yield
            return
        known = head_of(self.trainer.accelerator.unwrap_model(model))
        if known is None:
            self._warn("this model's head is not known: the predicted change is read without the moments of the rows")
            yield
            return

        def keep(module: Any, args: Any, output: Any) -> None:
            self._hidden = output.last_hidden_state.detach()

        handle = known[0].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _warn(self, message: str) -> None:
        if not self._warned:
            logger.warning(message)
        self._warned = True

    def _second(self, inputs: dict[str, Any], inside: torch.Tensor) -> TokenStats | None:
        """The rows' statistics by a plain product in fp32, ``[b t]``, or None if there is no hidden state."""
        hidden, self._hidden = self._hidden, None
        trainer, ids = self.trainer, inputs["completion_ids"]
        known = head_of(trainer.accelerator.unwrap_model(trainer.model))
        config = trainer.model.config.get_text_config()
        if hidden is None or known is None or hidden.shape[0] != len(ids) or not plain_logits(config):
            self._warn("no hidden state to read moments from: the predicted change is read without them")
            return None
        picked = hidden[:, -ids.shape[1] - 1 : -1][inside]
        stats = _plain_stats(picked, known[1], ids[inside], float(trainer.temperature), config)
        return TokenStats(*(x.new_zeros(ids.shape).masked_scatter(inside, x) for x in stats if x is not None))

    def add(
        self, loss: torch.Tensor, inputs: dict[str, Any], batch: TokenBatch, rewritten: Rewritten, term: Term
    ) -> None:
        """Add one micro-batch: the loss, what it was computed from, and what was rewritten and added beside it."""
        logp, entropy = batch.logp, batch.entropy
        assert entropy is not None
        inside = batch.mask.bool()
        second = self._second(inputs, inside) if self._compares() else None
        read = TokenStats(logp.detach().float(), entropy.detach().float())
        rows = self._from_head(logp.shape[1]) or second or read
        weights = effective_weights(loss, logp, entropy, differentiable=True)
        adv = per_token(rewritten.adv.detach(), logp)
        still = batch._replace(logp=logp.detach(), entropy=entropy.detach())
        facts = rewritten.facts or native_facts(self.trainer, native_ratio(self.trainer, still), adv)
        through = _through_rows(loss, term.rows, -1.0)
        sums = {f"predict/{k}": v for k, v in attribute(weights, rows, adv, batch.mask, facts, through).items()}
        predicted = torch.where(inside, change_of(weights, rows), 0.0)
        clipped = Clipped(weights, rows, adv, facts)
        gain = self._gain(predicted.sum(), clipped, inputs, batch, rewritten, term)
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
        sums |= by_completion(predicted.detach(), inputs, inside)
        for name, value in sums.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
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
        clipped: Clipped,
        inputs: dict[str, Any],
        batch: TokenBatch,
        rewritten: Rewritten,
        term: Term,
    ) -> torch.Tensor:
        """The derivative of the predicted change by the knob under control, per unit step size."""
        trainer, zero = self.trainer, total.new_zeros(())
        recipe, value = trainer.recipe, trainer.loop.value
        if value is None or recipe.knob == "redraw":
            return zero
        inside = batch.mask.bool()
        if term.unit is not None:
            return torch.where(inside, _unit_change(term, batch, clipped.rows), 0.0).sum()
        if recipe.knob in CLIP_KNOBS and trainer.native:
            return self._clip_gain(recipe, value, clipped, batch)
        slope = _slope(total, inputs["advantages"])
        if slope is None:
            return zero
        still = batch._replace(
            logp=batch.logp.detach(), entropy=_detached(batch.entropy), logp_rows=_detached(batch.logp_rows)
        )
        moved = across_knob(recipe, value, lambda end: advantages_at(end, still, rewritten))
        return torch.where(inside, slope * moved.change, 0.0).sum() / moved.width

    def _clip_gain(self, recipe: Recipe, value: float, clipped: Clipped, batch: TokenBatch) -> torch.Tensor:
        """The tokens at the edge of TRL's own clip, which a wider bound would free."""
        name = "epsilon_high" if recipe.knob == "clip_high" else "epsilon"
        settings = clip_settings(with_knob(recipe, value))
        bound = settings[name] if recipe.objective == "cispo" else 1 + settings[name]
        bound = bound if name == "epsilon_high" else 1 - settings[name]
        ahead = clip_settings(with_knob(recipe, value * 1.001))[name]
        per_knob = (ahead - settings[name]) / (value * 0.001)
        return per_knob * clip_gain(*clipped, batch.mask, bound, width=value / 2)

    def close(self, rate: float) -> dict[str, Any]:
        """The step as fields of a row: sums over ranks, times the learning rate; empty if nothing was explained."""
        if not self.sums:
            return {}
        trainer = self.trainer
        ranks = trainer.accelerator.num_processes
        vector = trainer.accelerator.reduce(torch.stack(list(self.sums.values())), reduction="sum")
        sums: dict[str, float] = dict(zip(self.sums, vector.tolist(), strict=True))
        # TRL's loss is a mean over ranks: each rank's weights are that many times too large.
        row: dict[str, Any] = {
            name: rate * value / ranks for name, value in sums.items() if name.startswith("predict/")
        }
        compared = sums["numerics/tokens"]
        if compared:
            row["numerics/logp_rms"] = (sums["numerics/squared"] / compared) ** 0.5
            row["numerics/entropy_bias"] = sums["numerics/entropy"] / compared
        else:
            row["predict/numerics"] = None
        read = sums.get("tokens/finished", 0.0) + sums.get("tokens/truncated", 0.0)
        if read:
            row |= {f"{name}_frac": x / read for name, x in sums.items() if name.startswith("tokens/")}
        row["predict/moments"] = int(sums["numerics/moments"] > 0)
        row["predict/knob"] = self._knob_part(row)
        if trainer.recipe.knob == "redraw":
            row["predict/gain"] = None
        row["predict/top_tokens"] = self._top(rate / ranks)
        self.sums, self.tokens = {}, None
        return row

    def _knob_part(self, row: dict[str, Any]) -> float | None:
        """What the knob adds against its rest: exact if the loss is linear in it, unknown for a clip or a redraw."""
        recipe, value = self.trainer.recipe, self.trainer.loop.value
        if value is None or recipe.knob in (*CLIP_KNOBS, "redraw"):
            return None
        return row["predict/gain"] * (value - (knob_range(recipe).rest or 0.0))

    def _top(self, scale: float) -> list[list[Any]]:
        """Text, predicted change and count of this process's tokens that moved entropy most, summed by token."""
        assert self.tokens is not None
        change, count = self.tokens
        top = change.abs().topk(min(TOP_TOKENS, len(change))).indices
        rows = zip(top.tolist(), change[top].tolist(), count[top].tolist(), strict=True)
        decode = self.trainer.processing_class.decode
        return [[decode([i]), scale * x, int(n)] for i, x, n in rows if n]


def _slope(total: torch.Tensor, source: torch.Tensor) -> torch.Tensor | None:
    if not (source.requires_grad and total.requires_grad):
        return None
    return torch.autograd.grad(total, source, retain_graph=True, allow_unused=True)[0]


def _detached(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach()


def _through_rows(
    value: torch.Tensor, rows: torch.Tensor | None, sign: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The slope of a value by whole rows, and the rows; ``sign`` is −1 for a value that is minimised."""
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
