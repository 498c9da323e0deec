"""The fused head of :mod:`isentropic.entropy.kernels` in place of TRL's, behind TRL's own call.

TRL scores tokens by ``model(..., labels=..., fused_lm_head=True)``: the backbone, then one function from the last
hidden states and the head to log-probabilities and entropies. That one function is exchanged while such a call runs,
and for the models it was installed in alone; gathering, masking, capping, scaling and auxiliary losses stay TRL's.
The last hidden states can also be kept on their way to a head, for whole rows of log-probabilities.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...entropy.kernels import fused_logp
from ...types import TokenStats
from .compat import Trainer, log_prob_function, replaceable_head

# The outputs that this head can return, of those that TRL may ask for.
KNOWN_OUTPUTS = {"log_probs", "entropy", "log_sum_sq_probs"}
# On CUDA the kernels are Triton's if it is installed, and else the same plain torch as on the CPU.
DEVICES = ("cpu", "cuda")


class _Head:
    """Takes the place of TRL's autograd function for one call, and keeps the statistics of the last one."""

    def __init__(self) -> None:
        self.stats: TokenStats | None = None
        self.mask: torch.Tensor | None = None
        self.native: Any = None

    def apply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """TRL's arguments in, TRL's tuple out."""
        self.stats = None
        if not KNOWN_OUTPUTS.issuperset(outputs):
            return self.native.apply(hidden, weight, bias, ids, temperature, chunk_size, softcap, scale, outputs)
        assert self.mask is not None
        # If TRL has not left out the unscored positions itself, the mask does.
        every = self.mask.numel() == len(ids)
        mask = self.mask.reshape(-1) if every else None
        stats = fused_logp(
            hidden, weight, ids, float(temperature), mask=mask, bias=bias, softcap=softcap, scale=float(scale)
        )
        self.stats = TokenStats(*(self._placed(x.detach(), every) for x in stats if x is not None))
        assert stats.sum_p2 is not None
        return (
            stats.logp,
            stats.entropy if "entropy" in outputs else None,
            stats.sum_p2.log() if "log_sum_sq_probs" in outputs else None,
            None,
            None,
        )

    def _placed(self, x: torch.Tensor, every: bool) -> torch.Tensor:
        assert self.mask is not None
        return x.reshape(self.mask.shape) if every else x.new_zeros(self.mask.shape).masked_scatter(self.mask, x)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _models(target: Any) -> list[Any]:
    """The causal language models of a trainer, the policy first, or the one that was given."""
    if not hasattr(target, "accelerator"):
        return [_base(target)]
    unwrap = target.accelerator.unwrap_model
    policy, reference = target.model, getattr(target, "ref_model", None)
    return [_base(unwrap(model)) for model in (policy, reference) if model is not None]


def device_type(x: torch.Tensor) -> str:
    """The kind of device that a tensor is on."""
    return x.device.type


def _replaceable(model: Any) -> bool:
    """Whether TRL has given this model its fused head, and the head is a plain linear layer held here whole."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if type(head) is not torch.nn.Linear or hasattr(head.weight, "ds_id") or not replaceable_head(model):
        return False
    return device_type(head.weight) in DEVICES


def install(target: Any) -> bool:
    """Have TRL score tokens by :func:`isentropic.entropy.kernels.fused_logp`, in all models of a trainer or in none.

    Call it once the trainer is made. Log-probabilities and entropies then come from fp32 logits whatever the dtype of
    the model, positions that are not scored are not computed, and the moments that predictions need are read on the
    way (:func:`last_stats`). Training is not bit-identical to TRL's any more: it rounds less.

    Args:
        target: a GRPOTrainer, or a causal language model that went through ``trl``'s ``add_fused_lm_head``.

    Returns:
        False, with nothing changed, if a head is not known here: not a plain ``nn.Linear`` (quantised, or carrying
        an adapter), partitioned by DeepSpeed ZeRO-3, on another device, or without TRL's own fused head.
    """
    models = _models(target)
    if not all(_replaceable(model) for model in models):
        return False
    for model in models:
        if "_isentropic_head" not in model.__dict__:
            _wrap(model)
    return True


def _wrap(model: Any) -> None:
    inner, head = model.forward, _Head()

    @functools.wraps(inner)
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return inner(*args, **kwargs)
        labels = kwargs.get("shift_labels")
        labels = kwargs["labels"][:, 1:] if labels is None else labels
        head.mask = labels.to(model.get_output_embeddings().weight.device) != -100
        with log_prob_function(head) as head.native:
            return inner(*args, fused_lm_head=True, **kwargs)

    model.forward, model._isentropic_head = forward, head


def last_stats(target: Any) -> TokenStats | None:
    """The statistics of the last scoring call of the policy, taken: a second reading gives None.

    Args:
        target: what :func:`install` was called with.

    Returns:
        ``[b s-1]`` each, as the labels without their first column (``[b s]`` for ``shift_labels``), without gradient,
        0 at positions that were not scored; those of a completion of t tokens are ``[:, -t:]``. None if this head made
        no call since the last reading.
    """
    head = _models(target)[0].__dict__.get("_isentropic_head")
    if head is None:
        return None
    stats, head.stats = head.stats, None
    return stats


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
