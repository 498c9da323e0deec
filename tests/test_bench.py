"""Scripts that are run by hand elsewhere, at a small size: the GPU's on the CPU, and the planting of errors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu_at_a_small_size():
    command = [sys.executable, str(BENCH / "gpu.py"), "--small", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for heading in ("## Against float64", "## Head: 256 tokens", "## A step", "## The default recipe, 8 steps"):
        assert heading in done.stdout
    assert "| NO |" not in done.stdout
    assert done.stdout.count("| yes |") == 16
    assert "8 of 8 steps explained" in done.stdout


def test_the_gpu_script_sees_a_path_that_is_wrong(bench, monkeypatch):
    import gpu
    import torch

    data = gpu.peers.draw(64, 16, 2500, torch.float32)
    assert max(gpu.errors(data, torch.float32, "cpu")) < 1e-4
    right = gpu.token_stats
    monkeypatch.setattr(gpu, "token_stats", lambda *args, **options: right(*args, 1.01, **options))
    assert gpu.errors(data, torch.float32, "cpu")[0] > 1e-2


@pytest.mark.parametrize(
    ("source", "expected"),
    {
        "a < b": ["a >= b"],
        "a + b": ["a - b"],
        "not a": ["a"],
        "a and b": ["a or b"],
        "x.detach()": ["x"],
        "min(a, b)": ["max(a, b)"],
        "a.minimum(b)": ["a.maximum(b)"],
        "3": ["4"],
        "0.5": ["1.0"],
        "s._replace(a=x, b=y)": ["s._replace(b=y)", "s._replace(a=x)"],
    }.items(),
)
def test_errors_that_are_planted(bench, source, expected):
    import mutants

    assert [ast.unparse(new) for new in mutants.changed(ast.parse(source, mode="eval").body)] == expected


def test_an_error_is_planted_where_it_says(bench):
    import mutants

    for mutant in mutants.chosen(list(mutants.PARTS), 60, seed=3):
        content = (mutants.ROOT / mutant.file).read_bytes()
        assert content[mutant.start : mutant.end].decode() == mutant.old
        ast.parse(content[: mutant.start] + mutant.new.encode() + content[mutant.end :])
    assert mutants.nearest("src/isentropic/losses/selection.py")[1:] == ["tests/losses/test_selection.py"]
    assert mutants.nearest("src/isentropic/recipes/stages.py")[1:] == ["tests/recipes"]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["pays", "which", "target", "auto", "sequence"])
def test_the_table_of_a_page_is_made_from_the_committed_lines(bench, monkeypatch, experiment):
    import methods

    made = {}
    monkeypatch.chdir(methods.ROOT)
    monkeypatch.setattr(methods, "save", made.__setitem__)
    monkeypatch.setattr(methods, "save_figure", lambda figure, name: made.update({name: figure}))
    monkeypatch.setattr(sys, "argv", ["methods.py", experiment, "--only-table"])
    methods.main("", methods.EXPERIMENTS)
    figure, table = made[f"{experiment}.svg"], made[f"{experiment}-table.md"]
    assert any(axis.lines for axis in figure.axes)
    assert table == (methods.ROOT / "docs" / "results" / f"{experiment}-table.md").read_text(encoding="utf-8")


def test_no_page_has_a_figure_left_to_fill_in():
    pages = [*(BENCH.parent / "docs").rglob("*.md"), BENCH.parent / "README.md"]
    assert not [str(page) for page in pages if "@@" in page.read_text(encoding="utf-8")]
