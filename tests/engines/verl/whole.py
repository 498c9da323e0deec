"""What the tests of the whole of verl share: its command line on the CPU, and the embedded task as verl reads it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# What a machine without a GPU needs beside what a user would say.
ON_CPU = """
    data.dataloader_num_workers=0 data.max_prompt_length=8 data.max_response_length=8
    actor_rollout_ref.model.enable_gradient_checkpointing=False
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa
    actor_rollout_ref.model.use_remove_padding=False
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.use_dynamic_bsz=False
    actor_rollout_ref.actor.use_torch_compile=False
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
    actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
    +actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
    +actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32
    +actor_rollout_ref.actor.fsdp_config.mixed_precision.buffer_dtype=fp32
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32
    actor_rollout_ref.rollout.name=cpu actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64
    actor_rollout_ref.rollout.agent.num_workers=1
    actor_rollout_ref.rollout.free_cache_engine=False
    actor_rollout_ref.rollout.calculate_log_probs=True
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=64
    reward.num_workers=1
    trainer.device=cpu trainer.nnodes=1 trainer.val_before_train=False trainer.test_freq=-1
    +ray_kwargs.ray_init.include_dashboard=False ray_kwargs.ray_init.num_cpus=8
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
""".split()


def prepare(home, settings=None):
    """The tiny model with a chat template that changes nothing, and the task's prompts as parquet files."""
    import pandas as pd

    from isentropic.models.tiny import TinySettings, tiny_model
    from isentropic.tasks.expressions import expr

    made = tiny_model(settings or TinySettings(), progress=False)
    shutil.copytree(made, home / "model")
    config = json.loads((home / "model/tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (home / "model/tokenizer_config.json").write_text(json.dumps(config))
    for name, rows in (("train", expr.train(0)), ("heldout", expr.heldout())):
        table = [
            {
                "data_source": "expr",
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "ability": "arithmetic",
                "reward_model": {"style": "rule", "ground_truth": str(row["target"])},
                "extra_info": {"index": i},
            }
            for i, row in enumerate(rows)
        ]
        pd.DataFrame(table).to_parquet(home / f"{name}.parquet")
    return home


def command(home, out, *more, workers=1):
    """``python -m verl.trainer.main_ppo`` on the embedded task, and its environment."""
    flags = [
        *ON_CPU,
        f"data.train_files={home}/train.parquet",
        f"data.val_files={home}/heldout.parquet",
        f"actor_rollout_ref.model.path={home}/model",
        f"reward.custom_reward_function.path={HERE / 'expr_reward.py'}",
        "reward.custom_reward_function.name=compute_score",
        f"trainer.default_local_dir={out}/checkpoints",
        "trainer.logger=[console,file]",
        f"trainer.n_gpus_per_node={workers}",
        f"+ray_kwargs.ray_init.num_gpus={workers}",
        f"hydra.run.dir={out}/hydra",
        *more,
    ]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_prestart_worker_first_driver": "0",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_ENGINE_VENDOR": "nvidia",
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform,cpu_rollout",
        "VERL_FILE_LOGGER_PATH": f"{out}/verl.jsonl",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return [sys.executable, "-m", "verl.trainer.main_ppo", *flags], env


def start(home, out, *more, workers=1):
    """The run as a process, its output in a file."""
    out.mkdir(parents=True, exist_ok=True)
    words, env = command(home, out, *more, workers=workers)
    with (out / "output.txt").open("a") as output:
        return subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=out, start_new_session=True
        )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
