"""One optimizer step of control, the same in every engine: observe a batch, regulate by the reading, rewrite the loss.

An adapter calls :meth:`ControlLoop.observe` for each micro-batch, closes the step by :meth:`ControlLoop.reduced` and
:meth:`ControlLoop.regulate`, and asks :attr:`ControlLoop.recipe_now` for the recipe of the next one, which
:mod:`isentropic.engines.rewrite` hands to the engine's own loss. What differs between engines is how sums are reduced
over ranks and how a run is saved and stopped.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from ..control.targets import feasible
from ..control.thermostat import CUT_OUT, ThermostatState, to_json
from ..control.watchdog import Watchdog, WatchdogState
from ..losses.reduce import SumCount, sum_dtype  # noqa: F401  (SumCount: for an example below)
from ..recipes import Recipe, build_thermostat, knob_range, with_knob
from ..recipes.apply import per_token
from ..runs.record import CHECKPOINT_FILE
from ..types import EntropyReading, TokenBatch, TokenFacts
from .groups import group_row

logger = logging.getLogger("isentropic")
MAX_REFUSED = 10

Sums = TypeVar("Sums", bound=tuple)


class EntropyReadingError(RuntimeError):
    """Ten entropy readings in a row were refused."""


class TokenSums(NamedTuple):
    """Sums over the tokens of an optimizer step: 0-d tensors while it runs, numbers once reduced over ranks.

    Attributes:
        entropy: Σ H, nats.
        tokens: their number.
        clipped_low, clipped_high, outside: tokens whose clip is active, and whose ratio is outside the bounds.
        adv, logp, adv_logp: Σ A, Σ log π, Σ A·log π.
        ratio: Σ importance ratio.
    """

    entropy: Any
    tokens: Any
    clipped_low: Any
    clipped_high: Any
    adv: Any
    logp: Any
    adv_logp: Any
    ratio: Any
    outside: Any


def token_sums(batch: TokenBatch, facts: TokenFacts) -> TokenSums:
    """What a micro-batch adds to the sums of its step, in float64 and without a synchronisation.

    Args:
        batch: ``logp``, ``adv``, ``mask`` and ``entropy``, ``[b t]``.
        facts: of the objective, ``[b t]``.
    """
    logp, entropy = batch.logp, batch.entropy
    assert entropy is not None
    adv = per_token(batch.adv, logp)
    outside = facts.clipped_low | facts.clipped_high if facts.outside is None else facts.outside
    rows = TokenSums(
        entropy=entropy,
        tokens=torch.ones_like(logp),
        clipped_low=facts.clipped_low,
        clipped_high=facts.clipped_high,
        adv=adv,
        logp=logp,
        adv_logp=adv * logp,
        ratio=facts.ratio.expand_as(logp),
        outside=outside,
    )
    return TokenSums(*masked_sums(torch.stack(rows), batch.mask).unbind())


class OffPolicySums(NamedTuple):
    """How far an update is from the policy that sampled its tokens, and what of it is dropped: sums as `TokenSums`.

    Attributes:
        ratio_squared: Σ ratio².
        dropped: tokens whose gradient the clip removed or capped, or a selection took out.
        dropped_entropy: Σ H over them, nats.
        age: Σ policy age, optimizer steps.
        known: tokens whose log-probability the sampler gave.
        kl, kl_k1: Σ (e^d − 1 − d) and Σ −d over them with d = log π − log μ, nats: π the trainer, μ the sampler.
        kl_entropy: Σ H over them when they were sampled, nats.
    """

    ratio_squared: Any
    dropped: Any
    dropped_entropy: Any
    age: Any
    known: Any
    kl: Any
    kl_k1: Any
    kl_entropy: Any


def off_policy_sums(
    batch: TokenBatch,
    facts: TokenFacts,
    age: int,
    deselected: Tensor | None = None,
    sampler: Tensor | None = None,
) -> OffPolicySums:
    """What a micro-batch adds to the sums of its step, without a synchronisation.

    ``e^d − 1 − d`` and ``−d`` both estimate KL(sampler ‖ trainer) on sampled tokens; the first is never negative.

    Args:
        batch: as in :func:`token_sums`; ``logp_old`` and ``entropy_old`` are those of the weights that sampled.
        facts: of the objective, ``[b t]``.
        age: optimizer steps between the weights that sampled and those that are updated.
        deselected: ``[b t]`` true for tokens that a selection took out, if there is one.
        sampler: ``[b t]`` log-probabilities that the sampler gave, NaN where it gave none, if it gives any.

    http://joschu.net/blog/kl-approx.html (k1 and k3).
    """
    entropy, inside, kind = batch.entropy, batch.mask.bool(), sum_dtype(batch.logp.device)
    assert entropy is not None
    dropped = facts.clipped_low | facts.clipped_high
    if deselected is not None:
        # A token without an advantage has no gradient that could be dropped.
        dropped = dropped | (deselected & (per_token(batch.adv, batch.logp) != 0))
    ratio = facts.ratio.expand_as(batch.logp)
    rows = torch.stack([ratio.square(), dropped.to(ratio.dtype), torch.where(dropped, entropy, 0.0)])
    known, kl, kl_k1, kl_entropy = torch.zeros(4, dtype=kind, device=batch.logp.device).unbind()
    if sampler is not None:
        old = batch.logp if batch.logp_old is None else batch.logp_old
        given = inside & sampler.isfinite()
        # In float64: for a small d, 1 + d + d²/2 − 1 − d leaves nothing of fp32.
        d = torch.where(given, old.to(kind) - sampler.to(kind), 0.0)
        of_row = entropy if batch.entropy_old is None else batch.entropy_old
        by_token = torch.stack([given.to(kind), d.expm1() - d, -d, of_row.to(kind)])
        known, kl, kl_k1, kl_entropy = masked_sums(by_token, given).unbind()
    squared, num_dropped, of_dropped = masked_sums(rows, inside).unbind()
    steps = age * inside.sum(dtype=kind)
    return OffPolicySums(squared, num_dropped, of_dropped, steps, known, kl, kl_k1, kl_entropy)


def off_policy_row(tokens: TokenSums, sums: OffPolicySums) -> dict[str, float]:
    """The sums of a step, over all ranks, as fields of its row; what is not known is absent."""
    n = max(tokens.tokens, 1.0)
    row = {"policy/age": sums.age / n, "clip/dropped_frac": sums.dropped / n}
    if tokens.entropy:
        row["clip/entropy_share"] = sums.dropped_entropy / tokens.entropy
    if sums.ratio_squared:
        row["ratio/ess_frac"] = tokens.ratio * tokens.ratio / (n * sums.ratio_squared)
    if sums.known:
        row |= {"mismatch/kl": sums.kl / sums.known, "mismatch/kl_k1": sums.kl_k1 / sums.known}
    if sums.kl_entropy:
        row["mismatch/kl_over_entropy"] = sums.kl / sums.kl_entropy
    return row


def masked_sums(rows: Tensor, mask: Tensor) -> Tensor:
    """``[n]`` sums of ``[n b t]`` over the masked tokens, in float64 if the device has it."""
    return torch.where(mask.bool(), rows, 0.0).sum((1, 2), dtype=sum_dtype(rows.device))


def _tensors(sums: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in sums:
        if isinstance(value, tuple):
            yield from _tensors(value)
        else:
            yield value


def _rebuilt(like: Sums, values: Iterator[Any]) -> Sums:
    kind = cast(Any, type(like))
    return kind(*(_rebuilt(x, values) if isinstance(x, tuple) else next(values) for x in like))


def add(one: Sums, other: Sums) -> Sums:
    """Two NamedTuples of tensors, nested or not, field by field."""
    return _rebuilt(one, iter([a + b for a, b in zip(_tensors(one), _tensors(other), strict=True)]))


def reduce(sums: Sums, over_ranks: Callable[[Tensor], Tensor]) -> Sums:
    """Add up a NamedTuple of tensors over ranks by one reduction of one vector; numbers, or lists for ``[n]`` fields.

    Example:
        >>> reduce(SumCount(torch.tensor(1.0), torch.tensor([2.0, 3.0])), lambda vector: 2 * vector)
        SumCount(sum=2.0, count=[4.0, 6.0])
    """
    tensors = list(_tensors(sums))
    vector = over_ranks(torch.cat([x.reshape(-1) for x in tensors])).tolist()
    values, start = [], 0
    for x in tensors:
        part = vector[start : start + x.numel()]
        values.append(part if x.dim() else part[0])
        start += x.numel()
    return _rebuilt(sums, iter(values))


class ControlLoop:
    """The controller of one process; every rank has the same state, since it sees the same reduced readings.

    A refused reading never moves the knob. The first one of a run raises at once, before anything is saved; ten
    in a row end the run by ``save_and_stop``. Without a knob under control a refused reading is a warning.

    Args:
        recipe: composed and checked.
        steps: optimizer steps of the whole run, if known.
        save_and_stop: saves what the engine can save and ends the run with an :class:`EntropyReadingError`, at once or
            as soon as a checkpoint is written; the default raises unsaved.
        vocabulary: number of tokens that the model chooses from, if known; its log bounds every target.

    Raises:
        ValueError: a target in nats above log of the vocabulary.

    Attributes:
        state: the thermostat's, or None if nothing is under control.
        refused: readings refused in a row.
        watched: how long the knob has been at a bound, and how entropy moved meanwhile.
        masked_by: the setting of the engine that may mask every token, for messages.
    """

    def __init__(
        self,
        recipe: Recipe,
        steps: int | None = None,
        save_and_stop: Callable[[str], None] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.recipe, self.vocabulary = recipe, vocabulary
        self.save_and_stop = save_and_stop or stop_unsaved
        self.thermostat = build_thermostat(recipe, steps, vocabulary)
        self.state: ThermostatState | None = self.thermostat.init() if self.thermostat else None
        self.range = knob_range(recipe) if self.thermostat else None
        self.watchdog = Watchdog(recipe.knob or "", self.range) if self.range else None
        self.watched = WatchdogState()
        self.refused = 0
        self.masked_by = ""
        self._held_out = (0.0, 0.0)
        self._sums: Any = None

    def extend_to(self, *ends: int) -> None:
        """Tell a target that covers the whole run its length: the optimizer steps done at the end of each task."""
        self.thermostat = build_thermostat(self.recipe, ends, self.vocabulary)

    @property
    def value(self) -> float | None:
        """The knob in force, or None."""
        return None if self.state is None else self._within(self.state.value)

    def _within(self, value: float) -> float:
        """A value that a controller, maybe one of the user's, asks for, within the knob's range.

        Raises:
            ValueError: one that is not a finite number.
        """
        assert self.range is not None
        if not math.isfinite(value):
            raise ValueError(f"controller of {self.recipe.knob} asks for {value}, not a finite number; correct it")
        return self.range.clip(float(value))

    @property
    def recipe_now(self) -> Recipe:
        """The recipe with its knob in force."""
        return with_knob(self.recipe, self.value)

    def tell_held_out(self, right: float, count: float) -> None:
        """Note an evaluation on held-out prompts, on the process that made it; the next step's reading carries it.

        Args:
            right: number of right answers, or Σ of their accuracies.
            count: number of answers.
        """
        self._held_out = (self._held_out[0] + right, self._held_out[1] + count)

    def take_held_out(self) -> tuple[float, float]:
        """What evaluations found since the last step, for the first micro-batch of this one to carry."""
        told, self._held_out = self._held_out, (0.0, 0.0)
        return told

    def observe(self, sums: tuple[Any, ...]) -> None:
        """Add a micro-batch: a NamedTuple of tensors, of one type throughout."""
        self._sums = sums if self._sums is None else add(self._sums, sums)

    @property
    def observed(self) -> bool:
        """Whether the step under way has seen a micro-batch."""
        return self._sums is not None

    def reduced(self, over_ranks: Callable[[Tensor], Tensor]) -> Any:
        """End the step: its sums over all micro-batches and ranks, as numbers."""
        sums, self._sums = self._sums, None
        assert sums is not None
        return reduce(sums, over_ranks)

    def regulate(self, reading: EntropyReading, act: bool) -> None:
        """Move the knob for the next step.

        Args:
            reading: of the step, over all ranks.
            act: whether a controller without ``every`` acts now: at the end of a generated batch.

        Raises:
            ValueError: the first reading of the run is refused.
            EntropyReadingError: ten in a row were, if the engine ends the run at once.
        """
        problem = reading.problem()
        if problem and not reading.count > 0 and self.masked_by:
            problem = f"{problem} ({self.masked_by})"
        self.refused = self.refused + 1 if problem else 0
        if self.thermostat is None or self.state is None:
            if self.refused == 1:
                logger.warning("entropy reading refused: %s", problem)
            return
        if problem and self.state.readings == 0 and self.state.refused == 0:
            raise ValueError(f"the first entropy reading is refused: {problem}; no checkpoint was written")
        before = self.state
        self.state = self.thermostat.update(before, reading, act=act)
        self._watch(before, reading)
        if self.state.cut_out and not before.cut_out:
            logger.warning(
                "entropy is %.3f nats per token, above %g x both its target and its first reading: %s is kept from "
                "raising it until it is below",
                reading.mean,
                CUT_OUT,
                self.recipe.knob,
            )
        if problem:
            logger.warning("entropy reading refused (%s in a row), the knob is held: %s", self.refused, problem)
        if self.refused >= MAX_REFUSED:
            self.save_and_stop(f"{self.refused} entropy readings in a row were refused: {problem}")

    def _watch(self, before: ThermostatState, reading: EntropyReading) -> None:
        """Warn of a knob that is at its bound, and of a target that turned out to be above any entropy."""
        assert self.thermostat is not None
        assert self.watchdog is not None
        assert self.state is not None
        target = self.thermostat.level(before) if self.thermostat.steers(before) else None
        self.watched = self.watchdog.update(self.watched, reading, target, self._within(before.value))
        if message := self.watchdog.message(self.watched):
            logger.warning("%s", message)
        level = self.thermostat.level(self.state)
        if level is not None and self.thermostat.level(before) is None:
            try:
                feasible(level, self.vocabulary)
            except ValueError as error:
                logger.warning("target %s of the measured start is out of reach: %s", self.recipe.target, error)

    def row(self, sums: TokenSums, reading: EntropyReading, before: ThermostatState | None) -> dict[str, Any]:
        """The row of a step for metrics.jsonl, as far as sums and the controller make it.

        Args:
            sums: over all ranks.
            reading: the step's.
            before: the state during the step.
        """
        n = max(sums.tokens, 1.0)
        row: dict[str, Any] = {
            "entropy/mean": reading.mean,
            "entropy/tokens": reading.count,
            "entropy/refused": self.refused,
            "clip/low_frac": sums.clipped_low / n,
            "clip/high_frac": sums.clipped_high / n,
            "ratio/mean": sums.ratio / n,
            "ratio/outside_frac": sums.outside / n,
            "cov/adv_logp": sums.adv_logp / n - sums.adv / n * sums.logp / n,
            "adv/mean": sums.adv / n,
            **group_row(reading.groups, reading.count),
        }
        if self.thermostat is None or self.state is None or before is None:
            return row
        assert self.range is not None
        target = self.thermostat.level(self.state)
        error = None if target is None else (reading.mean - target) / target
        if error is not None and self.range.one_way:
            error = min(error, 0.0)
        if why := self.thermostat.why(self.state):
            row["entropy/target_why"] = why
        return row | {
            "entropy/target": target,
            "entropy/error": error,
            "knob/value": self._within(before.value),
            "knob/saturated": int(self.range.saturated(self._within(before.value))),
            **({"knob/cut_out": 1} if before.cut_out else {}),
        }

    def as_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        state = None if self.state is None else to_json(self.state)
        return {
            "recipe": self.recipe.as_dict(),
            "state": state,
            "watched": self.watched._asdict(),
            "refused": self.refused,
            "held_out": list(self._held_out),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint; start anew, with a warning, if it controlled nothing or something else.

        Raises:
            ValueError: a checkpoint that holds no state of this controller.
        """
        # A run that ten refusals ended is given ten more.
        self.refused = saved["refused"] if saved["refused"] < MAX_REFUSED else 0
        self._held_out = tuple(saved.get("held_out", (0.0, 0.0)))
        if self.thermostat is None:
            return
        self.state = self.thermostat.init()
        if saved["state"] is None:
            logger.warning("the checkpoint was saved without control: the controller starts anew")
            return
        now = self.recipe.as_dict()
        changed = [name for name in ("knob", "controller", "target") if saved["recipe"][name] != now[name]]
        if changed:
            logger.warning("%s changed since the checkpoint: the controller starts anew", ", ".join(changed))
            return
        try:
            self.state = self.thermostat.restore(saved["state"])
            self.watched = WatchdogState(**saved.get("watched", {}))
            self._within(self.state.value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the checkpoint holds no state that controller {now['controller']} can continue from ({error}); "
                "resume with the controller that wrote it, or start a new run"
            ) from None


def stop_unsaved(reason: str) -> NoReturn:
    """End a run that an engine cannot save.

    Raises:
        EntropyReadingError: always.
    """
    raise EntropyReadingError(f"{reason}; resume from the last checkpoint")


def saved_in(folder: str | Path) -> dict[str, Any] | None:
    """Our part of a checkpoint; None, with a warning, if it has none."""
    path = Path(folder) / CHECKPOINT_FILE
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    logger.warning("%s has no %s: the controller starts anew", folder, CHECKPOINT_FILE)
    return None
