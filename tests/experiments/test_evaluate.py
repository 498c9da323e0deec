"""Evaluation: counts of right, distinct and majority answers, and models side by side."""

import json

import pytest
import torch

pytest.importorskip("trl")
from trl_case import parts, save_model

from isentropic.cli import main
from isentropic.experiments import evaluate as module
from isentropic.experiments.config import ConfigError
from isentropic.experiments.evaluate import check_prompts, evaluate, intervals
from isentropic.experiments.terminal import Progress, evaluation_table
from isentropic.models.generation import Completions, sample
from isentropic.tasks import Task

TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"


@pytest.fixture(scope="module")
def pair():
    model, tokenizer = parts()
    return model.eval(), tokenizer


def digits(stop="", chat=False):
    """Right is an answer whose first character is the prompt's digit."""
    rows = [{"prompt": f"{i}>", "digit": i} for i in range(6)]
    if chat:
        rows = [{**r, "prompt": [{"role": "user", "content": r["prompt"]}]} for r in rows]
    verify = lambda completion, digit: completion[:1] == str(digit)  # noqa: E731
    return Task("digits", "", lambda s: rows, lambda: rows, verify, lambda t: t[:1], 6, stop=stop)


def test_evaluate_counts_what_was_sampled(pair):
    model, tokenizer = pair
    task = digits()
    row = evaluate(model, tokenizer, task, 8, rows=task.heldout(), temperature=1.0, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        completions = sample(model, tokenizer, [r["prompt"] for r in task.heldout()], 8, 6, 1.0)
    right = [sum(t[:1] == str(i) for t in texts) for i, texts in enumerate(completions.texts)]
    assert row["num_correct"] == right
    assert row["pass@1"] == pytest.approx(sum(right) / 48)
    assert row["pass@8"] == pytest.approx(sum(r > 0 for r in right) / 6)
    assert row["truncated_frac"] == sum(map(sum, completions.truncated)) / 48
    assert set(intervals(row)) == {"pass@1", "pass@2", "pass@4", "pass@8"}
    again = evaluate(model, tokenizer, task, 8, rows=task.heldout(), temperature=1.0, seed=3)
    assert again["num_correct"] == right


def test_a_majority_counts_wrong_votes_too(pair, monkeypatch):
    model, tokenizer = pair
    texts = [["7", "8", "8"], ["7", "7", "8"], ["", "", "7"]]
    completions = Completions(texts, [[False, False, True]] * 3, 9)
    monkeypatch.setattr(module, "sample", lambda *args: completions)
    rows = [{"prompt": f"{i}", "digit": 7} for i in range(3)]
    row = evaluate(model, tokenizer, digits(), 3, rows=rows, temperature=1.0, seed=0)
    assert row["num_correct"] == [1, 2, 1]
    assert row["majority"] == pytest.approx(2 / 3)  # 8 wins the first; an empty answer is no vote
    assert row["truncated_frac"] == pytest.approx(1 / 3)


def test_greedy_answers_are_the_same_for_every_seed(pair):
    model, tokenizer = pair
    task = digits("\n")
    rows = [evaluate(model, tokenizer, task, 1, rows=task.heldout(), temperature=None, seed=s) for s in (0, 1)]
    assert rows[0]["num_truncated"] == rows[1]["num_truncated"]
    assert rows[0]["temperature"] == 0


def test_conversations_need_a_template(pair):
    _, tokenizer = pair
    task = digits(chat=True)
    with pytest.raises(ConfigError, match=r"the tokenizer of 'm' has no chat template; .*prompt=plain"):
        check_prompts(task, tokenizer, "m")
    check_prompts(digits(), tokenizer, "m")
    with_template = parts()[1]
    with_template.chat_template = TEMPLATE
    check_prompts(task, with_template, "m")


def test_progress_says_how_long_it_takes():
    said = []
    progress = Progress("m", said.append, every=0.0)
    progress.started -= 10
    progress(5, 10, 100)
    assert said[0].startswith("m: 5/10 completions, 10 tokens/s, eta 0:1")


def test_micro_batches_add_up_to_the_same_run(tmp_path):
    model = save_model(tmp_path / "model")
    flags = "--steps 4 --prompts 4 --generations 8 --updates 2 --eval-k 0 --audit off --warmup 0".split()
    for name, more in (("whole", []), ("micro", ["--micro-batch", "4"])):
        assert main(["train", "--model", model, *flags, *more, "--out", str(tmp_path / name)]) == 0
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "micro")
    ]
    assert [len(of_run) for of_run in rows] == [4, 4]
    for key in ("entropy/mean", "entropy/tokens", "reward/mean", "loss"):
        assert rows[1][0][key] == pytest.approx(rows[0][0][key], abs=1e-5)


def test_models_and_runs_side_by_side(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    flags = "--steps 4 --prompts 4 --generations 8 --dtype mixed --eval-k 0 --audit off --then expr-digit"
    assert main(["train", "--model", model, *flags.split(), "--out", str(tmp_path / "run")]) == 0
    assert "best constant answer" in capsys.readouterr().out
    out = tmp_path / "rows.jsonl"
    flags = ["--task", "expr", "--k", "4", "--limit", "6", "--greedy", "--out", str(out)]
    assert main(["eval", model, str(tmp_path / "run"), *flags]) == 0
    text = capsys.readouterr().out
    head = next(line for line in text.splitlines() if line.startswith("model"))
    assert head.split()[1:] == [model, str(tmp_path / "run"), "step", "8"]
    assert all(name in text for name in ("pass@4", "majority", "greedy", "truncated_frac"))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["dtype"] for row in rows] == ["float32", "float32"]
    assert len(rows[0]["num_correct"]) == 6
    assert rows[0]["greedy_prompts"] == 6
    assert main(["eval", model, *flags[:6], "--greedy-limit", "9", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["num_correct"] == rows[0]["num_correct"]
    assert len(row["greedy_correct"]) == row["greedy_prompts"] == 9
    assert row["greedy_correct"][:6] == rows[0]["greedy_correct"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["smollm"], "did you mean smollm2?"),
        (["./nowhere"], "has no config.json"),
        (["MODEL", "MODEL"], "named twice"),
        (["MODEL", "--step", "3"], "no run directory is named"),
        (["MODEL"], "--task: name the task"),
        (["MODEL", "--task", "exprr"], "did you mean expr"),
        (["MODEL", "--task", "expr", "--k", "0"], "--k: got 0"),
        (["MODEL", "--task", "expr", "--temperature", "0"], "--greedy is for none"),
        (["MODEL", "--task", "expr", "--greedy-limit", "0"], "--greedy-limit: got 0"),
        (["HEADLESS", "--task", "expr"], "is a Qwen3Model, which has no causal head"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(names, says, tmp_path, capsys, monkeypatch):
    model = save_model(tmp_path / "model")
    (tmp_path / "headless").mkdir()
    (tmp_path / "headless" / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3Model"]}')
    monkeypatch.setattr(module, "load_weights", lambda *args: pytest.fail("a model was loaded"))
    words = {"MODEL": model, "HEADLESS": str(tmp_path / "headless")}
    with pytest.raises(SystemExit):
        main(["eval", *[words.get(name, name) for name in names]])
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert says in err


def test_a_chat_task_and_a_plain_tokenizer_fail_before_training(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    with pytest.raises(SystemExit):
        main(["train", "--model", model, "--task", f"gsm8k:path={tmp_path}", "--out", str(tmp_path / "out")])
    assert "has no chat template" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_evaluated_with_its_base(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    flags = "--steps 2 --prompts 2 --generations 4 --updates 2 --eval-k 0 --audit off".split()
    assert main(["train", "--model", model, "--lora-rank", "2", *flags, "--out", str(tmp_path / "run")]) == 0
    assert main(["eval", str(tmp_path / "run"), "--k", "2", "--limit", "3"]) == 0
    assert "pass@2" in capsys.readouterr().out


def test_the_intervals_of_few_prompts_say_that_they_are_too_narrow():
    row = {"model": "m", "step": None, "task": "expr", "k": 2, "pass@1": 0.05, "intervals": {"pass@1": [0.0, 0.1]}}
    few, many = ({**row, "prompts": ["p"] * n} for n in (20, 100))
    assert "with 20 prompts the intervals of rates near 0 or 1 are too narrow" in evaluation_table([few])
    assert "with 20 prompts" in evaluation_table([few, few])
    assert "too narrow" not in evaluation_table([many])
