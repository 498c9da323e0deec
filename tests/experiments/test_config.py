"""Settings: precedence, the recipe that they mean, and the groups that describe them."""

from dataclasses import fields

import pytest

from isentropic.experiments.config import (
    GROUPS,
    ConfigError,
    RunConfig,
    as_dict,
    eval_settings,
    load,
    recipe_of,
    steps_of,
    total_steps,
)
from isentropic.experiments.lines import changed, fingerprint
from isentropic.recipes.stages import STAGES
from isentropic.tasks.sequence import SEQUENCES


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("steps = 7\nseed = 3\nlearning_rate = 1\n[recipe_options]\nclip_high = 0.4\n")
    config = load(str(path), {"seed": 5})
    assert (config.steps, config.seed, config.learning_rate, config.model) == (7, 5, 1, RunConfig.model)
    assert recipe_of(config).clip_high == 0.4


def test_options_by_set_join_those_of_the_file_and_win(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('recipe = "clip-cov"\n[recipe_options]\ncov_low = 2.0\nclip_high = 0.4\n')
    config = load(str(path), {"recipe_options": {"clip_high": 0.3}})
    assert config.recipe_options == {"cov_low": 2.0, "clip_high": 0.3}
    assert load(str(path), {}, {"recipe_options": {"clip_low": 0.1}}).recipe_options == {
        "cov_low": 2.0,
        "clip_high": 0.4,
    }
    resumed = load(
        None, {"recipe_options": {"clip_high": 0.3}}, {"recipe": "dapo", "recipe_options": {"clip_low": 0.1}}
    )
    assert resumed.recipe_options == {"clip_low": 0.1, "clip_high": 0.3}


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


def test_what_changes_no_numbers_is_no_part_of_a_cell():
    recipe = recipe_of(load(None, {})).as_dict()
    cells = [
        fingerprint(*changed(as_dict(load(None, flags)), recipe))
        for flags in ({}, {"push_to_hub": "me/mine"}, {"report_to": []}, {"kl": 0.1})
    ]
    assert cells[0] == cells[1] == cells[2] != cells[3]


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
    assert eval_settings({"k": None}, [run]) == ("expr", 4, 7, 0.5, [1.5, 1.0, 0.6, 0.3], 3, None, None)
    assert eval_settings({"k": 2, "task": "expr-digit"}, [run])[:2] == ("expr-digit", 2)
    assert eval_settings({}, [{**run, "eval_temperatures": [2.0]}]).temperatures == [2.0]
    assert eval_settings({"also": [0.1]}, [{**run, "eval_temperatures": [2.0]}]).temperatures == [0.1]
    assert eval_settings({"task": "expr"}, []).temperatures == RunConfig().eval_temperatures


def test_tasks_that_follow_are_a_list_however_they_are_written(tmp_path):
    path = tmp_path / "run.toml"
    for text, then in (("", []), ('then = "expr-digit"', ["expr-digit"]), ('then = ["a.py:b"]', None)):
        path.write_text(text + "\nsteps = 8\n")
        if then is None:
            with pytest.raises(ConfigError, match=r"then: .*no such file"):
                load(str(path), {})
            continue
        config = load(str(path), {})
        assert config.then == then
        assert steps_of(config) == [8] * (1 + len(then))
    config = load(str(path), {"then": ["expr-digit", "expr:need=odd"], "then_steps": 4})
    assert (config.then, steps_of(config), total_steps(config)) == (["expr-digit", "expr:need=odd"], [8, 4, 4], 16)
    # Two configs do not share a list.
    RunConfig().then.append("expr")
    assert RunConfig().then == []


def test_a_named_sequence_stands_for_its_tasks(tmp_path):
    first, *others = SEQUENCES["reversal"].tasks
    config = load(None, {"task": "reversal", "steps": 8})
    assert (config.task, config.then) == (first, others)
    assert load(None, {"task": "reversal", "then": ["expr-digit"]}).then == [*others, "expr-digit"]
    path = tmp_path / "run.toml"
    path.write_text('task = "reversal"\n')
    assert load(str(path), {}) == load(None, {"task": "reversal"})
    # The settings of a run that is resumed hold the tasks already, and the same command continues it.
    for again in (load(str(path), {}, as_dict(config)), load(None, {"task": "reversal"}, as_dict(config))):
        assert again == config
    assert load(None, {}, as_dict(config)) == config


def test_temperatures_of_evaluations(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("eval_temperatures = [2, 0.5]\n")
    assert load(str(path), {}).eval_temperatures == [2, 0.5]
    path.write_text("eval_temperatures = 0.5\n")
    assert load(str(path), {}).eval_temperatures == [0.5]
    assert load(str(path), {"eval_temperatures": []}).eval_temperatures == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"then": ["expr"]}, "then: got 'expr' twice in one run"),
        ({"then": ["expr-digit", "expr-digit"]}, "then: got 'expr-digit' twice"),
        ({"then": ["expr:rate=0.37"]}, "then: got 'expr:rate=0.37', the same task as 'expr'"),
        ({"task": "expr:need=odd,last", "then": ["expr:need=last,odd"]}, "the same task as 'expr:need=odd,last'"),
        ({"task": "reversal", "then": ["expr:need=no-plus"]}, "then: got 'expr:need=no-plus' twice"),
        ({"then_steps": 4}, "then_steps: got 4 without a second task"),
        ({"then": ["expr-digit"], "then_steps": 0}, "then-steps: got 0, must be at least 1"),
        ({"then": ["exprdigit"]}, "then: .*did you mean expr-digit"),
        ({"then": ["reversal"]}, "then: task .reversal. is a sequence"),
        ({"then": 3}, "then: got 3, must be str"),
        ({"then": ["expr-digit", None]}, "then: got None, must be str"),
        ({"task": ["expr"]}, r"task: got \['expr'\], must be str"),
        ({"task": "reversl"}, "task: .*got 'reversl'"),
        ({"eval_temperatures": [1.5, 0]}, "eval_temperatures: got 0, must be > 0 and finite"),
        ({"eval_temperatures": -1}, "eval_temperatures: got -1, must be > 0"),
        ({"eval_temperatures": [float("nan")]}, "eval_temperatures: got nan"),
        ({"eval_temperatures": [float("inf")]}, "eval_temperatures: got inf"),
        ({"eval_temperatures": ["1.5"]}, "eval-temperatures: got '1.5', must be float"),
        ({"eval_temperatures": [True]}, "eval-temperatures: got True, must be float"),
        ({"eval_every": -4}, "eval-every: got -4, must be at least 0"),
        ({"eval_every": 2.5}, "eval-every: got 2.5, must be int"),
        ({"eval_every": 6}, r"eval_every: got 6, must be a multiple of updates \(4\)"),
    ],
)
def test_mistakes_in_sequences_and_evaluations_are_one_line(settings, says):
    with pytest.raises(ConfigError, match=says) as refused:
        load(None, settings)
    assert "\n" not in str(refused.value)
