"""Entropy control inside TRL's GRPOTrainer: the trainer's own loss is wrapped, never copied."""

from typing import TYPE_CHECKING

from ... import lazy

if TYPE_CHECKING:
    from .audit import StartAudit as StartAudit
    from .audit import audit_trainer as audit_trainer
    from .callbacks import EntropyGuard as EntropyGuard
    from .rollout import Rollout as Rollout
    from .trainer import EntropyControlConfig as EntropyControlConfig
    from .trainer import EntropyControlMixin as EntropyControlMixin
    from .trainer import IsentropicConfig as IsentropicConfig
    from .trainer import IsentropicTrainer as IsentropicTrainer
    from .wrap import control as control
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "trainer": ("EntropyControlConfig", "EntropyControlMixin", "IsentropicConfig", "IsentropicTrainer"),
            "audit": ("StartAudit", "audit_trainer"),
            "callbacks": ("EntropyGuard",),
            "rollout": ("Rollout",),
            "wrap": ("control",),
        },
    )
