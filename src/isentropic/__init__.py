"""isentropic steers the entropy of a language model while it is trained by reinforcement learning.

Public names are listed here and resolved on first use, so that ``import isentropic`` needs no torch.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("isentropic")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"


def lazy(package: str, modules: dict[str, tuple[str, ...]]) -> tuple[Callable[[str], Any], list[str]]:
    """A module's ``__getattr__`` and ``__all__``: names that are imported from the package's modules on first use.

    Args:
        package: the importing package's ``__name__``.
        modules: by module below the package, the names that it defines.
    """
    home = {name: module for module, names in modules.items() for name in names}
    public = sorted(home)

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; public names: {', '.join(public)}")
        return getattr(import_module(f".{home[name]}", package), name)

    return find, public


__getattr__, __all__ = lazy(
    __name__,
    {
        "types": ("EntropyReading", "TokenBatch", "TokenFacts", "TokenStats"),
        "losses.reduce": ("SumCount",),
        "entropy.kernels": ("fused_logp", "fused_policy_loss", "token_stats"),
        "entropy.statistics": ("logits_stats", "sampled_entropy", "token_entropy"),
        "entropy.prediction": ("attribute", "effective_weights", "natural_change", "predicted_change"),
        "entropy.audit": ("AuditBatch", "Finding", "audit"),
        "control.controllers": ("Range",),
        "control.targets": ("parse_target",),
        "control.thermostat": ("Thermostat", "thermostat"),
        "recipes": ("RECIPES", "Recipe", "build_thermostat", "compose"),
        "runs.statistics": ("pass_at_k",),
    },
)

if TYPE_CHECKING:
    from .control.controllers import Range
    from .control.targets import parse_target
    from .control.thermostat import Thermostat, thermostat
    from .entropy.audit import AuditBatch, Finding, audit
    from .entropy.kernels import fused_logp, fused_policy_loss, token_stats
    from .entropy.prediction import attribute, effective_weights, natural_change, predicted_change
    from .entropy.statistics import logits_stats, sampled_entropy, token_entropy
    from .losses.reduce import SumCount
    from .recipes import RECIPES, Recipe, build_thermostat, compose
    from .runs.statistics import pass_at_k
    from .types import EntropyReading, TokenBatch, TokenFacts, TokenStats


def __dir__() -> list[str]:
    return [*globals(), *__all__]
