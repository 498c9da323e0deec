"""A whole run from the command line: a task of one's own, a local model, the table, and what eval makes of it."""

from types import SimpleNamespace

import pytest

pytest.importorskip("trl")
from trl_case import save_model

from isentropic.cli import main
from isentropic.experiments.train import summary, table
from isentropic.runs.record import Record
from isentropic.tasks import Task

letters = Task(
    name="letters",
    description="Start with a digit.",
    train=lambda seed: [{"prompt": f"{(seed + i) % 90 + 10}>", "digit": i % 10} for i in range(64)],
    heldout=lambda: [{"prompt": f"{i}>", "digit": i} for i in range(6)],
    verify=lambda completion, digit: completion[:1].isdigit(),
    normalise=lambda text: text[:1],
    max_completion_length=6,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("run")
    model = save_model(home / "model")
    config = home / "run.toml"
    config.write_text(f'model = "{model}"\ntask = "test_training:letters"\nsteps = 24\neval_k = 4\nsave_every = 8\n')
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
    result = summary(run, 1.0)
    settled = [(r["entropy/mean"] / r["entropy/target"] - 1) ** 2 for r in rows if r["step"] > 20]
    assert result["entropy/rms_error"] == pytest.approx((sum(settled) / len(settled)) ** 0.5)
    assert result["entropy/target"] == pytest.approx(0.9 * rows[0]["entropy/mean"])
    text = table(result, "out")
    for part in (
        "entropy (nats a token)",
        "RMS entropy error after 20 steps",
        "pass@1",
        "pass@4",
        "distinct",
        "seconds",
    ):
        assert part in text


def test_eval_recomputes_from_a_checkpoint(run, capsys):
    last = run.rows("evaluations")[-1]
    assert main(["eval", str(run.path)]) == 0
    text = capsys.readouterr().out
    shown = dict(row.split(maxsplit=1) for row in text.splitlines())
    assert shown["pass@1"].startswith(f"{last['pass@1']:.3f} (")
    assert shown["distinct"] == f"{last['distinct']:.3f}"
    assert len({len(row) - len(row.split(maxsplit=1)[1]) for row in text.splitlines()}) == 1  # a column
    assert main(["eval", str(run.path), "--step", "16", "--k", "8"]) == 0
    assert "pass@8" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["eval", str(run.path), "--step", "3"])
    assert "checkpoints are at 16, 24" in capsys.readouterr().err


def test_a_task_that_cannot_be_imported_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--task", "no_such_package.room:task", "--out", str(tmp_path / "a")])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch):
    import huggingface_hub

    from isentropic.experiments.config import ConfigError
    from isentropic.experiments.train import load_model

    def unreachable(self, name, timeout):
        raise OSError(f"no route to {name}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(ConfigError, match="no route to nobody/nothing"):
        load_model("nobody/nothing")


def test_a_knob_at_its_bound_is_told_in_the_table(run):
    result = summary(run, 1.0)
    assert "knob at its bound" not in table({**result, "knob/saturated": 0.0}, "out")
    assert "knob at its bound" in table({**result, "knob/saturated": 0.5}, "out")


def test_save_every_0_keeps_the_last_checkpoint(tmp_path):
    model = save_model(tmp_path / "model")
    flags = ["--model", model, "--steps", "6", "--save-every", "0", "--eval-k", "0", "--prompts", "4"]
    assert main(["train", *flags, "--generations", "8", "--out", str(tmp_path / "out")]) == 0
    assert [step for step, _ in Record(tmp_path / "out").checkpoints()] == [6]


@pytest.mark.parametrize(("told", "wanted"), [(None, (2, 1)), ("2", (2, 2))])
def test_a_tiny_model_takes_one_thread_unless_told(monkeypatch, told, wanted):
    import torch

    from isentropic.experiments import train as training

    usual = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2") if told else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(2)
        for parameters, num in zip((2 * training.SMALL_MODEL, 2), wanted, strict=True):
            training.suit_threads(SimpleNamespace(num_parameters=lambda n=parameters: n))
            assert torch.get_num_threads() == num
    finally:
        torch.set_num_threads(usual)
