"""The fused head in TRL's place: same outputs and gradients, the moments beside them, and no head it does not know."""

import inspect

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head
from trl_case import VARIANT, make, parts, save_model, train

from isentropic.engines.trl.head import install, last_stats
from isentropic.entropy.statistics import logits_stats

pytestmark = pytest.mark.skipif(VARIANT == "fixed", reason="about the fused head, which this variant has not")
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs")


def batch(vocab=40):
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (3, 9), generator=gen)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    return ids, labels


def tiny(kind):
    import transformers

    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    more = {"Gemma2": {"final_logit_softcapping": 3.0}, "Granite": {"logits_scaling": 4.0}, "Qwen3": {}}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **more.get(kind, {}))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 20
    return model


def scored(model, outputs):
    """The fields TRL returns, and the gradients of a loss on them."""
    ids, labels = batch()
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
    model.zero_grad()
    (out.log_probs.sum() + 0.3 * out.entropy.sum()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [getattr(out, name) for name in outputs], grads


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma2", "Granite", "Cohere"])
def test_outputs_and_gradients_are_trls(kind):
    model = tiny(kind)
    add_fused_lm_head(model, temperature=0.8, outputs=OUTPUTS)
    want, wanted = scored(model, OUTPUTS)
    assert install(model)
    got, grads = scored(model, OUTPUTS)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert grads.keys() == wanted.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_the_moments_of_the_last_call_can_be_read_once():
    model = tiny("Qwen3")
    add_fused_lm_head(model, temperature=0.8, outputs=OUTPUTS)
    assert last_stats(model) is None
    assert install(model)
    scored(model, OUTPUTS)
    ids, labels = batch()
    logits = model(input_ids=ids).logits[:, :-1]
    want, inside = logits_stats(logits.detach(), ids[:, 1:], 0.8), labels[:, 1:] != -100
    stats = last_stats(model)
    for a, b in zip(stats, want, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a[inside], b[inside], rtol=1e-5, atol=1e-5)
        assert (a[~inside] == 0).all()
    assert last_stats(model) is None


def test_what_this_head_cannot_return_comes_from_trl():
    model = tiny("Qwen3")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    want, _ = scored(model, ("log_probs", "is_top1"))
    assert install(model)
    got, _ = scored(model, ("log_probs", "is_top1"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert last_stats(model) is None


def test_no_scored_position_is_a_differentiable_zero():
    model = tiny("Qwen3")
    add_fused_lm_head(model, outputs=OUTPUTS)
    assert install(model)
    ids, labels = batch()
    out = model(input_ids=ids, labels=torch.full_like(labels, -100), fused_lm_head=True)
    out.log_probs.sum().backward()
    assert (out.entropy == 0).all()
    assert (model.lm_head.weight.grad == 0).all()


def test_other_calls_and_other_models_are_untouched():
    model, other = tiny("Qwen3"), tiny("Qwen3")
    add_fused_lm_head(model, outputs=OUTPUTS)
    add_fused_lm_head(other, outputs=OUTPUTS)
    before, signature = model(input_ids=batch()[0]).logits, inspect.signature(model.forward)
    assert install(model)
    assert install(model)  # a second time changes nothing
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(input_ids=batch()[0]).logits, before)
    scored(other, OUTPUTS)
    assert last_stats(other) is None


def test_unknown_heads_are_left_to_trl():
    class Pruned(torch.nn.Linear):
        pass

    model = tiny("Qwen3")
    assert not install(model)  # TRL's own head is not there
    add_fused_lm_head(model, outputs=OUTPUTS)
    model.set_output_embeddings(Pruned(16, 40))
    forward = model.forward
    assert not install(model)
    assert model.forward == forward
    assert not install(torch.nn.Linear(2, 2))


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1}, {"peft_config": True}], ids=["plain", "reference", "lora"])
def test_a_training_run_is_trls_up_to_rounding(tmp_path, settings):
    settings = {**settings, "model": save_model(tmp_path / "model")}
    if "peft_config" in settings:
        settings["peft_config"] = lora()

    class Ours(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            assert install(self)

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            stats = last_stats(self)
            assert stats.sum_p2[:, -inputs["completion_ids"].shape[1] :].shape == inputs["completion_mask"].shape
            return loss

    runs = [train(kind, GRPOConfig, tmp_path, steps=4, **settings) for kind in (GRPOTrainer, Ours)]
    rows = [[row for row in run.state.log_history if "loss" in row] for run in runs]
    assert len(rows[0]) == 4
    for a, b in zip(*rows, strict=True):
        assert b["entropy"] == pytest.approx(a["entropy"], rel=1e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-2)


def test_a_trainer_with_an_unknown_head_keeps_trls(tmp_path):
    class Pruned(torch.nn.Linear):
        pass

    model, _ = parts()
    model.lm_head.__class__ = Pruned
    trainer = make(GRPOTrainer, GRPOConfig, tmp_path, model=model)
    assert not install(trainer)
    assert last_stats(trainer) is None
