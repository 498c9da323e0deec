"""The command lines of configs/verl/grpo.sh: hydra composes each, and the actor's config is built as verl builds it."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

try:
    version("verl")  # not by import: this directory would be found as a package of that name
except PackageNotFoundError:
    pytest.skip("verl has an environment of its own: make test-verl", allow_module_level=True)

os.environ |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia"}
import cpu_platform  # noqa: F401

SCRIPT = Path(__file__).parents[3] / "configs/verl/grpo.sh"
# The rows of the table at the top of the script: its variables, by model and machine.
ROWS = {
    (m[1], m[2]): dict(word.split("=", 1) for word in m[3].split())
    for m in re.finditer(
        r"^#   (Qwen/\S+) +(.*?)  +((?:[A-Z]+=\S+ )*)sh configs/verl/grpo\.sh$", SCRIPT.read_text(), re.M
    )
}
# By the same keys, what differs: nodes, GPUs a node, prompts a batch, learning rate, rank, GPUs a vLLM engine, tokens.
DIFFER = {
    ("Qwen/Qwen3-0.6B", "one GPU"): (1, 1, 128, 1e-6, 0, 1, 16384),
    ("Qwen/Qwen3-0.6B", "8 GPUs"): (1, 8, 512, 1e-6, 0, 1, 16384),
    ("Qwen/Qwen3-0.6B", "4 nodes of 8 GPUs"): (4, 8, 1024, 1e-6, 0, 1, 16384),
    ("Qwen/Qwen3-8B", "one GPU, by LoRA"): (1, 1, 128, 1e-5, 64, 1, 8192),
    ("Qwen/Qwen3-8B", "8 GPUs"): (1, 8, 512, 1e-6, 0, 2, 8192),
    ("Qwen/Qwen3-8B", "4 nodes of 8 GPUs"): (4, 8, 1024, 1e-6, 0, 2, 8192),
}


FLAGS = ["+isentropic=isentropic", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"]


def run_script(tmp_path, **variables):
    """The script with a python that prints its arguments."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), **variables}
    return subprocess.run(["sh", str(SCRIPT)], capture_output=True, text=True, check=False, env=env)


def flags_of(tmp_path, **variables):
    """What the script hands to verl."""
    done = run_script(tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    head, module, *flags = done.stdout.splitlines()
    assert (head, module) == ("-m", "verl.trainer.main_ppo")
    return flags


def differing(config):
    """The settings in which the rows of the table differ, from a composed config."""
    ours, trainer = config.actor_rollout_ref, config.trainer
    machine = (trainer.nnodes, trainer.n_gpus_per_node, config.data.train_batch_size)
    engine = (ours.rollout.tensor_model_parallel_size, ours.actor.ppo_max_token_len_per_gpu)
    return (*machine, ours.actor.optim.lr, ours.model.lora_rank, *engine)


def composed(flags):
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=flags)
    return config, omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def test_the_table_has_two_sizes_and_three_machines():
    assert list(ROWS) == list(DIFFER)


@pytest.mark.parametrize("row", DIFFER, ids=" ".join)
def test_a_command_line_composes_and_its_recipe_holds(row, tmp_path):
    flags = flags_of(tmp_path, **ROWS[row])
    config, actor = composed(flags)
    assert differing(config) == DIFFER[row]
    assert config.actor_rollout_ref.model.path == row[0]
    assert type(actor.policy_loss).__module__ == "isentropic.engines.verl.engine"
    recipe = actor.policy_loss.checked(actor)
    assert (recipe.target, recipe.knob, recipe.controller) == ("auto", "zeta", "predictive")
    assert actor.policy_loss.updates(actor) == 4
    # verl's trainer writes the number of generated batches here before it starts a worker.
    assert actor.policy_loss.steps(actor) is None
    actor.optim.total_training_steps = 50
    assert actor.policy_loss.steps(actor) == 200
    assert config.algorithm.adv_estimator == "rloo"
    # What verl checks before it starts anything.
    actor.validate(config.trainer.nnodes * config.trainer.n_gpus_per_node, config.data.train_batch_size, {})
    other = flags_of(tmp_path, **ROWS[row], RECIPE="adapo", TARGET="anneal:100%:60%:500")
    recipe = composed(other)[1].policy_loss.checked(actor)
    assert (recipe.target, recipe.knob) == ("anneal:100%:60%:500", "clip_high")


def test_every_setting_in_which_the_rows_differ_has_a_variable(tmp_path):
    variables = {"MODEL": "Qwen/Qwen3-8B", "LORA": "32", "BATCH": "256", "TENSOR_PARALLEL": "4"}
    variables |= {"LR": "2e-6", "TOKENS": "4096", "CHECKPOINTS": "/shared", "DATA": "/data"}
    config, actor = composed(flags_of(tmp_path, **variables, NODES="2", GPUS="4"))
    assert differing(config) == (2, 4, 256, 2e-6, 32, 4, 4096)
    assert (actor.ppo_mini_batch_size, config.actor_rollout_ref.model.lora_alpha) == (64, 32)
    assert (config.trainer.default_local_dir, config.data.train_files) == ("/shared", "/data/train.parquet")
    failed = run_script(tmp_path, NODES="2")
    assert failed.returncode
    assert "CHECKPOINTS: a directory that every node sees" in failed.stderr


@pytest.mark.parametrize("name", ["monitor", "isentropic", "grpo", "dr-grpo", "reinforce", "qae", "aent"])
def test_a_recipe_composes_by_one_flag(name, tmp_path):
    """One for each baseline and reduction, and for each way of being special."""
    from isentropic.recipes import RECIPES

    recipe = RECIPES.get(name)
    rest = [flag for flag in flags_of(tmp_path) if "isentropic=" not in flag and "target=" not in flag]
    size = 128 if recipe is not None and recipe.on_policy else 32
    config, actor = composed([f"+isentropic={name}", *rest, f"actor_rollout_ref.actor.ppo_mini_batch_size={size}"])
    found = actor.policy_loss.checked(actor)
    assert actor.calculate_entropy
    if recipe is None:
        assert (found.knob, actor.policy_loss.loss_mode) == (None, "vanilla")
        return
    assert found == recipe
    constant = recipe.reduction == "constant"
    assert actor.loss_scale_factor == (config.data.max_response_length if constant else None)
    ours = "isentropic.engines.verl.estimator" if recipe.baseline in ("none", "quantile") else None
    assert config.actor_rollout_ref.model.external_lib == ours


def test_other_fields_of_a_recipe_are_one_flag(tmp_path):
    rest = [flag for flag in flags_of(tmp_path) if "target=" not in flag]
    options = "actor_rollout_ref.actor.policy_loss.recipe_options={every: 2, zeta: 0.01, reduction: sequence}"
    _, actor = composed([*rest, options])
    with pytest.raises(
        ValueError, match=r"needs actor_rollout_ref\.actor\.loss_agg_mode=seq-mean-token-mean, got token"
    ):
        actor.policy_loss.checked(actor)
    _, actor = composed([*rest, options, "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"])
    assert actor.policy_loss.checked(actor).every == 2


def test_main_ppo_itself_composes(tmp_path):
    """``--cfg job`` prints what a run would be started with."""
    flags = flags_of(tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VERL_USE_EXTERNAL_MODULES": "cpu_platform"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *flags, "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "_target_: isentropic.engines.verl.engine.PolicyLoss" in done.stdout
    assert "target: auto" in done.stdout


@pytest.mark.parametrize(("name", "prompts"), [("one_step_off", 1024), ("fully_async", 0)])
def test_verls_asynchronous_recipes_take_the_flag_and_train_by_the_wrapped_worker(name, prompts, monkeypatch):
    """Composed and built, not run: they need a GPU to send weights by nccl."""
    import verl
    from hydra import compose, initialize_config_dir
    from verl.experimental.separation.engine_workers import DetachActorWorker
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine_workers import ActorRolloutRefWorker

    from isentropic.engines.verl.engine import PolicyLoss

    package = Path(verl.__file__).parent
    monkeypatch.chdir(package.parent)  # their search path is relative
    with initialize_config_dir(str(package / f"experimental/{name}_policy/config"), version_base=None):
        config = compose(f"{name}_ppo_trainer", overrides=[*FLAGS, f"data.train_batch_size={prompts}"])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor.policy_loss, PolicyLoss)
    assert actor.policy_loss.checked(actor).knob == "zeta"
    # verl's fully asynchronous trainer takes prompts one by one, and how many make a batch is not told.
    assert actor.policy_loss.updates(actor) == (4 if prompts else None)
    assert issubclass(DetachActorWorker, ActorRolloutRefWorker)
    assert DetachActorWorker.update_weights is ActorRolloutRefWorker.update_weights
    assert DetachActorWorker.update_weights.__module__ == ActorRolloutRefWorker.__module__
    assert hasattr(DetachActorWorker.update_weights, "__wrapped__")
