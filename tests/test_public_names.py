"""The names that users import: what `dir` shows, what a type checker sees, and how objects print."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import isentropic
from isentropic.recipes import RECIPES, Recipe, build_thermostat, compose
from isentropic.recipes.changes import Changes
from isentropic.recipes.stages import STAGES
from isentropic.runs.record import Record

ROOT = Path(__file__).parent.parent
# What a user of the library writes.
SCRIPT = """
from datasets import Dataset

import isentropic
from isentropic import EntropyReading, Recipe, build_thermostat, compose, load_run, load_runs
from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer

recipe: Recipe = compose("rloo", knob="beta", target="80%", beta=0.1)
mine = compose(recipe, shaping=lambda adv: 2 * adv, every=1)
print(mine.knob, mine.number("clip_high") + 1.0, len(isentropic.RECIPES))

thermostat = build_thermostat(recipe)
if thermostat is not None:
    state = thermostat.init()
    state = thermostat.update(state, EntropyReading(sum=8.0, count=10.0))
    print(state.value + 1.0, thermostat.level(state))


def reward(completions: list[str], **columns: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


args = IsentropicConfig(output_dir="runs/mine", recipe=mine, max_steps=4)
data = Dataset.from_list([{"prompt": "1+1="}])
IsentropicTrainer("model", reward, args=args, train_dataset=data).train()

run = load_run("runs/mine")
print(run.summary["entropy/end"], run.metrics["step"].max(), run.ended)
run.plot().savefig("run.png")
print(load_runs("runs").groupby("cell")["pass@1"].mean(), isentropic.pass_at_k([4], [2], 1))
"""
MISTAKES = {
    'knob="beta"': ('knobb="beta"', "Unexpected keyword argument `knobb`"),
    "beta=0.1": ('beta="much"', "not assignable to parameter `beta`"),
    "isentropic.pass_at_k": ("isentropic.pass_at", "No attribute `pass_at` in module `isentropic`"),
    ", IsentropicTrainer\n": (", IsentropicTrainr as IsentropicTrainer\n", "Could not import `IsentropicTrainr`"),
    "run.plot()": ("run.plt()", "no attribute `plt`"),
}


def errors_of(folder, **scripts):
    """By script, the errors of pyrefly under this project's settings."""
    pyrefly = shutil.which("pyrefly", path=str(Path(sys.executable).parent))
    if pyrefly is None:
        pytest.skip("pyrefly is not installed")
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text)
    command = [pyrefly, "check", "--config", "pyproject.toml", "--python-interpreter-path", sys.executable]
    command += [str(folder / f"{name}.py") for name in scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.findall(r"^ERROR (.*)\n +--> .*?(\w+)\.py:", done.stdout, re.MULTILINE)
    return {name: [error for error, script in found if script == name] for name in scripts}


def test_a_type_checker_refuses_what_a_script_misspells(tmp_path):
    pytest.importorskip("trl")
    wrong = SCRIPT
    for right, (mistake, _) in MISTAKES.items():
        assert right in wrong
        wrong = wrong.replace(right, mistake)
    errors = errors_of(tmp_path, right=SCRIPT, wrong=wrong)
    assert errors["right"] == []
    assert len(errors["wrong"]) == len(MISTAKES), errors
    assert all(any(says in error for error in errors["wrong"]) for _, says in MISTAKES.values()), errors


@pytest.mark.parametrize("name", ["isentropic", "isentropic.engines.trl"])
def test_type_checkers_see_the_names_that_resolve(name):
    module = importlib.import_module(name)
    (block,) = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If)]
    aliases = [alias for node in block.body for alias in node.names]
    assert sorted(alias.name for alias in aliases) == module.__all__ == dir(module)
    assert all(alias.asname == alias.name for alias in aliases), "`as` makes a name public"


def test_dir_shows_names_that_resolve_and_no_others():
    assert all(getattr(isentropic, name) is not None for name in dir(isentropic))
    assert not {"Any", "TYPE_CHECKING", "lazy"} & set(dir(isentropic))
    with pytest.raises(AttributeError, match=r"no attribute 'composee'; public names: .*, compose, "):
        _ = isentropic.composee


def test_changes_are_the_fields_and_the_constants():
    constants = {name for table in STAGES.values() for component in table.values() for name in component.constants}
    assert set(Changes.__annotations__) == {f.name for f in fields(Recipe)} | constants


def double(adv):
    return 2 * adv


def test_objects_print_in_one_short_line(tmp_path):
    assert repr(RECIPES["grpo"]) == "Recipe(reduction='sequence')"
    shown = repr(compose("clip-cov", cov_low=2.0, knob="clip_high", penalty_coef=None, shaping=double))
    assert "constants={'cov_low': 2.0}" in shown
    assert "shaping=test_public_names.double@" in shown
    assert "formula" not in shown
    assert max(len(repr(recipe)) for recipe in RECIPES.values()) < 240
    thermostat = build_thermostat(compose("adapo", target="0.5"))
    assert repr(thermostat) == "<Thermostat: knob starts at 0.28, target 0.5 nats per token>"
    assert "target measured at the start" in repr(build_thermostat(compose("adapo")))
    assert repr(thermostat.init()) == "ThermostatState(value=0.28, readings=0, refused=0)"
    assert repr(Record("runs/a")) == "Record('runs/a')"
