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


Names = tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]


def lazy(package: str, modules: dict[str, tuple[str, ...]]) -> Names:
    """A module's ``__getattr__``, ``__dir__`` and ``__all__``: names imported from the package's modules on first use.

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

    return find, lambda: list(public), public


# Type checkers see imports, and refuse any other name; `as` marks a name as public.
if TYPE_CHECKING:
    from .control.controllers import Range as Range
    from .control.targets import parse_target as parse_target
    from .control.thermostat import Thermostat as Thermostat
    from .control.thermostat import thermostat as thermostat
    from .entropy.audit import AuditBatch as AuditBatch
    from .entropy.audit import Finding as Finding
    from .entropy.audit import audit as audit
    from .entropy.kernels import fused_logp as fused_logp
    from .entropy.kernels import fused_policy_loss as fused_policy_loss
    from .entropy.kernels import token_stats as token_stats
    from .entropy.prediction import attribute as attribute
    from .entropy.prediction import effective_weights as effective_weights
    from .entropy.prediction import natural_change as natural_change
    from .entropy.prediction import predicted_change as predicted_change
    from .entropy.statistics import logits_stats as logits_stats
    from .entropy.statistics import sampled_entropy as sampled_entropy
    from .entropy.statistics import token_entropy as token_entropy
    from .experiments.lines import load_runs as load_runs
    from .losses.reduce import SumCount as SumCount
    from .recipes import RECIPES as RECIPES
    from .recipes import Recipe as Recipe
    from .recipes import build_thermostat as build_thermostat
    from .recipes.compose import compose as compose
    from .runs.frames import Run as Run
    from .runs.frames import load_run as load_run
    from .runs.statistics import pass_at_k as pass_at_k
    from .types import EntropyReading as EntropyReading
    from .types import TokenBatch as TokenBatch
    from .types import TokenFacts as TokenFacts
    from .types import TokenStats as TokenStats
else:
    __getattr__, __dir__, __all__ = lazy(
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
            "runs.frames": ("Run", "load_run"),
            "runs.statistics": ("pass_at_k",),
            "experiments.lines": ("load_runs",),
        },
    )
