"""A script for torchrun: verl's training worker with FSDP2 on the CPU, over fixed data with uneven lengths.

    torchrun --nproc_per_node N worker.py MODEL OUT JSON

Writes OUT/rank-N.json: the loss of each optimizer step, what our engine logged, the controller's state, a weight sum.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia"}
import numpy as np
import torch

torch.set_num_threads(1)
import cpu_platform  # noqa: F401
from verl import DataProto
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    ActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    PolicyLossConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine import EngineRegistry
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

PROMPT, ANSWER, STEP, STEPS = 4, 8, 16, 2  # tokens, tokens, sequences an optimizer step, steps a batch
# Groups of uneven size, cut by optimizer steps, micro-batches and ranks.
GROUPS = [f"prompt-{i % 5 if i < 22 else 5}" for i in range(STEP * STEPS)]


def rewards_of(seed):
    """Of a whole batch: no two are alike."""
    return torch.rand(STEP * STEPS, generator=torch.Generator().manual_seed(100 + seed))


def share_of(rank, world):
    """The rows of a batch that a rank gets: of every optimizer step, its own."""
    size = STEP // world
    return torch.cat([torch.arange(size) + i * STEP + rank * size for i in range(STEPS)])


def batch_of(seed, rank, world):
    """This rank's share of a batch: of every optimizer step, its own rows."""
    generator, rows = torch.Generator().manual_seed(seed), STEP * STEPS
    ids = torch.randint(3, 90, (rows, PROMPT + ANSWER), generator=generator)
    lengths = torch.randint(1, ANSWER + 1, (rows,), generator=generator)
    adv = torch.randn(rows, 1, generator=generator).expand(-1, ANSWER).contiguous()
    mine = share_of(rank, world)
    ids, lengths, adv = ids[mine], lengths[mine], adv[mine]
    response_mask = (torch.arange(ANSWER)[None] < lengths[:, None]).long()
    attention = torch.cat([torch.ones(len(mine), PROMPT, dtype=torch.long), response_mask], 1)
    tensors = {
        "input_ids": ids,
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "response_mask": response_mask,
    }
    return DataProto.from_single_dict(tensors, meta_info={"temperature": 1.0, "compute_loss": False}), adv


def make(model, options):
    packed = options.get("packed", False)
    exact = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    exact["param_dtype"] = options.get("param_dtype", "fp32")
    model_config = HFModelConfig(
        path=model,
        use_remove_padding=packed,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )
    engine = FSDPEngineConfig(
        forward_only=False,
        fsdp_size=-1,
        strategy="fsdp2",
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=options.get("micro", 4),
        infer_micro_batch_size_per_gpu=8,
        use_torch_compile=False,
        model_dtype="fp32",
        mixed_precision=exact,
        use_remove_padding=packed,
    )
    # Small enough that ratios stay near 1: larger steps amplify the rounding of a sum that is cut in another way.
    optimizer = FSDPOptimizerConfig(lr=1e-3, lr_warmup_steps=0, total_training_steps=1000)
    actor = {"strategy": "fsdp2", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 4, **options.get("actor", {})}
    if "policy_loss" in options:
        from isentropic.engines.verl.engine import PolicyLoss

        actor["policy_loss"] = PolicyLoss(**options["policy_loss"])
    else:
        actor["policy_loss"] = PolicyLossConfig()
    if options.get("foreign"):
        # As with a backend that is not wrapped: verl's own engine, and our loss behind verl's.
        del EngineRegistry._engines["language_model"]["fsdp2"]["cuda", "nvidia"]
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model_config,
            engine_config=engine,
            optimizer_config=optimizer,
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    worker.set_loss_fn(partial(ppo_loss, config=ActorConfig(**actor)))
    return worker


def add_groups(data, seed, rank, world):
    """What verl's trainer knows of the samples: their prompts, and rewards at the last token."""
    mine, mask = share_of(rank, world), data.batch["response_mask"]
    scores = torch.zeros(mask.shape)
    scores[torch.arange(len(mine)), mask.sum(1) - 1] = rewards_of(seed)[mine]
    data.batch["token_level_scores"] = data.batch["token_level_rewards"] = scores
    data.non_tensor_batch["uid"] = np.array([GROUPS[i] for i in mine], dtype=object)


def break_head(engine, after):
    """From this optimizer step on, zeros come in place of entropies."""
    native = engine.prepare_model_outputs

    def prepare_model_outputs(*args, **kwargs):
        output = native(*args, **kwargs)
        if engine.control is not None and engine.control.step >= after:
            output["entropy"] = output["entropy"] * 0
        return output

    engine.prepare_model_outputs = prepare_model_outputs


def train(worker, seed, rank, world, noise=None, groups=False):
    """One batch; with ``noise`` the sampler's log-probs come with it, off by so many nats."""
    data, adv = batch_of(seed, rank, world)
    scored = left_right_2_no_padding(data.to_tensordict())
    tu.assign_non_tensor(scored, micro_batch_size_per_gpu=8, use_dynamic_bsz=False, calculate_entropy=True)
    output = worker.infer_batch(scored)
    logp, entropy = (no_padding_2_padding(tu.get(output, name), scored).float() for name in ("log_probs", "entropy"))
    data.batch["old_log_probs"], data.batch["entropy"], data.batch["advantages"] = logp, entropy, adv
    if noise is not None:
        generator = torch.Generator().manual_seed(seed)
        data.batch["rollout_log_probs"] = logp + noise * torch.randn(logp.shape, generator=generator)
    if groups:
        add_groups(data, seed, rank, world)
    batch = left_right_2_no_padding(data.to_tensordict())
    settings = {"global_batch_size": STEP, "mini_batch_size": STEP, "epochs": 1, "seed": 1, "temperature": 1.0}
    tu.assign_non_tensor(batch, **settings, calculate_entropy=True, dataloader_kwargs={"shuffle": False})
    return tu.get(worker.train_mini_batch(batch), "metrics")


def train_recipe(worker, name, rank, world):
    """A batch of this recipe, on the weights that the one before left: what it logged, how far it moved them."""
    from isentropic.engines.verl.engine import PolicyLoss
    from isentropic.engines.verl.plugin import AGG_MODES
    from isentropic.recipes import RECIPES

    worker.engine.control = None
    mode = AGG_MODES[RECIPES[name].reduction]
    actor = {"strategy": "fsdp2", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 4, "loss_agg_mode": mode}
    worker.set_loss_fn(partial(ppo_loss, config=ActorConfig(**actor, policy_loss=PolicyLoss(recipe=name))))
    before = [p.detach().clone() for p in worker.engine.module.parameters()]
    metrics = train(worker, 0, rank, world, groups=True)
    after = list(worker.engine.module.parameters())
    moved = sum((a - b).full_tensor().abs().sum().item() for a, b in zip(after, before, strict=True))
    return {"moved": moved, **{k: metrics[k] for k in ("entropy/mean", "clip/high_frac", "loss", "grad_norm")}}


def main(model, out, options):
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    assert world == int(options["world"]), "torchrun made another number of processes"
    worker, logged = make(model, options), []
    if "recipes" in options:
        result = {name: train_recipe(worker, name, rank, world) for name in options["recipes"]}
        Path(out, f"rank-{rank}.json").write_text(json.dumps(result))
        return
    if options.get("resume"):
        worker.load_checkpoint(options["resume"])
    if "broken_after" in options:
        break_head(worker.engine, options["broken_after"])
    first, error = options.get("first", 0), None
    for seed in range(first, first + options.get("batches", 2)):
        try:
            metrics = train(worker, seed, rank, world, options.get("noise"), options.get("groups", False))
        except (RuntimeError, ValueError) as raised:
            if "broken_after" not in options:
                raise
            error = f"{type(raised).__name__}: {raised}"
            break
        logged.append({k: v for k, v in metrics.items() if isinstance(v, list) and isinstance(v[0], float)})
    if options.get("save"):
        worker.save_checkpoint(options["save"], global_step=1)
    control = getattr(worker.engine, "control", None)
    state = None if control is None else control.loop.as_dict()["state"]
    weights = {k: v.full_tensor().double().abs().sum().item() for k, v in worker.engine.module.state_dict().items()}
    result = {"logged": logged, "state": state, "weights": weights, "engine": type(worker.engine).__name__}
    result |= {"error": error, "rewards": [rewards_of(seed).tolist() for seed in range(len(logged))], "groups": GROUPS}
    Path(out, f"rank-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
