"""The config on its own: what it refuses, and that it can be copied, logged and pickled whatever is in it."""

import copy
import json
import pickle

import pytest

pytest.importorskip("trl")
from trl_case import BASE, train

from isentropic.control.controllers import Range, pi
from isentropic.control.targets import Level, constant
from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
from isentropic.recipes import compose


def config(out, **settings):
    return IsentropicConfig(output_dir=str(out), **{**BASE, **settings})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"recipe": "loop", "recipe_options": '{"target": "80%"}'}, "recipe_options has target, which the config has"),
        ({"recipe": "loop", "recipe_options": "{bad"}, "must be a dict or a JSON object, got '{bad', which is no JSON"),
        ({"recipe": "loop", "recipe_options": "[1]"}, r"must be a dict or a JSON object, got \[1\]"),
        ({"recipe": 3}, "recipe must be a name, a FILE.py:NAME, or a Recipe, got 3"),
        ({"recipe_options": {"clip_high": 0.001}}, "clip_high need a recipe to change"),
        ({"recipe_options": {"overlong_buffer": 7}}, "overlong_buffer need a recipe to change"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        config(tmp_path, **settings)


OWN = {
    "a recipe": {"recipe": compose("isentropic", shaping=lambda adv, entropy: adv * entropy, knob="none")},
    "a controller": {"recipe": "loop", "knob": "zeta", "controller": pi(Range(0.0, -1.0, 1.0)), "target": "80%"},
    "a target": {"recipe": "loop", "knob": "zeta", "target": constant(Level(1.0, False))},
}


@pytest.mark.parametrize("name", OWN)
def test_a_config_with_parts_of_your_own_is_copied_logged_and_pickled(tmp_path, name):
    made = config(tmp_path, **OWN[name])
    for copied in (copy.copy(made), copy.deepcopy(made)):
        assert copied.entropy_recipe.as_dict() == made.entropy_recipe.as_dict()
    logged = json.loads(made.to_json_string())
    assert logged["output_dir"] == str(tmp_path)
    assert isinstance(logged["controller"], str | None)
    assert pickle.loads(pickle.dumps(made)).max_steps == made.max_steps


def test_a_controller_of_your_own_is_saved_with_a_checkpoint(tmp_path):
    settings = {**OWN["a controller"], "save_strategy": "steps", "save_steps": 4}
    train(IsentropicTrainer, IsentropicConfig, tmp_path, steps=4, **settings)
    state = json.loads((tmp_path / "checkpoint-4" / "isentropic.json").read_text())["state"]
    assert set(state["controller"]) == {"value", "integral"}
