"""Automatic targets in TRL: the facts that they read, what is written of them, and runs that are continued."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
from trl_case import AUTO, make, same, weights

from isentropic.control.thermostat import to_json
from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
from isentropic.runs.record import Record

HELPERS = Path(__file__).parents[2] / "helpers"


def right_if_short(completions, **columns):
    """Right or wrong."""
    return [float(sum(c.isdigit() for c in text) in (1, 2)) for text in completions]


def trainer_of(out, **settings):
    return make(IsentropicTrainer, IsentropicConfig, out, 8, reward=right_if_short, **{**AUTO, **settings})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("whole"))
    trainer.loop.tell_held_out(3.0, 4.0)
    trainer.train()
    return trainer


def test_a_run_is_told_of_its_groups_and_says_why_its_target_moved(whole):
    rows = whole.record.rows("metrics")
    for row in rows:
        shares = [row[f"group/{name}_frac"] for name in ("failed", "mixed", "solved")]
        assert sum(shares) == pytest.approx(1.0)
        assert 0 < row["group/distinct_frac"] <= 1
        assert 0 <= row["group/repeats_frac"] < 1
    # All completions of a batch, over its steps: their mean reward is TRL's, and so is the share of equal groups.
    batch = rows[:2]
    equal = sum(row["group/failed_frac"] + row["group/solved_frac"] for row in batch) / len(batch)
    assert equal == pytest.approx(batch[0]["reward/zero_std_frac"])
    assert rows[0]["entropy/target_why"] == "measuring the start"
    assert rows[3]["entropy/target_why"].split(":")[0] in ("raised", "lowered", "held", "held at its ceiling")
    assert rows[-1]["entropy/target_why"].startswith("let down: 100% of the way")
    start = rows[0]["entropy/mean"]
    assert len({row["entropy/target"] for row in rows[:6]}) > 1
    assert rows[5]["entropy/target"] / start > 2 * rows[7]["entropy/target"] / start
    assert whole.loop.state.target.inner.readings == 8


def test_held_out_accuracy_reaches_the_target_once(whole):
    """Told before the first step, which measures the start; the second step must not hear it again."""
    assert whole.loop.take_held_out() == (0.0, 0.0)
    trainer = whole.loop
    trainer.tell_held_out(1.0, 2.0)
    trainer.tell_held_out(1.0, 2.0)
    assert trainer.as_dict()["held_out"] == [2.0, 4.0]
    assert trainer.take_held_out() == (2.0, 4.0)
    assert trainer.take_held_out() == (0.0, 0.0)


def test_it_continues_from_a_checkpoint_bit_for_bit(whole, tmp_path):
    again = trainer_of(whole.args.output_dir)
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-4"))
    assert same(weights(again), weights(whole))
    assert to_json(again.loop.state) == to_json(whole.loop.state)


def test_two_processes_continue_bit_for_bit(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    script = [str(HELPERS / "trl_case.py"), str(tmp_path), "resumed"]
    done = subprocess.run([*launch, *script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [json.loads((tmp_path / f"ends-{rank}.json").read_text()) for rank in (0, 1)]
    assert ends[0] == ends[1]
    whole, resumed = ends[0]
    assert whole == resumed
    assert whole["state"]["target"]["inner"]["readings"] == 8
    rows = Record(tmp_path / "run").rows("metrics")
    assert all(math.isfinite(row["price/nat"]) for row in rows if row["group/mixed_frac"])
