"""Contracts with the installed TRL: identity where nothing is controlled, equality of losses, exact readings."""

import math

import pytest
import torch

pytest.importorskip("trl")
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_case import BASE, make, parts, same, share_of_digits, train, weights

from isentropic.engines.loop import EntropyReadingError
from isentropic.engines.trl import (
    EntropyControlMixin,
    IsentropicConfig,
    IsentropicTrainer,
    compat,
)
from isentropic.engines.trl.loss import deselected
from isentropic.engines.trl.settings import boundary, settings
from isentropic.recipes import RECIPES, knob_range, loss, select
from isentropic.recipes.stages import OBJECTIVES
from isentropic.runs.explain import explain, render
from isentropic.types import TokenBatch

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]


def controlled(out, steps=8, **settings):
    return make(IsentropicTrainer, IsentropicConfig, out, steps, **settings)


def trained(out, steps=8, **settings):
    trainer = controlled(out, steps, **settings)
    trainer.train()
    return trainer


def test_every_loss_type_that_trl_has_is_covered():
    import inspect
    import re

    source = inspect.getsource(GRPOTrainer._compute_loss)
    named = set(re.findall(r'"(\w+)"', " ".join(re.findall(r"self\.loss_type (?:==|in) ([^:]+):", source))))
    assert named == set(LOSS_TYPES)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_monitoring_leaves_training_bit_identical(tmp_path, loss_type):
    plain = train(GRPOTrainer, GRPOConfig, tmp_path / "a", loss_type=loss_type)
    watched = trained(tmp_path / "b", loss_type=loss_type, controller="none", head="trl")
    assert same(weights(plain), weights(watched))
    assert len(watched.record.rows("metrics")) == 8


def test_the_mixin_monitors_a_trainer_with_a_plain_config(tmp_path):
    class Own(EntropyControlMixin, GRPOTrainer):
        pass

    plain = train(GRPOTrainer, GRPOConfig, tmp_path / "a")
    own = train(Own, GRPOConfig, tmp_path / "b")
    assert same(weights(plain), weights(own))
    native = [row["entropy"] for row in own.state.log_history if "entropy" in row]
    ours = [row["entropy/mean"] for row in own.record.rows("metrics")]
    assert ours == pytest.approx(native, abs=1e-6)


def test_a_trainer_writes_the_header_that_its_readers_need(tmp_path):
    trainer = trained(tmp_path, 4, recipe="loop", knob="zeta", target="1.0", hub_token="secret")
    header = trainer.record.header()
    assert header["recipe"]["knob"] == "zeta"
    assert header["seed"] == trainer.args.seed
    known = {"steps": 4, "recipe": "loop", "learning_rate": 1e-3, "max_completion_length": 8}
    assert known.items() <= header["config"].items()
    assert "secret" not in (tmp_path / "run.json").read_text()
    assert "adam_epsilon" not in header["config"]  # as TRL has it
    assert "fell by" in (text := render(explain(trainer.record))) or "rose by" in text
    before = (tmp_path / "run.json").read_text()
    trained(tmp_path, 4, recipe="loop")
    assert (tmp_path / "run.json").read_text() == before


def _buffered(trainer, size=0.03):
    """After some steps and a nudge, so that ratios leave 1: a slice of the generation buffer."""
    trainer.train()
    torch.manual_seed(5)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += size * torch.randn_like(p)
    trainer.model.train()
    return trainer._buffered_inputs[1]


def _tokens(trainer, inputs):
    """What the core needs of a micro-batch, from TRL's own forward pass and from the model's plain logits."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    logp, entropy, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, attention, length, compute_entropy=True
    )
    position = (attention.cumsum(1) - 1).clamp(min=0)
    logits = trainer.model(input_ids=ids, attention_mask=attention, position_ids=position).logits
    rows = logits[:, -length - 1 : -1].float().log_softmax(-1)
    old, mask = inputs.get("old_per_token_logps"), inputs["completion_mask"]
    reward = inputs.get("rewards")
    return TokenBatch(logp, old, inputs["advantages"], mask, entropy, inputs.get("old_entropies"), rows, reward)


@pytest.mark.parametrize("name", RECIPES)
def test_one_step_has_the_gradient_of_our_loss(tmp_path, name):
    recipe = RECIPES[name]
    trainer = controlled(tmp_path, steps=4, recipe=name, steps_per_generation=1 if recipe.on_policy else 4)
    inputs = (trainer.train(), trainer._buffered_inputs[0])[1] if recipe.on_policy else _buffered(trainer)
    rows = trainer.record.rows("metrics")
    assert len(rows) == 4
    for key in ("entropy/mean", "ratio/mean", "clip/high_frac", "adv/mean", "loss", "grad_norm", "predict/change"):
        assert all(math.isfinite(row.get(key, 0.0)) for row in rows), key
    trainer.model.train()
    if trainer.loop.state is not None:  # away from where a knob does nothing
        knob = {"entropic": -0.5, "entrocraft": 1.0, "stare": 1.5, "aent": 0.1, "distribution-centric": 0.05}.get(
            name, trainer.loop.state.value
        )
        controller = trainer.loop.state.controller._replace(value=knob)
        trainer.loop.state = trainer.loop.state._replace(controller=controller)
    value = trainer.loop.value
    torch.manual_seed(7)
    native = trainer._compute_loss(trainer.model, inputs)
    theirs = torch.autograd.grad(native, list(trainer.model.parameters()))

    tokens = _tokens(trainer, inputs)
    torch.manual_seed(7)
    total, facts = loss(recipe, tokens, value, length=trainer.max_completion_length)
    steps = trainer.args.steps_per_generation
    ours = total.sum / (inputs["num_items_in_batch"] / steps if recipe.reduction == "token" else total.count)
    if not recipe.on_policy:
        assert (facts.ratio - 1).abs().max() > 0.1
        if OBJECTIVES[recipe.objective].clips and name != "cispo":  # whose ceiling of 5 no ratio reaches
            assert (facts.clipped_low | facts.clipped_high).any()
        if recipe.selection != "none":
            assert 0 < (select(recipe, tokens) * tokens.mask).sum() < tokens.mask.sum()
    # Beside reinforce, whose value is −A·log π where TRL's is −A, TRL's value is ours where the loss is TRL's own.
    if trainer.native and recipe.objective != "reinforce":
        assert ours.item() == pytest.approx(native.item(), abs=1e-6)
    for a, b in zip(torch.autograd.grad(ours, list(trainer.model.parameters())), theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * max(1.0, a.abs().max().item()))


@pytest.mark.parametrize("name", ["adapo", "repo-r-loop", "repo-d-gspo", "entropy-bonus-adaptive"])
def test_control_changes_training(tmp_path, name):
    base = {"adapo": "dapo", "repo-r-loop": "loop", "repo-d-gspo": "gspo", "entropy-bonus-adaptive": "grpo"}[name]
    options = {"knob_start": 0.1, "knob_low": 0.01, "knob_high": 1.0} if name == "adapo" else {}
    plain = trained(tmp_path / "a", recipe=base, learning_rate=1e-2)
    held = trained(tmp_path / "b", recipe=name, learning_rate=1e-2, target="4.5", recipe_options=options)
    assert not same(weights(plain), weights(held))
    assert held.record.rows("metrics")[-1]["knob/value"] != held.record.rows("metrics")[0]["knob/value"]


@pytest.mark.parametrize("name", ["entropic", "entrocraft", "mai", "stare", "aent"])
@pytest.mark.parametrize("target", [0.1, 4.5])
def test_knobs_move_towards_the_target(tmp_path, name, target):
    trainer = trained(tmp_path, 8, recipe=name, target=str(target), explain_every=0)
    values = [row["knob/value"] for row in trainer.record.rows("metrics")]
    span = knob_range(trainer.recipe)
    moved = (trainer.loop.state.value - values[0]) * span.sign
    assert moved > 0 if target == 4.5 else moved <= 0
    assert all(span.low <= value <= span.high for value in values)


@pytest.mark.parametrize(("steps", "epochs"), [(4, 3.0), (-1, 0.25)])
def test_a_target_over_the_whole_run_learns_its_length(tmp_path, steps, epochs):
    trainer = trained(tmp_path, steps, recipe="adapo", target="anneal:4.5:1.0", num_train_epochs=epochs)
    told = [row["entropy/target"] for row in trainer.record.rows("metrics")]
    assert len(told) == trainer.state.max_steps >= 4
    assert told == pytest.approx([4.5 - 3.5 * done / (len(told) - 1) for done in range(len(told))])


def test_a_schedule_turns_the_knob_by_the_clock(tmp_path):
    trainer = trained(tmp_path, 8, recipe="dynamic-clip", controller="schedule:shape=up_down:steps=8", explain_every=0)
    values = [row["knob/value"] for row in trainer.record.rows("metrics")]
    # The first reading measures the start; then from 0.28 to 1.12 in four updates, and down again.
    assert values == pytest.approx([0.28 + 0.84 * x / 4 for x in (0, 0, 1, 2, 3, 4, 3, 2)])


def test_random_selections_resume_bit_for_bit(tmp_path):
    settings = {
        "recipe": "clip-cov",
        "recipe_options": {"constants": {"cov_share": 0.2, "cov_low": 0.0}},
        "save_strategy": "steps",
        "save_steps": 4,
    }
    straight = trained(tmp_path / "straight", 12, **settings)
    trained(tmp_path / "halted", 8, **settings)
    again = controlled(tmp_path / "halted", 12, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "halted" / "checkpoint-8"))
    assert same(weights(straight), weights(again))
    other = trained(tmp_path / "other", 12, **{**settings, "recipe_options": {}})
    assert not same(weights(straight), weights(other))


@pytest.mark.parametrize("recipe", ["loop", "grpo"])
def test_the_reading_is_the_same_under_gradient_accumulation(tmp_path, recipe):
    whole = trained(tmp_path / "a", 1, recipe=recipe)
    parts = trained(
        tmp_path / "b",
        1,
        recipe=recipe,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        steps_per_generation=16,
    )
    a, b = whole.record.rows("metrics")[0], parts.record.rows("metrics")[0]
    for name in ("entropy/mean", "entropy/tokens", "cov/adv_logp", "adv/mean", "ratio/mean"):
        assert a[name] == pytest.approx(b[name], abs=1e-6)


@pytest.mark.parametrize("recipe", ["grpo", "dapo", "dr-grpo"])
def test_a_term_weighs_the_same_under_gradient_accumulation(tmp_path, recipe):
    """By sequence, by token and by the length limit: the gradient of four micro-batches is that of one."""
    seen = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    for size in (16, 4):
        options = {"entropy_coef": 1.0, "penalty": "aent", "penalty_coef": 0.5}
        trainer = controlled(
            tmp_path / str(size), 1, recipe=recipe, recipe_options=options, max_grad_norm=0.0,
            per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, steps_per_generation=64 // size,
        )  # fmt: skip
        trainer.add_callback(Keep())
        trainer.train()
    whole, parts = seen
    assert whole.abs().max() > 0.01
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_the_controller_acts_once_a_generated_batch_and_the_knob_waits_for_the_start(tmp_path):
    trainer = trained(tmp_path, 12, recipe="repo-r-loop", controller="sign_step:step=0.001", target="4.5")
    values = [row["knob/value"] for row in trainer.record.rows("metrics")]
    assert values == pytest.approx([0.001] * 4 + [0.002] * 4 + [0.003] * 4)
    initial = trained(tmp_path / "b", 12, recipe="repo-r-loop", recipe_options={"initial_readings": 5})
    rows = initial.record.rows("metrics")
    assert [row["entropy/target"] for row in rows[:4]] == [None] * 4
    start = sum(r["entropy/mean"] * r["entropy/tokens"] for r in rows[:5]) / sum(r["entropy/tokens"] for r in rows[:5])
    assert rows[5]["entropy/target"] == pytest.approx(start)
    assert rows[7]["knob/value"] == rows[0]["knob/value"]


def test_several_iterations_over_a_batch(tmp_path):
    trainer = controlled(tmp_path, 8, recipe="adapo", num_iterations=2, steps_per_generation=2, target="4.5")
    assert boundary(trainer.args) == 4
    trainer.train()
    values = [row["knob/value"] for row in trainer.record.rows("metrics")]
    assert values == pytest.approx([0.28] * 4 + [0.294] * 4)
    assert [row["policy/age"] for row in trainer.record.rows("metrics")] == [0, 1, 2, 3] * 2


def test_the_clip_bounds_reach_the_native_loss(tmp_path):
    trainer = trained(tmp_path, 8, recipe="adapo", target="4.5")
    assert trainer.epsilon_high == pytest.approx(0.28 * 1.05)
    assert trainer.epsilon_low == 0.2


def test_metrics_have_their_stable_names_in_trls_log_too(tmp_path):
    trainer = trained(tmp_path, 8, recipe="adapo", learning_rate=1e-2)
    logged = [row for row in trainer.state.log_history if "entropy/mean" in row]
    rows = trainer.record.rows("metrics")
    names = {"entropy/mean", "entropy/target", "entropy/error", "knob/value", "knob/saturated", "cov/adv_logp"}
    names |= {"clip/low_frac", "clip/high_frac", "clip/dropped_frac", "clip/entropy_share", "ratio/ess_frac"}
    assert [row["step"] for row in rows] == list(range(1, 9))
    for ours, theirs in zip(rows, logged, strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name])
        assert ours["clip/high_frac"] == pytest.approx(theirs["clip_ratio/high_mean"], abs=1e-6)
        assert ours["clip/low_frac"] == pytest.approx(theirs["clip_ratio/low_mean"], abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"])
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["clip/dropped_frac"] == pytest.approx(ours["clip/low_frac"] + ours["clip/high_frac"])
        assert (ours["clip/entropy_share"] > 0) == (ours["clip/dropped_frac"] > 0)
        assert not [name for name in ours if name.startswith("mismatch/")]  # this sampler gives no log-probs
    assert [row["policy/age"] for row in rows] == [row["policy/age"] for row in logged] == [0, 1, 2, 3] * 2
    assert rows[0]["ratio/ess_frac"] == pytest.approx(1.0)
    assert all(0 < row["ratio/ess_frac"] < 1 for row in rows[1:4])
    assert sum(row["clip/high_frac"] for row in rows) > 0
    samples = trainer.record.rows("samples")
    assert [s["step"] for s in samples] == [1, 1, 5, 5]
    assert all(len(s["tokens"]) == len(s["surprisal"]) == len(s["entropy"]) for s in samples)
    assert samples[0]["reward"] == pytest.approx(sum(c.isdigit() for c in samples[0]["completion"]) / 8)


def test_lora(tmp_path):
    from peft import LoraConfig

    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = controlled(tmp_path, 4, recipe="repo-r-loop", peft_config=peft_config)
    before = weights(trainer)
    trainer.train()
    moved = [name for name, p in weights(trainer).items() if not torch.equal(p, before[name])]
    assert moved
    assert all("lora" in name for name in moved)
    assert trainer.record.rows("metrics")[-1]["entropy/mean"] > 0


def episodes(out, monkeypatch, logprobs, **settings):
    """Trained by rollout_func with env_mask: half of every completion is the environment's."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollout(prompts, trainer):
        ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        answers = [[5 + (i + j) % 40 for j in range(6)] for i in range(len(prompts))]
        return {
            "prompt_ids": ids,
            "completion_ids": answers,
            "logprobs": [logprobs for _ in prompts],
            "env_mask": [[1, 1, 0, 0, 0, 1] for _ in prompts],
        }

    from datasets import Dataset

    model, tokenizer = parts()
    args = IsentropicConfig(output_dir=str(out), max_steps=4, recipe="repo-r-loop", **{**BASE, **settings})
    data = Dataset.from_list([{"prompt": "12>"}] * 64)
    trainer = IsentropicTrainer(
        model, share_of_digits, args=args, train_dataset=data, processing_class=tokenizer, rollout_func=rollout
    )
    trainer.train()
    return trainer


def test_environment_tokens_are_neither_read_nor_shaped(tmp_path, monkeypatch):
    trainer = episodes(tmp_path, monkeypatch, [-1.0] * 6)
    assert [row["entropy/tokens"] for row in trainer.record.rows("metrics")] == [48.0] * 4


def test_the_mismatch_is_of_the_samplers_log_probs_by_the_weights_that_sampled(tmp_path, monkeypatch):
    """In every step of the batch; the second token's log-prob is one that vLLM could not give."""
    trainer = episodes(tmp_path, monkeypatch, [-3.0, None, -9.0, -9.0, -9.0, -4.0], learning_rate=1e-2)
    for inputs, row in zip(trainer._buffered_inputs, trainer.record.rows("metrics"), strict=True):
        known = [0, 5]
        d = inputs["old_per_token_logps"][:, known].double() - torch.tensor([-3.0, -4.0])
        kl = (d.exp() - 1 - d).mean().item()
        assert row["mismatch/kl"] == pytest.approx(kl, rel=1e-5)
        assert row["mismatch/kl_k1"] == pytest.approx(-d.mean().item(), rel=1e-5)
        assert row["mismatch/kl_over_entropy"] == pytest.approx(kl / inputs["old_entropies"][:, known].mean().item())
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 16}
    cut = episodes(tmp_path / "cut", monkeypatch, [-3.0, None, -9.0, -9.0, -9.0, -4.0], learning_rate=1e-2, **parts)
    for name in ("mismatch/kl", "mismatch/kl_over_entropy", "policy/age", "ratio/ess_frac"):
        whole, pieces = (x.record.rows("metrics") for x in (trainer, cut))
        assert [row[name] for row in pieces] == pytest.approx([row[name] for row in whole], rel=1e-4), name


def test_tokens_that_a_selection_or_trls_correction_takes_out():
    like, factors = torch.zeros(2, 2), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert deselected({}, None, like) is None
    assert deselected({}, factors, like).tolist() == [[True, False], [False, False]]
    by_sequence = {"importance_sampling_ratio": torch.tensor([[1.0], [0.0]])}
    assert deselected(by_sequence, factors, like).tolist() == [[True, False], [True, True]]
    assert deselected(by_sequence, None, like).tolist() == [[False, False], [True, True]]


def _entropies(monkeypatch, values):
    """Replace what the head returns as entropy, call by call of the loss."""
    calls = iter(values)
    native = GRPOTrainer._get_per_token_logps_and_entropies

    def faulty(self, *args, **kwargs):
        logps, entropies, aux = native(self, *args, **kwargs)
        if kwargs.get("compute_entropy") and torch.is_grad_enabled():
            value = next(calls)
            entropies = entropies if value is None else torch.full_like(entropies, value)
        return logps, entropies, aux

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", faulty)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_refused_reading_at_the_start_is_an_error(tmp_path, monkeypatch, value):
    _entropies(monkeypatch, [value] * 8)
    with pytest.raises(ValueError, match="the first entropy reading is refused"):
        controlled(tmp_path, recipe="repo-r-loop").train()


def test_later_the_knob_is_held_and_after_ten_the_run_stops_with_a_checkpoint(tmp_path, monkeypatch, caplog):
    _entropies(monkeypatch, [None] * 4 + [math.nan] * 3 + [None] + [0.0] * 40)
    trainer = controlled(tmp_path, 40, recipe="loop", knob="zeta", target="4.5", recipe_options={"every": 1})
    with pytest.raises(EntropyReadingError, match="10 entropy readings in a row"):
        trainer.train()
    rows = trainer.record.rows("metrics")
    assert len(rows) == 18
    held = [row["knob/value"] for row in rows]
    assert held[4:8] == [held[4]] * 4
    assert held[8:] == [held[8]] * 10
    assert [row["entropy/refused"] for row in rows[3:9]] == [0, 1, 2, 3, 0, 1]
    assert rows[4]["entropy/mean"] is None
    assert "the knob is held" in caplog.text
    assert [step for step, _ in trainer.record.checkpoints()] == [18]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": "adapo", "steps_per_generation": 1}, "no ratio leaves 1"),
        ({"recipe": "rloo"}, "strictly on-policy"),
        ({"recipe": "dapo", "loss_type": "sapo"}, "recipe dapo sets loss_type='dapo', got 'sapo'"),
        ({"loss_type": "sapo", "knob": "clip_high"}, "needs a clip"),
        ({"recipe": "dcpo", "delta": 2.0}, "delta=2.0 has no effect on objective clipped with bounds dcpo"),
        ({"recipe": "erc", "steps_per_generation": 1}, "erc has no effect if every update is on-policy"),
        ({"recipe": "kl-cov", "recipe_options": {"constants": {"kl_shar": 1}}}, "did you mean kl_share"),
        ({"recipe_options": {"baseline": "leave_one_out"}}, "need a recipe to change"),
    ],
)
def test_configs_that_cannot_work_are_refused_before_a_model_loads(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        IsentropicConfig(
            output_dir=str(tmp_path), **{"use_cpu": True, "bf16": False, "steps_per_generation": 4, **changes}
        )


def test_a_knob_on_trls_own_settings(tmp_path):
    trainer = trained(tmp_path, 8, loss_type="dr_grpo", knob="beta", target="4.5")
    assert trainer.record.rows("metrics")[-1]["knob/value"] > 0


def test_both_bonuses_at_once_are_refused(tmp_path):
    with pytest.raises(ValueError, match="TRL's own entropy bonus"):
        controlled(tmp_path, recipe="entropy-bonus-adaptive", entropy_coef=0.01)


def test_an_unsupported_trl_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "1.14.2")
    with pytest.raises(ImportError, match=r"got trl 1\.14\.2"):
        compat._require_trl()


def test_save_steps_are_rounded_to_a_boundary(tmp_path, caplog):
    trainer = controlled(tmp_path, save_strategy="steps", save_steps=6)
    assert trainer.args.save_steps == 8
    assert "rounded up to 8" in caplog.text


def test_settings_of_a_reciprocal_clip():
    got = settings(RECIPES["loop"])
    assert 1 - got["epsilon"] == pytest.approx(1 / 1.1)
    assert got["epsilon_high"] == 0.1


OWN = """
from isentropic.losses.objectives import clipped
from isentropic.recipes import Penalty, compose

def wide_clip(batch, clip_low, clip_high, bounds):
    return clipped(batch, clip_low, clip_high, bounds)

def flat(logp_rows):
    return (logp_rows.exp() ** 2).sum(-1)

def late(mask):
    return (mask.cumsum(1) > 1).float()

SAME = compose("loop", objective=wide_clip)
MORE = compose("dapo", selection=late, penalty=flat, penalty_coef=0.5, knob="penalty_coef", target="4.5", every=1)
"""


def test_a_method_of_ones_own(tmp_path):
    path = tmp_path / "own_method.py"
    path.write_text(OWN)
    # An objective that is TRL's in disguise, by the general path: the same training, up to rounding.
    native = trained(tmp_path / "a", 8, recipe="loop", learning_rate=1e-4)
    own = trained(tmp_path / "b", 8, recipe=f"{path}:SAME", learning_rate=1e-4)
    assert native.native
    assert not own.native
    for (name, x), y in zip(weights(native).items(), weights(own).values(), strict=True):
        assert torch.allclose(x, y, atol=1e-5), name
    for x, y in zip(native.record.rows("metrics"), own.record.rows("metrics"), strict=True):
        assert x["clip/high_frac"] == pytest.approx(y["clip/high_frac"])
        assert x["entropy/mean"] == pytest.approx(y["entropy/mean"], abs=1e-4)
    assert own.record.header()["recipe"]["objective"].startswith("own_method.wide_clip@")

    more = trained(tmp_path / "c", 4, recipe=f"{path}:MORE")
    rows = more.record.rows("metrics")
    assert rows[-1]["knob/value"] > rows[0]["knob/value"]
    assert all(row["predict/bonus"] > 0 for row in rows if "predict/bonus" in row)  # less of Σ π² is more entropy
    with pytest.raises(ValueError, match="there is no file"):
        controlled(tmp_path / "d", recipe="nowhere.py:SAME")


def test_rows_are_refused_where_the_head_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr("isentropic.engines.trl.head.head_of", lambda model: None)
    with pytest.raises(ValueError, match="reads whole rows of log-probabilities"):
        controlled(tmp_path, recipe="aent")


@pytest.mark.parametrize("recipe", ["repo-r-loop", "dcpo"])
def test_vllms_importance_correction_is_left_alone(tmp_path, recipe):
    """The sampler's ratio multiplies the native loss after the clip, whatever we wrote into the advantages."""
    trainer = trained(tmp_path, 4, recipe=recipe)
    inputs = trainer._buffered_inputs[1]
    trainer.model.train()
    plain = trainer._compute_loss(trainer.model, dict(inputs))
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    halved = {**inputs, "importance_sampling_ratio": torch.full_like(inputs["old_per_token_logps"], 0.5)}
    assert trainer._compute_loss(trainer.model, halved).item() == pytest.approx(plain.item() / 2, abs=1e-7)
    trainer.use_vllm = False
