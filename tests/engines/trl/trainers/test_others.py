"""Trainers of others that derive from TRL's: those that call its loss are controlled, the others are refused."""

from functools import partial

import pytest

pytest.importorskip("trl")
from by_hand import mean, plain_entropy, weights_of
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl_case import QUIET, VARIANT, VARIANTS, make

from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer, compat, control


class OneMoreTerm(GRPOTrainer):
    """The loss of TRL and a term on the weights, as TRL's documentation has it for another objective."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss + 1e-3 * sum(p.square().sum() for p in model.parameters())


class OwnAdvantages(GRPOTrainer):
    """Advantages of its own, and TRL's called by its name."""

    def _generate_and_score_completions(self, inputs):
        output = GRPOTrainer._generate_and_score_completions(self, inputs)
        output["advantages"] = output["advantages"].clamp(-1, 1)
        return output


class Packed(GRPOTrainer):
    """Any arguments, handed on."""

    def _compute_loss(self, *args, **kwargs):
        return super()._compute_loss(*args, **kwargs)


def conformal(out):
    """A trainer of the package trl-cgrpo, which draws fewer samples of the prompts that it has seen enough of."""
    cgrpo = pytest.importorskip("trl_cgrpo", reason="trl-cgrpo is not installed")
    rows = Dataset.from_list([{"prompt": f"{i + 10}>"} for i in range(16)])
    verifier = lambda completions, **row: [any(c.isdigit() for c in text) for text in completions]  # noqa: E731
    kind = partial(cgrpo.CGRPOTrainer, calibration_dataset=rows, verifier=verifier)
    settings = {"budget_grid": [2, 4, 8], "score": "first_success", "loss_type": "dapo", "delta": 0.9}
    return make(kind, cgrpo.CGRPOConfig, out, 4, **settings)


CALL_TRLS = {
    "a term more": lambda out: make(OneMoreTerm, GRPOConfig, out, 4),
    "its own advantages": lambda out: make(OwnAdvantages, GRPOConfig, out, 4),
    "any arguments": lambda out: make(Packed, GRPOConfig, out, 4),
    "trl-cgrpo": conformal,
}


@pytest.mark.parametrize("name", CALL_TRLS)
def test_a_trainer_that_calls_trls_loss_is_controlled(tmp_path, name):
    trainer = CALL_TRLS[name](tmp_path)
    kind = type(trainer)
    control(trainer, target="60%", **QUIET, **VARIANTS.get(VARIANT, {}))
    assert isinstance(trainer, kind)
    start = weights_of(trainer)
    trainer.train()
    rows, first = trainer.record.rows("metrics"), trainer._buffered_inputs[0]
    assert len({row["knob/value"] for row in rows}) > 1
    trainer.model.load_state_dict(start)
    mask = first["completion_mask"]
    assert rows[0]["entropy/tokens"] == mask.sum()
    assert rows[0]["entropy/mean"] == pytest.approx(mean(plain_entropy(trainer.model, first), mask), abs=1e-5)
    if name == "trl-cgrpo":  # a row that was not drawn has no token
        batches = trainer._buffered_inputs
        assert 0 < sum(int((x["completion_mask"].sum(1) == 0).sum()) for x in batches) < 64


class OwnLoss(GRPOTrainer):
    """As ms-swift has it: ``_compute_loss`` is its own and takes other arguments, though ``compute_loss`` calls it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self._compute_loss(model, inputs, inputs["completion_mask"])

    def _compute_loss(self, model, model_inputs, batch, origin=None):
        return self._get_per_token_logps_and_entropies(model, model_inputs, batch)[0].sum()


class Copied(GRPOTrainer):
    """A loss of its own that is called as TRL's is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self._compute_loss(model, inputs)

    def _compute_loss(self, model, inputs):
        return model(inputs["completion_ids"]).logits.sum()


class OwnInputs(GRPOTrainer):
    def _prepare_inputs(self, generation_batch):
        return self._buffered_inputs[0]


@pytest.mark.parametrize(
    ("kind", "step"), [(OwnLoss, "_compute_loss"), (Copied, "_compute_loss"), (OwnInputs, "_prepare_inputs")]
)
@pytest.mark.parametrize("settings", [{"target": "60%"}, {"controller": "none"}])
def test_a_trainer_in_which_ours_are_not_reached_is_refused(tmp_path, kind, step, settings):
    says = rf"test_others's {kind.__name__}\.{step} replaces TRL's own.*: call super\(\)\.{step} in it, or train with"
    with pytest.raises(ValueError, match=says) as refused:
        control(make(kind, GRPOConfig, tmp_path, 4), **settings, **QUIET)
    assert "only monitor" not in str(refused.value)


def test_a_class_in_the_place_of_trls_is_refused(tmp_path, monkeypatch):
    """As Unsloth has it: ``trl.GRPOTrainer`` is a class with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs["completion_ids"]).logits.sum()

    made = make(GRPOTrainer, GRPOConfig, tmp_path, 4)
    monkeypatch.setattr(GRPOTrainer, "compute_loss", compute_loss)
    with pytest.raises(ValueError, match=r"^GRPOTrainer\.compute_loss replaces TRL's own"):
        control(made, target="60%", **QUIET)
    with pytest.raises(ValueError, match=r"^GRPOTrainer\.compute_loss replaces TRL's own"):
        make(IsentropicTrainer, IsentropicConfig, tmp_path, 4, controller="none")
    assert compat.bypassed(IsentropicTrainer, watched=True) == "GRPOTrainer.compute_loss"
