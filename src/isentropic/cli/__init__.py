"""The command line: the only package that knows it."""

from .main import main

__all__ = ["main"]
