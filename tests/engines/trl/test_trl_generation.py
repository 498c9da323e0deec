"""What is generated: rules for each task's completions, dynamic sampling, second batches at another temperature."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")
from task_cases import digits, digits_model
from trl_case import BASE, make, share_of_digits, undocumented

from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer, audit_trainer, compat, rollout
from isentropic.engines.trl.compat import stop_at
from isentropic.engines.trl.generation import _replace_rows, check_redraw, redrawn_here
from isentropic.engines.trl.rollout import Rollout
from isentropic.engines.trl.sequence import CompletionRules, SequentialTrainer, SwitchTask

SIZE = BASE["per_device_train_batch_size"] * BASE["steps_per_generation"]
AGAIN = SIZE // 4


def test_a_switch_changes_the_rules_for_completions_and_clears_the_optimizer():
    generation = SimpleNamespace(eos_token_id=[1], max_new_tokens=9)
    trainer = SimpleNamespace(eos_token_ids=[1], generation_config=generation, generation_kwargs={}, starts=(0, 4, 6))
    trainer.place = partial(SequentialTrainer.place, trainer)
    trainer.args, trainer.vllm_generation = SimpleNamespace(), SimpleNamespace(generation_kwargs={})
    trainer.rules = (CompletionRules([5], 7), CompletionRules([], 3, rollout="rollout"), CompletionRules([8], 2))
    seen, switched = [], []
    callback = SwitchTask(trainer, switched.append)
    for step in (0, 3, 4, 5, 6, 9):
        trainer.optimizer = SimpleNamespace(state={"moments": 1})
        callback.on_step_begin(None, SimpleNamespace(global_step=step), None)
        limits = (trainer.args.max_completion_length, trainer.vllm_generation.max_completion_length)
        ends = (trainer.eos_token_ids, generation.eos_token_id, generation.max_new_tokens)
        seen.append((*ends, *limits, trainer.rollout_func, bool(trainer.optimizer.state)))
    first, then, last = ([1, 5], [1, 5], 7, 7, 7, None), ([1], [1], 3, 3, 3, "rollout"), ([1, 8], [1, 8], 2, 2, 2, None)
    states = [(*first, True), (*first, True), (*then, False), (*then, True), (*last, False), (*last, True)]
    assert seen == states
    assert switched == [4, 6]


def test_the_place_of_a_step_is_the_last_task_that_began():
    trainer = SimpleNamespace(starts=(0, 4, 6))
    assert [SequentialTrainer.place(trainer, step) for step in range(9)] == [0, 0, 0, 0, 1, 1, 2, 2, 2]


def test_trl_ends_masks_and_counts_by_our_stops(tmp_path):
    seen = []

    class Spy(IsentropicTrainer):
        def _compute_loss(self, model, inputs):
            seen.append({k: inputs[k].clone() for k in ("completion_ids", "completion_mask")})
            return super()._compute_loss(model, inputs)

    trainer = make(Spy, IsentropicConfig, tmp_path, 4)
    stop = trainer.processing_class.convert_tokens_to_ids(list("0123456789ABCDEFGHIJ"))
    own = list(trainer.eos_token_ids)
    stop_at(trainer, stop)
    trainer.train()
    num_ended = num_cut = 0
    for batch in seen:
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
            kept = ids[mask.bool()].tolist()
            assert not set(kept[:-1]) & {*stop, *own}
            num_ended += kept[-1] in stop
            num_cut += kept[-1] not in (*stop, *own)
    assert num_ended > 10
    assert trainer.run_log.record.rows("metrics")[0]["length/truncated_frac"] == pytest.approx(num_cut / 64)
    assert trainer.model.generation_config.eos_token_id in (own, own[0])
    stop_at(trainer, [])
    assert trainer.eos_token_ids == own


def flat(completions, **columns):
    return [1.0 for _ in completions]


def dapo(out, **settings):
    trainer = make(IsentropicTrainer, IsentropicConfig, out, 4, recipe="dapo", **settings)
    trainer.train()
    return trainer


def test_dynamic_sampling_fills_the_batch_with_informative_groups(tmp_path):
    def odd_ones(prompts, completions, **columns):
        # Prompts ending in an odd digit are always right: their groups teach nothing.
        shares = share_of_digits(completions)
        return [1.0 if int(p[1]) % 2 else s for p, s in zip(prompts, shares, strict=True)]

    options = {"dynamic_sampling": True, "overlong_buffer": 0}
    trainer = dapo(tmp_path, recipe_options=options, reward=odd_ones)
    inputs = trainer._buffered_inputs
    rewards = torch.cat([x["rewards"] for x in inputs])
    advantages = torch.cat([x["advantages"] for x in inputs])
    assert (advantages != 0).float().mean() > 0.9
    assert 0 < rewards.mean() < 1
    tokens = sum(x["completion_mask"].sum() for x in inputs)
    assert all(int(x["num_items_in_batch"]) == int(tokens) for x in inputs)
    assert trainer.record.rows("metrics")[-1]["samples/total"] > 64
    plain = dapo(tmp_path / "b", reward=odd_ones)
    assert (torch.cat([x["advantages"] for x in plain._buffered_inputs]) != 0).float().mean() < 0.9


def test_overlong_shaping_punishes_length(tmp_path):
    trainer = dapo(tmp_path, recipe_options={"overlong_buffer": 4}, reward=flat)
    lengths = torch.cat([x["completion_mask"].sum(1) for x in trainer._buffered_inputs])
    rewards = torch.cat([x["rewards"] for x in trainer._buffered_inputs])
    # 8 tokens allowed, buffer 4: 1 up to 4 tokens, then 1 − (n − 4)/4.
    assert torch.allclose(rewards, 1 - ((lengths - 4) / 4).clamp(min=0))
    assert rewards.unique().numel() > 1


def even(completions, **columns):
    """About half of all answers are right."""
    return [float(len(text) % 2 == 0) for text in completions]


def spied(out, steps=4, **settings):
    """A trainer whose weights stay, and what it rolls out: the temperature of sampling and the batch."""
    settings = {"learning_rate": 0.0, "reward": even, **settings}
    trainer = make(IsentropicTrainer, IsentropicConfig, out, steps, **settings)
    rolled, native = [], trainer.batches._roll_out

    def roll_out(*args):
        output = native(*args)
        output["importance_sampling_ratio"] = torch.full_like(output["advantages"], 0.5)[:, None]
        rolled.append((trainer.generation_config.temperature, trainer.generation_kwargs["temperature"], output))
        return output

    trainer.batches._roll_out = roll_out
    trainer.train()
    return trainer, rolled


def whole(trainer, name):
    return torch.cat([inputs[name] for inputs in trainer._buffered_inputs])


def answers(ids, mask):
    return [tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)]


@pytest.mark.parametrize(("share", "factor"), [(0.05, 1.2), (-0.05, 0.8)])
def test_right_answers_take_the_place_of_a_share(tmp_path, share, factor):
    trainer, rolled = spied(tmp_path, recipe="grpo", recipe_options={"redraw": share})
    (at, _, first), (again_at, kwargs_at, second) = rolled
    assert (at, again_at, kwargs_at) == (1.0, factor, factor)
    assert trainer.generation_config.temperature == trainer.generation_kwargs["temperature"] == 1.0
    assert (len(first["advantages"]), len(second["advantages"])) == (SIZE, AGAIN)

    redrawn = whole(trainer, "redrawn")
    count = round(0.05 * SIZE)
    right = second["advantages"] > 0.05
    assert int(right.sum()) > count  # so that the share is what limits it
    assert int(redrawn.sum()) == count
    assert whole(trainer, "advantages")[redrawn].eq(1).all()
    assert whole(trainer, "importance_sampling_ratio")[redrawn].eq(1).all()
    assert whole(trainer, "importance_sampling_ratio")[~redrawn].eq(0.5).all()
    got = answers(whole(trainer, "completion_ids")[redrawn], whole(trainer, "completion_mask")[redrawn])
    wanted = answers(second["completion_ids"][right], second["completion_mask"][right])[:count]
    assert sorted(got) == sorted(wanted)
    # The rest is as it was, and its first completions are missing.
    rest = answers(whole(trainer, "completion_ids")[~redrawn], whole(trainer, "completion_mask")[~redrawn])
    assert sorted(rest) == sorted(answers(first["completion_ids"], first["completion_mask"])[count:])
    torch.testing.assert_close(
        whole(trainer, "advantages")[~redrawn].sort().values, first["advantages"][count:].sort().values
    )
    tokens = int(whole(trainer, "completion_mask").sum())
    assert all(int(inputs["num_items_in_batch"]) == tokens for inputs in trainer._buffered_inputs)


def test_figures_are_those_of_the_first_batch(tmp_path):
    trainer, rolled = spied(tmp_path, recipe="grpo", recipe_options={"redraw": 0.1})
    rows, redrawn = trainer.record.rows("metrics"), whole(trainer, "redrawn")
    mask = whole(trainer, "completion_mask")
    marks = [sample["redrawn"] for sample in trainer.record.rows("samples")]
    assert marks == redrawn[: len(marks)].tolist()
    assert sum(row["entropy/tokens"] for row in rows) == int(mask[~redrawn].sum()) < int(mask.sum())
    assert rows[0]["reward/mean"] == pytest.approx(float(rolled[0][2]["rewards"].mean()), rel=1e-5)
    assert rows[-1]["samples/total"] == SIZE + AGAIN
    for row in rows:
        assert row["redraw/frac"] == round(0.1 * SIZE) / SIZE
        assert sum(row[f"group/{name}_frac"] for name in ("failed", "mixed", "solved")) == pytest.approx(1.0)
        # Scored at the first temperature: with weights that stay no ratio leaves 1.
        assert row["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
        assert not undocumented(row)


def test_unscored_answers_are_those_of_the_first_batch(tmp_path, caplog):
    def some(completions, **columns):
        return [None if i < 2 and len(completions) == AGAIN else x for i, x in enumerate(even(completions))]

    trainer, rolled = spied(tmp_path, recipe="grpo", recipe_options={"redraw": 0.1}, reward=some)
    assert [int(output["rewards"].isnan().sum()) for _, _, output in rolled] == [0, 2]
    assert "reward/unscored" not in trainer.record.rows("metrics")[0]
    assert "not scored" not in caplog.text


@pytest.mark.parametrize(("target", "temperatures"), [("150%", [1.0, 1.0, 1.2]), ("50%", [1.0, 1.0, 0.8])])
def test_the_knob_says_where_it_is_drawn(tmp_path, target, temperatures):
    """The first batch has no reading yet: its knob is 0, and nothing is drawn again."""
    trainer, rolled = spied(tmp_path, 8, recipe="aepo", target=target, explain_every=1)
    assert [at for at, _, _ in rolled] == temperatures
    first, second = trainer.record.rows("metrics")[0], trainer.record.rows("metrics")[-1]
    assert (first["redraw/frac"], second["redraw/frac"]) == (0, 1 / SIZE)
    assert second["predict/knob"] is None
    assert second["predict/gain"] is None


def test_any_controller_learns_from_readings_alone(tmp_path):
    """A prediction cannot tell of answers that are yet to be drawn: one of 0 would say that the knob has no effect."""
    settings = {"recipe": "loop", "knob": "redraw", "controller": "predictive", "target": "90%"}
    trainer, _ = spied(tmp_path, 12, learning_rate=1e-6, **settings)
    state, target = trainer.loop.state.controller, trainer.record.rows("metrics")[-1]["entropy/target"]
    assert state.updates == 0
    assert state.gain == pytest.approx(0.01 * target / (0.0234 + 0.0117))


def test_without_a_right_answer_nothing_is_replaced(tmp_path):
    trainer, rolled = spied(tmp_path, recipe="grpo", recipe_options={"redraw": 0.1}, reward=flat)
    assert len(rolled) == 2
    assert not whole(trainer, "redrawn").any()
    assert trainer.record.rows("metrics")[0]["redraw/frac"] == 0


def test_dynamic_sampling_is_drawn_again_from_the_prompts_that_it_kept(tmp_path):
    def odd_ones(prompts, completions, **columns):
        return [1.0 if int(p[1]) % 2 else right for p, right in zip(prompts, even(completions), strict=True)]

    drawn, settings = [], {"recipe": "grpo", "recipe_options": {"dynamic_sampling": True, "redraw": 0.1}}
    trainer = make(IsentropicTrainer, IsentropicConfig, tmp_path, 4, reward=odd_ones, **settings)
    native = trainer.batches._roll_out
    trainer.batches._roll_out = lambda step, rows: drawn.append([row["prompt"] for row in rows]) or native(step, rows)
    trainer.train()
    first, *rounds, again = drawn
    assert rounds
    assert len(again) == AGAIN
    assert {int(prompt[1]) % 2 for prompt in first} == {0, 1}
    # The groups that were mixed at first stay, and every other one is of a later round.
    assert set(again) <= {prompt for prompts in drawn[:-1] for prompt in prompts if not int(prompt[1]) % 2}
    assert whole(trainer, "redrawn").any()


def test_a_share_is_rounded_over_all_processes():
    assert [redrawn_here(0.0234, 640, 4, rank) for rank in range(4)] == [15, 15, 15, 15]
    assert [redrawn_here(-0.0117, 64, 4, rank) for rank in range(4)] == [1, 1, 1, 0]
    assert redrawn_here(0.0, 640, 1, 0) is None


def test_a_share_below_one_completion_is_told(tmp_path, caplog):
    trainer, rolled = spied(tmp_path, recipe="grpo", recipe_options={"redraw": 0.007})
    assert len(rolled) == 1
    assert "redraw replaces nothing: 0.70% of 64 completions is less than one" in caplog.text
    assert trainer.record.rows("metrics")[0]["redraw/frac"] == 0


def test_what_cannot_be_drawn_again_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"got generation_kwargs with a temperature of 0\.5, which would"):
        make(IsentropicTrainer, IsentropicConfig, tmp_path, 4, recipe="aepo", generation_kwargs={"temperature": 0.5})
    args = SimpleNamespace(per_device_train_batch_size=4, steps_per_generation=1, generation_kwargs=None)
    with pytest.raises(ValueError, match="redraw needs whole groups on each process, got 4 completions in groups of 8"):
        check_redraw(SimpleNamespace(args=args, num_generations=8, rollout_func=None))


def test_a_part_of_a_batch_with_images_is_not_replaced():
    batch = {"advantages": torch.ones(4), "pixel_values": torch.ones(6, 3)}
    with pytest.raises(ValueError, match="not possible with images, got pixel_values"):
        _replace_rows(batch, batch, torch.tensor([0]), torch.tensor([1]))


def test_vllm_samples_at_the_temperature_too():
    sampler = SimpleNamespace(temperature=0.7)
    trainer = SimpleNamespace(temperature=0.7, vllm_generation=sampler)
    with compat.sampling_at(trainer, 1.2):
        assert sampler.temperature == compat.sampling_temperature(trainer) == pytest.approx(0.84)
    assert (sampler.temperature, trainer.temperature) == (0.7, 0.7)


def test_episodes_are_sampled_at_the_temperature_too(tmp_path, monkeypatch):
    seen, native = [], rollout.play

    def play(model, tokenizer, task, rows, sampling, pool):
        seen.append((sampling.temperature, len(rows)))
        return native(model, tokenizer, task, rows, sampling, pool)

    monkeypatch.setattr(rollout, "play", play)
    trainer = episodes(tmp_path, digits_model(), Rollout(digits()))
    trainer.train()
    assert seen == [(1.0, SIZE), (1.2, AGAIN)]
    row = trainer.record.rows("metrics")[0]
    assert row["episode/win_frac"] == row["episode/win_frac"]

    with pytest.raises(ValueError, match="another temperature, which a rollout_func of your own is not told"):
        episodes(tmp_path / "b", digits_model(), lambda prompts, trainer: Rollout(digits())(prompts, trainer))


def episodes(out, parts, function):
    from datasets import Dataset

    model, tokenizer = parts
    settings = {**BASE, "max_steps": 2, "max_completion_length": 60, "audit": False, "report": False}
    args = IsentropicConfig(output_dir=str(out), recipe="grpo", recipe_options={"redraw": 0.1}, **settings)
    return IsentropicTrainer(
        model,
        digits().reward,
        args=args,
        train_dataset=Dataset.from_list(digits().train(0)),
        processing_class=tokenizer,
        rollout_func=function,
    )


def test_an_audit_looks_at_one_batch(tmp_path):
    trainer = make(IsentropicTrainer, IsentropicConfig, tmp_path, 4, recipe="grpo", recipe_options={"redraw": 0.5})
    calls, native = [], trainer.batches._roll_out
    trainer.batches._roll_out = lambda *args: calls.append(1) or native(*args)
    audit_trainer(trainer, batches=1)
    assert len(calls) == 1
    assert trainer.batches.redraws
