#!/bin/sh
# A Qwen3 model on GSM8K by verl, with entropy under control. Composed by hydra in the tests; not run.
#
#   model             machine             command
#   Qwen/Qwen3-0.6B   one GPU             sh configs/verl/grpo.sh
#   Qwen/Qwen3-0.6B   8 GPUs              GPUS=8 sh configs/verl/grpo.sh
#   Qwen/Qwen3-0.6B   4 nodes of 8 GPUs   GPUS=8 NODES=4 CHECKPOINTS=/shared/run sh configs/verl/grpo.sh
#   Qwen/Qwen3-8B     one GPU, by LoRA    MODEL=Qwen/Qwen3-8B sh configs/verl/grpo.sh
#   Qwen/Qwen3-8B     8 GPUs              MODEL=Qwen/Qwen3-8B GPUS=8 sh configs/verl/grpo.sh
#   Qwen/Qwen3-8B     4 nodes of 8 GPUs   MODEL=Qwen/Qwen3-8B GPUS=8 NODES=4 CHECKPOINTS=/shared/run sh configs/verl/grpo.sh
#
# More variables, with these defaults; verl's own flags go behind the command.
#
#   RECIPE, TARGET   isentropic, auto
#   DATA             $HOME/data/gsm8k: train.parquet and test.parquet, by verl's examples/data_preprocess/gsm8k.py
#   BATCH            prompts a generated batch, four optimizer steps each: 128 on one GPU, 512 on one node, 1024 on more
#   LR               1e-6; 1e-5 with LoRA
#   LORA             rank of adapters on all linear layers: 64 for a large model on one GPU, else 0, which trains all weights
#   TOKENS           a GPU and micro-batch: 16384; 8192 for a large model
#   TENSOR_PARALLEL  GPUs a vLLM engine: 1; 2 for a large model on more than one GPU
#   CHECKPOINTS      directory of the checkpoints; on several nodes it is needed, and every node must see it
#
# On several nodes, first `ray start --head` on the first node and `ray start --address=HEAD:6379` on each other one; then
# this command on the first.
set -eu
MODEL=${MODEL:-Qwen/Qwen3-0.6B} GPUS=${GPUS:-1} NODES=${NODES:-1} DATA=${DATA:-$HOME/data/gsm8k}

case $NODES-$GPUS in
  1-1) machine=1gpu batch=128 ;;
  1-*) machine=${GPUS}gpu batch=512 ;;
  *) machine=nodes batch=1024 ;;
esac
lora=0 tokens=16384 tensor_parallel=1
case $MODEL in
  *-0.6B | *-1.7B) ;;
  *)
    tokens=8192
    if [ "$machine" = 1gpu ]; then lora=64; else tensor_parallel=2; fi
    ;;
esac
BATCH=${BATCH:-$batch} LORA=${LORA:-$lora}

if [ "$LORA" != 0 ]; then
  set -- "actor_rollout_ref.model.lora_rank=$LORA" "actor_rollout_ref.model.lora_alpha=$LORA" \
    actor_rollout_ref.model.target_modules=all-linear actor_rollout_ref.rollout.load_format=safetensors "$@"
fi
if [ "$NODES" != 1 ]; then : "${CHECKPOINTS:?a directory that every node sees}"; fi
if [ -n "${CHECKPOINTS:-}" ]; then set -- "trainer.default_local_dir=$CHECKPOINTS" "$@"; fi

exec python -m verl.trainer.main_ppo \
  "+isentropic=${RECIPE:-isentropic}" \
  "actor_rollout_ref.actor.policy_loss.target=${TARGET:-auto}" \
  actor_rollout_ref.rollout.calculate_log_probs=True \
  "data.train_files=$DATA/train.parquet" "data.val_files=$DATA/test.parquet" \
  "data.train_batch_size=$BATCH" data.max_prompt_length=512 data.max_response_length=1024 \
  data.filter_overlong_prompts=True data.truncation=error \
  "actor_rollout_ref.model.path=$MODEL" \
  actor_rollout_ref.model.use_remove_padding=True \
  actor_rollout_ref.model.enable_gradient_checkpointing=True \
  actor_rollout_ref.actor.strategy=fsdp2 \
  "actor_rollout_ref.actor.ppo_mini_batch_size=$((BATCH / 4))" \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=${TOKENS:-$tokens}" \
  "actor_rollout_ref.actor.optim.lr=${LR:-$([ "$LORA" = 0 ] && echo 1e-6 || echo 1e-5)}" \
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 \
  "actor_rollout_ref.rollout.tensor_model_parallel_size=${TENSOR_PARALLEL:-$tensor_parallel}" \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
  "trainer.logger=[console,file]" trainer.project_name=isentropic \
  "trainer.experiment_name=$(basename "$MODEL" | tr '[:upper:]' '[:lower:]')-$machine" \
  "trainer.n_gpus_per_node=$GPUS" "trainer.nnodes=$NODES" \
  trainer.save_freq=20 trainer.test_freq=10 trainer.total_epochs=5 \
  "$@"
