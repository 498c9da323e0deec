"""What the TRL engine says of why entropy moves, against the model's own logits and finite differences."""

import functools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOTrainer
from trl_case import VARIANT, make, parts, same, train, weights

from isentropic.engines.groups import group_sums
from isentropic.engines.loop import off_policy_sums
from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer, explain
from isentropic.engines.trl.explain import by_completion, completion_groups, head_of, interval
from isentropic.engines.trl.log import step_sums
from isentropic.entropy.prediction import predicted_change
from isentropic.entropy.statistics import logits_stats
from isentropic.recipes import compose
from isentropic.types import TokenBatch, TokenFacts


def run(out, steps=4, **settings):
    settings = {"recipe": "dapo", "explain_every": 1, "head": "trl", **settings}
    return train(IsentropicTrainer, IsentropicConfig, out, steps, **settings)


def rows_of(trainer):
    return trainer.record.rows("metrics")


PARTITIONS = {
    "quadrant": ["likely_up", "rare_up", "likely_down", "rare_down", "bonus"],
    "clip": ["unclipped", "clipped_low", "clipped_high"],
    "sample": ["positive", "negative", "neutral"],
    "position": [f"position_{i}" for i in range(1, 9)],
    "end": ["finished", "truncated"],
    "length": ["short", "middle", "long"],
}


@pytest.mark.parametrize(
    "recipe",
    "grpo dapo loop gspo cispo repo-r-loop repo-d-gspo entropy-bonus dr-grpo clip-cov kl-cov ce-gppo bapo aent".split(),
)
def test_every_split_sums_to_the_predicted_change(tmp_path, recipe):
    rows = rows_of(run(tmp_path, recipe=recipe))
    assert [row["predict/moments"] for row in rows] == [1] * 4
    for row in rows:
        assert row["predict/absolute"] > 0
        for names in PARTITIONS.values():
            parts_sum = sum(row[f"predict/{name}"] for name in names)
            assert parts_sum == pytest.approx(row["predict/change"], abs=1e-6 * row["predict/absolute"])
    if recipe in ("entropy-bonus", "aent"):
        assert all(row["predict/bonus"] > 0 for row in rows)


@pytest.mark.parametrize("head", ["trl", "auto"])
def test_the_change_is_that_of_the_full_logits(tmp_path, head):
    seen = []

    class Spy(IsentropicTrainer):
        def _compute_loss(self, model, inputs):
            with torch.no_grad():
                ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
                mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
                logits = model(input_ids=ids, attention_mask=mask).logits[
                    :, -inputs["completion_ids"].shape[1] - 1 : -1
                ]
            seen.append((logits, {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}))
            return super()._compute_loss(model, inputs)

    settings = {"recipe": "dapo", "explain_every": 1, "head": head, "temperature": 0.7}
    settings["gradient_accumulation_steps"] = 2
    trainer = train(Spy, IsentropicConfig, tmp_path, 2, **settings)
    row, total = rows_of(trainer)[1], 0.0
    for logits, inputs in seen[2:4]:  # the second step, of two micro-batches: its ratios have moved
        stats = logits_stats(logits.double(), inputs["completion_ids"], temperature=0.7)
        ratio = (stats.logp - inputs["old_per_token_logps"]).exp()
        adv = inputs["advantages"].unsqueeze(1)
        clipped = ((adv > 0) & (ratio > 1.28)) | ((adv < 0) & (ratio < 0.8))
        weight = ratio * adv * inputs["completion_mask"] * ~clipped / (inputs["num_items_in_batch"] / 2)
        total += predicted_change(weight, stats.logp, stats.entropy, stats.sum_p2, stats.sum_p2_logp).sum().item()
    assert row["predict/change"] == pytest.approx(total * row["learning_rate"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "dapo"},
        {"recipe": "loop", "knob": "zeta", "controller": "pi", "target": "1.0"},
        {"recipe": "repo-d-loop"},
        {"recipe": "adapo"},
        {"recipe": "grpo", "knob": "entropy_coef", "controller": "pi", "target": "3.0"},
        {"recipe": "isentropic", "controller": "pi"},
        {"recipe": "clip-cov", "knob": "zeta", "controller": "pi", "target": "1.0"},
        {"recipe": "dynamic-clip"},
        {"recipe": "aent"},
    ],
    ids=str,
)
def test_explaining_leaves_training_bit_identical(tmp_path, settings):
    plain = run(tmp_path / "plain", 8, **{**settings, "explain_every": 0})
    explained = run(tmp_path / "explained", 8, **settings)
    assert same(weights(plain), weights(explained))
    assert not any(key.startswith("predict/") for row in rows_of(plain) for key in row)


@pytest.mark.parametrize(
    ("recipe", "changes", "value"),
    [
        ("loop", {"knob": "zeta"}, 0.3),
        ("loop", {"knob": "zeta"}, 0.0),
        ("loop", {"knob": "beta"}, 0.2),
        ("gspo", {"knob": "zeta"}, 0.1),
        ("repo-r-dapo", {}, 0.04),
        ("grpo", {"knob": "entropy_coef"}, 0.01),
        ("dapo", {"knob": "entropy_coef"}, 0.0),
        ("loop", {"knob": "alpha"}, -0.2),
        ("loop", {"knob": "reject"}, 0.3),
        ("stare", {}, 1.2),
        ("sapo", {"knob": "zeta"}, 0.1),
        ("kl-cov", {"knob": "beta", "penalty": "none"}, 0.2),
        ("high-entropy", {"knob": "zeta"}, 0.1),
        ("aent", {}, 0.05),
        ("lp-reg", {"knob": "penalty_coef", "constants": {"lp_share": 1.0}}, 0.5),
    ],
    ids=str,
)
def test_the_gain_is_the_derivative_of_the_predicted_change(tmp_path, recipe, changes, value):
    """On the first step, where the samples do not depend on the knob yet."""

    def first(at):
        # Bounds wide enough for the two sides of a knob at 0.
        options = {"knob_start": at, "knob_low": -2.0, "knob_high": 2.0, "every": 1}
        options |= {name: value for name, value in changes.items() if name != "knob"}
        settings = {"controller": "fixed", "target": "3.0", "recipe_options": options, "knob": changes.get("knob")}
        return rows_of(run(tmp_path / f"{at:g}", 1, recipe=recipe, steps_per_generation=1, **settings))[0]

    step = 1e-3
    low, middle, high = (first(value + x) for x in (-step, 0, step))
    measured = (high["predict/change"] - low["predict/change"]) / (2 * step)
    assert middle["predict/gain"] == pytest.approx(measured, rel=5e-3)
    assert measured != 0
    if recipe != "lp-reg" and changes.get("knob") not in ("alpha", "reject"):  # which go by the signs of the samples
        assert measured > 0
    rest = 1.0 if recipe == "stare" else 0.0
    assert middle["predict/knob"] == pytest.approx((value - rest) * middle["predict/gain"])


def test_a_clip_bound_gains_from_the_tokens_at_its_edge(tmp_path):
    rows = rows_of(run(tmp_path, 8, recipe="adapo", learning_rate=1e-2))
    assert all(row["predict/knob"] is None for row in rows)
    assert any(row["predict/gain"] != 0 for row in rows)
    assert any(row["predict/removed_high"] != 0 for row in rows)


@pytest.mark.parametrize(
    "settings", [{"recipe": "adapo", "controller": "fixed"}, {"recipe": "loop", "knob": "zeta", "controller": "fixed"}]
)
def test_the_general_road_explains_what_the_native_one_does(tmp_path, monkeypatch, settings):
    """One objective, through TRL's own loss and through its weights."""
    settings = {**settings, "learning_rate": 5e-3, "target": "2.0"}
    native = rows_of(run(tmp_path / "native", 4, **settings))
    monkeypatch.setattr("isentropic.engines.trl.settings.native_objective", lambda recipe: False)
    trainer = run(tmp_path / "general", 4, **settings)
    assert not trainer.native
    for ours, theirs in zip(rows_of(trainer), native, strict=True):
        for name in theirs:
            if name.split("/")[0] in ("predict", "clip", "ratio", "entropy", "cov") and isinstance(theirs[name], float):
                small = 1e-4 * theirs["predict/absolute"] if name.startswith("predict") else 1e-5
                if name == "predict/gain" and settings["recipe"] == "adapo":
                    small = 1e-2 * abs(theirs[name])  # the weights at the edge are estimated there, and exact here
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=small), name
    assert sum(row["clip/high_frac"] for row in native) > 0
    assert any(row["predict/gain"] != 0 for row in native)


def test_an_unknown_head_is_read_without_moments(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("isentropic.engines.trl.explain.head_of", lambda model: None)
    with caplog.at_level(logging.WARNING):
        rows = rows_of(run(tmp_path, 2))
    assert caplog.text.count("head is not known") == 1
    for row in rows:
        assert row["predict/moments"] == 0
        assert row["predict/change"] == pytest.approx(row["predict/change_simple"])
        assert row["predict/numerics"] is None
        assert "numerics/logp_rms" not in row


def test_rounded_log_probs_show_in_the_numerics(tmp_path, monkeypatch):
    from trl import GRPOTrainer

    native = GRPOTrainer._get_per_token_logps_and_entropies

    def rounded(self, *args, **kwargs):
        logps, entropies, aux = native(self, *args, **kwargs)
        return logps.bfloat16().float(), entropies.bfloat16().float(), aux

    exact = rows_of(run(tmp_path / "exact"))
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", rounded)
    coarse = rows_of(run(tmp_path / "coarse"))
    assert max(row["numerics/logp_rms"] for row in exact) < 1e-5
    assert min(row["numerics/logp_rms"] for row in coarse) > 1e-3
    assert max(abs(row["predict/numerics"] / row["predict/absolute"]) for row in exact) < 1e-5
    assert max(abs(row["predict/numerics"] / row["predict/absolute"]) for row in coarse) > 1e-5


@pytest.mark.skipif(VARIANT == "fixed", reason="about the fused head, which this variant has not")
def test_the_fused_head_brings_the_moments_and_is_compared_now_and_then(tmp_path):
    native = rows_of(run(tmp_path / "native", 11, recipe="loop", knob="zeta", target="2.5"))
    fused = rows_of(
        run(tmp_path / "fused", 11, recipe="loop", knob="zeta", target="2.5", head="auto", explain_every=None)
    )
    assert all(row["predict/moments"] == 1 for row in fused)
    assert [row["step"] for row in fused if "numerics/logp_rms" in row] == [1, 11]
    assert 0 < fused[0]["numerics/logp_rms"] < 1e-5  # two ways to one number: close, and not the same to the bit
    for name in ("predict/change", "predict/absolute", "predict/likely_up", "predict/gain", "entropy/mean"):
        assert fused[0][name] == pytest.approx(native[0][name], rel=1e-3), name


def test_rows_name_the_tokens_and_count_what_leaves_the_clip(tmp_path):
    rows = rows_of(run(tmp_path, 8, learning_rate=1e-2))
    tops = rows[-1]["predict/top_tokens"]
    assert all(isinstance(text, str) and count >= 1 for text, _, count in tops)
    sizes = [abs(change) for _, change, _ in tops]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) <= rows[-1]["predict/absolute"] * (1 + 1e-6)
    assert rows[0]["ratio/outside_frac"] == 0 == rows[0]["theorem2/violated_frac"]
    assert max(row["ratio/outside_frac"] for row in rows) > 0
    assert max(row["theorem2/violated_frac"] for row in rows) > 0


@pytest.mark.parametrize("recipe", ["loop", "cispo"])
def test_the_clip_is_counted_as_trl_counts_it(tmp_path, recipe):
    """Whether a token is clipped depends on the sign of A − βL, by which the native loss clips, not on that of A."""
    changes = {"shaping": "repo", "beta": 0.5, "clip_high": 0.02}
    trainer = run(tmp_path, 8, recipe=recipe, recipe_options=changes, learning_rate=1e-2)
    assert trainer.native
    rows = rows_of(trainer)
    names = ("clip/high_frac", "clip/low_frac") if recipe == "loop" else ("clip/high_frac",)
    of_trl = {"clip/high_frac": "clip_ratio/high_mean", "clip/low_frac": "clip_ratio/low_mean"}
    if recipe == "cispo":
        of_trl["clip/high_frac"] = "cispo_clip_ratio"
    logged = [row for row in trainer.state.log_history if of_trl["clip/high_frac"] in row]
    assert len(logged) == len(rows) == 8
    for name in names:
        assert max(row[name] for row in rows) > 0.01
        assert [row[name] for row in rows] == pytest.approx([x[of_trl[name]] for x in logged], abs=1e-6), name


def test_theorem_2_is_counted_by_the_clip_of_each_side():
    """Entropies of 0.75 and 1.25 times the old ones: with widths of 0.2 and 0.28 the first alone has left."""
    one = torch.ones(1, 1)
    trainer: Any = SimpleNamespace(
        native=True, recipe=compose("dapo", clip_low=0.2, clip_high=0.28), epsilon_low=0.2, epsilon_high=0.28
    )
    facts = TokenFacts(one, one > 1, one > 1)
    for now, left in ((0.75, 1), (1.25, 0), (1.3, 1)):
        batch = TokenBatch(-one, -one, one, one, now * one, one)
        sums = step_sums(trainer, batch, facts, off_policy_sums(batch, facts, 0), group_sums(batch), False, False)
        assert (sums.violated.item(), sums.compared.item()) == (left, 1), now


def test_an_explanation_is_of_the_advantages_that_the_loss_read(tmp_path, monkeypatch):
    """Those after shaping, by whose sign tokens are clipped and contributions split."""
    seen, read = [], []
    native, attribute = GRPOTrainer._compute_loss, explain.attribute

    @functools.wraps(native)
    def compute_loss(self, model, inputs):
        loss = native(self, model, inputs)
        read.append(inputs["advantages"].detach().clone())
        return loss

    def keep(weights, stats, adv, *args):
        seen.append(adv.clone())
        return attribute(weights, stats, adv, *args)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute_loss)
    monkeypatch.setattr(explain, "attribute", keep)
    run(tmp_path, 2, recipe="loop", recipe_options={"shaping": "repo", "beta": 0.5})
    assert len(seen) == len(read) == 2
    assert all(torch.equal(a, b) for a, b in zip(seen, read, strict=True))
    assert (seen[0] != seen[0][:, :1]).any()


def test_completions_are_grouped_by_end_and_length_by_hand():
    """End token 1, padding 0; of the fifth completion one token in three is the environment's."""
    ids = torch.tensor([[5, 1, 0, 0], [5, 5, 5, 1], [5, 5, 5, 5], [5, 5, 1, 0], [5, 5, 5, 0], [1, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    tool_mask = torch.ones_like(mask)
    tool_mask[4, 1] = 0
    trainer: Any = SimpleNamespace(
        eos_token_ids=[1], _tokenizer=SimpleNamespace(pad_token_id=0), accelerator=SimpleNamespace(gather=lambda x: x)
    )
    groups = completion_groups(trainer, {"completion_ids": ids, "completion_mask": mask, "tool_mask": tool_mask})
    assert groups["truncated"].tolist() == [False, False, True, False, True, False]
    assert groups["length_third"].tolist() == [1, 2, 2, 1, 1, 0]  # of 2 4 4 3 2 1 tokens, at ranks ½ 2 3½ 5 of 6
    everyone = SimpleNamespace(gather=lambda x: torch.cat([x, torch.full((6,), 9), torch.zeros(3, dtype=x.dtype)]))
    trainer.accelerator = everyone
    shorter = completion_groups(trainer, {"completion_ids": ids, "completion_mask": mask})
    assert shorter["length_third"].tolist() == [0, 1, 1, 0, 0, 0]  # beside six of 9 tokens, and some masked as a whole

    inside = (mask * tool_mask).bool()
    change = torch.where(inside, torch.arange(1.0, 7.0)[:, None], 0.0)
    sums = {name: x.item() for name, x in by_completion(change, groups, inside).items()}
    assert sums == {
        "predict/finished": 2 + 8 + 12 + 6,
        "predict/truncated": 12 + 10,
        "predict/short": 6,
        "predict/middle": 2 + 12 + 10,
        "predict/long": 8 + 12,
        "tokens/finished": 10,
        "tokens/truncated": 6,
        "tokens/short": 1,
        "tokens/middle": 7,
        "tokens/long": 8,
    }
    assert by_completion(change, {}, inside) == {}


def test_the_split_by_completion_is_the_same_under_gradient_accumulation(tmp_path):
    settings = {"steps_per_generation": 8, "max_completion_length": 24}
    whole = rows_of(run(tmp_path / "a", 4, per_device_train_batch_size=16, **{**settings, "steps_per_generation": 4}))
    cut = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    parts = rows_of(run(tmp_path / "b", 4, **cut, **settings))
    kinds = ("finished", "truncated", "short", "middle", "long")
    for a, b in zip(whole[:1], parts[:1], strict=True):
        for kind in kinds:
            assert a[f"tokens/{kind}_frac"] == pytest.approx(b[f"tokens/{kind}_frac"])
            assert a[f"predict/{kind}"] == pytest.approx(b[f"predict/{kind}"], abs=1e-5 * a["predict/absolute"])
    assert all(0 < row["tokens/truncated_frac"] < 1 for row in whole)


def test_completions_are_truncated_as_trl_counts_them(tmp_path):
    trainer = run(tmp_path, 4, max_completion_length=24)
    batch = {name: torch.cat([x[name] for x in trainer._buffered_inputs]) for name in ("truncated", "length_third")}
    assert batch["truncated"].double().mean().item() == pytest.approx(rows_of(trainer)[-1]["length/truncated_frac"])
    assert 0 < batch["truncated"].sum() < len(batch["truncated"])
    assert set(batch["length_third"][batch["truncated"]].tolist()) == {1}  # two thirds are, all of one length


def test_the_interval_follows_the_head(tmp_path):
    model, _ = parts()
    assert head_of(model)[1] is model.lm_head
    assert interval(model, None) == 10  # a vocabulary of 99 beside two narrow layers
    assert interval(model, 3) == 3
    rows = rows_of(run(tmp_path, 6, explain_every=3))
    assert [row["step"] for row in rows if "predict/change" in row] == [1, 4]


@pytest.mark.parametrize("head", ["trl", "auto"])
def test_predictive_control_runs_and_resumes_bit_for_bit(tmp_path, head):
    settings = {
        "head": head,
        "recipe": "loop",
        "knob": "zeta",
        "controller": "predictive",
        "target": "2.5",
        "recipe_options": {"every": 1},
        "save_strategy": "steps",
        "save_steps": 4,
    }
    straight = run(tmp_path / "straight", 12, **settings)
    run(tmp_path / "halted", 8, **settings)
    again = make(IsentropicTrainer, IsentropicConfig, tmp_path / "halted", 12, **{"explain_every": 1, **settings})
    again.train(resume_from_checkpoint=str(tmp_path / "halted" / "checkpoint-8"))
    assert same(weights(straight), weights(again))
    assert straight.loop.state == again.loop.state
    assert straight.loop.state.controller.updates == 12
    assert straight.loop.state.rate == straight.args.learning_rate


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"explain_every": -1}, "explain_every must be >= 0 optimizer steps, got -1"),
        ({"head": "liger"}, "head must be auto or trl, got 'liger'"),
    ],
)
def test_bad_intervals_are_refused_before_a_model_loads(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        IsentropicConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, steps_per_generation=4, **settings)
