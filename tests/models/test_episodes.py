"""Episodes: one growing sequence of tokens, turns that end one by one, limits, and counts of wins."""

import pytest
import torch

pytest.importorskip("transformers")
from task_cases import digits, digits_model, logp_and_entropy

from isentropic.models.episodes import Episode, Sampling, count_wins, limited, play


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_tokens_are_one_growing_sequence_with_the_log_probs_of_sampling(temperature):
    model, tokenizer = digits_model()
    torch.manual_seed(0)
    rows = [row for row in digits().train(0)[:6] for _ in range(3)]
    episodes = play(model, tokenizer, digits(), rows, Sampling(temperature))
    for row, episode in zip(rows, episodes, strict=True):
        text = tokenizer.decode(episode.ids)
        assert tokenizer.decode(episode.prompt_ids) == f"{row['prompt']}{row['turns']} lines\n>"
        assert len(episode.actions) == row["turns"]
        assert episode.done
        # The environment's answer follows each line but the last, masked.
        answers = tokenizer.decode([i for i, m in zip(episode.ids, episode.mask, strict=True) if not m])
        for action in episode.actions[:-1]:
            reply = f"{sum(c.isdigit() for c in action)} digits\n>"
            assert reply in text
            assert reply in answers
        logp, _ = logp_and_entropy(model, episode.prompt_ids + episode.ids, temperature)
        made = torch.tensor(episode.mask).bool()
        got = torch.tensor(episode.logp)
        assert torch.allclose(logp[len(episode.prompt_ids) - 1 :][made].float(), got[made], atol=1e-4)
        assert not got[~made].any()
    assert {len(e.ids) for e in episodes} != {len(episodes[0].ids)}


def test_episodes_that_end_leave_the_batch_and_the_others_continue_as_if_alone():
    model, tokenizer = digits_model()
    rows = [{"prompt": "5? ", "turns": 1}, {"prompt": "12345? ", "turns": 3}, {"prompt": "5? ", "turns": 2}]
    together = play(model, tokenizer, digits(), rows, Sampling(0.0))
    alone = [play(model, tokenizer, digits(), [row], Sampling(0.0))[0] for row in rows]
    one_at_a_time = play(model, tokenizer, digits(parallel=1), rows, Sampling(0.0))
    assert [e.ids for e in together] == [e.ids for e in alone] == [e.ids for e in one_at_a_time]


def test_turns_and_tokens_run_out():
    model, tokenizer = digits_model()
    rows = [{"prompt": "5? ", "turns": 3}] * 4
    short = play(model, tokenizer, digits(max_turns=2), rows)
    assert all(len(e.actions) == 2 and not e.done for e in short)
    assert all(e.ids[-1] != tokenizer.eos_token_id or e.mask[-1] for e in short)
    # 5 tokens for a line, 11 or 12 for a reply, 1 for the end: the second line does not fit into 16.
    tight = play(model, tokenizer, digits(max_completion_length=16), rows)
    assert all(len(e.actions) == 1 and not e.done and len(e.ids) <= 5 for e in tight)


def test_the_lists_of_an_episode_stay_aligned():
    episode = Episode([1, 2])
    episode.append_action([3, 4], [-0.5, -0.25])
    episode.append_observation([5])
    assert (episode.ids, episode.mask, episode.logp) == ([3, 4, 5], [1, 1, 0], [-0.5, -0.25, 0.0])


def test_wins_are_counted_by_row():
    model, tokenizer = digits_model()
    rows = digits().train(0)[:5]
    torch.manual_seed(0)
    wins = count_wins(model, tokenizer, digits(), rows, 4, batch=8)
    torch.manual_seed(0)
    groups = [rows[i : i + 2] for i in range(0, 5, 2)]
    pool = []
    episodes = [
        episode
        for group in groups
        for episode in play(model, tokenizer, digits(), [row for row in group for _ in range(4)], pool=pool)
    ]
    by_row = [episodes[i : i + 4] for i in range(0, 20, 4)]
    assert wins.correct == [sum(e.total >= 1 for e in group) for group in by_row]
    assert wins.truncated == [sum(not e.done for e in group) for group in by_row]
    assert all(d <= c for d, c in zip(wins.distinct, wins.correct, strict=True))
    assert wins.num_tokens == sum(sum(e.mask) for e in episodes)
    assert len(pool) == 8


def test_another_limit_is_another_task():
    task = digits()
    assert limited(task, 7).max_completion_length == 7
    assert limited(task, None) is task
