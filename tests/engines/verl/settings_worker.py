"""A script for torchrun: verl's training worker on the CPU under several settings, each from the same weights.

    torchrun --nproc_per_node 1 settings_worker.py MODEL OUT JSON

Writes OUT/settings.json: a digest of the weights that each loss leaves, and what is logged, beside figures by hand.
"""

import hashlib
import json
import sys
from functools import partial
from pathlib import Path

import torch
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding
from worker import STEP, batch_of, make

# What does not change verl's loss: nothing, a monitor, and a shaping of which nothing is taken.
ZERO = {"recipe": "dapo", "recipe_options": {"shaping": "repo_r", "zeta": 0.0, "clip_high": 0.2}}
HELD = {"recipe": "adapo", "target": "3.0"}
SAME = {"plain": None, "watched": {}, "through": ZERO}


def score(worker, data, setting):
    """Log-probabilities and entropies ``[b t]`` of a batch by the weights as they are."""
    rows = left_right_2_no_padding(data.to_tensordict())
    tu.assign_non_tensor(rows, temperature=1.0, compute_loss=False, calculate_entropy=True, **cut(setting))
    output = worker.infer_batch(rows)
    return [no_padding_2_padding(tu.get(output, name), rows).float() for name in ("log_probs", "entropy")]


def cut(setting):
    """How verl cuts a batch into micro-batches."""
    if "tokens" in setting:
        return {"use_dynamic_bsz": True, "max_token_len_per_gpu": setting["tokens"]}
    return {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 4}


def generated(worker, seed, setting):
    """A batch, scored by the weights as they are; the sampler's log-probs are off by the setting's noise, in nats."""
    data, adv = batch_of(seed, 0, 1)
    data.meta_info = {}
    logp, entropy = score(worker, data, setting)
    generator = torch.Generator().manual_seed(seed)
    shift, moved = (torch.randn(logp.shape, generator=generator) for _ in range(2))
    data.batch["old_log_probs"], data.batch["entropy"], data.batch["advantages"] = logp, entropy, adv
    data.batch["rollout_log_probs"] = logp + setting.get("noise", 0.0) * shift
    if setting.get("actor", {}).get("use_kl_loss"):
        data.batch["ref_log_prob"] = logp + 0.3 * moved
    return data


def train(worker, data, version, setting):
    """The batch through verl's worker; rejected tokens as verl's v1 trainer sends them."""
    mask = data.batch["response_mask"]
    if "correction" in setting:
        data, _ = compute_rollout_correction_and_add_to_batch(data, setting["correction"])
    rows = left_right_2_no_padding(data.to_tensordict())
    rows["loss_mask"] = mask
    tu.assign_non_tensor_stack(rows, "extra_fields", [{"max_global_steps": version}] * len(rows))
    sizes = {"global_batch_size": STEP, "mini_batch_size": STEP, "epochs": setting.get("epochs", 1), "seed": 1}
    tu.assign_non_tensor(rows, **sizes, temperature=1.0, calculate_entropy=True, **cut(setting))
    tu.assign_non_tensor(rows, dataloader_kwargs={"shuffle": False})
    return tu.get(worker.train_mini_batch(rows), "metrics")


def prepare(worker, weights, loss, setting):
    """Start anew from these weights with this loss."""
    for parameter, value in zip(worker.engine.module.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    worker.engine.optimizer.state.clear()
    worker.engine.control, worker.engine._sent = None, None
    from isentropic.engines.verl.engine import PolicyLoss

    policy_loss = PolicyLossConfig() if loss is None else PolicyLoss(**loss)
    actor = {"strategy": "fsdp2", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 4, **setting.get("actor", {})}
    worker.set_loss_fn(partial(ppo_loss, config=ActorConfig(**actor, policy_loss=policy_loss)))


def digest(worker):
    state = worker.engine.module.state_dict()
    return hashlib.sha256(b"".join(x.full_tensor().numpy().tobytes() for x in state.values())).hexdigest()


def expected(worker, data, setting):
    """By hand, of a batch's first step: entropy, tokens, and what the token weights A·r of DAPO predict."""
    logp, entropy = (x[:STEP].double() for x in score(worker, data, setting))
    mask = data.batch["response_mask"][:STEP].bool()
    weights = torch.ones_like(logp)
    if "correction" in setting:
        corrected, _ = compute_rollout_correction_and_add_to_batch(data.slice(0, len(data)), setting["correction"])
        if "rollout_is_weights" in corrected.batch:
            weights = corrected.batch["rollout_is_weights"][:STEP].double()
        weights = weights * corrected.batch["response_mask"][:STEP]
    adv = data.batch["advantages"][:STEP].double()
    ratio = (logp - data.batch["old_log_probs"][:STEP].double()).exp()
    control = worker.engine.control
    high = 0.28 if control is None else control.loop.value
    inside = torch.where(adv > 0, ratio < 1 + high, ratio > 0.8)
    change = -weights * adv * ratio * inside * logp.exp() * (logp + entropy)
    n = int(mask.sum())
    lr = worker.engine.optimizer.param_groups[0]["lr"]
    found = {"entropy": (entropy * mask).sum().item() / n, "tokens": n, "ratio": (ratio * mask).sum().item() / n}
    return found | {"predicted": lr * (change * mask).sum().item() / n}


def run(worker, weights, setting):
    result = {"digests": {}}
    for name, loss in SAME.items():
        prepare(worker, weights, loss, setting)
        train(worker, generated(worker, 0, setting), 0, setting)
        result["digests"][name] = digest(worker)
    prepare(worker, weights, HELD, setting)
    batches, result["rows"], result["expected"] = [], [], []
    for turn in range(2):
        worker.engine.weights_sent(turn)
        # A trainer that is one step off samples the second batch before it trains on the first one.
        while len(batches) < min(2, turn + 1 + ("ahead" in setting)):
            batches.append((generated(worker, len(batches), setting), turn))
        data, version = batches[turn]
        if setting.get("ahead") == "decoupled":
            data.batch["old_log_probs"] = score(worker, data, setting)[0]
        result["expected"].append(expected(worker, data, setting))
        metrics = train(worker, data, version, setting)
        result["rows"].append({k: v for k, v in metrics.items() if isinstance(v, list) and isinstance(v[0], float)})
    return result


def main(model, out, options):
    torch.distributed.init_process_group("gloo")
    worker = make(model, {"packed": options["packed"], "policy_loss": {}})
    weights = [parameter.detach().clone() for parameter in worker.engine.module.parameters()]
    results = {name: run(worker, weights, setting) for name, setting in options["settings"].items()}
    Path(out, "settings.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
