"""The last hidden states of a model on their way to the head, and what a plain product with the head makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .compat import Trainer


def head_of(model: Any) -> tuple[Any, Any] | None:
    """The backbone and the output embedding of a causal language model, PEFT or not; None if it is not known."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    get_head = getattr(base, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    backbone = getattr(base, "base_model", None)
    known = isinstance(head, torch.nn.Module) and isinstance(getattr(head, "weight", None), torch.Tensor)
    return (backbone, head) if known and isinstance(backbone, torch.nn.Module) and backbone is not base else None


def plain_logits(config: Any) -> bool:
    """Whether the model leaves its logits unscaled."""
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    return all(getattr(config, name, None) is None for name in names)


def whole(x: torch.Tensor) -> torch.Tensor:
    """A parameter that FSDP2 has sharded, gathered."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # pyrefly: ignore


def logits_of(hidden: torch.Tensor, head: Any, config: Any) -> torch.Tensor:
    """``[... v]`` logits in fp32 from ``[... d]`` hidden states, by a plain product with the head."""
    logits = hidden.float() @ whole(head.weight).float().T
    logits = logits if head.bias is None else logits + whole(head.bias).float()
    softcap = getattr(config, "final_logit_softcapping", None)
    return logits if softcap is None else softcap * (logits / softcap).tanh()


class WholeRows:
    """Whole rows of log-probabilities of the completions, from the last hidden states on their way, with gradient.

    They are ``[b t v]`` in fp32: components that read them suit small vocabularies, or small micro-batches.

    Raises:
        ValueError: a model whose head is not known, scales its logits, or is sharded over processes.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._hidden: list[torch.Tensor] = []
        model = trainer.accelerator.unwrap_model(trainer.model)
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if head_of(model) is None or not plain_logits(model.config.get_text_config()) or sharded:
            readers = [str(c) for c in trainer.recipe.components().values() if "logp_rows" in c.reads]
            raise ValueError(
                f"{', '.join(readers)} reads whole rows of log-probabilities, and this model's head is sharded, scaled "
                "or not known; take a recipe without it, or train without FSDP and DeepSpeed"
            )

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Keep the last hidden states of the forward passes inside, with their graph."""
        known = head_of(self.trainer.accelerator.unwrap_model(model))
        assert known is not None
        self._hidden = []
        handle = known[0].register_forward_hook(lambda m, a, out: self._hidden.append(out.last_hidden_state))
        try:
            yield
        finally:
            handle.remove()

    def take(self, length: int) -> torch.Tensor:
        """The rows of completions of that length."""
        hidden, self._hidden = torch.cat(self._hidden)[:, -length - 1 : -1], []
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        known = head_of(model)
        assert known is not None
        with torch.autocast(hidden.device.type, enabled=False):
            logits = logits_of(hidden.float(), known[1], model.config.get_text_config())
            return (logits / float(self.trainer.temperature)).log_softmax(-1)
