"""The lists of `isentropic recipes` and `isentropic tasks`."""

import re
from pathlib import Path

from isentropic.cli import main
from isentropic.control.controllers import CONTROLLERS
from isentropic.control.targets import TARGETS
from isentropic.recipes import RECIPES
from isentropic.recipes.knobs import all_knobs
from isentropic.recipes.stages import REDUCTIONS, STAGES
from isentropic.tasks import KINDS, TASKS
from isentropic.tasks.expressions import PROPERTIES, RUNGS
from isentropic.tasks.sequence import SEQUENCES


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


def section(text, title):
    """The lines below a title, without their indentation."""
    (lines,) = [part.splitlines()[1:] for part in text.split("\n\n") if part.startswith(title)]
    assert all(line.startswith("  ") for line in lines)
    return [line[2:] for line in lines]


def test_tasks_lists_properties_the_ladder_and_sequences(capsys):
    assert main(["tasks"]) == 0
    text = capsys.readouterr().out
    properties = dict(line.split(maxsplit=1) for line in section(text, "PROPERTIES"))
    assert properties == {name: one.meaning for name, one in PROPERTIES.items()}
    head, *rungs = section(text, "LADDER")
    assert head.split() == ["pass@1", "pass@64", "distinct", "of", "64", "task"]
    read = [(float(a), float(b), float(c), name) for a, b, c, name in map(str.split, rungs)]
    assert read == [(rung.rate, rung.pass64, rung.distinct, rung.name) for rung in RUNGS]
    # Columns: every name starts where the head says.
    assert {line.index("expr") for line in rungs} == {head.index("task")}
    lines = iter(section(text, "SEQUENCES"))
    for name, sequence in SEQUENCES.items():
        assert next(lines).split(maxsplit=1) == [name, sequence.meaning]
        assert [next(lines).split() for _ in sequence.tasks] == [
            [f"{i + 1}.", task] for i, task in enumerate(sequence.tasks)
        ]
    assert next(lines, None) is None


def test_the_page_of_tasks_has_the_same_ladder_and_properties():
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    rows = [f"| {r.rate:g} | {r.pass64:.2f} | {r.distinct:.1f} | `{r.name}` |" for r in RUNGS]
    assert "\n".join(rows) + "\n\n" in page
    table = page.partition("| property | the answer |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z-]+)`", table)) == set(PROPERTIES)
