"""The logits of a micro-batch on their way from verl's model to its loss: whole rows, for components that read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .compat import Engine, Keys, answers_of, temperature_of


class Logits:
    """Keeps the logits of the micro-batch under way, packed ``[tokens v]`` and as the head gave them.

    They are not put among the model's outputs, which verl holds until the end of an optimizer step.

    Attributes:
        wanted: whether a component of the recipe reads whole rows.
        once: whether the next micro-batch's are wanted for a look.
    """

    def __init__(self, wanted: bool = False) -> None:
        self.wanted, self.once = wanted, False
        self._open = False
        self._kept: torch.Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what passes inside."""
        self._open = True
        try:
            yield
        finally:
            self._open, self._kept = False, None

    def keep(self, engine: Engine, output: Any, data: Any) -> None:
        """See the output of the model's forward pass.

        Raises:
            ValueError: whole rows are wanted, and there are none.
        """
        if not self._open or not (self.wanted or self.once):
            return
        logits = getattr(output, "logits", None)
        split = getattr(engine, "ulysses_sequence_parallel_size", 1)
        if logits is None or split > 1:
            if self.wanted:
                got = "use_fused_kernels=True" if logits is None else f"ulysses_sequence_parallel_size={split}"
                raise ValueError(
                    "this recipe reads whole rows of log-probabilities, which verl's engine does not make here, got "
                    f"{got}; set actor_rollout_ref.model.use_fused_kernels=False and "
                    "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1, or take another recipe"
                )
            return
        self._kept = packed(logits, data[Keys.IDS])

    def take(self) -> torch.Tensor | None:
        """Those of this micro-batch, once."""
        kept, self._kept, self.once = self._kept, None, False
        return kept


def packed(logits: Any, input_ids: Any) -> torch.Tensor:
    """``[tokens v]``, whether the batch came packed, ``[1 tokens v]``, or padded on the right, ``[b s v]``."""
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    lengths = input_ids.offsets().diff()
    if logits.shape[0] == 1:
        return logits[0, : int(lengths.sum())]
    here = torch.arange(logits.shape[1], device=logits.device) < lengths.to(logits.device)[:, None]
    return logits[here]


def rows_of(logits: torch.Tensor | None, data: Any) -> torch.Tensor:
    """The log-probabilities of the rows that the answers were sampled from, ``[b t v]`` in fp32, with gradient."""
    assert logits is not None
    return answers_of((logits.float() / temperature_of(data)).log_softmax(-1), data)
