"""The audit of a verl worker as it is configured: its first micro-batch, before the first update, on rank 0.

No pass is added: what the head gave, what the loss got, and the log-probs of the sampler that came with the data
are held against one another in fp64.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ...entropy.audit import Clip, Finding, Report, Scored, audit_rows, routing_findings
from ...entropy.audit.probe import output_dtype
from ...recipes import Recipe
from ...runs.record import write_json
from ...types import TokenBatch
from .compat import Engine, Keys, aligned, answers_of, holds, setting, temperature_of

if TYPE_CHECKING:
    from .control import Control

logger = logging.getLogger("isentropic")
AUDIT_FILE = "audit.json"
# A row of the vocabulary is held for each token that is looked at, in fp64: this many numbers at most.
_MAX_NUMBERS = 4_000_000
_FP32 = "actor_rollout_ref.actor.fsdp_config"
_SAMPLER = (
    "+actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides.head_dtype=float32, "
    "+actor_rollout_ref.rollout.engine_kwargs.sglang.enable_fp32_lm_head=True"
)
# verl marks the data of a worker that replays routes, R2 or R3.
_REPLAY = "enable_routing_replay"
_REMEDIES = {
    "head_dtype": f"keep fp32 master weights: {_FP32}.model_dtype=fp32",
    "logits_dtype": f"compute in fp32, +{_FP32}.mixed_precision.param_dtype=fp32, in the sampler too ({_SAMPLER}); or "
    "accept the error, which every reading of entropy then carries",
    "logp_dtype": f"+{_FP32}.mixed_precision.param_dtype=fp32",
    "entropy_dtype": f"verl computes entropies in the dtype of the logits: +{_FP32}.mixed_precision.param_dtype=fp32",
    "fsdp_output_dtype": "verl sets no output_dtype; take it out of FSDP2's policy",
    "stale_logp": "verl computes old log-probs in a pass of its own: give both passes one packing and one precision, "
    "and switch dropout off",
    "sampler_mismatch": f"run both in one precision, the head's logits in fp32 ({_SAMPLER}), or have verl correct for "
    "the difference: algorithm.rollout_correction.rollout_is=token",
    "moe_routing": "on Megatron: actor_rollout_ref.actor.megatron.router_replay.mode=R3 with "
    "actor_rollout_ref.rollout.enable_rollout_routing_replay=True; on VeOmni actor.veomni.router_replay.mode; FSDP has "
    "none: algorithm.rollout_correction.rollout_is=token",
    "temperature": "leave one temperature to sampler and trainer: actor_rollout_ref.rollout.temperature",
}


def first_look(engine: Engine, control: Control) -> None:
    """Have the next micro-batch of a worker looked at before it trains; serious findings are warned of."""
    control.logits.once = True

    def look(batch: TokenBatch, logits: torch.Tensor | None, data: Any) -> None:
        with torch.no_grad():
            report = audit_micro_batch(engine.module, control.recipe, batch, logits, data)
        if control.record is not None:
            control.record.path.mkdir(parents=True, exist_ok=True)
            write_json(control.record.path / AUDIT_FILE, report.as_dict())
        for f in report.serious:
            logger.warning("audit: %s (%s); %s; %s", f.what, f.where, f.effect, f.remedy)

    control.audit = look


def audit_micro_batch(module: Any, recipe: Recipe, batch: TokenBatch, logits: torch.Tensor | None, data: Any) -> Report:
    """What the worker's first micro-batch shows of precision and sampling.

    Args:
        module: the worker's model.
        recipe: for its clip.
        batch: token facts ``[b t]``.
        logits: ``[tokens v]`` packed, as the head gave them; None if verl's engine makes none.
        data: verl's micro-batch.
    """
    if logits is None:
        return Report([], {"logits": "not made by this engine: nothing was checked"}, {})
    keep = batch.mask.bool()
    limit = max(1, _MAX_NUMBERS // logits.shape[-1])
    rows = answers_of(torch.arange(len(logits), device=logits.device)[:, None], data)[..., 0][keep][:limit]
    ids = aligned(data[Keys.ANSWERS], keep.shape[1]).long()[keep][:limit]

    def some(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[keep][:limit]

    sampler = data[Keys.LOGP_SAMPLER] if holds(data, Keys.LOGP_SAMPLER) else None
    temperature, dtypes = temperature_of(data), _dtypes(module, logits.device.type)
    logp, entropy = some(batch.logp), some(batch.entropy)
    assert logp is not None
    findings, figures = audit_rows(
        logits[rows],
        ids,
        Scored(logp, entropy),
        dtypes,
        temperature,
        _clip(recipe, batch),
        some(batch.logp_old),
        None if sampler is None else some(aligned(sampler, keep.shape[1]).float()),
        "worker",
        str(recipe.target) if recipe.knob else None,
    )
    findings += routing_findings(getattr(module, "config", None), bool(setting(data, _REPLAY, False)))
    checked = {name: "none" if x is None else str(x).removeprefix("torch.") for name, x in dtypes.items()}
    checked |= {
        "logits": str(logits.dtype).removeprefix("torch."),
        "old_logp": "compared",
        "sampler_logp": "none given" if sampler is None else "compared",
        "sampling": f"temperature {temperature:g}",
        "tokens": str(len(ids)),
    }
    return Report([_with_remedy(f) for f in findings], checked, figures)


def _with_remedy(finding: Finding) -> Finding:
    """The finding with verl's remedy."""
    return finding._replace(remedy=_REMEDIES.get(finding.code, finding.remedy))


def _dtypes(module: Any, device: str) -> dict[str, torch.dtype | None]:
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    return {
        "head": None if head is None else head.weight.dtype,
        "autocast": torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        "output": output_dtype(module),
    }


def _clip(recipe: Recipe, batch: TokenBatch) -> Clip:
    low, high = (1.0 if recipe.objective == "cispo" else recipe.clip_low), recipe.clip_high
    by_sequence = recipe.objective == "sequence_clipped"
    length = max(1, round(batch.mask.sum(1).double().mean().item())) if by_sequence else 1
    return Clip(min(low, 1.0), high, length)
