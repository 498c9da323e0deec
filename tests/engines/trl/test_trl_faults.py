"""What went wrong in the field: heads without predictions, KL penalties, rewards that are no numbers, lengths."""

import logging
import math

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")
from trl import GRPOTrainer
from trl_case import VARIANT, make, parts, same, train, weights

from isentropic.engines.loop import EntropyReadingError
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


def broken_entropies(monkeypatch, wrong):
    """Break what the head returns as entropy: ``wrong(call, entropies)``, call by call of the loss."""
    native, calls = GRPOTrainer._get_per_token_logps_and_entropies, iter(range(10_000))

    def faulty(self, *args, **kwargs):
        logps, entropies, *more = native(self, *args, **kwargs)
        if kwargs.get("compute_entropy") and torch.is_grad_enabled():
            entropies = wrong(next(calls), entropies)
        return logps, entropies, *more

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", faulty)


def one_token(call, entropies):
    """The first token of the second sequence, in the second micro-batch of the second step."""
    here = torch.zeros_like(entropies, dtype=torch.bool)
    here[1, 0] = call == 3
    return torch.where(here, math.nan, entropies)


def behind_it(call, entropies):
    """The same token, broken so that no gradient comes back through it: 0·NaN is NaN."""
    factor = torch.ones_like(entropies)
    factor[1, 0] = math.nan if call == 3 else 1.0
    return entropies * factor


TERMS = {
    "bonus": {"recipe": "grpo", "recipe_options": {"entropy_coef": 0.01}},
    "bonus under control": {
        "recipe": "entropy-bonus-adaptive",
        "recipe_options": {"knob_start": 0.004},
        "target": "4.5",
    },
    "bonus of TRL": {"recipe": None, "entropy_coef": 0.01},
    "penalty": {"recipe": "grpo", "recipe_options": {"penalty": "aent", "penalty_coef": 0.01}},
    "repo_d": {"recipe": "repo-d-loop"},
    "repo_r": {"recipe": "isentropic", "target": "4.5"},
    "selection": {"recipe": "high-entropy"},
}


THROUGH_ENTROPIES = ("bonus", "bonus under control", "bonus of TRL")


@pytest.mark.parametrize(
    ("name", "wrong"), [*((name, one_token) for name in TERMS), *((name, behind_it) for name in THROUGH_ENTROPIES)]
)
def test_one_broken_entropy_never_reaches_the_weights(tmp_path, monkeypatch, name, wrong):
    broken_entropies(monkeypatch, wrong)
    trainer = make(
        IsentropicTrainer, IsentropicConfig, tmp_path, 4,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, steps_per_generation=4, **TERMS[name],
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    rows = trainer.record.rows("metrics")
    assert [row["entropy/refused"] for row in rows] == [0, 1, 0, 0]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not same(before, weights(trainer))


@pytest.mark.parametrize("name", ["bonus under control", "repo_d", "repo_r"])
def test_entropies_that_become_nan_end_the_run_with_a_checkpoint_and_finite_weights(tmp_path, monkeypatch, name):
    broken_entropies(monkeypatch, lambda call, entropies: entropies * (math.nan if call >= 4 else 1.0))
    settings = {**TERMS[name], "recipe_options": {**TERMS[name].get("recipe_options", {}), "every": 1}}
    trainer = make(IsentropicTrainer, IsentropicConfig, tmp_path, 40, **settings)
    with pytest.raises(EntropyReadingError, match="10 entropy readings in a row"):
        trainer.train()
    (step, folder), *more = trainer.record.checkpoints()
    assert (step, more) == (14, [])
    saved = load_file(folder / "model.safetensors")
    assert saved
    assert all(x.isfinite().all() for x in saved.values())
