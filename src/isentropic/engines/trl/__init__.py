"""Entropy control inside TRL's GRPOTrainer: the trainer's own loss is wrapped, never copied."""

from typing import TYPE_CHECKING

from ... import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "trainer": ("EntropyControlConfig", "EntropyControlMixin", "IsentropicConfig", "IsentropicTrainer"),
        "audit": ("StartAudit", "audit_trainer"),
        "callbacks": ("EntropyGuard",),
        "rollout": ("Rollout",),
    },
)

if TYPE_CHECKING:
    from .audit import StartAudit, audit_trainer
    from .callbacks import EntropyGuard
    from .rollout import Rollout
    from .trainer import EntropyControlConfig, EntropyControlMixin, IsentropicConfig, IsentropicTrainer
