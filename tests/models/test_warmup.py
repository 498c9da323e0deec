"""Warm-up: a model of whole words that learns to play from an environment's advice."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from task_cases import corridor, walk

from isentropic.cli import main, models
from isentropic.models import warmup
from isentropic.models.warmup import IGNORED, WarmUp, demonstrations, make, warm_up, win_rate
from isentropic.models.words import word_model, word_tokenizer, words_of
from isentropic.tasks import load_task
from isentropic.tasks.sequence import NamedSequence


def test_words_are_tokens_and_an_unknown_one_is_unk():
    tokenizer = word_tokenizer(["dish-pit", "go", "don't"])
    assert tokenizer.tokenize("Go 12 dish-pit, don't\n") == ["go", "1", "2", "dish-pit", ",", "don't", "\n"]
    assert tokenizer.tokenize("gone") == ["<unk>"]
    assert words_of([walk]) >= {"walk", "steps", "east", "left"}


def test_only_actions_are_imitated_and_only_wins():
    tokenizer = word_tokenizer(words_of([walk]))
    shown = demonstrations([walk], tokenizer, WarmUp(noise=0.5, variants=20))
    assert 2 < len(shown) < 40
    for ids, labels in shown:
        imitated = tokenizer.decode([y for y in labels if y != IGNORED]).split(" \n")
        assert {word.strip() for word in imitated} <= {"east", "stay", ""}
        assert all(x == y for x, y in zip(ids, labels, strict=True) if y != IGNORED)
    assert len(demonstrations([walk], tokenizer, WarmUp(noise=0.0, variants=20))) == 2


def test_a_warm_model_wins_where_a_random_one_does_not():
    model, tokenizer = word_model([walk], hidden=16, layers=2, heads=2)
    before = win_rate(model, tokenizer, walk, 10)
    state = torch.get_rng_state()
    figures = warm_up(model, tokenizer, [walk], WarmUp(steps=60, noise=0.0, learning_rate=1e-2))
    assert sum(before) / len(before) < 0.2
    assert win_rate(model, tokenizer, walk, 10)[0] > 0.5
    assert figures["loss"] < 0.3
    assert figures["demonstrations"] == 2
    assert torch.equal(torch.get_rng_state(), state)


def two_games():
    """The corridor, and one with other words in which one acts otherwise."""

    class Back(type(walk.make())):
        def reset(self, size, **row):
            return super().reset(size).replace("steps", "paces")

        def step(self, action):
            return super().step({"west": "east"}.get(action, ""))

        def advice(self):
            return "west"

    return [walk, replace(walk, name="back", make=Back)]


def test_a_model_is_warmed_up_on_several_games_and_knows_the_words_of_all(tmp_path):
    tasks = two_games()
    settings = WarmUp(steps=80, noise=0.0, learning_rate=1e-2, rows=1)
    figures = make(tasks, tmp_path, settings, word_model(tasks, hidden=16, layers=2, heads=2), num=10, say=print)
    assert figures["demonstrations"] == 2
    assert set(figures["by_task"]) == {"corridor", "back"}
    assert min(won["win_frac"] for won in figures["by_task"].values()) > 0.5
    assert json.loads((tmp_path / "warmup.json").read_text())["task"] == "corridor and back"
    assert words_of(tasks) >= {"steps", "paces", "east", "west"}


def test_shares_won_are_of_every_game_and_of_all_held_out_rows(tmp_path, monkeypatch):
    shares = {"corridor": [0.5], "back": [0.0, 0.0, 1.0]}
    monkeypatch.setattr(warmup, "win_rate", lambda model, tokenizer, task, num, seed: shares[task.name])
    figures = make(two_games(), tmp_path, WarmUp(steps=1, noise=0.0))
    assert {name: won["win_frac"] for name, won in figures["by_task"].items()} == {"corridor": 0.5, "back": 1 / 3}
    assert figures["win_frac"] == 1.5 / 4
    assert figures["interval"].low < 1.5 / 4 < figures["interval"].high
    assert figures["by_task"]["corridor"]["interval"] is None


def test_the_command_shows_a_sequence_and_further_games_each_once(tmp_path, capsys, monkeypatch):
    games = [*two_games(), replace(walk, name="third")]
    monkeypatch.setattr(models, "load_task", {task.name: task for task in games}.__getitem__)
    monkeypatch.setitem(models.SEQUENCES, "both", NamedSequence(("corridor", "back"), ""))
    flags = ["--steps", "1", "--noise", "0", "--rows", "1", "--eval-k", "1", "--out", str(tmp_path / "model")]
    assert main(["warmup", "--task", "both", "--then", "back", "--then", "third", *flags]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in printed if line.startswith("win_frac")] == [
        "corridor",
        "back",
        "third",
    ]
    assert [line.split()[-1] for line in printed if line.startswith("demonstrations")] == ["3"]


def test_a_game_whose_advice_never_wins_is_named_among_others():
    tasks = [walk, replace(corridor(max_turns=1), name="short")]
    with pytest.raises(ValueError, match="'short': its advice wins no training row within 1 turns"):
        demonstrations(tasks, word_tokenizer(words_of(tasks)), WarmUp(noise=0.0))


def test_a_bad_setting_is_named():
    with pytest.raises(ValueError, match="noise must be a share"):
        WarmUp(noise=1.0)
    with pytest.raises(ValueError, match="steps must be > 0, got 0"):
        WarmUp(steps=0)


def test_a_task_that_is_answered_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is answered, not played"):
        make([walk, load_task("expr")], tmp_path)
