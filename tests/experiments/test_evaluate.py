"""Evaluation: counts of right, distinct and majority answers at every temperature, and models side by side."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
from trl_case import parts, save_model

from isentropic.cli import main
from isentropic.experiments import evaluate as module
from isentropic.experiments.config import ConfigError
from isentropic.experiments.evaluate import PART, Counts, Parts, check_prompts, evaluate, intervals
from isentropic.experiments.terminal import Progress
from isentropic.models.generation import Completions, sample
from isentropic.tasks import Task

TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"


@pytest.fixture(scope="module")
def pair():
    model, tokenizer = parts()
    return model.eval(), tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISENTROPIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def digits(stop="", chat=False, num=6):
    """Right is an answer whose first character is the prompt's digit."""
    rows = [{"prompt": f"{i}>", "digit": i % 10} for i in range(num)]
    if chat:
        rows = [{**r, "prompt": [{"role": "user", "content": r["prompt"]}]} for r in rows]
    verify = lambda completion, digit: completion[:1] == str(digit)  # noqa: E731
    return Task("digits", "", lambda s: rows, lambda: rows, verify, lambda t: t[:1], 6, stop=stop)


def often(num):
    """Right is about one answer in four of the random model."""
    verify = lambda completion, digit: completion[:1].isalnum() and ord(completion[0]) % 3 == digit % 3  # noqa: E731
    return replace(digits("\n", num=num), verify=verify)


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


COUNTS = ("num_correct", "num_distinct", "num_truncated", "num_tokens", "majority", "distinct", "pass@1", "pass@4")


def test_one_row_holds_every_temperature_and_greedy_answers(pair):
    model, tokenizer = pair
    task = often(PART + 3)
    heldout = task.heldout()
    shared = {"rows": heldout, "seed": 3}
    row = evaluate(model, tokenizer, task, 4, temperature=0.7, others=[0.2, 1.5, 0.7, 1.5], **shared)
    assert row["temperature"] == 0.7
    assert list(row["at"]) == ["1.5", "0.2"]  # the temperature of training is the row itself
    assert len(row["prompts"]) == len(row["num_correct"]) == len(row["greedy_correct"]) == PART + 3
    for temperature in (1.5, 0.2):
        alone = evaluate(model, tokenizer, task, 4, temperature=temperature, **shared)
        assert alone["at"] == {}
        assert {name: row["at"][f"{temperature:g}"][name] for name in COUNTS} == {n: alone[n] for n in COUNTS}
        assert alone["greedy_correct"] == row["greedy_correct"]
    assert len({tuple(counts["num_correct"]) for counts in (row, *row["at"].values())}) == 3
    # Greedy answers, by another way: the likeliest token at each place, whatever the seed.
    greedy = sample(model, tokenizer, [r["prompt"] for r in heldout], 1, 6, None, module.line_break_tokens(tokenizer))
    right = [int(task.verify(texts[0], r["digit"])) for texts, r in zip(greedy.texts, heldout, strict=True)]
    assert row["greedy_correct"] == right
    assert row["greedy"] == pytest.approx(sum(right) / len(right))
    other = evaluate(model, tokenizer, task, 4, rows=heldout, temperature=0.7, seed=4)
    assert other["greedy_correct"] == right
    assert other["num_correct"] != row["num_correct"]


def test_progress_counts_what_is_left_to_do(pair):
    model, tokenizer = pair
    task = often(PART + 2)
    shared = {"rows": task.heldout(), "temperature": 1.0, "others": [0.5], "seed": 0}
    said, parts = [], Parts()
    whole = evaluate(model, tokenizer, task, 2, progress=lambda *args: said.append(args), parts=parts, **shared)
    assert {num for _, num, _ in said} == {(PART + 2) * (2 + 2 + 1)}
    assert [done for done, *_ in said] == sorted({done for done, *_ in said})
    assert said[-1][0] == said[-1][1]
    assert said[-1][2] > whole["num_tokens"] + whole["at"]["0.5"]["num_tokens"]
    del parts.done["greedy 0"], parts.done[f"0.5 {PART}"]
    said.clear()
    assert evaluate(model, tokenizer, task, 2, progress=lambda *args: said.append(args), parts=parts, **shared) == whole
    assert {num for _, num, _ in said} == {PART + 2 * 2}
    assert said[-1][0] == PART + 2 * 2


def test_parts_that_are_known_are_not_computed_again(pair, tmp_path, monkeypatch):
    model, tokenizer = pair
    task = often(PART + 1)
    shared = {"rows": task.heldout(), "temperature": 1.0, "others": [0.5], "seed": 0}
    path = tmp_path / "parts" / "a.jsonl"
    whole = evaluate(model, tokenizer, task, 2, parts=Parts(path), **shared)
    lines = path.read_text().splitlines(keepends=True)
    names = ["1.0 0", "1.0 64", "0.5 0", "0.5 64", "greedy 0", "greedy 64"]
    assert [json.loads(line)["part"] for line in lines] == names
    # Three parts were written when it was killed, and a fourth in half.
    path.write_text("".join(lines[:3]) + lines[3][:40])
    computed, native = [], module._count

    def count(model, tokenizer, task, rows, num, temperature, *rest):
        computed.append((temperature, len(rows), num))
        return native(model, tokenizer, task, rows, num, temperature, *rest)

    monkeypatch.setattr(module, "_count", count)
    parts = Parts(path)
    assert evaluate(model, tokenizer, task, 2, parts=parts, **shared) == whole
    assert computed == [(0.5, 1, 2), (None, PART, 1), (None, 1, 1)]
    assert path.read_text() == "".join(lines)
    assert Parts(path).done == parts.done
    parts.forget()
    assert not path.exists()
    parts.forget()
    assert Parts(path).done == {}


def test_counts_of_parts_stand_in_the_order_of_prompts():
    one, other = Counts([1], [2], [3], [True], 4), Counts([5, 6], [7, 8], [0, 1], [False, True], 9)
    assert one.and_then(other) == Counts([1, 5, 6], [2, 7, 8], [3, 0, 1], [True, False, True], 13)


EVAL = ["--task", "task_cases:letters", "--k", "4", "--limit", "3"]


def read(path):
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_second"} for x in path.read_text().splitlines()]


def dies_after(monkeypatch, num):
    """The evaluation fails once so many parts are counted."""
    native, calls = module._count, []

    def count(*args):
        calls.append(args[5])
        if len(calls) > num:
            raise KeyboardInterrupt
        return native(*args)

    monkeypatch.setattr(module, "_count", count)
    return calls


def test_an_evaluation_of_two_models_continues_and_writes_one_row_each(tmp_path, cache, monkeypatch, capsys):
    names = [save_model(tmp_path / "one"), save_model(tmp_path / "two")]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    assert main(["eval", *names, *EVAL, "--out", str(whole)]) == 0
    assert not list(cache.rglob("*.jsonl"))
    with monkeypatch.context() as patched:
        calls = dies_after(patched, 7)
        assert main(["eval", *names, *EVAL, "--out", str(out)]) == 130
        assert calls == [1.0, 1.5, 0.6, 0.3, None, 1.0, 1.5, 0.6]
    assert not out.exists()
    assert sorted(len(path.read_text().splitlines()) for path in cache.rglob("*.jsonl")) == [2, 5]
    capsys.readouterr()
    with monkeypatch.context() as patched:
        calls = dies_after(patched, 9)
        assert main(["eval", *names, *EVAL, "--out", str(out)]) == 0
        assert calls == [0.6, 0.3, None]
    said = capsys.readouterr().err
    assert f"{names[0]}: continuing an evaluation that was interrupted; 5 parts are done" in said
    assert f"{names[1]}: continuing an evaluation that was interrupted; 2 parts are done" in said
    assert read(out) == read(whole)
    assert [row["model"] for row in read(out)] == names
    assert not list(cache.rglob("*.jsonl"))
    # One that was not interrupted adds its rows, as often as it is run.
    assert main(["eval", names[0], *EVAL, "--out", str(out)]) == 0
    assert read(out) == [*read(whole), read(whole)[0]]


def test_rows_written_just_before_a_kill_are_not_written_twice(tmp_path, cache, monkeypatch):
    names = [save_model(tmp_path / "one"), save_model(tmp_path / "two")]
    out = tmp_path / "rows.jsonl"
    for moment in ("before the parts are deleted", "after half of them are"):
        left = [1 if moment.startswith("after") else 0]

        def forget(parts, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            parts.path.unlink()

        with monkeypatch.context() as patched:
            patched.setattr(Parts, "forget", forget)
            assert main(["eval", *names, *EVAL, "--out", str(out)]) == 130
        written = read(out)
        assert main(["eval", *names, *EVAL, "--out", str(out)]) == 0
        assert read(out) == written
        assert not list(cache.rglob("*.jsonl"))
        out.unlink()


def test_other_weights_settings_or_rows_do_not_take_what_was_done(tmp_path, cache, monkeypatch, capsys):
    model = save_model(tmp_path / "model")
    (tmp_path / "mine.py").write_text("from task_cases import letters as task\n")
    base = ["eval", model, "--task", f"{tmp_path}/mine.py:task", "--k", "4", "--limit", "3"]

    def interrupted(*words):
        with monkeypatch.context() as patched:
            dies_after(patched, 1)
            assert main([*base, *words]) == 130

    def parts():
        return len(list(cache.rglob("*.jsonl")))

    interrupted()
    assert parts() == 1
    others = [["--k", "2"], ["--limit", "2"], ["--seed", "1"], ["--temperature", "0.9"], ["--also", "0.5"]]
    others += [["--max-completion-length", "3"], ["--dtype", "bfloat16"]]
    for words in others:
        before = parts()
        interrupted(*words)
        assert parts() == before + 1, words
    before = parts()
    (tmp_path / "mine.py").write_text("from task_cases import letters as task  # judged otherwise\n")
    interrupted()
    assert parts() == before + 1
    weights = tmp_path / "model" / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    interrupted()
    assert parts() == before + 2
    assert "continuing" not in capsys.readouterr().err
    interrupted()
    assert parts() == before + 2
    assert "1 parts are done" in capsys.readouterr().err


def test_an_evaluation_that_was_killed_continues(tmp_path, cache):
    """SIGKILL once the first parts are written; the same command ends with the row of one that was not killed."""
    model, whole, out = save_model(tmp_path / "model"), tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    words = ["eval", model, "--task", "expr", "--k", "16", "--limit", "150", "--also", "1.4", "1.2", "0.8", "--out"]
    assert main([*words, str(whole)]) == 0
    helpers = Path(__file__).parents[1] / "helpers"
    path = os.pathsep.join([str(helpers), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "isentropic.cli", *words, str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
    )
    began = time.monotonic()
    while not (done := list(cache.rglob("*.jsonl"))) or len(done[0].read_text().splitlines()) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < 300
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    (kept,) = cache.rglob("*.jsonl")
    assert 2 <= len(kept.read_text().splitlines()) < 15
    assert main([*words, str(out)]) == 0
    assert read(out) == read(whole)
    assert not list(cache.rglob("*.jsonl"))


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
    progress(10, 10, 200)
    assert said[1].startswith("m: 10/10 completions")


def test_progress_says_nothing_of_what_is_over_in_a_moment():
    said = []
    progress = Progress("m", said.append)
    progress(5, 10, 100)
    progress(10, 10, 200)
    assert not said
    assert progress.speed > 0


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
    flags = ["--task", "expr", "--k", "4", "--limit", "6", "--out", str(out)]
    assert main(["eval", model, str(tmp_path / "run"), *flags]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path / 'run'} step 8" in text
    assert all(name in text for name in ("pass@4", "majority", "greedy", "truncated"))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["dtype"] for row in rows] == ["float32", "float32"]
    assert [row["step"] for row in rows] == [None, 8]
    assert len(rows[0]["num_correct"]) == len(rows[0]["greedy_correct"]) == 6
    assert list(rows[0]["at"]) == ["1.5", "0.6", "0.3"]
    assert main(["eval", model, *flags[:6], "--also", "0.5", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["num_correct"] == rows[0]["num_correct"]
    assert row["greedy_correct"] == rows[0]["greedy_correct"]
    assert list(row["at"]) == ["0.5"]


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
        (["MODEL", "--task", "expr", "--temperature", "0"], "--temperature: got 0.0, must be > 0"),
        (["MODEL", "--task", "expr", "--also", "0.5", "0"], "--also: got 0.0, must be > 0"),
        (["MODEL", "--task", "expr", "--also", "nan"], "--also: got nan, must be > 0"),
        (["HEADLESS", "--task", "expr"], "is a Qwen3Model, which has no causal head"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(names, says, tmp_path, capsys, monkeypatch):
    model = save_model(tmp_path / "model")
    (tmp_path / "headless").mkdir()
    (tmp_path / "headless" / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3Model"]}')
    monkeypatch.setattr(module, "load_weights", lambda *args: pytest.fail("a model was loaded"))
    words = {"MODEL": model, "HEADLESS": str(tmp_path / "headless")}
    capsys.readouterr()  # of saving the model
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
