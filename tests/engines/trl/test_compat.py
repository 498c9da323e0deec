"""A contract test for each private name of TRL that is touched: what a new version breaks fails here by name."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils
from trl_case import BASE, make, parts, save_model, train

from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer, compat


@pytest.mark.parametrize("name", compat.CONTRACT)
def test_a_private_name_is_what_we_take_it_for(name):
    assert compat.breach(name) is None


def test_every_private_name_is_in_the_contract():
    touched = set(re.findall(r"(?:super\(\)|self|trainer|kind)\.(_[a-z]\w+)", Path(compat.__file__).read_text()))
    listed = {name.rpartition(".")[2] for name in compat.CONTRACT}
    made_by_init = set(compat.CONTRACT["GRPOTrainer.__init__"][1].split(", "))
    assert len(touched) > 10
    assert touched - listed - made_by_init == {"_ends_of_model"}  # ours


def imported(monkeypatch, trl):
    """The module as it is imported beside that version of TRL."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: trl)
    spec = importlib.util.spec_from_file_location("compat_again", compat.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["1.15.0", "1.16.0", "1.16.3"])
def test_a_tested_trl_is_imported_in_silence(monkeypatch, caplog, version):
    imported(monkeypatch, version)
    assert caplog.text == ""


@pytest.mark.parametrize("version", ["1.17.0", "1.18.0.dev0", "2.0.0"])
def test_a_newer_trl_that_keeps_the_contract_is_imported_with_a_warning(monkeypatch, caplog, version):
    module = imported(monkeypatch, version)
    (record,) = caplog.records
    assert f"tested up to trl 1.16, got trl {version}, which keeps" in record.getMessage()
    assert record.getMessage().endswith("pip install 'trl<1.17'")
    assert module.TrainerHooks


@pytest.mark.parametrize("version", ["0.29.1", "1.14.2"])
def test_an_older_trl_is_refused(monkeypatch, version):
    with pytest.raises(ImportError, match=rf"trl 1\.15 and newer, got trl {version}; pip install 'isentropic\[trl\]'"):
        imported(monkeypatch, version)


def scores(self, model, input_ids, attention_mask, logits_to_keep, everything, compute_entropy=False):
    """Takes an argument more."""


def counted(self, model, ids, attention_mask, logits_to_keep, compute_entropy=False):
    """Calls an argument by another name."""


BROKEN = {
    "renamed": ("_compute_loss", lambda self, model, batch: 0, "(self, model, batch), expected (self, model, inputs)"),
    "one more": ("_save_checkpoint", lambda self, model, trial, metrics=None: 0, "expected (self, model, trial)"),
    "one more without a default": ("_get_per_token_logps_and_entropies", scores, "logits_to_keep, everything, compute"),
    "another name": ("_get_per_token_logps_and_entropies", counted, "(self, model, ids, attention_mask, logits_to"),
    "a call that is gone": ("compute_loss", lambda self, model, inputs, **k: 0, "uses no _compute_loss, expected it"),
    "gone": ("_calculate_rewards", None, "_calculate_rewards is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_newer_trl_that_breaks_the_contract_is_refused(monkeypatch, case):
    name, function, says = BROKEN[case]
    if function is None:
        monkeypatch.delattr(GRPOTrainer, name)
    else:
        monkeypatch.setattr(GRPOTrainer, name, function)
    with pytest.raises(ImportError, match=re.escape(says)) as refused:
        imported(monkeypatch, "1.17.0")
    assert str(refused.value).startswith(
        f"isentropic.engines.trl is tested up to trl 1.16, got trl 1.17.0, in which GRPOTrainer.{name} "
    )
    assert str(refused.value).endswith("; pip install 'trl<1.17'")
    assert "\n" not in str(refused.value)


def test_every_hook_is_reached(tmp_path):
    """TRL calls each private step, and each reaches the method of ours."""
    seen = []

    class Spy(IsentropicTrainer):
        def rewards_calculated(self, *args):
            seen.append("rewards_calculated")
            return super().rewards_calculated(*args)

        def generate_batch(self, *args):
            seen.append("generate_batch")
            return super().generate_batch(*args)

        def score_tokens(self, *args, **kwargs):
            seen.append("score_tokens")
            return super().score_tokens(*args, **kwargs)

        def micro_batch_loss(self, *args):
            seen.append("micro_batch_loss")
            return super().micro_batch_loss(*args)

        def before_checkpoint(self):
            seen.append("before_checkpoint")
            super().before_checkpoint()

        def after_checkpoint(self, folder):
            seen.append("after_checkpoint")
            assert folder.is_dir()
            super().after_checkpoint(folder)

        def checkpoint_loaded(self, folder):
            seen.append("checkpoint_loaded")
            super().checkpoint_loaded(folder)

    settings = {"save_strategy": "steps", "save_steps": 4, "recipe": "loop"}
    train(Spy, IsentropicConfig, tmp_path, 4, **settings)
    again = make(Spy, IsentropicConfig, tmp_path, 8, **settings)
    again.train(resume_from_checkpoint=True)
    assert set(seen) == {
        "rewards_calculated",
        "generate_batch",
        "score_tokens",
        "micro_batch_loss",
        "before_checkpoint",
        "after_checkpoint",
        "checkpoint_loaded",
    }
    # A generated batch of four steps: its rewards, its score at sampling time, then a score a micro-batch.
    first = seen[: seen.index("before_checkpoint")]
    assert [first.count(name) for name in ("generate_batch", "rewards_calculated")] == [1, 1]
    assert first.count("score_tokens") == 1 + first.count("micro_batch_loss") == 5


def test_old_log_probs_are_scored_first_by_the_policy(tmp_path):
    """The entropies beside the old log-probs are of TRL's first scoring call: they are those of the same rows."""
    calls = []

    class Spy(IsentropicTrainer):
        def score_tokens(self, native, model, *args, **kwargs):
            scores = super().score_tokens(native, model, *args, **kwargs)
            calls.append((model is self.model, scores[0], scores[1]))
            return scores

        def generate_batch(self, native, inputs):
            calls.clear()
            output = super().generate_batch(native, inputs)
            old, entropies = output["old_per_token_logps"], output["old_entropies"]
            assert calls[0][0]
            assert calls[0][1] is old
            assert calls[0][2] is entropies
            return output

    train(Spy, IsentropicConfig, tmp_path, 2, recipe="loop")


def test_the_trainer_has_what_the_adapter_needs(tmp_path):
    trainer = make(IsentropicTrainer, IsentropicConfig, tmp_path, 2, recipe="loop")
    missing = {name for name in compat.Trainer.__annotations__ if not hasattr(trainer, name)}
    assert missing <= {"current_gradient_accumulation_steps"}  # known once training begins
    assert isinstance(compat.metrics(trainer), dict)
    assert compat.opens_batch(trainer)
    assert compat.tokenizer_of(trainer) is trainer.processing_class


def test_the_function_behind_trls_head_is_exchanged_and_restored():
    native = getattr(utils, compat.LOG_PROB_FUNCTION)
    with compat.log_prob_function("stand-in") as inner:
        assert inner is native
        assert getattr(utils, compat.LOG_PROB_FUNCTION) == "stand-in"
    assert getattr(utils, compat.LOG_PROB_FUNCTION) is native


def test_only_a_model_that_trl_has_prepared_has_its_head(tmp_path):
    model, _ = parts()
    assert not compat.replaceable_head(model)
    trainer = make(IsentropicTrainer, IsentropicConfig, tmp_path, 2, model=model, head="trl")
    assert compat.replaceable_head(trainer.accelerator.unwrap_model(trainer.model))


def test_ends_and_limits_reach_generation(tmp_path):
    trainer = make(IsentropicTrainer, IsentropicConfig, tmp_path, 2, recipe="loop")
    usual = list(trainer.eos_token_ids)
    compat.stop_at(trainer, [5])
    compat.limit_to(trainer, 3)
    assert trainer.eos_token_ids == [*usual, 5]
    assert trainer.generation_config.eos_token_id == [*usual, 5]
    assert trainer.generation_config.max_new_tokens == trainer.max_completion_length == 3
    compat.stop_at(trainer, [])
    assert trainer.eos_token_ids == usual


def test_the_model_generates_as_trl_has_it(tmp_path):
    trainer = make(IsentropicTrainer, IsentropicConfig, tmp_path, 2, recipe="loop")
    with compat.generating(trainer) as model:
        out = model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out.shape[0] == 1


def test_weights_alone_are_loaded(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "recipe": "loop"}
    done = train(IsentropicTrainer, IsentropicConfig, tmp_path, 4, **settings)
    fresh = make(IsentropicTrainer, IsentropicConfig, tmp_path, 4, **settings)
    compat.load_weights(fresh, str(tmp_path / "checkpoint-4"))
    for x, y in zip(done.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(x, y)
    assert fresh.state.global_step == 0
    assert BASE["num_generations"] == 8


def test_the_steps_of_a_subclass_that_are_checked_are_trls():
    assert {f"GRPOTrainer.{step}" for step in compat._STEPS} <= compat.CONTRACT.keys()
    assert compat.bypassed(GRPOTrainer, watched=False) is None
    assert compat.bypassed(IsentropicTrainer, watched=False) is None


@pytest.mark.parametrize("settings", [{}, {"epsilon": 0.1}, {"epsilon": 0.1, "epsilon_high": 0.3}])
def test_settings_that_are_applied_late_are_those_of_a_trainer_that_was_made_with_them(tmp_path, settings):
    settings = {"loss_type": "cispo", "scale_rewards": "none", "importance_sampling_level": "sequence", **settings}
    made, late = (make(GRPOTrainer, GRPOConfig, tmp_path, 4, **s) for s in (settings, {}))
    for name, value in settings.items():
        setattr(late.args, name, value)
    compat.apply_settings(late)
    differing = {
        name
        for name, value in vars(made).items()
        if isinstance(value, str | int | float | bool | None) and vars(late).get(name) != value
    }
    assert differing == set()


def test_a_model_knows_where_it_is_from(tmp_path):
    assert compat.model_id(parts()[0]) == ""
    path = save_model(tmp_path)
    assert compat.model_id(type(parts()[0]).from_pretrained(path)) == path


def test_the_tags_of_a_class_are_those_of_its_models(tmp_path):
    trainer = make(GRPOTrainer, GRPOConfig, tmp_path, 4)
    assert set(compat.tags_of(GRPOTrainer)) <= set(trainer.model.model_tags)
