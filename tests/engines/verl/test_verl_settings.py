"""verl's settings around its loss: packing, dynamic batches, epochs, KL, rollout correction, an older sampler."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

try:
    version("verl")  # not by import: this directory would be found as a package of that name
except PackageNotFoundError:
    pytest.skip("verl has an environment of its own: make test-verl", allow_module_level=True)

from test_verl_recipes import ROWS, Case
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from isentropic.engines.verl.control import Control
from isentropic.engines.verl.engine import PolicyLoss
from isentropic.recipes import compose

HERE = Path(__file__).parent
ZETA, LOW, HIGH = 0.3, 0.2, 0.28
TOKENS = 20  # that the policy generated in a Case

# verl's loss on one micro-batch.


def token_weights(d, mask, upper, lower=None):
    """Importance weights e^d by token, capped, or 0 outside of two bounds."""
    weights = d.exp() * mask
    return weights.clamp(max=upper) if lower is None else weights * ((weights >= lower) & (weights <= upper))


def sequence_weights(d, mask, upper, lower=None):
    return token_weights((d * mask).sum(1, keepdim=True).expand(d.shape), mask, upper, lower)


CORRECTIONS = {
    "token, truncated": ({"rollout_is": "token", "rollout_is_threshold": 1.2}, token_weights, (1.2,)),
    "token, masked": ({"rollout_is": "token", "rollout_is_threshold": "0.8_1.25"}, token_weights, (1.25, 0.8)),
    "sequence, truncated": ({"rollout_is": "sequence", "rollout_is_threshold": 1.5}, sequence_weights, (1.5,)),
    "sequence, masked": ({"rollout_is": "sequence", "rollout_is_threshold": "0.6_1.6"}, sequence_weights, (1.6, 0.6)),
}
REJECTIONS = {
    "token": {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.8_1.25"},
    "sequence": {"rollout_rs": "seq_mean_k3", "rollout_rs_threshold": 0.05},
}


class Corrected(Case):
    """The answers of a Case, whose sampler is off by 0.3 nats."""

    def __init__(self, options, kl=False):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.d = 0.3 * torch.randn(self.mask.shape, generator=generator)
        self.reference = self.old[0] + 0.4 * torch.randn(self.mask.shape, generator=generator)
        sampler, self.kept, self.weights = self.old[0] - self.d, self.mask, torch.ones(self.mask.shape)
        self.data["rollout_log_probs"], self.data["loss_mask"] = sampler, self.mask
        if kl:
            self.data["ref_log_prob"] = self.reference
        if options:
            weights, self.kept, _ = compute_rollout_correction_and_rejection_mask(
                self.old[0], sampler, self.mask, **options
            )
            self.data["response_mask"] = self.kept
            if weights is not None:
                self.weights = self.data["rollout_is_weights"] = weights.batch["rollout_is_weights"]

    def loss(self, control, actor):
        logp, entropy = self.stats(self.logits)
        output = {"log_probs": self.packed(logp), "entropy": self.packed(entropy)}
        native = partial(ppo_loss, config=actor)
        return (control.wrap(native) if control else native)(model_output=output, data=self.data)[0]

    def by_hand(self, zeta):
        """Gradient by the logits of the clipped loss of A' = A − ζ·|A|·L, and the entropy change that it predicts."""
        logp, entropy = self.stats(self.logits)
        still, row = logp.detach(), entropy.detach()
        shaped = self.adv - zeta * self.adv.abs() * (still + row)
        shaped = torch.where(self.adv > 0, shaped.clamp(min=0), shaped.clamp(max=0))
        ratio = (logp - self.old[0]).exp()
        best = torch.minimum(ratio * shaped, ratio.clamp(1 - LOW, 1 + HIGH) * shaped)
        loss = -(self.weights * best * self.kept).sum() / TOKENS
        by_logits, by_logp = torch.autograd.grad(loss, [self.logits, logp])
        return by_logits, (by_logp * still.exp() * (still + row)).sum().item()


def actor_of(recipe, **settings):
    return ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=ROWS,
        clip_ratio_c=1e6,
        clip_ratio_low=LOW,
        clip_ratio_high=HIGH,
        policy_loss=PolicyLoss(recipe=recipe),
        **settings,
    )


def held_at(zeta, objective="clipped"):
    recipe = compose("isentropic", objective=objective, bounds="additive", clip_low=LOW, clip_high=HIGH)
    control = Control(recipe)
    state = control.loop.state
    control.loop.state = state._replace(controller=state.controller._replace(value=zeta))
    return control


@pytest.mark.parametrize("name", CORRECTIONS)
def test_verls_weights_are_those_that_these_tests_know(name):
    options, by_hand, bounds = CORRECTIONS[name]
    case = Corrected(options)
    torch.testing.assert_close(case.weights, by_hand(case.d, case.mask, *bounds))
    assert len(case.weights[case.mask.bool()].unique()) > 2
    assert (case.weights[case.mask.bool()] == 0).any() == ("masked" in name)


@pytest.mark.parametrize("name", [*CORRECTIONS, *REJECTIONS])
def test_the_correction_weighs_the_rewritten_advantages_and_the_prediction(name):
    options = CORRECTIONS[name][0] if name in CORRECTIONS else REJECTIONS[name]
    case, control = Corrected(options), held_at(ZETA)
    wanted, predicted = case.by_hand(ZETA)
    plain, uncorrected = Corrected({}).by_hand(ZETA)
    assert not torch.allclose(wanted, plain, rtol=1e-2)
    assert predicted != pytest.approx(uncorrected, rel=1e-2)
    got = torch.autograd.grad(case.loss(control, actor_of("isentropic")), case.logits)[0]
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-7)
    # The reading is of the trainer's policy, over all tokens that were generated, whatever their weight.
    sums = control.loop.reduced(lambda vector: vector)
    entropy = (case.stats(case.logits)[1] * case.mask).sum().item()
    assert (sums.of_tokens.entropy, sums.of_tokens.tokens) == pytest.approx((entropy, TOKENS), rel=1e-6)
    assert sums.change == pytest.approx(predicted, rel=1e-4)
    step = 1e-3
    slope = (case.by_hand(ZETA + step)[1] - case.by_hand(ZETA - step)[1]) / (2 * step)
    assert sums.gain == pytest.approx(slope, rel=1e-2)
    ratio = (case.stats(case.logits)[0] - case.old[0]).exp()
    clipped = torch.where(case.adv > 0, ratio > 1 + HIGH, ratio < 1 - LOW)
    dropped = (clipped & case.kept.bool()) | ((case.weights == 0) & case.mask.bool())
    assert sums.off_policy.dropped == dropped.sum().item()
    assert sums.of_answers.num == ROWS


@pytest.mark.parametrize("kind", ["kl", "low_var_kl"])
@pytest.mark.parametrize("name", [None, "token, truncated"], ids=str)
def test_verls_kl_loss_is_beside_the_rewritten_advantages(kind, name):
    options = CORRECTIONS[name][0] if name else {}
    case, control = Corrected(options, kl=True), held_at(ZETA)
    actor = actor_of("isentropic", use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type=kind)
    got = torch.autograd.grad(case.loss(control, actor), case.logits)[0]
    behind = case.reference - case.stats(case.logits)[0]
    cost = behind.exp() - behind - 1 if kind == "low_var_kl" else -behind
    penalty = torch.autograd.grad(0.1 * (cost * case.mask).sum() / TOKENS, case.logits)[0]
    wanted, predicted = case.by_hand(ZETA)
    assert penalty.abs().max() > 1e-3
    torch.testing.assert_close(got, wanted + penalty, rtol=2e-4, atol=2e-7)
    assert control.loop.reduced(lambda vector: vector).change == pytest.approx(predicted, rel=1e-4)


def test_an_objective_that_verl_lacks_is_corrected_too():
    """The general path: without a clip or a shaping that matters, the gradient is that of Σ w·r·A."""
    case, control = Corrected(CORRECTIONS["token, masked"][0]), Control(compose("gspo", clip_low=0.9, clip_high=9.0))
    logp, _ = case.stats(case.logits)
    ratio = (((logp - case.old[0]) * case.mask).sum(1) / case.mask.sum(1)).exp()
    share = case.mask / case.mask.sum(1, keepdim=True)
    by_token = ratio.detach()[:, None] * case.adv * case.weights * share
    wanted = torch.autograd.grad(-(by_token * logp).sum() / ROWS, case.logits)[0]
    actor = actor_of("gspo", loss_agg_mode="seq-mean-token-mean")
    got = torch.autograd.grad(case.loss(control, actor), case.logits)[0]
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-7)


@pytest.mark.parametrize("name", [None, *CORRECTIONS, *REJECTIONS], ids=str)
@pytest.mark.parametrize("kl", [False, True])
def test_without_control_the_loss_is_verls_bit_for_bit(name, kl):
    options = {} if name is None else CORRECTIONS[name][0] if name in CORRECTIONS else REJECTIONS[name]
    case = Corrected(options, kl)
    settings = {"use_kl_loss": kl, "kl_loss_coef": 0.1, "kl_loss_type": "low_var_kl"}
    wanted = case.loss(None, actor_of(None, **settings))
    monitor = Control(PolicyLoss().checked(actor_of(None)), monitors=True)
    for control, recipe in ((monitor, None), (held_at(0.0), "isentropic")):
        got = case.loss(control, actor_of(recipe, **settings))
        assert torch.equal(got, wanted)
        by_ours, by_verl = (torch.autograd.grad(x, case.logits, retain_graph=True)[0] for x in (got, wanted))
        assert torch.equal(by_ours, by_verl)


# verl's worker.

IS = {"rollout_is": "token", "rollout_is_threshold": 1.2}
SETTINGS = {
    "dynamic": {"tokens": 48},
    "kl": {"actor": {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "low_var_kl"}},
    "epochs": {"epochs": 2, "actor": {"ppo_epochs": 2}},
    "correction": {"noise": 0.3, "correction": IS},
    "rejection": {"noise": 0.3, "correction": {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.8_1.25"}},
    "one step off, bypass": {"ahead": "bypass"},
    "one step off, decoupled": {"ahead": "decoupled", "correction": IS},
}


@pytest.fixture(scope="module", params=[False, True], ids=["padded", "packed"])
def settings(request, tmp_path_factory):
    from trl_case import save_model

    out = tmp_path_factory.mktemp("settings")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", port]
    options = json.dumps({"packed": request.param, "settings": SETTINGS})
    command = [*launch, str(HERE / "settings_worker.py"), save_model(out / "model"), str(out), options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "settings.json").read_text())


def test_without_control_the_weights_are_verls_bit_for_bit(settings):
    assert list(settings) == list(SETTINGS)
    for name, result in settings.items():
        assert len(set(result["digests"].values())) == 1, name
    # Settings that only cut the batch in another way, or are about a second batch, leave about the same weights.
    assert len({settings[name]["digests"]["plain"] for name in ("kl", "epochs", "correction", "rejection")}) == 4


@pytest.mark.parametrize("name", SETTINGS)
def test_the_reading_and_the_prediction_of_a_first_step_by_hand(settings, name):
    for row, wanted in zip(settings[name]["rows"], settings[name]["expected"], strict=True):
        assert row["entropy/tokens"][0] == wanted["tokens"]
        assert row["entropy/mean"][0] == pytest.approx(wanted["entropy"], rel=1e-5)
        assert row["ratio/mean"][0] == pytest.approx(wanted["ratio"], rel=1e-4)
        assert row["predict/change"][0] == pytest.approx(wanted["predicted"], rel=2e-3)


def test_each_epoch_is_read_and_the_controller_acts_at_the_end_of_the_batch(settings):
    first, second = settings["epochs"]["rows"]
    assert first["policy/age"] == second["policy/age"] == [0, 1, 2, 3]
    assert first["entropy/tokens"] == 2 * first["entropy/tokens"][:2]
    assert len(set(first["entropy/mean"])) == 4
    assert set(first["knob/value"]) == {0.28}
    assert len(set(second["knob/value"])) == 1
    assert second["knob/value"][0] != 0.28


@pytest.mark.parametrize("mode", ["bypass", "decoupled"])
def test_a_batch_of_an_older_policy_says_its_age(settings, mode):
    """Two optimizer steps lie between the weights that sampled the second batch and those that train on it."""
    first, second = settings[f"one step off, {mode}"]["rows"]
    assert first["policy/age"] == [0, 1]
    assert second["policy/age"] == [2, 3]
    assert first["ratio/mean"][0] == pytest.approx(1, abs=1e-6)
    # Of the log-probs that verl scores anew, the ratio says nothing of the age.
    assert (abs(second["ratio/mean"][0] - 1) > 1e-4) == (mode == "bypass")
    assert settings["dynamic"]["rows"][1]["policy/age"] == [0, 1]
