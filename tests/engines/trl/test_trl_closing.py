"""What a run prints, how it ends, and what its model card says."""

import json
import re
import runpy
import signal
from pathlib import Path

import pytest

pytest.importorskip("trl")
import yaml
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_case import BASE, QUIET, VARIANT, documented, make, parts, save_model, share_of_digits, undocumented

from isentropic.cli import main
from isentropic.engines import card
from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer, control
from isentropic.recipes import compose
from isentropic.report.watch import Snapshot
from isentropic.runs.record import Record

ROOT = Path(__file__).parents[3]
# Fields of runs that a plain one does not have: a sampler's log-probs, episodes, several tasks, second batches.
OTHERS = {"mismatch", "episode", "task", "entropy/turn_N", "redraw", "knob/cut_out"}


def script(out, steps=20, tqdm=False, model=None, trainer=GRPOTrainer, config=GRPOConfig, **settings):
    """A trainer as a script makes it, whose printer is there."""
    fresh, tokenizer = parts()
    args = config(output_dir=str(out), max_steps=steps, **{**BASE, "disable_tqdm": not tqdm, **settings})
    rows = Dataset.from_list([{"prompt": f"{i % 90 + 10}>"} for i in range(64)])
    return trainer(model or fresh, share_of_digits, args=args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("tqdm", [False, True])
def test_twenty_steps_fit_a_screen(tmp_path, capsys, tqdm):
    control(script(tmp_path, tqdm=tqdm), target="60%").train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    opening, *rest = lines
    assert max(map(len, rest)) <= 100
    heads = ["fused head; entropy read and explained each step"]
    if VARIANT == "fixed":
        heads.append("TRL's head; entropy read each step, explained every 10 steps")
    assert opening in [f"isentropic: TRL's dapo, knob zeta, target 60%, {head}" for head in heads]
    steps = [line for line in rest if line.startswith("step ")]
    assert len(steps) == 20
    for figure in (r"eta \d", r"reward \d", r"entropy \d", r"\(target \d", r"zeta -?\d", r"clip \d"):
        assert all(re.search(figure, line) for line in steps), figure
    assert any(line.startswith(f"report: {tmp_path}") for line in rest)
    assert rest[-1] == f"run directory: {tmp_path}"
    assert sum("start" in line and "target" in line and "end" in line for line in rest) == 1


def test_a_run_that_only_monitors_says_so(tmp_path, capsys):
    script(
        tmp_path, 4, trainer=IsentropicTrainer, config=IsentropicConfig,
        controller="none", head="trl", explain_every=10, **QUIET,
    ).train()  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "isentropic: TRL's dapo, only monitored, TRL's head; entropy read each step, explained every 10 steps"
    )
    assert "report:" not in "\n".join(lines)
    assert not (tmp_path / "audit.json").exists()
    assert not (tmp_path / "report.html").exists()


def test_a_trainer_without_a_printer_prints_no_steps(tmp_path, capsys):
    control(make(GRPOTrainer, GRPOConfig, tmp_path, 4), target="60%", **QUIET).train()
    assert "step 1/4" not in capsys.readouterr().out


def test_trackers_and_rows_get_every_metric(tmp_path):
    seen = {}

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.update(logs)

    trainer = control(script(tmp_path, 4), target="60%", **QUIET)
    trainer.add_callback(Tracker())
    trainer.train()
    row = Record(tmp_path).rows("metrics")[-1]
    late = {"loss", "grad_norm", "learning_rate", "samples/total"}
    numbers = {k for k, v in row.items() if "/" in k and isinstance(v, int | float)} - late
    assert {n for n in numbers if n.split("/")[0] not in ("reward", "length")} <= set(seen)


def test_the_table_names_what_a_run_writes(tmp_path):
    def reward(completions, **columns):
        return [None if i == 0 else x for i, x in enumerate(share_of_digits(completions))]

    made = make(
        IsentropicTrainer, IsentropicConfig, tmp_path, 8, reward=reward,
        recipe="dapo", knob="zeta", explain_every=1, head="trl",
    )  # fmt: skip
    made.train()
    names = set().union(*made.record.rows("metrics"))
    assert undocumented(names) == []
    plural = {re.sub(r"(position|turn)_[1-8]$", r"\1_N", name) for name in names}
    rest = {name for name in documented() if name not in plural}
    assert {name for name in rest if not OTHERS & {name, name.split("/")[0]}} == set()


def test_the_end_of_a_run_is_written(tmp_path):
    model = save_model(tmp_path / "models" / "seven")
    from transformers import AutoModelForCausalLM

    trainer = script(tmp_path / "run", 4, model=AutoModelForCausalLM.from_pretrained(model))
    control(trainer, target="60%", **QUIET).train()
    now = Snapshot(tmp_path / "run")
    assert now.state() == "finished"
    assert now.header["model"] == model
    assert now.header["task"] == "share_of_digits"
    assert now.steps == 4
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert main(["watch", str(tmp_path / "run"), "--once"]) == 0


def test_watch_names_the_model_and_the_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    control(script(tmp_path, 4), target="60%", **QUIET).train()
    capsys.readouterr()
    assert main(["watch", str(tmp_path), "--once"]) == 0
    text = capsys.readouterr().out
    assert "dapo on share_of_digits, seed 1, model Qwen3ForCausalLM" in text
    assert "finished" in text


def test_epochs_have_a_length_once_training_begins(tmp_path):
    trainer = script(tmp_path, -1, num_train_epochs=0.5)
    control(trainer, target="60%", **QUIET).train()
    assert Snapshot(tmp_path).steps == trainer.state.max_steps > 0


def test_a_run_that_is_stopped_has_not_ended_and_one_that_is_resumed_has_not_either(tmp_path, capsys):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    trainer = control(script(tmp_path, 12, save_strategy="steps", save_steps=4), target="60%", **QUIET)
    trainer.add_callback(Stop())
    trainer.train()
    assert "stopped at step 4/12; continue by trainer.train(resume_from_checkpoint=True)" in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists()
    (tmp_path / "summary.json").write_text("{}")
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((tmp_path / "summary.json").exists())

    again = control(script(tmp_path, 12), target="60%", **QUIET)
    again.add_callback(Look())
    again.train(resume_from_checkpoint=True)
    assert set(seen) == {False}
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 12


def test_the_guard_ends_a_run_by_itself(tmp_path, capsys):
    trainer = control(
        script(tmp_path, 40, learning_rate=0.0, save_strategy="steps", save_steps=20),
        target="60%",
        stop_above=1.01,
        **QUIET,
    )
    trainer.guard.guard = trainer.guard.guard._replace(bound=0.5)
    trainer.train()
    assert trainer.state.global_step == 20
    assert "stopped early: entropy was above" in capsys.readouterr().out
    assert "stopped early" in (tmp_path / "README.md").read_text()
    assert "stop_above = 0" in json.loads((tmp_path / "summary.json").read_text())["stopped"]


def test_a_report_that_cannot_be_written_fails_no_run(tmp_path, capsys, monkeypatch):
    def broken(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr("isentropic.report.write", broken)
    control(script(tmp_path, 4), target="60%", audit=False).train()
    assert "no report: the disk is full" in capsys.readouterr().out
    assert (tmp_path / "summary.json").is_file()


def front(text):
    return yaml.safe_load(text.split("---")[1])


def test_a_model_card_says_the_truth_and_its_snippet_works(tmp_path, capsys):
    model = save_model(tmp_path / "models" / "seven")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    trainer = script(tmp_path / "run", 4, model=loaded, save_strategy="steps", save_steps=4)
    control(trainer, target="60%", recipe="dapo", **QUIET).train()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "None" not in text
    assert "DeepSeek" not in text
    assert "| base model | `seven` |" in text  # a directory: neither a link nor where it is
    assert model not in text
    assert "| recipe | dapo: GRPO with" in text
    assert "https://arxiv.org/abs/2503.14476" in text
    assert "https://arxiv.org/abs/2603.11682" in text  # of the knob
    assert "| target of entropy | `60%` |" in text
    assert "entropy (nats per token)" in text
    assert "run directory" not in text
    assert card.citation() in text
    assert {"trl", "isentropic"} <= set(front(text)["tags"])
    assert "base_model" not in front(text)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "use.py").write_text(code.replace("max_new_tokens=128", "max_new_tokens=4"))
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "use.py"))
    assert capsys.readouterr().out


def test_a_card_links_a_base_model_of_the_hub(tmp_path):
    out = tmp_path / "new"
    trainer = script(out, 4, trainer=IsentropicTrainer, config=IsentropicConfig, target="60%", **QUIET)
    trainer.model.config._name_or_path = "some-org/some-model"
    trainer.create_model_card(model_name="mine", dataset_name="some-org/rows", tags="more")
    text = (out / "README.md").read_text()
    assert "[some-org/some-model](https://huggingface.co/some-org/some-model)" in text
    head = front(text)
    assert (head["base_model"], head["datasets"]) == ("some-org/some-model", "some-org/rows")
    assert "more" in head["tags"]
    assert "# mine" in text


def test_a_run_of_the_command_line_has_one_report_one_table_and_a_true_card(tmp_path, capsys):
    model = save_model(tmp_path / "seven")
    flags = "--steps 4 --save-every 4 --prompts 4 --generations 4 --eval-k 2 --eval-rows 4 --knob zeta --target 80%"
    assert main(["train", "--model", model, "--recipe", "loop", "--out", str(tmp_path / "run"), *flags.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("isentropic: loop, knob zeta, target 80%") for line in lines) == 1
    assert sum(line.startswith("step ") for line in lines) == 4
    assert sum(line.startswith("report: ") for line in lines) == 1
    assert sum(line.startswith("run directory: ") for line in lines) == 1
    text = (tmp_path / "run" / "README.md").read_text()
    assert "| base model | `seven` |" in text
    assert "| recipe | loop: " in text
    assert "https://arxiv.org/abs/2502.01600" in text
    assert re.search(r"^ +end +4 ", text, re.MULTILINE)  # the last evaluation
    assert "expr" in text


def test_the_citation_is_that_of_the_repository():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["title"] == card.TITLE
    assert cited["license"] == card.LICENCE
    assert [author["name"] for author in cited["authors"]] == [card.AUTHORS]


def test_a_card_of_conversations_asks_in_one():
    facts = card.Trained("m", "a/b", "a/m", "task", "rloo", compose("rloo"), {}, chat=True)
    text = card.model_card(facts)
    assert '[{"role": "user", "content": "What is 7 * 8?"}]' in text
    assert "only monitored" in text
    assert "target of entropy" not in text
