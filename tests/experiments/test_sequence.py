"""Two tasks in one run: their rows, the switch, and what the run directory says of it; the guard against explosion."""


import pytest

pytest.importorskip("trl")
from test_train import letters
from trl_case import save_model

from isentropic.cli import main
from isentropic.experiments.sequence import Manner, Switch, in_order
from isentropic.runs.record import Record
from isentropic.tasks import Task

spaces = Task(
    name="spaces",
    description="Start with anything but a digit.",
    train=lambda seed: [{"prompt": f"{i % 90 + 10}<", "other": i} for i in range(5)],
    heldout=lambda: [{"prompt": f"{i}<", "other": i} for i in range(4)],
    verify=lambda completion, other: not completion[:1].isdigit(),
    normalise=lambda text: text[:1],
    max_completion_length=4,
)
MINE = ["--task", "test_training:letters", "--then", "test_sequence:spaces"]
SMALL = ["--prompts", "4", "--generations", "4", "--updates", "2", "--eval-k", "2", "--audit", "off", "--warmup", "2"]


def test_rows_come_in_order_and_every_one_is_judged_by_its_own_task():
    both = in_order(letters, spaces, num_first=70, num_then=8)
    rows = both.train(3)
    assert [row["task"] for row in rows] == ["letters"] * 70 + ["spaces"] * 8
    # A pass over a task's prompts is a shuffle of all of them.
    first = [row["prompt"] for row in rows[:64]]
    assert sorted(first) == sorted(row["prompt"] for row in letters.train(3))
    assert first != [row["prompt"] for row in letters.train(3)]
    assert {row["prompt"] for row in rows[70:75]} == {row["prompt"] for row in spaces.train(3)}
    assert rows == both.train(3)
    assert rows != both.train(4)
    assert all(set(row) == {"prompt", "task", "digit", "other"} for row in rows)
    columns = {"task": ["letters", "spaces"], "digit": [1, None], "other": [None, 0]}
    assert both.reward(["1", "1"], prompts=["a", "b"], **columns) == [1.0, 0.0]
    assert both.reward(["x", "x"], prompts=["a", "b"], **columns) == [0.0, 1.0]
    assert both.max_completion_length == 6
    with pytest.raises(ValueError, match="different names"):
        in_order(letters, letters, 1, 1)


def test_the_switch_changes_where_completions_end():
    from types import SimpleNamespace

    made = SimpleNamespace(eos_token_id=[1], max_new_tokens=9)
    trainer = SimpleNamespace(eos_token_ids=[1], generation_config=made, generation_kwargs={}, switch=4)
    trainer.args, trainer.vllm_generation = SimpleNamespace(), SimpleNamespace(generation_kwargs={})
    trainer.manners, trainer.optimizer = (Manner([5], 7), Manner([], 3)), SimpleNamespace(state={})
    seen, called = [], []
    switch = Switch(trainer, called.append)
    for step in (0, 3, 4, 5):
        switch.on_step_begin(None, SimpleNamespace(global_step=step), None)
        limits = (trainer.args.max_completion_length, trainer.vllm_generation.max_completion_length)
        seen.append((trainer.eos_token_ids, made.eos_token_id, made.max_new_tokens, *limits))
    assert seen == [([1, 5], [1, 5], 7, 7, 7)] * 2 + [([1], [1], 3, 3, 3)] * 2
    assert called == [4]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("sequence")
    model = save_model(home / "model")
    flags = [*MINE, *SMALL, "--model", model, "--recipe", "grpo", "--steps", "8", "--then-steps", "6"]
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
    import json

    result = json.loads((run[0].path / "summary.json").read_text())
    assert [row["step"] for row in result["before"]["letters"]] == [0, 8, 14]
    by = {(row["step"], row["task"]): row["pass@1"] for row in run[0].rows("evaluations")}
    assert result["start"]["pass@1"] == by[0, "spaces"]
    assert result["end"]["pass@1"] == by[14, "spaces"]
    from isentropic.experiments.train import table

    assert "pass@1, letters (start, switch, end)" in table(result, "out")


def test_a_sequence_resumed_before_the_switch_equals_one_that_was_not(run, tmp_path):
    import shutil

    record, _ = run
    shutil.copytree(record.path, tmp_path / "out")
    again = Record(tmp_path / "out")
    for step, path in again.checkpoints():
        if step > 4:
            shutil.rmtree(path)
    (again.path / "summary.json").unlink()
    assert main(["train", "--resume", "--out", str(again.path)]) == 0
    assert again.rows("evaluations") == record.rows("evaluations")
    mine, theirs = (
        [{k: v for k, v in r.items() if k != "seconds"} for r in x.rows("metrics")] for x in (again, record)
    )
    assert mine == theirs


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--then", "exprdigit"], ["--then"[2:], "did you mean expr-digit?"]),
        (["--then", "expr"], ["the first task"]),
        (["--then-steps", "8"], ["without a second task"]),
        (["--then", "expr-digit", "--steps", "10"], ["multiple of updates (4)"]),
        (["--then", "expr-digit", "--then-steps", "10"], ["then_steps: got 10", "multiple of updates"]),
        (["--stop-above", "0.5"], ["must be above 1, or 0"]),
    ],
)
def test_mistakes(capsys, flags, parts):
    with pytest.raises(SystemExit):
        main(["train", "--dry-run", *flags])
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error


def test_a_recipe_that_explodes_is_stopped_with_a_checkpoint_and_told_what_to_try(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    config = tmp_path / "bonus.toml"
    config.write_text('recipe = "entropy-bonus"\n[recipe_options]\nentropy_coef = 5.0\n')
    flags = [*MINE[:2], *SMALL, "--model", model, "--steps", "200", "--learning-rate", "1e-2", "--temperature", "0.5"]
    flags += ["--out", str(tmp_path / "out"), "--save-every", "0", "--stop-above", "1.05"]
    assert main(["train", str(config), *flags]) == 1
    out = capsys.readouterr().out
    assert "stopped early: entropy stood above 1.05 x" in out
    assert "a lower entropy_coef" in out
    record = Record(tmp_path / "out")
    rows = record.rows("metrics")
    assert rows[-1]["step"] < 200
    assert [step for step, _ in record.checkpoints()] == [rows[-1]["step"]]
    over = [row["entropy/mean"] > 1.05 * rows[0]["entropy/mean"] for row in rows]
    assert all(over[-20:])
    assert rows[-1]["step"] == len(rows)
    # It goes on where it stopped, if asked.
    more = str(rows[-1]["step"] + 2)
    assert main(["train", "--resume", "--out", str(tmp_path / "out"), "--stop-above", "0", "--steps", more]) == 0
    assert record.rows("metrics")[-1]["step"] == rows[-1]["step"] + 2
