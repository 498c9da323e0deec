"""The notebooks of the documentation run as they stand, and show what they say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def executed(path, tmp_path):
    """A copy of a notebook, run beside a copy of the results that it reads."""
    home = tmp_path / "notebooks"
    home.mkdir()
    shutil.copy(path, home)
    (tmp_path / "results").symlink_to(ROOT / "docs" / "results")
    environment = {**os.environ, "ISENTROPIC_CACHE": str(tmp_path / "cache"), "MPLBACKEND": "agg"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "notebook.py"), "--write", path.name]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((home / path.name).read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(cell):
    """What a cell shows: a stream, or the forms of a value."""
    return [sorted(output.get("data", {"stream": None})) for output in cell["outputs"]]


def texts(cell):
    return ["".join(output.get("text") or output["data"]["text/plain"]) for output in cell["outputs"]]


def test_notebooks_are_small_and_have_their_outputs():
    assert [path.stem for path in NOTEBOOKS] == ["comparison", "first-run"]
    for path in NOTEBOOKS:
        assert path.stat().st_size < 100_000
        cells = code_cells(json.loads(path.read_text(encoding="utf-8")))
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert any("image/png" in shown for cell in cells for shown in kinds(cell))


@pytest.mark.slow
def test_the_first_run_trains_two_models_and_draws_them(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("matplotlib")
    (path,) = [path for path in NOTEBOOKS if path.stem == "first-run"]
    cells = code_cells(executed(path, tmp_path))
    assert [kinds(cell) for cell in cells] == [kinds(c) for c in code_cells(json.loads(path.read_text()))]
    for name in ("held", "free"):
        summary = json.loads((tmp_path / "notebooks" / "runs" / name / "summary.json").read_text())
        assert summary["steps"] == 40
    assert texts(cells[-3])[0].startswith("<Run held: ")


def test_the_comparison_shows_what_the_results_say(tmp_path):
    pytest.importorskip("matplotlib")
    (path,) = [path for path in NOTEBOOKS if path.stem == "comparison"]
    stored = code_cells(json.loads(path.read_text(encoding="utf-8")))
    remedy = "run `python ../../tests/helpers/notebook.py --write comparison.ipynb` in docs/notebooks"
    assert [texts(cell) for cell in code_cells(executed(path, tmp_path))] == [texts(cell) for cell in stored], remedy
