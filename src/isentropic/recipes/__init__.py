"""Algorithms as data: baseline × selection × shaping × objective × penalty × reduction, and one knob under control.

:mod:`~isentropic.recipes.stages` has one table for each stage, :mod:`~isentropic.recipes.catalogue` the published
algorithms, :func:`compose` changes any part by name and refuses what cannot work. :func:`advantages` and :func:`loss`
run a recipe in a loop of your own. Importing this package needs no torch; what needs it is imported on first use.
"""

from typing import TYPE_CHECKING

from .. import lazy
from .catalogue import RECIPES
from .compose import check, compose, load_recipe
from .knobs import build_controller, build_thermostat, knob_range, with_knob
from .recipe import Recipe
from .stages import Baseline, Bounds, Knob, Objective, Penalty, Selection, Shaping

_OF_APPLY = ("advantages", "loss", "penalty", "select", "shape", "token_loss")
__getattr__, *_ = lazy(__name__, {"apply": _OF_APPLY})

__all__ = [
    "RECIPES",
    "Baseline",
    "Bounds",
    "Knob",
    "Objective",
    "Penalty",
    "Recipe",
    "Selection",
    "Shaping",
    "advantages",
    "build_controller",
    "build_thermostat",
    "check",
    "compose",
    "knob_range",
    "load_recipe",
    "loss",
    "penalty",
    "select",
    "shape",
    "token_loss",
    "with_knob",
]

if TYPE_CHECKING:
    from .apply import advantages, loss, penalty, select, shape, token_loss
