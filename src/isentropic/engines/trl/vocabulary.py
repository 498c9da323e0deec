"""Whole rows of log-probabilities, for the penalties that look at more than the sampled token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .explain import head_of, logits_of, plain_logits


class Rows:
    """Whole rows of log-probabilities of the completions, from the last hidden states on their way, with gradient.

    They are ``[b t v]`` in fp32: penalties that need them suit small vocabularies, or small micro-batches.

    Raises:
        ValueError: a model whose head is not known, scales its logits, or is sharded over processes.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._hidden: list[torch.Tensor] = []
        model = trainer.accelerator.unwrap_model(trainer.model)
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if head_of(model) is None or not plain_logits(model.config.get_text_config()) or sharded:
            raise ValueError(
                f"penalty {trainer.recipe.penalty} needs whole rows of log-probabilities, and this model's head is "
                "sharded, scaled or not known; take a recipe without it, or train without FSDP and DeepSpeed"
            )

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Keep the last hidden states of the forward passes inside, with their graph."""
        found = head_of(self.trainer.accelerator.unwrap_model(model))
        assert found is not None
        self._hidden = []
        handle = found[0].register_forward_hook(lambda m, a, out: self._hidden.append(out.last_hidden_state))
        try:
            yield
        finally:
            handle.remove()

    def take(self, length: int) -> torch.Tensor:
        """The rows of completions of that length."""
        hidden, self._hidden = torch.cat(self._hidden)[:, -length - 1 : -1], []
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        found = head_of(model)
        assert found is not None
        with torch.autocast(hidden.device.type, enabled=False):
            logits = logits_of(hidden.float(), found[1], model.config.get_text_config())
            return (logits / float(self.trainer.temperature)).log_softmax(-1)
