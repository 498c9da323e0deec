"""Components, controllers and targets of one's own: loaded, checked, run, and written down."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from isentropic.control.controllers import Controller, Range, ValueState, pi
from isentropic.control.targets import Target, TargetState
from isentropic.recipes import (
    RECIPES,
    Baseline,
    Knob,
    Penalty,
    Recipe,
    Selection,
    Shaping,
    advantages,
    build_thermostat,
    check,
    compose,
    load_recipe,
    loss,
    select,
    shape,
)
from isentropic.recipes.custom import entry, load, resolve
from isentropic.runs.record import plain
from isentropic.types import EntropyReading, TokenBatch, TokenFacts

MINE = '''
"""Half of every advantage, on the tokens that are likelier than not; a quadratic penalty."""
from isentropic.control.controllers import Controller, Range, ValueState
from isentropic.control.targets import Target, TargetState
from isentropic.recipes import Knob, Shaping, compose

def halved(adv, share=0.5):
    return adv * share

def likely(logp):
    return (logp > -0.7).float()

def squared(batch, recipe):
    return batch.logp.square()

def upside_down(rewards):
    return -rewards.flatten()

def wide(clip_low, clip_high, facts):
    return 1 - 2 * clip_low, 1 + 2 * clip_high

def no_shaping(batch, something):
    return batch.adv

def stepping(knob, size=0.1):
    def update(state, entropy, target):
        return ValueState(knob.clip(state.value + (size if entropy < target else -size)))
    return Controller(lambda: ValueState(knob.start), update)

def second_reading(first, factor=1.0):
    def update(state, entropy, tokens):
        state = state._replace(readings=state.readings + 1)
        return state._replace(sum=factor * entropy) if state.readings == 2 else state
    def level(state):
        return state.sum or None
    return Target(TargetState, update, level, lambda state: state.readings < 2)

SHAPING = Shaping("γ·A", halved, constants={"share": 0.5}, knobs={"share": Knob(Range(0.5, 0.0, 2.0, 1e-3))})
NUMBER = 3
LOOP = compose("loop", shaping=halved, selection=likely)
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    return "my_parts.py"


def tokens():
    logp = torch.tensor([[-0.5, -2.0], [-0.6, -0.1]], requires_grad=True)
    return TokenBatch(logp, None, torch.tensor([2.0, -1.0]), torch.ones(2, 2))


def test_a_recipe_of_ones_own_runs(mine):
    recipe = load_recipe(f"{mine}:LOOP")
    assert load_recipe(f"{mine}:LOOP") == recipe == compose(f"{mine}:LOOP")
    assert shape(recipe, tokens()).tolist() == [[1.0, 1.0], [-0.5, -0.5]]
    assert select(recipe, tokens()).tolist() == [[1.0, 0.0], [1.0, 1.0]]
    batch = tokens()
    total, _ = loss(recipe, batch)
    # Weights by hand: A/2 on three of the four tokens, over four.
    assert torch.autograd.grad(total.mean(), batch.logp)[0].tolist() == [[-0.25, 0.0], [0.125, 0.125]]
    changed = compose(f"{mine}:LOOP", share=0.25, penalty=f"{mine}:squared", penalty_coef=2.0)
    batch = tokens()
    slope = torch.autograd.grad(loss(changed, batch)[0].mean(), batch.logp)[0]
    # −A/4 and 2·2·log π, over four.
    torch.testing.assert_close(slope, torch.tensor([[-0.5 - 2.0, -8.0], [0.25 - 2.4, 0.25 - 0.4]]) / 4)


def test_a_function_of_any_stage(mine):
    recipe = compose("loop", baseline=f"{mine}:upside_down")
    assert advantages(recipe, torch.tensor([[1.0, 0.0]])).tolist() == [-1.0, 0.0]

    def half(batch):
        none = torch.zeros_like(batch.logp, dtype=torch.bool)
        return -0.5 * batch.adv * batch.logp, TokenFacts(torch.ones_like(batch.logp), none, none)

    batch = tokens()
    slope = torch.autograd.grad(loss(compose("loop", objective=half), batch)[0].mean(), batch.logp)[0]
    assert slope.tolist() == [[-0.25, -0.25], [0.125, 0.125]]
    # An objective of one's own is believed to have a clip.
    assert compose("loop", objective=half, knob="clip_high").knob == "clip_high"
    assert compose("loop", penalty=lambda logp: logp, knob="penalty_coef").knob == "penalty_coef"
    assert compose("loop", penalty=lambda logp_rows: logp_rows.sum(-1)).reads == {"logp_rows"}

    def whole(batch):
        return batch.logp_rows.sum(-1)

    assert compose("loop", penalty=Penalty("Σ log π", whole, reads={"logp_rows"})).reads == {"logp_rows"}


def test_bounds_of_ones_own(mine):
    """Twice as wide as asked: [0.6, 1.4]. A ratio of 1.3 is inside, where additive bounds would cut it at 1.2."""
    logp = torch.tensor([[-1.0]], requires_grad=True)
    batch = TokenBatch(logp, logp.detach() - torch.tensor(1.3).log(), torch.tensor([1.0]), torch.ones(1, 1))
    own, usual = compose("dapo", clip_high=0.2, bounds=f"{mine}:wide"), compose("dapo", clip_high=0.2)
    assert loss(own, batch)[0].mean().item() == pytest.approx(-1.3)
    assert loss(usual, batch)[0].mean().item() == pytest.approx(-1.2)

    def by_probability(clip_high, prob_old, room=2.0):
        return 0.0, 1 + clip_high + room * (1 - prob_old)

    # prob_old = e^−1/1.3 = 0.283: the bound is 1.2 + 2·0.717.
    assert loss(compose("dapo", clip_high=0.2, bounds=by_probability), batch)[0].mean().item() == pytest.approx(-1.3)
    tight = compose("dapo", clip_high=0.2, bounds=by_probability, room=0.05)
    assert loss(tight, batch)[0].mean().item() == pytest.approx(-(1.2 + 0.05 * (1 - 0.36788 / 1.3)), rel=1e-4)


def test_a_knob_of_ones_own_is_controlled(mine):
    recipe = compose("loop", shaping=f"{mine}:SHAPING", knob="share", controller=f"{mine}:stepping:size=0.25")
    thermostat = build_thermostat(compose(recipe, target=f"{mine}:second_reading:factor=2"))
    state, values = thermostat.init(), []
    # The target is twice the second reading, 2.0: the knob is held before, then goes up below it, and down above.
    for entropy in (3.0, 1.0, 1.5, 2.5):
        state = thermostat.update(state, EntropyReading(entropy, 1.0))
        values.append((state.value, thermostat.level(state)))
    assert values == [(0.5, None), (0.75, 2.0), (1.0, 2.0), (0.75, 2.0)]
    from isentropic.control.thermostat import to_json

    assert thermostat.restore(json.loads(json.dumps(to_json(state)))) == state


def test_a_controller_and_a_target_as_objects():
    held = Controller(lambda: ValueState(0.3), lambda state, entropy, target: ValueState(state.value + 0.1))
    one = Target(TargetState, lambda state, entropy, tokens: state, lambda state: 1.0, lambda state: False)
    recipe = compose("loop", knob="zeta", controller=held, target=one)
    thermostat = build_thermostat(recipe)
    assert thermostat.update(thermostat.init(), EntropyReading(2.0, 1.0)).value == pytest.approx(0.4)
    assert re.fullmatch(r"controller@[0-9a-f]{8}", recipe.as_dict()["controller"])


def test_an_edited_file_is_another_component(mine):
    written = []
    for time, body in enumerate((MINE, MINE, MINE.replace("adv * share", "adv * share * share"))):
        Path(mine).write_text(body)
        os.utime(mine, ns=(time, time))
        written.append(load_recipe(f"{mine}:LOOP").as_dict()["shaping"])
    assert written[0] == written[1] != written[2]


def test_a_partial_is_told_by_what_it_fixes():
    def scaled(scale, batch):
        return scale * batch.adv

    written = [entry("shaping", partial(scaled, scale)).written for scale in (0.5, 0.5, 0.4)]
    assert written[0] == written[1] != written[2]


def test_functions_of_one_line_are_told_by_what_they_hold():
    def made(factor):
        return lambda adv: factor * adv

    written = [entry("shaping", made(factor)).written for factor in (0.5, 0.5, 0.4)]
    written += [entry("shaping", lambda adv, k=k: k * adv).written for k in (0.5, 0.4)]
    assert written[0] == written[1]
    assert len(set(written)) == 4


def test_what_is_written_down_has_no_address(mine):
    recipe = load_recipe(f"{mine}:LOOP")
    written = json.dumps(plain(recipe.as_dict()))
    assert re.search(r'"shaping": "my_parts.halved@[0-9a-f]{8}"', written)
    assert " at 0x" not in written
    assert recipe.shaping == replace(recipe, entropy_coef=1.0).shaping
    assert hash(recipe) == hash(replace(recipe))


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("gone.py:LOOP", "there is no file gone.py; name one that is here"),
        ("my_parts.py:LOPO", r"my_parts.py has no 'LOPO' \(did you mean LOOP\?\)"),
        ("my_parts.py:NUMBER", "must be a Recipe, got int"),
        ("broken.py:LOOP", "broken.py cannot be loaded: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("no.such.module:LOOP", "no.such.module cannot be loaded"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(mine, place, says):
    with pytest.raises(ValueError, match=says) as caught:
        compose(place)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shaping": "my_parts.py:no_shaping"}, "asks for 'something', got no such value; it may name adv"),
        ({"shaping": "my_parts.py:NUMBER"}, "shaping must be a name, a function or a Shaping, got 3"),
        ({"shaping": Penalty("", lambda logp: logp)}, "shaping must be a Shaping, got a Penalty"),
        ({"objective": 3}, "objective must be a name or a custom function"),
        ({"constants": {"cov_share": 1e-3}}, "a constant of this recipe must be one of none"),
        ({"selection": "clip_cov", "constants": {"cov_shar": 1e-3}}, "did you mean cov_share"),
        ({"selection": "clip_cov", "cov_share": "much"}, "cov_share must be a number, got 'much'"),
        ({"constants": 3}, "constants must be a table of numbers"),
        ({"bounds": "dcpo", "objective": "sequence_clipped"}, "need an objective that clips single tokens"),
        ({"bounds": "balanced", "objective": "cispo"}, "use clipped or gradient_preserving"),
        ({"knob": "penalty_coef"}, "knob penalty_coef needs a penalty, got none"),
        ({"selection": "erc", "on_policy": True}, "erc has no effect if every update is on-policy"),
        ({"knob": "zeta", "controller": "my_parts.py:halved"}, "my_parts.halved@.* must make a Controller"),
        ({"knob": "zeta", "controller": "my_parts.py:stepping:sise=1"}, "its options are the parameters of stepping"),
        ({"knob": "zeta", "controller": "pid:gain=1"}, r"got 'pid' \(did you mean pi\?\)"),
        ({"knob": "zeta", "target": "bond:60%:80%"}, "target must be one of"),
        ({"shaping": Shaping("", lambda adv: adv), "knob": "zeta"}, "needs a shaping that it scales"),
        ({"shaping": Shaping("", lambda adv, gamma: adv, constants={"gama": 3.0, "gamma": 1.0})}, "mean gamma"),
        ({"shaping": Shaping("x", None)}, "shaping 'x' must have a custom function, got at=None"),
        (
            {"shaping": torch.nn.Linear(1, 1)},
            r"Linear must name what it reads, got \*args, \*\*kwargs; write a",
        ),
        ({"shaping": lambda *args, **kw: args[0]}, r"must name what it reads, got \*args, \*\*kw; write a function"),
        ({"shaping": lambda adv, /: adv}, "is called by name, got 'adv' by position only; leave out the slash"),
        ({"shaping": torch.relu}, "cannot be called by name, got no signature; wrap it"),
        ({"shaping": lambda adv, every=2: adv}, "constant every of the shaping is also a field of a recipe"),
        ({"shaping": Shaping("", lambda mask: mask, constants={"mask": 1.0})}, "constant mask of the shaping is also"),
        (
            {"shaping": lambda adv, share=0.5: adv, "selection": lambda logp, share=0.5: logp},
            "constant share must be of one component, got two, selection and shaping; rename one",
        ),
        ({"controller": "co:lon/mine.py:upwards", "knob": "zeta"}, "there is no file co:lon/mine.py"),
        ({"controller": "my_parts.py", "knob": "zeta"}, r"'my_parts.py' must name what is in it, .*my_parts.py:NAME"),
        ({"shaping": "my_parts.py"}, r"write my_parts.py:NAME"),
        ({"shaping": "my_parts.py:"}, r"write my_parts.py:NAME"),
        ({"controller": "pid:slow", "knob": "zeta"}, r"controller must be one of .*got 'pid' \(did you mean pi\?\)"),
        ({"controller": "pi:slow", "knob": "zeta"}, "controller pi takes gain, .*; got 'slow'"),
        ({"controller": "none_such:slow", "knob": "zeta"}, "none_such cannot be loaded: ModuleNotFoundError"),
        ({"target": "anneal:initial:50%", "knob": "zeta"}, "an entropy level must be .*got 'initial'"),
        ({"target": "band:low:high", "knob": "zeta"}, "an entropy level must be .*got 'low'"),
        ({"target": "initial:low", "knob": "zeta"}, "target must be one of initial"),
        ({"target": pi(Range(0.0, 0.0, 1.0)), "knob": "zeta"}, "target must be .*, got a Controller; give it as contr"),
        ({"controller": dict, "knob": "zeta"}, "controller dict cannot be called by name"),
    ],
)
def test_components_that_cannot_work_are_refused(mine, changes, says):
    with pytest.raises(ValueError, match=says):
        compose("loop", **changes)


def test_what_is_refused_is_refused_in_one_line():
    for shaping in (lambda adv, *, x: adv, torch.nn.Linear(1, 1), torch.relu, Shaping("", None)):
        with pytest.raises(ValueError, match=r"^shaping ") as caught:
            compose("loop", shaping=shaping)
        assert "\n" not in str(caught.value)


def test_an_entry_reads_what_its_function_names():
    def by_rows(adv, logp_rows, entropy):
        return adv

    assert Recipe("", "", shaping=Shaping("", by_rows)).reads == {"logp_rows", "entropy"}
    assert Recipe("", "", shaping=Shaping("", by_rows, options={"entropy": None})).reads == {"logp_rows"}
    with pytest.raises(ValueError, match=r"reads must name fields of a batch, .*; got 'entrpy' \(did you mean entropy"):
        Shaping("", by_rows, reads={"entrpy"})


@pytest.mark.parametrize("kind", [Baseline, Selection])
def test_a_stage_that_acts_once_a_batch_has_no_knob(kind):
    with pytest.raises(ValueError, match=f"a {kind.stage} can have no knob, got gamma; it acts once per batch"):
        kind("", lambda gamma: gamma, constants={"gamma": 0.0}, knobs={"gamma": Knob(Range(0.0, 0.0, 1.0))})


def test_a_constant_is_a_number():
    assert Shaping("", lambda adv, gamma: adv, constants={"gamma": np.float64(0.5)}).constants == {"gamma": 0.5}
    for wrong in (math.nan, "0.5", True):
        with pytest.raises(ValueError, match="gamma must be a number, got"):
            Shaping("", lambda adv, gamma: adv, constants={"gamma": wrong})


STATES = {
    "a dict": lambda: {"value": 0.0},
    "no value": TargetState,
    "a tensor": lambda: ValueState(torch.zeros(())),
    "not finite": lambda: ValueState(math.nan),
    "an error": lambda: 1 / 0,
}


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_a_controller_is_plain_numbers(name):
    made = Controller(STATES[name], lambda state, entropy, target: state)
    for controller in (made, lambda knob: made):
        with pytest.raises(ValueError, match=r"init\(\) of a Controller must return a NamedTuple of plain numbers"):
            compose("loop", knob="zeta", controller=controller)


def test_the_state_of_a_target_is_a_named_tuple():
    made = Target(dict, lambda state, entropy, tokens: state, lambda state: 1.0, lambda state: False)
    with pytest.raises(ValueError, match=r"init\(\) of a Target must return a NamedTuple of plain numbers, got dict"):
        compose("loop", knob="zeta", target=made)


def test_files_of_one_name_are_two_modules(tmp_path, monkeypatch):
    """And none of them takes the place of an installed module."""
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate(("a", "b", "co:lon")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text(f"NUMBER = {number}\ndef make(knob):\n    return None\n")
    assert [load(f"{folder}/json.py:NUMBER", "recipe") for folder in ("a", "b", "co:lon", "a")] == [0, 1, 2, 0]
    assert sys.modules["json"] is json
    made = resolve("controller", "co:lon/json.py:make")
    assert made.make is load("co:lon/json.py:make", "controller")
    assert re.fullmatch(r"json\.make@[0-9a-f]{8}", made.written)


def test_a_file_that_fails_leaves_nothing_behind(mine):
    before = set(sys.modules)
    Path("exits.py").write_text("import sys\nsys.exit('no')\n")
    with pytest.raises(ValueError, match=r"exits.py cannot be loaded: SystemExit: no; run it alone"):
        compose("exits.py:LOOP")
    with pytest.raises(ValueError, match=r"broken.py cannot be loaded"):
        compose("broken.py:LOOP")
    assert not {name for name in set(sys.modules) - before if "exits" in name or "broken" in name}


DIGESTS = """
from functools import partial
from isentropic.control.controllers import Controller, Range, pi
from isentropic.recipes import compose

class Box:
    def __init__(self, size): self.size = size
def scaled(box, adv): return adv * box.size if adv.sum() in {1, 2, "a", "b"} else adv
def closed(k): return lambda adv: (lambda x: x * k)(adv)
for shaping in (scaled_ := [partial(scaled, Box(1.0)), partial(scaled, Box(2.0)), closed(1.0), closed(2.0)]):
    print(compose("loop", shaping=shaping).shaping.written)
for gain in (1.0, 2.0):
    print(compose("loop", knob="zeta", controller=pi(Range(0.0, 0.0, 1.0), gain=gain)).controller.written)
"""


def test_a_digest_tells_objects_apart_and_is_one_in_every_process():
    """What was typed at a prompt has no file; sets are in another order for another seed of the hash."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", DIGESTS], check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.split()
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == len(runs[0]) == 6


def test_a_knob_needs_a_default():
    with pytest.raises(ValueError, match="knob gamma needs a default; add it to constants"):
        Shaping("", lambda adv: adv, knobs={"gamma": Knob(Range(0.0, 0.0, 1.0))})


def test_constants_are_added_to_the_recipes_own():
    recipe = compose(compose("clip-cov", cov_low=2.0), constants={"cov_high": 9.0})
    assert recipe.constants_of("selection") == {"cov_share": 2e-4, "cov_low": 2.0, "cov_high": 9.0}
    assert hash(recipe) == hash(replace(recipe))
    assert check(recipe) is recipe


def test_what_a_batch_must_hold_is_said():
    for name, lacks in (
        ("erc", "entropy"),
        ("high-entropy", "entropy"),
        ("aent", "logp_rows"),
        ("lp-reg", "logp_rows"),
    ):
        recipe = RECIPES[name]
        with pytest.raises(ValueError, match=rf"needs batch\.{lacks}, got None"):
            loss(recipe, tokens(), 0.1 if recipe.knob else None)


def test_loading_needs_no_torch(mine):
    code = "import sys; from isentropic.recipes import compose; compose('my_parts.py:LOOP'); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_load_finds_what_is_importable():
    assert load("isentropic.recipes.recipe:Recipe", "recipe") is Recipe


def test_a_dotted_name_is_a_module_whatever_it_resembles():
    with pytest.raises(ValueError, match=r"pid\.x cannot be loaded"):
        compose("loop", knob="zeta", controller="pid.x:slow")
