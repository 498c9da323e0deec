"""Whatever happens to a run: what it wrote stays whole, and the same command continues it. More in tests/faults.py."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
import safetensors.torch
import torch
from trl_case import save_model

from isentropic.cli import main
from isentropic.runs.checkpoints import MANIFEST, damage
from isentropic.runs.lock import LOCK_FILE
from isentropic.runs.record import Record

CAMPAIGN = Path(__file__).parents[1] / "faults.py"
FLAGS = "--task task_cases:letters --steps 8 --prompts 4 --generations 4 --eval-k 2 --eval-rows 2 --audit off".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def train(model, out, *more):
    return main(["train", "--model", model, *FLAGS, "--save-every", "4", "--out", str(out), *more])


@pytest.mark.slow
def test_a_part_of_the_fault_campaign():
    kinds = "train,then,eval,truncated,twice,disk_full"
    command = [sys.executable, str(CAMPAIGN), "--moments", "2", "--only", kinds, "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    held, num = re.search(r"^all +(\d+) of (\d+)$", done.stdout, re.MULTILINE).groups()
    assert held == num
    assert int(num) >= 12


def test_resume_begins_where_nothing_was_begun_and_then_continues(model, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("cell.toml", "log.txt", LOCK_FILE, ".run.json.123"):  # a grid's files, and what a kill left
        (out / name).write_text("")
    assert train(model, out, "--resume") == 0
    said = capsys.readouterr().out.splitlines()
    assert sum("there is no run in" in line for line in said) == 1
    first = Record(out).rows("metrics")
    assert not (out / LOCK_FILE).exists()
    # The same line of a job script, with the settings in a file: the run that is there is continued.
    (tmp_path / "run.toml").write_text(f'model = "{model}"\ntask = "task_cases:letters"\n')
    assert main(["train", str(tmp_path / "run.toml"), "--resume", "--out", str(out)]) == 0
    assert "there is no run in" not in capsys.readouterr().out
    assert Record(out).rows("metrics") == first


def test_a_run_in_use_is_refused_and_left_as_it_is(model, tmp_path, capsys):
    folder = str(tmp_path / "run")
    code = f"from isentropic.runs.lock import held\nwith held({folder!r}):\n    print(1, flush=True); input()"
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"1\n"
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit) as stop:
            train(model, tmp_path / "run", *more)
        err = capsys.readouterr().err
        assert (stop.value.code, len(err.splitlines())) == (2, 1)
        assert f"in use by the run of process {owner.pid}" in err
    owner.communicate(b"\n")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_answers_for_the_directory(tmp_path, monkeypatch, rank):
    """The others of a run would find what the main one has just written."""
    from isentropic.cli.train import _claimed
    from isentropic.experiments.config import ConfigError, load

    monkeypatch.setenv("RANK", rank)
    Record(tmp_path / "run").start({}, {}, 0)
    config = load(None, {"out": str(tmp_path / "run")})
    if rank == "1":
        with _claimed(config, False) as claimed:
            assert claimed == config
        return
    with pytest.raises(ConfigError, match="already holds a run"), _claimed(config, False):
        pass


def test_two_runs_without_a_name_take_two_directories(tmp_path, monkeypatch):
    from isentropic.cli.train import _claimed
    from isentropic.experiments.config import load
    from isentropic.runs import lock

    monkeypatch.chdir(tmp_path)
    config = load(None, {})
    with _claimed(config, False) as first:
        assert first.out == "runs/expr-isentropic-s0"
        monkeypatch.setattr(lock, "_held", set())
        refused = OSError(errno.EAGAIN, "taken")
        native = lock.fcntl.lockf

        def lockf(file, flags):
            if "s0-2" not in file.name:
                raise refused
            return native(file, flags)

        monkeypatch.setattr(lock.fcntl, "lockf", lockf)
        with _claimed(config, False) as second:
            assert second.out == "runs/expr-isentropic-s0-2"


def test_a_damaged_checkpoint_is_passed_over_and_named(model, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(model, out, "--keep", "1") == 0
    assert [step for step, _ in Record(out).checkpoints()] == [8]
    assert damage(out / "checkpoint-8") is None
    sealed = set(json.loads((out / "checkpoint-8" / MANIFEST).read_text())["files"])
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "isentropic.json"} <= sealed
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in Record(out).rows("metrics")]
    (out / "checkpoint-8" / "optimizer.pt").write_bytes(b"")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["eval", str(out)])
    assert "checkpoint-8 is damaged: optimizer.pt has 0 of" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    line = "continuing from step 0, since no other checkpoint is complete; checkpoint-8: optimizer.pt has 0 of"
    assert said.count(line) == 1
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in Record(out).rows("metrics")] == rows


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def torch_says(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


def safetensors_says(*args, **kwargs):
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "name", "error"),
    [
        (torch, "save", full),
        (torch, "save", torch_says),
        (safetensors.torch, "save_file", safetensors_says),
        (Record, "append", full),
        (Record, "start", full),
    ],
    ids=["torch", "torch's own words", "safetensors", "rows", "run.json"],
)
def test_a_full_disk_is_one_line(model, tmp_path, capsys, monkeypatch, place, name, error):
    out = tmp_path / "run"
    native, calls = getattr(place, name), [0]

    def sometimes(*args, **kwargs):
        calls[0] += 1
        return native(*args, **kwargs) if calls[0] <= 6 and name == "append" else error()

    monkeypatch.setattr(place, name, sometimes)
    if name == "save_file":
        import transformers.modeling_utils as modeling

        monkeypatch.setattr(modeling, "safe_save_file", sometimes)
    assert train(model, out) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("isentropic:")]
    assert len(err) == 1
    assert "the disk is full" in err[0]
    assert Record(out).checkpoints() == []
    assert not (out / LOCK_FILE).exists()
    monkeypatch.undo()
    assert train(model, out, "--resume") == 0
    assert [row["step"] for row in Record(out).rows("metrics")] == list(range(1, 9))


def test_rows_before_a_full_disk_stay_whole(tmp_path):
    """/dev/full takes no byte: what a write left is cut off again."""
    run = Record(tmp_path)
    run.append("metrics", {"step": 1})

    class Full:
        def __init__(self, file):
            self.file, self.room = file, 5

        def truncate(self, size):
            return self.file.truncate(size)

        def write(self, content):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            part, self.room = content[: self.room], 0
            return self.file.write(part)

    from isentropic.runs import record

    with (tmp_path / "metrics.jsonl").open("a+b", buffering=0) as file, pytest.raises(OSError, match="No space"):
        record._add(Full(file), record._end_of_rows(file), b'{"step": 2}\n')
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_row_after_one_that_was_cut_short_is_not_lost(tmp_path):
    run = Record(tmp_path)
    run.append("evaluations", {"step": 0})
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 8, "task')
    run.append("evaluations", {"step": 8})
    assert (tmp_path / "evaluations.jsonl").read_text() == '{"step": 0}\n{"step": 8}\n'
