"""A whole run from the command line: a custom task, a local model, the closing table, and its evaluation."""

import json

import pytest

pytest.importorskip("trl")
from trl_case import save_model

from isentropic.cli import main
from isentropic.experiments.config import load
from isentropic.experiments.terminal import closing_table
from isentropic.experiments.train import train
from isentropic.runs.record import Record


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("run")
    model = save_model(home / "model")
    config = home / "run.toml"
    config.write_text(f'model = "{model}"\ntask = "task_cases:letters"\nsteps = 24\neval_k = 4\nsave_every = 8\n')
    flags = ["--prompts", "4", "--generations", "8", "--out", str(home / "out"), "--learning-rate", "1e-3"]
    flags += ["--recipe", "dapo", "--knob", "beta", "--target", "90%"]
    assert main(["train", str(config), *flags]) == 0
    return Record(home / "out")


def test_the_run_directory_holds_everything(run):
    header = run.header()
    assert header["config"]["steps"] == 24
    assert header["config"]["prompts"] == 4
    assert header["recipe"]["knob"] == "beta"
    assert {"trl", "torch", "isentropic"} <= set(header["versions"])
    assert [row["step"] for row in run.rows("metrics")] == list(range(1, 25))
    assert [step for step, _ in run.checkpoints()] == [16, 24]
    first, last = run.rows("evaluations")
    assert (first["step"], last["step"]) == (0, 24)
    assert set(last) >= {"pass@1", "pass@2", "pass@4", "distinct", "num_correct", "num_samples", "prompts"}
    assert last["pass@1"] == pytest.approx(sum(last["num_correct"]) / 24)
    assert {s["step"] for s in run.rows("samples")} == {1, 5, 9, 13, 17, 21}


def test_the_summary_is_what_the_rows_say(run):
    rows = run.rows("metrics")
    summary = json.loads((run.path / "summary.json").read_text())
    settled = [(r["entropy/mean"] / r["entropy/target"] - 1) ** 2 for r in rows if r["step"] > 20]
    assert summary["entropy/rms_error"] == pytest.approx((sum(settled) / len(settled)) ** 0.5)
    assert summary["entropy/target"] == pytest.approx(0.9 * rows[0]["entropy/mean"])
    text = closing_table(summary, "out")
    for name in (
        "entropy (nats a token)",
        "RMS entropy error after 20 steps",
        "pass@1",
        "pass@4",
        "distinct",
        "seconds",
    ):
        assert name in text
    assert "knob at its bound" not in closing_table({**summary, "knob/saturated": 0.0}, "out")
    assert "knob at its bound" in closing_table({**summary, "knob/saturated": 0.5}, "out")


def test_eval_recomputes_from_a_checkpoint(run, capsys):
    last = run.rows("evaluations")[-1]
    assert main(["eval", str(run.path)]) == 0
    *rows, note = capsys.readouterr().out.splitlines()
    assert "the intervals of rates near 0 or 1 are too narrow" in note
    shown = dict(row.split(maxsplit=1) for row in rows)
    assert shown["pass@1"].startswith(f"{last['pass@1']:.3f} (")
    assert shown["distinct"] == f"{last['distinct']:.3f}"
    assert len({len(row) - len(row.split(maxsplit=1)[1]) for row in rows}) == 1  # a column
    assert main(["eval", str(run.path), "--step", "16", "--k", "8"]) == 0
    assert "pass@8" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["eval", str(run.path), "--step", "3"])
    assert "checkpoints are at 16, 24" in capsys.readouterr().err


def test_a_task_that_cannot_be_imported_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--task", "no_such_package.module:task", "--out", str(tmp_path / "a")])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_save_every_0_keeps_the_last_checkpoint(tmp_path):
    model = save_model(tmp_path / "model")
    flags = ["--model", model, "--steps", "6", "--save-every", "0", "--eval-k", "0", "--prompts", "4"]
    assert main(["train", *flags, "--generations", "8", "--out", str(tmp_path / "out")]) == 0
    assert [step for step, _ in Record(tmp_path / "out").checkpoints()] == [6]


@pytest.mark.parametrize("fails", [False, True])
def test_a_report_that_fails_does_not_fail_the_run(tmp_path, fails):
    flags = {"steps": 2, "prompts": 2, "generations": 4, "updates": 2, "eval_k": 0, "audit": "off", "stop_above": 0.0}
    model = save_model(tmp_path / "model")
    config = load(None, {**flags, "model": model, "task": "task_cases:letters", "out": str(tmp_path / "out")})

    def write_report(record):
        if fails:
            raise OSError("no space left")
        return record.path / "page.html"

    said = []
    assert train(config, say=said.append, write_report=write_report)["steps"] == 2
    assert said[-1] == ("no report: no space left" if fails else f"report: {tmp_path}/out/page.html")
