"""The config on its own: its own fields, and what becomes of every field of TRL's under a recipe."""

import copy
import json
import pickle
from dataclasses import fields

import pytest

pytest.importorskip("trl")
from transformers import TrainingArguments
from trl import GRPOConfig
from trl_case import BASE, train

from isentropic.control.controllers import Range, pi
from isentropic.control.targets import Level, constant
from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
from isentropic.engines.trl.settings import WITHOUT_EFFECT
from isentropic.recipes import compose

# The recipe sets it, and refuses another value.
OWNED = {
    "loss_type": "sapo",
    "scale_rewards": "batch",
    "importance_sampling_level": "sequence",
    "epsilon": 0.3,
    "epsilon_high": 0.5,
}
# Refused by name under a recipe that leaves it without effect: a value, and such a recipe.
REFUSED = {
    "delta": (2.0, "dcpo"),
    "off_policy_mask_threshold": (0.1, "dcpo"),
    "multi_objective_aggregation": ("normalize_then_sum", "loop"),
    "sapo_temperature_neg": (1.2, "dapo"),
    "sapo_temperature_pos": (1.2, "dapo"),
    "vespo_k_pos": (1.0, "dapo"),
    "vespo_lambda_pos": (1.0, "dapo"),
    "vespo_k_neg": (1.0, "dapo"),
    "vespo_lambda_neg": (1.0, "dapo"),
    "use_bias_correction_kl": (True, "dcpo"),  # with TRL's KL coefficient
    "entropy_coef": (0.01, "entropy-bonus-adaptive"),
    "use_adaptive_entropy": (True, "entropy-bonus-adaptive"),
}
# TRL's own, whatever the recipe: generation, the reference model, logging, and terms of TRL's loss around ours.
ACTS = set(
    """model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 num_generations
    num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset pad_to_multiple_of
    generation_batch_size steps_per_generation temperature top_p top_k min_p generation_kwargs chat_template_kwargs
    repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode
    vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
    vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size beta num_iterations
    reward_weights mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
    top_entropy_quantile entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
    max_tool_calling_iterations vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min log_completions log_multimodal
    num_completions_to_print log_unique_prompts log_completions_hub_repo use_transformers_continuous_batching
    transformers_continuous_batching_config use_transformers_paged vllm_importance_sampling_cap""".split()
)


def config(tmp_path, **settings):
    fixed = {"use_cpu": True, "bf16": False, "steps_per_generation": 4}
    return IsentropicConfig(output_dir=str(tmp_path), **fixed, **settings)


def test_the_table_names_every_field():
    """A new field of TRL fails here until somebody has looked at it."""
    ours = {f.name for f in fields(GRPOConfig)} - {f.name for f in fields(TrainingArguments)}
    assert ours == set(OWNED) | set(REFUSED) | ACTS
    assert not set(OWNED) & set(REFUSED)
    assert not ACTS & (set(OWNED) | set(REFUSED))
    assert set(WITHOUT_EFFECT) <= set(REFUSED)


@pytest.mark.parametrize("name", OWNED)
def test_a_field_that_the_recipe_sets_is_not_overridden_in_silence(tmp_path, name):
    with pytest.raises(ValueError, match=rf"recipe dapo sets {name}=.*got {OWNED[name]!r}"):
        config(tmp_path, recipe="dapo", **{name: OWNED[name]})
    assert getattr(config(tmp_path, **{name: OWNED[name]}), name) == OWNED[name]  # yours without a recipe


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_without_effect_is_refused_by_name(tmp_path, name):
    value, recipe = REFUSED[name]
    more = {"beta": 0.04} if name == "use_bias_correction_kl" else {}
    if name in ("entropy_coef", "use_adaptive_entropy"):
        from isentropic.engines.trl.settings import refuse_two_bonuses

        args = config(tmp_path, recipe=recipe, **{name: value})
        with pytest.raises(ValueError, match=name):
            refuse_two_bonuses(args, args.entropy_recipe)
        return
    with pytest.raises(ValueError, match=rf"{name}.* has no effect on"):
        config(tmp_path, recipe=recipe, **{name: value}, **more)
    if name not in ("multi_objective_aggregation", "use_bias_correction_kl"):
        assert getattr(config(tmp_path, **{name: value}), name) == value  # yours without a recipe


def test_aggregation_acts_with_a_baseline_of_trls(tmp_path):
    args = config(tmp_path, recipe="grpo", multi_objective_aggregation="normalize_then_sum")
    assert args.multi_objective_aggregation == "normalize_then_sum"


def plain(out, **settings):
    return IsentropicConfig(output_dir=str(out), **{**BASE, **settings})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"recipe": "loop", "recipe_options": '{"target": "80%"}'}, "recipe_options has target, which the config has"),
        ({"recipe": "loop", "recipe_options": "{bad"}, "a dict or a JSON object, got '{bad', which is not JSON"),
        ({"recipe": "loop", "recipe_options": "[1]"}, r"must be a dict or a JSON object, got \[1\]"),
        ({"recipe": 3}, "recipe must be a name, a FILE.py:NAME, or a Recipe, got 3"),
        ({"recipe_options": {"clip_high": 0.001}}, "clip_high need a recipe to change"),
        ({"recipe_options": {"overlong_buffer": 7}}, "overlong_buffer need a recipe to change"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        plain(tmp_path, **settings)


OWN = {
    "a recipe": {"recipe": compose("isentropic", shaping=lambda adv, entropy: adv * entropy, knob="none")},
    "a controller": {"recipe": "loop", "knob": "zeta", "controller": pi(Range(0.0, -1.0, 1.0)), "target": "80%"},
    "a target": {"recipe": "loop", "knob": "zeta", "target": constant(Level(1.0, False))},
}


@pytest.mark.parametrize("name", OWN)
def test_a_config_with_parts_of_your_own_is_copied_logged_and_pickled(tmp_path, name):
    made = plain(tmp_path, **OWN[name])
    for copied in (copy.copy(made), copy.deepcopy(made)):
        assert copied.entropy_recipe.as_dict() == made.entropy_recipe.as_dict()
    logged = json.loads(made.to_json_string())
    assert logged["output_dir"] == str(tmp_path)
    assert isinstance(logged["controller"], str | None)
    assert pickle.loads(pickle.dumps(made)).max_steps == made.max_steps


def test_a_controller_of_your_own_is_saved_with_a_checkpoint(tmp_path):
    settings = {**OWN["a controller"], "save_strategy": "steps", "save_steps": 4}
    train(IsentropicTrainer, IsentropicConfig, tmp_path, steps=4, **settings)
    state = json.loads((tmp_path / "checkpoint-4" / "isentropic.json").read_text())["state"]
    assert set(state["controller"]) == {"value", "integral"}
