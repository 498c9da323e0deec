"""A whole run from the command line: a custom task, a local model, the closing table, and its evaluation."""

import json
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")
from trl_case import save_model

from isentropic.cli import main
from isentropic.experiments import train as module
from isentropic.experiments.config import load
from isentropic.experiments.evaluate import evaluate
from isentropic.experiments.origin import origin
from isentropic.experiments.train import train
from isentropic.experiments.trainer import Checkpoints
from isentropic.runs.frontier import best_step
from isentropic.runs.record import Record
from isentropic.runs.summary import closing_table


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
        "entropy (nats per token)",
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
    text = capsys.readouterr().out
    assert f"{last['pass@1']:.3f} (" in text
    assert f"{last['distinct']:.2f}" in text
    assert main(["eval", str(run.path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    for name in ("num_correct", "num_distinct", "greedy_correct", "at", "pass@4", "task", "k", "temperature"):
        assert row[name] == last[name]
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


SMALL = "--task task_cases:letters --prompts 4 --generations 4 --updates 2 --eval-k 2 --audit off --recipe loop".split()
SMALL += "--knob zeta --target 80% --learning-rate 1e-3 --steps 10 --keep 9".split()


def without_seconds(record, name="metrics"):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in record.rows(name)]


@pytest.fixture(scope="module")
def along(tmp_path_factory):
    """A run that is evaluated every four steps, with no other checkpoint, and the same one without."""
    home = tmp_path_factory.mktemp("along")
    model = save_model(home / "model")
    for name, flags in (("with", ["--eval-every", "4", "--save-every", "0"]), ("without", ["--save-every", "4"])):
        assert main(["train", "--model", model, *SMALL, *flags, "--out", str(home / name)]) == 0
    return Record(home / "with"), Record(home / "without")


def test_evaluations_along_a_run_have_checkpoints_and_change_nothing(along):
    run, other = along
    rows = run.rows("evaluations")
    assert [row["step"] for row in rows] == [0, 4, 8, 10]
    assert [step for step, _ in run.checkpoints()] == [4, 8, 10]
    assert [list(row["at"]) for row in rows] == [["1.5", "0.6", "0.3"]] * 4
    assert all(len(row["greedy_correct"]) == 6 for row in rows)
    assert without_seconds(run) == without_seconds(other)
    assert [rows[0], rows[-1]] == other.rows("evaluations")
    weights, others = (record.path / "checkpoint-10" / "model.safetensors" for record in along)
    assert weights.read_bytes() == others.read_bytes()


def test_a_resumed_run_repeats_no_evaluation(along, tmp_path, monkeypatch):
    run, _ = along
    for kept in (4, 8):
        out = tmp_path / f"from-{kept}"
        shutil.copytree(run.path, out)
        again = Record(out)
        for step, path in again.checkpoints():
            if step > kept:
                shutil.rmtree(path)
        (out / "summary.json").unlink()
        evaluated = []

        def count(model, tokenizer, task, *args, evaluated=evaluated, **more):
            evaluated.append(task.name)
            return evaluate(model, tokenizer, task, *args, **more)

        with monkeypatch.context() as patched:
            patched.setattr(module, "evaluate", count)
            assert main(["train", "--resume", "--out", str(out)]) == 0
        assert len(evaluated) == {4: 2, 8: 1}[kept]
        assert again.rows("evaluations") == run.rows("evaluations")
        assert without_seconds(again) == without_seconds(run)


def test_the_checkpoint_of_the_best_evaluation_stays(along, tmp_path):
    shutil.copytree(along[0].path, tmp_path / "run")
    run = Record(tmp_path / "run")
    rows = run.rows("evaluations")
    for row in rows:
        for counts in (row, *row["at"].values()):
            counts["num_correct"] = [2 if row["step"] == 4 else 0] * 6
    (run.path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args, state = (SimpleNamespace(**x) for x in ({"output_dir": run.path}, {"global_step": 10}))
    state.is_world_process_zero = True
    Checkpoints(1).on_save(args, state, None)
    assert [step for step, _ in run.checkpoints()] == [4, 10]


def test_the_summary_has_the_best_evaluation(along):
    run, other = along
    best = json.loads((run.path / "summary.json").read_text())["best"]
    assert best["step"] in (4, 8, 10)
    assert best == best_step([row for row in run.rows("evaluations") if row["step"]])._asdict()
    assert "best" not in json.loads((other.path / "summary.json").read_text())


def test_the_header_has_the_origin_of_the_numbers(along):
    run, other = along
    assert run.header()["origin"] == other.header()["origin"] == origin(run.header()["config"])


def test_a_task_without_rows_to_train_on_is_one_line_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "aime24.jsonl").write_text('{"problem": "Three digits?", "answer": "025"}\n')
    task = f"aime24:path={tmp_path}:prompt=plain"
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model", save_model(tmp_path / "model"), "--task", task, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no rows to train on" in error
    assert not (tmp_path / "out" / "run.json").exists()


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
