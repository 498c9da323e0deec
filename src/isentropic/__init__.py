"""isentropic steers the entropy of a language model while it is trained by reinforcement learning.

Public names are listed here and resolved on first use, so that ``import isentropic`` needs no torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("isentropic")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

_ROOMS = {
    "types": ("EntropyReading", "TokenBatch", "TokenFacts", "TokenStats"),
    "reduce": ("SumCount",),
    "kernels": ("fused_logp", "fused_policy_loss", "token_stats"),
    "entropy": ("logits_stats", "sampled_entropy", "token_entropy"),
    "dynamics": ("attribute", "effective_weights", "natural_change", "predicted_change"),
    "controllers": ("Range",),
    "targets": ("parse_target",),
    "thermostat": ("Thermostat", "thermostat"),
    "recipes": ("RECIPES", "Recipe", "build_thermostat", "compose"),
    "precision": ("AuditBatch", "Finding", "audit"),
    "evaluation": ("pass_at_k",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'isentropic' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
