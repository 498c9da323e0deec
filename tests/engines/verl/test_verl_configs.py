"""The command lines of configs/verl: hydra composes each, and the actor's config is built as verl builds it."""

import os
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

SCRIPTS = sorted((Path(__file__).parents[3] / "configs/verl").glob("*.sh"))


def flags_of(script, tmp_path, **environment):
    """What a script hands to python, by a python that says so."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "CHECKPOINTS": "/shared", **environment}
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=True, env=env)
    head, *flags = done.stdout.split("\n-m\n")[-1].splitlines() if "\n-m\n" in done.stdout else done.stdout.splitlines()
    return [flag for flag in [head, *flags] if "=" in flag]


def composed(flags):
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=flags)
    return config, omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def test_there_are_command_lines_for_two_sizes_and_three_machines():
    assert len(SCRIPTS) == 6


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_command_line_composes_and_its_recipe_holds(script, tmp_path):
    flags = flags_of(script, tmp_path)
    config, actor = composed(flags)
    assert type(actor.policy_loss).__module__ == "isentropic.engines.verl.engine"
    recipe = actor.policy_loss.checked(actor)
    assert (recipe.target, recipe.knob, recipe.controller) == ("60%", "zeta", "predictive")
    assert actor.policy_loss.updates(actor) == 4
    # verl's trainer writes the number of generated batches here before it starts a worker.
    assert actor.policy_loss.steps(actor) is None
    actor.optim.total_training_steps = 50
    assert actor.policy_loss.steps(actor) == 200
    assert config.algorithm.adv_estimator == "rloo"
    nodes, gpus = script.stem.rsplit("-", 1)[1], {"1gpu": (1, 1), "8gpu": (1, 8), "nodes": (4, 8)}
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == gpus[nodes]
    # What verl checks before it starts anything.
    actor.validate(config.trainer.nnodes * config.trainer.n_gpus_per_node, config.data.train_batch_size, {})
    other = flags_of(script, tmp_path, RECIPE="adapo", TARGET="anneal:100%:60%:500")
    recipe = composed(other)[1].policy_loss.checked(actor)
    assert (recipe.target, recipe.knob) == ("anneal:100%:60%:500", "clip_high")


@pytest.mark.parametrize("name", ["monitor", "isentropic", "grpo", "dr-grpo", "reinforce", "qae", "aent"])
def test_a_recipe_composes_by_one_flag(name, tmp_path):
    """One for each baseline and reduction, and for each way of being special."""
    from isentropic.recipes import RECIPES

    recipe = RECIPES.get(name)
    rest = [flag for flag in flags_of(SCRIPTS[0], tmp_path) if "isentropic=" not in flag and "target=" not in flag]
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
    rest = [flag for flag in flags_of(SCRIPTS[0], tmp_path) if "target=" not in flag]
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
    flags = flags_of(SCRIPTS[0], tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VERL_USE_EXTERNAL_MODULES": "cpu_platform"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *flags, "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "_target_: isentropic.engines.verl.engine.PolicyLoss" in done.stdout
    assert "target: 60%" in done.stdout
