"""One component of each stage, a controller and a target, from a file: two steps of TRL and of the tabular engine."""

import numpy as np
import pytest

pytest.importorskip("trl")
from trl_case import make, train

from isentropic.engines.tabular import simulate
from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
from isentropic.recipes import compose
from isentropic.recipes.custom import load

OWN = """
import torch
from isentropic.control.controllers import Controller, Range, ValueState
from isentropic.control.targets import Target, TargetState
from isentropic.recipes import Knob, Shaping
from isentropic.types import TokenFacts

CALLS = []

def best(rewards, bar=0.5):
    CALLS.append("baseline")
    return (rewards - bar * rewards.amax(1, keepdim=True)).flatten()

def early(mask, group_rate):
    CALLS.append("selection")
    return (mask.cumsum(1) <= 1 + 8 * group_rate[:, None]).float()

def damped(adv, logp, entropy, gamma, floor):
    CALLS.append("shaping")
    return torch.where(logp + entropy < floor, 1 - gamma, 1.0) * adv

SHAPING = Shaping(
    "(1 - gamma) A on rare tokens", damped, reads={"entropy"}, constants={"gamma": 0.0, "floor": 0.0},
    knobs={"gamma": Knob(Range(0.1, 0.0, 0.5, 1e-3), "mine")},
)

def narrow(clip_low, clip_high, prob_old, tighter=0.5):
    CALLS.append("bounds")
    return 1 - tighter * clip_low, 1 + tighter * clip_high + 0 * prob_old

def squared(logp, logp_old, adv, mask, entropy_coef):
    CALLS.append("objective")
    ratio = (logp - (logp if logp_old is None else logp_old).detach()).exp()
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    loss = torch.where(mask.bool(), -adv * (ratio - (ratio - 1) ** 2), 0.0)
    return loss, TokenFacts(ratio.detach(), nowhere, nowhere)

def spread(logp_rows, mask, reward):
    CALLS.append("penalty")
    assert reward.shape == mask.shape[:1]
    return torch.where(mask.bool(), logp_rows.exp().square().sum(-1), 0.0)

def stepping(knob, size=0.1):
    CALLS.append("controller")
    def update(state, entropy, target):
        return ValueState(knob.clip(state.value + (size if entropy < target else -size)))
    return Controller(lambda: ValueState(knob.start), update)

def twice(first, steps):
    CALLS.append("target")
    def update(state, entropy, tokens):
        return state._replace(readings=state.readings + 1, sum=state.sum or 2 * entropy)
    return Target(TargetState, update, lambda state: state.sum or None, lambda state: False)
"""
ZETA = {"knob": "zeta", "every": 1}
CASES = {
    "baseline": {"baseline": "own.py:best", "bar": 0.25},
    "selection": {"selection": "own.py:early"},
    "shaping": {"shaping": "own.py:SHAPING", "knob": "gamma", "floor": 0.5, "target": "0.1", "every": 1},
    "bounds": {"bounds": "own.py:narrow", "tighter": 0.25},
    "objective": {"objective": "own.py:squared"},
    "penalty": {"penalty": "own.py:spread", "penalty_coef": 0.1},
    "controller": {**ZETA, "controller": "own.py:stepping:size=0.25", "target": "0.1"},
    "target": {**ZETA, "controller": "sign_step:step=0.25", "target": "own.py:twice"},
}
NAMED = ("knob", "controller", "target")


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return lambda: load("own.py:CALLS", "list")


@pytest.mark.parametrize("stage", CASES)
def test_trl_trains_two_steps_with_it(own, tmp_path, stage):
    changes = CASES[stage]
    named = {name: changes[name] for name in NAMED if name in changes}
    options = {name: value for name, value in changes.items() if name not in NAMED}
    trainer = train(
        IsentropicTrainer, IsentropicConfig, tmp_path / "run", 2, recipe="dapo", recipe_options=options, **named
    )
    rows = trainer.record.rows("metrics")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert stage in own()
    written = trainer.record.header()["recipe"][stage]
    assert written.startswith(f"own.{changes[stage].split(':')[1]}" if stage != "shaping" else "own.damped@")
    if "knob" in changes:
        step = {"shaping": -0.1, "controller": -0.25, "target": 0.25}[stage]  # pi goes to its bound, 0, from 0.1
        assert rows[1]["knob/value"] - rows[0]["knob/value"] == pytest.approx(step)


@pytest.mark.parametrize("stage", CASES)
def test_the_tabular_engine_takes_two_steps_with_it(own, stage):
    run = simulate(compose("dapo", **CASES[stage]), steps=2)
    assert np.isfinite(run.entropy).all()
    assert np.isfinite(run.predicted).all()
    assert stage in own()
    if "knob" in CASES[stage]:
        assert (run.knob[1] > run.knob[0]) == (stage == "target")
        assert run.knob[1] != run.knob[0]


def test_a_composed_recipe_is_a_config_of_its_own(own, tmp_path):
    """`IsentropicConfig(recipe=)` takes the object, and trains as with the name."""
    recipe = compose("loop", knob="zeta", target="0.1", every=1)
    by_object = train(IsentropicTrainer, IsentropicConfig, tmp_path / "a", 2, recipe=recipe)
    options = {"every": 1}
    by_name = train(
        IsentropicTrainer, IsentropicConfig, tmp_path / "b", 2, recipe="loop", knob="zeta", target="0.1",
        recipe_options=options,
    )  # fmt: skip
    drop = ("seconds",)
    first, second = ([{k: v for k, v in r.items() if k not in drop} for r in t.record.rows("metrics")]
                     for t in (by_object, by_name))  # fmt: skip
    assert first == second
    assert by_object.record.header()["recipe"] == by_name.record.header()["recipe"]


def test_a_function_that_cannot_be_pickled_is_saved_by_name(tmp_path):
    """A checkpoint of TRL's pickles the config; what is yours is written by its name, and resumes."""
    import copy

    import torch

    from isentropic.control.controllers import pi

    settings = {
        "recipe": compose("loop", shaping=lambda adv: 0.5 * adv),
        "knob": "clip_high",
        "controller": lambda knob: pi(knob, gain=2.0),
        "target": "80%",
        "save_strategy": "steps",
        "save_steps": 4,
    }
    trainer = train(IsentropicTrainer, IsentropicConfig, tmp_path, 4, **settings)
    saved = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert saved.entropy_recipe == trainer.recipe.as_dict()
    assert saved.controller.startswith("test_own_components.")
    assert copy.deepcopy(trainer.args).entropy_recipe is not trainer.recipe
    assert copy.deepcopy(trainer.args).entropy_recipe == trainer.recipe
    again = make(IsentropicTrainer, IsentropicConfig, tmp_path, 8, **settings)
    again.train(resume_from_checkpoint=True)
    rows = again.record.rows("metrics")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[4]["knob/value"] == trainer.loop.value  # the controller continues where it was
