"""The audit of a model and a batch: the dtypes it computes in, and the error of its numbers against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .casts import from_logits
from .checks import (
    LOW_PRECISION,
    SAMPLER_HEAD,
    cast_effect,
    clipped_share,
    describe_error,
    effective_dtype,
    entropy_findings,
    fitted_temperature,
    kept_tokens,
    mask_findings,
    ratio_findings,
    rms,
    routing_findings,
    sampler_findings,
    shape_findings,
    target_findings,
    truncation_findings,
)
from .findings import CLIP, SEVERITIES, VISIBLE, Clip, Finding, Report, grade, grade_entropy

MAX_LOGITS = 20_000_000
# Sequences that are also scored alone; every rank scores as many, for a sharded forward is a collective call.
NUM_ALONE = 4


class AuditBatch(NamedTuple):
    """Sampled sequences, and how they were sampled.

    Attributes:
        input_ids, attention_mask: ``[b s]``, prompts on the left, the ``t`` completion tokens last.
        mask: ``[b t]`` non-zero where the loss and the entropy count a token.
        generated: ``[b t]`` non-zero where the policy generated the token; None means the attention mask.
        logp_old: ``[b t]`` log-probs in the denominator of the ratio, nats; no update may lie in between.
        logp_sampler: ``[b t]`` log-probs under the distribution the tokens were really drawn from, nats.
        kept: ``[b t v]`` true where the sampler could draw the token; None derives it from ``top_k``, ``top_p`` and
            ``min_p``.
        temperature, top_k, top_p, min_p: of the sampler, as the trainer is configured.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    generated: Tensor | None = None
    logp_old: Tensor | None = None
    logp_sampler: Tensor | None = None
    kept: Tensor | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Scored(NamedTuple):
    """What a scoring pass returns: log-probs ``[b t]`` and entropies ``[b t]``, nats; None if it has no entropies."""

    logp: Tensor
    entropy: Tensor | None


Score = Callable[[Any, AuditBatch], Scored]


class _HeadOutputs(NamedTuple):
    """The logits of a plain forward pass, recomputed from the inputs of its head."""

    exact: Tensor  # [b t v] fp64 logits of the hidden states and weights that the head received
    noisy: Tensor | None  # the same, with the bits that low-precision weights lost drawn at random
    dtypes: dict[str, torch.dtype]


@contextmanager
def _mode(model: Any, training: bool) -> Iterator[None]:
    was_training = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was_training)


def _completion_rows(logits: Tensor, num_tokens: int) -> Tensor:
    """The rows that predict the last ``num_tokens`` tokens."""
    return logits[:, -num_tokens - 1 : -1]


def score_logits(model: Any, batch: AuditBatch) -> Scored:
    """Score with the model's own logits and an fp32 log-softmax, as a hand-written loop would."""
    from ..statistics import logits_stats

    num_tokens = batch.mask.shape[1]
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    stats = logits_stats(_completion_rows(logits, num_tokens), batch.input_ids[:, -num_tokens:], batch.temperature)
    return Scored(stats.logp, stats.entropy)


def _matmul(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden · weightᵀ`` in fp64, one slice of the vocabulary at a time."""
    dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
    with torch.autocast(hidden.device.type, enabled=False):
        slices = [hidden.to(dtype) @ w.to(dtype).T for w in weight.split(8192)]
    product = torch.cat(slices, -1)
    return product if bias is None else product + bias.to(dtype)


def _full_tensor(parameter: Any) -> Any:
    """Gather a parameter that FSDP2 shards as a DTensor. All ranks must call this."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _head_outputs(model: Any, batch: AuditBatch) -> _HeadOutputs:
    """Run a forward pass and compute exact logits from the inputs of its head."""
    if hasattr(model, "reshard"):
        # After a forward, FSDP2 leaves the outermost parameters in the cast dtype; the shards have the stored one.
        model.reshard()
    head, num_tokens, captured = model.get_output_embeddings(), batch.mask.shape[1], {}
    weight_dtype = head.weight.dtype

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        hidden, weight = _completion_rows(args[0], num_tokens), _full_tensor(module.weight).detach()
        captured["exact"] = _matmul(hidden, weight, _full_tensor(module.bias) if module.bias is not None else None)
        if weight_dtype in LOW_PRECISION:
            generator = torch.Generator(weight.device).manual_seed(0)
            magnitude = torch.ldexp(torch.ones_like(weight, dtype=torch.float32), weight.float().frexp().exponent - 1)
            noise = (torch.rand(weight.shape, generator=generator, device=weight.device) - 0.5) * magnitude
            noisy_weight = weight.float() + noise * torch.finfo(weight_dtype).eps
            captured["noisy"] = captured["exact"] + _matmul(hidden, noisy_weight - weight.float(), None)
        captured["hidden"], captured["head_out"] = args[0].dtype, output.dtype

    handle = head.register_forward_hook(hook)
    try:
        with _mode(model, training=False):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    finally:
        handle.remove()
    returned = _completion_rows(logits, num_tokens).to(captured["exact"].dtype)
    if rms(returned - captured["exact"]) > 0.05 * captured["exact"].std().item():
        # The model caps or scales the output of its head: the logits it returns are the best reference there is.
        captured["exact"], captured["noisy"] = returned, None
    dtypes = {
        "head": weight_dtype,
        "hidden": captured["hidden"],
        "head_out": captured["head_out"],
        "logits": logits.dtype,
    }
    return _HeadOutputs(captured["exact"], captured.get("noisy"), dtypes)


def output_dtype(model: Any) -> torch.dtype | None:
    """The dtype FSDP2 casts the outputs of the whole model to; None if it casts none or the model has no FSDP2."""
    get_state = getattr(model, "_get_fsdp_state", None)
    policy = getattr(get_state(), "_mp_policy", None) if callable(get_state) else None
    return getattr(policy, "output_dtype", None)


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


_REMEDIES = {
    "head_dtype": "keep the head's master weights in fp32, or in TRL set cast_lm_head_to_fp32=True",
    "logits_dtype": "compute the head in fp32, in trainer and sampler alike: in TRL set cast_lm_head_to_fp32=True, "
    f"elsewhere call it outside autocast; {SAMPLER_HEAD}",
    "fsdp_output_dtype": "MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, "
    "output_dtype=None): Accelerate sets output_dtype to the mixed precision unless it is given a policy",
    "logp_dtype": "return log-probs in fp32",
    "entropy_dtype": "return entropies in fp32",
}


class CountedRows(NamedTuple):
    """The rows of the counted tokens, flat, which every check of one audit reads."""

    logits: Tensor
    noisy: Tensor | None
    ids: Tensor
    exact: tuple[Tensor, Tensor]
    temperature: float
    clip: Clip


def dtype_findings(
    rows: CountedRows,
    scored: Scored,
    dtypes: dict[str, torch.dtype | None],
    fsdp_dtype: torch.dtype | None,
    returns_logp: bool,
) -> list[Finding]:
    """Findings on casts: the head's weights, FSDP2's outputs, logits, log-probs and entropies."""
    findings = []

    def add(code: str, what: str, where: str, nats: float, clipped_frac: float) -> None:
        effect = describe_error(nats, clipped_frac, rows.clip)
        findings.append(
            Finding(grade(nats, clipped_frac), code, what, where, effect, _REMEDIES[code], nats, clipped_frac)
        )

    def rounding_cost(place: str, dtype: torch.dtype) -> tuple[float, float]:
        return cast_effect(rows.logits, rows.ids, place, dtype, rows.temperature, rows.clip)

    if dtypes["head"] in LOW_PRECISION and rows.noisy is not None:
        error = from_logits(rows.noisy, rows.ids, temperature=rows.temperature)[0] - rows.exact[0]
        what = f"the head's weights are {_dtype_name(dtypes['head'])}: updates below half an ulp are lost"
        add("head_dtype", what, "output embedding", rms(error), clipped_share(error, rows.clip))
    if fsdp_dtype in LOW_PRECISION:
        what = f"FSDP2 rounds every output of the model to {_dtype_name(fsdp_dtype)}, fp32 log-probs too"
        add(
            "fsdp_output_dtype",
            what,
            "MixedPrecisionPolicy.output_dtype",
            *rounding_cost("logp" if returns_logp else "logits", fsdp_dtype),
        )
    if dtypes["logits"] in LOW_PRECISION and (
        returns_logp or dtypes["head_out"] in LOW_PRECISION or fsdp_dtype not in LOW_PRECISION
    ):
        autocast_note = "" if dtypes["autocast"] is None else f", under autocast to {_dtype_name(dtypes['autocast'])}"
        what = f"logits are {_dtype_name(dtypes['logits'])} before the log-softmax"
        add("logits_dtype", what, f"output of the head{autocast_note}", *rounding_cost("logits", dtypes["logits"]))
    if dtypes["logp"] in LOW_PRECISION and fsdp_dtype not in LOW_PRECISION:
        what = f"log-probs are rounded to {_dtype_name(dtypes['logp'])}"
        add("logp_dtype", what, "log-softmax or returned log-probs", *rounding_cost("logp", dtypes["logp"]))
    if dtypes["entropy"] in LOW_PRECISION and fsdp_dtype not in LOW_PRECISION and scored.entropy is not None:
        error, mean = scored.entropy - rows.exact[1], rows.exact[1].mean().item()
        entropy_error, shift = rms(error), error.mean().item()
        what = f"entropies are rounded to {_dtype_name(dtypes['entropy'])}"
        findings.append(
            Finding(
                grade_entropy(shift, mean),
                "entropy_dtype",
                what,
                "returned entropies",
                f"{entropy_error:.2g} nats rms, {shift:+.2g} on average",
                _REMEDIES["entropy_dtype"],
                entropy_error,
            )
        )
    return findings


def score_findings(rows: CountedRows, scored: Scored, explained: float, where: str) -> list[Finding]:
    """Findings on log-probs and entropies that no cast explains."""
    error = scored.logp - rows.exact[0]
    nats, clipped_frac = rms(error), clipped_share(error, rows.clip)
    if not nats <= max(VISIBLE, 3 * explained):
        effect = describe_error(nats, clipped_frac, rows.clip)
        fitted = fitted_temperature(rows.logits, rows.ids, scored.logp)
        refitted = from_logits(rows.logits, rows.ids, temperature=fitted)[0]
        if rms(refitted - scored.logp) < nats / 5 and abs(fitted / rows.temperature - 1) > 1e-3:
            what = f"tokens are scored at temperature {fitted:.3g} and sampled at {rows.temperature:.3g}"
            remedy = "divide the logits by the sampling temperature before the log-softmax"
            return [Finding(grade(nats, clipped_frac), "temperature", what, where, effect, remedy, nats, clipped_frac)]
        what, remedy = "log-probs are not those of the model's hidden states and head", "compare with token_entropy"
        return [Finding(grade(nats, clipped_frac), "logp_wrong", what, where, effect, remedy, nats, clipped_frac)]
    return entropy_findings(scored.entropy, rows.exact[1], where, 3 * explained)


def _alone(batch: AuditBatch, row: int) -> AuditBatch:
    """One sequence of a batch without its padding; its first tokens are the first ``t`` of the batch's row."""
    num_prompt = batch.input_ids.shape[1] - batch.mask.shape[1]
    present = batch.attention_mask[row].nonzero()[:, 0]
    # At least one token of the prompt and one of the completion remain.
    start = min(int(present[0]), num_prompt - 1) if len(present) else 0
    end = max(int(present[-1]) + 1, num_prompt + 1) if len(present) else num_prompt + 1
    cut: dict[str, Any] = {
        name: x[row : row + 1, start:end]
        if name in ("input_ids", "attention_mask")
        else x[row : row + 1, : end - num_prompt]
        for name, x in batch._asdict().items()
        if isinstance(x, Tensor)
    }
    return batch._replace(**cut)


def _shape_findings(
    model: Any, batch: AuditBatch, score: Score, counted: Tensor, whole: Tensor, clip: Clip, where: str
) -> list[Finding]:
    """Score some sequences alone, and compare with their log-probs in the whole batch; the model is in eval mode."""
    num_sequences, pairs = len(batch.input_ids), []
    for k in range(NUM_ALONE):
        row = k * num_sequences // NUM_ALONE
        logp = score(model, _alone(batch, row)).logp[0]
        inside = counted[row, : len(logp)]
        pairs.append(torch.stack([whole[row, : len(logp)][inside].double(), logp[inside].double()]))
    logp_whole, logp_alone = torch.cat(pairs, dim=1)
    return shape_findings(logp_whole, logp_alone, clip, where)


def _first_sequences(batch: AuditBatch, vocab: int) -> AuditBatch:
    num_sequences = max(1, MAX_LOGITS // (vocab * batch.input_ids.shape[1]))
    first: dict[str, Any] = {
        name: tensor[:num_sequences] for name, tensor in batch._asdict().items() if isinstance(tensor, Tensor)
    }
    return batch._replace(**first)


def _check_batch(batch: AuditBatch) -> None:
    (num_sequences, length), num_tokens = batch.input_ids.shape, batch.mask.shape[1]
    if not 0 < num_tokens < length:
        raise ValueError(
            f"mask must cover 1 to {length - 1} of the {length} tokens, got {num_tokens}; the first token has no row"
        )
    for name in ("mask", "generated", "logp_old", "logp_sampler"):
        tensor = getattr(batch, name)
        if tensor is not None and tuple(tensor.shape) != (num_sequences, num_tokens):
            raise ValueError(
                f"{name} must be [b t] = {(num_sequences, num_tokens)}, got {tuple(tensor.shape)}; "
                "align it to the last tokens"
            )
    if not bool(batch.mask.bool().any()):
        raise ValueError("mask must count at least 1 token, got none; give completions that were sampled")
    if not batch.temperature > 0:
        raise ValueError(f"temperature must be > 0, got {batch.temperature}; greedy decoding has no entropy")


@torch.no_grad()
def audit(
    model: Any,
    batch: AuditBatch,
    score: Score = score_logits,
    clip: Clip = CLIP,
    logits_dtype: torch.dtype | None = None,
    where: str = "model",
    replays_routing: bool = False,
    target: str | None = None,
) -> Report:
    """Find errors in log-probs, ratios and entropies before any update; the model is left as it was.

    Args:
        model: ``model(input_ids=, attention_mask=, use_cache=).logits`` and ``get_output_embeddings()``, as in
            transformers. Its train or eval mode is assumed to be the one the loss uses.
        batch: tokens sampled from this very model.
        score: how the loss computes its log-probs and entropies; by default from logits, by an fp32 log-softmax. It is
            also called with single sequences, whose padding is cut off.
        clip: the clip that errors of the ratio are compared with.
        logits_dtype: of the logits inside ``score``; by default the dtype of the head's output in a plain forward.
        where: name of the scoring in findings.
        replays_routing: whether a mixture of experts takes the sampler's routes.
        target: the entropy target of the run, as its recipe names it.

    Returns:
        Findings, most severe first; the settings that were checked; measured figures.

    Raises:
        ValueError: the shapes of the batch do not match, or no token is counted.

    See ``docs/precision.md`` for every finding and its remedy.
    """
    _check_batch(batch)
    batch = _first_sequences(batch, model.get_output_embeddings().weight.shape[0])
    outputs = _head_outputs(model, batch)
    with _mode(model, training=False):
        scored = score(model, batch)
    first_pass, second_pass = score(model, batch), score(model, batch)
    ids, counted = batch.input_ids[:, -batch.mask.shape[1] :], batch.mask.bool()
    exact = [
        values.view(ids.shape)
        for values in from_logits(outputs.exact.flatten(0, 1), ids.flatten(), temperature=batch.temperature)
    ]
    generated = batch.attention_mask[:, -ids.shape[1] :] if batch.generated is None else batch.generated
    padding = (batch.attention_mask[:, -ids.shape[1] :] == 0) if batch.generated is None else ~generated.bool()
    findings = mask_findings(batch.mask, generated, padding, exact[1])
    counted &= generated.bool()
    with _mode(model, training=False):
        findings += _shape_findings(model, batch, score, counted, scored.logp, clip, where)
    findings += routing_findings(getattr(model, "config", None), replays_routing)
    noisy = None if outputs.noisy is None else outputs.noisy[counted]
    rows = CountedRows(
        outputs.exact[counted], noisy, ids[counted], (exact[0][counted], exact[1][counted]), batch.temperature, clip
    )
    scored = Scored(scored.logp[counted], None if scored.entropy is None else scored.entropy[counted])
    device, default_score = ids.device.type, score is score_logits
    dtypes: dict[str, torch.dtype | None] = {
        **outputs.dtypes,
        "logits": logits_dtype or outputs.dtypes["logits" if default_score else "head_out"],
        "autocast": torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        "logp": effective_dtype(scored.logp),
        "entropy": None if scored.entropy is None else effective_dtype(scored.entropy),
    }
    cast_findings = dtype_findings(rows, scored, dtypes, output_dtype(model), not default_score)
    explained = max((f.nats or 0.0 for f in cast_findings), default=0.0)
    findings += cast_findings + score_findings(rows, scored, explained, where)
    logp_old = None if batch.logp_old is None else batch.logp_old[counted]
    findings += ratio_findings(first_pass.logp[counted], second_pass.logp[counted], logp_old, clip, where)
    findings += _sampling_findings(rows, batch, counted, scored.logp)
    findings += target_findings(rows.logits, rows.temperature, target)
    return Report(
        sorted(findings, key=lambda f: SEVERITIES.index(f.severity)),
        _checked_settings(dtypes, output_dtype(model), batch, int(counted.sum())),
        _figures(rows, scored, first_pass.logp[counted], logp_old, batch, counted),
    )


def _sampling_findings(rows: CountedRows, batch: AuditBatch, counted: Tensor, logp: Tensor) -> list[Finding]:
    """Findings on truncated sampling, and on the sampler's log-probs against the trainer's."""
    kept = None if batch.kept is None else batch.kept[counted]
    if kept is None and (batch.top_k or batch.top_p < 1 or batch.min_p):
        kept = kept_tokens(rows.logits, rows.temperature, batch.top_k, batch.top_p, batch.min_p)
    findings = []
    if kept is not None:
        where = f"sampler: top_k={batch.top_k}, top_p={batch.top_p:g}, min_p={batch.min_p:g}"
        findings += truncation_findings(rows.logits, kept, rows.temperature, rows.clip, where)
    if batch.logp_sampler is not None:
        logp_sampler = batch.logp_sampler[counted].to(logp.dtype)
        findings += sampler_findings(rows.logits, rows.ids, logp, logp_sampler, rows.temperature, kept, rows.clip)
    return findings


def _checked_settings(
    dtypes: dict[str, torch.dtype | None], fsdp_dtype: torch.dtype | None, batch: AuditBatch, num_tokens: int
) -> dict[str, str]:
    # A cast after the log-softmax restores no bits: the log-probs have the coarser dtype of the two.
    all_dtypes = {**dtypes, "log_softmax": dtypes["logp"]}
    names = ("head", "hidden", "logits", "log_softmax", "logp", "entropy")
    return {
        **{name: "none" if all_dtypes[name] is None else _dtype_name(all_dtypes[name]) for name in names},
        "autocast": "off" if dtypes["autocast"] is None else _dtype_name(dtypes["autocast"]),
        "fsdp_output": "none" if fsdp_dtype is None else _dtype_name(fsdp_dtype),
        "old_logp": "compared" if batch.logp_old is not None else "none given",
        "sampler_logp": "compared" if batch.logp_sampler is not None else "none given",
        "sampling": f"temperature {batch.temperature:g}, top_k {batch.top_k}, top_p {batch.top_p:g}, "
        f"min_p {batch.min_p:g}",
        "tokens": str(num_tokens),
    }


def _figures(
    rows: CountedRows, scored: Scored, first_pass: Tensor, logp_old: Tensor | None, batch: AuditBatch, counted: Tensor
) -> dict[str, float]:
    figures = {"entropy/mean": rows.exact[1].mean().item(), "logp_error": rms(scored.logp - rows.exact[0])}
    if scored.entropy is not None:
        figures["entropy_error"] = rms(scored.entropy - rows.exact[1])
    if logp_old is not None:
        figures["ratio_error"] = rms(first_pass - logp_old)
    if batch.logp_sampler is not None:
        logp_sampler = batch.logp_sampler[counted]
        finite = logp_sampler.isfinite()
        figures["sampler_error"] = rms((scored.logp - logp_sampler)[finite])
    return figures
