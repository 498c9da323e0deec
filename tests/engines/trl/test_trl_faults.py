"""What went wrong in the field: heads without predictions, KL penalties, rewards that are no numbers, lengths."""

import logging
import math

import pytest

pytest.importorskip("trl")
from trl_case import VARIANT, parts, same, train, weights

from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
from isentropic.engines.trl import head as head_module
from isentropic.engines.trl.settings import check_context


def trained(out, steps=8, **settings):
    return train(IsentropicTrainer, IsentropicConfig, out, steps, **settings)


@pytest.mark.parametrize("settings", [{"head": "trl"}, {"explain_every": 2}, {"explain_every": 10}], ids=str)
def test_the_default_recipe_trains_where_few_readings_carry_a_prediction(tmp_path, settings):
    trainer = trained(tmp_path, 12, recipe="isentropic", target="2.0", **settings)
    rows = trainer.record.rows("metrics")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert len({row["knob/value"] for row in rows}) > 2


def test_the_default_recipe_trains_with_a_trained_adapter_head(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = trained(tmp_path, 8, recipe="isentropic", target="2.0", peft_config=lora)
    assert not trainer.explainer.fused
    assert all(math.isfinite(row["entropy/mean"]) for row in trainer.record.rows("metrics"))


def test_a_head_that_cannot_be_replaced_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(head_module, "replaceable_head", lambda model: False)
    trainer = trained(tmp_path, 8, recipe="isentropic", target="2.0")
    assert "_isentropic_head" not in trainer.model.__dict__
    assert len(trainer.record.rows("metrics")) == 8


@pytest.mark.skipif(VARIANT != "", reason="about the fused head, at every step")
def test_every_device_check_that_answers_cuda_takes_the_same_path(tmp_path, monkeypatch):
    """The fused head is installed, every step is explained, and training is that of the CPU bit for bit."""
    plain = trained(tmp_path / "cpu", 8, recipe="isentropic", target="2.0")
    asked = []
    monkeypatch.setattr(head_module, "device_type", lambda x: asked.append(x.shape) or "cuda")
    cuda = trained(tmp_path / "cuda", 8, recipe="isentropic", target="2.0")
    assert asked
    assert cuda.explainer.fused
    assert cuda.explainer.every == 1
    assert same(weights(plain), weights(cuda))


@pytest.mark.parametrize("steps_per_generation", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [{"controller": "none", "head": "trl"}, {"controller": "none"}, {"recipe": "dapo"}, {"knob": "beta"}],
    ids=str,
)
def test_a_kl_penalty_trains(tmp_path, settings, steps_per_generation):
    """The reference model is scored too: with one step a batch, first and alone. Its head gives no entropies."""
    model, tokenizer = parts()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    case = {"beta": 0.04, "steps_per_generation": steps_per_generation, "model": str(tmp_path / "base")}
    trainer = trained(tmp_path / "run", 4, **case, **settings)
    assert any("kl" in row for row in trainer.state.log_history)
    rows = trainer.record.rows("metrics")
    assert all(row["entropy/mean"] > 0 for row in rows)
    # Old entropies are those of the policy: the reference model's would break Theorem 2's comparison.
    if steps_per_generation == 4 and settings.get("recipe") == "dapo":
        assert rows[0]["theorem2/violated_frac"] == 0


def test_infinite_rewards_count_as_unscored(tmp_path, caplog):
    def rewards(completions, **columns):
        return [math.inf if i % 8 == 0 else -math.inf if i % 8 == 1 else float(i % 3) for i in range(len(completions))]

    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, 8, recipe="loop", reward=rewards)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    rows = trainer.record.rows("metrics")
    assert rows[0]["reward/unscored"] == 16
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert caplog.text.count("completions are not scored, the first with an infinite reward") == 1


def test_an_unscored_completion_is_logged_as_null(tmp_path):
    def rewards(completions, **columns):
        return [None if i % 8 == 0 else float(i % 3) for i in range(len(completions))]

    trainer = trained(tmp_path, 4, recipe="grpo", reward=rewards, samples_logged=64)
    kept = [row["reward"] for row in trainer.record.rows("samples")]
    assert kept.count(None) > 0
    assert trainer.record.rows("metrics")[0]["reward/unscored"] == 8


def test_rewards_that_are_no_numbers_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"the rewards of a batch cannot be read: .* returns a number"):
        trained(tmp_path, 4, recipe="grpo", reward=lambda completions, **columns: ["good"] * len(completions))


def test_a_batch_that_is_wholly_masked_names_the_setting(tmp_path):
    # Neither an end of sequence nor padding is ever sampled: every completion is cut.
    cut = {"mask_truncated_completions": True, "generation_kwargs": {"suppress_tokens": [0, 1]}}
    with pytest.raises(ValueError, match=r"the first entropy reading is refused: .*mask_truncated_completions"):
        trained(tmp_path, 4, recipe="dapo", knob="zeta", target="80%", **cut)


def test_prompts_beyond_the_context_are_refused(tmp_path, caplog):
    model, _ = parts()
    check_context(model, 40, 24)
    assert not caplog.records
    check_context(model, 41, 24)
    check_context(model, 42, 24)
    assert ["max_completion_length=24 after a prompt exceeds" in r.getMessage() for r in caplog.records] == [True]
    with pytest.raises(ValueError, match=r"a prompt of 64 tokens fills the model's context of 64 tokens"):
        check_context(model, 64, 24)
    model.config.max_position_embeddings = 2
    with pytest.raises(ValueError, match="fills the model's context of 2 tokens"):
        train(IsentropicTrainer, IsentropicConfig, tmp_path, model=model, recipe="grpo", steps=4)


def test_the_two_betas_are_told_apart(tmp_path):
    """Our knob beta is REPO's; TRL's field beta weighs its KL penalty. Both may be on."""
    model, tokenizer = parts()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = trained(
        tmp_path / "run", 4, recipe="loop", knob="beta", target="4.5", beta=0.02, model=str(tmp_path / "base"),
        recipe_options={"every": 1},
    )  # fmt: skip
    assert trainer.beta == 0.02
    assert trainer.record.rows("metrics")[-1]["knob/value"] > 0
