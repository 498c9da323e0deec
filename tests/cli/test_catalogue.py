"""The lists of `isentropic recipes` and `isentropic tasks`."""

from isentropic.cli import main
from isentropic.control.controllers import CONTROLLERS
from isentropic.control.targets import TARGETS
from isentropic.recipes import RECIPES
from isentropic.recipes.knobs import all_knobs
from isentropic.recipes.stages import REDUCTIONS, STAGES
from isentropic.tasks import KINDS, TASKS


def test_recipes_lists_everything(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first_words = {line.split()[0] for line in lines if line.strip()}
    components = {name for table in STAGES.values() for name in table}
    for names in (RECIPES, all_knobs(), components, REDUCTIONS, CONTROLLERS):
        assert set(names) <= first_words
    assert all(any(form in line for line in lines) for form in TARGETS)
    for stage in STAGES:
        assert any(f"(--{stage})" in line for line in lines)
    assert "constants: cov_share=0.0002, cov_low=1, cov_high=5" in [line.strip() for line in lines]
    assert "constants: boost=1 (knob), surprisal_share=0.1" in [line.strip() for line in lines]


def test_tasks_lists_everything(capsys):
    assert main(["tasks"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*TASKS, *(kind.form for kind in KINDS.values())))
