"""Sampling: where completions end, batches that fit, and a cache that reads each prompt once."""

import pytest
import torch

pytest.importorskip("transformers")
from trl_case import parts

from isentropic.models import generation
from isentropic.models.generation import _batch_size, encode, end_tokens, line_break_tokens, sample, seeded

TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"
ENDS = "0123456789ABCDEFGHIJ"


@pytest.fixture(scope="module")
def pair():
    model, tokenizer = parts()
    return model.eval(), tokenizer


def test_line_breaks_are_all_tokens_that_contain_one(pair):
    model, tokenizer = pair
    (only,) = line_break_tokens(tokenizer)
    assert tokenizer.decode([only]) == "\n"
    assert end_tokens(tokenizer, model) == [tokenizer.eos_token_id]


def test_a_completion_ends_with_the_first_stop(pair):
    model, tokenizer = pair
    stop = tokenizer.convert_tokens_to_ids(list(ENDS))
    torch.manual_seed(0)
    completions = sample(model, tokenizer, ["1>", "12>"], 40, 8, 1.0, stop)
    ended = [t for texts in completions.texts for t in texts if t and t[-1] in ENDS]
    assert len(ended) > 10
    assert all(not set(text[:-1]) & set(ENDS) for texts in completions.texts for text in texts)
    assert sum(map(sum, completions.truncated)) > 0
    for texts, truncated in zip(completions.texts, completions.truncated, strict=True):
        # A completion that was cut off by the limit contains nothing that ends an answer.
        assert all(not set(t) & set(ENDS) for t, cut in zip(texts, truncated, strict=True) if cut)


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_a_prompt_is_read_once_for_all_its_samples(pair, monkeypatch, temperature):
    model, tokenizer = pair
    prompts = ["1>", "12+34>", "1+2>", "7>"]  # padded, in one batch and, by the limit, in batches that share a prompt
    sampled, caches = [], []
    prompt_cache = generation._prompt_cache
    for size in (1024, 5):
        monkeypatch.setattr(generation, "_MAX_SEQUENCES", size)
        for cached in (prompt_cache, lambda *args: {}):
            with monkeypatch.context() as patch:
                patch.setattr(
                    generation, "_prompt_cache", lambda *args, cached=cached: caches.append(cached(*args)) or caches[-1]
                )
                torch.manual_seed(0)
                sampled.append(sample(model, tokenizer, prompts, 8, 6, temperature).texts)
        assert sampled[-1] == sampled[-2]
    assert sum(bool(cache) for cache in caches) > 2
    if temperature is None:
        assert all(texts == [texts[0]] * 8 for texts in sampled[0])
        assert [texts[:1] for texts in sampled[0]] == sample(model, tokenizer, prompts, 1, 6, None).texts


def test_batches_hold_no_more_tokens_than_fit(pair):
    model, _ = pair
    ids = [[1] * 100] * 4096
    assert _batch_size(model, ids, list(range(4096)), 0, 28, 16) == 256  # 32,768 tokens of 128
    assert _batch_size(model, ids, list(range(4096)), 0, 65_000, 16) == 1
    assert _batch_size(model, [[1] * 5] * 4096, list(range(4096)), 0, 8, 16) == 1024


def test_conversations_go_through_the_template():
    model, tokenizer = parts()
    tokenizer.chat_template = TEMPLATE
    conversation = [{"role": "user", "content": "7>"}]
    assert encode(tokenizer, [conversation]) == encode(tokenizer, ["[7>]:"])
    completions = sample(model.eval(), tokenizer, [conversation] * 6, 2, 3, 1.0)
    assert [len(texts) for texts in completions.texts] == [2] * 6


def test_a_seeded_block_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        assert torch.equal(torch.rand(2), first)
