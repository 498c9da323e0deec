"""Commands that follow one another, as a user types them."""

import json

import pytest

pytest.importorskip("trl")

from isentropic.cli import main
from isentropic.runs.record import Record


def test_from_warm_up_to_a_run_and_its_evaluation_by_commands(tmp_path, capsys):
    """The three commands of a user: warmup, train, eval."""
    name, model = "task_cases:walk", tmp_path / "model"
    flags = ["--steps", "20", "--learning-rate", "0.01", "--noise", "0.4", "--eval-k", "4", "--variants", "4"]
    assert main(["warmup", "--task", name, "--out", str(model), *flags]) == 0
    assert "win_frac" in capsys.readouterr().out
    facts = json.loads((model / "warmup.json").read_text())
    assert facts["task"] == "corridor"
    assert 0 <= facts["figures"]["win_frac"] <= 1
    with pytest.raises(SystemExit):
        main(["warmup", "--task", name, "--out", str(model)])
    assert "already holds a model" in capsys.readouterr().err
    run = tmp_path / "run"
    flags = ["--prompts", "2", "--generations", "8", "--steps", "4", "--updates", "2", "--eval-k", "4"]
    assert main(["train", "--model", str(model), "--task", name, "--out", str(run), *flags]) == 0
    record = Record(run)
    rows = record.rows("metrics")
    assert len(rows) == 4
    assert all(0 <= row["episode/win_frac"] == row["reward/mean"] <= 1 for row in rows)
    assert all(1 <= row["episode/turns"] <= 4 and row["entropy/turn_1"] >= 0 for row in rows)
    first, last = record.rows("evaluations")
    assert (first["num_samples"], last["step"]) == ([4], 4)
    assert first["pass@1"] == first["num_correct"][0] / 4
    assert not json.loads((run / "audit.json").read_text())["serious"]
    assert main(["eval", str(run), "--k", "2"]) == 0
    assert "pass@2" in capsys.readouterr().out
