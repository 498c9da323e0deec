"""Ways in: a trainer that is already made, and a subclass; natural values; what is refused, by name."""

import pickle
from dataclasses import dataclass

import pytest

pytest.importorskip("trl")
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl_case import QUIET, VARIANT, VARIANTS, make, same, weights

from isentropic.control.controllers import Range, pi
from isentropic.engines.trl import EntropyControlMixin, IsentropicConfig, IsentropicTrainer, control
from isentropic.recipes import RECIPES, compose
from isentropic.runs.record import Record


@dataclass
class TheirConfig(GRPOConfig):
    mine: int = 7


class Their(GRPOTrainer):
    """Somebody's trainer: their own loss calls TRL's."""

    _tag_names = ["theirs"]  # noqa: RUF012
    seen = 0

    def _compute_loss(self, model, inputs):
        self.seen += 1
        return super()._compute_loss(model, inputs)


def plain(out, steps=8, trainer=GRPOTrainer, config=GRPOConfig, **settings):
    return make(trainer, config, out, steps, **settings)


def has_moved(out):
    rows = Record(out).rows("metrics")
    knobs = {row["knob/value"] for row in rows}
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["entropy/target"] == pytest.approx(0.6 * rows[0]["entropy/mean"])
    assert (out / "samples.jsonl").stat().st_size > 0
    assert len(knobs) > 1


def test_a_plain_trainer_gains_control_by_one_call(tmp_path):
    trainer = plain(tmp_path)
    assert control(trainer, target="60%") is trainer
    trainer.train()
    assert isinstance(trainer, IsentropicTrainer)
    has_moved(tmp_path)
    for name in ("run.json", "summary.json", "audit.json", "report.html"):
        assert (tmp_path / name).is_file(), name


def test_a_plain_script_gains_control_by_the_subclass(tmp_path):
    make(IsentropicTrainer, IsentropicConfig, tmp_path, 8, target="60%", audit=True, report=True).train()
    has_moved(tmp_path)
    for name in ("run.json", "summary.json", "audit.json", "report.html"):
        assert (tmp_path / name).is_file(), name


@pytest.mark.parametrize("settings", [{"target": "60%"}, {"recipe": "repo-r-loop"}, {"recipe": "gspo", "target": 1.0}])
def test_both_ways_in_are_one_run(tmp_path, settings):
    wrapped = control(plain(tmp_path / "a"), **settings, **QUIET, **VARIANTS.get(VARIANT, {}))
    wrapped.train()
    subclass = make(IsentropicTrainer, IsentropicConfig, tmp_path / "b", 8, **settings)
    subclass.train()
    assert same(weights(wrapped), weights(subclass))
    assert wrapped.recipe == subclass.recipe
    assert wrapped.model.model_tags == subclass.model.model_tags


def test_a_trainer_of_someone_else_keeps_its_class_its_config_and_its_tags(tmp_path):
    trainer = plain(tmp_path, trainer=Their, config=TheirConfig, save_strategy="steps", save_steps=8)
    control(trainer, target="60%", **QUIET).train()
    assert isinstance(trainer, Their)
    assert isinstance(trainer, EntropyControlMixin)
    assert trainer.seen == 8
    has_moved(tmp_path)
    assert {"theirs", "isentropic"} <= set(trainer.model.model_tags)
    loaded = pickle.loads(pickle.dumps(trainer.args))
    assert (type(loaded), loaded.mine, loaded.target) == (TheirConfig, 7, "60%")
    assert (tmp_path / "checkpoint-8" / "training_args.bin").is_file()


@pytest.mark.parametrize(
    ("settings", "target", "knob"),
    [
        ({"target": 0.8}, "0.8", "zeta"),
        ({"target": 1}, "1.0", "zeta"),
        ({"target": "80%"}, "80%", "zeta"),
        ({"controller": "pi"}, "auto", "zeta"),
        ({"recipe": compose("rloo", knob="beta", target="70%")}, "70%", "beta"),
        ({"recipe": "dapo", "target": "anneal:90%:70%"}, "anneal:90%:70%", "zeta"),
    ],
)
def test_natural_values_are_taken(tmp_path, settings, target, knob):
    on_policy = {"steps_per_generation": 1} if isinstance(settings.get("recipe"), type(RECIPES["rloo"])) else {}
    config = make(IsentropicTrainer, IsentropicConfig, tmp_path, 4, **settings, **on_policy)
    wrapped = control(plain(tmp_path, 4, **on_policy), **settings, **QUIET)
    for recipe in (config.recipe, wrapped.recipe):
        assert (recipe.target, recipe.knob) == (target, knob)


def test_a_controller_object_is_taken(tmp_path):
    trainer = control(plain(tmp_path, 4), controller=pi(Range(0.0, -1.0, 1.0)), target=1.0, **QUIET)
    trainer.train()
    assert trainer.recipe.knob == "zeta"
    assert set(trainer.loop.as_dict()["state"]["controller"]) == {"value", "integral"}


class OwnScore(GRPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs["completion_ids"]).logits.sum()


class OwnRollout(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        return {}


def replaced(out):
    trainer = plain(out)
    trainer._compute_loss = lambda model, inputs: model.lm_head.weight.sum()
    return trainer


REFUSED = {
    "rloo": (lambda out: plain(out, 4, RLOOTrainer, RLOOConfig, beta=0.0), "got RLOOTrainer; train with"),
    "no object": (lambda out: GRPOTrainer, "got the class GRPOTrainer"),
    "another trainer": (lambda out: Trainer(args=None, model=plain(out).model), "got Trainer; use GRPOTrainer"),
    "ours": (lambda out: make(IsentropicTrainer, IsentropicConfig, out), "got IsentropicTrainer, which is; set its"),
    "twice": (lambda out: control(plain(out), **QUIET), "not under control, got IsentropicTrainer"),
    "its own score": (lambda out: plain(out, 4, OwnScore), "OwnScore.compute_loss replaces TRL's own"),
    "its own rollout": (lambda out: plain(out, 4, OwnRollout), "OwnRollout._generate_and_score_completions replaces"),
    "its own loss": (lambda out: plain(out, 4, GMPOTrainer, GMPOConfig), "GMPOTrainer._compute_loss replaces"),
    "on the object": (replaced, "_compute_loss of this GRPOTrainer is replaced on the object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_wrapped_is_refused_in_one_line(tmp_path, name):
    made, says = REFUSED[name]
    with pytest.raises(ValueError, match=says) as refused:
        control(made(tmp_path), target="60%")
    assert "\n" not in str(refused.value)


def test_the_mixin_in_front_of_another_loss_is_refused_too(tmp_path):
    class Own(EntropyControlMixin, GMPOTrainer):
        pass

    @dataclass
    class Config(IsentropicConfig, GMPOConfig):
        pass

    with pytest.raises(ValueError, match=r"GMPOTrainer\._compute_loss replaces .* only monitor"):
        make(Own, Config, tmp_path, 4, target="60%", **QUIET)


def test_another_loss_can_be_monitored(tmp_path):
    wrapped = control(plain(tmp_path, 4, GMPOTrainer, GMPOConfig), controller="none", **QUIET)
    wrapped.train()
    assert len(wrapped.record.rows("metrics")) == 4
    assert "knob/value" not in wrapped.record.rows("metrics")[0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target": "99"}, "99"),
        ({"recipe": "nosuch"}, "recipe must be one of"),
        ({"recipe": "steer", "target": "60%"}, "target has no effect without a knob"),
        ({"target": "60%", "hed": "trl"}, r"a setting of control\(\) must be one of .* \(did you mean head"),
        ({"target": "60%", "report": "off"}, "report must be True or False, got 'off'"),
        ({"target": "60%", "audit": None}, "audit must be True or False, got None"),
        ({"target": "60%", "stop_above": 0.5}, "stop_above must be above 1, or 0 for never, got 0.5"),
    ],
)
def test_a_refusal_leaves_the_trainer_as_it_was(tmp_path, settings, says):
    trainer = plain(tmp_path, 4)
    before = dict(vars(trainer)), dict(vars(trainer.args))
    with pytest.raises(ValueError, match=says):
        control(trainer, **settings)
    assert (type(trainer), type(trainer.args)) == (GRPOTrainer, GRPOConfig)
    assert (vars(trainer), vars(trainer.args)) == before
    assert control(trainer, target="60%", **QUIET).recipe.target == "60%"
