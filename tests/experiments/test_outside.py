"""What other packages take part in: adapters, KL, trackers, the hub, and the system message of conversations."""

import json

import pytest

pytest.importorskip("trl")
import huggingface_hub
from trl_case import save_model

from isentropic.cli import main
from isentropic.experiments import evaluate, hub
from isentropic.experiments.config import TRACKERS, ConfigError, eval_settings, load, recipe_of
from isentropic.experiments.train import tasks_of
from isentropic.experiments.trainer import trl_config
from isentropic.models.candidates import candidates
from isentropic.runs.record import Record
from isentropic.tasks import load_task


def chat_file(path):
    rows = [
        {"prompt": [{"role": "system", "content": "old"}, {"role": "user", "content": f"{i}+1="}], "answer": str(i + 1)}
        for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"file:{path}:prompt=prompt:answer=answer:verifier=exact"


@pytest.mark.parametrize("recipe", ["grpo", "isentropic"])
def test_settings_reach_the_trainer_unchanged(tmp_path, recipe):
    flags = {"recipe": recipe, "kl": 0.05, "weight_decay": 0.01, "report_to": ["tensorboard"], "push_to_hub": "me/mine"}
    config = load(None, {**flags, "out": str(tmp_path), "device": "cpu"})
    args = trl_config(config, recipe_of(config), load_task("expr"), ranks=1)
    assert (args.beta, args.weight_decay, args.report_to) == (0.05, 0.01, ["tensorboard"])
    assert (args.push_to_hub, args.hub_model_id, args.hub_strategy) == (True, "me/mine", "end")
    assert not args.use_bias_correction_kl
    config = load(None, {"recipe": recipe, "out": str(tmp_path), "device": "cpu"})
    args = trl_config(config, recipe_of(config), load_task("expr"), ranks=1)
    assert (args.beta, args.weight_decay, args.report_to) == (0.0, 0.0, [])
    assert (args.push_to_hub, args.hub_model_id, args.use_bias_correction_kl) == (False, None, True)


def test_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) <= set(INTEGRATION_TO_CALLBACK)


@pytest.mark.slow
def test_a_run_with_an_adapter_kl_and_an_option_of_the_recipe_is_pushed(tmp_path, monkeypatch):
    run, pushed = tmp_path / "run", []
    monkeypatch.setattr("isentropic.cli.train.check_hub", lambda name: None)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *args, **kwargs: None)
    monkeypatch.setattr("transformers.Trainer.push_to_hub", lambda trainer, **kwargs: pushed.append(trainer.args))
    push = ["--push-to-hub", "me/mine"]
    flags = ["--model", save_model(tmp_path / "model"), "--task", "task_cases:letters", "--out", str(run)]
    flags += ["--steps", "2", "--updates", "2", "--prompts", "2", "--generations", "4", "--eval-k", "0"]
    flags += ["--lora-rank", "2", "--lora-alpha", "3", "--lora-targets", "q_proj", "--kl", "0.1", "--audit", "off"]
    assert main(["train", *flags, "--set", "recipe.clip_high=0.3", "--report-to", "tensorboard", *push]) == 0
    assert [args.hub_model_id for args in pushed] == ["me/mine"]
    adapter = json.loads((run / "checkpoint-2" / "adapter_config.json").read_text())
    assert (adapter["lora_alpha"], adapter["target_modules"]) == (3, ["q_proj"])
    assert Record(run).header()["recipe"]["clip_high"] == 0.3
    assert list(run.glob("runs/*/events.out.tfevents.*"))


def test_an_adapter_on_modules_that_are_not_there_is_refused(tmp_path, capsys):
    flags = ["--model", save_model(tmp_path / "model"), "--task", "task_cases:letters", "--prompts", "2"]
    flags += ["--generations", "4", "--updates", "2", "--lora-rank", "2", "--lora-targets", "q_prj"]
    with pytest.raises(SystemExit):
        main(["train", *flags, "--lora-targets", "v_proj", "--out", str(tmp_path / "run")])
    assert "got 'q_prj' (did you mean q_proj?)" in capsys.readouterr().err


def test_a_system_prompt_stands_before_every_prompt(tmp_path):
    task = chat_file(tmp_path / "rows.jsonl")
    (asked,) = tasks_of(load(None, {"task": task, "system_prompt": "Be brief.", "prompts": 2}))
    for rows in (asked.train(0), asked.heldout()):
        roles = [[message["role"] for message in row["prompt"]] for row in rows]
        assert roles == [["system", "user"]] * len(rows) != []
        assert {row["prompt"][0]["content"] for row in rows} == {"Be brief."}
    (plain,) = tasks_of(load(None, {"task": task, "prompts": 2}))
    assert plain.heldout()[0]["prompt"][0]["content"] == "old"
    with pytest.raises(ValueError, match=r"asks by texts, .* got system_prompt='Be brief.'"):
        load_task("expr").with_system_prompt("Be brief.").heldout()


def test_evaluation_takes_the_system_prompt_of_the_first_run():
    run = {"task": "expr", "system_prompt": "Be brief."}
    assert eval_settings({}, [run]).system_prompt == "Be brief."
    assert eval_settings({"system_prompt": "Be long."}, [run]).system_prompt == "Be long."
    assert eval_settings({"task": "expr"}, []).system_prompt is None


def test_evaluation_asks_under_the_system_prompt(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "check_prompts", lambda *args: None)
    monkeypatch.setattr(
        evaluate, "_evaluate_model", lambda model, tokenizer, task, settings, rows, *more: asked.extend(rows)
    )
    settings = eval_settings({"task": chat_file(tmp_path / "rows.jsonl"), "system_prompt": "Be brief."}, [])
    evaluate.evaluate_models(settings, candidates([save_model(tmp_path / "model")], None, None), None, print)
    assert {row["prompt"][0]["content"] for row in asked} == {"Be brief."}


@pytest.mark.parametrize(
    ("offline", "token", "error", "says"),
    [
        (True, "t", None, "HF_HUB_OFFLINE is set"),
        (False, None, None, "without a login; run `hf auth login`"),
        (False, "t", OSError("403 Forbidden"), "me/mine cannot be created: 403 Forbidden"),
    ],
)
def test_the_hub_refuses_before_a_model_loads(tmp_path, capsys, monkeypatch, offline, token, error, says):
    def create(name, exist_ok):
        if error is not None:
            raise error

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr("isentropic.cli.train.heavy", lambda module: pytest.fail(f"{module} was imported"))
    with pytest.raises(SystemExit):
        main(["train", "--push-to-hub", "me/mine", "--out", str(tmp_path / "run")])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_hub_has_the_repository_once_it_is_checked(monkeypatch):
    created = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "t")
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, exist_ok: created.append((name, exist_ok)))
    hub.check_hub("me/mine")
    monkeypatch.setenv("RANK", "1")
    hub.check_hub("me/mine")
    assert created == [("me/mine", True)]


class Pushing:
    """A trainer that pushes, or fails to."""

    class args:
        output_dir = "runs/a"

    def __init__(self, error=None):
        self.error, self.messages = error, []

    def push_to_hub(self, commit_message):
        if self.error:
            raise self.error
        self.messages.append(commit_message)


def test_a_push_that_fails_is_a_line_with_the_remedy():
    lines, trainer = [], Pushing()
    hub.push(trainer, "me/mine", lines.append)
    hub.push(Pushing(ConnectionError("no network")), "me/mine", lines.append)
    assert len(trainer.messages) == 1
    assert lines[0] == "pushed: https://huggingface.co/me/mine"
    assert lines[1] == "not pushed to me/mine: no network; push it by `hf upload me/mine runs/a`"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kl": -0.1}, "kl: got -0.1, must be at least 0"),
        ({"kl": float("inf")}, "kl: got inf, must be finite"),
        ({"weight_decay": float("inf")}, "weight_decay: got inf, must be finite"),
        ({"lora_alpha": 8}, "lora_alpha: got 8 without an adapter; set lora_rank too"),
        ({"lora_targets": ["q_proj"]}, r"lora_targets: got \['q_proj'\] without an adapter"),
        ({"lora_rank": 2, "lora_alpha": 0}, "lora-alpha: got 0, must be at least 1"),
        ({"report_to": ["wandbb"]}, r"report-to: got 'wandbb' \(did you mean wandb\?\); allowed: tensorboard, "),
        ({"report_to": ["clearml"]}, "report_to: clearml is not installed; pip install clearml"),
        ({"push_to_hub": "a/b/c"}, "push_to_hub: got 'a/b/c', must be NAME or OWNER/NAME"),
        ({"push_to_hub": ""}, "push_to_hub: got ''"),
        ({"system_prompt": 3}, "system-prompt: got 3, must be str"),
    ],
)
def test_bad_values_are_refused_in_one_line(settings, says, monkeypatch):
    monkeypatch.setattr("isentropic.experiments.config.find_spec", lambda name: None if name == "clearml" else name)
    with pytest.raises(ConfigError, match=says) as refused:
        load(None, settings)
    assert "\n" not in str(refused.value)
