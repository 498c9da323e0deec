"""The live view: pictures of run directories, a real terminal, and mistakes."""

import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
from fcntl import ioctl

import pytest
from rich.console import Console
from run_fixture import FINDINGS, make_run

from isentropic.cli import main
from isentropic.report import watch
from isentropic.runs.record import Record

COMMAND = [sys.executable, "-m", "isentropic.cli", "watch"]


def picture(path, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(watch.frame(watch.Snapshot(path), width))
    return console.export_text()


def test_a_frame_holds_what_a_person_watches(tmp_path):
    text = picture(make_run(tmp_path / "run", steps=60, ended=False))
    for words in ("isentropic on expr, seed 0", "step 60/120", "eta 0:06", "target 0.800", "reward", "knob", "running"):
        assert words in text
    assert "serious: log-probabilities in bfloat16" in text
    assert text.index("serious") < text.index("note: the head")
    assert "•" in text
    assert "◆" in text or "─" in text


@pytest.mark.parametrize("width", [20, 60, 200])
def test_a_frame_fits_any_width(tmp_path, width):
    text = picture(make_run(tmp_path / "run", steps=60), width)
    assert max(map(len, text.splitlines())) <= width


def test_what_a_model_wrote_does_not_reach_the_terminal(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    text = picture(run)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "␛[31mred" in text


def test_a_finished_a_silent_and_an_empty_run(tmp_path):
    assert "finished" in picture(make_run(tmp_path / "ended", steps=30))
    silent = make_run(tmp_path / "silent", steps=30, ended=False, full=False)
    os.utime(silent / "metrics.jsonl", (time.time() - 600,) * 2)
    assert "silent for 10:0" in picture(silent)
    Record(tmp_path / "empty").start({"steps": 5}, {}, 0)
    assert "no step yet" in picture(tmp_path / "empty")
    assert "waiting for" in picture(tmp_path / "nothing")


def test_a_row_that_is_being_written_is_left_for_later(tmp_path):
    run = make_run(tmp_path / "run", steps=30, full=False, ended=False)
    with (run / "metrics.jsonl").open("ab") as rows:
        rows.write('{"step": 31, "note": "é'.encode()[:-1])
    assert "step 30/60" in picture(run)


def test_time_left_after_a_resume_is_by_the_new_pace():
    rows = [{"step": s, "seconds": 10.0 * s} for s in (1, 2, 3)]
    rows += [{"step": s, "seconds": 1.0 * (s - 3)} for s in (4, 5, 6)]
    assert watch.time_left(rows, 16) == pytest.approx(10)
    assert watch.time_left(rows[:1], 16) is None


def test_a_watched_run_is_left_alone(tmp_path):
    run = make_run(tmp_path / "run", steps=30)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()}
    picture(run)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()}


def test_once_prints_and_ends(tmp_path):
    run = make_run(tmp_path / "run", steps=30)
    done = subprocess.run([*COMMAND, run, "--once"], capture_output=True, text=True, check=True, timeout=20)
    assert "step 30/30" in done.stdout
    assert "\x1b" not in done.stdout


def heed_ctrl_c():
    """A shell starts what runs in its background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`isentropic watch` in a pseudo-terminal."""

    def __init__(self, *argv):
        self.outer, inner = pty.openpty()
        ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.before = termios.tcgetattr(inner)
        self.inner, self.text = inner, ""
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}
        pipes = {"stdin": inner, "stdout": inner, "stderr": inner}
        self.process = subprocess.Popen([*COMMAND, *argv], **pipes, env=environment, preexec_fn=heed_ctrl_c)

    def until(self, text, seconds=30):
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, f"{text!r} did not appear; the end of the output: {self.text[-2000:]!r}"
            if select.select([self.outer], [], [], 0.2)[0]:
                self.text += os.read(self.outer, 65536).decode(errors="replace")

    def press(self, keys):
        os.write(self.outer, keys)

    def end(self, seconds=20):
        """The exit code; output is read until then."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.outer], [], [], 0.1)[0]:
                self.text += os.read(self.outer, 65536).decode(errors="replace")
        assert termios.tcgetattr(self.inner) == self.before
        return self.process.poll()


def test_a_terminal_follows_a_run_from_before_it_begins_until_q(tmp_path):
    screen = Terminal(str(tmp_path / "run"))
    screen.until("waiting for")
    run = make_run(tmp_path / "run", steps=30, ended=False)
    screen.until("step 30/60")
    Record(run).append("metrics", {"step": 31, "seconds": 3.1, "entropy/mean": 0.8, "entropy/target": 0.8})
    screen.until("step 31/60")
    (run / "summary.json").write_text("{}")
    screen.until("finished")
    assert screen.process.poll() is None
    screen.press(b"xq")
    assert screen.end() == 0
    assert screen.text.count("\x1b[?1049h") == screen.text.count("\x1b[?1049l") == 1


def test_ctrl_c_leaves_the_terminal_as_it_was(tmp_path):
    screen = Terminal(str(make_run(tmp_path / "run", steps=30)))
    screen.until("finished")
    screen.process.send_signal(2)
    assert screen.end() == 0


def test_a_closed_terminal_ends_it(tmp_path):
    screen = Terminal(str(make_run(tmp_path / "run", steps=30)))
    screen.until("finished")
    os.close(screen.inner)
    os.close(screen.outer)
    screen.process.wait(timeout=20)


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return answer.read().decode()


def test_serve_answers_on_the_loopback_address_alone(tmp_path):
    run = make_run(tmp_path / "run", steps=30, ended=False)
    with watch.Server(run) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        assert server.server_address[0] == "127.0.0.1"
        first = get(server.url)
        mark = json.loads(get(f"{server.url}mark"))["mark"]
        assert f'data-live="{mark}"' in first
        Record(run).append("metrics", {"step": 31, "entropy/mean": 0.8})
        assert json.loads(get(f"{server.url}mark"))["mark"] != mark
        assert "step 31 of 60" in get(server.url)
        for url, headers, status in (
            (f"{server.url}run.json", {}, 404),
            (f"{server.url}../run.json", {}, 404),
            (server.url, {"Host": "elsewhere.example"}, 403),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(url, **headers)
            assert refused.value.code == status
        server.shutdown()
        thread.join()


def test_serve_by_command_ends_by_ctrl_c(tmp_path):
    run = make_run(tmp_path / "run", steps=30)
    command = [*COMMAND, run, "--serve"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    process.send_signal(2)
    assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["{dir}/file"], "is a file, not a run directory"),
        (["{dir}/no/where"], "no run can start there"),
        (["{dir}"], "but has other files"),
        (["{dir}/rnu"], "did you mean {dir}/run?"),
        (["{dir}/run", "--port", "1"], "--port belongs to --serve"),
        (["{dir}/run", "--serve", "--port", "70000"], "must be from 0 to 65535"),
        (["{dir}/run", "--serve", "--once"], "leave one out"),
        ([], "RUN"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, argv, says):
    (tmp_path / "file").touch()
    make_run(tmp_path / "run", steps=2, full=False)
    began = time.process_time()
    with pytest.raises(SystemExit) as stop:
        main(["watch", *[word.format(dir=tmp_path) for word in argv], *(["--once"] if "rnu" in str(argv) else [])])
    assert time.process_time() - began < 2
    text = capsys.readouterr().err
    assert (stop.value.code, len(text.splitlines())) == (2, 1)
    assert says.format(dir=tmp_path) in text


def test_a_taken_port_is_named(tmp_path):
    run = make_run(tmp_path / "run", steps=2, full=False)
    with watch.Server(run) as server, pytest.raises(ValueError, match="0 takes a free one"):
        watch.Server(run, server.server_address[1])


def test_without_rich_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(SystemExit) as stop:
        main(["watch", str(make_run(tmp_path / "run", steps=2, full=False))])
    assert (stop.value.code, "pip install 'isentropic[cli]'" in capsys.readouterr().err) == (2, True)


def test_importing_it_needs_no_torch():
    code = "import sys, isentropic.report.watch; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_fixture_has_a_serious_finding_that_is_not_first():
    assert [finding["severity"] for finding in FINDINGS] == ["note", "serious"]
