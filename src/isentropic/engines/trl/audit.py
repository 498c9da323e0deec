"""The audit of a TRL trainer as it is configured: with its own sampler, mask and scoring.

A batch is generated and scored by the trainer's methods, with stand-ins for the rewards, and goes through
:func:`isentropic.entropy.audit.audit`. The trainer and every random state are left as they were, so that a run that was
audited is the run that was not.
"""

from __future__ import annotations

import copy
import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ...entropy.audit import AuditBatch, Clip, Report, Scored, audit, merged
from ...runs.record import write_json
from .compat import CHANGED_IN_PLACE, Trainer, generated_batch, scored_tokens, stop_at, tokenizer_of

logger = logging.getLogger("isentropic")
AUDIT_FILE = "audit.json"
# A whole distribution is kept for each sampled token: this many numbers at most.
_MAX_SCORES = 20_000_000
_REMEDIES = {
    "moe_routing": "TRL has no router replay: correct by the ratio to the sampler, "
    "vllm_importance_sampling_correction=True, or clip whole sequences, importance_sampling_level='sequence'",
    "batch_shape": "TRL scores old log-probs in the size and padding of the loss, so that its ratios see little of "
    "this; a sampler's log-probs see all of it: vllm_importance_sampling_correction=True, or train in fp32",
}
# Objects of the trainer that keep state of their own; a plain GRPOTrainer has none of them.
_OBJECTS = ("batches", "run_log", "run_log.samples")


@torch.no_grad()
def audit_trainer(trainer: Trainer, prompts: int = 2, tokens: int = 64, batches: int = 3) -> Report:
    """Audit a GRPOTrainer, or one of its subclasses, before it trains.

    Several batches are checked: one in which every completion is as long as the others holds no padding, and cannot
    show a mask that counts it. If none of them holds any, a further one is made to: its completions end at one more
    token.

    Args:
        trainer: made, not yet trained; under FSDP2 it has to be prepared, as it is when training begins.
        prompts: prompts of the training set that are answered in a batch, each by a group.
        tokens: limit of a completion's length; a large vocabulary lowers it.
        batches: how many, each of other prompts.

    Returns:
        Findings, each as the batch shows it in which it is worst; the checks that were made; measured figures. Every
        rank must call this; each sees its own completions.
    """
    padding, reports, batch = [], [], None
    with _untouched(trainer):
        trainer.model.train()
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        dataset = cycle(trainer.train_dataset)
        for i in range(batches + (batches > 1)):
            if i == batches and not _everywhere(trainer, not any(padding) and _ends_early(trainer, batch)):
                break
            batch = _generated(trainer, list(islice(dataset, prompts)), tokens)
            assert batch.generated is not None
            padding.append(1 - batch.generated.double().mean().item())
            with trainer.accelerator.autocast():
                reports.append(
                    audit(
                        model,
                        batch,
                        lambda scored, part: _score(trainer, scored, part),
                        _clip(trainer, batch),
                        torch.float32 if trainer.args.cast_lm_head_to_fp32 else None,
                        "trainer",
                        target=_target(trainer),
                    )
                )
    report = merged(reports)
    findings = [f._replace(remedy=_REMEDIES.get(f.code, f.remedy)) for f in report.findings]
    seen = f"{sum(padding) / len(padding):.0%} of positions" if any(padding) else "none in these batches"
    return report._replace(findings=findings, checked={**report.checked, "padding": seen})


def _everywhere(trainer: Trainer, holds: bool) -> bool:
    """Whether something holds on every rank: all of them generate, or none."""
    return bool(trainer.accelerator.gather(torch.tensor([holds], device=trainer.accelerator.device)).all())


def _ends_early(trainer: Trainer, batch: AuditBatch | None) -> bool:
    """Have completions end at a token that about half of a batch's have in their middle; False if there is none."""
    num = 0 if batch is None else batch.mask.shape[1]
    if batch is None or getattr(trainer, "generation_config", None) is None or num < 3:
        return False
    found = [set(row) for row in batch.input_ids[:, -num + 1 : -1].tolist()]
    counts = Counter(token for row in found for token in row)
    trainer.generation_kwargs = dict(trainer.generation_kwargs)  # changed in place; the trainer's own is put back
    stop_at(trainer, [min(counts, key=lambda token: abs(counts[token] - len(found) / 2))])
    return True


def _target(trainer: Trainer) -> str | None:
    """The entropy target that a knob is turned for; None if there is none."""
    recipe = getattr(trainer, "recipe", None)
    if recipe is None or not recipe.knob:
        return None
    return str(getattr(recipe.target, "written", recipe.target))


def _score(trainer: Trainer, model: Any, batch: AuditBatch) -> Scored:
    num = batch.mask.shape[1]
    return Scored(*scored_tokens(trainer, model, batch.input_ids, batch.attention_mask, num))


def _clip(trainer: Trainer, batch: AuditBatch) -> Clip:
    """The trainer's clip; CISPO's upper one is a ceiling, and its lower one is not there."""
    low, high = trainer.epsilon_low, trainer.epsilon_high
    if trainer.loss_type == "cispo":
        low, high = 1.0, max(high - 1, 0.0)
    by_sequence = getattr(trainer, "importance_sampling_level", "token") == "sequence"
    return Clip(low, high, max(1, round(batch.mask.sum(1).double().mean().item())) if by_sequence else 1)


def _generated(trainer: Trainer, prompts: list[Any], tokens: int) -> AuditBatch:
    """A batch by the trainer's own generation, and the distributions it was drawn from, if the sampler gives them."""
    rows = [row for row in prompts for _ in range(trainer.num_generations)]
    vocab = trainer.model.get_output_embeddings().weight.shape[0]
    limit = max(1, min(tokens, trainer.args.max_completion_length, _MAX_SCORES // (vocab * len(rows))))
    trainer.reward_funcs = [_stand_in] * len(trainer.reward_funcs)
    config = getattr(trainer, "generation_config", None)
    if config is not None:
        trainer.generation_config = config = copy.deepcopy(config)
        config.max_new_tokens = limit
    if hasattr(trainer, "batches"):
        trainer.batches.redraws = False
    with _scores(trainer) as seen:
        output = generated_batch(trainer, rows)
    ids, mask = output["completion_ids"], output["completion_mask"]
    tools = output.get("tool_mask")
    logp_sampler, kept = output.get("sampling_per_token_logps"), None
    if logp_sampler is None and tools is None and len(seen) == 1 and seen[0].shape[:2] == ids.shape:
        logp_sampler = seen[0].log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
        kept = seen[0].isfinite()
    sampler = config if config is not None else trainer.args
    return AuditBatch(
        torch.cat([output["prompt_ids"], ids], 1),
        torch.cat([output["prompt_mask"], mask], 1),
        mask if tools is None else mask * tools,
        _tokens_made(trainer, ids, bool(seen), output.get("sampling_per_token_logps"))
        if tools is None
        else mask * tools,
        output.get("old_per_token_logps"),
        logp_sampler,
        kept,
        trainer.temperature,
        sampler.top_k or 0,
        1.0 if sampler.top_p is None else sampler.top_p,
        sampler.min_p or 0.0,
    )


def _stand_in(completions: list[Any], **columns: Any) -> list[float]:
    """Rewards that differ within every group, so that nothing is sampled again: an audit judges no answer."""
    return [float(i % 2) for i in range(len(completions))]


def _tokens_made(trainer: Trainer, ids: torch.Tensor, native: bool, logp: torch.Tensor | None) -> torch.Tensor:
    """What the sampler made, read from the tokens alone: up to the first end of text.

    Without one, the native sampler has filled the row, and may have drawn the padding token; another one may have
    stopped on a string, and what follows is padding. TRL pads a sampler's log-probs by 0, which a drawn token lacks.
    """
    ends = torch.isin(ids, torch.tensor(trainer.eos_token_ids, device=ids.device))
    padding = ids == tokenizer_of(trainer).pad_token_id
    trailing = padding.flip(1).long().cumprod(1).flip(1).bool()
    ended = ends.any(1, keepdim=True)
    drawn = torch.zeros_like(padding) if logp is None else logp != 0
    unended = torch.ones_like(padding) if native else ~trailing | drawn
    sampled = torch.where(ended, ends.long().cumsum(1) - ends.long() == 0, unended)
    if trainer.mask_truncated_completions:
        sampled = sampled & ended
    return sampled.long()


@contextmanager
def _scores(trainer: Trainer) -> Iterator[list[torch.Tensor]]:
    """Have ``generate`` also give the logits it drew from, after temperature, truncation and penalties: [b t v]."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    native, seen = model.generate, []

    def generate(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config")
        if config is None or config.return_dict_in_generate:
            # A rollout_func's own call, which hands over the log-probs itself.
            return native(*args, **kwargs)
        config = copy.deepcopy(config)
        config.output_scores = config.return_dict_in_generate = True
        out = native(*args, **{**kwargs, "generation_config": config})
        seen.append(torch.stack(out.scores, 1))
        return out.sequences

    model.generate = generate
    try:
        yield seen
    finally:
        del model.generate


@contextmanager
def _untouched(trainer: Trainer) -> Iterator[None]:
    """Put back everything that generating and scoring a batch changes, random states included."""
    attributes = dict(vars(trainer))
    attributes |= {name: copy.deepcopy(attributes[name]) for name in CHANGED_IN_PLACE if name in attributes}
    objects = [attrgetter(name)(trainer) for name in _OBJECTS if hasattr(trainer, name.partition(".")[0])]
    states = [(owner, dict(vars(owner))) for owner in objects]
    tokens_seen, training = trainer.state.num_input_tokens_seen, trainer.model.training
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  (rewards, tools and environments use it)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002
        trainer.model.train(training)
        trainer.state.num_input_tokens_seen = tokens_seen
        for name in set(vars(trainer)) - set(attributes):
            delattr(trainer, name)
        vars(trainer).update(attributes)
        for owner, state in states:
            vars(owner).update(state)


class StartAudit(TrainerCallback):
    """Audits a trainer when its training starts, warns of serious findings, and writes audit.json to its run directory.

    Args:
        trainer: the trainer this callback is added to.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report = audit_trainer(self.trainer)
        if not state.is_world_process_zero:
            return
        write_json(Path(args.output_dir) / AUDIT_FILE, report.as_dict())
        for finding in report.serious:
            logger.warning("audit: %s (%s); %s; %s", finding.what, finding.where, finding.effect, finding.remedy)
