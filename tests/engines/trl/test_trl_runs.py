"""Runs that stop and go on, and runs of two processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
from trl_case import make, same, save_model, weights

from isentropic.cli import main
from isentropic.control.thermostat import to_json
from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
from isentropic.entropy.prediction import predicted_change
from isentropic.entropy.statistics import logits_stats
from isentropic.runs.record import Record

HELPERS = Path(__file__).parents[2] / "helpers"
SETTINGS = {"recipe": "repo-r-loop", "save_strategy": "steps", "save_steps": 4, "recipe_options": {"every": 1}}


def controlled(out, steps, **settings):
    return make(IsentropicTrainer, IsentropicConfig, out, steps, **{**SETTINGS, **settings})


@pytest.mark.parametrize("recipe", ["repo-r-loop", "aepo"])
def test_save_stop_and_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, recipe):
    straight = controlled(tmp_path / "a", 12, recipe=recipe)
    straight.train()
    first = controlled(tmp_path / "b", 8, recipe=recipe)
    first.train()
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "entropy/mean": 0.0}\n{"step": 10, "entr')
    second = controlled(tmp_path / "b", 12, recipe=recipe)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-8"))
    assert same(weights(straight), weights(second))
    assert to_json(straight.loop.state) == to_json(second.loop.state)
    drop = {"seconds"}
    rows = [
        [{k: v for k, v in r.items() if k not in drop} for r in t.record.rows("metrics")] for t in (straight, second)
    ]
    assert rows[0] == rows[1]
    assert straight.record.rows("samples") == second.record.rows("samples")


def test_a_changed_target_starts_the_controller_afresh_and_says_so(tmp_path, caplog):
    controlled(tmp_path, 4).train()
    other = controlled(tmp_path, 8, target="1.0")
    other.train(resume_from_checkpoint=True)
    assert "target changed since the checkpoint" in caplog.text


def test_a_checkpoint_without_our_state_is_told(tmp_path, caplog):
    controlled(tmp_path, 4).train()
    (tmp_path / "checkpoint-4" / "isentropic.json").unlink()
    assert Record(tmp_path).checkpoints() == []
    controlled(tmp_path, 8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "the controller starts anew" in caplog.text


def _command(model, out, *more):
    command = [sys.executable, "-m", "isentropic.cli", "train", "--model", model, "--steps", "40", "--save-every", "8"]
    command += ["--out", str(out), "--eval-k", "0", "--prompts", "8", "--generations", "8", "--learning-rate", "1e-3"]
    return [*command, *more]


def _wait_for_step(out, step, process, seconds=120.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        rows = Record(out).rows("metrics")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: exit code {process.poll()}")


def _final_weights(out):
    from safetensors.torch import load_file

    return load_file(out / "checkpoint-40" / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    model = save_model(home / "model")
    done = subprocess.run(_command(model, home / "straight"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return model, _final_weights(home / "straight"), done.stdout


def test_a_run_prints_a_line_a_step_and_a_table(uninterrupted):
    lines = uninterrupted[2].splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 40
    assert "eta" in steps[0]
    assert "reward" in steps[3]
    assert "(target" in steps[3]
    assert "zeta" in steps[3]
    assert "clip" in steps[3]
    assert any("RMS entropy error after 20 steps" in line for line in lines)
    assert lines[-1].startswith("run directory:")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_resumes_and_ends_where_the_uninterrupted_one_does(uninterrupted, tmp_path, number):
    model, expected, _ = uninterrupted
    out = tmp_path / "run"
    process = subprocess.Popen(_command(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _wait_for_step(out, 18, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    saved = [step for step, _ in Record(out).checkpoints()]
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert 16 in saved
    else:
        assert process.returncode == 130
        assert "resume with: isentropic train --out" in errors
        # Saved at the end of the generated batch it was in, not at the multiple of 8 before it.
        assert saved[-1] % 4 == 0
        assert saved[-1] >= 20
    resumed = [sys.executable, "-m", "isentropic.cli", "train", "--out", str(out), "--resume"]
    done = subprocess.run(resumed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = _final_weights(out)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert [row["step"] for row in Record(out).rows("metrics")] == list(range(1, 41))


def test_resuming_a_run_that_has_ended_takes_no_step(tmp_path, capsys):
    out = tmp_path / "run"
    flags = "--steps 4 --save-every 4 --prompts 4 --generations 4 --eval-k 2 --eval-rows 4 --audit off"
    assert main(["train", "--model", save_model(tmp_path / "model"), "--out", str(out), *flags.split()]) == 0
    rows, end = Record(out).rows("metrics"), Record(out).rows("evaluations")[-1]
    (out / "evaluations.jsonl").write_text("")
    (out / "summary.json").unlink()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert Record(out).rows("metrics") == rows
    # The weights are those of the checkpoint: the same answers are counted.
    assert Record(out).rows("evaluations") == [end]
    assert json.loads((out / "summary.json").read_text())["steps"] == 4


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(_free_port()),
    ]
    environment = {**os.environ, "PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(HELPERS / "trl_case.py"), str(out)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_two_processes_hold_one_controller_state(two_ranks):
    states = [json.loads((two_ranks / f"state-{rank}.json").read_text()) for rank in (0, 1)]
    assert states[0]["world"] == 2
    assert states[0] == states[1]
    assert states[0]["state"]["target"]["readings"] == 8
    assert [row["step"] for row in Record(two_ranks).rows("metrics")] == list(range(1, 9))


def test_two_processes_read_what_one_reads_on_the_joined_batch(two_ranks, tmp_path):
    """Two ranks x two accumulated micro-batches, uneven lengths, against one forward pass over all of it."""
    micro = [batch for rank in (0, 1) for batch in torch.load(two_ranks / f"seen-{rank}.pt")]
    assert len(micro) == 4

    def joined(name, left):
        width = max(batch[name].shape[1] for batch in micro)
        pads = [(width - b[name].shape[1], 0) if left else (0, width - b[name].shape[1]) for b in micro]
        return torch.cat([torch.nn.functional.pad(b[name], p) for b, p in zip(micro, pads, strict=True)])

    ids = torch.cat([joined("prompt_ids", True), joined("completion_ids", False)], 1)
    mask = joined("completion_mask", False)
    attention = torch.cat([joined("prompt_mask", True), mask], 1)
    trainer = controlled(tmp_path, 1, save_strategy="no")
    with torch.no_grad():
        _, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, mask.shape[1], compute_entropy=True
        )
    row = Record(two_ranks).rows("metrics")[0]
    assert len(set(mask.sum(1).tolist())) > 1
    assert row["entropy/tokens"] == mask.sum().item()
    assert row["entropy/mean"] == pytest.approx(((entropy * mask).sum() / mask.sum()).item(), abs=1e-6)
    # What is predicted adds up too: the first step is on-policy and unshaped, so w = A / (tokens of one step).
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -mask.shape[1] - 1 : -1]
    stats = logits_stats(logits.double(), joined("completion_ids", False))
    weight = torch.cat([b["advantages"] for b in micro])[:, None] * mask / (micro[0]["num_items_in_batch"] / 2)
    change = predicted_change(weight, stats.logp, stats.entropy, stats.sum_p2, stats.sum_p2_logp).sum()
    assert row["predict/change"] == pytest.approx(change.item() * row["learning_rate"], rel=1e-4)
