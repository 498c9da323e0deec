"""vLLM's importance-sampling corrections, in each mode of TRL's: a stand-in for vLLM samples, and TRL corrects."""

import json

import pytest
import torch

pytest.importorskip("trl")
from by_hand import mean, plain_entropy, weights_of
from trl import GRPOConfig, GRPOTrainer
from trl_case import QUIET, VARIANT, VARIANTS, make

from isentropic.engines.trl import compat, control
from isentropic.engines.trl.audit import audit_trainer

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LOW, HIGH = 0.8, 1.3


class Sampler:
    """In the place of vLLM: draws from the trainer's policy, and gives log-probs that are off by some noise."""

    def __init__(self, trainer, noise):
        self.trainer, self.noise = trainer, noise
        self.random = torch.Generator().manual_seed(3)

    def sync_weights(self):
        """The policy itself is sampled."""

    def generate(self, prompts, images, num_generations, profiler):
        trainer, ids = self.trainer, torch.tensor(prompts)  # of one length
        end = trainer.eos_token_ids
        out = trainer.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, eos_token_id=end, pad_token_id=0,
            max_new_tokens=trainer.max_completion_length, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        rows = torch.stack(out.logits, 1).log_softmax(-1)
        drawn = out.sequences[:, ids.shape[1] :]
        logp = rows.gather(2, drawn[:, :, None])[:, :, 0]
        logp = logp + self.noise * torch.randn(logp.shape, generator=self.random)
        lengths = [next((i + 1 for i, token in enumerate(row) if token in end), len(row)) for row in drawn.tolist()]
        cut = [(row[:n], values[:n]) for row, values, n in zip(drawn.tolist(), logp.tolist(), lengths, strict=True)]
        return None, [row for row, _ in cut], [[[value] for value in values] for _, values in cut], None


def sampled(out, noise=0.3, **settings):
    """A GRPOTrainer as it is with vLLM."""
    bounds = {"vllm_importance_sampling_clip_min": LOW, "vllm_importance_sampling_clip_max": HIGH}
    trainer = make(GRPOTrainer, GRPOConfig, out, 4, **bounds, **settings)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Sampler(trainer, noise), -1
    del trainer.generation_config, trainer.generation_kwargs
    return trainer


def corrected(old, sampling, mask, mode):
    """The ratio of trainer to sampler as TRL's documentation has it, by hand."""
    difference = torch.where(mask.bool(), old - sampling, 0.0)
    ratio = (difference.sum(1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(LOW, HIGH)
    return torch.where((ratio < LOW) | (ratio > HIGH), 0.0, ratio)


@pytest.mark.parametrize("recipe", ["repo-r-loop", "dcpo"])
@pytest.mark.parametrize("mode", MODES)
def test_a_correction_multiplies_the_loss_that_we_rewrote_and_the_reading_ignores_it(tmp_path, mode, recipe):
    trainer = sampled(tmp_path, vllm_importance_sampling_mode=mode, epsilon_high=None)
    control(trainer, recipe=recipe, **QUIET, **VARIANTS.get(VARIANT, {}))
    start = weights_of(trainer)
    assert compat.bypassed(type(trainer), watched=False) is None
    trainer.train()
    rows = trainer.record.rows("metrics")
    first, later = trainer._buffered_inputs[0], trainer._buffered_inputs[1]
    mask, ratio = first["completion_mask"], first["importance_sampling_ratio"]
    expected = corrected(first["old_per_token_logps"], first["sampling_per_token_logps"], mask, mode)
    torch.testing.assert_close(ratio, expected)
    assert ratio.shape == (16, 1 if mode.startswith("sequence") else mask.shape[1])
    removed = ((ratio == 0).expand_as(mask) * mask).sum() / mask.sum()
    assert (0.05 < removed < 0.95) == mode.endswith("mask")

    trainer.model.train()
    trainer.use_vllm = False
    uncorrected = trainer._compute_loss(trainer.model, dict(later)).item()
    trainer.use_vllm = True
    factor = torch.ones_like(later["importance_sampling_ratio"]).requires_grad_()
    loss = trainer._compute_loss(trainer.model, {**later, "importance_sampling_ratio": factor})
    assert loss.item() == pytest.approx(uncorrected, abs=1e-6)
    (of_each,) = torch.autograd.grad(loss, factor)
    assert of_each.abs().max() > 1e-4
    loss = trainer._compute_loss(trainer.model, later)
    assert loss.item() == pytest.approx((of_each * later["importance_sampling_ratio"]).sum().item(), abs=1e-6)

    # The first step's reading: every token that was generated, by the weights of the start.
    trainer.model.load_state_dict(start)
    assert rows[0]["entropy/tokens"] == mask.sum()
    assert rows[0]["entropy/mean"] == pytest.approx(mean(plain_entropy(trainer.model, first), mask), abs=1e-5)
    assert rows[0]["clip/dropped_frac"] == pytest.approx(removed.item(), abs=1e-6)
    assert rows[0]["mismatch/kl"] > 0
    assert len(rows) == 4


@pytest.mark.parametrize(("noise", "codes"), [(0.0, set()), (0.3, {"sampler_mismatch"})])
def test_the_audit_finds_a_sampler_that_is_off_and_nothing_else(tmp_path, noise, codes):
    trainer = control(sampled(tmp_path, noise), target="60%", report=False, **VARIANTS.get(VARIANT, {}))
    assert {finding.code for finding in audit_trainer(trainer).findings} == codes
    trainer.train()
    found = json.loads((tmp_path / "audit.json").read_text())["findings"]
    assert {finding["code"] for finding in found} == codes
    assert len({row["knob/value"] for row in trainer.record.rows("metrics")}) > 1
