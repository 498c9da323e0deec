"""Warm-up: a model of whole words that learns to play from an environment's advice."""

import pytest
import torch

pytest.importorskip("transformers")
from task_cases import walk

from isentropic.models.warmup import IGNORED, WarmUp, demonstrations, make, warm_up, win_rate
from isentropic.models.words import word_model, word_tokenizer, words_of
from isentropic.tasks import load_task


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
    with pytest.raises(ValueError, match="is answered, not played"):
        make(load_task("expr"), tmp_path)
