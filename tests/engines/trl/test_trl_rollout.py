"""Episodes through TRL: the policy's tokens are counted, the environment's are not."""

import pytest
import torch

pytest.importorskip("trl")
from task_cases import digits, digits_model, logp_and_entropy
from trl_case import BASE, QUIET, VARIANT, same, undocumented, weights

from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
from isentropic.engines.trl.rollout import Rollout
from isentropic.runs.record import Record


def trainer_of(home, head, **settings):
    from datasets import Dataset

    model, tokenizer = digits_model()
    task = digits()
    settings = {**BASE, **QUIET, "max_steps": 2, "max_completion_length": 60, **settings}
    args = IsentropicConfig(output_dir=str(home), head=head, **settings)
    return IsentropicTrainer(
        model,
        task.reward,
        args=args,
        train_dataset=Dataset.from_list(task.train(0)),
        processing_class=tokenizer,
        rollout_func=Rollout(task),
    )


@pytest.mark.parametrize("head", ["auto", "trl"])
def test_the_reading_counts_the_policy_s_tokens_alone(tmp_path, head):
    """Against a hand count of one trajectory, and of the whole step, by separate forward passes."""
    seen = []

    trainer = trainer_of(tmp_path, head, learning_rate=0.0, steps_per_generation=1, explain_every=1)
    inner = trainer._compute_loss

    def spy(model, inputs):
        seen.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        return inner(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    first = seen[0]
    total, count, turns = 0.0, 0, [[] for _ in range(8)]
    for i in range(len(first["completion_ids"])):
        prompt = first["prompt_ids"][i][first["prompt_mask"][i].bool()].tolist()
        keep = first["completion_mask"][i].bool()
        ids, made = first["completion_ids"][i][keep].tolist(), first["tool_mask"][i][keep].bool()
        _, entropy = logp_and_entropy(trainer.model, prompt + ids)
        entropy = entropy[len(prompt) - 1 :]
        total, count = total + float(entropy[made].sum()), count + int(made.sum())
        turn, before = -1, False
        for h, m in zip(entropy.tolist(), made.tolist(), strict=True):
            turn += m and not before
            before = m
            if m:
                turns[turn].append(h)
        assert made.any()
    assert any(not m for m in first["tool_mask"].flatten().tolist())
    row = Record(tmp_path).rows("metrics")[0]
    assert row["entropy/tokens"] == count
    assert row["entropy/mean"] == pytest.approx(total / count, rel=1e-5)
    for i in (0, 1, 2):
        assert row[f"entropy/turn_{i + 1}"] == pytest.approx(sum(turns[i]) / len(turns[i]), rel=1e-5)
    assert "entropy/turn_4" not in row
    assert ("_isentropic_head" in trainer.model.__dict__) == (head == "auto" and VARIANT != "fixed")


def test_figures_of_the_episodes_are_in_the_row(tmp_path):
    trainer = trainer_of(tmp_path, "auto", recipe="dapo", knob="zeta", target="90%")
    trainer.train()
    row = Record(tmp_path).rows("metrics")[0]
    assert undocumented(row) == []
    assert row["episode/win_frac"] == row["episode/return"] == row["reward/mean"]
    assert 1 <= row["episode/turns"] <= 3
    assert row["episode/calls"] == pytest.approx(64 * (1 + row["episode/turns"]))
    assert row["episode/truncated_frac"] == row["length/truncated_frac"] == 0
    sample = Record(tmp_path).rows("samples")[0]
    assert len(sample["tokens"]) == len(sample["entropy"]) == len(sample["surprisal"])
    assert "lines" in sample["prompt"]


def test_what_the_environment_says_teaches_nothing(tmp_path):
    """Its tokens have no part in the loss: a gradient with respect to their log-probs is 0."""
    trainer = trainer_of(tmp_path, "trl", steps_per_generation=1, recipe="grpo")
    weights, masks = [], []
    inner = trainer._get_per_token_logps_and_entropies

    def watched(*args, **kwargs):
        out = inner(*args, **kwargs)
        if out[0].requires_grad:
            out[0].retain_grad()
            weights.append(out[0])
            masks.append(trainer._micro_batch.inputs["tool_mask"] * trainer._micro_batch.inputs["completion_mask"])
        return out

    trainer._get_per_token_logps_and_entropies = watched
    trainer.train()
    (grad, mask) = next((w.grad, m.bool()) for w, m in zip(weights, masks, strict=True) if w.grad.any())
    assert not grad[~mask].any()
    assert grad[mask].any()


def test_a_trainer_that_does_not_say_its_rows_is_refused():
    class Plain:
        use_vllm = False

    with pytest.raises(ValueError, match="use IsentropicTrainer"):
        Rollout(digits())(["5? "], Plain())


def test_a_resumed_run_of_episodes_equals_an_uninterrupted_one(tmp_path):
    settings = {"recipe": "dapo", "knob": "zeta", "target": "90%", "save_strategy": "steps", "save_steps": 4}
    whole = trainer_of(tmp_path / "whole", "auto", **settings, max_steps=8)
    whole.train()
    half = trainer_of(tmp_path / "half", "auto", **settings, max_steps=8)
    half.add_callback(stop_at(4))
    half.train()
    again = trainer_of(tmp_path / "half", "auto", **settings, max_steps=8)
    again.train(resume_from_checkpoint=True)
    rows = [Record(tmp_path / name).rows("metrics") for name in ("whole", "half")]
    assert len(rows[0]) == len(rows[1]) == 8
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]
    assert same(weights(whole), weights(again))


def stop_at(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step

    return Stop()
