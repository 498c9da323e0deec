#!/bin/sh
# Qwen/Qwen3-0.6B on GSM8K, one node of 8 GPUs, entropy under control. Composed by hydra in the tests; not run.
# Data: examples/data_preprocess/gsm8k.py of verl's repository writes train.parquet and test.parquet.
DATA=${DATA:-$HOME/data/gsm8k}

exec python -m verl.trainer.main_ppo \
  "+isentropic=${RECIPE:-isentropic}" \
  "actor_rollout_ref.actor.policy_loss.target=${TARGET:-60%}" \
  actor_rollout_ref.rollout.calculate_log_probs=True \
  "data.train_files=$DATA/train.parquet" "data.val_files=$DATA/test.parquet" \
  data.train_batch_size=512 data.max_prompt_length=512 data.max_response_length=1024 \
  data.filter_overlong_prompts=True data.truncation=error \
  actor_rollout_ref.model.path=Qwen/Qwen3-0.6B \
  actor_rollout_ref.model.use_remove_padding=True \
  actor_rollout_ref.model.enable_gradient_checkpointing=True \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.ppo_mini_batch_size=128 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
  "trainer.logger=[console,file]" trainer.project_name=isentropic trainer.experiment_name=qwen3-0.6b-8gpu \
  trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.save_freq=20 trainer.test_freq=10 trainer.total_epochs=5 \
  "$@"
