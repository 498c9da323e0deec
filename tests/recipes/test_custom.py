"""Parts and recipes of one's own: loaded, checked, run, and written down."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from isentropic.losses.objectives import OBJECTIVES as objective_functions
from isentropic.recipes import (
    BOUNDS,
    OBJECTIVES,
    PENALTIES,
    RECIPES,
    SELECTIONS,
    SHAPINGS,
    advantages,
    check,
    compose,
    load_recipe,
    loss,
    select,
    shape,
)
from isentropic.recipes.parts import (
    BATCHWISE,
    CONSTANTS,
    NEEDS_ENTROPY,
    NEEDS_RATIO,
    NEEDS_ROWS,
    Own,
    Recipe,
    load,
)
from isentropic.runs.record import plain
from isentropic.types import TokenBatch, TokenFacts

MINE = '''
"""Half of every advantage, on the tokens that are likelier than not; a quadratic penalty."""
from isentropic.recipes import compose

def halved(batch, recipe):
    return batch.adv * recipe.alpha

def likely(batch, recipe):
    return (batch.logp > -0.7).float()

def squared(batch, recipe):
    return batch.logp.square()

def upside_down(rewards):
    return -rewards.flatten()

def no_shaping(batch):
    return batch.adv

NUMBER = 3
LOOP = compose("loop", shaping=halved, selection=likely, alpha=0.5)
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    yield "my_parts.py"
    sys.modules.pop("my_parts", None)


def tokens():
    logp = torch.tensor([[-0.5, -2.0], [-0.6, -0.1]], requires_grad=True)
    return TokenBatch(logp, None, torch.tensor([2.0, -1.0]), torch.ones(2, 2))


def test_names_and_needs_belong_to_parts():
    names = {*SELECTIONS, *SHAPINGS, *OBJECTIVES, *BOUNDS, *PENALTIES}
    assert set(CONSTANTS) | BATCHWISE | NEEDS_ENTROPY | NEEDS_RATIO | NEEDS_ROWS <= names
    constants = [name for table in CONSTANTS.values() for name in table]
    assert len(constants) == len(set(constants))
    import inspect

    for name in ("sapo", "gradient_preserving"):
        found = inspect.signature(objective_functions[name]).parameters.values()
        assert {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY} == CONSTANTS[name]


def test_a_recipe_of_ones_own_runs(mine):
    recipe = load_recipe(f"{mine}:LOOP")
    assert load_recipe(f"{mine}:LOOP") == recipe == compose(f"{mine}:LOOP")
    assert shape(recipe, tokens()).tolist() == [[1.0, 1.0], [-0.5, -0.5]]
    assert select(recipe, tokens()).tolist() == [[1.0, 0.0], [1.0, 1.0]]
    batch = tokens()
    total, _ = loss(recipe, batch)
    # Weights by hand: A/2 on three of the four tokens, over four.
    assert torch.autograd.grad(total.mean(), batch.logp)[0].tolist() == [[-0.25, 0.0], [0.125, 0.125]]
    changed = compose(f"{mine}:LOOP", alpha=0.25, penalty=f"{mine}:squared", penalty_coef=2.0)
    batch = tokens()
    slope = torch.autograd.grad(loss(changed, batch)[0].mean(), batch.logp)[0]
    # −A/4 and 2·2·log π, over four.
    torch.testing.assert_close(slope, torch.tensor([[-0.5 - 2.0, -8.0], [0.25 - 2.4, 0.25 - 0.4]]) / 4)


def test_a_function_of_any_part(mine):
    assert advantages(compose("loop", baseline=f"{mine}:upside_down"), torch.tensor([[1.0, 0.0]])).tolist() == [
        -1.0,
        0.0,
    ]

    def half(batch, recipe):
        none = torch.zeros_like(batch.logp, dtype=torch.bool)
        return -0.5 * batch.adv * batch.logp, TokenFacts(torch.ones_like(batch.logp), none, none)

    batch = tokens()
    slope = torch.autograd.grad(loss(compose("loop", objective=half), batch)[0].mean(), batch.logp)[0]
    assert slope.tolist() == [[-0.25, -0.25], [0.125, 0.125]]
    # A function is believed to read any knob.
    assert compose("loop", objective=half, knob="clip_high").knob == "clip_high"
    assert compose("loop", shaping=half, knob="zeta").shaping == Own(half)
    assert compose("loop", penalty=half, knob="penalty_coef").knob == "penalty_coef"

    def whole(batch, recipe):
        return batch.logp_rows.sum(-1)

    whole.needs_rows = True
    assert compose("loop", penalty=whole).needs_rows
    assert not compose("loop", penalty=half).needs_rows


@pytest.mark.parametrize(
    ("old", "new", "another"),
    [
        ("", "", False),
        ("NUMBER = 3", "NUMBER = 4", False),  # nothing that the function names
        ("return batch.adv * recipe.alpha", "return batch.adv * 0.5", True),
        ("return 2.0", "return 3.0", True),
        ("SCALE = 0.1", "SCALE = 0.2", True),
        ("SCALE = 0.1", "SCALE = (0.1, 0.2)", True),
    ],
)
def test_an_edited_function_is_another_part(mine, old, new, another):
    text = (
        MINE.replace("recipe.alpha\n", "recipe.alpha * helper()\n")
        + "SCALE = 0.1\ndef helper():\n    return 2.0 * SCALE\n"
    )
    text = text.replace("return 2.0 * SCALE", "value = SCALE\n    return 2.0")
    written = []
    for time, body in enumerate((text, text.replace(old, new))):
        Path(mine).write_text(body)
        os.utime(mine, ns=(time, time))
        written.append(plain(asdict(load_recipe(f"{mine}:LOOP")))["shaping"])
    assert (written[0] != written[1]) is another


def test_a_partial_is_told_by_what_it_fixes():
    def scaled(scale, batch, recipe):
        return scale * batch.adv

    written = [Own(partial(scaled, scale)).written for scale in (0.5, 0.5, 0.4)]
    assert written[0] == written[1] != written[2]


def test_what_is_written_down_has_no_address(mine):
    recipe = load_recipe(f"{mine}:LOOP")
    written = json.dumps(plain(asdict(recipe)))
    assert re.search(r'"shaping": "my_parts.halved@[0-9a-f]{8}"', written)
    assert " at 0x" not in written
    assert str(Own(torch.nn.Identity())).endswith("linear.Identity")
    assert recipe.shaping == replace(recipe, zeta=1.0).shaping


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("gone.py:LOOP", "there is no file gone.py; name one that is here"),
        ("my_parts.py:LOPO", "my_parts.py has no 'LOPO'; did you mean LOOP"),
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
        ({"shaping": "my_parts.py:no_shaping"}, r"must be callable as shaping\(batch, recipe\): too many positional"),
        ({"shaping": "my_parts.py:NUMBER"}, "shaping must be a name or a function of yours, got 3"),
        ({"selection": lambda: None}, r"must be callable as selection\(batch, recipe\)"),
        ({"objective": 3}, "objective must be a name or a function"),
        ({"constants": {"cov_share": 1e-3}}, "a constant of this recipe must be one of none"),
        ({"selection": "clip_cov", "constants": {"cov_shar": 1e-3}}, "did you mean cov_share"),
        ({"constants": 3}, "constants must be a table of numbers"),
        ({"bounds": "dcpo", "objective": "sequence_clipped"}, "need an objective that clips single tokens"),
        ({"bounds": "balanced", "objective": "cispo"}, "use clipped or gradient_preserving"),
        ({"knob": "penalty_coef"}, "knob penalty_coef needs a penalty, got none"),
        ({"selection": "erc", "on_policy": True}, "erc has no effect where every update is on-policy"),
    ],
)
def test_parts_that_cannot_work_are_refused(mine, changes, says):
    with pytest.raises(ValueError, match=says):
        compose("loop", **changes)


def test_constants_are_added_to_the_recipes_own():
    recipe = compose(compose("clip-cov", constants={"cov_low": 2.0}), constants={"cov_high": 9.0})
    assert recipe.constants_of("clip_cov") == {"cov_share": 2e-4, "cov_low": 2.0, "cov_high": 9.0}
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
    assert load("isentropic.recipes.parts:Recipe", "recipe") is Recipe
