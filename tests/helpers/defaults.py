"""Components with the defaults of the catalogue's tables, as plain functions."""

from functools import partial

from isentropic.recipes.stages import STAGES


def default(stage, name):
    component = STAGES[stage][name]
    return partial(component.function, **component.constants)


def table(stage):
    return {name: default(stage, name) for name, component in STAGES[stage].items() if component.at is not None}
