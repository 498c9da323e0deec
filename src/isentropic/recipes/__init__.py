"""Algorithms as data: what a recipe is, the catalogue, its checks, and the way from a recipe to a loss."""

from .compose import *  # noqa
from .compose import __all__  # noqa
