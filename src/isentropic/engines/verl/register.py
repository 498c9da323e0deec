"""The entry point that verl imports in each of its processes: importing it is what registers the recipes."""

from importlib.util import find_spec

from .plugin import register

# Where there is no hydra there is no verl to register with.
if find_spec("hydra") is not None:
    register()
