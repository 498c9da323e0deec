"""Episodes through TRL: what the policy wrote is counted, what the environment said is not."""


import pytest
import torch

pytest.importorskip("trl")
from trl_case import BASE, parts, same, weights

from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
from isentropic.engines.trl.rollout import Episode, Rollout, Sampling, play
from isentropic.runs.record import Record
from isentropic.tasks.environments import EnvironmentTask


class Digits:
    """Says how many digits a line had; over after `turns` lines, won where the last had one."""

    def reset(self, turns, **row):
        self.left = turns
        return f"{turns} lines"

    def step(self, action):
        self.left -= 1
        num = sum(c.isdigit() for c in action)
        return f"{num} digits", float(num > 0) if not self.left else 0.0, not self.left


def task(**changes):
    rows = [{"prompt": f"{i}? ", "turns": i % 3 + 1} for i in range(16)]
    settings = {"max_turns": 3, "max_action_tokens": 5, "max_completion_length": 60, **changes}
    return EnvironmentTask(
        name="digits", description="", make=Digits, train=lambda seed: rows, heldout=lambda: rows[:4], **settings
    )


def a_model():
    """The character model of the other tests, with a line break likely enough to be met."""
    model, tokenizer = parts()
    bias = torch.zeros(len(tokenizer))
    bias[tokenizer.convert_tokens_to_ids("\n")] = 3.0
    head = torch.nn.Linear(32, len(tokenizer))
    head.weight, head.bias = model.lm_head.weight, torch.nn.Parameter(bias)
    model.lm_head = head
    return model.eval(), tokenizer


def logp_and_entropy(model, ids, temperature=1.0):
    """By a separate pass over one whole sequence, without padding or cache: of every token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double() / temperature
    logp = logits.log_softmax(-1)
    return logp[range(len(ids) - 1), ids[1:]], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_tokens_are_one_growing_sequence_with_the_sampler_s_log_probs(temperature):
    model, tokenizer = a_model()
    torch.manual_seed(0)
    rows = [row for row in task().train(0)[:6] for _ in range(3)]
    episodes = play(model, tokenizer, task(), rows, Sampling(temperature))
    for row, episode in zip(rows, episodes, strict=True):
        text = tokenizer.decode(episode.ids)
        assert tokenizer.decode(episode.prompt_ids) == f"{row['prompt']}{row['turns']} lines\n>"
        assert len(episode.actions) == row["turns"]
        assert episode.done
        # What the environment said stands behind each line but the last, masked.
        said = tokenizer.decode([i for i, m in zip(episode.ids, episode.mask, strict=True) if not m])
        for action in episode.actions[:-1]:
            reply = f"{sum(c.isdigit() for c in action)} digits\n>"
            assert reply in text
            assert reply in said
        logp, _ = logp_and_entropy(model, episode.prompt_ids + episode.ids, temperature)
        made = torch.tensor(episode.mask).bool()
        got = torch.tensor(episode.logp)
        assert torch.allclose(logp[len(episode.prompt_ids) - 1 :][made].float(), got[made], atol=1e-4)
        assert not got[~made].any()
    assert {len(e.ids) for e in episodes} != {len(episodes[0].ids)}


def test_games_that_end_leave_the_batch_and_the_others_go_on_as_if_alone():
    model, tokenizer = a_model()
    rows = [{"prompt": "5? ", "turns": 1}, {"prompt": "12345? ", "turns": 3}, {"prompt": "5? ", "turns": 2}]
    together = play(model, tokenizer, task(), rows, Sampling(0.0))
    alone = [play(model, tokenizer, task(), [row], Sampling(0.0))[0] for row in rows]
    one_at_a_time = play(model, tokenizer, task(parallel=1), rows, Sampling(0.0))
    assert [e.ids for e in together] == [e.ids for e in alone] == [e.ids for e in one_at_a_time]


def test_turns_and_tokens_run_out():
    model, tokenizer = a_model()
    rows = [{"prompt": "5? ", "turns": 3}] * 4
    short = play(model, tokenizer, task(max_turns=2), rows)
    assert all(len(e.actions) == 2 and not e.done for e in short)
    assert all(e.ids[-1] != tokenizer.eos_token_id or e.mask[-1] for e in short)
    # 5 tokens for a line, 11 or 12 for a reply, 1 for the end: the second line does not fit into 16.
    tight = play(model, tokenizer, task(max_completion_length=16), rows)
    assert all(len(e.actions) == 1 and not e.done and len(e.ids) <= 5 for e in tight)


def trainer_of(home, head, **settings):
    from datasets import Dataset

    model, tokenizer = a_model()
    chosen = task()
    settings = {**BASE, "max_steps": 2, "max_completion_length": 60, **settings}
    args = IsentropicConfig(output_dir=str(home), head=head, **settings)
    return IsentropicTrainer(
        model,
        chosen.reward,
        args=args,
        train_dataset=Dataset.from_list(chosen.train(0)),
        processing_class=tokenizer,
        rollout_func=Rollout(chosen),
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
    assert ("_isentropic_head" in trainer.model.__dict__) == (head == "auto")


def test_figures_of_the_episodes_are_in_the_row(tmp_path):
    trainer = trainer_of(tmp_path, "auto", recipe="dapo", knob="zeta", target="90%")
    trainer.train()
    row = Record(tmp_path).rows("metrics")[0]
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
            masks.append(trainer._live["tool_mask"] * trainer._live["completion_mask"])
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
        Rollout(task())(["5? "], Plain())


def test_an_episode_s_parts_stay_aligned():
    episode = Episode([1, 2])
    episode.wrote([3, 4], [-0.5, -0.25])
    episode.read([5])
    assert (episode.ids, episode.mask, episode.logp) == ([3, 4, 5], [1, 1, 0], [-0.5, -0.25, 0.0])


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
