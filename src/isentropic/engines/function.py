"""Entropy control for any engine that takes its loss as a function: packed, padded, or a tensor for each sequence.

Such an engine hands log-probabilities to a function and minimises what it returns. :class:`LossControl` is that
function: ``loss`` is called on each micro-batch, ``step`` once after the optimizer has stepped. Sampling, advantages,
parallelism and checkpoints are the engine's, and so is the reduction: a recipe's baseline and reduction are not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..recipes import Recipe, check
from ..recipes.apply import detached, finite, penalty, per_token
from ..recipes.compose import refuse_redraw
from ..types import EntropyReading, GroupFacts, TokenBatch
from .groups import group_sums
from .loop import ControlLoop, OffPolicySums, TokenSums, masked_sums, off_policy_row, off_policy_sums, token_sums
from .packing import Layout, Values
from .rewrite import Rewritten, advantages_at, predicted_sums, rewrite

DIVISORS = ("tokens", "sequences")


class LossSums(NamedTuple):
    """The sums of an optimizer step.

    Attributes:
        of_tokens, off_policy: over the tokens.
        of_groups: what is known of the groups.
        sequences: sequences with a token that counts.
        calls, exact: of the loss, and those that came with entropies.
        change: Σ of the predicted entropy change, per unit of learning rate.
        gain: Σ of its derivative by the knob.
    """

    of_tokens: TokenSums
    off_policy: OffPolicySums
    of_groups: GroupFacts
    sequences: Any
    calls: Any
    exact: Any
    change: Any
    gain: Any


class LossControl:
    """The controller of one process, behind the loss that an engine calls; every rank has the same state.

    Args:
        recipe: composed; its knob, controller and target.
        updates: optimizer steps per generated batch, if known; after them a controller without ``every`` acts.
        steps: optimizer steps of the whole run, if known.
        over_ranks: adds up a vector over the ranks that see different tokens; ``None`` for one process.
        divided_by: what the engine divides the sum of its losses by afterwards, over a step and all ranks: ``tokens``,
            ``sequences`` or a number. Only the predicted change depends on it.
        vocabulary: number of tokens that the model chooses from, if known.

    Attributes:
        loop: the controller and its state.
        steps_done: optimizer steps done.

    Raises:
        ValueError: a recipe that cannot work; one that samples again or rewards by length, which is the engine's part.

    Example:
        >>> from isentropic.recipes import compose
        >>> control = LossControl(compose("loop", knob="beta", controller="sign_step:step=0.1", target="1.0"))
        >>> logp = torch.tensor([-0.5, -3.0], requires_grad=True)  # one sequence
        >>> adv, mask, entropy = torch.tensor([1.0, -1.0]), torch.ones(2), torch.tensor([0.5, 0.9])
        >>> control.loss(logp, logp.detach(), adv, mask, entropy).backward()  # −Σ A, as the knob is at 0
        >>> logp.grad
        tensor([-1.,  1.])
        >>> round(control.step(rate=1e-6)["entropy/mean"], 3), control.loop.value
        (0.7, 0.1)
    """

    def __init__(
        self,
        recipe: Recipe,
        updates: int | None = None,
        steps: int | None = None,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
        divided_by: str | float = 1.0,
        vocabulary: int | None = None,
    ):
        for name in ("dynamic_sampling", "overlong_buffer"):
            if setting := getattr(recipe, name):
                raise ValueError(f"a loss function cannot do {name}, got {setting}; switch it off in the recipe")
        refuse_redraw(recipe, "a loss function")
        if divided_by not in DIVISORS and not (isinstance(divided_by, int | float) and divided_by > 0):
            raise ValueError(
                f"divided_by must be tokens, sequences or a number > 0, got {divided_by!r}; 1 if by nothing"
            )
        self.recipe, self.updates, self.divided_by = check(recipe, updates), updates, divided_by
        self.loop = ControlLoop(recipe, steps, vocabulary=vocabulary)
        self.over_ranks = over_ranks
        self.steps_done = 0
        self._exact: bool | None = None
        self._zero = torch.zeros((), dtype=torch.float64)

    def loss(
        self,
        logp: Values,
        logp_old: Values | None,
        adv: Values,
        mask: Values,
        entropy: Values | None = None,
        *,
        sequences: Tensor | None = None,
        weight: Values | float = 1.0,
        reduce: Callable[[Tensor], Tensor] = torch.sum,
        sampler: Values | None = None,
        age: int = 0,
        entropy_old: Values | None = None,
        logp_rows: Values | None = None,
        **of_sequences: Tensor,
    ) -> Tensor:
        """The loss of a micro-batch, ``Σ weight·loss`` over the masked tokens, a scalar with the recipe's gradient.

        Its value is that of :mod:`.rewrite`. A call whose ``logp`` has no gradient is an evaluation, and is not read.

        Args:
            logp: of the sampled tokens, nats: ``[b t]`` or ``[t]``, packed with ``sequences``, or a list of ``[t]``.
            logp_old: when the batch was generated; ``None`` means exactly on-policy.
            adv: of each token or of each sequence, without a factor that belongs to the reduction.
            mask: 1 where the policy generated the token.
            entropy: of the rows, nats, with gradient if the recipe has an entropy bonus. Without it entropy is the
                sampled estimate −log π, and nothing is predicted.
            sequences: of the tokens of a packed batch; :func:`.packing.sequence_ids` makes them from position ids.
            weight: factor of the loss of each token or sequence, not differentiated: a normaliser, a truncated ratio.
            reduce: how the engine adds up losses in the layout of ``logp``, a linear function; a list's in one row.
            sampler: log-probabilities that the sampler gave, NaN where it gave none.
            age: optimizer steps between the weights that sampled and these.
            entropy_old, logp_rows: as in :class:`~isentropic.types.TokenBatch`.
            of_sequences: its fields of a value for each sequence: ``reward``, ``group_rate`` and so on.

        Raises:
            ValueError: shapes that do not match, or a recipe that reads what is not passed.
        """
        layout, recipe = Layout(logp, sequences), self.loop.recipe_now
        tokens = {"logp": logp, "logp_old": logp_old, "adv": adv, "mask": mask, "entropy": entropy}
        fields = {name: layout.rows(name, x) for name, x in {**tokens, "entropy_old": entropy_old}.items()}
        fields["logp_rows"] = layout.rows("logp_rows", logp_rows, wide=True)
        fields |= {name: layout.of_sequences(name, x) for name, x in of_sequences.items()}
        # Losses are fp32 at least, whatever the engine computes in.
        moving = TokenBatch(**{n: x if x is None or x.element_size() > 2 else x.float() for n, x in fields.items()})  # type: ignore[arg-type]
        self._check(recipe, moving)
        inside, raw = moving.mask.bool(), detached(moving)
        still = raw
        if raw.entropy is not None:
            # A token whose entropy is broken is left unshaped (L = 0): a faulty head must not reach the weights.
            still = raw._replace(entropy=torch.where(raw.entropy.isfinite(), raw.entropy, -raw.logp))
        rewritten = rewrite(recipe, still, native=False)
        # Outside the mask a log-probability may be anything, a NaN too.
        by_token = -torch.where(inside, moving.logp - still.logp, 0.0).exp() * rewritten.advantages
        if recipe.penalty != "none":
            by_token = by_token + recipe.penalty_coef * penalty(recipe, moving)
        if recipe.entropy_coef:
            by_token = by_token - recipe.entropy_coef * finite(_present(moving.entropy))
        factor = layout.rows("weight", by_token.new_full((), weight) if isinstance(weight, int | float) else weight)
        factor = torch.where(inside, per_token(_present(factor).detach().to(by_token), by_token), 0.0)

        def reduced(x: Tensor) -> Tensor:
            return reduce(layout.back(torch.where(inside, factor * x, 0.0)))

        if moving.logp.requires_grad:
            sums = self._predict(recipe, still, rewritten, _slope(reduced, by_token))
            read = raw if raw.entropy is not None else raw._replace(entropy=-raw.logp)
            self._observe(read, rewritten, sums, raw.entropy is not None, layout.rows("sampler", sampler), age)
        return reduced(by_token)

    def _check(self, recipe: Recipe, batch: TokenBatch) -> None:
        exact = batch.entropy is not None
        if self._exact not in (None, exact):
            raise ValueError("entropy must come with each loss of a run or with none, got both; pass it always")
        self._exact = exact
        bonus = recipe.entropy_coef or recipe.knob == "entropy_coef"
        needed = [("entropy", batch.entropy)] if bonus else []
        if recipe.component("penalty").reads & {"logp_rows"}:
            needed.append(("logp_rows", batch.logp_rows))
        for name, x in needed:
            if batch.logp.requires_grad and not (x is not None and x.requires_grad):
                got = "None" if x is None else "it without one"
                raise ValueError(
                    f"{'the entropy bonus' if name == 'entropy' else recipe.penalty} of this recipe needs {name} with "
                    f"gradient, got {got}; have the engine compute it, or take a recipe that shapes or clips"
                )

    def _predict(self, recipe: Recipe, still: TokenBatch, rewritten: Rewritten, share: Tensor) -> tuple[Tensor, ...]:
        """Σ of the predicted change, without moments, a unit of learning rate, and of its derivative by the knob."""
        if still.entropy is None:
            return masked_sums(torch.zeros(2, *still.logp.shape, device=still.logp.device), still.mask).unbind()

        def weights(end: Recipe) -> Tensor:
            return rewritten.advantages if end is recipe else advantages_at(end, still, rewritten)

        return predicted_sums(self.recipe, recipe, self.loop.value, still, share, weights)

    def _observe(
        self,
        read: TokenBatch,
        rewritten: Rewritten,
        predicted: tuple[Tensor, ...],
        exact: bool,
        sampler: Tensor | None,
        age: int,
    ) -> None:
        """Add a micro-batch to the sums of its step, without a synchronisation."""
        facts, one = rewritten.facts, torch.ones_like(predicted[0])
        assert facts is not None
        self._zero = torch.zeros_like(one)  # on the device that ranks add up on
        out = None if rewritten.factors is None else rewritten.factors == 0
        parts = token_sums(read, facts), off_policy_sums(read, facts, age, out, sampler)
        groups, sequences = group_sums(read, self.loop.take_held_out()), read.mask.bool().any(1).sum().to(one)
        self.loop.observe(LossSums(*parts, groups, sequences, one, one * exact, *predicted))

    def step(
        self, reading: EntropyReading | None = None, rate: float | None = None, act: bool | None = None
    ) -> dict[str, Any]:
        """End an optimizer step: add up all ranks and move the knob. Every rank calls it, even if it had no loss.

        Args:
            reading: entropy of the step over all ranks, in place of that of the losses, if the engine has a better one.
            rate: learning rate of the step, the same on every rank; without it nothing is predicted.
            act: whether a generated batch ends here; by default after ``updates`` steps.

        Returns:
            The row of the step for a log; empty, and nothing moves, if there was neither a loss nor a reading.

        Raises:
            ValueError: the first reading of the run is refused.
            EntropyReadingError: ten in a row were.
        """
        if not self.loop.observed:
            zero, kinds = self._zero, (TokenSums, OffPolicySums, GroupFacts)
            nothing = [cast(Any, kind)(*[zero] * len(kind._fields)) for kind in kinds]
            self.loop.observe(LossSums(*nothing, *[zero] * 5))
        sums: LossSums = self.loop.reduced(self.over_ranks or (lambda vector: vector))
        if not sums.calls and reading is None:
            return {}
        before, self.steps_done = self.loop.state, self.steps_done + 1
        own = self._reading(sums, rate)
        reading = (
            own if reading is None else own._replace(sum=reading.sum, count=reading.count, estimator=reading.estimator)
        )
        self.loop.regulate(reading, self.steps_done % (self.updates or 1) == 0 if act is None else act)
        row = self.loop.row(sums.of_tokens, reading, before) | off_policy_row(sums.of_tokens, sums.off_policy)
        if reading.estimator != "exact":
            row["entropy/sampled"] = row.pop("entropy/mean")
        if reading.steps:
            row |= {"predict/change": reading.predicted, "predict/gain": reading.gain, "predict/moments": 0}
        return row

    def _reading(self, sums: LossSums, rate: float | None) -> EntropyReading:
        """The reading of a step, with the change that its losses predict at a learning rate."""
        tokens = sums.of_tokens
        estimator = "exact" if sums.exact else "sampled"
        reading = EntropyReading(tokens.entropy, tokens.tokens, estimator, rate=rate, groups=sums.of_groups)
        if not sums.exact or rate is None:
            return reading
        counts = {"tokens": tokens.tokens, "sequences": sums.sequences}
        by = counts[self.divided_by] if isinstance(self.divided_by, str) else self.divided_by
        scale = rate / max(by, 1.0) if isinstance(self.divided_by, str) else rate / by
        return reading._replace(predicted=scale * sums.change, gain=scale * sums.gain, steps=1)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON; take it between two steps."""
        return {"step": self.steps_done, **self.loop.as_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit; anew, with a warning, if knob, controller or target are others.

        Raises:
            ValueError: it holds no state of this controller.
        """
        self.steps_done = saved["step"]
        self.loop.restore(saved)


def _slope(reduced: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The derivative of a reduction by the loss of each token."""
    with torch.enable_grad():
        zero = torch.zeros_like(like, requires_grad=True)
        return torch.autograd.grad(reduced(zero), zero)[0]


def _present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
