"""What is generated depends on the caller's settings alone, whatever generation_config.json says; and contexts end."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
from task_cases import digits
from transformers import GenerationConfig

from isentropic.models.episodes import Sampling, play
from isentropic.models.generation import check_lengths, context_limit, encode, sample, without_settings
from isentropic.models.tiny import character_tokenizer

PROMPTS = ["1>", "12+34>", "7+7>"]
SETTINGS = {
    "use_cache": False,
    "cache_implementation": "static",
    "temperature": 0.1,
    "top_k": 2,
    "top_p": 0.2,
    "min_p": 0.5,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.05,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(10, 60)),
    "begin_suppress_tokens": list(range(10, 60)),
    "bad_words_ids": [[i] for i in range(10, 60)],
    "sequence_bias": [[[20], 50.0]],
    "min_new_tokens": 6,
    "max_length": 3,
    "exponential_decay_length_penalty": [0, 3.0],
    "forced_bos_token_id": 20,
    "forced_eos_token_id": 1,
    "num_beams": 3,
    "num_return_sequences": 2,
    "stop_strings": ["1", "+", "a"],
    "guidance_scale": 3.0,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "a_field_of_its_own": 1,
}
KINDS = ("qwen3", "llama")


def make(kind, **changes):
    """A tiny model that ends a line now and then, and its tokenizer."""
    tokenizer = character_tokenizer()
    names = {"qwen3": ("Qwen3Config", "Qwen3ForCausalLM"), "llama": ("LlamaConfig", "LlamaForCausalLM")}
    config, cls = (getattr(transformers, name) for name in names[kind])
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3}
    shape |= {"max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    return cls(config(**shape | changes)).eval(), tokenizer


def draws(model, tokenizer):
    """Answers, greedy and sampled, and episodes with their log-probs: everything that is generated."""
    torch.manual_seed(0)
    answers = [sample(model, tokenizer, PROMPTS, 3, 6, temperature) for temperature in (None, 1.0)]
    rows = digits().train(0)[:3] * 2
    episodes = [play(model, tokenizer, digits(), rows, Sampling(temperature)) for temperature in (0.0, 1.0)]
    return answers, [[(e.ids, e.mask, e.logp, e.done) for e in group] for group in episodes]


@pytest.fixture(scope="module", params=KINDS)
def plain(request):
    model, tokenizer = make(request.param)
    return request.param, draws(model, tokenizer)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_the_model_has_no_effect(plain, name):
    kind, expected = plain
    model, tokenizer = make(kind)
    config = model.generation_config
    setattr(config, name, SETTINGS[name])
    assert draws(model, tokenizer) == expected
    assert model.generation_config is config
    assert getattr(config, name) == SETTINGS[name]


def test_all_of_them_at_once_and_a_sampling_setting_in_the_model_config(plain):
    kind, expected = plain
    model, tokenizer = make(kind)
    for name, value in SETTINGS.items():
        setattr(model.generation_config, name, value)
    model.config.repetition_penalty = 3.0  # where old models had it; transformers refuses to generate from it
    assert draws(model, tokenizer) == expected


def test_end_tokens_are_still_those_of_the_model():
    model, tokenizer = make("qwen3")
    ends = tokenizer.convert_tokens_to_ids(list("0123456789ABCDEFGHIJabcdefghij"))
    model.generation_config.eos_token_id = [1, *ends]
    torch.manual_seed(0)
    completions = sample(model, tokenizer, PROMPTS, 20, 8)
    texts = [text for group in completions.texts for text in group]
    assert sum(text[-1:].isalnum() for text in texts) > 20
    assert not any(set(text[:-1]) & set("0123456789ABCDEFGHIJabcdefghij") for text in texts)


def test_the_callers_settings_of_episodes_act_and_some_are_refused():
    model, tokenizer = make("qwen3")
    rows = digits().train(0)[:2]
    only = tokenizer.convert_tokens_to_ids("5")
    sampling = Sampling(1.0, {"suppress_tokens": [i for i in range(len(tokenizer)) if i != only]})
    assert {a for e in play(model, tokenizer, digits(), rows, sampling) for a in e.actions} == {"55555"}
    for name in ("num_beams", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"got {name}, which an episode sets itself"):
            play(model, tokenizer, digits(), rows, Sampling(1.0, {name: 2}))


def test_the_config_of_a_wrapped_model_is_emptied_and_comes_back_after_an_error():
    inner, _ = make("llama")
    outer = torch.nn.Sequential(inner)
    outer.generation_config = GenerationConfig(num_beams=2)
    before = inner.generation_config, outer.generation_config
    with without_settings(outer):
        assert inner.generation_config.eos_token_id is None
        assert outer.generation_config.num_beams is None
    assert (inner.generation_config, outer.generation_config) == before
    with pytest.raises(ZeroDivisionError), without_settings(outer):
        _ = 1 / 0
    assert (inner.generation_config, outer.generation_config) == before


def test_an_adapter_samples_under_the_same_settings():
    peft = pytest.importorskip("peft")
    drawn = []
    for changes in ({}, {"repetition_penalty": 3.0, "use_cache": False}):
        model, tokenizer = make("llama")
        model.generation_config.update(**changes)
        config, lora = model.generation_config, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, lora).eval()
        drawn.append(draws(adapted, tokenizer))
        assert model.generation_config is config
        assert adapted.generation_config is config
    assert drawn[0] == drawn[1]


def test_prompts_beyond_the_context_are_refused_before_anything_is_generated(monkeypatch):
    model, tokenizer = make("qwen3", max_position_embeddings=16)
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: pytest.fail("it generated"))
    long = "1" * 16
    with pytest.raises(ValueError, match=r"prompt 2 of 2 has 16 tokens.* context is 16 .*; shorten the prompt"):
        sample(model, tokenizer, ["1>", long], 2, 4)
    with pytest.raises(ValueError, match="has 17 tokens"):
        encode(tokenizer, ["1" * 17], context_limit(model))
    rows = [{"prompt": "123? ", "turns": 1}]  # "123? 1 lines\n>": 14 tokens, and a line has five
    with pytest.raises(ValueError, match=r"has 14 tokens.*, too few for 5 more"):
        play(model, tokenizer, digits(), rows)
    assert encode(tokenizer, [long]) == [tokenizer(long)["input_ids"]]
    check_lengths([[1] * 15], 16)
    check_lengths([[1] * 15], None)
    check_lengths([], 16)


def test_a_completion_that_may_outgrow_the_context_warns():
    model, tokenizer = make("qwen3", max_position_embeddings=16)
    with pytest.warns(UserWarning, match=r"10 tokens and a completion of 7 exceed .* of 16 .*; allow 6 tokens"):
        sample(model, tokenizer, ["1" * 10], 1, 7)


def test_an_episode_is_cut_short_where_the_context_ends():
    # 12 tokens of prompt, then lines of 5 and replies of 11: the second line ends at 12 + 5 + 11 + 5 = 33.
    model, tokenizer = make("qwen3", max_position_embeddings=33)
    rows = [{"prompt": "5? ", "turns": 3}] * 4
    episodes = play(model, tokenizer, digits(), rows)
    assert all(len(e.prompt_ids) + len(e.ids) <= 33 and not e.done for e in episodes)
    whole, tokenizer = make("qwen3", max_position_embeddings=64)
    assert all(e.done for e in play(whole, tokenizer, digits(), rows))


def test_stretched_positions_count():
    def limit(**rope):
        return context_limit(make("llama", rope_parameters={"rope_theta": 1e4, **rope})[0])

    assert limit(rope_type="default") == 128
    assert limit(rope_type="linear", factor=4.0) == 512
    assert limit(rope_type="yarn", factor=4.0, original_max_position_embeddings=128) == 512
    assert limit(rope_type="yarn", factor=4.0, original_max_position_embeddings=32) == 128
    model, _ = make("llama")
    model.config.max_position_embeddings = -1
    assert context_limit(model) is None
