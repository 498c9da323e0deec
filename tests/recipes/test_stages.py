"""The tables of components: every entry agrees with its function, and a component of one's own needs two places."""

import inspect

import pytest
import torch

from isentropic.control.controllers import Range
from isentropic.recipes import RECIPES, Knob, Recipe, Shaping, build_thermostat, compose, knob_range, loss, shape
from isentropic.recipes import stages as tables
from isentropic.recipes.custom import NAMES, OPTIONAL
from isentropic.recipes.knobs import FIELD_KNOBS, all_knobs, readers
from isentropic.recipes.stages import KINDS, SHAPINGS, STAGES
from isentropic.types import EntropyReading, TokenBatch

ENTRIES = [(stage, name) for stage, table in STAGES.items() for name in table]


@pytest.mark.parametrize(("stage", "name"), ENTRIES)
def test_an_entry_agrees_with_its_function(stage, name):
    """Reads, constants and options are parameters of the function, and a default is written once: in the table."""
    component = STAGES[stage][name]
    assert isinstance(component, KINDS[stage])
    if component.at is None:
        assert name == "none"
        return
    parameters = inspect.signature(component.function).parameters
    assert set(component.constants) | set(component.options) <= set(parameters)
    for constant in component.constants:
        assert parameters[constant].default is inspect.Parameter.empty, constant
    fields = {p for p in parameters if p in TokenBatch._fields} - set(component.options)
    if "batch" not in parameters:
        needed = fields - {"logp", "adv", "mask"}
        assert needed - OPTIONAL <= component.reads <= needed
    unknown = {p for p, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    assert unknown <= NAMES[stage] | set(component.constants) | set(component.options)


def test_a_constant_belongs_to_one_component_unless_it_is_one_knob():
    owners = {}
    for stage, name in ENTRIES:
        for constant in STAGES[stage][name].constants:
            owners.setdefault(constant, []).append((stage, name))
    for constant, names in owners.items():
        assert len(names) == 1 or names == [("shaping", name) for name in readers(constant)], constant
    assert len(owners["zeta"]) > 1


def test_knobs_are_those_of_the_tables_and_of_the_recipe():
    of_tables = {name for table in STAGES.values() for entry in table.values() for name in entry.knobs}
    assert set(all_knobs()) == of_tables | set(FIELD_KNOBS)
    assert {"clip_high", "zeta"} <= set(all_knobs())
    assert readers("zeta")[0] == compose("loop", knob="zeta").shaping == "repo_r"
    assert set(readers("zeta")) == {name for name, entry in SHAPINGS.items() if "zeta" in entry.knobs}


def test_the_start_of_a_knob_is_the_recipes_own_number_or_the_knobs():
    assert knob_range(compose("repo-d-loop")).start == 1.0
    assert knob_range(compose("repo-d-loop", zeta=2.0)).start == 2.0
    assert knob_range(compose("repo-r-loop")).start == 1e-3
    assert knob_range(RECIPES["isentropic"])[:3] == (0.0, 0.0, 1.0)
    assert knob_range(compose("isentropic", target="60%"))[:3] == (0.0, -1.0, 1.0)


def test_zeta_turns_round_at_its_smallest_step():
    """The published range of raw ζ is ±[1e-4, 0.05]: halved below 1e-4 it changes sign, and never rests at 0."""
    for recipe, least in (
        (compose("repo-r-loop"), 1e-4),
        (RECIPES["isentropic"], 1e-3),
        (compose("repo-d-loop"), 0.01),
    ):
        assert knob_range(recipe).least == least
    loop = build_thermostat(compose("repo-r-loop", every=1, target="1.0", zeta=1.5e-4), None)
    state = loop.init()
    values = [(state := loop.update(state, EntropyReading(2.0, 1.0))).value for _ in range(10)]
    assert values[:2] == [pytest.approx(-1e-4), pytest.approx(-2e-4)]
    assert values[-1] == -0.05


def test_a_new_shaping_is_a_function_and_an_entry(monkeypatch):
    """A shaping with a constant and a knob of its own: nothing else is told of it."""

    def damped(adv, logp, gamma, floor):
        return (
            adv[..., None] * torch.where(logp < floor, 1 - gamma, 1.0)
            if adv.dim() == 1
            else adv * (torch.where(logp < floor, 1 - gamma, 1.0))
        )

    entry = Shaping(
        "(1 − γ)·A on rare tokens",
        damped,
        constants={"gamma": 0.0, "floor": -1.0},
        knobs={"gamma": Knob(Range(0.1, 0.0, 0.5, 1e-3), "a test")},
    )
    monkeypatch.setitem(tables.SHAPINGS, "damped", entry)
    recipe = compose("loop", knob="gamma", controller="pi", target="0.5", floor=-0.7)
    assert (recipe.shaping, knob_range(recipe).start) == ("damped", 0.1)
    assert "gamma" in all_knobs()
    batch = TokenBatch(torch.tensor([[-0.5, -1.0]]), None, torch.tensor([2.0]), torch.ones(1, 2))
    thermostat = build_thermostat(recipe)
    state = thermostat.update(thermostat.init(), EntropyReading(1.0, 4.0))
    assert state.value == 0.5  # at its bound: pi, at half the target
    from isentropic.recipes import with_knob

    assert shape(with_knob(recipe, state.value), batch).tolist() == [[2.0, 1.0]]  # by hand: (1 − 0.5)·2 on the rare one
    assert recipe.as_dict()["constants"] == {"floor": -0.7}


def test_any_constant_may_be_a_knob_with_a_range():
    recipe = compose("sapo", knob="tau_negative", knob_low=1.0, knob_high=2.0, target="0.5")
    assert knob_range(recipe) == Range(1.05, 1.0, 2.0, 1e-3)
    with pytest.raises(ValueError, match="knob tau_negative has no range of its own, got knob_low=None"):
        compose("sapo", knob="tau_negative")


def test_the_group_reaches_a_component_by_name():
    def where_the_group_fails(adv, group_rate):
        return adv * (1 - group_rate)[:, None]

    recipe = compose("loop", shaping=where_the_group_fails)
    assert recipe.reads == {"group_rate"}
    logp = torch.full((2, 1), -1.0)
    batch = TokenBatch(logp, None, torch.tensor([1.0, -1.0]), torch.ones(2, 1), group_rate=torch.tensor([0.25, 1.0]))
    assert shape(recipe, batch).tolist() == [[0.75], [0.0]]
    with pytest.raises(ValueError, match=r"needs batch\.group_rate, got None"):
        loss(recipe, batch._replace(group_rate=None))


def test_a_component_that_is_replaced_takes_its_constants_with_it():
    recipe = compose("loop", shaping="repo", beta=0.2)
    assert recipe.number("beta") == 0.2
    assert compose(recipe, shaping="none").constants == {}
    with pytest.raises(ValueError, match=r"or a constant of its components, must be one of .*got 'zeta'"):
        compose(recipe, zeta=0.1)


def test_run_json_keeps_the_names_of_schema_one():
    """Numbers that were fields of a recipe stay at the top of what is written."""
    written = compose("loop", shaping="repo_r", zeta=0.3).as_dict()
    assert {name: written[name] for name in ("quantile", "beta", "zeta", "alpha", "reject", "boost")} == {
        "quantile": 0.4,
        "beta": 0.0,
        "zeta": 0.3,
        "alpha": 0.0,
        "reject": 0.0,
        "boost": 1.0,
    }
    assert written["constants"] == {}
    own = Shaping("s", lambda adv, zeta: adv * zeta, constants={"zeta": 0.7})
    assert compose("loop", shaping=own).as_dict()["zeta"] == 0.7
    assert Recipe("", "").as_dict()["constants"] == {}
