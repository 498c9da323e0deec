"""The lock of a run directory: one owner, a dead one's is taken over, and nothing is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from isentropic.runs import lock
from isentropic.runs.lock import LOCK_FILE, held, owner_of

HOLD = """
import sys, time
from isentropic.runs.lock import held
with held(sys.argv[1]):
    print(1, flush=True)
    time.sleep(60)
"""
TAKE_TURNS = """
import os, sys, time
from isentropic.runs.lock import held
turns = 0
while turns < 20:
    try:
        with held(sys.argv[1]):
            os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL))  # fails if another one is inside
            time.sleep(0.002)
            os.remove(sys.argv[2])
            turns += 1
    except ValueError:
        time.sleep(0.001)
"""


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"1\n"
    return process


def test_another_process_is_refused_until_the_owner_is_dead(tmp_path):
    process = holder(tmp_path / "run")
    try:
        assert owner_of(tmp_path / "run")["host"] == socket.gethostname()
        with (
            pytest.raises(ValueError, match=f"in use by the run of process {process.pid} on") as refused,
            held(tmp_path / "run"),
        ):
            pass
        assert "\n" not in str(refused.value)
        assert owner_of(tmp_path / "run")["pid"] == process.pid  # asking changed nothing
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with held(tmp_path / "run"):
        assert owner_of(tmp_path / "run")["pid"] == os.getpid()
        with held(tmp_path / "run"):  # one process may ask twice
            pass
        assert owner_of(tmp_path / "run")["pid"] == os.getpid()
    assert not (tmp_path / "run").exists()


def test_a_directory_with_something_in_it_stays(tmp_path):
    with held(tmp_path / "run"):
        (tmp_path / "run" / "run.json").write_text("{}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_a_lock_file_that_cannot_be_read_is_taken_over(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    with held(tmp_path):
        assert owner_of(tmp_path)["pid"] == os.getpid()


def test_of_many_one_is_inside_at_a_time(tmp_path):
    command = [sys.executable, "-c", TAKE_TURNS, str(tmp_path / "run"), str(tmp_path / "inside")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err.decode()


@pytest.mark.parametrize(
    ("owner", "taken"),
    [
        ({"pid": 2**22 + 1, "host": socket.gethostname(), "started": 1}, True),  # no such process
        ({"pid": os.getppid(), "host": socket.gethostname(), "started": -1}, True),  # its number was given again
        ({"pid": os.getppid(), "host": socket.gethostname(), "started": lock._started(os.getppid())}, False),
        ({"pid": 1, "host": "another"}, False),
    ],
)
def test_without_locks_of_the_file_system_the_file_decides(tmp_path, monkeypatch, owner, taken):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    (tmp_path / LOCK_FILE).write_text(json.dumps(owner))
    if taken:
        with held(tmp_path):
            assert owner_of(tmp_path)["pid"] == os.getpid()
        return
    with pytest.raises(ValueError, match="in use by the run of process"), held(tmp_path):
        pass


def test_a_child_that_outlives_the_run_does_not_hold_its_lock(tmp_path):
    """A worker of a data loader or an environment is a fork of the run."""
    code = HOLD.replace(
        "    time.sleep(60)", "    import os\n    if os.fork() == 0:\n        time.sleep(20)\n    os._exit(0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    process.wait(timeout=30)
    began = time.monotonic()
    with held(tmp_path):
        assert time.monotonic() - began < 5
