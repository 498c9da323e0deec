"""Tasks in one run: the switches in its run directory, and resuming; the guard against exploding entropy."""

import json
import shutil

import pytest

pytest.importorskip("trl")
import torch
from task_cases import walk
from trl_case import save_model

from isentropic.cli import main
from isentropic.engines.loop import ControlLoop
from isentropic.runs.record import Record
from isentropic.runs.summary import closing_table
from isentropic.tasks import load_task

TASKS = ["--task", "task_cases:letters", "--then", "task_cases:spaces"]
SMALL = ["--prompts", "4", "--generations", "4", "--updates", "2", "--eval-k", "2", "--audit", "off", "--warmup", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("sequence")
    model = save_model(home / "model")
    flags = [*TASKS, *SMALL, "--model", model, "--recipe", "grpo", "--steps", "8", "--then-steps", "6"]
    flags += ["--save-every", "4", "--keep", "9", "--schedule", "linear", "--learning-rate", "1e-3"]
    assert main(["train", *flags, "--out", str(home / "out")]) == 0
    return Record(home / "out"), flags


def test_the_run_says_where_tasks_changed(run):
    rows = run[0].rows("metrics")
    assert [row["task"] for row in rows] == ["letters"] * 8 + ["spaces"] * 6
    # The learning rate of each task rises over 2 steps and falls to its end: 6 more on the first, 4 on the second.
    wanted = [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0.5, 1, 3 / 4, 2 / 4, 1 / 4]
    assert [row["learning_rate"] * 1e3 for row in rows] == pytest.approx(wanted)
    # Completions of letters have at most 6 tokens and those of spaces at most 4, eight of them a step.
    tokens = [row["entropy/tokens"] for row in rows]
    assert max(tokens[8:]) <= 8 * 4 < max(tokens[:8]) <= 8 * 6
    seen = [(row["step"], row["task"]) for row in run[0].rows("evaluations")]
    assert seen == [(step, task) for step in (0, 8, 14) for task in ("letters", "spaces")]


def test_the_summary_is_of_the_last_task_and_keeps_the_first(run, capsys):
    result = json.loads((run[0].path / "summary.json").read_text())
    assert [row["step"] for row in result["before"]["letters"]] == [0, 8, 14]
    by = {(row["step"], row["task"]): row["pass@1"] for row in run[0].rows("evaluations")}
    assert result["start"]["pass@1"] == by[0, "spaces"]
    assert result["end"]["pass@1"] == by[14, "spaces"]
    table = closing_table(result, "out")
    assert "letters" in table
    assert "switch" in table


def test_a_sequence_resumed_before_the_switch_equals_one_that_was_not(run, tmp_path):
    record, _ = run
    shutil.copytree(record.path, tmp_path / "out")
    again = Record(tmp_path / "out")
    for step, path in again.checkpoints():
        if step > 4:
            shutil.rmtree(path)
    (again.path / "summary.json").unlink()
    assert main(["train", "--resume", "--out", str(again.path)]) == 0
    assert again.rows("evaluations") == record.rows("evaluations")
    resumed, whole = (
        [{k: v for k, v in r.items() if k != "seconds"} for r in x.rows("metrics")] for x in (again, record)
    )
    assert resumed == whole


TOLD = []


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    home = tmp_path_factory.mktemp("three")
    flags = [*TASKS, "--then", "task_cases:empty", *SMALL, "--model", save_model(home / "model"), "--recipe", "grpo"]
    flags += ["--steps", "4", "--save-every", "2", "--keep", "9", "--schedule", "linear", "--learning-rate", "1e-3"]
    flags += ["--eval-every", "2"]
    native = ControlLoop.tell_held_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ControlLoop, "tell_held_out", lambda *told: TOLD.append(told[1:]) or native(*told))
        assert main(["train", *flags, "--out", str(home / "out")]) == 0
    return Record(home / "out")


def test_the_controller_hears_of_the_held_out_accuracy_on_the_task_under_way(three):
    """At the lowest temperature; at a switch, of the task that begins."""
    under_way = ["letters"] * 2 + ["spaces"] * 2 + ["empty"] * 3
    rows = {(row["step"], row["task"]): row for row in three.rows("evaluations")}
    coolest = [rows[2 * i, task]["at"]["0.3"]["pass@1"] for i, task in enumerate(under_way)]
    counts = [len(rows[2 * i, task]["greedy_correct"]) for i, task in enumerate(under_way)]
    assert [count for _, count in TOLD] == counts
    assert [right / count for right, count in TOLD] == pytest.approx(coolest)


def test_every_task_of_three_starts_anew_and_is_evaluated_at_every_switch(three):
    rows = three.rows("metrics")
    assert [row["task"] for row in rows] == ["letters"] * 4 + ["spaces"] * 4 + ["empty"] * 4
    # Of four steps with a warm-up of two: up in two, down in two.
    assert [row["learning_rate"] * 1e3 for row in rows] == pytest.approx([0, 0.5, 1, 0.5] * 3)
    longest = [max(row["entropy/tokens"] for row in rows[at : at + 4]) for at in (0, 4, 8)]
    assert all(tokens <= 8 * limit for tokens, limit in zip(longest, (6, 4, 5), strict=True))
    # A switch is evaluated once, though an evaluation along the run falls on it too.
    seen = [(row["step"], row["task"]) for row in three.rows("evaluations")]
    assert seen == [(step, task) for step in range(0, 13, 2) for task in ("letters", "spaces", "empty")]
    before = json.loads((three.path / "summary.json").read_text())["before"]
    assert {task: [row["step"] for row in before[task]] for task in before} == {
        task: list(range(0, 13, 2)) for task in ("letters", "spaces")
    }


def test_the_optimizer_forgets_at_every_switch(three):
    steps = {}
    for step, path in three.checkpoints():
        state = torch.load(path / "optimizer.pt", weights_only=True)["state"]
        steps[step] = {int(moments["step"]) for moments in state.values()}
    assert steps == {step: {(step - 1) % 4 + 1} for step in (2, 4, 6, 8, 10, 12)}


@pytest.mark.parametrize("kept", [10, 8, 6])
def test_a_run_of_three_tasks_resumed_at_and_after_a_switch_equals_one_that_was_not(three, tmp_path, kept):
    shutil.copytree(three.path, tmp_path / "out")
    again = Record(tmp_path / "out")
    for step, path in again.checkpoints():
        if step > kept:
            shutil.rmtree(path)
    (again.path / "summary.json").unlink()
    assert main(["train", "--resume", "--out", str(again.path)]) == 0
    for name in ("metrics", "evaluations", "samples"):
        resumed, whole = (
            [{k: v for k, v in r.items() if k != "seconds"} for r in x.rows(name)] for x in (again, three)
        )
        assert resumed == whole
    last, other = (run.path / "checkpoint-12" / "model.safetensors" for run in (again, three))
    assert last.read_bytes() == other.read_bytes()
    summaries = [json.loads((run.path / "summary.json").read_text()) | {"seconds": 0} for run in (again, three)]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--then", "exprdigit"], ["then: ", "did you mean expr-digit?"]),
        (["--then", "expr"], ["got 'expr' twice in one run"]),
        (["--then", "expr-digit", "--then", "expr-digit"], ["got 'expr-digit' twice in one run"]),
        (["--task", "reversal", "--then", "expr"], ["got 'expr' twice in one run"]),
        (["--then-steps", "8"], ["without a second task"]),
        (["--then", "expr-digit", "--steps", "10"], ["multiple of updates (4)"]),
        (["--then", "expr-digit", "--then-steps", "10"], ["then_steps: got 10", "multiple of updates"]),
        (["--stop-above", "0.5"], ["must be above 1, or 0"]),
    ],
)
def test_mistakes(capsys, flags, says):
    with pytest.raises(SystemExit):
        main(["train", "--dry-run", *flags])
    error = capsys.readouterr().err
    assert all(part in error for part in says), error


def test_entropy_that_explodes_stops_the_run_with_a_checkpoint_and_a_remedy(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    config = tmp_path / "bonus.toml"
    config.write_text('recipe = "entropy-bonus"\n[recipe_options]\nentropy_coef = 5.0\n')
    flags = [*TASKS[:2], *SMALL, "--model", model, "--steps", "200", "--learning-rate", "1e-2", "--temperature", "0.5"]
    flags += ["--out", str(tmp_path / "out"), "--save-every", "0", "--stop-above", "1.05"]
    assert main(["train", str(config), *flags]) == 1
    out = capsys.readouterr().out
    assert "stopped early: entropy was above 1.05 x" in out
    assert "a lower entropy_coef" in out
    record = Record(tmp_path / "out")
    rows = record.rows("metrics")
    assert rows[-1]["step"] < 200
    assert [step for step, _ in record.checkpoints()] == [rows[-1]["step"]]
    over = [row["entropy/mean"] > 1.05 * rows[0]["entropy/mean"] for row in rows]
    assert all(over[-20:])
    assert rows[-1]["step"] == len(rows)
    # It can be resumed.
    more = str(rows[-1]["step"] + 2)
    assert main(["train", "--resume", "--out", str(tmp_path / "out"), "--stop-above", "0", "--steps", more]) == 0
    assert record.rows("metrics")[-1]["step"] == rows[-1]["step"] + 2


@pytest.mark.parametrize("played_first", [True, False])
def test_an_environment_and_a_task_that_is_answered_one_after_the_other(tmp_path, played_first):
    model, run = save_model(tmp_path / "model"), tmp_path / "run"
    names = ["task_cases:walk", "expr"][:: 1 if played_first else -1]
    flags = "--steps 4 --prompts 2 --generations 4 --updates 2 --eval-k 2 --eval-rows 3 --explain-every 1".split()
    flags += ["--audit", "off"]
    assert main(["train", "--model", model, "--task", names[0], "--then", names[1], *flags, "--out", str(run)]) == 0
    record = Record(run)
    rows = record.rows("metrics")
    tasks = [row["task"] for row in rows]
    assert tasks == ([walk.name] * 4 + ["expr"] * 4 if played_first else ["expr"] * 4 + [walk.name] * 4)
    for row in rows:
        assert ("episode/turns" in row) == (row["task"] == walk.name)
    # Four completions a step: an expression has its own task's limit, not that of an episode.
    assert all(
        row["entropy/tokens"] <= 4 * load_task("expr").max_completion_length for row in rows if row["task"] == "expr"
    )
    assert [(row["step"], row["task"]) for row in record.rows("evaluations")] == [
        (step, task) for step in (0, 4, 8) for task in (tasks[0], tasks[-1])
    ]
