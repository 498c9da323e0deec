"""Settings: precedence, the recipe that they mean, and the groups that describe them."""

from dataclasses import fields

import pytest

from isentropic.experiments.compare import changed
from isentropic.experiments.config import GROUPS, ConfigError, RunConfig, as_dict, eval_settings, load, recipe_of
from isentropic.recipes.stages import STAGES


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("steps = 7\nseed = 3\nlearning_rate = 1\n[recipe_options]\nclip_high = 0.4\n")
    config = load(str(path), {"seed": 5})
    assert (config.steps, config.seed, config.learning_rate, config.model) == (7, 5, 1, RunConfig.model)
    assert recipe_of(config).clip_high == 0.4


def test_an_annealed_target_may_leave_its_steps_out():
    assert recipe_of(load(None, {"target": "anneal:100%:50%"})).target == "anneal:100%:50%"
    with pytest.raises(ConfigError, match="FROM:TO"):
        load(None, {"target": "anneal:100%"})


def test_controller_none_only_monitors():
    recipe = recipe_of(load(None, {"recipe": "repo-r-loop", "controller": "none"}))
    assert (recipe.knob, recipe.controller) == (None, "fixed")


def test_on_policy_recipes_take_one_step_a_batch_unasked():
    assert load(None, {"recipe": "rloo"}).updates == 1


def test_every_stage_is_a_setting(tmp_path):
    names = {
        "baseline": "mean",
        "selection": "high_entropy",
        "shaping": "repo",
        "bounds": "reciprocal",
        "objective": "sequence_clipped",
        "penalty": "aent",
    }
    assert set(names) == set(STAGES)
    path = tmp_path / "run.toml"
    path.write_text("".join(f'{stage} = "{name}"\n' for stage, name in names.items()) + 'recipe = "grpo"\n')
    for config in (load(str(path), {}), load(None, {"recipe": "grpo", **names})):
        recipe = recipe_of(config)
        assert {stage: getattr(recipe, stage) for stage in STAGES} == names


def test_a_component_controller_and_target_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from isentropic.control.controllers import CONTROLLERS\n"
        "from isentropic.control.targets import parse_target\n"
        "def flat(adv, strength=0.5):\n    return strength * adv\n"
        "def control(knob, gain=0.5):\n    return CONTROLLERS['pi'](knob, gain=gain)\n"
        "def low():\n    return parse_target('0.5')\n"
    )
    flags = {"recipe": "grpo", "shaping": f"{path}:flat", "knob": "clip_high"}
    flags |= {"controller": f"{path}:control:gain=2", "target": f"{path}:low"}
    recipe = recipe_of(load(None, flags))
    assert recipe.component("shaping").constants == {"strength": 0.5}
    assert "mine.flat" in recipe.as_dict()["shaping"]
    assert "mine.control" in recipe.as_dict()["controller"]


def test_new_settings_at_their_defaults_change_no_cell():
    """A run directory of before a setting existed falls into the cell of a run with its default."""
    config = load(None, {"recipe": "dapo", "steps": 8})
    before = {key: value for key, value in as_dict(config).items() if key not in ("baseline", "penalty")}
    recipe = recipe_of(config).as_dict()
    assert changed(before, recipe) == changed(as_dict(config), recipe)


def test_every_setting_is_in_a_group_and_says_what_it_is():
    for setting in fields(RunConfig):
        assert setting.metadata["group"] in GROUPS
        assert setting.metadata["help"]
    grouped = [setting.metadata["group"] for setting in fields(RunConfig)]
    assert list(dict.fromkeys(grouped)) == list(GROUPS)


def test_evaluation_takes_the_settings_of_the_first_run():
    run = {"task": "expr", "eval_k": 4, "eval_rows": 7, "seed": 3, "temperature": 0.5, "max_completion_length": None}
    assert eval_settings({"k": None}, [run]) == ("expr", 4, 7, 0.5, 3, None, None)
    assert eval_settings({"k": 2, "greedy": True, "task": "expr-digit"}, [run])[:2] == ("expr-digit", 2)
    assert eval_settings({"greedy": True}, [run]).greedy_limit == 7
