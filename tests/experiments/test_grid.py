"""Grids: read from a file and flags, checked before anything runs, finished cell by cell whatever interrupts them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from isentropic.cli import main
from isentropic.experiments.config import ConfigError
from isentropic.experiments.grid import load_grid
from isentropic.experiments.lines import line_of
from isentropic.runs.record import Record, append_row

HELPERS = Path(__file__).parents[1] / "helpers"
GRID = """
baseline = "plain"
seeds = [0, 1]
recipes = ["dapo"]
[settings]
steps = 40
[cells.plain]
recipe = "grpo"
[cells.held]
recipe = "isentropic"
target = "60%"
"""


def test_an_edited_custom_method_is_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fingerprints = []
    for version, factor in enumerate((0.5, 0.5, 0.4)):
        (tmp_path / "my_method.py").write_text(
            "from isentropic.recipes import compose\n"
            f"def half(batch, recipe):\n    return {factor} * batch.adv\n"
            "HALF = compose('loop', shaping=half)\n"
        )
        os.utime(tmp_path / "my_method.py", ns=(version, version))
        fingerprints.append(load_grid(None, {"recipes": ["my_method.py:HALF", "grpo"]}).cells[0].print)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_cells_are_names_times_tasks_times_seeds_with_the_settings_of_each(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    grid = load_grid(str(path), {})
    assert [(c.name, c.seed) for c in grid.cells] == [(n, s) for s in (0, 1) for n in ("dapo", "plain", "held")]
    assert {c.config.steps for c in grid.cells} == {40}
    assert grid.cells[2].config.target == "60%"
    assert len({c.folder(grid.out) for c in grid.cells}) == 6
    # One cell is one fingerprint, whatever the seed.
    assert len({c.print for c in grid.cells}) == 3
    assert grid.results == grid.out / "results.jsonl" == Path("runs/grid/results.jsonl")


def test_a_choice_without_the_baseline_has_none(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    assert load_grid(str(path), {"recipes": ["held", "dapo"]}).baseline is None
    assert load_grid(str(path), {"recipes": ["held", "plain"]}).baseline == "plain"
    with pytest.raises(ConfigError, match="baseline: got 'plain'"):
        load_grid(str(path), {"recipes": ["held"], "baseline": "plain"})


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    flags = {"recipes": ["held", "plain"], "seeds": [7], "jobs": 3, "settings": {"steps": 8}, "out": "elsewhere"}
    grid = load_grid(str(path), flags)
    assert [(c.name, c.seed, c.config.steps) for c in grid.cells] == [("held", 7, 8), ("plain", 7, 8)]
    assert grid.cells[0].config.target == "60%"
    assert (grid.jobs, grid.out) == (3, Path("elsewhere"))


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        ("seedz = [1]", {}, ["unknown key 'seedz'", "did you mean seeds?"]),
        ("seeds = 1", {}, ["seeds: got 1", "list of int"]),
        ("recipes = ['gpro']", {}, ["gpro", "did you mean"]),
        ("", {}, ["recipes: got none"]),
        ("recipes = ['grpo']\nbaseline = 'gpo'", {}, ["baseline", "did you mean grpo?"]),
        ("recipes = ['grpo']\n[settings]\nstepps = 1", {}, ["unknown setting 'stepps'", "did you mean steps?"]),
        ("recipes = ['grpo']\n[settings]\nout = 'x'", {}, ["unknown setting 'out'"]),
        ("recipes = ['grpo']\n[cells.same]\nrecipe = 'grpo'", {}, ["grpo and same are the same run"]),
        ("cells = 3", {}, ["cells: got 3, must be a table"]),
        ("recipes = ['grpo']", {"jobs": -1}, ["jobs: got -1"]),
        ("recipes = ['rloo']\n[settings]\nupdates = 4", {}, ["rloo", "strictly on-policy"]),
        ("x = = 1", {}, ["not valid TOML"]),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, text, flags, says):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_grid(str(path), flags)
    assert all(part in str(refused.value) for part in says), refused.value


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["nowhere.toml"], "nowhere.toml: no such file"),
        (["nowhere"], "nowhere is not a run directory"),
        (["--recipes", "grpo", "--set", "steps"], "must be KEY=VALUE"),
        (["--recipes", "grpo", "--set", "steps=x"], "steps: got 'x', must be int"),
        (["run", "--seeds", "1"], "--seeds belongs to a grid"),
        (["a.toml", "b.toml"], "one grid"),
        (["--recipes", "grpo", "--only-table", "--out", "nowhere"], "no run has ended"),
    ],
)
def test_mistakes_on_the_command_line(capsys, argv, part):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_a_compressed_results_file_is_read(tmp_path):
    flags = {"recipes": ["grpo", "dapo"], "results": str(tmp_path / "results.jsonl.gz")}
    grid = load_grid(None, flags)
    for cell in grid.cells:
        assert cell in grid.missing()
        append_row(grid.results, {"task": cell.task, "seed": cell.seed, "fingerprint": cell.print, "cell": "old name"})
    assert load_grid(None, flags).missing() == []
    assert [line["cell"] for line in grid.lines()] == ["grpo", "dapo"]


OURS = {"numbers": 1, "model": "a", "tasks": "b"}


def with_lines(tmp_path, *origins):
    """A grid of three runs, and a results file with lines of the first of them."""
    grid = load_grid(None, {"recipes": ["grpo", "dapo", "loop"], "results": str(tmp_path / "results.jsonl")})
    for cell, theirs in zip(grid.cells, origins, strict=False):
        line = {"task": cell.task, "seed": cell.seed, "fingerprint": cell.print, "cell": cell.name}
        append_row(grid.results, line | ({} if theirs is None else {"origin": theirs}))
    return grid


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({**OURS, "numbers": 0}, "1 of another version of the code"),
        ({**OURS, "model": "z"}, "1 of another warm start"),
        ({**OURS, "tasks": "z"}, "1 of other rows"),
        (None, "1 without a record of their warm start, rows and code"),
    ],
)
def test_a_line_of_another_origin_is_refused(tmp_path, theirs, says):
    grid = with_lines(tmp_path, OURS, theirs)
    with pytest.raises(ConfigError) as refused:
        grid.refuse_stale(lambda config: OURS)
    text = str(refused.value)
    assert text.startswith(f"{grid.results}: 1 of 3 runs have a line")
    assert (
        f": {says}; name another results file, delete those lines, or tabulate them as they are by --only-table" in text
    )
    assert "\n" not in text
    # They can be read as they are.
    assert [line["cell"] for line in grid.lines()] == ["grpo", "dapo"]


def test_lines_of_several_origins_are_counted_each(tmp_path):
    grid = with_lines(tmp_path, None, {**OURS, "model": "z"}, None)
    with pytest.raises(ConfigError, match=r"3 of 3 runs .*: 2 without a record of .*; 1 of another warm start; name"):
        grid.refuse_stale(lambda config: OURS)


def test_lines_of_one_origin_and_of_other_grids_stay(tmp_path):
    grid = with_lines(tmp_path, OURS, OURS)
    append_row(grid.results, {"task": "expr", "seed": 0, "fingerprint": "of another grid"})
    grid.refuse_stale(lambda config: OURS)


def test_the_origin_of_a_cell_is_asked_for_its_own_settings(tmp_path):
    grid = with_lines(tmp_path, OURS)
    asked = []
    grid.refuse_stale(lambda config: asked.append(config) or OURS)
    assert [(config["recipe"], config["task"], config["then"]) for config in asked] == [("grpo", "expr", [])]


def test_a_grid_with_stale_lines_runs_nothing_and_its_table_can_be_had(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--recipes", "grpo", "dapo", "--results", "old.jsonl", "--out", "o"]
    line = {"seed": 0, "task": "expr", "figures": {"steps": 8}, "settings": {}, "recipe": {}, "curve": {}}
    cell = load_grid(None, {"recipes": ["grpo"]}).cells[0]
    append_row(tmp_path / "old.jsonl", {**line, "fingerprint": cell.print, "cell": "grpo"})
    monkeypatch.setattr("isentropic.experiments.grid.origin", lambda config: OURS)
    monkeypatch.setattr("isentropic.experiments.grid.Processes", lambda *args: pytest.fail("a run was started"))
    with pytest.raises(SystemExit) as stop:
        main(["compare", *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "old.jsonl: 1 of 2 runs have a line" in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "o").iterdir())
    assert main(["compare", *flags, "--only-table"]) == 0
    assert "grpo" in capsys.readouterr().out


def test_the_lines_of_a_named_sequence_are_found_under_its_name(tmp_path):
    flags = {"recipes": ["grpo"], "tasks": ["expr", "reversal"], "results": str(tmp_path / "results.jsonl")}
    grid = load_grid(None, flags)
    assert [(cell.task, cell.config.task, len(cell.config.then)) for cell in grid.cells] == [
        ("expr", "expr", 0),
        ("reversal", "expr", 1),
    ]
    # A run writes the task that it starts with, and its settings are in the fingerprint.
    for cell in grid.cells:
        append_row(grid.results, {"task": cell.config.task, "seed": 0, "fingerprint": cell.print})
    assert grid.missing() == []
    assert [line["task"] for line in grid.lines()] == ["expr", "reversal"]


def test_dry_run_lists_the_cells(capsys):
    assert main(["compare", "--recipes", "grpo", "dapo", "--seeds", "0", "1", "--set", "steps=8", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("8 steps  to run") == 4
    assert "4 of 4 runs to do" in out


pytest.importorskip("trl")
from trl_case import save_model

from isentropic.experiments.train import train


def run_grid(home, out, **signals):
    """`isentropic compare` in a process of its own; with ``after`` and ``by``, a signal once so many steps are done."""
    command = [sys.executable, "-m", "isentropic.cli", "compare", str(home / "grid.toml"), "--out", str(out)]
    path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if signals:
        while process.poll() is None:
            rows = sum(len(p.read_text().splitlines()) for p in Path(out).glob("*/metrics.jsonl"))
            if rows >= signals["after"]:
                process.send_signal(signals["by"])
                break
            time.sleep(0.05)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def figures(lines):
    kept = {(x["cell"], x["seed"]): {k: v for k, v in x["figures"].items() if k != "seconds"} for x in lines}
    assert len(kept) == len(lines)
    return kept, {(x["cell"], x["seed"]): (x["curve"], x["evaluations"]) for x in lines}


@pytest.mark.slow
def test_a_killed_grid_resumes_and_ends_with_the_same_numbers(tmp_path):
    model = save_model(tmp_path / "model")
    (tmp_path / "grid.toml").write_text(
        f"""
        seeds = [0]
        recipes = ["grpo"]
        tasks = ["task_cases:letters"]
        jobs = 1
        [settings]
        model = "{model}"
        steps = 24
        prompts = 4
        generations = 4
        eval_k = 2
        save_every = 8
        audit = "off"
        [cells.held]
        recipe = "isentropic"
        """
    )
    cut, whole = tmp_path / "cut", []
    for cell in load_grid(str(tmp_path / "grid.toml"), {}).cells:
        run = cell.folder(tmp_path / "whole")
        train(replace(cell.config, out=str(run)), say=lambda text: None)
        whole.append(line_of(Record(run), cell.name))

    # The first time asked to stop, the second time killed outright: its run is told by the system, and stops too.
    code, _, err = run_grid(tmp_path, cut, after=10, by=signal.SIGTERM)
    assert code == 130, err
    assert not (cut / "results.jsonl").exists()
    code, _, _ = run_grid(tmp_path, cut, after=34, by=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert len((cut / "results.jsonl").read_text().splitlines()) == 1
    code, out, err = run_grid(tmp_path, cut)
    assert code == 0, err
    assert "[1/1] held" in err  # grpo was not run again
    assert "held" in out
    assert (cut / "compare.csv").exists()
    lines = [json.loads(text) for text in (cut / "results.jsonl").read_text().splitlines()]
    assert figures(lines) == figures(whole)

    grid = load_grid(str(tmp_path / "grid.toml"), {"out": str(cut)})
    assert grid.missing() == []
    assert [line["cell"] for line in grid.lines()] == ["grpo", "held"]


def test_a_cell_that_fails_is_named_and_the_others_continue(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    model = save_model(tmp_path / "model")
    settings = ["steps=4", "prompts=2", "generations=4", "eval_k=0", "audit=off", "stop_above=0"]
    flags = ["--recipes", "grpo", "--tasks", "task_cases:letters", "task_cases:broken", "--jobs", "1", "--out", "o"]
    assert main(["compare", *flags, "--set", f"model={model}", *settings]) == 1
    out, err = capsys.readouterr()
    assert "failed: grpo, task_cases:broken, seed 0: RuntimeError: verifier is down" in err
    assert "grpo" in out
