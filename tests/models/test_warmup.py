"""Warm-up: a model of whole words that learns to play from an environment's advice."""

import json

import pytest
import torch

pytest.importorskip("trl")
from test_environments import corridor

from isentropic.cli import main
from isentropic.models.warmup import IGNORED, WarmUp, demonstrations, make, warm_up, win_rate
from isentropic.models.words import word_model, word_tokenizer, words_of
from isentropic.runs.record import Record
from isentropic.tasks import load_task

walk = corridor(max_turns=4)


def test_words_are_tokens_and_an_unknown_one_is_unk():
    tokenizer = word_tokenizer(["dish-pit", "go", "don't"])
    assert tokenizer.tokenize("Go 12 dish-pit, don't\n") == ["go", "1", "2", "dish-pit", ",", "don't", "\n"]
    assert tokenizer.tokenize("gone") == ["<unk>"]
    assert words_of(walk) >= {"walk", "steps", "east", "left"}


def test_only_actions_are_imitated_and_only_wins():
    tokenizer = word_tokenizer(words_of(walk))
    shown = demonstrations(walk, tokenizer, WarmUp(noise=0.5, variants=20))
    assert 2 < len(shown) < 40
    for ids, labels in shown:
        imitated = tokenizer.decode([y for y in labels if y != IGNORED]).split(" \n")
        assert {word.strip() for word in imitated} <= {"east", "stay", ""}
        assert all(x == y for x, y in zip(ids, labels, strict=True) if y != IGNORED)
    assert len(demonstrations(walk, tokenizer, WarmUp(noise=0.0, variants=20))) == 2


def test_a_warm_model_wins_where_a_random_one_does_not():
    model, tokenizer = word_model(walk, hidden=16, layers=2, heads=2)
    before = win_rate(model, tokenizer, walk, 10)
    state = torch.get_rng_state()
    figures = warm_up(model, tokenizer, walk, WarmUp(steps=60, noise=0.0, learning_rate=1e-2))
    assert sum(before) / len(before) < 0.2
    assert win_rate(model, tokenizer, walk, 10)[0] > 0.5
    assert figures["loss"] < 0.3
    assert figures["demonstrations"] == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bad_setting_is_named():
    with pytest.raises(ValueError, match="noise must be a share"):
        WarmUp(noise=1.0)
    with pytest.raises(ValueError, match="steps must be > 0, got 0"):
        WarmUp(steps=0)


def test_a_task_that_is_answered_is_refused(tmp_path):
    from isentropic.tasks import load_task

    with pytest.raises(ValueError, match="is answered, not played"):
        make(load_task("expr"), tmp_path)


def test_from_warm_up_to_a_run_and_its_evaluation_by_commands(tmp_path, capsys):
    """The three commands of a user: warmup, train, eval."""
    name, model = "test_warmup:walk", tmp_path / "model"
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


@pytest.mark.parametrize("played_first", [True, False])
def test_an_environment_and_a_task_that_is_answered_in_turn(tmp_path, played_first):
    from trl_case import save_model

    model, run = save_model(tmp_path / "model"), tmp_path / "run"
    names = ["test_warmup:walk", "expr"][:: 1 if played_first else -1]
    flags = "--steps 4 --prompts 2 --generations 4 --updates 2 --eval-k 2 --eval-rows 3 --explain-every 1".split()
    flags += ["--audit", "off"]
    assert main(["train", "--model", model, "--task", names[0], "--then", names[1], *flags, "--out", str(run)]) == 0
    record = Record(run)
    rows = record.rows("metrics")
    tasks = [row["task"] for row in rows]
    assert tasks == (["corridor"] * 4 + ["expr"] * 4 if played_first else ["expr"] * 4 + ["corridor"] * 4)
    for row in rows:
        assert ("episode/turns" in row) == (row["task"] == "corridor")
    # Four completions a step: an expression has its own task's limit, not that of an episode.
    assert all(
        row["entropy/tokens"] <= 4 * load_task("expr").max_completion_length for row in rows if row["task"] == "expr"
    )
    assert [(row["step"], row["task"]) for row in record.rows("evaluations")] == [
        (step, task) for step in (0, 4, 8) for task in (tasks[0], tasks[-1])
    ]
